"""Incidents, told to the pure machine: what is lost, in which order, and what the volume does about it."""

from __future__ import annotations

import pytest

from engine.events import (
    EXIT_DETACHED,
    EXIT_FENCED,
    EXIT_REOPEN,
    DetachAsked,
    Fenced,
    PersistRecord,
    PullRegions,
    RegionsEqual,
    ResizeAsked,
    TimerKind,
)
from engine.phase import VolumePhase
from engine.replica_entry import ReplicaState
from protocol.errors import ShrinkRefused
from protocol.frames import Status
from tests.engine.simulation import GIB, Cluster


def serving(count: int = 3) -> Cluster:
    cluster = Cluster(count)
    cluster.open()
    assert cluster.volume.phase is VolumePhase.SERVING
    return cluster


def in_sync(cluster: Cluster) -> set[str]:
    assert cluster.volume.ledger is not None
    return set(cluster.volume.ledger.committed.in_sync)


def healthy(cluster: Cluster) -> bool:
    return in_sync(cluster) == set(cluster.ids) and all(entry.in_sync for entry in cluster.volume.entries)


def test_a_fresh_volume_opens_on_all_its_blank_replicas() -> None:
    cluster = serving()
    assert healthy(cluster)
    assert cluster.loop.members == cluster.loop.readers == (0, 1, 2)
    assert cluster.stored.stamp == (1, 1)
    assert not cluster.loop.unequal and cluster.volume.reconcile is None


def test_nothing_is_served_before_the_first_record_is_stored() -> None:
    cluster = Cluster()
    cluster.store_down()
    cluster.open()
    assert cluster.volume.phase is VolumePhase.RECORDING
    assert cluster.loop.members == ()
    cluster.store_back()
    cluster.settle()
    assert healthy(cluster)


def test_losing_one_replica_holds_acknowledgements_until_the_record_is_committed() -> None:
    cluster = serving()
    write = cluster.write(region=1)
    cluster.kill("C")
    cluster.loop.deliver(0)
    cluster.loop.deliver(1)
    assert not cluster.is_acked(write)  # C may still be thought to hold it
    cluster.settle()
    assert cluster.is_acked(write)
    assert in_sync(cluster) == {"A", "B"}
    assert cluster.replica("A").record.in_sync == {"A", "B"}
    cluster.check()


def test_losing_one_of_three_is_ridden_through_without_the_state_store() -> None:
    cluster = serving()
    cluster.store_down()
    write = cluster.write(region=1)
    cluster.kill("B")
    cluster.settle()
    assert cluster.is_acked(write)
    assert cluster.stored.stamp == (1, 1)  # it never heard
    cluster.check()


def test_losing_two_of_three_waits_for_the_state_store() -> None:
    cluster = serving()
    cluster.store_down()
    cluster.kill("B")
    cluster.settle()
    cluster.kill("C")
    write = cluster.write(region=1)
    cluster.settle()
    assert not cluster.is_acked(write)
    cluster.check()
    cluster.store_back()
    cluster.settle()
    assert cluster.is_acked(write)
    assert in_sync(cluster) == {"A"}
    cluster.check()


def test_two_failures_while_the_first_proposal_is_under_way_are_one_newer_proposal() -> None:
    cluster = serving()
    write = cluster.write(region=1)
    cluster.kill("C")
    cluster.settle(until=lambda: any(isinstance(call, PersistRecord) for call in cluster.calls))
    cluster.kill("B")
    cluster.settle()
    assert cluster.is_acked(write)
    assert in_sync(cluster) == {"A"}
    cluster.check()


def test_a_replica_that_returns_gets_what_it_missed_and_only_then_serves_reads() -> None:
    cluster = serving()
    cluster.write(region=1)
    cluster.settle()
    cluster.kill("C")
    cluster.settle()
    missed = cluster.write(region=2)
    cluster.settle()
    cluster.start("C")
    cluster.settle(until=lambda: cluster.entry("C").state is ReplicaState.PULLING)
    assert 2 not in cluster.loop.readers
    assert cluster.loop.partial_wait >= {2}
    cluster.settle()
    assert healthy(cluster)
    assert cluster.loop.readers == (0, 1, 2)
    assert cluster.holds("C", missed)
    assert not cluster.loop.partial_wait
    cluster.check()


