"""The command against the real daemon (with stand-ins for engines and replica servers): what it prints,
what it exits with, and that a mistake never shows a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.daemons import FakeCluster, fake_cluster
from tests.support.processes import wait_until

DOLMEN = Path(sys.executable).parent / "dolmen"


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster() as made:
        yield made


@pytest.fixture(autouse=True)
def no_volumes_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        client = request.getfixturevalue("cluster").client
        for volume in client.volumes():
            client.detach(volume["name"])
            client.delete_volume(volume["name"])


def dolmen(cluster: FakeCluster | None, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    if cluster is not None:
        env = {"DOLMEN_DIR": str(cluster.layout.dir), **env}
    done = subprocess.run(
        [DOLMEN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def answer(cluster: FakeCluster, *arguments: str) -> Any:
    done = dolmen(cluster, *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_volume_lives_through_every_command(cluster: FakeCluster) -> None:
    for _ in range(2):  # every command may be repeated
        done = dolmen(cluster, "volume", "create", "data", "--size", "1GiB")
        assert done.returncode == 0 and "1 GiB, replicas on node1, node2, node3" in done.stdout
        assert "next: dolmen volume attach data" in done.stderr
    for _ in range(2):
        done = dolmen(cluster, "volume", "attach", "data")
        assert done.returncode == 0
        assert done.stdout == f"nbd+unix:///data?socket={cluster.layout.nbd_socket('data')}\n"
    assert dolmen(cluster, "volume", "resize", "data", "2GiB").stdout == "volume data: 2 GiB\n"
    shown = dolmen(cluster, "volume", "show", "data").stdout
    assert "healthy" in shown and "data-r2" in shown and "in sync: data-r1, data-r2, data-r3" in shown
    assert "data" in dolmen(cluster, "volume", "ls").stdout
    assert (
        "volume data" not in dolmen(cluster, "status").stdout and "node3" in dolmen(cluster, "status").stdout
    )
    done = dolmen(cluster, "replica", "verify", "data")
    assert done.returncode == 0 and "same: 3 replicas hold the same bytes" in done.stdout
    for _ in range(2):
        assert dolmen(cluster, "volume", "detach", "data").stdout == "volume data: detached\n"
    assert dolmen(cluster, "volume", "rm", "data").stdout == "volume data: removed\n"
    assert dolmen(cluster, "volume", "rm", "data").returncode == 1
    assert dolmen(cluster, "volume", "rm", "data", "--missing-ok").returncode == 0


def test_json_has_the_documented_fields(cluster: FakeCluster) -> None:
    answer(cluster, "volume", "create", "data", "--size", "64MiB", "--replicas", "2")
    answer(cluster, "volume", "attach", "data", "--tcp")
    view = answer(cluster, "volume", "show", "data")
    assert view["name"] == "data" and view["size_bytes"] == 64 * 1024**2 and view["state"] == "healthy"
    assert view["nbd_uri"].startswith("nbd+unix:///data?socket=/")
    assert view["nbd_tcp_uri"].startswith("nbd://127.0.0.1:")
    assert view["epoch"] == 1 and view["membership"].keys() >= {"version", "in_sync"}
    assert view["engine"].keys() >= {"node", "pid"}
    for replica in view["replicas"]:
        assert replica.keys() >= {"id", "node", "pid", "state", "path"}
    assert [v["name"] for v in answer(cluster, "volume", "ls")] == ["data"]
    assert len(answer(cluster, "replica", "ls")) == len(answer(cluster, "replica", "ls", "data")) == 2
    assert [node["name"] for node in answer(cluster, "node", "ls")] == ["node1", "node2", "node3"]
    status = answer(cluster, "status")
    assert status["daemon"]["pid"] == cluster.daemon_pid and len(status["volumes"]) == 1
    assert answer(cluster, "replica", "verify", "data")["result"]["verdict"] == "same"


@pytest.mark.parametrize(
    ("arguments", "what", "next_step"),
    [
        (("volume", "create", "Data", "--size", "1GiB"), "cannot be a name", "example data-1"),
        (("volume", "create", "a" * 64, "--size", "1GiB"), "64 characters", "shorter"),
        (("volume", "create", "data", "--size", "1"), "1 byte is below the smallest", "4 MiB or more"),
        (("volume", "create", "data", "--size", "100T"), "above the largest", "64 TiB or less"),
        (("volume", "create", "data", "--size", "ten"), "not a size", "2GiB"),
        (("volume", "create", "data", "--size", "4194305"), "multiple of 4096", "4198400"),
        (
            ("volume", "create", "data", "--size", "1G", "--replicas", "4"),
            "4 replicas need 4 nodes",
            "node ls",
        ),
        (("volume", "create", "Data", "--size", "ten"), "error: 'Data' cannot be a name", "example data-1"),
        (("volume", "show", "nosuch"), "no volume nosuch", "dolmen volume ls"),
        (("volume", "attach", "nosuch"), "no volume nosuch", "dolmen volume ls"),
        (("volume", "show", ".."), "not a name", ""),
        (("volume", "show", "a/../b"), "no volume", ""),
        (("volume", "rm", "nosuch"), "no volume nosuch", "dolmen volume ls"),
        (("replica", "verify", "nosuch"), "no volume nosuch", "dolmen volume ls"),
        (("node", "stop", "node9"), "no node node9", "dolmen node ls"),
    ],
)
def test_a_mistake_is_one_line_and_names_the_next_step(
    cluster: FakeCluster, arguments: tuple[str, ...], what: str, next_step: str
) -> None:
    done = dolmen(cluster, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    error, *rest = done.stderr.splitlines()
    assert error.startswith("error: ") and what in error
    assert len(rest) == 1 and rest[0].startswith("next:  ") and next_step in rest[0]


def test_refusals_say_how_to_go_on(cluster: FakeCluster) -> None:
    dolmen(cluster, "volume", "create", "data", "--size", "1GiB")
    dolmen(cluster, "volume", "attach", "data")
    for arguments, what, next_step in (
        (("volume", "rm", "data"), "is attached", "dolmen volume detach data"),
        (("volume", "resize", "data", "500M"), "shrinking", "volume ls"),
        (("volume", "create", "data", "--size", "2GiB"), "another size", "dolmen volume show data"),
        (("volume", "attach", "data", "--tcp"), "without a TCP port", "detach"),
    ):
        done = dolmen(cluster, *arguments)
        assert done.returncode == 1 and what in done.stderr and next_step in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("volume", "creat"),
        ("volume", "create", "data", "--size", "1G", "--replicas", "9"),
        ("up", "--port", "99999"),
        ("up", "--nodes", "17"),
        ("volume", "create", "data"),
        ("nosuch",),
        ("volume", "ls", "-o", "xml"),
        ("volume", "recover", "data", "--withdraw", "--lose", "data 7.3 4f1c2a9e"),
        ("up", "--nodes", "x"),
    ],
)
def test_a_command_line_that_is_not_understood_exits_2(arguments: tuple[str, ...]) -> None:
    assert dolmen(None, *arguments).returncode == 2


def test_without_a_daemon_every_command_says_how_to_start_one(tmp_path: Path) -> None:
    for arguments in (("volume", "ls"), ("status",), ("node", "ls"), ("replica", "verify", "data")):
        done = dolmen(None, *arguments, "--dir", str(tmp_path))
        assert done.returncode == 3 and f"dolmen up --dir {tmp_path}" in done.stderr


def test_what_is_accepted_but_not_finished_exits_5(cluster: FakeCluster) -> None:
    dolmen(cluster, "volume", "create", "data", "--size", "1GiB")
    (cluster.layout.disk_dir("node2") / "odd").touch()
    try:
        done = dolmen(cluster, "replica", "verify", "data")
        assert done.returncode == 4 and "DIFFERENT" in done.stdout
    finally:
        (cluster.layout.disk_dir("node2") / "odd").unlink()
    assert dolmen(cluster, "node", "stop", "node3", "--kill").stdout == "node node3: stopped\n"
    done = dolmen(cluster, "replica", "verify", "data")
    assert done.returncode == 5 and "incomplete" in done.stdout and "offline" in done.stdout
    assert "node3 is stopped: waits for `dolmen node start node3`" in dolmen(cluster, "node", "ls").stdout
    assert dolmen(cluster, "node", "start", "node3").stdout == "node node3: up\n"


def test_a_detach_that_waits_for_replicas_exits_5_and_force_says_what_it_drops(cluster: FakeCluster) -> None:
    dolmen(cluster, "volume", "create", "data", "--size", "1GiB")
    dolmen(cluster, "volume", "attach", "data")
    (cluster.layout.volume_dir("data") / "state").write_text("waiting")
    done = dolmen(cluster, "volume", "detach", "data")
    assert done.returncode == 5 and "waits for replica data-r1 on node1" in done.stderr
    assert "dolmen volume detach data --force" in done.stderr
    done = dolmen(cluster, "volume", "detach", "data", "--force")
    assert done.returncode == 0 and done.stdout == "volume data: detached\n"
    assert "not acknowledged is dropped" in done.stderr
    again = dolmen(cluster, "volume", "detach", "data", "--force")
    assert again.returncode == 0 and again.stderr == ""


def test_ctrl_c_while_the_commands_are_imported_is_one_line() -> None:
    slow = (
        "import sys; sys.modules['typer'] = None; import cli.main as m, builtins; was = builtins.__import__\n"
    )
    slow += "def imported(name, *a, **k):\n    if name == 'cli.commands': raise KeyboardInterrupt\n"
    slow += "    return was(name, *a, **k)\nbuiltins.__import__ = imported; m.main()"
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_help_and_completion_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # Typer looks for the shell among its parents; a test may have none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = dolmen(None, "--help")
    assert done.returncode == 0 and "Exit codes" in done.stdout
    for command in ("up", "down", "status", "demo", "bench", "version", "volume", "replica", "node"):
        assert command in done.stdout
        assert command == "bench" or dolmen(None, command, "--help").returncode == 0
    assert "dolmen" in dolmen(None, "--show-completion", "bash").stdout
    assert json.loads(dolmen(None, "version", "-o", "json").stdout)["version"]
    assert dolmen(None, "version").stdout.strip()


def test_completion_offers_the_volumes_there_are(cluster: FakeCluster) -> None:
    dolmen(cluster, "volume", "create", "data-1", "--size", "64M")
    words = {"COMP_WORDS": "dolmen volume show da", "COMP_CWORD": "3", "_DOLMEN_COMPLETE": "complete_bash"}
    assert dolmen(cluster, **words).stdout.split() == ["data-1"]


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    mode = tmp_path.stat().st_mode
    done = dolmen(None, "up", "--detach", "--dir", str(tmp_path))
    assert done.returncode == 1 and "holds no cluster" in done.stderr and "--dir" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"] and tmp_path.stat().st_mode == mode
    (tmp_path / "file").touch()
    assert dolmen(None, "up", "-d", "--dir", str(tmp_path / "file")).returncode == 1


def test_down_where_nothing_is_up_is_harmless(tmp_path: Path) -> None:
    done = dolmen(None, "down", "--dir", str(tmp_path / "never"))
    assert done.returncode == 0 and "was not up" in done.stdout
    assert not (tmp_path / "never").exists()


def real_pids(directory: Path) -> list[int]:
    """Of processes that name the directory on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if os.fsencode(directory) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


