"""NBD fixed-newstyle negotiation: from a connected socket to the first byte of transmission.

Owns the options a client may send before it names its export, and every answer to them.

Does not own: the transmission phase (``dataplane/core/src/engine/``; it gets the socket
afterwards), the deadline and the caps on connections (``server.py`` applies them around
``negotiate``), or which exports exist (an ``ExportTable`` is handed in).

Promises: never reads a byte past the negotiation; holds at most OPTION_DATA_BYTES_MAX of a
client's bytes; answers at most OPTION_COUNT_MAX options. Whatever a client sends, the result
is an answer or the end of the connection, never an exception.

``Negotiator`` is pure: bytes of one option in, bytes of the replies out. ``negotiate`` is the
shell that moves them. Names are those of the NBD protocol document.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.limits import BLOCK_BYTES, NBD_REQUEST_BYTES_MAX

OPTION_DATA_BYTES_MAX: Final = 16 * 1024
"""Data of one option that is kept: two names of NBD_STRING_BYTES_MAX and a list of requests fit."""

OPTION_DRAIN_BYTES_MAX: Final = 1024 * 1024
"""Data of an oversized option that is read and thrown away so that the client can be told
ERR_TOO_BIG. A client that announces more is not worth the bandwidth: its connection is closed."""

OPTION_DRAIN_STEP_BYTES: Final = 64 * 1024
"""Memory held while draining."""

OPTION_COUNT_MAX: Final = 64
"""Options per connection. A client needs about five; a tool that asks for everything, twenty."""

NBD_STRING_BYTES_MAX: Final = 4096
"""Of the protocol: no string may be longer."""

NBD_MINIMUM_BLOCK_BYTES: Final = 512
"""Advertised. Smaller requests work all the same, for clients that did not ask."""

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
NBD_REP_MAGIC: Final = 0x0003E889045565A9

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_ERR_UNSUP: Final = (1 << 31) + 1
NBD_REP_ERR_INVALID: Final = (1 << 31) + 3
NBD_REP_ERR_UNKNOWN: Final = (1 << 31) + 6
NBD_REP_ERR_TOO_BIG: Final = (1 << 31) + 9

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

BASE_ALLOCATION: Final = b"base:allocation"
BASE_WILDCARD: Final = b"base:"
BASE_ALLOCATION_ID: Final = 1
"""The id of base:allocation on every connection. Not 0, which means "not negotiated"."""

GREETING: Final = struct.pack(
    ">QQH", NBDMAGIC, IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
)  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")  # IHAVEOPT, option, data length
REPLY_HEADER: Final = struct.Struct(">QIII")  # NBD_REP_MAGIC, option, reply type, data length
EXPORT_INFO: Final = struct.Struct(">QH")  # size, transmission flags
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
EXPORT_NAME_PADDING: Final = bytes(124)

READ_FLAGS: Final = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_CAN_MULTI_CONN
    | NBD_FLAG_SEND_CACHE
)
WRITE_FLAGS: Final = NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO

assert NBD_MINIMUM_BLOCK_BYTES <= BLOCK_BYTES <= NBD_REQUEST_BYTES_MAX
assert 2 * NBD_STRING_BYTES_MAX < OPTION_DATA_BYTES_MAX <= OPTION_DRAIN_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Export:
    """One thing a client may open."""

    name: str
    size_bytes: int
    read_only: bool
    description: str

    def __post_init__(self) -> None:
        assert 0 < len(self.name.encode()) <= NBD_STRING_BYTES_MAX
        assert len(self.description.encode()) <= NBD_STRING_BYTES_MAX
        assert self.size_bytes > 0


class ExportTable:
    """The exports of one engine, the default one first."""

    def __init__(self, exports: Sequence[Export]) -> None:
        assert len({export.name for export in exports}) == len(exports)
        self._exports = tuple(exports)

    def find(self, name: str) -> Export | None:
        """The empty name means the default export."""
        if name == "":
            return self._exports[0] if self._exports else None
        return next((export for export in self._exports if export.name == name), None)

    def list(self) -> Sequence[Export]:
        return self._exports


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What the transmission phase must know. ``meta_context``: 0, or the id of base:allocation."""

    structured: bool
    meta_context: int
    read_only: bool
    export: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one message of the client leads to: bytes to send, and whether negotiation is over."""

    reply: bytes = b""
    negotiated: Negotiated | None = None  # set: the transmission phase begins after ``reply``
    close: bool = False  # send ``reply``, then close


CLOSE: Final = Answer(close=True)


class _Malformed(ValueError):
    """The client's option data is not what its option says. The text goes to the client."""


