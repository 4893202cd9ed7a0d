"""A real engine process with real replica servers and a state store that a test can take away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.client import EngineClient
from protocol.errors import StaleEpoch, StorageError
from protocol.rpc import serve_calls
from replica.client import ReplicaClient
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.process import Server
from tests.support.processes import EXIT_TIMEOUT_S, Started, end_group, wait_until
from tests.system.raw_nbd import RawNbd

ANSWER_TIMEOUT_S = 20.0


class Store:
    """The daemon's side of store.record, on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}
        self.epoch = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="store")
        self._thread.start()
        self.up()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_TIMEOUT_S)

    def up(self) -> None:
        self._run(self._up())

    def down(self) -> None:
        self._run(self._down())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _up(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in tuple(self._writers):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await serve_calls(reader, writer, self._answer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, call: str, args: dict[str, Any]) -> Any:
        assert call == "store.record" and args["volume_id"] == VOLUME
        if args["epoch"] != self.epoch:
            raise StaleEpoch(volume=VOLUME, offered=args["epoch"], current=self.epoch)
        self.record = args["record"]
        return {}


class Rig:
    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.servers = [Server(path / f"n{slot}", node=f"n{slot}") for slot in range(count)]
        self.ids = [f"r{slot}" for slot in range(count)]
        self.store = Store(path / "store")
        self.store.record = {"epoch": 0, "version": 0, "in_sync": self.ids}
        self.control = path / "engine"
        self.nbd = path / "nbd"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.nbd))
        self.listener.listen(256)  # as the daemon does
        self.engine: Started | None = None
        self._up: dict[int, contextlib.ExitStack] = {}
        self._stack = contextlib.ExitStack()

    # Replica servers

    def start_replica(self, slot: int, *, boot_id: str | None = None) -> None:
        server = self.servers[slot]
        extra = ("--port", str(server.port)) if server.port else ()
        stack = contextlib.ExitStack()
        stack.enter_context(server.up(boot_id=boot_id, extra=extra))
        self._up[slot] = stack

    def kill_replica(self, slot: int) -> None:
        self.servers[slot].kill()
        self._up.pop(slot).close()

    def create(self, slot: int) -> None:
        async def create(client: ReplicaClient) -> None:
            await client.create(VOLUME, replica_id=self.ids[slot], name="data", size_bytes=SIZE_BYTES)

        self.ask_replica(slot, create)

    def ask_replica(self, slot: int, ask: Callable[[ReplicaClient], Any]) -> Any:
        async def run() -> Any:
            async with self.servers[slot].client() as client:
                return await ask(client)

        return asyncio.run(run())

    def inspect(self, slot: int) -> dict[str, Any]:
        said: dict[str, Any] = self.ask_replica(slot, lambda client: client.inspect(VOLUME))
        return said

    def digests(self) -> set[int]:
        def verify(client: ReplicaClient) -> Any:
            return client.verify(VOLUME, first_region=0, region_count=SIZE_BYTES // (4 << 20))

        return {self.ask_replica(slot, verify)["digest"] for slot in sorted(self._up)}

    # The engine

    @contextlib.contextmanager
    def attached(self, **changes: Any) -> Iterator[Started]:
        """An engine of the next epoch; killed at the end if it still runs."""
        self.store.epoch += 1
        config = {
            "volume_id": VOLUME,
            "name": "data",
            "size_bytes": SIZE_BYTES,
            "epoch": self.store.epoch,
            "engine_id": f"n0/{self.store.epoch}",
            "node": "n0",
            "replicas": [
                {"id": self.ids[slot], "node": server.node, "host": "127.0.0.1", "port": server.port or 1}
                for slot, server in enumerate(self.servers)
            ],
            "record": self.store.record,
            "key_file": str(self.servers[0].key_file),
            "daemon_socket": str(self.store.path),
            "control_socket": str(self.control),
            "listeners": [{"fd": self.listener.fileno(), "kind": "unix"}],
            "predecessor_ended": self.engine is None or self.engine.process.poll() is not None,
            **changes,
        }
        path = self.path / "engine.json"
        path.write_text(json.dumps(config))
        self.control.unlink(missing_ok=True)
        log = self.path / "log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.main", "--config", path],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=[self.listener.fileno()],
                start_new_session=True,
            )
        self.engine = Started(process, log)
        try:
            wait_until(lambda: process.poll() is not None or self.control.exists(), what="the engine")
            yield self.engine
        finally:
            end_group(process)

    def ask(self, call: Callable[[EngineClient], Any]) -> Any:
        async def run() -> Any:
            async with await EngineClient.connect(str(self.control)) as client:
                return await call(client)

        return asyncio.run(run())

    def status(self) -> dict[str, Any]:
        said: dict[str, Any] = self.ask(lambda engine: engine.status())
        return said

    def wait_for(self, *states: str) -> dict[str, Any]:
        said: dict[str, Any] = {}

        def reached() -> bool:
            said.update(self.status())
            return said["state"] in states

        try:
            wait_until(reached, what=f"state {states}")
        except (TimeoutError, StorageError) as error:
            raise AssertionError(f"{error}; last {said}; {self.log_tail()}") from error
        return said

    def log_tail(self) -> str:
        return (self.path / "log").read_text()[-4000:]

    def end(self, number: signal.Signals | None = None) -> int:
        """The exit code, after a signal or by itself."""
        assert self.engine is not None
        if number is not None:
            os.kill(self.engine.pid, number)
        return self.engine.process.wait(EXIT_TIMEOUT_S)

    def client(self) -> RawNbd:
        return RawNbd(self.nbd)

    def close(self) -> None:
        for stack in self._up.values():
            stack.close()
        self.listener.close()
        self.store.close()


@contextlib.contextmanager
def rig(path: Path, *, count: int = 3, create: bool = True) -> Iterator[Rig]:
    assert len(str(path)) < 90, "unix sockets need short paths"
    made = Rig(path, count)
    try:
        for slot in range(count):
            if create:
                made.start_replica(slot)
                made.create(slot)
        yield made
    finally:
        made.close()
