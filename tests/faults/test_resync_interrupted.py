"""A replica that was away is brought up to date while source and target of the copying are killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.incident import Incident
from tests.support.nbd_clients import ReconnectingClient
from tests.support.processes import kill

MIB = 1024 * 1024
MISSED_BYTES = 48 * MIB
OFFSET = 8 * MIB


def resyncing(incident: Incident, replica: str) -> bool:
    found = next(entry for entry in incident.engine("engine.status")["replicas"] if entry["id"] == replica)
    return found["state"] == "resyncing" and (found["resync"] or {}).get("regions_total", 0) > 0


@pytest.fixture
def behind(incident: Incident) -> Iterator[str]:
    """A replica that missed MISSED_BYTES; its server is down."""
    victim = incident.replica_ids[0]
    incident.stop_cleanly(victim)
    with ReconnectingClient(incident.uri) as client:
        for at in range(0, MISSED_BYTES, 4 * MIB):
            client.write(OFFSET + at, bytes([at // MIB + 1]) * (4 * MIB))
    yield victim


@pytest.mark.parametrize("whom", ["target", "sources", "engine"])
def test_a_resync_whose_part_is_killed_goes_on_and_ends_equal(
    incident: Incident, behind: str, whom: str
) -> None:
    with incident.load(seed=95, reconnects=whom == "engine") as workload:
        incident.start(behind)
        incident.wait_for("the resync", lambda: resyncing(incident, behind))
        if whom == "target":
            kill(incident.pid_of(behind))
        elif whom == "engine":
            incident.dolmen.kill_engine(incident.name)
        else:
            for replica in incident.replica_ids[1:]:  # one after the other: whichever is copied from
                pid = incident.pid_of(replica)
                kill(pid)
                incident.wait_for_another_server(replica, pid)
        workload.wait_for_answers(300)
        incident.dolmen.wait_for_state(incident.name, "healthy")
    incident.check_healthy_and_equal()
    with ReconnectingClient(incident.uri) as client:
        for at in range(0, MISSED_BYTES, 4 * MIB):
            assert client.read(OFFSET + at, 4 * MIB) == bytes([at // MIB + 1]) * (4 * MIB)