class _Cursor:
    """Takes fields off the front of an option's data. Raises _Malformed when it ends early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def _take(self, length: int) -> bytes:
        taken = self._data[self._offset : self._offset + length]
        if len(taken) != length:
            raise _Malformed("the option's data ends before its fields do")
        self._offset += length
        return taken

    def u16(self) -> int:
        return int.from_bytes(self._take(U16.size), "big")

    def u32(self) -> int:
        return int.from_bytes(self._take(U32.size), "big")

    def string(self) -> bytes:
        length = self.u32()
        if length > NBD_STRING_BYTES_MAX:
            raise _Malformed(f"a string of {length} bytes; at most {NBD_STRING_BYTES_MAX} are allowed")
        return self._take(length)

    def end(self) -> None:
        if self._offset != len(self._data):
            raise _Malformed(f"{len(self._data) - self._offset} bytes follow the option's last field")


def _export_name(raw: bytes) -> str:
    if len(raw) > NBD_STRING_BYTES_MAX:
        raise _Malformed(f"an export name of {len(raw)} bytes; at most {NBD_STRING_BYTES_MAX} are allowed")
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _Malformed("the export name is not UTF-8") from error
    if "\0" in name:
        raise _Malformed("the export name contains a NUL")
    return name


def _parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """The data of INFO and GO: an export's name and what the client wants to know of it."""
    cursor = _Cursor(data)
    name = _export_name(cursor.string())
    wanted = frozenset(cursor.u16() for _ in range(cursor.u16()))
    cursor.end()
    return name, wanted


def _parse_meta_context(data: bytes) -> tuple[str, list[bytes]]:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: an export's name and queries."""
    cursor = _Cursor(data)
    name = _export_name(cursor.string())
    # The cursor ends a count that lies: memory is bounded by the data, not by the count.
    queries = [cursor.string() for _ in range(cursor.u32())]
    cursor.end()
    return name, queries


def _parse_nothing(data: bytes) -> None:
    if data:
        raise _Malformed("this option takes no data")


def export_flags(export: Export, *, structured: bool) -> int:
    """Transmission flags. A command that the export would refuse is not offered."""
    flags = READ_FLAGS | (NBD_FLAG_READ_ONLY if export.read_only else WRITE_FLAGS)
    return flags | NBD_FLAG_SEND_DF if structured else flags


def option_reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    return REPLY_HEADER.pack(NBD_REP_MAGIC, option, reply_type, len(data)) + data


