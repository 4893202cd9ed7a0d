"""All replicas lost at once, and back in every order, one after the other: with the engine alive or gone, the
state store there, away or put back to an older copy, with one replica out of date before or one machine's
page cache lost. Nothing acknowledged is lost on the way, nothing is read that is not decided, and when all
are back the volume is healthy."""

from __future__ import annotations

from itertools import permutations

import pytest

from engine.events import TimerKind
from tests.engine.simulation import Cluster


def prepared(history: str) -> Cluster:
    cluster = Cluster(3)
    cluster.open()
    cluster.write(region=0)
    cluster.settle()
    if history == "one was out of date":
        cluster.kill("B")
        cluster.settle()
    if history == "the second loss is not recorded":
        cluster.kill("B")
        cluster.settle()
        cluster.store_down()
    cluster.write(region=1)
    cluster.settle()
    cluster.write(region=2)  # unfinished: C alone may have it
    cluster.loop.deliver(2)
    return cluster


def lose_all(cluster: Cluster, history: str) -> None:
    for replica in cluster.replicas:
        if replica.alive:
            cluster.kill(replica.id, power=history == "one lost its page cache" and replica.id == "A")
    if cluster.running:
        cluster.settle()
    cluster.check()


def come_back(cluster: Cluster, order: tuple[str, ...]) -> None:
    for replica in order:
        cluster.start(replica)
        restart_and_settle(cluster)
        cluster.check()


def restart_and_settle(cluster: Cluster) -> None:
    """As the daemon does when it can: an engine that ended is followed by one of the next epoch."""
    for _ in range(4):
        if not cluster.running:
            if not cluster.store_alive:
                return
            cluster.start_engine()
        cluster.open()
        if cluster.running:
            cluster.fire(TimerKind.PULL_RETRY)
    cluster.check()


HISTORIES = (
    "all in sync",
    "one was out of date",
    "one lost its page cache",
    "the second loss is not recorded",
)


@pytest.mark.parametrize("engine", ["alive", "killed before", "killed after"])
@pytest.mark.parametrize("store", ["there", "away", "older"])
@pytest.mark.parametrize("history", HISTORIES)
def test_all_lost_and_back_in_every_order(history: str, store: str, engine: str) -> None:
    for order in permutations("ABC"):
        cluster = prepared(history)
        if engine == "killed before":
            cluster.crash_engine()
        lose_all(cluster, history)
        if engine == "killed after":
            cluster.crash_engine()
        if store == "away" and cluster.store_alive and cluster.running:
            cluster.store_down()
        if store == "older":
            if cluster.running:
                cluster.crash_engine()
            cluster.put_back_store(type(cluster.stored)(0, 0, frozenset("ABC")))
            cluster.store_alive = True
        come_back(cluster, order)
        if not cluster.store_alive and cluster.running:
            cluster.store_back()
        cluster.store_alive = True
        restart_and_settle(cluster)
        assert cluster.running and all(entry.in_sync for entry in cluster.volume.entries), order
        contents = [{half: w for half, w in r.content.items() if w} for r in cluster.replicas]
        assert contents[0] == contents[1] == contents[2], order
        assert all(contents[0].get(half, 0) >= write for half, write in cluster.acked.items())
        assert not cluster.hints.distrust_store
