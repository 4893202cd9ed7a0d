"""An engine that was stopped and knows nothing of it, while a newer one takes over: told to the pure machine.
The old one's links to replicas that the newer one claimed are closed; those to others still answer it."""

from __future__ import annotations

from itertools import combinations

import pytest

from engine.events import EXIT_FENCED, Action, Claim, SetLease, SetReaders, StoreRecord, TimerKind
from engine.limits import LEASE_WAIT_S
from engine.membership import Hints
from engine.phase import VolumePhase
from protocol.limits import READ_LEASE_S
from tests.engine.simulation import Cluster


def serving(count: int = 3) -> Cluster:
    cluster = Cluster(count)
    cluster.open()
    cluster.write(region=1)
    cluster.settle()
    cluster.loop.renew()
    return cluster


def take_over(cluster: Cluster, *, cut_off: str = "") -> None:
    """A newer engine opens the volume, without the replicas it is cut off from."""
    cluster.stop_engine()
    cluster.out_of_reach = {cluster.ids.index(replica) for replica in cut_off}
    cluster.start_engine()
    cluster.settle()
    cluster.fire(TimerKind.STRAGGLERS)
    cluster.settle()


def fire_lease(cluster: Cluster) -> None:
    cluster.fire(TimerKind.LEASE)
    cluster.settle()


def settle_to_claims(cluster: Cluster) -> None:
    """All three are being claimed, none is."""
    cluster.settle(until=lambda: sum(isinstance(call, Claim) for call in cluster.calls) == 3)
    assert all(isinstance(call, Claim) for call in cluster.calls)


def test_a_newer_engine_serves_only_when_the_older_one_reads_nothing_more() -> None:
    cluster = serving()
    take_over(cluster, cut_off="C")
    assert cluster.volume.phase is VolumePhase.RECORDING
    assert cluster.volume.ledger is not None and cluster.volume.ledger.opened
    older = cluster.asleep[0]["loop"]
    assert older.readable((1, 0)) == {1}  # from C, until its lease ends
    fire_lease(cluster)
    assert cluster.volume.phase is VolumePhase.SERVING
    assert older.readable((1, 0)) == set()
    newer = cluster.write(region=1)
    cluster.settle()
    assert cluster.is_acked(newer)
    with cluster.as_sleeper():
        cluster.loop.renew()  # C answers it, and C alone
        assert cluster.loop.answers(2) and not cluster.loop.lease_holds()
    cluster.check()


def test_no_wait_when_the_older_engine_is_known_to_have_ended() -> None:
    cluster = serving()
    cluster.crash_engine()
    cluster.start_engine()
    cluster.settle()
    assert cluster.volume.phase is VolumePhase.SERVING
    assert cluster.now_s == 0


def test_the_wait_is_longer_than_the_lease() -> None:
    assert LEASE_WAIT_S > READ_LEASE_S


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_whoever_the_newer_engine_reaches_the_older_one_gets_no_lease_back(count: int) -> None:
    for lost in range(count):
        for left_out in combinations(range(count), lost):
            cluster = serving(count)
            take_over(cluster, cut_off="".join(cluster.ids[slot] for slot in left_out))
            fire_lease(cluster)
            if cluster.volume.phase is not VolumePhase.SERVING:
                continue
            with cluster.as_sleeper():
                cluster.loop.renew()
                assert not cluster.loop.lease_holds(), left_out
            cluster.check()


def test_the_quorum_of_a_proposal_is_in_force_before_the_proposal_is_anywhere() -> None:
    cluster = serving()
    cluster.kill("C")
    seen: list[Action] = []
    while cluster.inbox:
        seen += cluster.volume.step(cluster.inbox.pop(0))
    kinds = [type(action) for action in seen]
    assert SetLease in kinds and kinds.index(SetLease) < kinds.index(StoreRecord)
    assert cluster.volume.lease == (((0, 1, 2), 2), ((0, 1), 2))


def test_the_quorum_of_an_older_record_is_dropped_when_a_later_one_is_committed() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    assert cluster.loop.lease == (((0, 1), 2),)
    cluster.kill("B")
    cluster.settle()
    assert cluster.loop.lease == (((0,), 1),)
    cluster.start("B")
    cluster.start("C")
    cluster.settle()
    assert cluster.loop.lease == (((0, 1, 2), 2),)


def test_with_two_copies_and_the_store_away_a_loss_stops_reads_until_it_is_recorded() -> None:
    cluster = serving(2)
    cluster.store_down()
    cluster.kill("B")
    cluster.settle()
    cluster.now_s += READ_LEASE_S
    cluster.loop.renew()
    assert cluster.loop.readable((1, 0)) == set()  # the price
    cluster.store_back()
    cluster.settle()
    cluster.loop.renew()
    assert cluster.loop.readable((1, 0)) == {1}


