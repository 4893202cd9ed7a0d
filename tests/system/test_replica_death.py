"""Replica servers are killed, stopped and starved under load; the client never sees it."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.linearizability import assert_linearizable
from tests.support.nbd_clients import ReconnectingClient, Workload
from tests.system.conftest import Volume

BLOCKS = range(48)

STALL_S_MAX = {signal.SIGKILL: 0.25, signal.SIGSTOP: 1.5}
"""Goals for the longest wait of any request. Asserted with the slack of a machine under test load."""

SLACK = 4.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_does_not_notice_the_loss_of_a_replica(volume: Volume, number: signal.Signals) -> None:
    version = volume.dolmen.show(volume.name)["membership"]["version"]
    victim, pid = sorted(volume.dolmen.replica_pids(volume.name).items())[1]
    try:
        with Workload(volume.uri, blocks=BLOCKS, seed=31) as workload:
            workload.wait_for_answers(500)
            os.kill(pid, number)
            workload.wait_for_answers(2000)
            during = volume.dolmen.wait_for_state(volume.name, "degraded", "healthy")
            workload.wait_for_answers(500)
    finally:
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    assert workload.errors == []
    assert workload.reconnect_count == 0
    assert_linearizable(workload.history)
    assert during["membership"]["version"] > version, "the loss is recorded"
    assert workload.latency_max_s < STALL_S_MAX[number] * SLACK + 0.5
    after = volume.dolmen.wait_for_state(volume.name, "healthy")
    assert victim in after["membership"]["in_sync"]
    volume.dolmen.verify(volume.name)


def test_replicas_killed_one_after_the_other_under_load(volume: Volume) -> None:
    with Workload(volume.uri, blocks=BLOCKS, seed=32) as workload:
        for replica in sorted(volume.dolmen.replica_pids(volume.name)):
            workload.wait_for_answers(300)
            volume.dolmen.kill_replica(volume.name, replica)
            workload.wait_for_answers(300)
            volume.dolmen.wait_for_state(volume.name, "healthy")
    assert workload.errors == []
    assert_linearizable(workload.history)
    volume.dolmen.verify(volume.name)


def test_with_all_replicas_killed_requests_wait_and_then_go_on(volume: Volume) -> None:
    with Workload(volume.uri, blocks=BLOCKS, seed=33) as workload:
        workload.wait_for_answers(300)
        for pid in volume.dolmen.replica_pids(volume.name).values():
            os.kill(pid, signal.SIGKILL)
        workload.wait_for_answers(300)
    assert workload.errors == []
    assert_linearizable(workload.history)
    volume.dolmen.wait_for_state(volume.name, "healthy")
    volume.dolmen.verify(volume.name)


def test_everything_killed_at_once_loses_nothing(volume: Volume) -> None:
    with Workload(volume.uri, blocks=BLOCKS, seed=34) as workload:
        for _ in range(2):
            workload.wait_for_answers(500)
            pids = list(volume.dolmen.replica_pids(volume.name).values())
            for pid in [volume.dolmen.engine_pid(volume.name), *pids]:
                os.kill(pid, signal.SIGKILL)
            workload.wait_for_answers(500)
    assert workload.errors == []
    assert_linearizable(workload.history)
    volume.dolmen.wait_for_state(volume.name, "healthy")
    volume.dolmen.verify(volume.name)


def test_what_was_written_meanwhile_is_on_the_replica_that_returned(volume: Volume) -> None:
    _, stopped = sorted(volume.dolmen.replica_pids(volume.name).items())[2]
    with ReconnectingClient(volume.uri) as client:
        client.write(0, b"a" * 1_000_000)
        os.kill(stopped, signal.SIGSTOP)
        try:
            client.write(500_000, b"b" * 1_000_000)
            client.flush()
        finally:
            os.kill(stopped, signal.SIGCONT)
        volume.dolmen.wait_for_state(volume.name, "healthy")
        volume.dolmen.verify(volume.name)
        # The other two die: the one that was away serves alone, if only for a moment.
        for _, pid in sorted(volume.dolmen.replica_pids(volume.name).items())[:2]:
            os.kill(pid, signal.SIGKILL)
        assert client.read(0, 1_500_000) == b"a" * 500_000 + b"b" * 1_000_000
    volume.dolmen.wait_for_state(volume.name, "healthy")
