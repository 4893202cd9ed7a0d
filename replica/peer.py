"""Pulls regions from another replica server: the Python half of a resync at its target.

Owns the peer connection's life. Does not own which regions to pull (the engine decides) or the comparing and
copying (the data plane, which gets the socket).

Promises: the socket is shut down, never closed, while a native call may still use its descriptor; a pull that
is cancelled, or stopped by a newer epoch, ends soon, however stuck its source is.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from protocol.connect import connect_socket
from protocol.hello import Role


class Puller(Protocol):
    async def pull_regions(
        self, volume_id: str, fd: int, *, epoch: int, regions: list[int]
    ) -> dict[str, int]: ...


class Pulls:
    """The pulls of one replica that run now, so that all can be stopped."""

    def __init__(self, io: Puller, *, key: bytes, server_id: str) -> None:
        self._io = io
        self._key = key
        self._server_id = server_id
        self._sockets: set[socket.socket] = set()
        self._running: set[asyncio.Future[dict[str, int]]] = set()

    async def pull(
        self, volume_id: str, *, epoch: int, host: str, port: int, regions: list[int]
    ) -> dict[str, int]:
        """Make ``regions`` equal to those of the replica at ``host:port``.

        Raises what connect_socket raises, SourceFailed, StaleEpoch, or an error of our own disk.
        """
        sock, _ = await connect_socket(
            host,
            port,
            key=self._key,
            role=Role.PEER,
            volume_id=volume_id,
            epoch=epoch,
            engine_id=self._server_id,
        )
        self._sockets.add(sock)
        pulling = asyncio.ensure_future(
            self._io.pull_regions(volume_id, sock.fileno(), epoch=epoch, regions=regions)
        )
        self._running.add(pulling)
        pulling.add_done_callback(lambda done: self._release(sock, done))
        try:
            return await asyncio.shield(pulling)
        except asyncio.CancelledError:
            _shut_down(sock)  # the native call sees the end of its source and returns
            raise

    def stop_all(self) -> None:
        """A newer epoch has been claimed, or the replica goes: no pull may wait for its source."""
        for sock in self._sockets:
            _shut_down(sock)

    async def settle(self) -> None:
        """Stop all and wait until none can write any more: a pull that was cancelled may still hold blocks
        it has read, older than what a live write brings next."""
        self.stop_all()
        if self._running:
            await asyncio.wait(self._running)

    def _release(self, sock: socket.socket, done: asyncio.Future[dict[str, int]]) -> None:
        self._running.discard(done)
        self._sockets.discard(sock)
        sock.close()
        if not done.cancelled():
            done.exception()  # its caller may be gone; then nobody else asks for it


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster
