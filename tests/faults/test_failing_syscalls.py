"""A replica server dies at, or is refused, its N-th write, sync or rename: clients see nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.incident import Incident
from tests.support.injection import injected
from tests.support.linearizability import BLOCK_BYTES
from tests.support.nbd_clients import ReconnectingClient
from tests.support.processes import is_alive

MIB = 1024 * 1024
REGION_BYTES = 4 * MIB

KILLED_AT = [
    "pwrite64:1",
    "pwrite64:2",
    "pwrite64:3",
    "pwrite64:12",
    "fdatasync:1",
    "fdatasync:2",
    "fdatasync:4",
]


def write_everywhere(client: ReconnectingClient, fill: int) -> None:
    """Fresh regions, blocks written before, parts of blocks, zeroes; then a flush."""
    for number in range(4):
        at = (fill * 4 + number) % 16 * REGION_BYTES + 2 * MIB  # the load is at the beginning
        client.write(at, bytes([fill + 1]) * (2 * BLOCK_BYTES))
        client.write(at + 100, bytes([fill + 2]) * 700)
        client.zero(at + BLOCK_BYTES, 512)
    client.flush()


def test_a_replica_server_that_dies_at_its_nth_call_comes_back_and_nobody_notices(
    incident: Incident, tmp_path: Path
) -> None:
    with ReconnectingClient(incident.uri) as client, incident.load(seed=81):
        for index, where in enumerate(KILLED_AT):
            # In turn: a server that keeps dying is started again more and more slowly.
            victim = incident.replica_ids[index % 3]
            call, _, when = where.partition(":")
            pid = incident.pid_of(victim)
            with injected(pid, f"{call}:signal=KILL:when={when}", log=tmp_path / str(index)):
                for fill in range(100):
                    write_everywhere(client, fill)
                    if not is_alive(pid):
                        break
                assert not is_alive(pid), f"{where} was never reached"
            incident.wait_for_another_server(victim, pid)
            incident.dolmen.wait_for_state(incident.name, "healthy")
        assert client.reconnect_count == 0
    incident.check_healthy_and_equal()


def test_a_replica_server_that_dies_while_it_makes_a_record_durable_costs_nothing_acknowledged(
    incident: Incident, tmp_path: Path
) -> None:
    first, victim, _ = incident.replica_ids
    for call in ("rename", "fsync"):
        pid = incident.pid_of(victim)
        with (
            incident.load(seed=82) as workload,
            injected(pid, f"{call}:signal=KILL:when=1", log=tmp_path / call),
        ):
            incident.kill(incident.pid_of(first))  # the record without it is persisted at the others
            incident.wait_for("the death", lambda: not is_alive(pid))  # noqa: B023
            workload.wait_for_answers(300)
        incident.dolmen.wait_for_state(incident.name, "healthy")
    incident.check_healthy_and_equal()


REFUSED = {
    "writes with EIO": "pwrite64:error=EIO:when=3+5",
    "writes with ENOSPC": "pwrite64:error=ENOSPC:when=3+5",
    "writes that write nothing": "pwrite64:retval=0:when=3+5",
    "syncs with EIO": "fdatasync:error=EIO:when=2+3",
    "reads with EIO": "pread64:error=EIO:when=1+2",
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_disk_that_refuses_calls_costs_a_replica_and_never_a_request(
    incident: Incident, tmp_path: Path, what: str
) -> None:
    victim = incident.replica_ids[1]
    with ReconnectingClient(incident.uri) as client, incident.load(seed=83) as workload:
        with injected(incident.pid_of(victim), REFUSED[what], log=tmp_path / "strace") as tracer:
            incident.wait_for("a refusal", lambda: _refused(incident, client, tracer.log))
            workload.wait_for_answers(200)
        assert client.reconnect_count == 0
        incident.dolmen.wait_for_state(incident.name, "healthy")
    incident.check_healthy_soon()


def _refused(incident: Incident, client: ReconnectingClient, log: Path) -> bool:
    write_everywhere(client, 7)
    client.read(0, 4 * MIB)
    return "(INJECTED)" in log.read_text()
