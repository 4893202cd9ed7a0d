"""The data plane's stand-in: remembers what it was told, in order, and fails when told to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol.errors import ReplicaDamaged, ReplicaNotFound, StaleEpoch, StorageError
from protocol.limits import REGION_BLOCKS
from replica.disk import to_storage_error
from replica.io_path import Event
from replica.metadata import LAYER_NAME_CHARS_MAX, has_meta

VOLUME = "0b7c1f"
SIZE_BYTES = 64 * 1024 * 1024
KEY = bytes(range(32))


class FakeIo:
    """Has IoPath's methods. Stores are dictionaries that live as long as this object; a store's directory
    holds one file, so that a missing or foreign one is found damaged."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fail: dict[str, StorageError] = {}  # by method name, once
        self.stores: dict[str, dict[str, Any]] = {}
        self.dirty: dict[str, set[int]] = {}  # survives closing, like the disk
        self.damaged: set[int] = set()  # blocks that do not verify
        self.deliver: Callable[[Event], None] = lambda event: None
        self.descriptors: dict[int, int] = {}
        self._next_session = 1

    def _note(self, name: str, *args: Any) -> None:
        self.log.append((name, *args))
        if name in self.fail:
            raise self.fail.pop(name)

    def names(self) -> list[str]:
        return [entry[0] for entry in self.log]

    def _store(self, volume_id: str) -> dict[str, Any]:
        if volume_id not in self.stores:
            raise ReplicaNotFound(volume=volume_id)
        return self.stores[volume_id]

    def on_events(self, deliver: Callable[[Event], None]) -> None:
        self.deliver = deliver

    async def run_short(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is not has_meta:  # a look, in every status
            self._note(function.__name__, *args)
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise to_storage_error(error, path="/disk") from error

    run_long = run_short

    async def create_store(self, path: str, *, layer: str, size_bytes: int) -> None:
        self._note("create_store", path, layer, size_bytes)
        assert 0 < len(layer) <= LAYER_NAME_CHARS_MAX
        (Path(path) / "regions").touch(exist_ok=False)

    async def open_store(self, volume_id: str, path: str, **options: Any) -> dict[str, int]:
        self._note("open_store", volume_id, options)
        if not os.path.exists(os.path.join(path, "regions")):  # noqa: ASYNC240
            raise ReplicaDamaged(path=path, reason="regions is missing")
        assert volume_id not in self.stores
        self.stores[volume_id] = {"epoch": options["epoch"], "stamp": options["stamp"]}
        dirty = self.dirty.setdefault(volume_id, set())
        return {"dirty_regions": len(dirty), "regions_damaged": 0, "blocks_verified": 0}

    async def close_store(self, volume_id: str) -> None:
        self._note("close_store", volume_id)
        self._store(volume_id)
        del self.stores[volume_id]

    async def set_epoch(self, volume_id: str, epoch: int) -> None:
        self._note("set_epoch", volume_id, epoch)
        store = self._store(volume_id)
        assert epoch >= store["epoch"]
        store["epoch"] = epoch

    async def set_stamp(self, volume_id: str, stamp: tuple[int, int]) -> None:
        self._note("set_stamp", volume_id, stamp)
        self._store(volume_id)["stamp"] = stamp

    async def attach_session(self, volume_id: str, fd: int, *, epoch: int, role: str) -> int:
        self._note("attach_session", volume_id, epoch, role)
        if epoch != self._store(volume_id)["epoch"]:
            raise StaleEpoch(volume=volume_id, offered=epoch, current=self._store(volume_id)["epoch"])
        session, self._next_session = self._next_session, self._next_session + 1
        self.descriptors[session] = os.dup(fd)
        return session

    def end_session(self, volume_id: str, session: int) -> None:
        os.close(self.descriptors.pop(session))
        self.deliver(("session_closed", volume_id, session, "closed by the test"))

    async def dirty_regions(self, volume_id: str) -> list[int]:
        self._note("dirty_regions", volume_id)
        return sorted(self.dirty[volume_id])

    async def changed_since(self, volume_id: str, stamp: tuple[int, int]) -> list[int]:
        self._note("changed_since", volume_id, stamp)
        return [1, 5]

    async def begin_resync(self, volume_id: str, regions: list[int]) -> None:
        self._note("begin_resync", volume_id, regions)

    async def pull_regions(
        self, volume_id: str, fd: int, *, epoch: int, regions: list[int], **options: int | bool
    ) -> dict[str, int]:
        self._note("pull_regions", volume_id, epoch, regions)
        return {"regions": len(regions), "blocks_compared": 0, "blocks_copied": 0, "bytes_copied": 0}

    async def end_resync(self, volume_id: str) -> None:
        self._note("end_resync", volume_id)

    async def complete_regions(self, volume_id: str, regions: list[int]) -> None:
        self._note("complete_regions", volume_id, regions)

    async def clean_all(self, volume_id: str) -> None:
        self._note("clean_all", volume_id)
        self.dirty[volume_id].clear()

    async def resize(self, volume_id: str, size_bytes: int) -> None:
        self._note("resize", volume_id, size_bytes)

    async def verify(self, volume_id: str, *, first_region: int, region_count: int) -> dict[str, Any]:
        self._note("verify", volume_id, first_region, region_count)
        blocks = range(first_region * REGION_BLOCKS, (first_region + region_count) * REGION_BLOCKS)
        damaged = sorted(self.damaged.intersection(blocks))
        return {
            "blocks_verified": 0,
            "blocks_zero": 0,
            "damaged": damaged,
            "damaged_count": len(damaged),
            "digest": 7,
        }

    async def stats(self, volume_id: str) -> dict[str, int]:
        self._store(volume_id)
        return {"dirty_regions": len(self.dirty[volume_id]), "reads": 0}

    async def shutdown(self) -> None:
        self._note("shutdown")
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()
