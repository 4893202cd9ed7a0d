"""Resyncs that meet damage, death and forks, told event by event to the pure machine."""

from __future__ import annotations

import pytest

from engine.events import Paced, PullRegions, ReplaceAsked, TimerKind
from engine.pace import PullPace
from engine.replica_entry import ReplicaState
from tests.engine.simulation import Cluster
from tests.engine.test_volume_scenarios import healthy, in_sync, serving


def behind(region_count: int = 12, *, paced: bool = True) -> Cluster:
    """C missed a write in each of the regions, and comes back."""
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    for region in range(region_count):
        cluster.write(region)
    cluster.settle()
    if paced:
        cluster.tell(Paced(PullPace(batch_regions=4, calls_max=2)))
    cluster.start("C")
    return cluster


def heal(cluster: Cluster) -> None:
    for _ in range(60):
        if not cluster.running:
            cluster.start_engine()
        cluster.settle()
        if cluster.running and healthy(cluster):
            return
        cluster.fire(TimerKind.STRAGGLERS)
        if cluster.running:
            cluster.fire(TimerKind.PULL_RETRY)
    raise AssertionError([(e.id, e.state.value, e.reason) for e in cluster.volume.entries])


def test_several_batches_are_under_way_at_a_time_and_never_more() -> None:
    cluster = behind(40)
    most = 0

    def looked() -> bool:
        nonlocal most
        most = max(most, sum(isinstance(call, PullRegions) for call in cluster.calls))
        return False

    cluster.settle(until=looked)
    assert healthy(cluster) and most == 2


@pytest.mark.parametrize("victim", ["source", "target", "engine"])
@pytest.mark.parametrize("after_pulls", range(0, 12))
def test_whoever_dies_in_the_middle_of_a_resync_it_goes_on(victim: str, after_pulls: int) -> None:
    cluster = behind(48)
    seen: list[tuple[int, ...]] = []
    original = cluster._pull

    def counted(replica, source, slot, session, regions):  # type: ignore[no-untyped-def]
        seen.append(regions)
        return original(replica, source, slot, session, regions)

    cluster._pull = counted  # type: ignore[method-assign]
    cluster.settle(until=lambda: len(seen) >= after_pulls)
    copied_before = cluster.copied_halves
    if cluster.running and cluster.volume.joining is not None:
        if victim == "engine":
            cluster.crash_engine()
        else:
            cluster.kill("A" if victim == "source" else "C")
            cluster.settle(connect=False)
            cluster.start("A" if victim == "source" else "C")
    heal(cluster)
    cluster.check()
    assert cluster.copied_halves <= 2 * 48 * 1.2, "what was copied before is not copied again"
    assert cluster.copied_halves >= copied_before


def test_a_region_damaged_at_one_source_is_taken_from_another() -> None:
    cluster = behind()
    cluster.replica("A").rotten = {5}
    heal(cluster)
    assert cluster.replica("C").content == cluster.replica("B").content
    assert not cluster.replica("C").lost, "nothing was given up"


def test_blocks_that_no_source_has_end_the_resync_and_are_recorded_as_lost() -> None:
    cluster = behind()
    cluster.replica("A").rotten = {5, 7}
    cluster.replica("B").rotten = {5}
    for _ in range(40):
        cluster.settle()
        cluster.fire(TimerKind.PULL_RETRY)
    assert healthy(cluster)
    assert cluster.replica("C").lost == {5}, "only what nobody has; 7 came from B"
    assert any(entry.event == "blocks lost on all replicas" for entry in cluster.log)


def test_nothing_is_given_up_while_a_member_that_may_have_it_cannot_be_read() -> None:
    cluster = behind()
    cluster.replica("A").rotten = {5}
    cluster.fail_pulls_from.add(1)  # B is in sync, but C cannot reach it
    for _ in range(5):
        cluster.settle()
        cluster.fire(TimerKind.PULL_RETRY)
    assert in_sync(cluster) == {"A", "B"} and not cluster.replica("C").lost
    cluster.fail_pulls_from.clear()
    heal(cluster)
    assert not cluster.replica("C").lost and cluster.replica("C").content == cluster.replica("B").content


def test_members_that_are_made_equal_keep_the_good_copy_whichever_it_is() -> None:
    # A would be the source, and has lost region 3; B's copy must not be thrown away for it.
    cluster = serving()
    write = cluster.write(3)
    cluster.settle()
    cluster.crash_engine()
    cluster.replica("A").rotten = {3}
    cluster.start_engine()
    heal(cluster)
    assert not cluster.loop.unequal
    assert not any(replica.lost for replica in cluster.replicas)
    assert all(cluster.holds(replica, write) for replica in "BC")
    cluster.check()


def test_members_that_all_lost_a_block_become_equal_all_the_same() -> None:
    cluster = serving()
    cluster.write(3)
    cluster.write(4)
    cluster.settle()
    cluster.crash_engine()
    for replica in cluster.replicas:
        replica.rotten = {3}
    cluster.start_engine()
    heal(cluster)
    assert not cluster.loop.unequal and cluster.volume.reconcile is None


