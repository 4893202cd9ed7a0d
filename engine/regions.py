"""Sets of regions as bitmaps: what the engine keeps, hands around and sends, whatever their number.

Owns their memory: one bit per region of the volume up to the highest named, 2 MiB for the largest volume
where a tuple of ints would take 600 MiB; and their form in control messages, which is that of
``protocol/regions.py``. Union, difference, packing and looking for the next region run over whole bytes, not
over regions, so that none of them holds up the event loop.

A set that was handed over in an event or an action is not changed any more: who wants to go on with it takes
a copy.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator

from protocol.errors import BadRequest
from protocol.regions import BITMAP_MARK, REGIONS_MAX

_NONZERO = re.compile(rb"[^\0]")
_BITS = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))

assert array("I").itemsize == 4


class RegionSet:
    """Invariant: ``count`` is the number of bits set."""

    __slots__ = ("_bits", "count")
    __hash__ = None  # type: ignore[assignment]  # it changes

    def __init__(self, regions: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        self.count = 0
        self.update(regions)

    @classmethod
    def from_packed(cls, data: object) -> RegionSet:
        """Raises BadRequest for what is not a packed set."""
        if not isinstance(data, bytes):
            raise BadRequest(reason=f"regions are packed bytes, not {type(data).__name__}")
        made = cls()
        if data.startswith(BITMAP_MARK):
            made._take(int.from_bytes(data[len(BITMAP_MARK) :], "little"))
        elif len(data) % 4 == 0:
            if max((region for (region,) in struct.iter_unpack("<I", data)), default=0) >= REGIONS_MAX:
                raise BadRequest(reason="a region is past the largest volume")
            made.update(region for (region,) in struct.iter_unpack("<I", data))
        else:
            raise BadRequest(reason="packed regions are a multiple of 4 bytes")
        if len(made._bits) > REGIONS_MAX // 8:
            raise BadRequest(reason="a region is past the largest volume")
        return made

    def packed(self) -> bytes:
        """As ``protocol.regions.pack_regions`` packs them."""
        bitmap_bytes = len(self._bits.rstrip(b"\0"))
        if 4 * self.count <= len(BITMAP_MARK) + bitmap_bytes and self.count:
            numbers = self.numbers()
            if sys.byteorder == "big":
                numbers.byteswap()
            return numbers.tobytes()
        return BITMAP_MARK + bytes(self._bits[:bitmap_bytes]) if self.count else b""

    def numbers(self) -> array[int]:
        """Ascending u32 numbers: what the data plane takes, at 4 bytes each."""
        return array("I", self)

    def copy(self) -> RegionSet:
        return RegionSet(self)

    def __len__(self) -> int:
        return self.count

    def __contains__(self, region: object) -> bool:
        assert isinstance(region, int)
        at = region >> 3
        return at < len(self._bits) and bool(self._bits[at] >> (region & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        """Ascending. What is changed meanwhile is not seen."""
        bits = bytes(self._bits)
        for found in _NONZERO.finditer(bits):
            at = found.start()
            base = 8 * at
            for bit in _BITS[bits[at]]:
                yield base + bit

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RegionSet):
            return self._bits.rstrip(b"\0") == other._bits.rstrip(b"\0")
        if isinstance(other, tuple | list | set | frozenset):
            return len(other) == self.count and all(region in self for region in other)
        return NotImplemented

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.take_from(0, 8)))
        return f"RegionSet({first}{', ...' if self.count > 8 else ''}; {self.count})"

    def add(self, region: int) -> bool:
        """False if it was there."""
        assert region >= 0
        if region in self:
            return False
        at = region >> 3
        if at >= len(self._bits):
            self._bits.extend(bytes(at + 1 - len(self._bits)))
        self._bits[at] |= 1 << (region & 7)
        self.count += 1
        return True

    def discard(self, region: int) -> bool:
        """False if it was not there."""
        if region not in self:
            return False
        self._bits[region >> 3] &= ~(1 << (region & 7))
        self.count -= 1
        return True

    def update(self, regions: Iterable[int]) -> None:
        if isinstance(regions, RegionSet):
            self._take(self._number() | regions._number())
            return
        for region in regions:
            self.add(region)

    def difference_update(self, regions: Iterable[int]) -> None:
        if isinstance(regions, RegionSet):
            self._take(self._number() & ~regions._number())
            return
        for region in regions:
            self.discard(region)

    def take_from(self, start: int, count_max: int) -> list[int]:
        """The lowest regions at or after ``start``, at most ``count_max``. They stay in the set."""
        found: list[int] = []
        at = start >> 3
        while (hit := _NONZERO.search(self._bits, at)) is not None:
            at = hit.start()
            for bit in _BITS[self._bits[at]]:
                if 8 * at + bit >= start:
                    found.append(8 * at + bit)
                    if len(found) == count_max:
                        return found
            at += 1
        return found

    def _number(self) -> int:
        return int.from_bytes(self._bits, "little")

    def _take(self, number: int) -> None:
        self._bits = bytearray(number.to_bytes((number.bit_length() + 7) // 8, "little"))
        self.count = number.bit_count()


Regions = tuple[int, ...] | RegionSet
"""Ascending, each once. A tuple where there are a few: a batch, a region that a request waits for."""


def numbers_of(regions: Regions) -> array[int]:
    return regions.numbers() if isinstance(regions, RegionSet) else array("I", regions)
