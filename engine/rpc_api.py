"""The engine's control socket: status, stats, resize, replace_replica, repair, detach.

Owns the socket file and argument checks. The socket is made under another name, with mode 0600, and renamed
into place; it is never removed, because by then it may be a newer engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from engine.config import ReplicaAddress, parse_address
from engine.limits import CONTROL_CONNECTIONS_MAX
from engine.scrub import BLOCKS_PER_CALL_MAX
from protocol.errors import BadRequest
from protocol.limits import BLOCK_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN
from protocol.rpc import serve_calls

TEMPORARY_SUFFIX = ".new"

BACKLOG = 16

REPLIES_WAIT_S = 1.0
"""At the end, for calls that were just answered. A resize or detach under way was answered by the machine."""


class Engine(Protocol):
    def status(self) -> dict[str, Any]: ...
    def stats(self) -> dict[str, Any]: ...
    def resize(self, size_bytes: int) -> Awaitable[None]: ...
    def detach(self) -> Awaitable[None]: ...
    def replace_replica(self, old: str, new: ReplicaAddress) -> Awaitable[None]: ...
    def repair(self, replica: str, blocks: list[int]) -> Awaitable[dict[str, Any]]: ...


async def answer(engine: Engine, call: str, args: dict[str, Any]) -> Any:
    match call, args:
        case "engine.status", _:
            return engine.status()
        case "engine.stats", _:
            return engine.stats()
        case "engine.resize", {"size_bytes": int(size_bytes)} if (
            VOLUME_BYTES_MIN <= size_bytes <= VOLUME_BYTES_MAX and size_bytes % BLOCK_BYTES == 0
        ):
            await engine.resize(size_bytes)
            return {}
        case "engine.resize", _:
            raise BadRequest(reason=f"size_bytes is not a multiple of {BLOCK_BYTES} up to {VOLUME_BYTES_MAX}")
        case "engine.replace_replica", {"old": str(old), "new": new}:
            await engine.replace_replica(old, parse_address(new))
            return {}
        case "engine.replace_replica", _:
            raise BadRequest(reason="engine.replace_replica takes old and new")
        case "engine.repair", {"replica": str(replica), "blocks": list(blocks)} if len(
            blocks
        ) <= BLOCKS_PER_CALL_MAX and all(type(block) is int for block in blocks):
            return await engine.repair(replica, blocks)
        case "engine.repair", _:
            raise BadRequest(
                reason=f"engine.repair takes replica and blocks, at most {BLOCKS_PER_CALL_MAX} numbers"
            )
        case "engine.detach", _:
            await engine.detach()
            return {}
        case _:
            raise BadRequest(reason=f"unknown call {call[:80]!r}")


@asynccontextmanager
async def serve_control(path: str, engine: Engine) -> AsyncIterator[None]:
    """Listen until the block ends; then let replies under way go out and close the connections."""
    connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
    answering = 0
    idle = asyncio.Event()

    async def handle(call: str, args: dict[str, Any]) -> Any:
        nonlocal answering
        answering += 1
        idle.clear()
        try:
            return await answer(engine, call, args)
        finally:
            answering -= 1
            if not answering:
                idle.set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections[task] = writer
        try:
            if len(connections) <= CONTROL_CONNECTIONS_MAX:
                await serve_calls(reader, writer, handle)
        finally:
            del connections[task]
            writer.close()

    idle.set()
    server = await asyncio.start_unix_server(serve, sock=_listen(path))
    try:
        yield
    finally:
        server.close()
        try:
            async with asyncio.timeout(REPLIES_WAIT_S):
                await idle.wait()
        except TimeoutError:
            pass  # who asked sees a lost connection, and asks the next engine
        # Closed, not cancelled: what was written still goes out, and each ends by itself.
        for writer in connections.values():
            writer.close()
        await asyncio.gather(*connections, return_exceptions=True)


def _listen(path: str) -> socket.socket:
    temporary = path + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before bind: the file never exists with another mode
        sock.bind(temporary)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        os.rename(temporary, path)
    except BaseException:
        sock.close()
        raise
    return sock