@pytest.mark.parametrize("mark", ["forked", "rolled_back"])
def test_a_replica_with_a_history_of_its_own_is_compared_everywhere(mark: str) -> None:
    # C wrote region 30 in a history that was given up: nobody's marks tell of it, and its own are clean.
    cluster = serving()
    for region in range(3):
        cluster.write(region)
    cluster.settle()
    for replica in cluster.replicas:
        replica.clean(cluster.loop.completed)
    cluster.kill("C")
    cluster.settle()
    stray = cluster.replica("C")
    stray.apply(((30, 0), (30, 1)), 99)
    stray.dirty.clear()
    setattr(cluster.entry("C"), mark, True)
    cluster.start("C")
    cluster.settle(until=lambda: cluster.entry("C").state is ReplicaState.JOINING)
    assert cluster.volume.joining is not None
    assert set(cluster.volume.joining.regions) >= {0, 1, 2, 30}
    heal(cluster)
    assert stray.content.get((30, 0), 0) == 0


def test_a_replica_that_is_resynced_does_not_tell_why_it_was_lost() -> None:
    cluster = behind()
    cluster.settle(until=lambda: cluster.entry("C").state is ReplicaState.PULLING)
    assert cluster.entry("C").reason == "it missed writes"


def test_a_target_that_is_killed_late_has_little_left_to_look_at() -> None:
    cluster = behind(600)
    cluster.tell(Paced(PullPace(batch_regions=16, calls_max=1)))
    cluster.settle(until=lambda: cluster.entry("C").state is ReplicaState.JOINING)
    cluster.replica("C").clean(cluster.loop.completed)
    assert len(cluster.replica("C").dirty) < 300
    heal(cluster)


def test_a_damaged_replica_is_looked_at_again_without_being_claimed_each_time() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    cluster.replica("C").state = "damaged"
    cluster.start("C")
    cluster.log.clear()
    for _ in range(5):
        cluster.settle(connect=False)
        if 2 not in cluster.connected:
            cluster.connect(2)
    cluster.settle(connect=False)
    said = [entry.fields for entry in cluster.log if entry.event == "replica state changed"]
    assert said == [], "one line per look would fill the log"
    assert cluster.entry("C").reason == "injected"
    cluster.replica("C").state = "open"
    heal(cluster)


def replace(cluster: Cluster, old: str, new: str) -> str:
    """Asks the machine; the reason of a refusal, or ""."""
    cluster.tell(ReplaceAsked(1, old, new, "n9", "127.0.0.1", 9))
    answer = cluster.replies.pop(1)
    return str(answer) if answer is not None else ""


def test_a_new_replica_that_is_not_blank_is_compared_as_a_whole() -> None:
    # The state store was put back, and gives out an id that somebody has already, who went his own ways.
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    assert replace(cluster, "C", "D") == ""
    cluster.put_new_replica(2, "D")
    known = cluster.replica("D")
    stranger = cluster.new_write_id(((5, 0), (5, 1)))
    known.content, known.stamps = {(5, 0): stranger, (5, 1): stranger}, {5: (1, 90)}
    known.synced_at = (1, 99)
    heal(cluster)
    assert in_sync(cluster) == {"A", "B", "D"}
    assert not any(known.content.get((5, half)) for half in (0, 1)), "what it alone had is gone"


def test_a_replica_that_no_record_names_gives_its_slot_to_a_new_one() -> None:
    cluster = serving()
    first = cluster.write(1)
    cluster.settle()
    cluster.kill("C")
    cluster.settle()
    assert replace(cluster, "C", "D") == ""
    assert replace(cluster, "C", "D") == "", "repeatable"
    assert [entry.id for entry in cluster.volume.entries] == ["A", "B", "D"]
    cluster.put_new_replica(2, "D")
    second = cluster.write(2)
    heal(cluster)
    assert in_sync(cluster) == {"A", "B", "D"}
    assert cluster.holds("D", first) and cluster.holds("D", second)
    cluster.check()
    cluster.crash_engine()
    heal(cluster)  # the next engine is started with the new name


def test_a_member_or_one_that_becomes_one_is_never_replaced() -> None:
    cluster = serving()
    assert "named in sync" in replace(cluster, "C", "D")
    cluster.store_down()
    cluster.kill("B")
    cluster.kill("C")  # one left of three: no record without them can be committed
    cluster.settle(connect=False)
    assert "named in sync" in replace(cluster, "C", "D")
    cluster.store_back()
    cluster.settle(connect=False)
    assert in_sync(cluster) == {"A"}
    cluster.start("C")
    for state in (ReplicaState.JOINING, ReplicaState.FLUSHING, ReplicaState.RECORDING):
        cluster.settle(until=lambda state=state: cluster.entry("C").state is state)  # type: ignore[misc]
        assert "named in sync" in replace(cluster, "C", "D"), state
    assert "no replica" in replace(cluster, "X", "D")
    assert "has a place" in replace(cluster, "B", "A")


def test_a_replica_is_not_replaced_before_the_volume_is_open() -> None:
    cluster = Cluster()
    assert "being opened" in replace(cluster, "C", "D")


@pytest.mark.parametrize("state", [ReplicaState.COMPARING, ReplicaState.MARKING, ReplicaState.PULLING])
def test_a_replica_that_is_replaced_in_the_middle_of_its_resync_leaves_nothing_waiting(
    state: ReplicaState,
) -> None:
    cluster = behind()
    cluster.settle(until=lambda: cluster.entry("C").state is state)
    assert replace(cluster, "C", "D") == ""
    assert cluster.volume.joining is None and not cluster.loop.partial_wait
    cluster.put_new_replica(2, "D")
    heal(cluster)
    assert in_sync(cluster) == {"A", "B", "D"}
