"""Copies that were put back, a state store that was put back, and an operator's word: told to the pure
machine, until the volume is healthy again."""

from __future__ import annotations

from engine.events import DetachAsked
from engine.membership import Hints, Override
from engine.phase import VolumePhase
from tests.engine.simulation import Cluster


def serving(count: int = 3) -> Cluster:
    cluster = Cluster(count)
    cluster.open()
    cluster.write(region=1)
    cluster.settle()
    return cluster


def healthy_and_equal(cluster: Cluster) -> bool:
    contents = [{half: write for half, write in r.content.items() if write} for r in cluster.replicas]
    assert all(content == contents[0] for content in contents), contents
    return cluster.running and all(entry.in_sync for entry in cluster.volume.entries)


def must_wait_for(cluster: Cluster) -> set[str]:
    assert cluster.volume.phase is VolumePhase.INSPECTING and cluster.volume.opening.must_wait is not None
    return set(cluster.volume.opening.must_wait.waiting_for)


def decide(cluster: Cluster, members: str) -> None:
    """`dolmen volume recover`, and the next grant."""
    if cluster.running:
        newest = cluster.volume.opening.newest.stamp
        cluster.crash_engine()
    else:
        newest = cluster.stored.stamp
    cluster.hints = Hints(cluster.hints.opens, False, Override(frozenset(members), newest))
    cluster.forked = frozenset(cluster.ids) - frozenset(members)
    # What only the others have is given up.
    kept = cluster.replica(members[0]).content
    cluster.acked = {half: min(write, kept.get(half, 0)) for half, write in cluster.acked.items()}
    cluster.start_engine()
    cluster.open()


def test_an_operator_goes_on_with_a_replica_that_missed_writes_and_the_others_follow_it() -> None:
    cluster = serving()
    cluster.kill("C")
    cluster.settle()
    given_up = cluster.write(region=2)
    cluster.settle()
    for replica in cluster.replicas[:2]:
        replica.clean(cluster.loop.completed)  # their marks tell nothing any more
    cluster.crash_engine()
    cluster.kill("A")
    cluster.kill("B")
    cluster.start("C")
    cluster.start_engine()
    cluster.open()
    assert must_wait_for(cluster) == {"A", "B"}
    decide(cluster, "C")
    assert cluster.volume.phase is VolumePhase.SERVING
    assert cluster.stored.in_sync == {"C"} and cluster.hints.override is None
    cluster.write(region=3)
    cluster.settle()
    cluster.check()
    cluster.start("A")
    cluster.start("B")
    cluster.settle()
    assert healthy_and_equal(cluster)
    assert not cluster.holds("A", given_up)
    assert not cluster.forked
    cluster.check()


def test_a_forked_replica_follows_although_it_was_interrupted_at_any_step() -> None:
    for steps in range(60):
        cluster = serving()
        cluster.kill("C")
        cluster.settle()
        cluster.write(region=2)
        cluster.settle()
        for replica in cluster.replicas[:2]:
            replica.clean(cluster.loop.completed)
        cluster.crash_engine()
        cluster.kill("A")
        cluster.kill("B")
        cluster.start("C")
        decide(cluster, "C")
        cluster.start("A")
        left = iter(range(steps))
        cluster.settle(until=lambda left=left: next(left, None) is None)  # type: ignore[misc]
        finished = cluster.entry("A").in_sync
        cluster.kill("A")
        cluster.crash_engine()
        cluster.start_engine()
        cluster.start("A")
        cluster.start("B")
        cluster.open()
        assert healthy_and_equal(cluster), steps
        cluster.check()
        if finished:
            return
    raise AssertionError("60 steps did not reach the end of the resync")


def test_when_all_copies_were_put_back_nobody_guesses_which_is_best() -> None:
    cluster = serving()
    photos = [cluster.photograph(replica) for replica in cluster.ids]
    cluster.write(region=2)
    cluster.settle()
    for photo in photos:
        cluster.put_back(photo)
    cluster.crash_engine()
    for replica in cluster.ids:
        cluster.start(replica)
    cluster.start_engine()
    cluster.open()
    assert must_wait_for(cluster) == {"A", "B", "C"}
    decide(cluster, "B")
    assert healthy_and_equal(cluster)
    assert not any(replica.restored for replica in cluster.replicas)
    cluster.check()


def test_copies_made_after_a_clean_detach_open_as_if_nothing_had_happened() -> None:
    cluster = serving()
    cluster.tell(DetachAsked(1))
    cluster.settle()
    assert cluster.exit_code == 0
    for replica in cluster.ids:
        cluster.put_back(cluster.photograph(replica))
        cluster.start(replica)
    cluster.check()
    cluster.start_engine()
    cluster.open()
    assert healthy_and_equal(cluster)
    assert not any(replica.restored for replica in cluster.replicas)
    # And it is not noticed later either that they are copies.
    cluster.write(region=4)
    cluster.settle()
    cluster.crash_engine()
    cluster.start_engine()
    cluster.open()
    assert healthy_and_equal(cluster)


def test_a_copy_that_was_put_back_under_a_running_engine_is_compared_as_a_whole() -> None:
    for in_place in (False, True):
        cluster = serving()
        photo = cluster.photograph("C")
        cluster.kill("C")
        cluster.start("C")
        cluster.settle()
        newer = cluster.write(region=1)
        cluster.settle()
        for replica in cluster.replicas:
            replica.clean(cluster.loop.completed)
        cluster.put_back(photo, in_place=in_place)
        cluster.start("C")
        cluster.settle(connect=False)
        cluster.check()
        cluster.settle()
        assert healthy_and_equal(cluster) and cluster.holds("C", newer), in_place


def test_a_copy_of_the_state_store_opens_when_every_replica_is_back() -> None:
    cluster = serving()
    old = cluster.stored
    for replica in "AB":
        cluster.kill(replica)
        cluster.settle()
    newer = cluster.write(region=2)
    cluster.settle()
    assert cluster.is_acked(newer) and cluster.stored.in_sync == {"C"}
    cluster.crash_engine()
    cluster.kill("C")
    cluster.put_back_store(old)
    cluster.start("A")
    cluster.start("B")
    cluster.check()
    cluster.start_engine()
    cluster.open()
    assert must_wait_for(cluster) == {"C"}
    cluster.start("C")
    cluster.open()
    assert healthy_and_equal(cluster)
    assert cluster.holds("A", newer)
    assert not cluster.hints.distrust_store
