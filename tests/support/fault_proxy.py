"""Somebody between an engine and a replica server: delays, stalls, damages, repeats what passes.

::

    with fault_proxy(network, port) as proxy:      # connections to the port now pass through it
        proxy.delay_s = 0.1
        proxy.tamper = flip_a_bit_once(...)

It understands where a message ends (PROTOCOL.md: hello and control messages, then frames on data and peer
connections), so a fault can be about one whole frame. Owns its listening socket, its connections and one
thread, which lives in the private network. Does not own the rule that leads connections here
(``bench/network.py``). Promises: what it is not told to change passes unchanged and in order; when the block
ends the rule, the connections and the thread are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack

from bench.network import MARK, PrivateNetwork
from protocol.frames import HEADER_BYTES
from tests.support.processes import wait_until

CLONE_NEWNET = 0x40000000
UNITS_QUEUED_MAX = 4096
"""Per connection and direction, of what a delay holds: then the sender feels it."""

PAYLOAD_LENGTH_AT = 36


@dataclass(frozen=True, slots=True)
class Unit:
    """One whole message of a connection. ``role``: "" during the hello, then what the hello said."""

    role: str
    to_server: bool
    connection: int
    raw: bytes

    @property
    def is_frame(self) -> bool:
        return self.role in ("data", "peer")

    @property
    def kind(self) -> int:
        """Of a frame."""
        return self.raw[5]


class CloseConnection(Exception):
    """Raised by a tamperer: send ``last`` and close both sides."""

    def __init__(self, last: bytes = b"") -> None:
        self.last = last


Tamper = Callable[[Unit], list[bytes]]
"""What is sent on instead of a unit. Called in the order in which units arrive."""


def unchanged(unit: Unit) -> list[bytes]:
    return [unit.raw]


@dataclass(slots=True)
class FaultProxy:
    """The knobs may be turned at any time, from any thread."""

    port: int
    delay_s: float = 0.0  # each way
    rate_bytes_s: float = 0.0  # each way of each connection; 0: no limit
    tamper: Tamper = unchanged
    units_passed: int = 0
    data_connections: int = 0  # that live
    _flowing: threading.Event = field(default_factory=threading.Event)

    def stall(self) -> None:
        """Nothing passes any more, and no connection is closed; ``resume`` lets out what has come."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def behave(self) -> None:
        """Every knob back: it only passes things on."""
        self.tamper, self.delay_s, self.rate_bytes_s = unchanged, 0.0, 0.0
        self.resume()

    @property
    def stalled(self) -> bool:
        return not self._flowing.is_set()


class _Shell:
    """The event loop behind a FaultProxy."""

    def __init__(self, proxy: FaultProxy, listener: socket.socket) -> None:
        self._proxy = proxy
        self._listener = listener
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, ended: asyncio.Event) -> None:
        server = await asyncio.start_server(self._accepted, sock=self._listener)
        async with server:
            await ended.wait()
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one side ended, and so does the other; or all end
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = socket.socket()
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        onward.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(onward, ("127.0.0.1", self._proxy.port))
        except BaseException:
            onward.close()
            raise
        server_reader, server_writer = await asyncio.open_connection(sock=onward)
        self._connections += 1
        carried = _Connection(self._proxy, self._connections)
        try:
            await carried.run((reader, server_writer), (server_reader, writer))
        finally:
            server_writer.transport.abort()
            if carried.role == "data":
                self._proxy.data_connections -= 1


