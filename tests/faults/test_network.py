"""The network between engine and replicas drops, resets and flaps: a pause, never an error or an old byte."""

from __future__ import annotations

import pytest

from bench.network import Direction
from tests.faults.incident import Incident
from tests.support.nbd_clients import ReconnectingClient

STALL_S_MAX = {"silence": 1.5, "reset": 0.25}
"""Goals for the longest request. Asserted with the slack of a machine that is busy with other tests."""

SLACK = 4.0
BASE_S = 0.5


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.value)
def test_a_replica_that_vanishes_without_a_word_costs_a_stall_and_comes_back(
    networked: Incident, direction: Direction
) -> None:
    victim = networked.replica_ids[1]
    port = networked.port_of(victim)
    with networked.load(seed=51) as workload:
        networked.network.drop(port, direction)
        workload.wait_for_answers(500)  # more than what was under way: the loss is behind us
        assert victim not in networked.engine("engine.status")["membership"]["in_sync"]
        print(f"the slowest answer took {workload.latency_max_s:.2f} s")
        assert workload.latency_max_s < STALL_S_MAX["silence"] * SLACK
        networked.network.heal()
        networked.dolmen.wait_for_state(networked.name, "healthy")
    networked.check_healthy_soon()


def test_a_replica_whose_connections_are_reset_is_left_out_at_once_and_comes_back(
    networked: Incident,
) -> None:
    victim = networked.replica_ids[2]
    with networked.load(seed=52) as workload:
        networked.network.reset(networked.port_of(victim))
        workload.wait_for_answers(500)
        assert victim not in networked.engine("engine.status")["membership"]["in_sync"]
        print(f"the slowest answer took {workload.latency_max_s:.2f} s")
        assert workload.latency_max_s < STALL_S_MAX["reset"] * SLACK + BASE_S
        networked.network.heal()
    networked.check_healthy_soon()


@pytest.mark.parametrize("how", ["silence", "reset"])
def test_a_link_that_flaps_ends_in_a_healthy_volume(networked: Incident, how: str) -> None:
    victim = networked.replica_ids[0]
    network, port = networked.network, networked.port_of(victim)
    with networked.load(seed=53) as workload:
        for _ in range(4):
            if how == "reset":
                network.reset(port)
            else:
                network.drop(port)
            workload.wait_for_answers(200)
            network.heal()
            workload.wait_for_answers(200)
        networked.check_healthy_soon()


def test_packets_lost_at_random_cost_time_and_nothing_else(networked: Incident) -> None:
    victim = networked.replica_ids[1]
    with networked.load(seed=54) as workload:
        networked.network.lose(networked.port_of(victim), percent=5)
        workload.wait_for_answers(300)
        networked.network.heal()
    networked.check_healthy_soon()


def test_an_engine_cut_off_from_all_replicas_waits_and_goes_on(networked: Incident) -> None:
    ports = [networked.port_of(replica) for replica in networked.replica_ids]
    with networked.load(seed=55) as workload:
        for port in ports:
            networked.network.drop(port)
        networked.wait_for_waiting(workload)
        networked.network.heal()
        workload.wait_for_answers(300)
    networked.check_healthy_soon()


def test_an_engine_cut_off_from_two_of_three_goes_on_with_what_the_store_recorded(
    networked: Incident,
) -> None:
    first, second, third = networked.replica_ids
    with ReconnectingClient(networked.uri) as client:
        for replica in (first, second):
            networked.network.drop(networked.port_of(replica))
        client.write(0, b"one copy")
        assert networked.stored_record()["in_sync"] == [third]
        assert client.read(0, 8) == b"one copy"
        networked.network.heal()
        assert client.reconnect_count == 0
    networked.check_healthy_soon()
