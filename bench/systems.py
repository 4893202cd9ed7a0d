"""The systems under test behind one interface: start, where to connect, which processes, stop.

| name | copies | what it is |
|---|---|---|
| dolmen | 3 | a local cluster of three nodes, TCP between them, checksums, dirty log, membership |
| ceiling | 3 | our C program that only moves the bytes; spins 50 us before it sleeps (``ceiling/``) |
| ceiling-sleep | 3 | the same without the spin |
| qemu-nbd | 1 | QEMU's NBD server on a raw file, page cache, thread pool |
| quorum | 3 | QEMU's quorum driver (vote threshold 2) over three qemu-nbd, TCP between them |

Owns the processes and files of a system between ``start`` and ``stop``. All files of all systems lie in one
directory of one file system. Does not own what is asked of them (``workloads.py``).

Promises: ``stop`` may be called at any time, after a failed ``start`` too, and leaves no process or file.
"""

from __future__ import annotations

import abc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench import processes
from bench.network import PrivateNetwork
from bench.processes import ProcessFailed

CEILING_SOURCES = Path(__file__).parent / "ceiling"

REPOSITORY = Path(__file__).parent.parent
"""Where the packages lie, in a checkout and in an installation alike."""

SPIN_US = 50
"""How long the ceiling's engine looks for events before it sleeps: about one round trip."""

CLIENTS_MAX = 16
"""Connections that qemu-nbd accepts at once: four fio jobs and some that are still closing."""

COMMAND_TIMEOUT_S = 60.0
"""One ``dolmen`` command: it starts an interpreter on a machine that may be busy."""


