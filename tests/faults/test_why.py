"""Real faults, and the first line of ``dolmen why``: it names what was done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.why import lines_of
from control.layout import Layout
from tests.faults.conftest import prepared
from tests.faults.incident import Incident
from tests.faults.test_full_disk import DISK_BYTES, disk_of, make_room
from tests.support.cluster import cluster
from tests.support.nbd_clients import ReconnectingClient
from tests.support.processes import is_alive, kill, wait_until
from tests.support.tmpfs import free_bytes


def first_line(incident: Incident, name: str = "") -> str:
    answer = incident.client.why(name or incident.name)
    assert answer["healthy"] == (not answer["findings"])
    return lines_of(answer["findings"])[0] if answer["findings"] else "healthy"


def wait_for_line(incident: Incident, *words: str, name: str = "") -> str:
    last = ""

    def said() -> bool:
        nonlocal last
        last = first_line(incident, name)
        return all(word in last for word in words)

    try:
        wait_until(said, what=f"{words} in the first line")
    except TimeoutError as error:
        raise TimeoutError(f"{error}; last: {last}") from None
    return last


def wait_for_health(incident: Incident) -> None:
    incident.dolmen.wait_for_state(incident.name, "healthy")
    wait_for_line(incident, "healthy")


def test_a_healthy_volume_says_so_in_one_line_and_exits_0(incident: Incident) -> None:
    done = incident.dolmen.dolmen("why", incident.name)
    assert done.stdout == f"{incident.name}: healthy\n"
    unknown = incident.dolmen.dolmen("why", "nobody", check=False)
    assert unknown.returncode == 1 and "nobody" in unknown.stdout


def test_a_node_that_an_operator_stopped(incident: Incident) -> None:
    victim = incident.replica_ids[1]
    node = incident.node_of(victim)
    incident.stop_cleanly(victim)
    for name in (incident.name, victim, node):
        done = incident.dolmen.dolmen("why", name, check=False)
        assert done.returncode == 6
        first, following = done.stdout.splitlines()[:2]
        assert first.startswith(f"{node} was stopped by an operator (since ")
        assert following == f"next: `dolmen node start {node}`"
    assert f"-> replica {victim} on {node}" in done.stdout or f"replica {victim}" in done.stdout
    incident.start(victim)
    wait_for_health(incident)


def test_a_replica_server_that_is_stopped_by_a_signal(incident: Incident) -> None:
    victim = incident.replica_ids[0]
    pid = incident.pid_of(victim)
    incident.freeze(pid)
    line = wait_for_line(incident, f"{incident.node_of(victim)}'s replica server (pid {pid}) is stopped by")
    assert "SIGSTOP" in line
    incident.thaw(pid)
    wait_for_health(incident)


def test_a_replica_server_that_was_killed_and_cannot_start(incident: Incident) -> None:
    """Its disk's mount is gone: it ends at each start, and says why."""
    victim = incident.replica_ids[2]
    node = incident.node_of(victim)
    disk = Layout(incident.dolmen.dir).disk_dir(node)
    incident.stop_cleanly(victim)
    disk.rename(disk.with_name("unmounted"))
    incident.client.call("POST", f"/v1/nodes/{node}/start", {}, wait_s=0.1)
    wait_for_line(incident, f"{node}'s replica server", "exit code 1")
    wait_for_line(incident, "ends each time", "expected disk")
    incident.stop_cleanly(victim)
    shutil.rmtree(disk)
    disk.with_name("unmounted").rename(disk)
    incident.start(victim)
    wait_for_health(incident)


def test_an_engine_that_is_stopped_by_a_signal(incident: Incident) -> None:
    pid = incident.dolmen.engine_pid(incident.name)
    incident.freeze(pid)
    line = wait_for_line(incident, f"the engine of {incident.name} (pid {pid}) is stopped by a signal")
    assert "the daemon ends it and starts another" in line
    incident.thaw(pid)
    wait_for_health(incident)


def test_an_engine_that_keeps_being_killed(incident: Incident) -> None:
    pid = 0
    for _ in range(3):
        pid = incident.dolmen.wait_for_engine(incident.name, other_than=pid)
        kill(pid)
        wait_until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]
    wait_for_line(incident, f"the engine of {incident.name} keeps ending (killed by signal 9, 3 times")
    incident.dolmen.wait_for_state(incident.name, "healthy")


