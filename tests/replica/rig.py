"""The control calls on a disk with real metadata files and a fake data plane."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from protocol.hello import Role
from protocol.membership import MembershipRecord
from replica.calls import Calls
from replica.disk import Disk
from replica.metadata import read_meta
from replica.replicas import Replicas
from tests.replica.fakes import KEY, SIZE_BYTES, VOLUME, FakeIo


class Rig:
    """One disk and the calls to it. ``restart()`` is a new process on the same disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.io = FakeIo()
        self.background: set[asyncio.Task[None]] = set()

    async def start(self, *, boot_id: str = "boot-1", open_all: bool = True) -> None:
        dirty = self.io.dirty
        self.io = FakeIo()
        self.io.dirty = dirty
        self.disk = Disk.open(str(self.path), node_id="node1", make_id=lambda: "disk-1")
        self.replicas = Replicas(
            self.disk, self.io, key=KEY, boot_id=boot_id, process_id="process-1", spawn=self.spawn
        )
        self.calls = Calls(self.replicas)
        await self.replicas.load()
        if open_all:
            await self.replicas.open_all()

    async def kill(self) -> None:
        """The process dies: nothing is flushed or written."""
        await self.settle()
        self.disk.close()

    async def restart(self, *, boot_id: str = "boot-1") -> None:
        await self.kill()
        await self.start(boot_id=boot_id)

    def spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def settle(self) -> None:
        await asyncio.gather(*self.background)

    async def call(self, name: str, /, **args: Any) -> Any:
        return await self.calls(f"replica.{name}", {"volume_id": VOLUME} | args)

    async def create(self, **changed: Any) -> dict[str, Any]:
        args = {"replica_id": "r1", "name": "data", "size_bytes": SIZE_BYTES} | changed
        answer: dict[str, Any] = await self.call("create", **args)
        return answer

    async def claim(self, epoch: int, engine_id: str = "A") -> dict[str, Any]:
        answer: dict[str, Any] = await self.call("claim", epoch=epoch, engine_id=engine_id)
        return answer

    async def persist(self, epoch: int, version: int, *members: str) -> None:
        record = MembershipRecord(epoch, version, frozenset(members)).to_wire()
        assert await self.call("persist_record", epoch=epoch, record=record) == {}

    async def attach(self, epoch: int, role: Role = Role.DATA) -> int:
        """A session; the peer's end is closed at once, which the fake does not notice."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            replica = self.replicas.get(VOLUME)
            before = replica.data_sessions | replica.peer_sessions
            await replica.attach(ours.fileno(), role=role, epoch=epoch)
            (session,) = (replica.data_sessions | replica.peer_sessions) - before
            return session

    async def status(self, volume_id: str = VOLUME) -> dict[str, Any]:
        """Its line in server.status, which changes nothing."""
        volumes = (await self.calls("server.status", {}))["volumes"]
        (found,) = [volume for volume in volumes if volume["volume_id"] == volume_id]
        line: dict[str, Any] = found
        return line

    @property
    def on_disk(self) -> Any:
        return read_meta(self.disk.replica_path(VOLUME))


Scenario = Callable[[Rig], Awaitable[None]]
Play = Callable[[Scenario], None]
