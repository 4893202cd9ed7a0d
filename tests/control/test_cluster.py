"""The daemon as a process, with stand-ins for engines and replica servers: operations, kills, adoption."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from control.errors import NodeNotFound
from protocol.errors import (
    BadRequest,
    NotEnoughNodes,
    ShrinkRefused,
    VolumeExistsWithOtherSpec,
    VolumeInUse,
    VolumeNotFound,
)
from tests.control.daemons import FakeCluster, fake_cluster
from tests.support.processes import accepts, is_alive, kill, wait_until

GIB = 1024**3


@pytest.fixture()
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster() as made:
        yield made


def greeting_of(cluster: FakeCluster, name: str = "data") -> str:
    """What a client of the volume's socket is told: the epoch of the engine behind it."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(cluster.layout.nbd_socket(name)))
        return client.recv(100).decode().strip()


def test_a_volume_is_created_attached_grown_detached_and_removed(cluster: FakeCluster) -> None:
    client = cluster.client
    created = client.create_volume("data", GIB, 3)
    assert created["state"] == "detached" and created["nbd_uri"] is None
    assert sorted(replica["node"] for replica in created["replicas"]) == ["node1", "node2", "node3"]
    assert created["membership"] == {"epoch": 0, "version": 0, "in_sync": ["data-r1", "data-r2", "data-r3"]}

    attached = client.attach("data")
    assert attached["state"] == "healthy" and attached["epoch"] == 1
    assert attached["membership"]["epoch"] == 1
    assert attached["nbd_uri"] == f"nbd+unix:///data?socket={cluster.layout.nbd_socket('data')}"
    assert attached["engine"]["pid"] == cluster.engine_pids("data")[0]
    assert os.stat(cluster.layout.nbd_socket("data")).st_mode & 0o777 == 0o600
    assert greeting_of(cluster) == "epoch 1"

    grown = client.resize("data", 2 * GIB)
    assert grown["size_bytes"] == 2 * GIB and {r["size_bytes"] for r in grown["replicas"]} == {2 * GIB}
    with pytest.raises(ShrinkRefused):
        client.resize("data", GIB)

    with pytest.raises(VolumeInUse):
        client.delete_volume("data")
    assert client.detach("data")["state"] == "detached"
    assert not cluster.engine_pids("data") and not cluster.layout.nbd_socket("data").exists()

    assert client.delete_volume("data") == {"gone": True, "volume": None}
    assert not cluster.layout.volume_dir("data").exists()
    with pytest.raises(VolumeNotFound):
        client.volume("data")
    assert client.volumes() == []


def test_repeating_a_request_changes_nothing(cluster: FakeCluster) -> None:
    client = cluster.client
    first = client.create_volume("data", GIB, 3)
    assert client.create_volume("data", GIB, 3)["volume_id"] == first["volume_id"]
    with pytest.raises(VolumeExistsWithOtherSpec, match="size"):
        client.create_volume("data", 2 * GIB, 3)
    with pytest.raises(VolumeExistsWithOtherSpec, match="number of replicas"):
        client.create_volume("data", GIB, 2)
    attached = client.attach("data")
    again = client.attach("data")
    assert again["epoch"] == attached["epoch"] and again["engine"]["pid"] == attached["engine"]["pid"]
    assert client.resize("data", GIB)["size_bytes"] == GIB
    for _ in range(2):
        assert client.detach("data")["state"] == "detached"


