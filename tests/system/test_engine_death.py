"""kill -9 of the engine under load: a pause, no error, no acknowledged write lost."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.guest.boot import Disk, booting
from tests.support.linearizability import assert_linearizable
from tests.support.nbd_clients import ReconnectingClient, Workload
from tests.support.processes import accepts, run, running
from tests.system.conftest import Volume

PLUGIN = Path(__file__).parents[2] / "engine" / "nbdkit_plugin.py"
MIB = 1024 * 1024
BLOCKS = range(48)

FIRST_IO_S_MAX = 2.0
"""The goal for the first answer after a kill. Asserted with the slack of a machine under test load."""

SLACK = 3.0


def test_a_workload_goes_on_over_kills_of_the_engine(volume: Volume) -> None:
    epochs = [volume.dolmen.show(volume.name)["epoch"]]
    with Workload(volume.uri, blocks=BLOCKS, seed=11) as workload:
        for _ in range(3):
            workload.wait_for_answers(500)
            old = volume.dolmen.kill_engine(volume.name)
            workload.wait_for_answers(500)
            volume.dolmen.wait_for_engine(volume.name, other_than=old)
            epochs.append(volume.dolmen.show(volume.name)["epoch"])
    assert workload.errors == []
    assert workload.reconnect_count >= 3
    assert_linearizable(workload.history)
    assert epochs == sorted(set(epochs)), "every engine has an epoch of its own"
    assert workload.latency_max_s < FIRST_IO_S_MAX * SLACK
    volume.dolmen.wait_for_state(volume.name, "healthy")
    volume.dolmen.verify(volume.name)


def test_a_flush_after_the_restart_covers_what_was_acknowledged_before(volume: Volume) -> None:
    with ReconnectingClient(volume.uri) as client:
        client.write(0, b"before the kill" * 100)
        volume.dolmen.kill_engine(volume.name)
        client.flush()
        assert client.read(0, 1500) == b"before the kill" * 100
        assert client.reconnect_count == 1


def test_clients_that_connect_while_there_is_no_engine_wait_for_the_next(volume: Volume) -> None:
    with ReconnectingClient(volume.uri) as client:
        client.write(0, b"kept")
    volume.dolmen.kill_engine(volume.name)
    # Plain libnbd clients, which try once: the socket itself outlives the engine.
    done = run("nbdinfo", "--size", volume.uri)
    assert int(done.stdout) == 64 * MIB
    run("nbdcopy", volume.uri, "null:")


def test_partial_writes_go_on_over_a_kill(volume: Volume) -> None:
    # Parts of blocks are read, changed and written inside the replicas: a kill must not tear them.
    with ReconnectingClient(volume.uri) as client:
        model = bytearray(MIB)
        for number in range(300):
            offset = number * 3331 % (MIB - 600)
            text = bytes([number % 255 + 1]) * 531
            client.write(offset, text)
            model[offset : offset + 531] = text
            if number in (100, 200):
                volume.dolmen.kill_engine(volume.name)
        assert client.read(0, MIB) == model
    volume.dolmen.wait_for_state(volume.name, "healthy")
    volume.dolmen.verify(volume.name)


def test_the_nbdkit_plugin_rides_out_a_kill(volume: Volume, tmp_path: Path) -> None:
    front = tmp_path / "front.sock"
    command = ["nbdkit", "-f", "-U", front, "python", PLUGIN, f"volume={volume.name}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            running(
                [*command, f"dir={volume.dolmen.dir}"],
                log=tmp_path / "front.log",
                ready=lambda: accepts(front),
            )
        )
        client = stack.enter_context(ReconnectingClient(f"nbd+unix:///?socket={front}"))
        client.write(0, b"one")
        volume.dolmen.kill_engine(volume.name)
        client.write(3, b"two")
        client.flush()
        assert client.read(0, 6) == b"onetwo"
        assert client.reconnect_count == 0, "the plugin's own clients see a pause"


def test_the_nbdkit_plugin_passes_everything_of_a_real_volume(volume: Volume, tmp_path: Path) -> None:
    front = tmp_path / "front.sock"
    command = ["nbdkit", "-f", "-U", front, "python", PLUGIN, f"volume={volume.name}"]
    with running(
        [*command, f"dir={volume.dolmen.dir}"], log=tmp_path / "front.log", ready=lambda: accepts(front)
    ):
        uri = f"nbd+unix:///?socket={front}"
        with Workload(uri, blocks=BLOCKS, seed=5) as workload:
            workload.wait_for_answers(500)
        assert workload.errors == []
        assert_linearizable(workload.history)
        with ReconnectingClient(uri) as client, ReconnectingClient(volume.uri) as direct:
            client.zero(0, 64 * MIB)
            client.write(MIB, b"x" * 4096)
            assert client.extents(0, 64 * MIB) == direct.extents(0, 64 * MIB)
            client.trim(MIB, 4096)
            assert client.read(MIB, 4096) == direct.read(MIB, 4096)
        info = run("nbdinfo", uri).stdout
        for ability in ("can_cache", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim"):
            assert f"{ability}: true" in info


@pytest.mark.guest
def test_a_guest_sees_no_error_when_the_engine_is_killed(volume: Volume) -> None:
    script = """
        set -e
        for i in $(seq 1 150); do
            printf "block %04d" $i | dd of=/dev/vda bs=4096 seek=$i conv=notrunc,fsync 2>/dev/null
            case $i in 30|90) echo "$i done";; esac
        done
        echo 3 >/proc/sys/vm/drop_caches
        for i in $(seq 1 150); do
            found=$(dd if=/dev/vda bs=4096 skip=$i count=1 2>/dev/null | head -c 10)
            [ "$found" = "block $(printf %04d $i)" ]
        done
        if dmesg | grep -i 'i/o error'; then exit 9; fi
        echo all there
    """
    with booting(disks=[Disk(volume.uri, reconnect_delay_s=60)], script=script) as guest:
        for mark in ("30 done", "90 done"):
            guest.wait_for(mark)
            volume.dolmen.kill_engine(volume.name)
        result = guest.result()
    assert result.exit_code == 0, result.console
    assert result.output.splitlines()[-1] == "all there"


def test_killing_the_daemon_stops_no_io(volume: Volume) -> None:
    pid = volume.dolmen.engine_pid(volume.name)
    with Workload(volume.uri, blocks=BLOCKS, seed=21) as workload:
        workload.wait_for_answers(300)
        volume.dolmen.kill_daemon()
        workload.wait_for_answers(1000)
        started = time.monotonic()
        volume.dolmen.up()
        assert time.monotonic() - started < 30
        workload.wait_for_answers(300)
    assert workload.errors == []
    assert workload.reconnect_count == 0, "the engine never noticed"
    assert_linearizable(workload.history)
    assert volume.dolmen.engine_pid(volume.name) == pid, "the daemon adopts what runs"
