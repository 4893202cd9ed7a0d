"""The daemon is killed at every step of create, attach, resize, detach and delete, again and again.

Each life ends at a step drawn from a seed. What was asked for must be reached by the lives after it,
with one engine at most, and nothing left over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from protocol.errors import BadRequest, DaemonUnreachable, StorageError, VolumeNotFound
from tests.control.daemons import FakeCluster, fake_cluster
from tests.support.processes import kill, wait_until

GIB = 1024**3
LIVES_MAX = 40
STEPS_MAX = 9
"""A create alone has six steps: three answers, three notes."""


class Story:
    """Asks for one thing until it is so, starting the daemon again whenever it died."""

    def __init__(self, cluster: FakeCluster, random: Random) -> None:
        self.cluster = cluster
        self.random = random
        self.deaths = 0

    def reach(self, ask: Callable[[], Any], reached: Callable[[], bool]) -> None:
        if not self.cluster.has_died():
            self.cluster.kill_daemon()
        for life in range(LIVES_MAX):
            self._next_life(last=life > LIVES_MAX // 2)
            try:
                ask()
                if reached():
                    return
            except DaemonUnreachable:
                wait_until(self.cluster.has_died, what="the daemon's death")
                self.deaths += 1
        raise AssertionError(f"not reached in {LIVES_MAX} lives")

    def _next_life(self, *, last: bool) -> None:
        if not self.cluster.has_died():
            return
        # Some lives are too short to get anywhere; late ones are not cut, so that the story ends.
        self.cluster.start(wait=False, die_at=0 if last else self.random.randint(1, STEPS_MAX))
        wait_until(lambda: self.answers() or self.cluster.has_died(), what="the daemon to answer or die")

    def answers(self) -> bool:
        try:
            return bool(self.cluster.client.health()["ready"])
        except StorageError:
            return False

    def state(self) -> str:
        try:
            return str(self.cluster.client.volume("data")["state"])
        except VolumeNotFound:
            return "gone"


@pytest.mark.parametrize("seed", range(1))
def test_every_goal_is_reached_whatever_the_daemon_was_killed_at(seed: int) -> None:
    with fake_cluster(4, start=False) as cluster:
        cluster.start()
        cluster.kill_daemon()
        story = Story(cluster, Random(seed))
        client = cluster.client

        story.reach(lambda: client.create_volume("data", GIB, 3), lambda: story.state() == "detached")
        story.reach(lambda: client.attach("data"), lambda: story.state() == "healthy")
        story.reach(
            lambda: client.resize("data", 2 * GIB), lambda: client.volume("data")["size_bytes"] == 2 * GIB
        )
        assert len(cluster.engine_pids("data")) == 1
        gone = replaced(story, cluster)
        story.reach(lambda: client.detach("data"), lambda: story.state() == "detached")
        assert cluster.engine_pids("data") == [] and not cluster.layout.nbd_socket("data").exists()

        def delete() -> None:
            try:
                client.delete_volume("data")
            except VolumeNotFound:
                pass  # an earlier life did it

        story.reach(delete, lambda: story.state() == "gone")
        assert story.deaths >= 3, "too few kills to prove anything"
        if not cluster.has_died():
            cluster.kill_daemon()
        cluster.start()
        assert client.volumes() == [] and not cluster.layout.volume_dir("data").exists()
        assert len(cluster.all_pids()) == 4  # the replica servers
        assert held_by(cluster, gone) == {}, "what was replaced was deleted as well"


def replaced(story: Story, cluster: FakeCluster) -> str:
    """A replica is gone, and replaced by one on the fourth node. Returns the node it was on."""
    client = cluster.client
    if cluster.has_died():
        cluster.start()
    view = client.volume("data")
    old = next(r for r in view["replicas"] if r["id"] == "data-r2")
    (cluster.layout.volume_dir("data") / "gone").write_text("data-r2")
    for pid in cluster.engine_pids("data"):
        kill(pid)  # the next engine starts without it

    def left() -> bool:
        found: list[str] = client.volume("data")["membership"]["in_sync"]
        return found == ["data-r1", "data-r3"]

    story.reach(lambda: None, left)

    def ask() -> None:
        try:
            client.replace_replica("data", "data-r2")
        except BadRequest:
            pass  # an earlier life did it: there is no data-r2 any more

    def reached() -> bool:
        view = client.volume("data")
        return (
            sorted(r["id"] for r in view["replicas"]) == ["data-r1", "data-r3", "data-r4"]
            and view["membership"]["in_sync"] == ["data-r1", "data-r3", "data-r4"]
            and view["state"] == "healthy"
            and held_by(cluster, old["node"]) == {}
        )

    def settled() -> bool:
        try:
            wait_until(reached, what="the replacement", timeout_s=3.0)
        except TimeoutError:
            return False
        return True

    story.reach(ask, settled)
    assert len(cluster.engine_pids("data")) == 1
    return str(old["node"])


def held_by(cluster: FakeCluster, node: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cluster.layout.disk_dir(node) / "fake.json").read_text())
    return found
