"""Sets of regions as they travel in control messages: packed, because a volume may have 16 million.

Two forms, the shorter one that fits is sent: a list of u32 region numbers, or BITMAP_MARK and a bitmap
(bit i of byte j is region 8 j + i). Both little-endian; region numbers ascend.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from protocol.errors import BadRequest
from protocol.limits import REGION_BYTES, RPC_BYTES_MAX, VOLUME_BYTES_MAX

REGIONS_MAX = VOLUME_BYTES_MAX // REGION_BYTES

BITMAP_MARK = b"\xff\xff\xff\xff"
"""No region has this number, so whoever takes a bitmap for a list is refused."""

# The largest volume's regions fit in one message, with room for the other arguments.
assert REGIONS_MAX // 8 + len(BITMAP_MARK) < RPC_BYTES_MAX - 4096
assert REGIONS_MAX < 2**32 - 1


def pack_regions(regions: Iterable[int]) -> bytes:
    """Pack region numbers; order and repetition do not matter."""
    ordered = sorted(set(regions))
    if not ordered:
        return b""
    assert ordered[0] >= 0 and ordered[-1] < REGIONS_MAX
    bitmap_bytes = ordered[-1] // 8 + 1
    if 4 * len(ordered) <= len(BITMAP_MARK) + bitmap_bytes:
        return struct.pack(f"<{len(ordered)}I", *ordered)
    bits = bytearray(bitmap_bytes)
    for region in ordered:
        bits[region // 8] |= 1 << (region % 8)
    return BITMAP_MARK + bytes(bits)


def unpack_regions(data: object) -> list[int]:
    """Region numbers, ascending, each once. Raises BadRequest for what is not a packed set."""
    if not isinstance(data, bytes):
        raise BadRequest(reason=f"regions are packed bytes, not {type(data).__name__}")
    if data.startswith(BITMAP_MARK):
        bits = data[len(BITMAP_MARK) :]
        regions = [
            8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1
        ]
    elif len(data) % 4 == 0:
        regions = sorted(set(struct.unpack(f"<{len(data) // 4}I", data)))
    else:
        raise BadRequest(reason="packed regions are a multiple of 4 bytes")
    if regions and regions[-1] >= REGIONS_MAX:
        raise BadRequest(reason=f"region {regions[-1]} is past the largest volume")
    return regions
