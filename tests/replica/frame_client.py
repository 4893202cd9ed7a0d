"""The engine's side of a data or peer session, one frame at a time: for tests only."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass

from protocol.connect import connect_socket
from protocol.frames import HEADER_BYTES, REPLY, Header, Kind, Status, decode_header, encode_header
from protocol.hello import Role
from protocol.limits import BLOCK_BYTES, REGION_BYTES
from replica.checksum import block_checksum, fragment_checksum, xxh3_64

REPLY_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Reply:
    header: Header
    payload: bytes

    @property
    def status(self) -> Status:
        return Status(self.header.status)


def write_payload(offset_bytes: int, data: bytes) -> bytes:
    """One checksum per block, then the data."""
    first = offset_bytes // BLOCK_BYTES
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
    sums = [block_checksum(first + index, block) for index, block in enumerate(blocks)]
    return struct.pack(f"<{len(sums)}Q", *sums) + data


class FrameClient:
    """One session. Ids grow by one per frame, as PROTOCOL.md asks."""

    def __init__(self, sock: socket.socket, *, epoch: int) -> None:
        self.sock = sock
        self.epoch = epoch
        self.next_id = 1

    @classmethod
    async def connect(
        cls,
        port: int,
        key: bytes,
        volume_id: str,
        *,
        epoch: int,
        role: Role = Role.DATA,
        engine_id: str = "A",
    ) -> FrameClient:
        sock, _ = await connect_socket(
            "127.0.0.1", port, key=key, role=role, volume_id=volume_id, epoch=epoch, engine_id=engine_id
        )
        return cls(sock, epoch=epoch)

    def close(self) -> None:
        self.sock.close()

    def frame(
        self, kind: Kind, offset_bytes: int, length_bytes: int, payload: bytes = b"", flags: int = 0
    ) -> bytes:
        request_id, self.next_id = self.next_id, self.next_id + 1
        header = Header(kind, flags, request_id, self.epoch, offset_bytes, length_bytes, len(payload))
        return encode_header(header, xxh3_64) + payload

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> Reply:
        """Raises EOFError when the server closed the session."""
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            header = decode_header(await self._exactly(HEADER_BYTES), xxh3_64)
            assert header.kind & REPLY
            return Reply(header, await self._exactly(header.payload_bytes))

    async def ask(
        self, kind: Kind, offset_bytes: int = 0, length_bytes: int = 0, payload: bytes = b"", flags: int = 0
    ) -> Reply:
        await self.send(self.frame(kind, offset_bytes, length_bytes, payload, flags))
        return await self.receive()

    async def write(self, offset_bytes: int, data: bytes, *, flags: int = 0) -> Status:
        if offset_bytes % BLOCK_BYTES == 0 and len(data) % BLOCK_BYTES == 0:
            payload = write_payload(offset_bytes, data)
            return (await self.ask(Kind.WRITE, offset_bytes, len(data), payload, flags)).status
        payload = struct.pack("<Q", fragment_checksum(offset_bytes, data)) + data
        return (await self.ask(Kind.WRITE_PARTIAL, offset_bytes, len(data), payload, flags)).status

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """The bytes, verified; zeroes where the replica has none."""
        reply = await self.ask(Kind.READ, offset_bytes, length_bytes)
        assert reply.status is Status.OK, reply.status
        count = length_bytes // BLOCK_BYTES
        entries = struct.unpack_from(f"<{count}Q", reply.payload)
        found, at = [], 8 * count
        for index, entry in enumerate(entries, offset_bytes // BLOCK_BYTES):
            assert entry != 2, f"block {index} is damaged"
            if entry < 2:
                found.append(bytes(BLOCK_BYTES))
                continue
            block = reply.payload[at : at + BLOCK_BYTES]
            at += BLOCK_BYTES
            assert block_checksum(index, block) == entry, f"block {index}"
            found.append(block)
        assert at == len(reply.payload)
        return b"".join(found)

    async def flush(self) -> Status:
        return (await self.ask(Kind.FLUSH)).status

    async def zero(self, offset_bytes: int, length_bytes: int, *, flags: int = 0) -> Status:
        return (await self.ask(Kind.WRITE_ZEROES, offset_bytes, length_bytes, flags=flags)).status

    async def summary(self, region: int, size_bytes: int) -> list[int]:
        offset = region * REGION_BYTES
        length = min(REGION_BYTES, size_bytes - offset)
        reply = await self.ask(Kind.REGION_SUMMARY, offset, length)
        assert reply.status is Status.OK, reply.status
        return list(struct.unpack(f"<{length // BLOCK_BYTES}Q", reply.payload))

    async def _exactly(self, length_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < length_bytes:
            part = await asyncio.get_running_loop().sock_recv(self.sock, length_bytes - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