def test_a_replica_whose_identity_is_damaged(incident: Incident) -> None:
    victim = incident.replica_ids[1]
    meta = incident.directory_of(victim) / "replica.meta"
    incident.stop_cleanly(victim)
    raw = bytearray(meta.read_bytes())
    raw[40] ^= 1
    meta.write_bytes(raw)
    incident.start(victim)
    wait_for_line(incident, f"replica {victim} on", "is damaged and cannot be opened: replica.meta")
    said = incident.client.why(victim)["findings"][0]
    assert said["command"] == f"`dolmen replica rebuild {incident.name} {victim}`"
    incident.dolmen.dolmen("replica", "rebuild", incident.name, victim)
    wait_for_health(incident)


def test_a_majority_that_is_lost_is_named_with_what_it_holds_up(incident: Incident) -> None:
    first, second, third = incident.replica_ids
    # One after the other, each left out before the next dies: then the first alone is waited for.
    for replica in (third, second):
        incident.kill_and_keep_down(replica)
        incident.wait_until_left_out(replica)
    incident.kill_and_keep_down(first)
    incident.start(third)
    node = incident.node_of(first)
    wait_for_line(incident, f"{node} was stopped by an operator")
    wait_until(lambda: incident.show()["state"] == "waiting")
    findings = incident.client.why(incident.name)["findings"]
    waiting = [f for f in findings if f["reason"] == "volume_waiting"]
    assert waiting and f"dolmen volume recover {incident.name}" in waiting[0]["command"]
    for replica in (first, second):
        incident.start(replica)
    wait_for_health(incident)


def test_a_daemon_that_is_gone_or_stopped(incident: Incident) -> None:
    pid = incident.dolmen.daemon_pid()
    incident.freeze(pid)
    # A process that was just told to stop may still run for a moment: then it is silent first.
    wait_until(lambda: incident.client.why_no_daemon()["reason"] == "daemon_frozen")
    assert incident.client.why_no_daemon()["command"] == f"`kill -CONT {pid}`"
    incident.thaw(pid)
    incident.dolmen.kill_daemon()
    done = incident.dolmen.dolmen("why", incident.name, check=False)
    assert done.returncode == 3 and done.stdout.startswith("the daemon of ") and "not running" in done.stdout
    assert "dolmen up" in done.stdout
    incident.dolmen.up()
    wait_for_health(incident)


def test_an_older_copy_of_the_state_store(incident: Incident) -> None:
    state = Path(incident.dolmen.dir) / "state.db"
    incident.dolmen.kill_daemon()
    yesterday = {path.name: path.read_bytes() for path in state.parent.glob("state.db*")}
    incident.dolmen.up()
    victim = incident.replica_ids[0]
    incident.kill_and_keep_down(victim)  # a record is stored, which the copy does not know
    incident.wait_until_left_out(victim)
    incident.start(victim)
    wait_for_health(incident)
    incident.dolmen.kill_daemon()
    for path in state.parent.glob("state.db*"):
        path.unlink()
    for name, content in yesterday.items():
        (state.parent / name).write_bytes(content)
    incident.dolmen.up()
    wait_for_line(incident, f"may have missed records of volume {incident.name}: an older copy")
    with ReconnectingClient(incident.uri) as client:
        client.write(0, b"x" * 4096)  # it is served as before
    incident.client.detach(incident.name)
    incident.client.attach(incident.name)  # every replica is there: it is trusted after this
    wait_for_health(incident)


def test_a_network_that_drops_all_packets_of_a_replica(networked: Incident) -> None:
    victim = networked.replica_ids[1]
    networked.network.drop(networked.port_of(victim))
    with ReconnectingClient(networked.uri) as client:
        client.write(0, b"x" * 4096)
    line = wait_for_line(networked, f"{networked.node_of(victim)}'s replica server", "does not answer")
    assert "the network to it is cut" in line
    networked.network.heal()
    wait_for_health(networked)


@pytest.fixture
def small_disks() -> Iterator[Incident]:
    with cluster(disk_bytes=dict.fromkeys(("node1", "node2", "node3"), DISK_BYTES)) as dolmen:
        yield from prepared(dolmen)


def test_a_disk_that_is_full(small_disks: Incident) -> None:
    incident, victim = small_disks, small_disks.replica_ids[1]
    disk = disk_of(incident, victim)
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(disk) - 4096)
    wait_for_line(incident, f"{incident.node_of(victim)}'s disk is full")
    make_room(disk)
    wait_for_health(incident)
