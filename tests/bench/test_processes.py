"""What /proc says of processes, and what is said of those that are gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import processes

GONE = 2**22 + 1  # above every process id


def test_a_process_that_is_gone_uses_nothing() -> None:
    assert not processes.is_alive(GONE)
    assert processes.cpu_s(GONE) == 0.0
    assert processes.rss_bytes(GONE) == 0
    assert processes.thread_cpu_ns([GONE]) == {}


def test_processor_time_of_a_child_that_ended_still_counts() -> None:
    before_s = processes.cpu_s(os.getpid())
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert processes.cpu_s(os.getpid()) > before_s


def test_threads_that_ended_do_not_make_fine_time_negative() -> None:
    assert processes.fine_cpu_s({1: 500, 2: 900}, {2: 1000, 3: 50}) == (100 + 50) / 1e9


def test_descendants_belong_to_the_role_of_their_ancestor_unless_they_have_their_own() -> None:
    script = "import subprocess,sys; subprocess.run(['cat'])"
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    try:
        child = 0
        while not child:
            found = processes.with_descendants({"server": [parent.pid]})["server"]
            child = next((pid for pid in found if pid != parent.pid), 0)
        roles = processes.with_descendants({"server": [parent.pid], "helper": [child]})
        assert roles == {"server": [parent.pid], "helper": [child]}
    finally:
        assert parent.stdin is not None
        parent.stdin.close()
        parent.wait(10)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    ignore = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script = f"{ignore}; print('up', flush=True); time.sleep(99)"
    process = processes.spawn([sys.executable, "-c", script], log)
    processes.wait_until(lambda: log.exists() and b"up" in log.read_bytes(), process, log)
    monkeypatch.setattr(processes, "END_TIMEOUT_S", 0.1)
    processes.end(process)
    assert not processes.is_alive(process.pid)