def test_only_what_changed_meanwhile_is_pulled() -> None:
    cluster = serving()
    for region in range(20):
        cluster.write(region)
    cluster.settle()
    for replica in cluster.replicas:
        replica.clean(cluster.loop.completed)
    cluster.kill("C")
    cluster.settle()
    cluster.write(region=7)
    cluster.settle()
    cluster.start("C")
    cluster.settle(until=lambda: cluster.entry("C").state is ReplicaState.JOINING)
    assert cluster.volume.joining is not None
    assert cluster.volume.joining.regions == (7,)


def test_a_region_first_written_while_the_resync_begins_is_not_missed() -> None:
    # Written after the source named what changed, before C's link was there.
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    cluster.start("C")
    cluster.settle(until=lambda: cluster.entry("C").state is ReplicaState.MARKING)
    missed = cluster.write(region=9)
    cluster.settle()
    assert healthy(cluster)
    assert cluster.holds("C", missed)


def test_a_blank_replica_in_place_of_another_gets_everything() -> None:
    cluster = serving()
    writes = [cluster.write(region) for region in range(5)]
    cluster.settle()
    cluster.kill("C")
    cluster.settle()
    blank = type(cluster.replicas[2])(2, "C")
    cluster.replicas[2] = blank
    cluster.settle()
    assert healthy(cluster)
    assert all(cluster.holds("C", write) for write in writes)
    cluster.check()


def test_all_replicas_lost_and_back_in_any_order_lose_nothing() -> None:
    for order in ("ABC", "CBA", "BAC"):
        cluster = serving()
        held = cluster.write(region=1)
        cluster.settle()
        waiting = cluster.write(region=2)
        cluster.loop.deliver(1)  # B applied it, nobody else
        for name in "ABC":
            cluster.kill(name)
        cluster.settle()
        assert cluster.loop.readers == ()
        cluster.check()
        for name in order:
            cluster.start(name)
            cluster.settle()
            cluster.check()
        assert healthy(cluster), order
        assert cluster.is_acked(held) and cluster.is_acked(waiting)


def test_with_the_state_store_away_two_that_return_go_on_as_a_majority() -> None:
    cluster = serving()
    cluster.store_down()
    for name in "ABC":
        cluster.kill(name)
    cluster.settle()
    waiting = cluster.write(region=2)
    cluster.start("B")
    cluster.settle()
    assert not cluster.is_acked(waiting)
    cluster.start("C")
    cluster.settle()
    # {B} was proposed alone and may be durable at B: to add C to that, the state store must know.
    assert not cluster.is_acked(waiting)
    cluster.check()
    cluster.store_back()
    cluster.settle()
    assert cluster.is_acked(waiting)
    cluster.check()


def test_all_lost_with_their_page_caches_start_over_in_a_new_epoch() -> None:
    cluster = serving()
    cluster.write(region=1)
    cluster.settle()
    for name in "ABC":
        cluster.kill(name, power=True)
    for name in "ABC":
        cluster.start(name)
    cluster.settle()
    assert cluster.exit_code == EXIT_REOPEN
    cluster.start_engine()
    cluster.open()
    assert healthy(cluster)
    assert not any(replica.suspect for replica in cluster.replicas)


def test_a_member_that_lost_power_waits_for_one_that_did_not() -> None:
    cluster = serving()
    write = cluster.write(region=1)
    cluster.settle()
    for name in "ABC":
        cluster.kill(name, power=name == "A")
    cluster.start("A")
    cluster.settle()
    assert cluster.running and cluster.loop.readers == ()
    assert "lost" in cluster.entry("A").reason
    cluster.start("B")
    cluster.settle()
    assert in_sync(cluster) >= {"B"}
    assert cluster.holds("A", write)
    cluster.check()


