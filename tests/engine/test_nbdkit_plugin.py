"""The nbdkit plugin passes everything through, in front of stand-ins for the engine.

The stand-ins are nbdkit's own memory and file plugins, whose log filter tells what arrived.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.layout import Layout
from tests.support.nbd_library import nbd
from tests.support.processes import Started, accepts, run, running

PLUGIN = Path(__file__).parents[2] / "engine" / "nbdkit_plugin.py"
SIZE = 64 * 1024 * 1024


class Stack:
    """A cluster's directory with a stand-in engine, and nbdkit with the plugin in front of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.dir = tmp_path / "cluster"
        (self.dir / "volumes" / "v1").mkdir(parents=True)
        self.engine_socket = self.dir / "volumes" / "v1" / "nbd.sock"
        self.socket = tmp_path / "front.sock"
        self.log = tmp_path / "requests.log"
        self.tmp_path = tmp_path
        self._clients: list[nbd.NBD] = []

    @contextlib.contextmanager
    def engine(self, *options: str, plugin: tuple[str, ...] = ("memory", str(SIZE))) -> Iterator[Started]:
        self.engine_socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-U", str(self.engine_socket), *options, *plugin]
        ready = lambda: accepts(self.engine_socket)  # noqa: E731 - a name for the keyword
        with running(command, log=self.tmp_path / "engine.out", ready=ready) as started:
            yield started

    @contextlib.contextmanager
    def logging_engine(self) -> Iterator[Started]:
        with self.engine("--filter=log", plugin=("memory", str(SIZE), f"logfile={self.log}")) as started:
            yield started

    @contextlib.contextmanager
    def front(self, *parameters: str) -> Iterator[Started]:
        command = ["nbdkit", "-f", "-U", str(self.socket), "python", str(PLUGIN), "volume=v1"]
        ready = lambda: accepts(self.socket)  # noqa: E731
        with running(
            [*command, f"dir={self.dir}", *parameters], log=self.tmp_path / "front.out", ready=ready
        ) as started:
            try:
                yield started
            finally:
                self._disconnect()

    def _disconnect(self) -> None:
        """nbdkit does not end before its clients do."""
        for client in self._clients:
            with contextlib.suppress(nbd.Error):
                client.shutdown()
        self._clients.clear()

    def client(self) -> nbd.NBD:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_unix(str(self.socket))
        self._clients.append(handle)
        return handle

    def requests(self, kind: str) -> list[str]:
        """What the log filter wrote of requests of one kind, as they began."""
        return [line for line in self.log.read_text().splitlines() if f" {kind} id=" in line]


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


def abilities(socket: Path) -> dict[str, object]:
    info = json.loads(run("nbdinfo", "--json", f"nbd+unix:///?socket={socket}").stdout)
    return {key: value for key, value in info["exports"][0].items() if key.startswith(("can_", "is_"))}


@pytest.mark.parametrize("options", [(), ("-r",), ("--filter=multi-conn",)])
def test_what_the_engine_can_do_is_what_the_client_is_told(stack: Stack, options: tuple[str, ...]) -> None:
    with stack.engine(*options), stack.front():
        assert abilities(stack.socket) == abilities(stack.engine_socket)


def test_block_sizes_are_passed_on(stack: Stack) -> None:
    policy = ("blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=32M")
    with stack.engine("--filter=blocksize-policy", plugin=("memory", str(SIZE), *policy)), stack.front():
        client = stack.client()
        assert [client.get_block_size(size) for size in (0, 1, 2)] == [512, 4096, 32 * 1024 * 1024]