def test_an_older_engine_that_wakes_up_is_fenced_whichever_way_it_moves() -> None:
    for first in ("event", "connect", "store"):
        cluster = serving()
        take_over(cluster, cut_off="C")
        fire_lease(cluster)
        with cluster.as_sleeper():
            lost = cluster.write(region=2)
            if first == "connect":
                cluster.connect(0)
            if first == "store":
                for _ in range(2):  # it hears that its links are gone, and proposes a record without them
                    cluster.run_event()
                assert cluster.wanted_record is not None
                cluster.store_now()
            cluster.settle()
            assert cluster.exit_code == EXIT_FENCED, first
        assert not cluster.is_acked(lost)
        assert not cluster.asleep
        cluster.out_of_reach.clear()
        cluster.settle()
        assert all(entry.in_sync for entry in cluster.volume.entries)
        assert len({r.content.get((2, 0), 0) for r in cluster.replicas}) == 1
        cluster.check()


def test_of_two_that_claim_at_once_the_newer_wins_everywhere_and_the_other_ends() -> None:
    # The older one has claimed as many as ``ahead`` when the newer one begins, and goes on when that is done.
    for ahead in range(4):
        cluster = serving()
        cluster.crash_engine()
        cluster.start_engine()
        settle_to_claims(cluster)
        claims = [at for at, call in enumerate(cluster.calls) if isinstance(call, Claim)]
        for at in reversed(claims[:ahead]):
            cluster.run_call(at)
        cluster.stop_engine()
        cluster.start_engine()
        cluster.open()
        assert cluster.volume.phase is VolumePhase.SERVING
        with cluster.as_sleeper():
            cluster.open()
            assert cluster.exit_code == EXIT_FENCED
            assert cluster.loop.members == cluster.loop.readers == ()  # it never served
        assert cluster.running and len(cluster.loop.members) == 3
        cluster.check()


def test_an_engine_that_dies_amid_its_claims_leaves_nothing_that_misleads_the_next() -> None:
    for claimed in range(4):
        cluster = serving()
        cluster.crash_engine()
        cluster.start_engine()
        settle_to_claims(cluster)
        for _ in range(claimed):
            cluster.run_call()
        cluster.crash_engine()
        cluster.check()
        cluster.start_engine()
        cluster.open()
        assert all(entry.in_sync for entry in cluster.volume.entries)
        cluster.check()


def test_a_claim_that_fails_leaves_that_replica_out_and_is_tried_again() -> None:
    cluster = serving()
    cluster.crash_engine()
    cluster.start_engine()
    settle_to_claims(cluster)
    cluster.run_call(0, fail="io_error")
    cluster.settle(connect=False)
    assert cluster.volume.phase is VolumePhase.SERVING
    assert set(cluster.stored.in_sync) == {"B", "C"}
    cluster.settle()
    assert all(entry.in_sync for entry in cluster.volume.entries)
    cluster.check()


def test_a_claim_does_not_make_an_empty_disk_look_like_a_member() -> None:
    # A's disk was replaced by an empty one. An engine claims both, B dies, the engine dies.
    cluster = serving(2)
    cluster.crash_engine()
    cluster.hints = Hints()  # nobody remembers how often A had been opened
    cluster.replicas[0] = type(cluster.replicas[0])(0, "A")
    cluster.start_engine()
    cluster.settle(until=lambda: cluster.volume.phase is VolumePhase.RECORDING)
    cluster.kill("B")
    cluster.crash_engine()
    cluster.check()
    cluster.start_engine()
    cluster.open()
    assert cluster.volume.phase is VolumePhase.INSPECTING  # not with zeroes
    cluster.start("B")
    cluster.open()
    assert all(entry.in_sync for entry in cluster.volume.entries)
    cluster.check()


def test_a_read_that_meets_an_unfinished_write_is_not_answered_before_that_is_everywhere() -> None:
    cluster = serving()
    cluster.write(region=1)
    cluster.loop.deliver(1)  # B has it: a read there would tell it, and the next open might choose A's copy
    assert cluster.loop.readable((1, 0)) == set()
    assert not cluster.read((1, 0))
    cluster.settle()
    assert cluster.read((1, 0))


def test_the_order_of_leases_and_readers() -> None:
    cluster = Cluster(3)
    cluster.open()
    cluster.crash_engine()
    cluster.start_engine()
    kinds: list[type] = []
    carry_out = cluster.carry_out

    def note(action: object) -> None:
        kinds.append(type(action))
        carry_out(action)

    cluster.carry_out = note  # type: ignore[method-assign]
    cluster.open()
    assert kinds.index(SetLease) < kinds.index(SetReaders)