def test_an_engine_that_was_killed_leaves_regions_that_are_made_equal_before_they_are_read() -> None:
    cluster = serving()
    cluster.write(region=3)
    cluster.loop.deliver(2)  # only C has it
    cluster.crash_engine()
    cluster.start_engine()
    cluster.settle(until=lambda: cluster.volume.phase is VolumePhase.SERVING)
    assert cluster.loop.unequal == {3}
    cluster.settle()
    assert not cluster.loop.unequal and cluster.volume.reconcile is None
    assert len({replica.content.get((3, 0), 0) for replica in cluster.replicas}) == 1
    cluster.check()


def test_the_source_of_a_reconcile_dies_and_another_takes_its_place() -> None:
    cluster = serving()
    for region in range(30):
        cluster.write(region)
    for _ in range(10):
        cluster.loop.deliver(0)
    cluster.crash_engine()
    cluster.start_engine()
    cluster.settle(
        until=lambda: cluster.volume.reconcile is not None and cluster.volume.reconcile.done_count > 0
    )
    cluster.kill("A")
    cluster.settle()
    assert in_sync(cluster) == {"B", "C"}
    assert cluster.volume.reconcile is None and not cluster.loop.unequal
    assert cluster.replica("B").content == cluster.replica("C").content
    cluster.start("A")
    cluster.settle()
    assert healthy(cluster)
    cluster.check()


def test_all_lost_during_a_reconcile_start_over_in_a_new_epoch() -> None:
    cluster = serving()
    for region in range(30):
        cluster.write(region)
    cluster.loop.deliver(0)
    cluster.crash_engine()
    cluster.start_engine()
    cluster.settle(until=lambda: cluster.volume.reconcile is not None)
    for name in "ABC":
        cluster.kill(name)
    cluster.settle()
    cluster.start("B")
    cluster.settle()
    assert cluster.exit_code == EXIT_REOPEN


def test_a_suspect_replica_is_never_a_source() -> None:
    # The engine and A's machine die together: A lost acknowledged writes that B and C have.
    cluster = serving()
    write = cluster.write(region=1)
    cluster.settle()
    cluster.kill("A", power=True)
    cluster.crash_engine()
    cluster.start("A")
    cluster.start_engine()
    cluster.settle(until=lambda: cluster.volume.phase is VolumePhase.SERVING)
    assert in_sync(cluster) == {"B", "C"}
    cluster.check()
    cluster.settle()
    assert healthy(cluster)
    assert cluster.holds("A", write)
    assert not cluster.replica("A").suspect


def test_an_open_waits_while_the_missing_members_could_know_better() -> None:
    cluster = serving()
    cluster.crash_engine()
    cluster.kill("B")
    cluster.kill("C")
    cluster.start_engine()
    cluster.open()
    assert cluster.volume.phase is VolumePhase.INSPECTING
    assert cluster.volume.opening.must_wait is not None
    assert cluster.volume.opening.must_wait.waiting_for == {"B", "C"}
    cluster.start("B")
    cluster.settle()
    assert cluster.volume.phase is VolumePhase.SERVING
    assert in_sync(cluster) == {"A", "B"}


def test_an_open_waits_a_moment_for_a_straggler() -> None:
    cluster = serving()
    cluster.crash_engine()
    cluster.kill("B")
    cluster.start_engine()
    cluster.settle()
    assert cluster.volume.phase is VolumePhase.INSPECTING
    cluster.start("B")
    cluster.settle()
    assert in_sync(cluster) == {"A", "B", "C"}  # the timer never fired


def test_a_replica_that_was_stale_before_is_not_waited_for() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    cluster.crash_engine()
    cluster.start_engine()
    cluster.settle()
    assert cluster.volume.phase is VolumePhase.SERVING
    assert in_sync(cluster) == {"A", "B"}


