"""Pulls regions from another replica server: the Python half of a resync at its target.

Owns the peer connection's life. Does not own which regions to pull (the engine decides) or the comparing and
copying (the data plane, which gets the socket).

Promises: the socket is shut down, never closed, while a native call may still use its descriptor; a pull that
is cancelled, or stopped by a claim, ends soon, however stuck its source is; one that was still
connecting then never begins.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from protocol.connect import connect_socket
from protocol.errors import Unreachable
from protocol.hello import Role


class Puller(Protocol):
    async def pull_regions(
        self,
        volume_id: str,
        fd: int,
        *,
        epoch: int,
        regions: list[int],
        rate_bytes_s: int,
        take_damaged: bool,
    ) -> dict[str, int]: ...


class Pulls:
    """The pulls of one replica that run now, so that all can be stopped."""

    def __init__(self, io: Puller, *, key: bytes, server_id: str) -> None:
        self._io = io
        self._key = key
        self._server_id = server_id
        self._sockets: set[socket.socket] = set()
        self._running: set[asyncio.Future[dict[str, int]]] = set()
        self.round = 0  # counts the times that all pulls were ended

    async def pull(
        self,
        volume_id: str,
        *,
        epoch: int,
        host: str,
        port: int,
        regions: list[int],
        pull_round: int,
        rate_bytes_s: int = 0,
        take_damaged: bool = False,
        source_process: str = "",
    ) -> dict[str, int]:
        """Make ``regions`` equal to those of the replica at ``host:port``. ``pull_round`` is what ``round``
        was when it was decided. ``rate_bytes_s``: what is copied a second at most, 0: no limit.
        ``take_damaged``: record as damaged what the source has no good copy of. ``source_process``: the
        process that is to answer there; another, started since, may lack what that one held (C8). Empty: any.

        Raises what connect_socket raises, Unreachable when the pulls were ended meanwhile, SourceFailed,
        StaleEpoch, or an error of our own disk.
        """
        sock, greeting = await connect_socket(
            host,
            port,
            key=self._key,
            role=Role.PEER,
            volume_id=volume_id,
            epoch=epoch,
            engine_id=self._server_id,
        )
        if pull_round != self.round:
            # It would compare with the source of a resync that is over.
            sock.close()
            raise _ended(volume_id)
        if source_process and source_process != greeting.process_id:
            sock.close()
            raise Unreachable(peer=f"{host}:{port}", reason="another process answers there by now")
        self._sockets.add(sock)
        pulling = asyncio.ensure_future(
            self._io.pull_regions(
                volume_id,
                sock.fileno(),
                epoch=epoch,
                regions=regions,
                rate_bytes_s=rate_bytes_s,
                take_damaged=take_damaged,
            )
        )
        self._running.add(pulling)
        pulling.add_done_callback(lambda done: self._release(sock, done))
        try:
            return await asyncio.shield(pulling)
        except asyncio.CancelledError:
            _shut_down(sock)  # the native call sees the end of its source and returns
            raise
        except Unreachable as error:
            if pull_round != self.round:
                # We ended it ourselves: nothing is wrong with the source.
                raise _ended(volume_id) from error
            raise

    async def settle(self) -> None:
        """End all and wait until none can write any more: a pull that was cancelled may still hold blocks
        it has read, older than what a live write brings next."""
        self.round += 1
        for sock in self._sockets:
            _shut_down(sock)
        if self._running:
            await asyncio.wait(self._running)

    def _release(self, sock: socket.socket, done: asyncio.Future[dict[str, int]]) -> None:
        self._running.discard(done)
        self._sockets.discard(sock)
        sock.close()
        if not done.cancelled():
            done.exception()  # its caller may be gone; then nobody else asks for it


def _ended(volume_id: str) -> Unreachable:
    return Unreachable(peer=f"the replica of volume {volume_id}", reason="its pulls were ended")


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster
