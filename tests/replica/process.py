"""A real replica server process for tests: started, killed and started again on the same directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from protocol.hello import KEY_BYTES, Role
from protocol.limits import BLOCK_BYTES
from protocol.membership import MembershipRecord
from replica.client import ReplicaClient
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.frame_client import FrameClient
from tests.support.processes import EXIT_TIMEOUT_S, Started, running

KEY = bytes(range(KEY_BYTES))


class Server:
    """One disk's server. ``up()`` may be entered again and again."""

    def __init__(self, path: Path, *, node: str = "node1") -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.root = path
        self.directory = path / "disk0"
        self.node = node
        self.key_file = path / "key"
        self.key_file.write_bytes(KEY)
        self.ready_file = path / "ready.json"
        self.log = path / "log"
        self.port = 0
        self.process: Started | None = None

    def command(self, *, boot_id: str | None = None, extra: tuple[str, ...] = ()) -> list[str]:
        command = [
            sys.executable, "-m", "replica.main",
            "--dir", str(self.directory),
            "--node", self.node,
            "--port", "0",
            "--key", str(self.key_file),
            "--ready-file", str(self.ready_file),
            *extra,
        ]  # fmt: skip
        return command if boot_id is None else [*command, "--boot-id", boot_id]

    @contextlib.contextmanager
    def up(self, *, boot_id: str | None = None, extra: tuple[str, ...] = ()) -> Iterator[Server]:
        self.ready_file.unlink(missing_ok=True)
        command = self.command(boot_id=boot_id, extra=extra)
        with running(command, log=self.log, ready=self.ready_file.exists) as self.process:
            said = json.loads(self.ready_file.read_text())
            assert said["pid"] == self.process.pid
            self.port = said["port"]
            yield self

    @property
    def replica_path(self) -> Path:
        return self.directory / "replicas" / VOLUME

    def kill(self) -> None:
        """kill -9: what the page cache holds stays."""
        assert self.process is not None
        self.process.kill()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.process.wait(EXIT_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[ReplicaClient]:
        async with await ReplicaClient.connect("127.0.0.1", self.port, KEY) as client:
            yield client

    async def session(self, *, epoch: int = 1, role: Role = Role.DATA) -> FrameClient:
        return await FrameClient.connect(self.port, KEY, VOLUME, epoch=epoch, role=role)

    async def prepare(
        self, *, replica_id: str = "r1", epoch: int = 1, members: tuple[str, ...] = ("r1",)
    ) -> None:
        """A replica, claimed and in sync."""
        async with self.client() as client:
            await client.create(VOLUME, replica_id=replica_id, name="data", size_bytes=SIZE_BYTES)
            await client.claim(VOLUME, epoch=epoch, engine_id="A")
            record = MembershipRecord(epoch, 1, frozenset(members))
            await client.persist_record(VOLUME, epoch=epoch, record=record)


def blocks(seed: int, count: int = 1) -> bytes:
    """Blocks that differ from each other and from those of another seed."""
    return b"".join((seed * 1_000_003 + at).to_bytes(8, "little") * (BLOCK_BYTES // 8) for at in range(count))
