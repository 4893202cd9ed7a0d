"""The replica's door to the native data plane. No byte of a block is touched in this file.

Here:  which thread runs a call, error translation, delivery of events.
There: dataplane/binding/src/replica.rs (the binding), dataplane/core/src/replica/ (the loop: sessions, the
       store, recovery, the resync puller).

Every native call may block on the disk, so each runs in a small pool; the interpreter lock is released
inside. Cancelling an await does not stop the native call: callers that must not overlap keep a lock until
the call is done (``calls.py`` shields).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import _dataplane

from protocol.errors import (
    BadRequest,
    DiskError,
    NoSpace,
    ReplicaDamaged,
    ReplicaNotFound,
    SourceFailed,
    StaleEpoch,
    StorageError,
    Unreachable,
)
from replica.disk import to_storage_error

P = ParamSpec("P")
R = TypeVar("R")

SHORT_THREADS = 4
"""For calls that wait for one disk operation: claims, records, marks. One disk gains nothing from more."""

LONG_THREADS = 4
"""For recovery, pulls, verification, whole flushes. Apart from the short ones, so that a claim never
waits behind a rebuild."""

Event = tuple[object, ...]


def translate(kind: str, message: str, *, volume_id: str, path: str) -> StorageError:
    """A NativeError as the error its kind stands for. An unknown kind is a bug of ours: ``internal``."""
    match kind:
        case "no_space":
            return NoSpace(path=path)
        case "io_error":
            return DiskError(path=path, reason=message)
        case "damaged":
            return ReplicaDamaged(path=path, reason=message)
        case "stale_epoch":
            return StaleEpoch(f"volume {volume_id}: {message}", volume=volume_id)
        case "bad_request":
            return BadRequest(reason=message)
        case "not_found":
            return ReplicaNotFound(volume=volume_id)
        case "unreachable":
            return Unreachable(peer="the source", reason=message)
        case "source_failed":
            return SourceFailed(volume=volume_id, reason=message)
        case "closed":
            return Unreachable(peer=f"the replica of volume {volume_id}", reason=message or "closed")
        case _:
            return StorageError(f"the data plane failed: {kind}: {message}")


class IoPath:
    """One ReplicaLoop and the threads that call it."""

    def __init__(self, disk_path: str) -> None:
        self._disk_path = disk_path
        self._native = _dataplane.ReplicaLoop()
        self._short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="short")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long")

    def on_events(self, deliver: Callable[[Event], None]) -> None:
        """Call ``deliver`` on the event loop for each event of the data plane."""

        def drain() -> None:
            for event in self._native.poll_events():
                deliver(event)

        asyncio.get_running_loop().add_reader(self._native.event_fd(), drain)

    async def run_short(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A file operation of ours, off the event loop. OSError becomes what it means."""
        return await self._run(self._short, "", lambda: function(*args, **kwargs))

    async def run_long(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(self._long, "", lambda: function(*args, **kwargs))

    async def create_store(self, path: str, *, layer: str, size_bytes: int) -> None:
        await self._run(self._short, "", lambda: self._native.create_store(path, layer, size_bytes))

    async def open_store(
        self,
        volume_id: str,
        path: str,
        *,
        chain: tuple[str, ...],
        size_bytes: int,
        epoch: int,
        stamp: tuple[int, int],
    ) -> dict[str, int]:
        native = self._native
        return await self._run(
            self._long,
            volume_id,
            lambda: native.open_store(volume_id, path, list(chain), size_bytes, epoch, stamp),
        )

    async def close_store(self, volume_id: str) -> None:
        await self._run(self._long, volume_id, lambda: self._native.close_store(volume_id))

    async def set_epoch(self, volume_id: str, epoch: int) -> None:
        await self._run(self._short, volume_id, lambda: self._native.set_epoch(volume_id, epoch))

    async def set_stamp(self, volume_id: str, stamp: tuple[int, int]) -> None:
        await self._run(self._short, volume_id, lambda: self._native.set_stamp(volume_id, *stamp))

    async def attach_session(self, volume_id: str, fd: int, *, epoch: int, role: str) -> int:
        native = self._native
        return await self._run(
            self._short, volume_id, lambda: native.attach_session(volume_id, fd, epoch, role)
        )

    async def dirty_regions(self, volume_id: str) -> list[int]:
        return await self._run(self._short, volume_id, lambda: self._native.dirty_regions(volume_id))

    async def changed_since(self, volume_id: str, stamp: tuple[int, int]) -> list[int]:
        return await self._run(self._short, volume_id, lambda: self._native.changed_since(volume_id, *stamp))

    async def begin_resync(self, volume_id: str, regions: list[int]) -> None:
        await self._run(self._short, volume_id, lambda: self._native.begin_resync(volume_id, regions))

    async def pull_regions(
        self,
        volume_id: str,
        fd: int,
        *,
        epoch: int,
        regions: list[int],
        rate_bytes_s: int = 0,
        take_damaged: bool = False,
    ) -> dict[str, int]:
        native = self._native
        return await self._run(
            self._long,
            volume_id,
            lambda: native.pull_regions(volume_id, fd, epoch, regions, rate_bytes_s, take_damaged),
        )

    async def end_resync(self, volume_id: str) -> None:
        await self._run(self._long, volume_id, lambda: self._native.end_resync(volume_id))

    async def complete_regions(self, volume_id: str, regions: list[int]) -> None:
        await self._run(self._short, volume_id, lambda: self._native.complete_regions(volume_id, regions))

    async def clean_all(self, volume_id: str) -> None:
        await self._run(self._long, volume_id, lambda: self._native.clean_all(volume_id))

    async def resize(self, volume_id: str, size_bytes: int) -> None:
        await self._run(self._short, volume_id, lambda: self._native.resize(volume_id, size_bytes))

    async def verify(self, volume_id: str, *, first_region: int, region_count: int) -> dict[str, object]:
        native = self._native
        return await self._run(
            self._long, volume_id, lambda: native.verify(volume_id, first_region, region_count)
        )

    async def stats(self, volume_id: str) -> dict[str, int]:
        return await self._run(self._short, volume_id, lambda: self._native.stats(volume_id))

    async def shutdown(self) -> None:
        """Close sessions and stores, join all threads. Nothing may be called afterwards."""
        asyncio.get_running_loop().remove_reader(self._native.event_fd())
        await self._run(self._long, "", self._native.shutdown)
        self._short.shutdown(wait=False)
        self._long.shutdown(wait=False)

    async def _run(self, pool: ThreadPoolExecutor, volume_id: str, call: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        except _dataplane.NativeError as error:
            kind, message = (*error.args, "", "")[:2]
            raise translate(str(kind), str(message), volume_id=volume_id, path=self._disk_path) from error
        except OSError as error:
            raise to_storage_error(error, path=self._disk_path) from error
