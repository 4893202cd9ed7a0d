"""What an NBD client would send and receive during negotiation, as bytes. For tests only.

Written from the protocol document, on purpose not from ``engine.negotiation``: a constant that
is wrong there must not be wrong here as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = range(8, 12)

ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID = 0x80000001, 0x80000002, 0x80000003
ERR_UNKNOWN, ERR_TOO_BIG = 0x80000006, 0x80000009

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"
FIXED_NO_ZEROES = b"\x00\x00\x00\x03"
FIXED = b"\x00\x00\x00\x01"
PLAIN = b"\x00\x00\x00\x00"


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def info_data(name: bytes = b"", wanted: Iterable[int] = ()) -> bytes:
    wanted = list(wanted)
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_data(name: bytes = b"", queries: Iterable[bytes] = ()) -> bytes:
    queries = list(queries)
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


@dataclass(frozen=True, slots=True)
class Reply:
    option: int
    type: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.type & 0x80000000)


def parse_replies(stream: bytes) -> list[Reply]:
    """All of ``stream`` must be option replies."""
    replies = []
    while stream:
        magic, number, kind, length = struct.unpack(">QIII", stream[:20])
        assert magic == 0x3E889045565A9
        assert len(stream) >= 20 + length, "a reply is cut off"
        replies.append(Reply(number, kind, stream[20 : 20 + length]))
        stream = stream[20 + length :]
    return replies
