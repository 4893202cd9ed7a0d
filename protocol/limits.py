"""Every limit two processes share, each with its reason.

The Rust twins stand in ``dataplane/core/src/limits.rs``; ``tests/protocol/test_spec.py``
compares the two.
"""

from __future__ import annotations

BLOCK_BYTES = 4096
"""The unit of checksums and of the block map: the page size of every machine we run on."""

REGION_BYTES = 4 * 1024 * 1024
"""The unit of dirty tracking, comparing and resync. Small enough that one stray write costs
little to compare, large enough that a mark is rare."""

REGION_BLOCKS = REGION_BYTES // BLOCK_BYTES

VOLUME_BYTES_MIN = REGION_BYTES
VOLUME_BYTES_MAX = 64 * 1024**4
"""64 TiB: region numbers then fit in 24 bits, and block numbers in 34."""

FRAME_DATA_BYTES_MAX = 1024 * 1024
"""Largest data of one READ or WRITE frame. Larger NBD requests are cut; bounds what one frame
can make a peer hold in memory."""

FRAME_PAYLOAD_BYTES_MAX = FRAME_DATA_BYTES_MAX + 8 * (FRAME_DATA_BYTES_MAX // BLOCK_BYTES)
"""The data and one checksum per block."""

ZERO_BYTES_MAX = 64 * 1024 * 1024
"""Largest WRITE_ZEROES, TRIM or BLOCK_STATUS frame: bounds how long one frame holds a
replica's loop (16 regions)."""

NBD_REQUEST_BYTES_MAX = 32 * 1024 * 1024
"""Maximum NBD payload, advertised in NBD_INFO_BLOCK_SIZE. What QEMU and the kernel use."""

RPC_BYTES_MAX = 4 * 1024 * 1024
"""Largest control message: a list of all regions of a 1 TiB volume fits."""

HANDSHAKE_TIMEOUT_S = 10.0
"""From accept to the end of a hello or an NBD negotiation. A slower peer is not ours."""

RPC_TIMEOUT_S = 10.0
"""A control call that should be quick. Long work is started and then polled."""

LINK_STALL_TIMEOUT_S = 1.0
"""A replica that has not answered a write for this long leaves the in-sync set (the contract
allows a client stall of 1.5 s at a silent loss; the commit of the record needs the rest)."""

READ_LEASE_S = 1.0
"""How long an answer proves that its replica was not claimed by a newer engine, counted from when its request
was sent. A newer engine waits longer than this before it serves, unless it knows that the older one has
ended: short enough for the contract's 2 s, long enough that renewing costs nothing beside the reads."""

NAME_CHARS_MAX = 63
"""Volume names become file names, socket names and labels: one DNS label."""

REPLICAS_MAX = 5
"""Copies of one volume. More would cost bandwidth and buy little."""

assert REGION_BYTES % FRAME_DATA_BYTES_MAX == 0
assert ZERO_BYTES_MAX % REGION_BYTES == 0
assert NBD_REQUEST_BYTES_MAX % FRAME_DATA_BYTES_MAX == 0
