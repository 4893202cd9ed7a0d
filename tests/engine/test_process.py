"""The engine as a process, with real replica servers: what its machine promises, seen from outside."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.limits import HANDSHAKES_MAX
from protocol.errors import ShrinkRefused
from protocol.limits import BLOCK_BYTES
from tests.engine.rig import ANSWER_TIMEOUT_S, Rig, rig
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.process import blocks
from tests.support.processes import run, wait_until
from tests.system.raw_nbd import FLUSH, READ, WRITE

RSS_KIB_MAX = 30 * 1024
"""The goal for an engine's memory."""

MIB = 1024 * 1024


@pytest.fixture
def cluster() -> Iterator[Rig]:
    # Not tmp_path: unix socket paths must be short.
    with tempfile.TemporaryDirectory(prefix="dolmen-engine-") as path, rig(Path(path)) as made:
        yield made


def write(cluster: Rig, offset: int, data: bytes) -> None:
    with cluster.client() as client:
        assert client.request(WRITE, offset, len(data), data=data).error == 0


def read(cluster: Rig, offset: int, length: int) -> bytes:
    with cluster.client() as client:
        return client.request(READ, offset, length).data


def test_it_opens_serves_and_detaches_clean(cluster: Rig) -> None:
    with cluster.attached() as engine:
        said = cluster.wait_for("healthy")
        assert said["membership"] == {"epoch": 1, "version": 1, "in_sync": ["r0", "r1", "r2"]}
        assert [replica["state"] for replica in said["replicas"]] == ["in_sync"] * 3
        write(cluster, 0, blocks(1, 8))
        assert read(cluster, 0, 8 * BLOCK_BYTES) == blocks(1, 8)
        stats = cluster.ask(lambda client: client.stats())
        assert stats["writes"] == 1 and len(stats["slots"]) == 3
        memory = Path(f"/proc/{engine.pid}/status").read_text()
        assert int(memory.split("VmRSS:")[1].split()[0]) <= RSS_KIB_MAX
        cluster.ask(lambda client: client.detach())
        assert cluster.end() == 0
    assert [cluster.inspect(slot)["dirty_count"] for slot in range(3)] == [0, 0, 0]
    assert len(cluster.digests()) == 1


def test_a_killed_replica_is_left_out_returns_and_ends_equal(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        write(cluster, 0, blocks(1, 64))
        cluster.kill_replica(1)
        write(cluster, MIB, blocks(2, 64))  # answered: the others hold it and the record
        said = cluster.wait_for("degraded")
        assert said["membership"]["in_sync"] == ["r0", "r2"]
        assert cluster.inspect(0)["record"]["in_sync"] == ["r0", "r2"]
        cluster.start_replica(1)
        said = cluster.wait_for("healthy")
        assert said["membership"]["version"] == 3
        assert cluster.store.record == said["membership"]
    assert len(cluster.digests()) == 1


def test_all_replicas_lost_is_a_pause(cluster: Rig) -> None:
    with cluster.attached(), ThreadPoolExecutor(1) as elsewhere:
        cluster.wait_for("healthy")
        for slot in range(3):
            cluster.kill_replica(slot)
        waiting = elsewhere.submit(write, cluster, 0, blocks(5))
        assert cluster.wait_for("waiting")["waiting_for"]
        for slot in (2, 0, 1):
            cluster.start_replica(slot)
        waiting.result(ANSWER_TIMEOUT_S)
        cluster.wait_for("healthy")
        assert read(cluster, 0, BLOCK_BYTES) == blocks(5)
    assert len(cluster.digests()) == 1


def test_the_second_loss_waits_for_the_state_store_and_goes_on_with_it(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        cluster.store.down()
        cluster.kill_replica(0)
        write(cluster, 0, blocks(1))  # the first is ridden through
        cluster.kill_replica(1)
        said = cluster.wait_for("waiting")
        wait_until(lambda: any("store" in entry for entry in cluster.status()["waiting_for"]))
        cluster.store.up()
        said = cluster.wait_for("degraded")
        assert said["membership"]["in_sync"] == ["r2"]
        assert cluster.store.record["in_sync"] == ["r2"]


def test_it_answers_status_while_it_waits_for_replicas(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
    cluster.kill_replica(0)
    cluster.kill_replica(1)
    with cluster.attached(straggler_wait_s=0.1):
        said = cluster.wait_for("waiting")
        assert {entry["replica"] for entry in said["waiting_for"]} == {"r0", "r1"}
        assert [replica["state"] for replica in said["replicas"]][:2] == ["offline", "offline"]
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(str(cluster.nbd))  # a client that comes early waits
            cluster.start_replica(0)
            cluster.wait_for("degraded", "healthy")
        assert read(cluster, 0, 512) == bytes(512)


def test_a_killed_engine_is_followed_by_one_that_has_every_write(cluster: Rig) -> None:
    with cluster.attached() as engine:
        cluster.wait_for("healthy")
        write(cluster, 5 * MIB, blocks(3, 32))
        engine.kill()
    with cluster.attached():
        assert read(cluster, 5 * MIB, 32 * BLOCK_BYTES) == blocks(3, 32)  # waits until it serves
        cluster.wait_for("healthy")
        with cluster.client() as client:
            assert client.request(FLUSH).error == 0
    assert len(cluster.digests()) == 1


def test_it_ends_with_code_3_when_a_newer_epoch_was_claimed(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        cluster.ask_replica(1, lambda client: client.claim(VOLUME, epoch=9, engine_id="other"))
        assert cluster.end() == 3


def test_it_ends_with_code_3_when_the_state_store_granted_another_epoch(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        cluster.store.epoch = 9
        cluster.kill_replica(1)
        assert cluster.end() == 3


def test_sigterm_is_a_quick_end_that_loses_nothing(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        write(cluster, 0, blocks(4))
        assert cluster.end(signal.SIGTERM) == 143
    with cluster.attached():
        assert read(cluster, 0, BLOCK_BYTES) == blocks(4)


def test_a_resize_reaches_replicas_and_new_clients(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        cluster.kill_replica(2)
        cluster.wait_for("degraded")
        cluster.ask(lambda client: client.resize(2 * SIZE_BYTES))
        with cluster.client() as client:
            assert client.size_bytes == 2 * SIZE_BYTES
            data = blocks(6)
            assert client.request(WRITE, 2 * SIZE_BYTES - len(data), len(data), data=data).error == 0
        cluster.start_replica(2)
        cluster.wait_for("healthy")
        assert cluster.inspect(2)["size_bytes"] == 2 * SIZE_BYTES
        with pytest.raises(ShrinkRefused):
            cluster.ask(lambda client: client.resize(SIZE_BYTES))


def test_clients_that_say_nothing_keep_nobody_out(cluster: Rig) -> None:
    with cluster.attached():
        cluster.wait_for("healthy")
        silent = [socket.socket(socket.AF_UNIX) for _ in range(HANDSHAKES_MAX + 10)]
        try:
            for sock in silent:
                sock.connect(str(cluster.nbd))
            assert read(cluster, 0, 512) == bytes(512)
        finally:
            for sock in silent:
                sock.close()


def test_a_config_that_is_wrong_is_refused_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text("{}")
    done = run(sys.executable, "-m", "engine.main", "--config", path, check=False)
    assert done.returncode == 2
    assert "lacks" in done.stdout
