"""A transmission phase in memory, in Python: just enough for real clients to test negotiation.

Requests are answered one by one, in order. Nothing here is hardened: it serves tests only.
"""

from __future__ import annotations

import asyncio
import socket
import struct

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
DONE = 1
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)


class MemoryExport:
    """``data`` is what clients read and write."""

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes)

    async def serve(self, sock: socket.socket, *, structured: bool, meta_context: int) -> None:
        """Until the client disconnects."""
        loop = asyncio.get_running_loop()
        while True:
            header = await self._receive(sock, REQUEST.size)
            if header is None:
                return
            magic, _, kind, cookie, offset, length = REQUEST.unpack(header)
            assert magic == REQUEST_MAGIC
            payload = await self._receive(sock, length) if kind == WRITE else b""
            if kind == DISC or payload is None:
                return
            reply = self._apply(kind, offset, length, payload)
            if kind == BLOCK_STATUS:
                reply = struct.pack(">III", meta_context, length, 0)
            await loop.sock_sendall(sock, self._frame(kind, cookie, offset, reply, structured=structured))

    def _apply(self, kind: int, offset: int, length: int, payload: bytes) -> bytes:
        if kind == READ:
            return bytes(self.data[offset : offset + length])
        if kind == WRITE:
            self.data[offset : offset + length] = payload
        if kind in (TRIM, WRITE_ZEROES):
            self.data[offset : offset + length] = bytes(length)
        return b""

    @staticmethod
    def _frame(kind: int, cookie: int, offset: int, reply: bytes, *, structured: bool) -> bytes:
        if not structured or not reply:
            return SIMPLE_REPLY.pack(0x67446698, 0, cookie) + reply
        if kind == READ:
            return CHUNK.pack(0x668E33EF, DONE, 1, cookie, 8 + len(reply)) + struct.pack(">Q", offset) + reply
        return CHUNK.pack(0x668E33EF, DONE, 5, cookie, len(reply)) + reply

    @staticmethod
    async def _receive(sock: socket.socket, length: int) -> bytes | None:
        loop = asyncio.get_running_loop()
        received = bytearray()
        while len(received) < length:
            part = await loop.sock_recv(sock, length - len(received))
            if not part:
                return None
            received += part
        return bytes(received)
