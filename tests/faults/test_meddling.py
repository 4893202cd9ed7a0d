"""Somebody between the engine and a replica: late, stuck, damaged, cut, repeated and old messages.

No client sees an error, no read returns what was not written, and when it is over the volume is healthy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

from protocol.frames import HEADER_BYTES, REPLY, Kind
from tests.faults.incident import Incident
from tests.support.fault_proxy import CloseConnection, FaultProxy, Tamper, Unit, flipped, once
from tests.support.nbd_clients import ReconnectingClient

MIB = 1024 * 1024


def is_request(kind: Kind) -> Callable[[Unit], bool]:
    return lambda unit: unit.is_frame and unit.to_server and unit.kind == kind


def is_reply(kind: Kind) -> Callable[[Unit], bool]:
    return lambda unit: unit.is_frame and not unit.to_server and unit.kind == kind | REPLY


def has_payload(matches: Callable[[Unit], bool]) -> Callable[[Unit], bool]:
    return lambda unit: matches(unit) and len(unit.raw) > HEADER_BYTES + 4096


def struck(proxy: FaultProxy, tamper: Tamper) -> Callable[[], bool]:
    """Set it, counted: whether it has changed anything yet."""
    changed: list[int] = []

    def counted(unit: Unit) -> list[bytes]:
        try:
            made = tamper(unit)
        except CloseConnection:
            changed.append(unit.connection)
            raise
        if made != [unit.raw]:
            changed.append(unit.connection)
        return made

    proxy.tamper = counted
    return lambda: bool(changed)


def test_a_replica_100_ms_slower_slows_writes_and_hardly_any_read(networked: Incident) -> None:
    slow = networked.replica_ids[1]
    read_s = []
    with networked.proxied(slow) as proxy, ReconnectingClient(networked.uri) as client:
        client.write(0, b"x" * MIB)
        proxy.delay_s = 0.05  # each way
        for number in range(100):
            if number % 10 == 0:
                began = time.monotonic()
                client.write(number * 4096, b"y" * 4096)
                assert time.monotonic() - began > 0.1, "every replica in sync has it"
            began = time.monotonic()
            client.read(number * 4096, 4096)
            read_s.append(time.monotonic() - began)
        assert networked.in_sync() == set(networked.replica_ids), "slow is not dead"
        assert client.reconnect_count == 0
    print(f"reads: median {1e3 * statistics.median(read_s):.1f} ms, longest {1e3 * max(read_s):.1f} ms")
    assert sorted(read_s)[89] < 0.05, "nine of ten do not wait for the slow one"


def test_a_replica_that_is_stuck_is_dropped_by_a_record_and_what_it_gets_late_changes_nothing(
    networked: Incident,
) -> None:
    stuck = networked.replica_ids[0]
    with networked.proxied(stuck) as proxy, networked.load(seed=61) as workload:
        version = networked.show()["membership"]["version"]
        proxy.stall()
        workload.wait_for_answers(500)
        membership = networked.engine("engine.status")["membership"]
        assert stuck not in membership["in_sync"] and membership["version"] > version
        proxy.resume()  # what was on its way arrives now, on a session that ended long ago
        networked.dolmen.wait_for_state(networked.name, "healthy")


def test_a_link_of_1_mb_s_costs_speed_and_nothing_else(networked: Incident) -> None:
    with networked.proxied(networked.replica_ids[2]) as proxy, networked.load(seed=62) as workload:
        proxy.rate_bytes_s = 1e6
        workload.wait_for_answers(300)


DAMAGE = {
    "header of a write": (is_request(Kind.WRITE), 20),
    "checksum of a write": (is_request(Kind.WRITE), HEADER_BYTES + 3),
    "data of a write": (is_request(Kind.WRITE), HEADER_BYTES + 8 + 1000),
    "header of an answer": (is_reply(Kind.WRITE), 40),
    "entry of a read's answer": (has_payload(is_reply(Kind.READ)), HEADER_BYTES + 2),
    "data of a read's answer": (has_payload(is_reply(Kind.READ)), HEADER_BYTES + 8 + 2000),
}


@pytest.mark.parametrize("where", list(DAMAGE))
def test_a_bit_that_flips_on_the_way_is_found_and_never_served(networked: Incident, where: str) -> None:
    matches, at = DAMAGE[where]
    with networked.proxied(networked.replica_ids[1]) as proxy, networked.load(seed=63) as workload:
        done = struck(proxy, once(matches, lambda unit: [flipped(unit.raw, at)]))
        networked.wait_for("the damage", done)
        workload.wait_for_answers(300)


def test_a_connection_that_ends_in_the_middle_of_a_frame_leaves_no_half_write(networked: Incident) -> None:
    def cut(unit: Unit) -> list[bytes]:
        raise CloseConnection(unit.raw[: HEADER_BYTES + 2000])

    with networked.proxied(networked.replica_ids[1]) as proxy, networked.load(seed=64) as workload:
        for kind in (is_request(Kind.WRITE), has_payload(is_reply(Kind.READ))):
            done = struck(proxy, once(kind, cut))
            networked.wait_for("the cut", done)
            workload.wait_for_answers(300)
            networked.dolmen.wait_for_state(networked.name, "healthy")


REPEATED = {"write": is_request(Kind.WRITE), "answer to a write": is_reply(Kind.WRITE)}


@pytest.mark.parametrize("what", list(REPEATED))
def test_a_frame_that_comes_twice_counts_once(networked: Incident, what: str) -> None:
    with networked.proxied(networked.replica_ids[1]) as proxy, networked.load(seed=65) as workload:
        done = struck(proxy, once(REPEATED[what], lambda unit: [unit.raw, unit.raw]))
        networked.wait_for("the repetition", done)
        workload.wait_for_answers(300)


def test_a_write_that_is_played_again_later_never_overwrites_a_newer_one(networked: Incident) -> None:
    kept: list[bytes] = []

    def replay(unit: Unit) -> list[bytes]:
        if is_request(Kind.WRITE)(unit):
            kept.append(unit.raw)
            if len(kept) == 400:
                # Of every block the oldest write: newer ones have been answered long ago.
                return [unit.raw, *kept[:40]]
        return [unit.raw]

    with networked.proxied(networked.replica_ids[1]) as proxy, networked.load(seed=66) as workload:
        done = struck(proxy, replay)
        networked.wait_for("the replay", done)
        workload.wait_for_answers(300)


def test_writes_of_an_older_epoch_that_are_played_again_are_refused(networked: Incident) -> None:
    old: list[bytes] = []
    with networked.proxied(networked.replica_ids[1]) as proxy:

        def record(unit: Unit) -> list[bytes]:
            if is_request(Kind.WRITE)(unit):
                old.append(unit.raw)
            return [unit.raw]

        proxy.tamper = record
        with networked.load(seed=67, reconnects=True) as workload:
            workload.wait_for_answers(200)
            dead = networked.dolmen.kill_engine(networked.name)
            networked.dolmen.wait_for_engine(networked.name, other_than=dead)
            networked.wait_for("the link of the next engine", lambda: proxy.data_connections > 0)
            assert old
            replay = once(is_request(Kind.WRITE), lambda unit: [*old[:40], unit.raw])
            networked.wait_for("the replay", struck(proxy, replay))
            workload.wait_for_answers(300)
