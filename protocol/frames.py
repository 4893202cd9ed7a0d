"""The data link's frame header and its kinds. Twin: ``dataplane/core/src/frame.rs``.

The steady state never passes here: this module exists for tests, tools and golden vectors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from protocol.errors import ProtocolViolation
from protocol.limits import FRAME_PAYLOAD_BYTES_MAX

Xxh3 = Callable[[bytes], int]
"""``xxhash.xxh3_64_intdigest``. Handed in: this package imports no hash."""

MAGIC = b"DLMN"
FRAME_VERSION = 1
HEADER = struct.Struct("<4sBBHQQQIIII")
# offset size field          protects against
#      0    4 magic          talking to something that is not us
#      4    1 version        decoding with the wrong table
#      5    1 kind           -
#      6    2 flags          -
#      8    8 request_id     matching a reply to the wrong request
#     16    8 epoch          an engine that has been replaced (C11)
#     24    8 offset_bytes   -
#     32    4 length_bytes   -
#     36    4 payload_bytes  reading past the frame; bounded by FRAME_PAYLOAD_BYTES_MAX
#     40    4 status         (replies) -
#     44    4 header_check   damage in flight: low half of xxh3_64 over bytes 0 to 43
HEADER_BYTES = 48
assert HEADER.size == HEADER_BYTES

REPLY = 0x80
"""Set in ``kind`` of every reply."""


class Kind(IntEnum):
    WRITE = 1
    WRITE_PARTIAL = 2
    READ = 3
    WRITE_ZEROES = 4
    TRIM = 5
    FLUSH = 6
    BLOCK_STATUS = 7
    CACHE = 8
    COMPLETED = 9
    REPAIR = 10
    LEASE = 11
    REGION_SUMMARY = 16


class Flag(IntFlag):
    FUA = 1
    NO_HOLE = 2


class Status(IntEnum):
    OK = 0
    STALE_EPOCH = 1
    NO_SPACE = 2
    IO_ERROR = 3
    BAD_CHECKSUM = 4
    BAD_REQUEST = 5
    OUT_OF_RANGE = 6
    SHUTTING_DOWN = 7


class Entry(IntEnum):
    """Block map entries below the smallest checksum. A checksum of 0, 1 or 2 is stored as 3."""

    ABSENT = 0
    ZERO = 1
    DAMAGED = 2


CHECKSUM_MIN = 3


@dataclass(frozen=True, slots=True)
class Header:
    kind: int
    flags: int = 0
    request_id: int = 0
    epoch: int = 0
    offset_bytes: int = 0
    length_bytes: int = 0
    payload_bytes: int = 0
    status: int = 0


def encode_header(header: Header, check: Xxh3) -> bytes:
    """Pack ``header``; ``check`` is xxh3_64."""
    body = HEADER.pack(
        MAGIC,
        FRAME_VERSION,
        header.kind,
        header.flags,
        header.request_id,
        header.epoch,
        header.offset_bytes,
        header.length_bytes,
        header.payload_bytes,
        header.status,
        0,
    )[: HEADER_BYTES - 4]
    return body + struct.pack("<I", check(body) & 0xFFFFFFFF)


def decode_header(data: bytes, check: Xxh3) -> Header:
    """Unpack one header.

    Raises ProtocolViolation for a wrong size, magic, version or check, and for a payload past
    FRAME_PAYLOAD_BYTES_MAX.
    """
    if len(data) != HEADER_BYTES:
        raise ProtocolViolation(expected=f"{HEADER_BYTES} bytes", got=str(len(data)))
    magic, version, *fields, header_check = HEADER.unpack(data)
    if magic != MAGIC or version != FRAME_VERSION:
        raise ProtocolViolation(expected="a Dolmen frame", got=repr(data[:5]))
    if header_check != check(data[: HEADER_BYTES - 4]) & 0xFFFFFFFF:
        raise ProtocolViolation(expected="a header that matches its check", got="damage")
    header = Header(*fields)
    if header.payload_bytes > FRAME_PAYLOAD_BYTES_MAX:
        raise ProtocolViolation(expected="a bounded payload", got=str(header.payload_bytes))
    return header
