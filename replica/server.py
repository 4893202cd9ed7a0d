"""The replica server: one TCP port, the hello, and where each connection goes after it.

Owns the listener, the deadline and the caps of connections, and the life of the process's parts. Does not
own what control calls do (``calls.py``) or frames: a data or peer socket goes to the data plane.

Promises: a peer that has proved nothing holds one socket and HELLO_BYTES_MAX bytes, for HANDSHAKE_TIMEOUT_S;
past a cap a new connection is closed and the old ones stay; running out of descriptors is waited out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from protocol.connect import recv_message, send_message, tune_socket
from protocol.errors import StorageError, Unreachable
from protocol.hello import NONCE_BYTES, Greeting, Hello, Role, make_answer, make_refusal, parse_hello
from protocol.limits import HANDSHAKE_TIMEOUT_S
from protocol.rpc import serve_calls
from replica.calls import Calls
from replica.disk import Disk
from replica.io_path import IoPath
from replica.replicas import Replicas

log = logging.getLogger("dolmen.replica")

HANDSHAKES_MAX = 128
"""Connections that have not finished their hello. Ours take milliseconds, so more means somebody who
holds them open; at 16 KiB each they hold 2 MiB."""

CONTROL_CONNECTIONS_MAX = 256
"""One per engine and one per daemon, for as many volumes as one disk sensibly has."""

LISTEN_BACKLOG = 128

ACCEPT_PAUSE_S = 0.1
"""After accept failed for want of descriptors or memory: time for one to come back, without spinning."""


REPORT_INTERVAL_S = 10.0
"""Between two log lines about refused connections: whoever floods the port must not fill the disk."""


class ReplicaServer:
    """Serves one disk. ``run()`` is its whole life."""

    def __init__(self, disk: Disk, io: IoPath, *, key: bytes, boot_id: str, listener: socket.socket) -> None:
        self._key = key
        self._listener = listener
        self._boot_id = boot_id
        self._process_id = secrets.token_hex(8)
        self._background: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._handshakes = 0
        self._controls = 0
        self._refused = 0
        self._report_after_s = 0.0
        self.replicas = Replicas(
            disk, io, key=key, boot_id=boot_id, process_id=self._process_id, spawn=self._spawn
        )
        self.calls = Calls(self.replicas)

    async def run(self, *, ready: Callable[[], None], stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then close everything flushed. ``ready`` is called when the port
        answers; replicas may still be opening then, and calls about them wait.

        If a part fails by a bug, the others are stopped and the error surfaces.
        """
        try:
            await self.replicas.load()
            async with asyncio.TaskGroup() as tasks:
                parts = [
                    tasks.create_task(self.replicas.open_all(), name="open replicas"),
                    tasks.create_task(self._accept(tasks), name="accept"),
                ]
                # Not a part: if it fails by a bug, that is logged, and the data goes on being served.
                self._spawn(self.replicas.scrubber.run(), "scrub")
                ready()
                await stop.wait()
                for task in (*parts, *self._connections):
                    task.cancel()
        finally:
            self._listener.close()
            await self.calls.drain()
            await self.replicas.close_all()
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)

    # -- connections

    async def _accept(self, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                # Without the pause a whole backlog, or a flood, would be accepted before anything else runs.
                await asyncio.sleep(0)
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                self._report_refused(f"accept failed: {error}")
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if self._handshakes >= HANDSHAKES_MAX:
                sock.close()
                self._report_refused(f"{HANDSHAKES_MAX} connections have not finished their hello")
                continue
            self._handshakes += 1
            task = tasks.create_task(self._connection(sock), name=f"connection {address}")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _connection(self, sock: socket.socket) -> None:
        """One connection from accept to close. Never raises: it must not end the others."""
        handed = False
        try:
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    nonce = secrets.token_bytes(NONCE_BYTES)
                    hello = await self._hello(sock, nonce)
                    if hello.role is not Role.CONTROL:
                        handed = True
                        await self.calls.finish(self._hand_over(sock, hello, nonce), "hand over")
                        return
            finally:
                self._handshakes -= 1
            await self._serve_control(sock)
        except (StorageError, OSError, EOFError) as error:  # TimeoutError is an OSError
            self._report_refused(str(error) or type(error).__name__)
        except Exception:  # a bug met by one peer must not disturb the others
            log.exception("a connection failed by a bug")
        finally:
            if not handed:
                sock.close()

    async def _hello(self, sock: socket.socket, nonce: bytes) -> Hello:
        """The hello of a peer that belongs to the cluster. Answered here, unless the socket is to be
        handed over."""
        sock.setblocking(False)
        tune_socket(sock)
        greeting = Greeting(nonce=nonce, boot_id=self._boot_id, process_id=self._process_id)
        await send_message(sock, greeting.to_wire())
        try:
            hello = parse_hello(await recv_message(sock), key=self._key, nonce=nonce)
        except StorageError as error:
            await send_message(sock, make_refusal(error))
            raise
        if hello.role is Role.CONTROL:
            full: StorageError | None = None
            if self._controls >= CONTROL_CONNECTIONS_MAX:
                reason = f"{CONTROL_CONNECTIONS_MAX} connections are open"
                full = Unreachable(peer="this server", reason=reason)
            await send_message(sock, make_answer(hello, full, key=self._key, nonce=nonce))
            if full is not None:
                raise full
        return hello

    async def _hand_over(self, sock: socket.socket, hello: Hello, nonce: bytes) -> None:
        """Give a data or peer socket to the data plane. Owns ``sock``; must not be cancelled, because the
        descriptor may be in use by a thread."""
        try:
            replica = self.replicas.get(hello.volume_id)
            await replica.attach(sock.fileno(), role=hello.role, epoch=hello.epoch)
            log.info("session opened volume=%s role=%s epoch=%d by=%s",
                     hello.volume_id, hello.role.value, hello.epoch, hello.engine_id)  # fmt: skip
            await send_message(sock, make_answer(hello, key=self._key, nonce=nonce))
        except StorageError as error:
            await send_message(sock, make_answer(hello, error, key=self._key, nonce=nonce))
            raise
        finally:
            sock.close()

    async def _serve_control(self, sock: socket.socket) -> None:
        self._controls += 1
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                await serve_calls(reader, writer, self.calls)
            finally:
                writer.close()
        finally:
            self._controls -= 1

    def _report_refused(self, reason: str) -> None:
        self._refused += 1
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._report_after_s:
            self._report_after_s = now_s + REPORT_INTERVAL_S
            log.info("connections ended early count=%d last=%s", self._refused, reason)
            self._refused = 0

    # -- background work

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Work that outlasts the call that caused it. It reports what it expects to go wrong itself."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed by a bug", task.get_name(), exc_info=error)