class _Connection:
    def __init__(self, proxy: FaultProxy, number: int) -> None:
        self._proxy = proxy
        self._number = number
        self.role = ""

    async def run(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        """Until either way ends."""
        tasks = []
        for to_server, (reader, writer) in zip((True, False), ways, strict=True):
            queue: asyncio.Queue[tuple[float, Unit] | None] = asyncio.Queue(UNITS_QUEUED_MAX)
            tasks.append(asyncio.ensure_future(self._take(reader, queue, to_server=to_server)))
            tasks.append(asyncio.ensure_future(self._give(writer, queue)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if all(task in tasks[::2] and task.exception() is None for task in done):
                # The sender has ended in an orderly way: what it has sent still arrives.
                await asyncio.wait([tasks[tasks.index(done.pop()) + 1]])
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[Any], *, to_server: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        hello_left = 1 if to_server else 2  # greeting, then ok or refusal
        try:
            while True:
                role = "" if hello_left else self.role
                raw = await (_frame(reader) if role in ("data", "peer") else _message(reader))
                unit = Unit(role, to_server, self._number, raw)
                if hello_left:
                    hello_left -= 1
                    if to_server:
                        self._note_role(raw)
                await queue.put((loop.time() + self._proxy.delay_s, unit))
        except asyncio.IncompleteReadError:
            await queue.put(None)

    def _note_role(self, raw: bytes) -> None:
        found = msgpack.unpackb(raw[4:])
        self.role = str(found.get("role", ""))
        if self.role == "data":
            self._proxy.data_connections += 1

    async def _give(self, writer: asyncio.StreamWriter, queue: asyncio.Queue[Any]) -> None:
        loop = asyncio.get_running_loop()
        while (entry := await queue.get()) is not None:
            due, unit = entry
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            while self._proxy.stalled:  # noqa: ASYNC110 - told by another thread
                await asyncio.sleep(0.01)  # a look, not a guess
            for raw in self._tampered(unit, writer):
                writer.write(raw)
                await writer.drain()
                if self._proxy.rate_bytes_s:
                    await asyncio.sleep(len(raw) / self._proxy.rate_bytes_s)
            self._proxy.units_passed += 1
        writer.write_eof()

    def _tampered(self, unit: Unit, writer: asyncio.StreamWriter) -> list[bytes]:
        try:
            return self._proxy.tamper(unit)
        except CloseConnection as close:
            writer.write(close.last)
            raise ConnectionAbortedError from close


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(4)
    return head + await reader.readexactly(int.from_bytes(head, "little"))


async def _frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(HEADER_BYTES)
    payload = head[PAYLOAD_LENGTH_AT : PAYLOAD_LENGTH_AT + 4]
    return head + await reader.readexactly(int.from_bytes(payload, "little"))


def _enter(network: PrivateNetwork) -> None:
    """The calling thread alone: a network namespace is a thread's."""
    fd = os.open(network.namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


@contextlib.contextmanager
def fault_proxy(network: PrivateNetwork, port: int) -> Iterator[FaultProxy]:
    """Every connection to ``port`` is cut, and those made from now on pass through the proxy."""
    proxy = FaultProxy(port)
    proxy.resume()
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []
    failures: list[BaseException] = []

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        ended = asyncio.Event()
        started.append((asyncio.get_running_loop(), ended, listener.getsockname()[1]))
        await _Shell(proxy, listener).serve(ended)

    def run() -> None:
        try:
            _enter(network)
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            failures.append(error)

    thread = threading.Thread(target=run, name="fault proxy", daemon=True)
    thread.start()
    wait_until(lambda: bool(started or failures), what="the proxy's start")
    if failures:
        raise failures[0]
    loop, ended, own_port = started[0]
    try:
        network.redirect(port, own_port)
        network.cut(port)
        yield proxy
    finally:
        network.heal(port)
        proxy.behave()
        loop.call_soon_threadsafe(ended.set)
        thread.join()
    assert not failures, failures


def once(matches: Callable[[Unit], bool], change: Tamper) -> Tamper:
    """``change`` for the first unit that matches, and nothing after it."""
    met: list[Unit] = []

    def tamper(unit: Unit) -> list[bytes]:
        if met or not matches(unit):
            return [unit.raw]
        met.append(unit)
        return change(unit)

    return tamper


def flipped(raw: bytes, at: int, mask: int = 0x10) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= mask
    return bytes(changed)
