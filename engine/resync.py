"""Which region to copy next: the plan of a resync or a reconcile. Pure; no session, no clock.

Owns the order (regions that requests wait for first), how many calls are in flight, and progress. Does not
own who copies from whom (``joining.py``, ``reconcile.py``).

A plan takes one bit per region of the volume, whatever is in it: 2 MiB for the largest volume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from engine.events import Regions
from engine.limits import (
    PULL_BATCH_REGIONS,
    PULL_CALLS_IN_FLIGHT_MAX,
    WANTED_CALLS_IN_FLIGHT_MAX,
    WANTED_MAX,
)


class RegionSet:
    """Region numbers as a bitmap. Invariant: ``count`` is the number of bits set."""

    def __init__(self, regions: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        self.count = 0
        for region in regions:
            self.add(region)

    def __contains__(self, region: int) -> bool:
        at = region >> 3
        return at < len(self._bits) and bool(self._bits[at] >> (region & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        for at, byte in enumerate(self._bits):
            if byte:
                yield from (8 * at + bit for bit in range(8) if byte >> bit & 1)

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

    def take_from(self, start: int, count_max: int) -> list[int]:
        """The lowest regions at or after ``start``, at most ``count_max``. They stay in the set."""
        found: list[int] = []
        first = start >> 3
        for at in range(first, len(self._bits)):
            byte = self._bits[at]
            if not byte:
                continue
            for bit in range(8):
                region = 8 * at + bit
                if byte >> bit & 1 and region >= start:
                    found.append(region)
                    if len(found) == count_max:
                        return found
        return found


class PullPlan:
    """The regions one target has to pull.

    Invariant: each region is in exactly one of ``_pending``, ``_flying`` and done.
    """

    def __init__(self, regions: Iterable[int]) -> None:
        self._pending = RegionSet(regions)
        self._flying: set[int] = set()
        self._background: set[int] = set()  # first regions of the background calls in flight
        self._wanted_calls = 0
        self._wanted: deque[int] = deque()
        self._cursor = 0  # where the background goes on
        self.total_count = self._pending.count
        self.bytes_copied = 0

    @property
    def done_count(self) -> int:
        return self.total_count - self._pending.count - len(self._flying)

    @property
    def done(self) -> bool:
        return self.done_count == self.total_count

    @property
    def in_flight_count(self) -> int:
        return len(self._flying)

    def __contains__(self, region: int) -> bool:
        """Whether it is still to be pulled, or being pulled."""
        return region in self._pending or region in self._flying

    def remaining(self) -> Regions:
        return tuple(sorted([*self._pending, *self._flying]))

    def add(self, regions: Iterable[int]) -> None:
        """More to pull. What is done must be named again if it has to be done again."""
        for region in regions:
            if region not in self._flying and self._pending.add(region):
                self.total_count += 1

    def want(self, region: int) -> None:
        """A request waits for it."""
        if region in self._pending and len(self._wanted) < WANTED_MAX:
            self._wanted.append(region)

    def next_call(self) -> Regions:
        """The regions of the next pull call, now in flight; empty when none is due."""
        while self._wanted and self._wanted_calls < WANTED_CALLS_IN_FLIGHT_MAX:
            region = self._wanted.popleft()
            if region in self._pending:
                self._wanted_calls += 1
                return self._launch([region])
        if len(self._background) >= PULL_CALLS_IN_FLIGHT_MAX or not self._pending.count:
            return ()
        batch = self._pending.take_from(self._cursor, PULL_BATCH_REGIONS)
        if not batch:  # regions that failed lie below
            batch = self._pending.take_from(0, PULL_BATCH_REGIONS)
        self._cursor = batch[-1] + 1
        self._background.add(batch[0])
        return self._launch(batch)

    def on_done(self, batch: Regions, bytes_copied: int) -> None:
        self._land(batch)
        self.bytes_copied += bytes_copied

    def on_failed(self, batch: Regions) -> None:
        self._land(batch)
        for region in batch:
            self._pending.add(region)

    def _launch(self, batch: list[int]) -> Regions:
        for region in batch:
            self._pending.discard(region)
            self._flying.add(region)
        return tuple(batch)

    def _land(self, batch: Regions) -> None:
        assert batch and self._flying.issuperset(batch)
        if batch[0] in self._background:
            self._background.discard(batch[0])
        else:
            self._wanted_calls -= 1
        self._flying.difference_update(batch)

    def check_invariants(self) -> None:
        assert 0 <= self.done_count <= self.total_count
        assert 0 <= self._wanted_calls <= WANTED_CALLS_IN_FLIGHT_MAX
        assert len(self._background) <= PULL_CALLS_IN_FLIGHT_MAX
        assert not any(region in self._pending for region in self._flying)
