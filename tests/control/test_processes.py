"""Processes and sockets: found by exact arguments, watched to their end, ports that stay."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from control import listeners
from control.layout import Layout, make_secret, write_private
from control.leftovers import end_leftovers
from control.listeners import PORT_MAX, PORT_MIN, choose_port, listen_tcp, listen_unix
from control.model import NodeWanted
from control.processes import LOG_BYTES_MAX, Process, Programs, adopt, find, matches, spawn
from control.supervisor import (
    RESTART_WAIT_FIRST_S,
    RESTART_WAIT_MAX_S,
    ServerAction,
    ServerSeen,
    plan_server,
    read_ready_file,
    restart_wait_s,
)
from protocol.errors import BadRequest
from tests.support.processes import is_alive, kill, wait_until

SLEEPER = [sys.executable, "-c", "import signal; signal.pause()"]


def with_process(tmp_path: Path, work: Callable[[Process, list[str]], Awaitable[None]]) -> None:
    argv = [*SLEEPER, "--dir", str(tmp_path)]

    async def run() -> None:
        process = spawn(argv, log=tmp_path / "log", cwd=tmp_path)
        try:
            # For a moment of its start the kernel shows no arguments at all.
            await asyncio.to_thread(wait_until, lambda: matches(process.pid, argv[1:]))
            await work(process, argv[1:])
        finally:
            kill(process.pid)

    asyncio.run(run())


def test_a_process_is_found_by_its_exact_arguments_only(tmp_path: Path) -> None:
    async def work(process: Process, arguments: list[str]) -> None:
        assert find(arguments) == [process.pid]
        assert find([*arguments[:-1], str(tmp_path) + "x"]) == []
        assert find([*arguments[:-1], str(tmp_path)[:-1]]) == []
        assert matches(process.pid, arguments) and not matches(os.getpid(), arguments)
        assert adopt(os.getpid(), arguments) is None
        assert os.getsid(process.pid) == process.pid  # Ctrl-C at our terminal is not for it

    with_process(tmp_path, work)


def test_the_end_of_a_child_and_of_an_adopted_process_is_told_once(tmp_path: Path) -> None:
    async def work(process: Process, arguments: list[str]) -> None:
        adopted = adopt(process.pid, arguments)
        assert adopted is not None
        told: list[str] = []
        process.on_exit(lambda: told.append("child"))
        adopted.on_exit(lambda: told.append("adopted"))
        await process.kill()
        await adopted.ended.wait()
        assert sorted(told) == ["adopted", "child"]
        assert process.exit_code == -signal.SIGKILL and adopted.exit_code is None
        process.signal(signal.SIGTERM)  # harmless: the pid may be somebody else's by now
        assert adopt(process.pid, arguments) is None

    with_process(tmp_path, work)


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def run() -> None:
        code = "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
        process = spawn([sys.executable, "-c", code], log=tmp_path / "log", cwd=tmp_path)
        await asyncio.to_thread(wait_until, lambda: "ready" in (tmp_path / "log").read_text())
        await process.stop(grace_s=0.05)
        assert process.exit_code == -signal.SIGKILL

    asyncio.run(run())


def test_a_forgotten_process_goes_on(tmp_path: Path) -> None:
    async def work(process: Process, arguments: list[str]) -> None:
        process.forget()
        assert is_alive(process.pid)

    with_process(tmp_path, work)


def test_a_log_that_grew_is_kept_once(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * (LOG_BYTES_MAX + 1))

    async def work(process: Process, arguments: list[str]) -> None:
        assert (tmp_path / "log.1").stat().st_size == LOG_BYTES_MAX + 1
        assert (tmp_path / "log").stat().st_size < LOG_BYTES_MAX

    with_process(tmp_path, work)


def test_leftovers_of_one_directory_are_ended_and_no_others(tmp_path: Path) -> None:
    programs = Programs(replica_server=tuple(SLEEPER), engine=tuple(SLEEPER))
    ours, other = Layout(tmp_path / "ours"), Layout(tmp_path / "other")

    async def run() -> None:
        started = []
        for layout in (ours, other):
            layout.disk_dir("node1").mkdir(parents=True)
            argv = [*SLEEPER, "--dir", str(layout.disk_dir("node1")), "--node", "node1"]
            started.append(spawn(argv, log=tmp_path / "log", cwd=tmp_path))
        try:
            assert await asyncio.to_thread(end_leftovers, ours, programs) == 1
            await started[0].ended.wait()
            assert is_alive(started[1].pid)
            assert await asyncio.to_thread(end_leftovers, ours, programs) == 0
        finally:
            for process in started:
                kill(process.pid)

    asyncio.run(run())


def test_processes_are_found_again_however_the_directory_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    real, link = Layout(tmp_path / "real"), Layout(tmp_path / "link")
    assert link.engine_config("data") == real.engine_config("data")
    assert link.disk_dir("node1") == real.disk_dir("node1") and link.runtime == real.runtime


def test_a_unix_socket_replaces_what_was_at_its_path_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    first = listen_unix(path)
    second = listen_unix(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        second.setblocking(True)
        second.accept()[0].close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["nbd.sock"]
    first.close()
    second.close()


def test_a_chosen_port_is_free_below_the_ephemeral_range_and_not_promised_to_others() -> None:
    port = choose_port("seed")
    assert PORT_MIN <= port <= PORT_MAX
    low, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert int(low) > PORT_MAX or int(low) < PORT_MIN
    assert choose_port("seed") == port != choose_port("seed", frozenset({port}))
    with listen_tcp(port):
        assert choose_port("seed") != port
        with pytest.raises(BadRequest, match=str(port)):
            listen_tcp(port)


def test_no_free_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "is_free", lambda port: False)
    with pytest.raises(BadRequest, match="no free TCP port"):
        choose_port("seed")


def test_a_server_is_started_stopped_or_left_alone() -> None:
    alive, dead, waiting = ServerSeen(True, 0), ServerSeen(False, 0), ServerSeen(False, 0.5)
    run, stop = NodeWanted.RUNNING, NodeWanted.STOPPED
    assert plan_server(run, dead, kill=False) is ServerAction.START
    assert plan_server(run, waiting, kill=False) is ServerAction.NOTHING
    assert plan_server(run, alive, kill=True) is ServerAction.NOTHING
    assert plan_server(stop, alive, kill=False) is ServerAction.STOP
    assert plan_server(stop, alive, kill=True) is ServerAction.KILL
    assert plan_server(stop, dead, kill=False) is ServerAction.NOTHING


def test_restarts_are_immediate_first_and_then_slower_up_to_a_limit() -> None:
    waits = [restart_wait_s(deaths) for deaths in range(0, 12)]
    assert waits[:3] == [0.0, 0.0, RESTART_WAIT_FIRST_S]
    assert waits == sorted(waits) and waits[-1] == RESTART_WAIT_MAX_S


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "1", "port": 2, "disk_id": "d"}', b"\xff"])
def test_a_ready_file_that_is_none_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ready"
    assert read_ready_file(path) is None
    path.write_bytes(content)
    assert read_ready_file(path) is None


def test_a_secret_is_made_once_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_secret(path, b"first")
    make_secret(path, b"second")
    assert path.read_bytes() == b"first" and path.stat().st_mode & 0o777 == 0o600
    write_private(tmp_path / "file", b"a")
    write_private(tmp_path / "file", b"b")
    assert (tmp_path / "file").read_bytes() == b"b"
