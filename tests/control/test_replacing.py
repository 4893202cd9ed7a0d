"""A replica that is gone gives its place to a new one: plan, document, who counts as gone, the daemon."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from control.documents import Document
from control.model import Attachment, Replacement, ReplicaPlace, Volume
from control.placement import NodeSpace
from control.reconcile import (
    BeginReplacement,
    CreateReplica,
    DeleteReplica,
    DropReplacement,
    EngineSeen,
    NodeState,
    Plan,
    RemoveRetired,
    Seen,
    SwapReplica,
    plan,
)
from control.replacing import GoneWatch, begin, choose_node, drop, forget_retired, new_place, swap
from control.sqlite_store import SqliteStore
from protocol.errors import BadRequest, NotEnoughNodes, ReplicaNotFound, Unreachable
from tests.control.daemons import fake_cluster
from tests.control.test_reconcile import CREATED, SIZE, attachment, granted, serving, volume
from tests.support.processes import kill, wait_until

NODES = ("node1", "node2", "node3", "node4")
ALL_UP = dict.fromkeys(NODES, NodeState.UP)
LEFT = {"epoch": 3, "version": 2, "in_sync": ["data-r1", "data-r3"]}
ALL = {"epoch": 3, "version": 3, "in_sync": ["data-r1", "data-r3", "data-r4"]}
NEW = ReplicaPlace(id="data-r4", node="node4")


def degraded(*, replacing: bool = False, **status: Any) -> Volume:
    made = volume(**{"record": LEFT, "grant": granted(3), **status})
    if replacing:
        wish = Replacement(old="data-r2", new=NEW).model_dump(mode="json")
        made = Volume(made.document.with_spec(replacing=wish))
    return made


def planned(v: Volume, a: Attachment | None = None, **seen: Any) -> Plan:
    return plan(v, a, Seen(**{"nodes": ALL_UP, "engine": serving(3) if a else None, **seen}))


def test_a_replica_that_is_gone_long_enough_is_replaced() -> None:
    gone = {"data-r2": 599.0}
    made = planned(degraded(), attachment(), gone_s=gone)
    assert made.actions == [] and made.wake_in_s == pytest.approx(1.0)
    assert [c.reason for c in made.conditions] == ["replica_gone"]
    made = planned(degraded(), attachment(), gone_s={"data-r2": 600.0})
    assert made.actions == [BeginReplacement("data-r2")]


@pytest.mark.parametrize(
    "seen",
    [
        {"gone_s": {"data-r2": 9e9}, "replace_after_s": 0.0},  # never
        {"gone_s": {"data-r1": 9e9}},  # named in sync: whatever its server looks like
        {"gone_s": {}},
    ],
)
def test_a_replica_is_not_replaced_without_a_reason(seen: dict[str, Any]) -> None:
    assert planned(degraded(), attachment(), **seen).actions == []
    assert planned(degraded(), None, gone_s={"data-r2": 9e9}).actions == [], "nobody would fill it"


def test_with_nowhere_to_go_it_is_said_and_what_to_do() -> None:
    three = dict.fromkeys(NODES[:3], NodeState.UP)
    made = planned(degraded(), attachment(), nodes=three, gone_s={"data-r2": 9e9})
    assert made.actions == []
    (condition,) = made.conditions
    assert condition.reason == "no_spare_node" and "--nodes 4" in condition.waits_for


def test_the_steps_of_a_replacement_follow_from_what_is_there() -> None:
    wish = degraded(replacing=True)
    assert planned(wish, attachment()).actions == [CreateReplica("data-r4", "node4", SIZE)]
    made = degraded(replacing=True, replica_size_bytes={**CREATED, "data-r4": SIZE})
    assert planned(made, attachment()).actions == [SwapReplica("data-r2", "data-r4")]
    assert planned(made).actions == [SwapReplica("data-r2", "data-r4")], "detached: the document is all"
    starting = EngineSeen(3, SIZE, answering=False, silent_s=0.0)
    assert SwapReplica("data-r2", "data-r4") not in planned(made, attachment(), engine=starting).actions
    back = degraded(replacing=True, record={**LEFT, "in_sync": ["data-r1", "data-r2", "data-r3"]})
    assert planned(back, attachment()).actions == [DropReplacement("data-r2")]


def test_what_was_replaced_is_deleted_only_when_all_are_well_and_its_node_is_up() -> None:
    done = volume(record=ALL, replica_size_bytes={**CREATED, "data-r4": SIZE},
                  retired=[{"id": "data-r2", "node": "node2"}])  # fmt: skip
    places = [{"id": "data-r1", "node": "node1"}, NEW.model_dump(), {"id": "data-r3", "node": "node3"}]
    done = Volume(done.document.with_spec(replicas=places))
    assert planned(done).actions == [RemoveRetired("data-r2", "node2")]
    assert planned(done, nodes={**ALL_UP, "node2": NodeState.DOWN}).actions == []
    filling = Volume(done.document.with_status(record=LEFT))
    assert planned(filling).actions == [], "an old copy may be somebody's last resort"
    removed = Volume(done.document.with_spec(deleting=True))
    assert DeleteReplica("data-r2", "node2") in planned(removed).actions, "nothing is left behind"


# The document


def run_changes(path: Path, *changes: Any) -> Volume:
    async def run() -> Volume:
        store = await SqliteStore.open(path / "state.db")
        try:
            await store.put(Document("volume", "data", degraded().document.spec, degraded().document.status))
            for change in changes:
                await change(store)
            document = await store.get("volume", "data")
            assert document is not None
            return Volume(document)
        finally:
            await store.close()

    return asyncio.run(run())


async def note_created(store: SqliteStore) -> None:
    document = await store.get("volume", "data")
    assert document is not None
    await store.put(document.with_status(replica_size_bytes={**CREATED, "data-r4": SIZE}))


async def come_back(store: SqliteStore) -> None:
    document = await store.get("volume", "data")
    assert document is not None
    await store.put(document.with_status(record={**LEFT, "in_sync": ["data-r1", "data-r2", "data-r3"]}))


def test_the_new_one_takes_the_place_and_no_record_can_name_the_old_one(tmp_path: Path) -> None:
    def begun(s: SqliteStore) -> Any:
        return begin(s, "data", "data-r2", NEW)

    def swapped(s: SqliteStore) -> Any:
        return swap(s, "data", "data-r2")

    done = run_changes(tmp_path, begun, begun, note_created, swapped, swapped)
    assert [place.id for place in done.spec.replicas] == ["data-r1", "data-r4", "data-r3"]
    assert done.spec.replacing is None
    assert [place.id for place in done.status.retired] == ["data-r2"]
    assert "data-r2" not in done.status.replica_size_bytes
    assert done.status.forked == ("data-r4",), "compared as a whole until a record names it"
    assert new_place(done, "node5").id == "data-r5"


def test_ids_are_never_used_twice(tmp_path: Path) -> None:
    done = run_changes(
        tmp_path,
        lambda s: begin(s, "data", "data-r2", NEW),
        note_created,
        lambda s: swap(s, "data", "data-r2"),
        lambda s: forget_retired(s, "data", "data-r2"),
        lambda s: begin(s, "data", "data-r4", ReplicaPlace(id="data-r5", node="node2")),
    )
    only = Volume(done.document.with_spec(replicas=[{"id": "data-r1", "node": "node1"}], replacing=None))
    assert new_place(only, "node3").id == "data-r6"


def test_who_is_named_in_sync_by_now_keeps_its_place(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="in sync"):
        run_changes(
            tmp_path,
            lambda s: begin(s, "data", "data-r2", NEW),
            note_created,
            come_back,
            lambda s: swap(s, "data", "data-r2"),
        )
    (tmp_path / "2").mkdir()
    done = run_changes(
        tmp_path / "2",
        lambda s: begin(s, "data", "data-r2", NEW),
        note_created,
        come_back,
        lambda s: drop(s, "data", "data-r2"),
    )
    assert done.spec.replacing is None and [p.id for p in done.status.retired] == ["data-r4"]
    assert "data-r4" not in done.status.replica_size_bytes


def test_a_wish_is_aimed_elsewhere_only_before_the_new_one_is_made(tmp_path: Path) -> None:
    other = ReplicaPlace(id="data-r5", node="node5")
    done = run_changes(
        tmp_path, lambda s: begin(s, "data", "data-r2", NEW), lambda s: begin(s, "data", "data-r2", other)
    )
    assert done.spec.replacing is not None and done.spec.replacing.new == other
    assert done.status.retired == (NEW,)
    (tmp_path / "2").mkdir()
    done = run_changes(
        tmp_path / "2",
        lambda s: begin(s, "data", "data-r2", NEW),
        note_created,
        lambda s: begin(s, "data", "data-r2", other),
    )
    assert done.spec.replacing is not None and done.spec.replacing.new == NEW


def test_the_best_node_is_chosen_and_none_is_an_answer_too() -> None:
    def spaces(*names: str) -> list[NodeSpace]:
        return [NodeSpace(name, True, (10 + at) * 2**30, 0) for at, name in enumerate(names)]

    assert choose_node(degraded(), spaces(*NODES, "node5")) == "node5"
    with pytest.raises(NotEnoughNodes, match=r"nowhere to go.*--nodes 4"):
        choose_node(degraded(), spaces(*NODES[:3]))


# Who is gone


class FakeServers:
    def __init__(self) -> None:
        self.state = NodeState.UP
        self.answer: Any = {"state": "open"}

    def states(self) -> dict[str, NodeState]:
        return {**ALL_UP, "node2": self.state}

    def link(self, node: str) -> Any:
        return self

    async def call(self, name: str, **_: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_who_is_gone_and_since_when() -> None:
    now = [100.0]
    watch, servers = GoneWatch(lambda: now[0]), FakeServers()

    def look(state: NodeState, answer: Any = None) -> float | None:
        servers.state, servers.answer = state, answer
        asyncio.run(watch.look(degraded(), servers))
        now[0] += 10
        return watch.gone_s().get("data-r2")

    assert look(NodeState.UP, {"state": "open"}) is None and watch.watching
    assert look(NodeState.STOPPED) is None, "somebody stopped it and will start it"
    assert look(NodeState.DOWN) == 10
    assert look(NodeState.STARTING) == 20, "a server that dies again and again does not begin anew"
    assert look(NodeState.UP, Unreachable(peer="it", reason="busy")) == 30
    assert look(NodeState.UP, ReplicaNotFound(volume="v")) == 40, "its directory is gone"
    assert look(NodeState.UP, {"state": "damaged"}) == 50
    assert look(NodeState.UP, {"state": "open"}) is None
    asyncio.run(watch.look(volume(), servers))
    assert not watch.watching, "all in sync: nobody is asked any more"


# The daemon


def test_a_replica_is_replaced_by_itself_after_the_time_that_was_set() -> None:
    with fake_cluster(4, replace_after_s=0.2) as cluster:
        client = cluster.client
        client.create_volume("data", SIZE, 3)
        old = {r["id"]: r["node"] for r in client.volume("data")["replicas"]}["data-r2"]
        spare = next(n["name"] for n in client.nodes() if n["replica_count"] == 0)
        file = cluster.layout.disk_dir(old) / "fake.json"
        volumes = json.loads(file.read_text())
        cluster.layout.volume_dir("data").mkdir(parents=True, exist_ok=True)
        (cluster.layout.volume_dir("data") / "gone").write_text("data-r2")
        client.stop_node(old)
        client.attach("data")
        assert client.volume("data")["membership"]["in_sync"] == ["data-r1", "data-r3"]
        file.write_text("{}")  # its disk is not what it was
        client.start_node(old)

        def done() -> bool:
            return bool(
                {r["id"]: r["node"] for r in client.volume("data")["replicas"]}.get("data-r4") == spare
            )

        wait_until(done, what="the replacement")
        wait_until(lambda: client.volume("data")["state"] == "healthy", what="health")
        assert len(volumes) == 1 and client.volume("data")["membership"]["in_sync"][-1] == "data-r4"


def test_a_replacement_is_refused_with_the_reason() -> None:
    with fake_cluster(3) as cluster:
        client = cluster.client
        client.create_volume("data", SIZE, 3)
        client.attach("data")
        with pytest.raises(BadRequest, match="named in sync"):
            client.replace_replica("data", "data-r2")
        with pytest.raises(BadRequest, match="no replica"):
            client.replace_replica("data", "data-r9")
        (cluster.layout.volume_dir("data") / "gone").write_text("data-r2")
        for pid in cluster.engine_pids("data"):
            kill(pid)
        wait_until(
            lambda: len(client.volume("data")["membership"]["in_sync"]) == 2, what="an engine without data-r2"
        )
        with pytest.raises(NotEnoughNodes, match="nowhere to go"):
            client.replace_replica("data", "data-r2")
        with pytest.raises(BadRequest, match="Name another one"):
            client.replace_replica("data", "data-r2", to="node1")
        assert "data-r2" in {r["id"] for r in client.volume("data")["replicas"]}, "nothing was changed"


def test_a_dry_run_says_what_would_be_done_and_does_nothing() -> None:
    with fake_cluster(4) as cluster:
        client = cluster.client
        client.create_volume("data", SIZE, 3)
        (cluster.layout.volume_dir("data")).mkdir(parents=True, exist_ok=True)
        (cluster.layout.volume_dir("data") / "gone").write_text("data-r2")
        client.attach("data")
        said = client.replace_replica("data", "data-r2", dry_run=True, wait_s=0.0)
        assert (said["new"], said["node"], said["dry_run"]) == ("data-r4", "node4", True)
        assert {r["id"] for r in client.volume("data")["replicas"]} == {"data-r1", "data-r2", "data-r3"}