def test_a_tcp_listener_keeps_its_port_when_the_engine_is_killed(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    uri = cluster.client.attach("data", tcp=True)["nbd_tcp_uri"]
    host, port = uri.removeprefix("nbd://").removesuffix("/data").split(":")
    kill(cluster.engine_pids("data")[0])
    with socket.create_connection((host, int(port)), timeout=10) as client:
        assert client.recv(100) == b"epoch 2\n"
    assert cluster.client.attach("data", tcp=True)["nbd_tcp_uri"] == uri


def test_a_killed_engine_is_back_in_a_new_epoch_and_waiting_clients_reach_it(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    for epoch in (2, 3):
        pid = cluster.engine_pids("data")[0]
        began = time.monotonic()
        kill(pid)
        assert greeting_of(cluster) == f"epoch {epoch}"  # the connect waited in the backlog
        assert time.monotonic() - began < 2.0
    assert cluster.client.volume("data")["epoch"] == 3


def test_a_killed_daemon_interrupts_nothing_and_the_next_one_adopts(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    before = cluster.all_pids()
    assert len(before) == 4
    cluster.kill_daemon()
    assert cluster.all_pids() == before
    cluster.start()
    assert cluster.all_pids() == before
    assert cluster.client.volume("data")["epoch"] == 1
    assert cluster.client.volume("data")["engine"]["pid"] == cluster.engine_pids("data")[0]
    # The listening socket died with the first daemon and lives on in the engine; after the engine's
    # end a new one stands at the same path.
    kill(cluster.engine_pids("data")[0])
    wait_until(lambda: cluster.client.volume("data")["epoch"] == 2)
    wait_until(lambda: cluster.client.volume("data")["state"] == "healthy")
    assert greeting_of(cluster) == "epoch 2"


def test_engine_and_daemon_killed_together_come_back(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    pid = cluster.engine_pids("data")[0]
    cluster.kill_daemon()
    kill(pid)
    cluster.start()
    assert greeting_of(cluster) == "epoch 2"


def test_a_daemon_that_is_told_to_end_leaves_the_data_plane_running(cluster: FakeCluster) -> None:
    before = cluster.all_pids()
    cluster.kill_daemon(signal.SIGTERM)
    assert cluster.all_pids() == before


def test_shutting_everything_down_leaves_no_process_and_up_serves_again(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    cluster.client.shutdown(everything=True)
    assert cluster.join_daemon() == 0
    assert cluster.all_pids() == []
    assert not cluster.layout.daemon_socket.exists() and not cluster.layout.nbd_socket("data").exists()
    cluster.start()
    assert greeting_of(cluster) == "epoch 2"


def test_a_killed_replica_server_is_started_again_on_its_port(cluster: FakeCluster) -> None:
    before = {node["name"]: node["address"] for node in cluster.client.nodes()}
    pid = cluster.server_pids("node2")[0]
    kill(pid)
    wait_until(lambda: pid not in cluster.server_pids("node2"))
    wait_until(cluster.is_ready)
    assert {node["name"]: node["address"] for node in cluster.client.nodes()} == before


@pytest.mark.parametrize("hard", [False, True])
def test_a_node_that_an_operator_stopped_stays_down_over_a_daemon_restart(
    cluster: FakeCluster, hard: bool
) -> None:
    stopped = cluster.client.stop_node("node2", kill=hard)
    assert stopped["state"] == "stopped"
    assert "dolmen node start node2" in stopped["conditions"][0]["waits_for"]
    cluster.kill_daemon()
    cluster.start()
    assert cluster.server_pids("node2") == []
    assert cluster.client.start_node("node2")["state"] == "up"
    with pytest.raises(NodeNotFound):
        cluster.client.stop_node("node9")


def test_too_few_nodes_is_said_and_no_volume_is_left(cluster: FakeCluster) -> None:
    cluster.client.stop_node("node3")
    with pytest.raises(NotEnoughNodes):
        cluster.client.create_volume("data", GIB, 3)
    assert cluster.client.volumes() == []
    assert len(cluster.client.create_volume("data", GIB, 2)["replicas"]) == 2


def test_a_volume_that_cannot_be_deleted_yet_says_what_it_waits_for(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.stop_node("node3")
    left = cluster.client.delete_volume("data", wait_s=0.3)["volume"]
    assert left["state"] == "deleting"
    assert any(c["reason"] == "node_stopped" and c["who"] == "operator" for c in left["conditions"])
    cluster.client.start_node("node3")
    wait_until(lambda: cluster.client.volumes() == [])


def test_a_growth_goes_on_when_the_node_that_held_it_up_returns(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.stop_node("node3")
    left = cluster.client.resize("data", 2 * GIB, wait_s=0.3)
    assert left["size_bytes"] == GIB and left["wanted_size_bytes"] == 2 * GIB
    assert {condition["reason"] for condition in left["conditions"]} >= {"replica_growing", "node_stopped"}
    cluster.client.start_node("node3")
    wait_until(lambda: cluster.client.volume("data")["size_bytes"] == 2 * GIB)
    wait_until(lambda: cluster.client.volume("data")["conditions"] == [])


def test_an_engine_that_keeps_dying_is_said_with_its_log(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.layout.volume_dir("data").mkdir(parents=True, exist_ok=True)
    (cluster.layout.volume_dir("data") / "crash").touch()
    assert cluster.client.attach("data", wait_s=0.1)["state"] == "attaching"

    def is_said() -> bool:
        reasons = [condition["waits_for"] for condition in cluster.client.volume("data")["conditions"]]
        return any("exit code 9" in reason and "engine.log" in reason for reason in reasons)

    wait_until(is_said, what="the reason")
    (cluster.layout.volume_dir("data") / "crash").unlink()
    assert cluster.client.attach("data")["state"] == "healthy"


def test_a_detach_wanted_while_the_daemon_was_dead_half_way_is_finished(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    os.kill(cluster.engine_pids("data")[0], signal.SIGSTOP)  # the engine cannot answer the detach
    assert cluster.client.detach("data", wait_s=0.2)["state"] == "detaching"
    cluster.kill_daemon()
    os.kill(cluster.engine_pids("data")[0], signal.SIGCONT)
    cluster.start(wait=False)
    wait_until(lambda: accepts(cluster.layout.daemon_socket))
    wait_until(lambda: cluster.client.volume("data")["state"] == "detached")
    assert not cluster.engine_pids("data")


def test_a_detach_that_cannot_end_is_forced(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    (cluster.layout.volume_dir("data") / "mute").touch()  # as if it waited for replicas for ever
    assert cluster.client.detach("data", wait_s=0.2)["state"] == "detaching"
    assert cluster.client.detach("data", force=True)["state"] == "detached"
    assert not cluster.engine_pids("data")


def test_a_detach_waits_for_replicas_says_so_and_ends_by_itself_when_they_are_back(
    cluster: FakeCluster,
) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    state = cluster.layout.volume_dir("data") / "state"
    state.write_text("waiting")
    cluster.client.stop_node("node2")
    view = cluster.client.detach("data")  # returns as soon as it is known
    assert view["state"] == "detaching" and cluster.engine_pids("data")
    said = next(c for c in view["conditions"] if c["reason"] == "detach_waiting")
    assert said["who"] == "operator" and "replica data-r2 on node2" in said["waits_for"]
    assert "`dolmen node start node2`" in said["waits_for"] and "--force" in said["waits_for"]
    state.unlink()
    cluster.client.start_node("node2")
    wait_until(lambda: cluster.client.volume("data")["state"] == "detached")


def test_a_forced_detach_does_not_wait_for_replicas(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    (cluster.layout.volume_dir("data") / "state").write_text("waiting")
    assert cluster.client.detach("data")["state"] == "detaching"
    assert cluster.client.detach("data", force=True)["state"] == "detached"


def test_a_stopped_node_is_the_reason_why_a_volume_is_not_redundant(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.stop_node("node2")
    (condition,) = cluster.client.volume("data")["conditions"]
    assert condition["reason"] == "node_stopped" and condition["who"] == "operator" and condition["since"]
    assert "data-r2" in condition["waits_for"] and "dolmen node start node2" in condition["waits_for"]


def granted(cluster: FakeCluster) -> dict[str, object]:
    return dict(json.loads(cluster.layout.engine_config("data").read_text()))


def test_an_epoch_that_was_never_granted_is_passed_and_makes_the_state_store_distrusted(
    cluster: FakeCluster,
) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    assert granted(cluster)["epoch"] == 1 and "distrust_store" not in granted(cluster)
    cluster.client.detach("data")
    fill_in(cluster, "node2", epoch=8)
    assert cluster.client.attach("data")["epoch"] == 9
    assert granted(cluster)["distrust_store"] is True and granted(cluster)["predecessor_ended"] is True
    cluster.client.detach("data")
    cluster.client.attach("data")  # a record of epoch 9 was stored
    assert granted(cluster)["epoch"] == 10 and "distrust_store" not in granted(cluster)


def test_a_newest_engine_that_is_fenced_makes_the_state_store_distrusted(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.layout.volume_dir("data").mkdir(parents=True, exist_ok=True)
    (cluster.layout.volume_dir("data") / "fenced").touch()
    assert cluster.client.attach("data")["epoch"] == 2
    assert granted(cluster)["distrust_store"] is True


@pytest.mark.parametrize("killed", [False, True])
def test_an_operator_s_decision_reaches_the_next_engine_whatever_became_of_the_daemon(
    cluster: FakeCluster, killed: bool
) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    (cluster.layout.volume_dir("data") / "waits").write_text("data-r1")
    (cluster.layout.volume_dir("data") / "state").write_text("waiting")
    record = {"epoch": 1, "version": 1, "in_sync": ["data-r1", "data-r2", "data-r3"]}
    for node in ("node2", "node3"):
        fill_in(cluster, node, epoch=1, record=record, synced_at=[1, 1])
    old = cluster.engine_pids("data")
    found = cluster.client.recovery("data")
    choice = next(c for c in found["choices"] if c["members"] == ["data-r3"])
    before = cluster.client.volume("data")
    checked = cluster.client.recover("data", ["data-r3"], choice["confirm"], dry_run=True)
    assert checked["epoch"] == before["epoch"] and cluster.engine_pids("data") == old
    if killed:
        cluster.client.recover("data", ["data-r3"], choice["confirm"], dry_run=False, wait_s=0)
        cluster.kill_daemon()  # the decision is written; whether the engine was ended is chance
        cluster.start(wait=False)
        wait_until(lambda: accepts(cluster.layout.daemon_socket))
    else:
        cluster.client.recover("data", ["data-r3"], choice["confirm"], dry_run=False)
    wait_until(lambda: cluster.client.volume("data")["state"] == "healthy")
    assert granted(cluster)["override"] == {"members": ["data-r3"], "newest": [1, 1]}
    assert granted(cluster)["epoch"] == 3 and cluster.engine_pids("data") != old


def fill_in(cluster: FakeCluster, node: str, **facts: object) -> None:
    """What a stand-in says of its replicas from its next start on."""
    cluster.client.stop_node(node)
    disk = cluster.layout.disk_dir(node) / "fake.json"
    volumes = json.loads(disk.read_text())
    for volume in volumes.values():
        volume.update(facts)
    disk.write_text(json.dumps(volumes))
    cluster.client.start_node(node)


def test_a_verification_compares_in_sync_replicas_and_names_a_different_one(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)

    def finished() -> dict[str, object]:
        job = cluster.client.verify("data")["id"]
        wait_until(lambda: cluster.client.job(job)["state"] != "running")
        return cluster.client.job(job)["result"]  # type: ignore[no-any-return]

    assert finished()["verdict"] == "same"
    (cluster.layout.disk_dir("node2") / "odd").touch()
    result = finished()
    assert result["verdict"] == "different" and result["regions_different_count"] == 256
    (cluster.layout.disk_dir("node2") / "odd").unlink()
    cluster.client.stop_node("node2")
    assert finished()["verdict"] == "incomplete"


def test_a_second_daemon_in_the_same_directory_ends_at_once(cluster: FakeCluster) -> None:
    other = FakeCluster(cluster.layout.dir)
    other.start(wait=False)
    assert other.join_daemon() == 5
    assert is_alive(cluster.daemon_pid)


def test_bad_requests_are_refused_with_the_reason(cluster: FakeCluster) -> None:
    for body, reason in (
        ({"name": "Data", "size_bytes": GIB}, "lower-case"),
        ({"name": "data", "size_bytes": 5000}, "smallest"),
        ({"name": "data", "size_bytes": GIB + 1}, "multiple"),
        ({"name": "data", "size_bytes": str(GIB)}, "integer"),
        ({"name": "data", "size_bytes": GIB, "replica_count": 9}, "less than or equal to 5"),
        ({"name": "data", "size_bytes": GIB, "colour": "red"}, "colour"),
        ({}, "name"),
        ([], "object"),
    ):
        with pytest.raises(BadRequest, match=reason):
            cluster.client.call("POST", "/v1/volumes", body)
    assert cluster.client.volumes() == []


def test_metrics_of_a_running_cluster_have_every_piece(cluster: FakeCluster) -> None:
    cluster.client.create_volume("data", GIB, 3)
    cluster.client.attach("data")
    text = cluster.client.text("/metrics")
    for line in (
        'dolmen_node_up{node="node2"} 1.0',
        'dolmen_volume_state{state="healthy",volume="data"} 1.0',
        'dolmen_engine_requests_total{kind="read",volume="data"} 5.0',
        'dolmen_engine_latency_seconds_bucket{kind="read",le="+Inf",volume="data"} 3.0',
        'dolmen_engine_replica_latency_seconds_total{replica="data-r1",volume="data"} 2.0',
        'dolmen_replica_writes_total{node="node3",replica="data-r3",volume="data"} 2.0',
    ):
        assert line in text, line
    assert 'dolmen_process_resident_memory_bytes{name="data",piece="engine"}' in text
