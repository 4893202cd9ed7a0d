"""Replica servers die or stand still under load: clients see no error, the record tells the truth."""

from __future__ import annotations

import os
import signal
import time

from tests.faults.incident import Incident

STALL_S_MAX = 1.5
"""The goal for the longest request at a silent loss. Asserted with the slack of a busy machine."""

SLACK = 4.0


def test_a_replica_server_killed_under_load_is_left_out_and_brought_back(incident: Incident) -> None:
    first, second, third = incident.replica_ids
    with incident.load(seed=1) as workload:
        incident.kill_and_keep_down(second)
        degraded = incident.wait_until_left_out(second)
        assert degraded["state"] == "degraded"
        assert degraded["membership"]["in_sync"] == [first, third]
        (lost,) = [replica for replica in degraded["replicas"] if replica["id"] == second]
        assert lost["state"] == "offline" and lost["reason"]
        workload.wait_for_answers(500)
        incident.start(second)
        incident.dolmen.wait_for_state(incident.name, "healthy")
        assert incident.in_sync() == {first, second, third}
    incident.check_healthy_and_equal()


def test_a_replica_server_that_stands_still_is_dropped_after_a_second(incident: Incident) -> None:
    _, _, victim = incident.replica_ids
    pid = incident.pid_of(victim)
    with incident.load(seed=2) as workload:
        started = time.monotonic()
        incident.freeze(pid)
        workload.wait_for_answers(500)  # more than what was under way: the loss is behind us
        took_s = time.monotonic() - started
        assert victim not in incident.engine("engine.status")["membership"]["in_sync"]
        assert workload.latency_max_s < STALL_S_MAX * SLACK
        incident.thaw(pid)
        incident.dolmen.wait_for_state(incident.name, "healthy")
    print(f"500 answers over the stall took {took_s:.2f} s, the slowest {workload.latency_max_s:.2f} s")
    incident.check_healthy_and_equal()


def test_with_every_replica_server_killed_requests_wait_and_then_go_on(incident: Incident) -> None:
    daemon = incident.dolmen.daemon_pid()
    with incident.load(seed=3) as workload:
        pids = list(incident.dolmen.replica_pids(incident.name).values())
        incident.freeze(daemon)  # it would start them again at once
        incident.kill(*pids)
        incident.wait_for_waiting(workload)
        incident.thaw(daemon)
        workload.wait_for_answers(500)
    incident.check_healthy_and_equal()


def test_writes_that_reached_only_some_replicas_when_the_engine_died_are_made_equal(
    incident: Incident,
) -> None:
    _, _, behind = incident.replica_ids
    pid = incident.pid_of(behind)
    for round_number in range(2):
        with incident.load(seed=40 + round_number, reconnects=True) as workload:
            incident.freeze(pid)
            # Both workers' queues fill with writes that two replicas have applied and the third has not.
            incident.wait_for("writes at the other replicas only", lambda: _behind(incident, behind))
            incident.dolmen.kill_engine(incident.name)
            incident.thaw(pid)
            workload.wait_for_answers(300)
        # The load's end has read every block once; what was read is what stays.
        incident.check_healthy_and_equal()


def _behind(incident: Incident, replica: str) -> bool:
    slots = {entry["id"]: entry["slot"] for entry in incident.engine("engine.status")["replicas"]}
    in_flight = [slot["in_flight"] for slot in incident.engine("engine.stats")["slots"]]
    others = [count for slot, count in enumerate(in_flight) if slot != slots[replica]]
    return in_flight[slots[replica]] > 4 and not any(others)


def test_everything_killed_at_once_under_load_loses_nothing(incident: Incident) -> None:
    with incident.load(seed=5, reconnects=True) as workload:
        pids = list(incident.dolmen.replica_pids(incident.name).values())
        for pid in [incident.dolmen.daemon_pid(), incident.dolmen.engine_pid(incident.name), *pids]:
            os.kill(pid, signal.SIGKILL)
        incident.dolmen.up()
        workload.wait_for_answers(500)
    incident.check_healthy_and_equal()
