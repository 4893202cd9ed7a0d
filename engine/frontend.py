"""The NBD front door until a client's transmission phase: accept, negotiate, hand over.

Owns the inherited listening sockets, the deadline of a negotiation and the caps on connections. Does not own
the negotiation (``negotiation.py``) or what follows (the data plane gets the socket).

Promises: a client that says nothing costs one socket for at most HANDSHAKE_TIMEOUT_S and keeps nobody out:
when too many negotiate, the oldest of them is closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

from engine.config import Listener
from engine.io_path import IoPath
from engine.limits import ACCEPT_RETRY_S, CLIENTS_MAX, HANDSHAKES_MAX
from engine.negotiation import ExportTable, negotiate
from protocol.errors import StorageError
from protocol.jsonlog import log_event
from protocol.limits import HANDSHAKE_TIMEOUT_S

log = logging.getLogger("dolmen.engine")


class Frontend:
    def __init__(
        self,
        listeners: Sequence[Listener],
        *,
        exports: Callable[[], ExportTable],
        io: IoPath,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._listeners = [adopt(listener.fd) for listener in listeners]
        self._exports = exports
        self._io = io
        self._tasks = tasks
        self._negotiating: dict[asyncio.Task[None], None] = {}  # oldest first
        self._clients: set[int] = set()

    @property
    def client_count(self) -> int:
        return len(self._clients)

    def start(self) -> None:
        for listener in self._listeners:
            self._tasks.create_task(self._accept(listener), name="accept")

    def close(self) -> None:
        """Stop listening here. The daemon keeps the sockets, so clients wait in the backlog."""
        for listener in self._listeners:
            listener.close()

    def on_client_closed(self, client_id: int, reason: str) -> None:
        self._clients.discard(client_id)
        log_event(log, "client closed", client=client_id, reason=reason)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                # Without the pause a whole backlog, or a flood, would be accepted before anything else runs.
                await asyncio.sleep(0)
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                log_event(log, "accept failed", level=logging.WARNING, reason=str(error))
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            if len(self._clients) + len(self._negotiating) >= CLIENTS_MAX:
                log_event(log, "client refused", level=logging.WARNING, clients=CLIENTS_MAX)
                sock.close()
                continue
            if len(self._negotiating) >= HANDSHAKES_MAX:
                oldest = next(iter(self._negotiating))
                del self._negotiating[oldest]  # it ends soon; the next one must not pick it again
                oldest.cancel()
            task = self._tasks.create_task(self._welcome(sock), name="negotiate")
            self._negotiating[task] = None
            task.add_done_callback(lambda done: self._negotiating.pop(done, None))

    async def _welcome(self, sock: socket.socket) -> None:
        """One client, from accept to transmission. Never raises: it must not end the others."""
        with sock:
            try:
                sock.setblocking(False)
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    agreed = await negotiate(sock, self._exports())
                if agreed is None:
                    return
                # No await from here on: the data plane's news of this client must find it counted.
                client_id = self._io.add_client(
                    sock,
                    structured=agreed.structured,
                    meta_context=agreed.meta_context,
                    read_only=agreed.read_only,
                )
                self._clients.add(client_id)
                log_event(log, "client connected", client=client_id, read_only=agreed.read_only)
            except (OSError, StorageError) as error:  # TimeoutError is an OSError
                log_event(log, "negotiation ended", reason=str(error) or type(error).__name__)


def adopt(fd: int) -> socket.socket:
    """A listening socket that was inherited."""
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock
