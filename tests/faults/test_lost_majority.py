"""Below a majority of replicas, a membership record counts only once the state store holds it."""

from __future__ import annotations

from tests.faults.incident import Incident
from tests.support.nbd_clients import ReconnectingClient


def test_with_two_replicas_lost_writes_go_on_with_what_the_state_store_recorded(incident: Incident) -> None:
    first, second, third = incident.replica_ids
    with ReconnectingClient(incident.uri) as client:
        for lost in (first, second):
            incident.kill_and_keep_down(lost)
            client.write(0, lost.encode())
        # The write above was acknowledged by one replica: by then the store had to name it alone.
        assert incident.stored_record()["in_sync"] == [third]
        assert incident.show()["state"] == "degraded"
        client.flush()
        assert client.read(0, len(second)) == second.encode()
        for lost in (first, second):
            incident.start(lost)
        incident.check_healthy_and_equal()
        assert client.reconnect_count == 0


def test_a_second_loss_without_the_state_store_makes_writes_wait_not_fail(incident: Incident) -> None:
    first, second, third = incident.replica_ids
    pids = incident.dolmen.replica_pids(incident.name)
    with incident.load(seed=11) as workload:
        incident.dolmen.kill_daemon()
        incident.kill(pids[first])
        workload.wait_for_answers(500)  # the first loss needs no state store
        status = incident.engine("engine.status")
        assert status["state"] == "degraded"
        assert sorted(status["membership"]["in_sync"]) == [second, third]

        incident.kill(pids[second])
        incident.wait_for("the engine waiting", lambda: incident.engine_state() == "waiting")
        waiting = incident.engine("engine.status")
        assert any("store" in cause for cause in waiting["waiting_for"]), waiting["waiting_for"]
        assert sorted(waiting["membership"]["in_sync"]) == [second, third], "nothing is committed"

        incident.dolmen.up()
        workload.wait_for_answers(500)
    incident.check_healthy_and_equal()
