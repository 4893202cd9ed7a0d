"""The one checksum: xxh3_64, seeded with where the data belongs. Twin: dataplane/core/src/checksum.rs.

The steady state never passes here: this module guards replica.meta, and serves tests and tools.
Golden vectors that both languages check: tests/protocol/vectors.txt.
"""

from __future__ import annotations

import xxhash

from protocol.frames import CHECKSUM_MIN


def xxh3_64(data: bytes, seed: int = 0) -> int:
    value: int = xxhash.xxh3_64_intdigest(data, seed)
    return value


def block_checksum(block_index: int, data: bytes) -> int:
    """Checksum of one whole block. A block that lands in the wrong place does not verify there (C16)."""
    return max(xxh3_64(data, block_index), CHECKSUM_MIN)


def fragment_checksum(offset_bytes: int, data: bytes) -> int:
    """Checksum of part of a block, which travels with a WRITE_PARTIAL frame."""
    return xxh3_64(data, offset_bytes)