class Negotiator:
    """One client's negotiation. Pure: no socket, no clock. After ``close`` or ``negotiated`` it is over.

    ``_meta_export`` is the export for which base:allocation is selected: a selection counts only
    for the export that SET_META_CONTEXT named, and each SET_META_CONTEXT replaces it, failed ones
    included.
    """

    def __init__(self, exports: ExportTable) -> None:
        self._exports = exports
        self._fixed_newstyle = False
        self._no_zeroes = False
        self._structured = False
        self._meta_export: str | None = None
        self._option_count = 0

    def on_client_flags(self, flags: int) -> Answer:
        """The four bytes that answer the greeting."""
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            return CLOSE  # the protocol's rule for flags that the server did not offer
        self._fixed_newstyle = bool(flags & NBD_FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        return Answer()

    def on_option(self, option: int, data: bytes) -> Answer:
        """One whole option."""
        assert len(data) <= OPTION_DATA_BYTES_MAX
        refusal = self._admit(option)
        if refusal is not None:
            return refusal
        handler = HANDLERS.get(option)
        if handler is None:
            return self._error(option, NBD_REP_ERR_UNSUP, "this server does not know the option")
        try:
            return handler(self, option, data)
        except _Malformed as error:
            return self._error(option, NBD_REP_ERR_INVALID, str(error))

    def on_oversized_option(self, option: int) -> Answer:
        """An option whose data was longer than OPTION_DATA_BYTES_MAX, and was thrown away."""
        refusal = self._admit(option)
        if refusal is not None:
            return refusal
        if option not in HANDLERS:
            return self._error(option, NBD_REP_ERR_UNSUP, "this server does not know the option")
        if option == NBD_OPT_SET_META_CONTEXT:
            self._meta_export = None
        return self._error(option, NBD_REP_ERR_TOO_BIG, f"more than {OPTION_DATA_BYTES_MAX} bytes of data")

    def _admit(self, option: int) -> Answer | None:
        self._option_count += 1
        if self._option_count > OPTION_COUNT_MAX:
            return CLOSE
        if not self._fixed_newstyle and option != NBD_OPT_EXPORT_NAME:
            return CLOSE  # such a client understands no option replies
        return None

    def _error(self, option: int, reply_type: int, message: str) -> Answer:
        if option == NBD_OPT_EXPORT_NAME:
            return CLOSE  # the one option to which the protocol has no error reply
        return Answer(option_reply(option, reply_type, message.encode()))

    def _begin(self, export: Export) -> Negotiated:
        return Negotiated(
            structured=self._structured,
            meta_context=BASE_ALLOCATION_ID if self._meta_export == export.name else 0,
            read_only=export.read_only,
            export=export.name,
        )

    def _unknown_export(self, option: int) -> Answer:
        return self._error(
            option, NBD_REP_ERR_UNKNOWN, "no such export; the empty name means the default one"
        )

    def _export_name(self, option: int, data: bytes) -> Answer:
        export = self._exports.find(_export_name(data))
        if export is None:
            return self._unknown_export(option)
        reply = EXPORT_INFO.pack(export.size_bytes, export_flags(export, structured=self._structured))
        if not self._no_zeroes:
            reply += EXPORT_NAME_PADDING
        return Answer(reply, negotiated=self._begin(export))

    def _abort(self, option: int, data: bytes) -> Answer:
        del data  # whatever it was, the client wants to leave
        return Answer(option_reply(option, NBD_REP_ACK), close=True)

    def _list(self, option: int, data: bytes) -> Answer:
        _parse_nothing(data)
        replies = []
        for export in self._exports.list():
            name = export.name.encode()
            entry = U32.pack(len(name)) + name + export.description.encode()
            replies.append(option_reply(option, NBD_REP_SERVER, entry))
        return Answer(b"".join(replies) + option_reply(option, NBD_REP_ACK))

    def _info(self, option: int, data: bytes) -> Answer:
        name, wanted = _parse_info(data)
        export = self._exports.find(name)
        if export is None:
            return self._unknown_export(option)
        infos = b"".join(option_reply(option, NBD_REP_INFO, info) for info in self._infos(export, wanted))
        reply = infos + option_reply(option, NBD_REP_ACK)
        return Answer(reply, negotiated=self._begin(export) if option == NBD_OPT_GO else None)

    def _infos(self, export: Export, wanted: frozenset[int]) -> Iterator[bytes]:
        flags = export_flags(export, structured=self._structured)
        yield U16.pack(NBD_INFO_EXPORT) + EXPORT_INFO.pack(export.size_bytes, flags)
        if NBD_INFO_NAME in wanted:
            yield U16.pack(NBD_INFO_NAME) + export.name.encode()
        if NBD_INFO_DESCRIPTION in wanted and export.description:
            yield U16.pack(NBD_INFO_DESCRIPTION) + export.description.encode()
        # Sent unasked as well: a server whose limits differ from the defaults should say so.
        yield struct.pack(
            ">HIII", NBD_INFO_BLOCK_SIZE, NBD_MINIMUM_BLOCK_BYTES, BLOCK_BYTES, NBD_REQUEST_BYTES_MAX
        )

    def _structured_reply(self, option: int, data: bytes) -> Answer:
        _parse_nothing(data)
        self._structured = True
        return Answer(option_reply(option, NBD_REP_ACK))

    def _list_meta_context(self, option: int, data: bytes) -> Answer:
        name, queries = _parse_meta_context(data)
        self._require_structured()
        if self._exports.find(name) is None:
            return self._unknown_export(option)
        # No query at all asks for everything.
        listed = not queries or BASE_ALLOCATION in queries or BASE_WILDCARD in queries
        return self._contexts(option, context_id=0, found=listed)

    def _set_meta_context(self, option: int, data: bytes) -> Answer:
        self._meta_export = None
        name, queries = _parse_meta_context(data)
        self._require_structured()
        export = self._exports.find(name)
        if export is None:
            return self._unknown_export(option)
        # The wildcard lists; it does not select. No query selects nothing.
        if BASE_ALLOCATION in queries:
            self._meta_export = export.name
        return self._contexts(option, context_id=BASE_ALLOCATION_ID, found=self._meta_export is not None)

    def _require_structured(self) -> None:
        if not self._structured:
            raise _Malformed("structured replies must be negotiated first")

    def _contexts(self, option: int, *, context_id: int, found: bool) -> Answer:
        context = option_reply(option, NBD_REP_META_CONTEXT, U32.pack(context_id) + BASE_ALLOCATION)
        return Answer((context if found else b"") + option_reply(option, NBD_REP_ACK))


Handler = Callable[[Negotiator, int, bytes], Answer]

# Every option that is not ERR_UNSUP. STARTTLS is among those that are: this server has no TLS.
HANDLERS: Final[Mapping[int, Handler]] = {
    NBD_OPT_EXPORT_NAME: Negotiator._export_name,
    NBD_OPT_ABORT: Negotiator._abort,
    NBD_OPT_LIST: Negotiator._list,
    NBD_OPT_INFO: Negotiator._info,
    NBD_OPT_GO: Negotiator._info,
    NBD_OPT_STRUCTURED_REPLY: Negotiator._structured_reply,
    NBD_OPT_LIST_META_CONTEXT: Negotiator._list_meta_context,
    NBD_OPT_SET_META_CONTEXT: Negotiator._set_meta_context,
}


async def _receive_exactly(sock: socket.socket, length: int) -> bytes:
    """Raises EOFError when the client ends first."""
    loop = asyncio.get_running_loop()
    buffer = bytearray(length)  # filled in place: a client that sends single bytes costs no more memory
    rest = memoryview(buffer)
    while rest:
        received = await loop.sock_recv_into(sock, rest)
        if received == 0:
            raise EOFError
        rest = rest[received:]
    return bytes(buffer)


async def _receive_option(sock: socket.socket, negotiator: Negotiator) -> Answer:
    magic, option, length = OPTION_HEADER.unpack(await _receive_exactly(sock, OPTION_HEADER.size))
    if magic != IHAVEOPT or length > OPTION_DRAIN_BYTES_MAX:
        return CLOSE
    if length <= OPTION_DATA_BYTES_MAX:
        return negotiator.on_option(option, await _receive_exactly(sock, length))
    while length > 0:
        length -= len(await _receive_exactly(sock, min(length, OPTION_DRAIN_STEP_BYTES)))
    return negotiator.on_oversized_option(option)


async def negotiate(sock: socket.socket, exports: ExportTable) -> Negotiated | None:
    """Bring a connected client to the transmission phase.

    None: the client ended, or broke the rules; it has been answered where the protocol wants an
    answer, and the caller closes the socket. The caller also sets the deadline (cancelling is
    safe at any await) and limits how many negotiations run at once.
    """
    assert sock.gettimeout() == 0, "a blocking socket would stop the whole engine"
    loop = asyncio.get_running_loop()
    negotiator = Negotiator(exports)
    try:
        await loop.sock_sendall(sock, GREETING)
        (flags,) = CLIENT_FLAGS.unpack(await _receive_exactly(sock, CLIENT_FLAGS.size))
        answer = negotiator.on_client_flags(flags)
        while not answer.close and answer.negotiated is None:
            answer = await _receive_option(sock, negotiator)
            await loop.sock_sendall(sock, answer.reply)
        return answer.negotiated
    except (EOFError, OSError):
        return None