@pytest.fixture()
def directory(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "cluster"
    yield made
    subprocess.run([DOLMEN, "down", "--dir", made], capture_output=True, timeout=120, check=False)
    for pid in real_pids(made):
        os.kill(pid, signal.SIGKILL)


def test_up_repeats_harmlessly_and_down_leaves_no_process(directory: Path) -> None:
    up = ("up", "--detach", "--nodes", "2", "--dir", str(directory))
    assert "is up: 2 nodes" in dolmen(None, *up).stdout
    first = sorted(real_pids(directory))
    assert "was up already" in dolmen(None, *up).stdout
    assert sorted(real_pids(directory)) == first and len(first) == 3
    assert "stopped" in dolmen(None, "down", "--dir", str(directory)).stdout
    assert real_pids(directory) == []


def test_down_ends_what_a_killed_daemon_left(directory: Path) -> None:
    dolmen(None, "up", "--detach", "--nodes", "2", "--dir", str(directory))
    os.kill(json.loads((directory / "daemon.json").read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: len(real_pids(directory)) == 2)
    assert "stopped" in dolmen(None, "down", "--dir", str(directory)).stdout
    assert real_pids(directory) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("early", [False, True])
def test_up_in_the_foreground_ends_everything_when_it_is_interrupted(
    directory: Path, number: signal.Signals, early: bool
) -> None:
    program = subprocess.Popen(
        [DOLMEN, "up", "--nodes", "2", "--dir", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if early:
            wait_until(lambda: len(real_pids(directory)) >= 2, what="the daemon's start")
        else:
            assert program.stdout is not None and "is up" in program.stdout.readline()
        program.send_signal(number)
        out, err = program.communicate(timeout=60)
        assert program.returncode == 0, out + err
        assert "stopping everything" in err and "Traceback" not in err
        assert real_pids(directory) == []
    finally:
        program.kill()
        program.wait()


def test_a_deep_directory_works_although_socket_paths_are_short(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    try:
        assert dolmen(None, "up", "-d", "--nodes", "1", "--dir", str(deep)).returncode == 0
        done = dolmen(
            None, "volume", "create", "v" * 63, "--size", "64M", "--replicas", "1", "--dir", str(deep)
        )
        assert done.returncode == 0, done.stderr
        socket_path = json.loads((deep / "daemon.json").read_text())["socket"]
        assert len(socket_path) < 108 and os.stat(Path(socket_path).parent).st_mode & 0o777 == 0o700
    finally:
        dolmen(None, "down", "--dir", str(deep))
    assert real_pids(deep) == [] and not Path(socket_path).parent.exists()
