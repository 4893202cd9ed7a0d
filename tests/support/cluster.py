"""A whole cluster of real processes, driven through the command line as a user would.

::

    with cluster() as dolmen:
        uri = dolmen.create_and_attach("v1", size="64MiB")
        ...
        dolmen.kill_engine("v1")

Owns a short temporary directory and every process that was started for it. Promises: when the block
ends, nothing of it is left, whatever happened; if the block failed, the logs are printed; if it did
not fail and ``dolmen down`` left a process behind, that is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench.network import PrivateNetwork
from control.client import Client
from tests.support.processes import is_alive, kill, run, wait_until
from tests.support.tmpfs import tmpfs

DOLMEN = Path(sys.executable).parent / "dolmen"
COMMAND_TIMEOUT_S = 60.0
UP_TIMEOUT_S = 60.0
HEALTHY_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 10.0
LAST_INSTRUCTIONS_S = 2.0
LOG_TAIL_BYTES = 6000

MARK_VARIABLE = "DOLMEN_TEST_CLUSTER"
"""Set for everything that the test starts, so that what is left over can be found by it."""


class Cluster:
    """A running cluster. Every method is one or a few ``dolmen`` commands, or a signal to a pid."""

    def __init__(
        self, directory: Path, *, network: PrivateNetwork | None = None, prefix: Sequence[str] = ()
    ) -> None:
        self.dir = directory
        self.network = network
        self.prefix = [*(network.prefix if network else []), *prefix]
        self.mark = uuid.uuid4().hex
        self.env = {"DOLMEN_DIR": str(directory), MARK_VARIABLE: self.mark}

    # --- commands

    def dolmen(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        return run(DOLMEN, *arguments, env=self.env, check=check, timeout_s=timeout_s)

    def json(self, *arguments: str | Path) -> Any:
        done = subprocess.run(
            [str(part) for part in (DOLMEN, *arguments, "-o", "json")],
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{arguments} exited {done.returncode}:\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def up(self, *, nodes: int = 3) -> None:
        """Everything else is the daemon's child, and lives in the same namespaces."""
        command = [*self.prefix, DOLMEN, "up", "--dir", self.dir, "--nodes", str(nodes), "--detach"]
        run(*command, env=self.env, timeout_s=UP_TIMEOUT_S)

    def create(self, name: str, *, size: str = "64MiB", replicas: int = 3) -> None:
        self.dolmen("volume", "create", name, "--size", size, "--replicas", str(replicas))

    def attach(self, name: str) -> str:
        """The NBD URI of its unix socket."""
        return self.dolmen("volume", "attach", name).stdout.split()[0]

    def attach_tcp(self, name: str) -> str:
        self.dolmen("volume", "attach", name, "--tcp")
        return str(self.show(name)["nbd_tcp_uri"])

    def create_and_attach(self, name: str, *, size: str = "64MiB", replicas: int = 3) -> str:
        self.create(name, size=size, replicas=replicas)
        return self.attach(name)

    def detach(self, name: str) -> None:
        self.dolmen("volume", "detach", name)

    def remove(self, name: str) -> None:
        self.detach(name)
        self.dolmen("volume", "rm", name)

    def show(self, name: str) -> dict[str, Any]:
        """What ``dolmen volume show NAME -o json`` prints, without starting a program: it is polled."""
        return dict(Client(self.dir).volume(name))

    def verify(self, name: str) -> Any:
        """Raises when a replica differs or a checksum does not verify."""
        return self.json("replica", "verify", name)

    def wait_for_state(self, name: str, *states: str, timeout_s: float = HEALTHY_TIMEOUT_S) -> dict[str, Any]:
        last: dict[str, Any] = {}

        def reached() -> bool:
            last.update(self.show(name))
            return last["state"] in states

        try:
            wait_until(reached, timeout_s=timeout_s, what=f"volume {name} being {' or '.join(states)}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; last: {json.dumps(last, indent=1)}") from None
        return last

    # --- processes

    def daemon_pid(self) -> int:
        return int(json.loads((self.dir / "daemon.json").read_text())["pid"])

    def engine_pid(self, name: str) -> int:
        return int(self.show(name)["engine"]["pid"])

    def wait_for_engine(self, name: str, *, other_than: int, timeout_s: float = HEALTHY_TIMEOUT_S) -> int:
        """The pid of an engine that answers and is not ``other_than``."""
        found: list[int] = []

        def answers() -> bool:
            engine = self.show(name)["engine"]
            if engine and engine["answering"] and engine["pid"] != other_than:
                found.append(int(engine["pid"]))
            return bool(found)

        wait_until(answers, timeout_s=timeout_s, what=f"another engine of volume {name}")
        return found[0]

    def replica_pids(self, name: str) -> dict[str, int]:
        """Replica id to the pid of its server, of those that run."""
        return {r["id"]: int(r["pid"]) for r in self.show(name)["replicas"] if r["pid"] is not None}

    def kill_engine(self, name: str) -> int:
        """SIGKILL; returns the pid that died. The daemon starts another by itself."""
        return self._kill(self.engine_pid(name))

    def kill_replica(self, name: str, replica: str) -> int:
        """The pid that died. The daemon starts another server by itself."""
        return self._kill(self.replica_pids(name)[replica])

    def kill_daemon(self) -> int:
        return self._kill(self.daemon_pid())

    @staticmethod
    def _kill(pid: int) -> int:
        kill(pid)
        wait_until(lambda: not is_alive(pid), timeout_s=GONE_TIMEOUT_S, what=f"the death of {pid}")
        return pid

    def pids(self) -> list[int]:
        """Every live process that was started for this cluster: it inherited the mark, or names the
        directory on its command line."""
        found = []
        mark = f"{MARK_VARIABLE}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                belongs = mark in (entry / "environ").read_bytes().split(b"\0")
                belongs = belongs or os.fsencode(self.dir) in (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if belongs and is_alive(int(entry.name)):
                found.append(int(entry.name))
        return found

    def memory_bytes(self, pid: int) -> int:
        """Resident."""
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def descriptor_count(self, pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    # --- the end

    def logs(self) -> str:
        parts = []
        for path in sorted(self.dir.rglob("*.log")):
            raw = path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
            parts.append(f"--- {path.relative_to(self.dir)}\n{raw}")
        return "\n".join(parts)

    def end_everything(self) -> list[str]:
        """Kill whatever is left, by pid. Returns the command lines of what was."""
        left = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                left.append(b" ".join(words).decode(errors="replace"))
            kill(pid)
        wait_until(lambda: not self.pids(), timeout_s=GONE_TIMEOUT_S, what="the end of what was left")
        return left


@contextlib.contextmanager
def cluster(
    *,
    nodes: int = 3,
    disk_bytes: Mapping[str, int] | None = None,
    network: PrivateNetwork | None = None,
    prefix: Sequence[str] = (),
    prepare: Callable[[Path], AbstractContextManager[object]] | None = None,
) -> Iterator[Cluster]:
    """``disk_bytes``: the size of a node's disk, which is then a file system of its own in memory.
    ``network``: where it runs, if not in the machine's own. ``prefix``: put before `dolmen up`.
    ``prepare``: entered with the directory before anything runs, left when nothing does."""
    directory = Path(tempfile.mkdtemp(prefix="dolmen-test-", dir="/tmp"))  # short: sockets live in it
    dolmen = Cluster(directory, network=network, prefix=prefix)
    with contextlib.ExitStack() as mounts:
        mounts.callback(shutil.rmtree, directory, ignore_errors=True)
        if prepare is not None:
            mounts.enter_context(prepare(directory))
        for node, size_bytes in (disk_bytes or {}).items():
            mounts.enter_context(tmpfs(directory / "nodes" / node / "disk0", size_bytes=size_bytes))
        try:
            dolmen.up(nodes=nodes)
            yield dolmen
            dolmen.dolmen("down", "--dir", directory)
            wait_for_none(dolmen)
        except BaseException:
            print(dolmen.logs(), file=sys.stderr)
            raise
        finally:
            dolmen.end_everything()


def wait_for_none(dolmen: Cluster) -> None:
    """``down`` has returned: nothing may run any more, save a daemon on its last instructions (it
    gives up the directory's lock, which ``down`` waits for, just before it ends)."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not dolmen.pids(), timeout_s=LAST_INSTRUCTIONS_S)
    left = dolmen.pids()
    assert not left, f"`dolmen down` left processes behind: {dolmen.end_everything()}"
