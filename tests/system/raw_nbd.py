"""An NBD client that sends what no library would, and shows what came back byte by byte."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.engine import nbd_messages as nbd

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16

REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF
DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS_CHUNK = 0, 1, 2, 5

ANSWER_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Answer:
    """``error``: 0 or the protocol's error value. ``chunks``: (type, payload) of a structured reply."""

    error: int
    data: bytes = b""
    chunks: list[tuple[int, bytes]] = field(default_factory=list)


class RawNbd:
    """Connected and negotiated. One request at a time."""

    def __init__(self, path: Path, *, structured: bool = True, meta: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self._socket.connect(str(path))
        self._cookie = 0x1234567800000000
        assert self.receive(len(nbd.GREETING)) == nbd.GREETING
        self.send(nbd.FIXED_NO_ZEROES)
        if structured:
            self.send(nbd.option(nbd.STRUCTURED_REPLY))
            self._option_replies()
        if structured and meta:
            self.send(nbd.option(nbd.SET_META_CONTEXT, nbd.meta_data(b"", [b"base:allocation"])))
            self._option_replies()
        self.send(nbd.option(nbd.GO, nbd.info_data()))
        self.size_bytes, self.flags = struct.unpack(">QH", self._option_replies()[0].data[2:12])

    def _option_replies(self) -> list[nbd.Reply]:
        """Up to the one that ends the option."""
        replies = []
        while True:
            header = self.receive(20)
            (length,) = struct.unpack(">I", header[16:])
            (reply,) = nbd.parse_replies(header + self.receive(length))
            replies.append(reply)
            if reply.type == nbd.ACK or reply.is_error:
                return replies

    def send(self, raw: bytes) -> None:
        self._socket.sendall(raw)

    def receive(self, length: int) -> bytes:
        """Raises EOFError when the server closes first."""
        parts = bytearray()
        while len(parts) < length:
            part = self._socket.recv(length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def request(
        self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Answer:
        self.send_request(kind, offset, length, flags=flags, data=data)
        return self._answer(kind, offset, length)

    def send_request(
        self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> None:
        """And not wait for the answer."""
        self._cookie += 1
        head = struct.pack(">IHHQQI", REQUEST_MAGIC, flags, kind, self._cookie, offset, length)
        self.send(head + data)

    def _answer(self, kind: int, offset: int, length: int) -> Answer:
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == SIMPLE_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            assert cookie == self._cookie
            return Answer(error, self.receive(length) if kind == READ and not error else b"")
        assert magic == STRUCTURED_MAGIC, hex(magic)
        answer = Answer(0)
        parts: list[tuple[int, bytes]] = []
        while True:
            flags, chunk, cookie, size = struct.unpack(">HHQI", self.receive(16))
            assert cookie == self._cookie
            payload = self.receive(size)
            answer.chunks.append((chunk, payload))
            if chunk & 0x8000:
                (answer.error,) = struct.unpack(">I", payload[:4])
            elif chunk == OFFSET_DATA:
                at = struct.unpack(">Q", payload[:8])[0] - offset
                assert at >= 0 and at + size - 8 <= length, "data outside of the request"
                parts.append((at, payload[8:]))
            if flags & DONE:
                break
            (magic,) = struct.unpack(">I", self.receive(4))
            assert magic == STRUCTURED_MAGIC
        if kind == READ and not answer.error:
            filled = bytearray(length)  # what no chunk covers is a hole
            for at, part in parts:
                filled[at : at + len(part)] = part
            answer.data = bytes(filled)
        return answer

    def is_closed(self) -> bool:
        """Waits for the server to close; False if it sends something instead."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> RawNbd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