def test_a_replica_put_back_to_an_older_state_is_not_trusted() -> None:
    cluster = serving(2)
    write = cluster.write(region=1)
    cluster.settle()
    cluster.crash_engine()
    cluster.replicas[0] = type(cluster.replicas[0])(0, "A")  # an empty disk under the same name
    cluster.kill("B")
    cluster.start_engine()
    cluster.open()
    assert cluster.volume.phase is VolumePhase.INSPECTING  # A alone would read zeroes
    cluster.start("B")
    cluster.settle()
    assert healthy(cluster)
    assert cluster.holds("A", write)


def test_a_newer_epoch_anywhere_ends_the_engine() -> None:
    cluster = serving()
    cluster.replica("B").epoch = 9
    cluster.kill("C")
    cluster.settle()
    assert cluster.exit_code == EXIT_FENCED

    cluster = serving()
    cluster.tell(Fenced("the state store"))
    assert cluster.exit_code == EXIT_FENCED

    cluster = serving()
    cluster.fail_write("A", Status.STALE_EPOCH)
    cluster.settle()
    assert cluster.exit_code == EXIT_FENCED


def test_a_full_disk_makes_one_replica_stale_and_is_tried_again_later() -> None:
    cluster = serving()
    write = cluster.write(region=1)
    cluster.fail_write("B", Status.NO_SPACE)
    cluster.settle(connect=False)
    assert cluster.is_acked(write)
    assert in_sync(cluster) == {"A", "C"}
    cluster.settle()
    assert healthy(cluster)


def test_a_failed_fsync_makes_a_replica_as_doubtful_as_a_power_loss() -> None:
    cluster = serving()
    cluster.write(region=1)
    cluster.kill("B")
    cluster.kill("C")
    cluster.fail_write("A", Status.IO_ERROR)
    cluster.settle()
    assert cluster.entry("A").suspect
    assert cluster.loop.readers == ()  # it waits for B or C
    cluster.start("C")
    cluster.settle()
    assert in_sync(cluster) >= {"C"}
    cluster.check()


def test_a_growth_interrupted_at_any_step_loses_nothing() -> None:
    # C returns and dies again after each possible number of steps of its resync, and so do A and the engine.
    for victim in ("C", "A", "engine"):
        for steps in range(60):
            cluster = serving()
            cluster.write(region=1)
            cluster.kill("C")
            cluster.settle()
            cluster.write(region=2)
            cluster.start("C")
            left = iter(range(steps))
            cluster.settle(until=lambda left=left: next(left, None) is None)
            finished = healthy(cluster)
            if victim == "engine":
                cluster.crash_engine()
                cluster.start_engine()
            else:
                cluster.kill(victim)
            last = cluster.write(region=3) if victim != "engine" else 0
            cluster.open()
            cluster.check()
            if last:
                assert cluster.is_acked(last)
                cluster.start(victim)
                cluster.settle()
            assert healthy(cluster), (victim, steps)
            cluster.check()
            if finished:
                break
        else:
            raise AssertionError("60 steps did not reach the end of the resync")


def test_a_resynced_replica_waits_to_be_counted_while_the_state_store_is_away() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    cluster.store_down()
    cluster.start("C")
    cluster.settle()
    assert cluster.entry("C").state is ReplicaState.PULLING
    assert cluster.volume.joining is not None and cluster.volume.joining.waits_for_store
    write = cluster.write(region=5)
    cluster.settle()
    assert cluster.is_acked(write)  # nobody waits for C
    cluster.store_back()
    cluster.settle()
    assert healthy(cluster)


def test_the_source_of_a_resync_dies_and_another_goes_on() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    for region in range(40):
        cluster.write(region)
    cluster.start("C")
    cluster.settle(
        until=lambda: (
            cluster.volume.joining is not None
            and cluster.volume.joining.plan is not None
            and cluster.volume.joining.plan.done_count > 8
        )
    )
    cluster.kill("A")
    cluster.settle()
    assert in_sync(cluster) == {"B", "C"}
    assert cluster.replica("B").content == cluster.replica("C").content


