"""Control messages: a u32 little-endian length and one msgpack map. Client and server.

Owns the framing, the matching of replies to calls, and the mapping of errors. Does not own
what the calls mean. One message is at most RPC_BYTES_MAX; a connection answers its calls
concurrently, up to CALLS_IN_FLIGHT_MAX.

    call   {"id": 7, "call": "replica.claim", "args": {...}}
    reply  {"id": 7, "ok": {...}}   or   {"id": 7, "error": {"code", "message", "fields"}}
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack

from protocol.errors import ProtocolViolation, StorageError, Timeout, Unreachable, from_wire
from protocol.limits import RPC_BYTES_MAX, RPC_TIMEOUT_S

CALLS_IN_FLIGHT_MAX = 64
"""Per connection, at the server, from the arrival of a call until its reply is handed to the
kernel. Past it the server stops reading: backpressure."""

LIST_ITEMS_MAX = 64 * 1024
"""Longest list or map in a message. Long lists of numbers travel packed (``protocol.regions``),
so only a hostile header asks for more, and it would be allocated before its items are seen."""

LENGTH = struct.Struct("<I")

log = logging.getLogger("dolmen.rpc")

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]


def pack(message: Any) -> bytes:
    body: bytes = msgpack.packb(message, use_bin_type=True)
    assert len(body) <= RPC_BYTES_MAX, f"a control message of {len(body)} bytes"
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> Any:
    """Raises ProtocolViolation for anything that is not one msgpack value."""
    try:
        return msgpack.unpackb(
            body, raw=False, strict_map_key=True, max_array_len=LIST_ITEMS_MAX, max_map_len=LIST_ITEMS_MAX
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolViolation(expected="msgpack", got=type(error).__name__) from error


def reason_of(error: BaseException) -> str:
    """Why a connection failed, for people: the kernel's words, not those of a library."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, asyncio.IncompleteReadError):
        return "the connection was closed"
    return str(error) or type(error).__name__


async def read_message(reader: asyncio.StreamReader) -> Any:
    """One message. Raises ProtocolViolation, or IncompleteReadError and OSError at the end."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if not 0 < length <= RPC_BYTES_MAX:
        raise ProtocolViolation(expected=f"at most {RPC_BYTES_MAX} bytes", got=str(length))
    return unpack(await reader.readexactly(length))


async def write_message(writer: asyncio.StreamWriter, message: Any) -> None:
    writer.write(pack(message))
    await writer.drain()


class RpcClient:
    """Calls over one connection. Safe for concurrent use; every call has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, peer: str) -> None:
        self.peer = peer
        self._reader = reader
        self._writer = writer
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._failure: str | None = None
        self.lost = asyncio.Event()
        self._pump = asyncio.get_running_loop().create_task(self._read(), name=f"rpc {peer}")

    @classmethod
    async def connect_unix(cls, path: str, *, timeout_s: float = RPC_TIMEOUT_S) -> RpcClient:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_unix_connection(path), timeout_s)
        except (OSError, TimeoutError) as error:
            raise Unreachable(peer=path, reason=reason_of(error)) from error
        return cls(reader, writer, peer=path)

    async def call(self, name: str, /, *, timeout_s: float = RPC_TIMEOUT_S, **args: Any) -> Any:
        """Raises the peer's error, Unreachable when the connection is lost, or Timeout."""
        if self._failure is not None:
            raise Unreachable(peer=self.peer, reason=self._failure)
        call_id, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                await write_message(self._writer, {"id": call_id, "call": name, "args": args})
                return await future
        except TimeoutError as error:
            raise Timeout(what=f"{name} at {self.peer}", timeout_s=timeout_s) from error
        except OSError as error:
            raise Unreachable(peer=self.peer, reason=reason_of(error)) from error
        finally:
            self._waiting.pop(call_id, None)

    async def _read(self) -> None:
        try:
            while True:
                match await read_message(self._reader):
                    case {"id": int(call_id), "ok": result}:
                        self._settle(call_id, result, None)
                    case {"id": int(call_id), "error": error}:
                        self._settle(call_id, None, from_wire(error))
                    case _:
                        raise ProtocolViolation(expected="a reply", got="something else")
        except (OSError, asyncio.IncompleteReadError, ProtocolViolation) as error:
            self._fail(reason_of(error))

    def _settle(self, call_id: int, result: Any, error: StorageError | None) -> None:
        future = self._waiting.get(call_id)
        if future is None or future.done():
            return  # its caller gave up
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unreachable(peer=self.peer, reason=reason))
        self._writer.close()
        self.lost.set()

    async def close(self) -> None:
        self._fail("closed here")
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)


async def serve_calls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
    """Answer calls until the peer closes or breaks the protocol. Calls under way are cancelled then:
    a handler that must not stop in the middle shields itself.

    A StorageError becomes an error reply. Any other exception is a bug of ours: it is logged, the peer
    gets ``internal``, and the other calls go on.
    """
    slots = asyncio.Semaphore(CALLS_IN_FLIGHT_MAX)

    async def answer(call_id: int, name: str, args: dict[str, Any]) -> None:
        try:
            writer.write(await _reply(handler, call_id, name, args))
            await writer.drain()
        except OSError:
            pass  # the peer is gone; the read loop ends as well
        finally:
            slots.release()

    async with asyncio.TaskGroup() as tasks:
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                match await read_message(reader):
                    case {"id": int(call_id), "call": str(name), "args": dict(args)}:
                        await slots.acquire()
                        task = tasks.create_task(answer(call_id, name, args), name=f"call {name[:100]}")
                        running.add(task)
                        task.add_done_callback(running.discard)
                    case _:
                        raise ProtocolViolation(expected="a call", got="something else")
        except (OSError, asyncio.IncompleteReadError, ProtocolViolation):
            for task in running:
                task.cancel()


async def _reply(handler: Handler, call_id: int, name: str, args: dict[str, Any]) -> bytes:
    """Run one call; the packed reply."""
    try:
        return pack({"id": call_id, "ok": await handler(name, args)})
    except StorageError as error:
        return pack({"id": call_id, "error": error.to_wire()})
    except Exception:  # a bug of ours must not take the other calls with it
        log.exception("call %s failed by a bug", name[:100])
        return pack(
            {"id": call_id, "error": {"code": "internal", "message": f"internal error in {name[:100]}"}}
        )
