"""Prints vectors.txt anew: ``python -m tests.protocol.make_vectors > tests/protocol/vectors.txt``.

Only for a new FRAME_VERSION. Vectors that change under an old version mean a broken protocol.
"""

from __future__ import annotations

from dataclasses import astuple

from protocol.frames import HEADER_BYTES, REPLY, Flag, Header, Kind, Status, encode_header
from protocol.limits import FRAME_PAYLOAD_BYTES_MAX
from replica.checksum import block_checksum, fragment_checksum, xxh3_64

HEAD = """\
# Golden vectors: what must never change while FRAME_VERSION stays. Read by tests/protocol/test_frames.py and
# by dataplane/core/tests/frame_vectors.rs. Numbers are decimal, bytes hexadecimal.
#
# frame    name kind flags request_id epoch offset_bytes length_bytes payload_bytes status bytes
# refused  reason bytes
# block    block_index length seed checksum      byte i of the data is (31 i + seed) mod 256
# fragment offset_bytes length seed checksum
"""

FRAMES = {
    "write": Header(Kind.WRITE, Flag.FUA, 7, 3, 8192, 8192, 8192 + 16),
    "write_partial": Header(Kind.WRITE_PARTIAL, 0, 8, 3, 512, 1024, 1024 + 8),
    "read": Header(Kind.READ, 0, 2**64 - 1, 2**63 - 1, 2**46 - 2**20, 2**20),
    "write_zeroes": Header(Kind.WRITE_ZEROES, Flag.NO_HOLE | Flag.FUA, 10, 4, 0, 64 * 2**20),
    "trim": Header(Kind.TRIM, 0, 11, 4, 4096, 4096),
    "flush": Header(Kind.FLUSH, 0, 12, 4),
    "block_status": Header(Kind.BLOCK_STATUS, 0, 13, 4, 4096, 64 * 2**20),
    "cache": Header(Kind.CACHE, 0, 14, 4, 4096, 4096),
    "completed": Header(Kind.COMPLETED, 0, 15, 4),
    "repair": Header(Kind.REPAIR, 0, 16, 4, 4096, 4096, 4096 + 8),
    "lease": Header(Kind.LEASE, 0, 18, 4),
    "region_summary": Header(Kind.REGION_SUMMARY, 0, 17, 4, 4 * 2**20, 4 * 2**20),
    "reply_ok": Header(Kind.READ | REPLY, 0, 1, 4, 0, 2**20, FRAME_PAYLOAD_BYTES_MAX),
    "reply_stale": Header(Kind.WRITE | REPLY, 0, 2, 4, 0, 4096, 0, Status.STALE_EPOCH),
    "reply_shutting_down": Header(Kind.FLUSH | REPLY, 0, 3, 4, 0, 0, 0, Status.SHUTTING_DOWN),
    "unknown_kind": Header(127, 0xFFFF, 0, 0, 0, 0, 0, 2**32 - 1),
}


def refused() -> dict[str, bytes]:
    good = encode_header(FRAMES["write"], xxh3_64)

    def resealed(body: bytes) -> bytes:
        body = body[: HEADER_BYTES - 4]
        return body + (xxh3_64(body) & 0xFFFFFFFF).to_bytes(4, "little")

    return {
        "magic": resealed(b"DLMX" + good[4:]),
        "version": resealed(good[:4] + b"\x02" + good[5:]),
        "check": good[:-1] + bytes([good[-1] ^ 1]),
        "payload": resealed(good[:36] + (FRAME_PAYLOAD_BYTES_MAX + 1).to_bytes(4, "little") + good[40:]),
    }


def pattern(length: int, seed: int) -> bytes:
    return bytes((31 * i + seed) % 256 for i in range(length))


def main() -> None:
    print(HEAD)
    for name, header in FRAMES.items():
        print("frame", name, *map(int, astuple(header)), encode_header(header, xxh3_64).hex())
    for reason, data in refused().items():
        print("refused", reason, data.hex())
    for block_index in (0, 1, 2**34 - 1):
        for seed in (0, 7):
            print("block", block_index, 4096, seed, block_checksum(block_index, pattern(4096, seed)))
    for offset_bytes, length in ((0, 512), (512, 1), (2**46 - 512, 512), (8192, 4095)):
        print("fragment", offset_bytes, length, 3, fragment_checksum(offset_bytes, pattern(length, 3)))


if __name__ == "__main__":
    main()
