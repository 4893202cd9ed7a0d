"""A cluster of stand-ins under the real daemon, for one test. Ends every process it has, by pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from control.client import Client
from control.layout import Layout
from control.processes import find
from protocol.errors import StorageError
from tests.control.fake_daemon import FAKES
from tests.support.processes import kill, wait_until

ROOT = Path(__file__).resolve().parents[2]


class FakeCluster:
    """``start`` and ``kill_daemon`` as often as a test likes."""

    def __init__(self, directory: Path, node_count: int = 3, replace_after_s: float = 0.0) -> None:
        self.layout = Layout(directory)
        self.client = Client(directory)
        self.node_count = node_count
        self.replace_after_s = replace_after_s
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def daemon_pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.pid

    def start(self, *, wait: bool = True, die_at: int = 0) -> None:
        assert self._daemon is None
        self.layout.dir.mkdir(parents=True, exist_ok=True)
        with open(self.layout.daemon_log, "ab") as log:
            self._daemon = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.control.fake_daemon", "--dir", str(self.layout.dir),
                 "--nodes", str(self.node_count), "--die-at", str(die_at),
                 "--replace-after-s", str(self.replace_after_s)],
                stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
            )  # fmt: skip
        if wait:
            wait_until(self.is_ready, what="the daemon to be ready")

    def is_ready(self) -> bool:
        try:
            return bool(self.client.health()["ready"])
        except StorageError:
            assert self._daemon is not None and self._daemon.poll() is None, self.log()
            return False

    def log(self) -> str:
        return self.layout.daemon_log.read_text(errors="replace")

    def kill_daemon(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._daemon is not None
        self._daemon.send_signal(number)
        self._daemon.wait()
        self._daemon = None

    def has_died(self) -> bool:
        """Whether the daemon ended by itself; then another may be started."""
        if self._daemon is not None and self._daemon.poll() is None:
            return False
        self._daemon = None
        return True

    def join_daemon(self) -> int:
        assert self._daemon is not None
        code = self._daemon.wait(timeout=30)
        self._daemon = None
        return code

    def engine_pids(self, name: str) -> list[int]:
        return find([*FAKES.engine[1:], "--config", str(self.layout.engine_config(name))])

    def server_pids(self, node: str) -> list[int]:
        return find([*FAKES.replica_server[1:], "--dir", str(self.layout.disk_dir(node))])

    def all_pids(self) -> list[int]:
        volumes = self.layout.dir / "volumes"
        names = [path.name for path in volumes.iterdir()] if volumes.exists() else []
        engines = [pid for name in names for pid in self.engine_pids(name)]
        nodes = [f"node{index}" for index in range(1, self.node_count + 1)]
        return engines + [pid for node in nodes for pid in self.server_pids(node)]

    def clean_up(self) -> None:
        if self._daemon is not None:
            self.kill_daemon()
        for pid in self.all_pids():
            kill(pid)
        wait_until(lambda: not self.all_pids(), what="the stand-ins to end")
        shutil.rmtree(self.layout.dir, ignore_errors=True)
        shutil.rmtree(self.layout.runtime, ignore_errors=True)


@contextlib.contextmanager
def fake_cluster(
    node_count: int = 3, *, start: bool = True, replace_after_s: float = 0.0
) -> Iterator[FakeCluster]:
    directory = Path(tempfile.mkdtemp(prefix="dolmen-")) / "cluster"
    cluster = FakeCluster(directory, node_count, replace_after_s)
    try:
        if start:
            cluster.start()
        yield cluster
    except BaseException:
        if cluster.layout.daemon_log.exists():
            print(cluster.log()[-20000:])
        raise
    finally:
        cluster.clean_up()
        shutil.rmtree(cluster.layout.dir.parent, ignore_errors=True)
