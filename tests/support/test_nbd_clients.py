"""The reconnecting clients against servers of others: sound ones, and one that loses writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.linearizability import BLOCK_BYTES, Kind, Value, assert_linearizable, check, encode_tag
from tests.support.nbd_clients import ReconnectingClient, Workload, connect
from tests.support.nbd_library import nbd
from tests.support.processes import Started, accepts, running

SIZE = 16 * 1024 * 1024


@contextlib.contextmanager
def server(path: Path, *command: str) -> Iterator[Started]:
    path.unlink(missing_ok=True)
    with running(
        ["nbdkit", "-f", "-U", str(path), *command], log=path.with_suffix(".log"), ready=lambda: accepts(path)
    ) as started:
        yield started


def uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def file_plugin(image: Path) -> tuple[str, ...]:
    """Serialised: a file's own reads and writes are not atomic, and the checker would see it."""
    return ("--filter=noparallel", "file", str(image), "serialize=all-requests")


def test_a_workload_on_a_sound_server_is_linearizable(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with server(path, "memory", str(SIZE)):
        with Workload(uri(path), blocks=range(16), seed=1) as workload:
            workload.wait_for_answers(2000)
    assert workload.errors == []
    assert workload.reconnect_count == 0
    assert {op.kind for op in workload.history} == {Kind.READ, Kind.WRITE}
    assert_linearizable(workload.history)


def test_a_workload_goes_on_over_kills_of_a_server_that_keeps_its_data(tmp_path: Path) -> None:
    path, image = tmp_path / "nbd.sock", tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    with contextlib.ExitStack() as processes:
        started = processes.enter_context(server(path, *file_plugin(image)))
        with Workload(uri(path), blocks=range(16), seed=2) as workload:
            for _ in range(3):
                workload.wait_for_answers(200)
                started.kill()
                started = processes.enter_context(server(path, *file_plugin(image)))
            workload.wait_for_answers(200)
    assert workload.errors == []
    assert workload.reconnect_count >= 3
    assert_linearizable(workload.history)


def test_a_server_that_forgets_acknowledged_writes_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with contextlib.ExitStack() as processes:
        started = processes.enter_context(server(path, "memory", str(SIZE)))
        with Workload(uri(path), blocks=range(16), seed=3) as workload:
            workload.wait_for_answers(500)
            started.kill()
            processes.enter_context(server(path, "memory", str(SIZE)))
            workload.wait_for_answers(500)
    assert check(workload.history) != []


def test_an_error_is_recorded_and_leaves_the_write_undecided(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    error = ("--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC", "error-pwrite-rate=50%")
    with server(path, *error):
        with Workload(uri(path), blocks=range(16), seed=4) as workload:
            workload.wait_for_answers(300)
    assert any("ENOSPC" in error for error in workload.errors)
    assert any(op.end is None for op in workload.history)
    assert_linearizable(workload.history)


def test_the_reconnecting_client_repeats_what_was_not_answered(tmp_path: Path) -> None:
    path, image = tmp_path / "nbd.sock", tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    block = encode_tag(0, Value(1, 1))
    with contextlib.ExitStack() as processes:
        started = processes.enter_context(server(path, *file_plugin(image)))
        client = processes.enter_context(ReconnectingClient(uri(path)))
        client.write(0, block)
        started.kill()
        processes.enter_context(server(path, *file_plugin(image)))
        assert client.read(0, BLOCK_BYTES) == block
        assert client.reconnect_count == 1
        assert client.size() == SIZE
        assert sum(length for length, _ in client.extents(0, SIZE)) == SIZE
        client.zero(0, BLOCK_BYTES)
        client.flush()
        assert client.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        client.close()


def test_the_reconnecting_client_passes_errors_on(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with server(path, "--filter=error", "memory", str(SIZE), "error-pread=EIO", "error-pread-rate=100%"):
        with ReconnectingClient(uri(path)) as client, pytest.raises(nbd.Error) as caught:
            client.read(0, 512)
    assert caught.value.errno == "EIO"


def test_connecting_to_nobody_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(nbd.Error):
        connect(uri(tmp_path / "nobody.sock"))