def test_a_replica_that_flaps_during_its_resync_gets_there_in_the_end() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    for round_number in range(5):
        for region in range(10):
            cluster.write(region)
        cluster.start("C")
        cluster.settle(
            until=lambda: (
                cluster.volume.joining is not None and cluster.entry("C").state is ReplicaState.PULLING
            )
        )
        cluster.write(region=round_number)
        cluster.cut("C")
        cluster.settle(connect=False)
        cluster.check()
    cluster.settle()
    assert healthy(cluster)
    cluster.check()


def test_two_stale_replicas_are_resynced_one_after_the_other() -> None:
    cluster = serving()
    cluster.kill("B")
    cluster.kill("C")
    cluster.settle()
    cluster.write(region=1)
    cluster.start("B")
    cluster.start("C")
    cluster.settle()
    assert healthy(cluster)
    cluster.check()


def test_a_write_that_failed_everywhere_is_decided_once() -> None:
    cluster = serving()
    cluster.write(region=4)
    cluster.settle()
    cluster.diverge(4)
    cluster.settle()
    assert not cluster.loop.unequal
    assert len({replica.content.get((4, 1), 0) for replica in cluster.replicas}) == 1
    cluster.check()


def test_a_detach_drains_cleans_and_ends() -> None:
    cluster = serving()
    write = cluster.write(region=1)
    cluster.tell(DetachAsked(1))
    assert cluster.loop.paused and cluster.running
    cluster.settle()
    assert cluster.exit_code == EXIT_DETACHED
    assert cluster.replies == {1: None}
    assert cluster.is_acked(write)
    assert not any(replica.dirty for replica in cluster.replicas)


def test_a_detach_of_a_waiting_volume_ends_without_cleaning() -> None:
    cluster = serving()
    for name in "ABC":
        cluster.kill(name)
    cluster.settle()
    cluster.write(region=1)
    cluster.tell(DetachAsked(1))
    cluster.settle()
    assert cluster.running
    cluster.fire(TimerKind.DETACH)
    assert cluster.exit_code == EXIT_DETACHED
    cluster.check()


def test_a_resize_grows_the_replicas_first_and_a_stale_one_before_its_resync() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    cluster.tell(ResizeAsked(1, 2 * GIB))
    cluster.settle()
    assert cluster.replies == {1: None}
    assert cluster.volume.size_bytes == 2 * GIB
    cluster.start("C")
    cluster.settle()
    assert healthy(cluster)
    assert cluster.replica("C").size_bytes == 2 * GIB
    cluster.tell(ResizeAsked(2, GIB))
    assert isinstance(cluster.replies[2], ShrinkRefused)


def test_an_engine_that_finds_smaller_replicas_grows_them_before_it_opens() -> None:
    # The daemon's document has the new size; the engine died before it had grown all replicas.
    cluster = serving()
    cluster.crash_engine()
    cluster.size_bytes = 2 * GIB
    cluster.replica("A").size_bytes = 2 * GIB
    cluster.start_engine()
    cluster.open()
    assert healthy(cluster)
    assert {replica.size_bytes for replica in cluster.replicas} == {2 * GIB}


def test_one_replica_alone_waits_and_goes_on() -> None:
    cluster = serving(1)
    cluster.write(region=1)
    cluster.settle()
    cluster.kill("A")
    cluster.settle()
    waiting = cluster.write(region=2)
    cluster.start("A")
    cluster.settle()
    assert cluster.is_acked(waiting)
    assert healthy(cluster)


def test_a_replica_that_is_damaged_stays_out() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    cluster.replica("C").state = "damaged"
    cluster.start("C")
    cluster.settle()
    assert in_sync(cluster) == {"A", "B"}
    assert cluster.entry("C").reason == "injected"