def test_bytes_come_back_as_they_were_written_however_large_the_request(stack: Stack) -> None:
    payload = bytes(range(256)) * (40 * 1024 * 1024 // 256)  # more than one request of the engine
    policy = ("blocksize-maximum=32M", "blocksize-preferred=4096", "blocksize-minimum=1")
    with (
        stack.engine(
            "--filter=blocksize-policy",
            plugin=("memory", str(SIZE), *policy, "blocksize-error-policy=error"),
        ),
        stack.front(),
    ):
        client = stack.client()
        client.set_strict_mode(0)
        client.pwrite(payload, 511)
        assert client.pread(len(payload), 511) == payload
        assert client.pread(511, 0) == bytes(511)


@pytest.mark.parametrize("fua", [0, 1])
def test_a_write_carries_its_fua(stack: Stack, fua: int) -> None:
    with stack.logging_engine(), stack.front():
        stack.client().pwrite(b"x" * 512, 4096, fua and nbd.CMD_FLAG_FUA)
    (line,) = stack.requests("Write")
    assert "offset=0x1000 count=0x200" in line
    assert f"fua={fua}" in line


def test_flush_trim_and_cache_reach_the_engine(stack: Stack) -> None:
    with stack.logging_engine(), stack.front():
        client = stack.client()
        client.flush()
        client.trim(8192, 4096, nbd.CMD_FLAG_FUA)
        client.cache(4096, 0)
    assert len(stack.requests("Flush")) == 1
    (trim,) = stack.requests("Trim")
    assert "offset=0x1000 count=0x2000 fua=1" in trim
    (cached,) = stack.requests("Cache")
    assert "offset=0x0 count=0x1000" in cached


@pytest.mark.parametrize(
    ("flags", "logged"),
    [
        (0, "trim=1 fua=0 fast=0"),
        (nbd.CMD_FLAG_NO_HOLE, "trim=0 fua=0 fast=0"),
        (nbd.CMD_FLAG_FUA, "trim=1 fua=1 fast=0"),
        (nbd.CMD_FLAG_FAST_ZERO, "trim=1 fua=0 fast=1"),
        (nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA, "trim=0 fua=1 fast=1"),
    ],
)
def test_write_zeroes_carries_its_flags(stack: Stack, flags: int, logged: str) -> None:
    with stack.logging_engine(), stack.front():
        client = stack.client()
        client.pwrite(b"x" * 8192, 0)
        with contextlib.suppress(nbd.Error):  # the stand-in may refuse a fast zero; it was asked
            client.zero(4096, 0, flags)
    (line,) = stack.requests("Zero")
    assert "offset=0x0 count=0x1000" in line
    assert logged in line


def test_extents_are_those_of_the_engine(stack: Stack) -> None:
    def extents(socket: Path, flags: int = 0) -> list[int]:
        found: list[int] = []
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_unix(str(socket))
        handle.block_status(SIZE, 0, lambda context, offset, entries, error: found.extend(entries), flags)
        handle.shutdown()
        return found

    with stack.engine(), stack.front():
        client = stack.client()
        client.pwrite(b"x" * 65536, 1024 * 1024)
        client.pwrite(b"y" * 65536, 4 * 1024 * 1024)
        assert extents(stack.socket) == extents(stack.engine_socket)
        assert len(extents(stack.socket)) == 10
        assert extents(stack.socket, nbd.CMD_FLAG_REQ_ONE) == [1024 * 1024, 3]


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EPERM"])
def test_the_engines_error_is_the_clients_error(stack: Stack, name: str) -> None:
    plugin = ("memory", str(SIZE), f"error-pwrite={name}", "error-pwrite-rate=100%")
    with stack.engine("--filter=error", plugin=plugin), stack.front():
        client = stack.client()
        with pytest.raises(nbd.Error) as caught:
            client.pwrite(b"x" * 512, 0)
        assert caught.value.errno == name
        assert client.pread(512, 0) == bytes(512), "the connection goes on"


def test_requests_of_one_client_run_beside_each_other(stack: Stack) -> None:
    plugin = ("memory", str(SIZE), f"logfile={stack.log}", "delay-read=200ms")
    with stack.engine("--filter=log", "--filter=delay", plugin=plugin), stack.front():
        client = stack.client()
        for index in range(4):
            client.aio_pread(nbd.Buffer(512), index * 512)
        while client.aio_in_flight():
            client.poll(-1)
    connections = {re.search(r"connection=(\d+)", line)[1] for line in stack.requests("Read")}  # type: ignore[index]
    assert len(connections) >= 2


def test_one_connection_serves_an_engine_without_multi_conn(stack: Stack) -> None:
    plugin = ("memory", str(SIZE), f"logfile={stack.log}", "multi-conn-mode=disable")
    with stack.engine("--filter=log", "--filter=multi-conn", plugin=plugin), stack.front():
        client = stack.client()
        assert not client.can_multi_conn()
        for index in range(8):
            client.aio_pwrite(nbd.Buffer.from_bytearray(b"x" * 512), index * 512)
        while client.aio_in_flight():
            client.poll(-1)
    connections = {re.search(r"connection=(\d+)", line)[1] for line in stack.requests("Write")}  # type: ignore[index]
    assert len(connections) == 1


def test_a_volume_that_is_not_attached_is_named_with_the_next_command(stack: Stack) -> None:
    command = ["nbdkit", "-f", "-U", "-", "python", PLUGIN, "volume=v1", f"dir={stack.dir}"]
    done = run(*command, check=False)
    assert done.returncode != 0
    assert "volume v1 is not attached" in done.stdout
    assert "dolmen volume attach v1" in done.stdout


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "dolmen volume ls"),
        (["volume=../../etc"], "is not a volume's name"),
        (["volume=v1", "size=3"], "unknown parameter size="),
        (["volume=v1", "reconnect_timeout=soon"], "takes seconds"),
        (["volume=v1", "reconnect_timeout=nan"], "takes seconds"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(stack: Stack, parameters: list[str], message: str) -> None:
    done = run("nbdkit", "-f", "-U", "-", "python", PLUGIN, *parameters, f"dir={stack.dir}", check=False)
    assert done.returncode != 0
    assert message in done.stdout


def test_the_cluster_is_found_by_the_environment(stack: Stack) -> None:
    with stack.engine():
        done = run(
            *("nbdkit", "-U", "-", "python", PLUGIN, "volume=v1", "--run", 'nbdinfo --size "$uri"'),
            env={"DOLMEN_DIR": str(stack.dir)},
        )
    assert done.stdout.strip() == str(SIZE)


@pytest.mark.parametrize("padding", [1, 60, 120])
def test_the_socket_is_looked_for_where_the_daemon_puts_it(tmp_path: Path, padding: int) -> None:
    directory = tmp_path / ("d" * padding)
    expected = Layout(directory).nbd_socket("v1")
    command = ["nbdkit", "-f", "-U", "-", "python", PLUGIN, "volume=v1", f"dir={directory}/x/.."]
    done = run(*command, check=False)
    assert f"nothing listens at {expected}." in done.stdout


def test_a_socket_that_others_could_have_made_is_not_trusted(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    runtime = Layout(directory).runtime
    runtime.mkdir(mode=0o700)
    try:
        runtime.chmod(0o777)
        command = ["nbdkit", "-f", "-U", "-", "python", PLUGIN, "volume=v1", f"dir={directory}"]
        done = run(*command, check=False)
    finally:
        runtime.rmdir()
    assert "is not a private directory of ours" in done.stdout


def test_an_engine_that_restarts_is_a_pause(stack: Stack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    plugin = ("file", str(image))
    with contextlib.ExitStack() as processes:
        engine = processes.enter_context(stack.engine(plugin=plugin))
        processes.enter_context(stack.front())
        client = stack.client()
        client.pwrite(b"before" * 100, 0)
        engine.kill()
        outcome: list[object] = []

        def write_while_the_engine_is_gone() -> None:
            try:
                client.pwrite(b"during" * 100, 4096)
                outcome.append(client.pread(600, 4096))
            except nbd.Error as error:
                outcome.append(error)

        writer = threading.Thread(target=write_while_the_engine_is_gone)
        writer.start()
        engine = processes.enter_context(stack.engine(plugin=plugin))
        writer.join(30)
        assert outcome == [b"during" * 100]
        assert client.pread(600, 0) == b"before" * 100
        engine.kill()


def test_an_engine_that_restarts_under_load_loses_nothing(stack: Stack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    plugin = ("file", str(image))
    with contextlib.ExitStack() as processes:
        engine = processes.enter_context(stack.engine(plugin=plugin))
        processes.enter_context(stack.front())
        client = stack.client()
        errors: list[int] = []

        def note(error: object) -> int:
            errors.append(error.value)  # type: ignore[attr-defined]
            return 1

        for index in range(400):
            if index == 200:
                engine.kill()
                engine = processes.enter_context(stack.engine(plugin=plugin))
            buffer = nbd.Buffer.from_bytearray(bytes([index % 256]) * 4096)
            client.aio_pwrite(buffer, index * 4096, completion=note)
            while client.aio_in_flight() > 16:
                client.poll(-1)
        while client.aio_in_flight():
            client.poll(-1)
        assert errors == [0] * 400
        assert client.pread(400 * 4096, 0) == b"".join(bytes([i % 256]) * 4096 for i in range(400))
        engine.kill()


def test_an_engine_that_does_not_return_is_an_error_in_bounded_time(stack: Stack) -> None:
    with stack.engine() as engine, stack.front("reconnect_timeout=0.2") as front:
        client = stack.client()
        engine.kill()
        with pytest.raises(nbd.Error) as caught:
            client.pread(512, 0)
        assert caught.value.errnum == errno.ESHUTDOWN
        assert "did not return" in front.output


def test_qemu_img_and_filters_work_on_top(stack: Stack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"".join(bytes([i % 251]) * 4096 for i in range(SIZE // 4096)))
    with stack.engine(), stack.front():
        uri = f"nbd+unix:///?socket={stack.socket}"
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)
        done = run(
            *("nbdkit", "-U", "-", "--filter=offset", "python", PLUGIN, "volume=v1", f"dir={stack.dir}"),
            *("offset=8192", "range=4096", "--run", 'nbdcopy "$uri" - | md5sum'),
        )
    assert done.stdout.split()[0] == hashlib.md5(bytes([2]) * 4096).hexdigest()