class System(abc.ABC):
    """One system. Life: constructed, ``start``, used, ``stop``; then it may be started again."""

    name: ClassVar[str]
    copies: ClassVar[int]

    def __init__(self, directory: Path, sockets: Path, size_bytes: int) -> None:
        """``directory`` is the system's own; ``sockets`` is short enough for unix socket names."""
        self.directory = directory
        self.size_bytes = size_bytes
        self._sockets = sockets

    @abc.abstractmethod
    def start(self) -> None:
        """Raises ProcessFailed."""

    @abc.abstractmethod
    def stop(self) -> None: ...

    @abc.abstractmethod
    def pids_by_role(self) -> dict[str, list[int]]:
        """Living processes by what they do; their descendants are added by the caller."""

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    @property
    def socket(self) -> Path:
        return self._sockets / f"{self.name}.sock"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def _remove_files(self) -> None:
        self.socket.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def compile_ceiling(cache: Path) -> Path:
    """The ceiling program, compiled if its sources are newer. Raises ProcessFailed."""
    program = cache / "ceiling"
    sources = sorted(CEILING_SOURCES.glob("*.[ch]"))
    if program.exists() and all(source.stat().st_mtime <= program.stat().st_mtime for source in sources):
        return program
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"ceiling.{os.getpid()}"
    args = ["gcc", "-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-o", str(partial)]
    args += [str(source) for source in sources if source.suffix == ".c"]
    try:
        done = subprocess.run(args, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ProcessFailed("gcc is missing: apt-get install gcc libc6-dev") from None
    if done.returncode != 0:
        raise ProcessFailed(f"the ceiling program does not compile: {done.stderr.strip()[-500:]}")
    partial.rename(program)
    return program


class Ceiling(System):
    name = "ceiling"
    copies = 3
    spin_us: ClassVar[int] = SPIN_US

    def __init__(self, directory: Path, sockets: Path, size_bytes: int, *, cache: Path) -> None:
        super().__init__(directory, sockets, size_bytes)
        self._cache = cache
        self._engine: subprocess.Popen[bytes] | None = None

    @property
    def files(self) -> list[Path]:
        return [self.directory / f"replica{index}" for index in range(self.copies)]

    def start(self) -> None:
        program = compile_ceiling(self._cache)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        options = [f"--socket={self.socket}", f"--size={self.size_bytes}", f"--spin-us={self.spin_us}"]
        self._engine = processes.spawn([program, *options, *self.files], self.log)
        processes.wait_for_socket(self.socket, self._engine, self.log)

    def stop(self) -> None:
        if self._engine is not None:
            processes.end(self._engine)
            self._engine = None
        self._remove_files()

    def pids_by_role(self) -> dict[str, list[int]]:
        assert self._engine is not None, "not started"
        engine = self._engine.pid
        children = processes.with_descendants({"engine": [engine]})["engine"]
        return {"engine": [engine], "replica": [pid for pid in children if pid != engine]}


class CeilingSleep(Ceiling):
    name = "ceiling-sleep"
    spin_us = 0


def _qemu_nbd(socket_args: list[str]) -> list[str]:
    return ["qemu-nbd", "--persistent", f"--shared={CLIENTS_MAX}", "--cache=writeback", *socket_args]


class QemuNbd(System):
    name = "qemu-nbd"
    copies = 1

    def __init__(self, directory: Path, sockets: Path, size_bytes: int) -> None:
        super().__init__(directory, sockets, size_bytes)
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = make_sparse_file(self.directory / "disk", self.size_bytes)
        args = _qemu_nbd([f"--socket={self.socket}", "--format=raw", "--aio=threads"])
        self._server = processes.spawn([*args, file], self.log)
        processes.wait_for_socket(self.socket, self._server, self.log)

    def stop(self) -> None:
        if self._server is not None:
            processes.end(self._server)
            self._server = None
        self._remove_files()

    def pids_by_role(self) -> dict[str, list[int]]:
        assert self._server is not None, "not started"
        return {"server": [self._server.pid]}


class Quorum(System):
    name = "quorum"
    copies = 3

    def __init__(self, directory: Path, sockets: Path, size_bytes: int) -> None:
        super().__init__(directory, sockets, size_bytes)
        self._front: subprocess.Popen[bytes] | None = None
        self._replicas: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        options = "driver=quorum,vote-threshold=2"
        for index in range(self.copies):
            port = self._start_replica(index)
            child = f"children.{index}"
            options += (
                f",{child}.driver=nbd,{child}.server.type=inet,{child}.server.host=127.0.0.1"
                f",{child}.server.port={port}"
            )
        self._front = processes.spawn(
            [*_qemu_nbd([f"--socket={self.socket}", "--image-opts"]), options], self.log
        )
        processes.wait_for_socket(self.socket, self._front, self.log)

    def _start_replica(self, index: int) -> int:
        file = make_sparse_file(self.directory / f"replica{index}", self.size_bytes)
        pid_file = self.directory / f"replica{index}.pid"
        port = free_port()
        args = _qemu_nbd(["--bind=127.0.0.1", f"--port={port}", "--format=raw", "--aio=threads"])
        process = processes.spawn([*args, f"--pid-file={pid_file}", file], self.log)
        self._replicas.append(process)
        # The pid file is written once the socket listens.
        processes.wait_until(pid_file.exists, process, self.log)
        return port

    def stop(self) -> None:
        if self._front is not None:
            processes.end(self._front)
            self._front = None
        while self._replicas:
            processes.end(self._replicas.pop())
        self._remove_files()

    def pids_by_role(self) -> dict[str, list[int]]:
        assert self._front is not None, "not started"
        return {"engine": [self._front.pid], "replica": [process.pid for process in self._replicas]}


class Dolmen(System):
    """A cluster of its own, driven by the ``dolmen`` command as an operator would."""

    name = "dolmen"
    copies = 3
    volume: ClassVar[str] = "bench"

    def __init__(self, directory: Path, sockets: Path, size_bytes: int) -> None:
        super().__init__(directory, sockets, size_bytes)
        self.network: PrivateNetwork | None = None  # where ``start`` puts it, if not in the machine's own
        self._uri = ""
        self._started = False

    @property
    def uri(self) -> str:
        return self._uri

    def command(self, *args: str, prefix: Sequence[str] = ()) -> None:
        """Run ``dolmen ARGS`` on this cluster. Raises ProcessFailed."""
        env = {**os.environ, "DOLMEN_DIR": str(self.directory)}
        line = [*prefix, sys.executable, "-m", "cli.main", *args]
        try:
            done = subprocess.run(
                line,
                env=env,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"dolmen {args[0]} took longer than {COMMAND_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            message = (done.stderr.strip() or done.stdout.strip())[-500:]
            raise ProcessFailed(f"dolmen {' '.join(args)}: {message}")

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._started = True
        up = ["up", "--dir", str(self.directory), "--nodes", str(self.copies), "--detach"]
        # Everything else is the daemon's child, or reaches it by unix sockets.
        self.command(*up, prefix=self.network.prefix if self.network else ())
        size = ["--size", str(self.size_bytes), "--replicas", str(self.copies)]
        self.command("volume", "create", self.volume, *size)
        self.command("volume", "attach", self.volume)
        self._uri = str(self.show()["nbd_uri"])

    def replica_ports(self) -> dict[str, int]:
        """Replica id to the TCP port of its server, as the engine was told."""
        from control.client import Client

        config = json.loads(Client(self.directory).layout.engine_config(self.volume).read_text())
        return {str(replica["id"]): int(replica["port"]) for replica in config["replicas"]}

    def show(self) -> dict[str, Any]:
        """The volume as the daemon shows it."""
        from control.client import Client
        from protocol.errors import StorageError

        try:
            return Client(self.directory).volume(self.volume)
        except StorageError as error:
            raise ProcessFailed(f"the daemon does not show the volume: {error}") from error

    def stop(self) -> None:
        if self._started:
            self._started = False
            try:
                self.command("down", "--dir", str(self.directory))
            finally:
                self._remove_files()

    def pids_by_role(self) -> dict[str, list[int]]:
        shown = self.show()
        daemon = json.loads((self.directory / "daemon.json").read_text(encoding="utf-8"))
        return {
            "daemon": [int(daemon["pid"])],
            "engine": [int(shown["engine"]["pid"])],
            "replica": [int(replica["pid"]) for replica in shown["replicas"]],
        }


def make_sparse_file(path: Path, size_bytes: int) -> Path:
    with path.open("ab") as file:
        file.truncate(size_bytes)
    return path


def free_port() -> int:
    """A TCP port that is free now. Another process may take it: then the server says so and start fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


SYSTEMS: Mapping[str, type[System]] = {
    system.name: system for system in (Dolmen, Ceiling, CeilingSleep, QemuNbd, Quorum)
}


def make_system(name: str, *, data: Path, sockets: Path, size_bytes: int, cache: Path) -> System:
    """``data`` holds one directory per system."""
    kind: Callable[..., System] = SYSTEMS[name]
    extra = {"cache": cache} if issubclass(SYSTEMS[name], Ceiling) else {}
    return kind(data / name, sockets, size_bytes, **extra)