@pytest.mark.parametrize("state", ["failed", "damaged"])
def test_a_member_that_cannot_be_opened_is_looked_at_until_it_can(state: str) -> None:
    cluster = serving()
    for other in "AB":
        cluster.kill(other)
        cluster.settle()
    last = cluster.write(region=0)
    cluster.settle()
    assert cluster.is_acked(last) and cluster.stored.in_sync == {"C"}
    cluster.crash_engine()
    cluster.kill("C")
    cluster.replica("C").state = state
    for replica in "ABC":
        cluster.start(replica)
    cluster.start_engine()
    cluster.open()
    assert cluster.volume.phase is VolumePhase.INSPECTING
    cluster.replica("C").state = "open"
    cluster.open()
    assert healthy(cluster) and cluster.holds("A", last)


def test_a_pull_that_failed_half_way_never_undoes_a_newer_write() -> None:
    # Regions 0 and 1 were pulled before the source failed. A write then reaches C before the source; to pull
    # region 0 again, with nothing tracked, would put the source's older copy over it.
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    for region in range(4):
        cluster.write(region)
    cluster.settle(connect=False)
    cluster.start("C")
    cluster.settle(until=lambda: any(isinstance(call, PullRegions) for call in cluster.calls))
    call = next(call for call in cluster.calls if isinstance(call, PullRegions))
    assert call.regions == (0, 1, 2, 3)
    source, target = cluster.replicas[call.source], cluster.replica("C")
    assert not isinstance(cluster._pull(target, source, call.slot, call.session, (0, 1)), str)
    cluster.run_call(cluster.calls.index(call), fail="source_failed")
    newer = cluster.write(region=0)
    cluster.loop.deliver(2)  # C has it, the source not yet
    while cluster.calls or cluster.inbox:
        if cluster.inbox:
            cluster.run_event()
        else:
            cluster.run_call()
    assert cluster.holds("C", newer)
    cluster.fire(TimerKind.PULL_RETRY)
    cluster.settle()
    assert healthy(cluster)
    assert target.content == source.content
    cluster.check()


def test_a_record_that_an_earlier_engine_left_at_one_replica_does_not_open_without_the_others() -> None:
    # Epoch 1 proposed {B, C} and only B heard of it. Epoch 2 goes on with A and C while B and the state store
    # are away. If its first record needed no store, B alone would later open as a member of {B, C}.
    cluster = serving()
    cluster.store_down()
    cluster.cut("A")
    cluster.settle(connect=False, until=lambda: cluster.replica("B").record.version == 2)
    cluster.crash_engine()
    assert cluster.replica("C").record.version == 1
    cluster.kill("B")
    cluster.store_alive = True
    cluster.start_engine()
    cluster.store_down()
    cluster.open()
    assert cluster.volume.phase is VolumePhase.RECORDING
    assert cluster.loop.members == ()  # nothing is acknowledged before the store knows of epoch 2
    cluster.check()
    cluster.store_back()
    cluster.settle()
    write = cluster.write(region=1)
    cluster.settle()
    assert cluster.is_acked(write)
    cluster.check()


def test_a_region_that_diverges_again_while_it_is_made_equal_is_made_equal_again() -> None:
    cluster = serving()
    cluster.diverge(4)
    cluster.settle(until=lambda: sum(isinstance(call, PullRegions) for call in cluster.calls) == 2)
    cluster.run_call()
    cluster.run_call()
    cluster.diverge(4)
    cluster.run_event(len(cluster.inbox) - 1)  # heard before the pulls' answers, which are about the past
    first = cluster.volume.reconcile
    actions = [a for event in tuple(cluster.inbox) for a in cluster.volume.step(event)]
    assert cluster.volume.reconcile not in (first, None)
    assert not any(isinstance(action, RegionsEqual) for action in actions)
    cluster.inbox.clear()
    for action in actions:
        cluster.carry_out(action)
    cluster.settle()
    assert not cluster.loop.unequal
    assert len({replica.content.get((4, 0), 0) for replica in cluster.replicas}) == 1
    cluster.check()
