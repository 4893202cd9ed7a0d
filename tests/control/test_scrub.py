"""The scrub of a volume: the round trip between replicas and engine, and what is told at the end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from control.scrub import (
    AWAY_S_MAX,
    KEEPER_INTERVAL_S,
    REPAIR_BATCH_BLOCKS,
    DamageKeeper,
    VolumeScrub,
    note_unreadable,
)
from control.views import ScrubResult, ScrubVerdict
from protocol.errors import Unreachable, VolumeNotAttached
from protocol.limits import BLOCK_BYTES


@dataclass
class FakeReplica:
    """Finds one damaged block per look; a pass takes as many looks as it has regions."""

    damaged: set[int] = field(default_factory=set)
    known: set[int] = field(default_factory=set)
    regions: int = 3
    position: int = 0
    running: bool = False
    passes: int = 0
    dead_for: int = 0  # calls that fail before it answers again
    gives_up: bool = False

    def answer(self, call: str, args: dict[str, Any]) -> Any:
        if self.dead_for:
            self.dead_for -= 1
            raise Unreachable(peer="it", reason="killed")
        if call == "replica.damaged":
            if args["check"]:
                self.known &= self.damaged
            return {"blocks": sorted(self.known), "all_checked": args["check"]}
        assert call == "replica.scrub"
        if args["action"] == "start":
            self.running, self.position = True, 0
        elif self.running:
            self.position += 1
            self.known |= {block for block in self.damaged if block < self.position * 1024}
            if self.position == self.regions or self.gives_up:
                self.running, self.position = False, 0
                self.passes += not self.gives_up
        return {
            "state": "asked" if self.running else "none",
            "position": self.position,
            "total": self.regions,
            "blocks_verified": 10,
            "damaged_count": len(self.known),
            "passes": self.passes,
        }


@dataclass
class Scene:
    replicas: dict[str, FakeReplica]
    attached: bool = True
    unreadable: set[int] = field(default_factory=set)
    orders: list[tuple[str, list[int]]] = field(default_factory=list)
    stuck: bool = False
    now_s: float = 0.0

    async def ask(self, replica: str, call: str, **args: Any) -> Any:
        return self.replicas[replica].answer(call, args)

    async def repair(self, replica: str, blocks: list[int]) -> Any:
        if not self.attached:
            raise VolumeNotAttached(volume="data")
        self.orders.append((replica, blocks))
        if self.stuck:
            return {"repaired": [], "unreadable": [], "left": blocks, "reason": "no answer within 10 s"}
        self.replicas[replica].damaged -= set(blocks) - self.unreadable
        return {
            "repaired": [],
            "unreadable": sorted(self.unreadable.intersection(blocks)),
            "left": [],
            "reason": "",
        }

    async def pause(self, seconds: float) -> None:
        self.now_s += seconds

    def run(self) -> ScrubResult:
        scrub = VolumeScrub(
            dict.fromkeys(self.replicas, "node"),
            ask=self.ask,
            repair=self.repair,
            now_s=lambda: self.now_s,
            pause=self.pause,
        )
        asyncio.run(scrub.run())
        assert scrub.progress.done <= scrub.progress.total
        return scrub.result(attached=self.attached)


def test_without_damage_it_is_clean() -> None:
    scene = Scene({"a": FakeReplica(), "b": FakeReplica()})
    result = scene.run()
    assert result.verdict is ScrubVerdict.CLEAN and not scene.orders
    assert [(r.id, r.scrubbed, r.blocks_verified) for r in result.replicas] == [
        ("a", True, 10),
        ("b", True, 10),
    ]


def test_what_is_found_is_repaired_and_said_so_only_after_a_check() -> None:
    scene = Scene({"a": FakeReplica({5, 2000}), "b": FakeReplica()})
    result = scene.run()
    assert result.verdict is ScrubVerdict.REPAIRED
    a = result.replicas[0]
    assert (a.found_count, a.left_count) == (2, 0)
    assert [(f.block_index, f.offset_bytes, f.repaired) for f in a.findings] == [
        (5, 5 * BLOCK_BYTES, True),
        (2000, 2000 * BLOCK_BYTES, True),
    ]
    assert {replica for replica, _ in scene.orders} == {"a"}


def test_a_block_without_a_good_copy_is_left_and_named_unreadable() -> None:
    scene = Scene({"a": FakeReplica({5, 6}), "b": FakeReplica({5})}, unreadable={5})
    result = scene.run()
    assert result.verdict is ScrubVerdict.DAMAGED
    assert [(f.block_index, f.repaired, f.unreadable) for f in result.replicas[0].findings] == [
        (5, False, True),
        (6, True, False),
    ]
    assert [r.left_count for r in result.replicas] == [1, 1]


def test_on_a_detached_volume_damage_is_listed_and_left() -> None:
    result = Scene({"a": FakeReplica({5})}, attached=False).run()
    assert result.verdict is ScrubVerdict.DAMAGED and not result.attached
    assert [(f.block_index, f.repaired, f.unreadable) for f in result.replicas[0].findings] == [
        (5, False, False)
    ]


def test_an_engine_that_gets_nowhere_is_asked_once_and_the_reason_is_told() -> None:
    scene = Scene({"a": FakeReplica({5, 6})}, stuck=True)
    result = scene.run()
    assert result.verdict is ScrubVerdict.DAMAGED
    assert result.replicas[0].reason == "no answer within 10 s"
    assert len(scene.orders) <= 2  # when it was found, and at the end


def test_many_blocks_are_ordered_in_bounded_batches() -> None:
    scene = Scene({"a": FakeReplica(set(range(1, 1000)))})
    assert scene.run().replicas[0].left_count == 0
    assert max(len(blocks) for _, blocks in scene.orders) == REPAIR_BATCH_BLOCKS


def test_a_server_that_comes_back_soon_is_waited_for() -> None:
    replica = FakeReplica({5})
    scene = Scene({"a": replica, "b": FakeReplica()})
    original = replica.answer

    def dies_once(call: str, args: dict[str, Any]) -> Any:
        if replica.position == 1 and replica.dead_for == 0 and "died" not in vars(replica):
            replica.died = True  # type: ignore[attr-defined]
            replica.dead_for = 20
        return original(call, args)

    replica.answer = dies_once  # type: ignore[method-assign]
    assert scene.run().verdict is ScrubVerdict.REPAIRED


def test_a_server_that_stays_away_is_left_out_with_the_reason() -> None:
    scene = Scene({"a": FakeReplica(), "b": FakeReplica(dead_for=10**6)})
    result = scene.run()
    assert result.verdict is ScrubVerdict.INCOMPLETE
    assert (result.replicas[1].scrubbed, "killed" in result.replicas[1].reason) == (False, True)
    late = FakeReplica()
    scene = Scene({"a": late})
    original = late.answer

    def dies(call: str, args: dict[str, Any]) -> Any:
        if args.get("action") == "status":
            raise Unreachable(peer="it", reason="killed")
        return original(call, args)

    late.answer = dies  # type: ignore[method-assign]
    assert scene.run().verdict is ScrubVerdict.INCOMPLETE
    assert scene.now_s == pytest.approx(AWAY_S_MAX, abs=1)


def test_a_pass_that_was_given_up_is_not_called_done() -> None:
    result = Scene({"a": FakeReplica(gives_up=True)}).run()
    assert result.verdict is ScrubVerdict.INCOMPLETE
    assert "stopped" in result.replicas[0].reason


# -- the keeper


@dataclass
class Kept(Scene):
    looks: int = 0

    def keeper(self) -> DamageKeeper:
        async def known() -> list[tuple[str, str, str, int]]:
            self.looks += 1
            return [("data", r, "node", len(replica.known)) for r, replica in self.replicas.items()]

        return DamageKeeper(
            known,
            ask=lambda volume, replica: self.ask,
            repair=lambda volume: self.repair,
            now_s=lambda: self.now_s,
        )


def test_what_replicas_know_is_repaired_without_being_asked() -> None:
    scene = Kept({"a": FakeReplica({5}, known={5}), "b": FakeReplica()})
    asyncio.run(scene.keeper().look())
    assert scene.orders == [("a", [5])]
    assert not scene.replicas["a"].known


def test_damage_that_nothing_repairs_is_tried_ever_more_rarely_until_something_changes() -> None:
    scene = Kept({"a": FakeReplica({5}, known={5})}, unreadable={5})

    async def rounds() -> list[float]:
        keeper, tried = scene.keeper(), []
        for _ in range(200):
            before = len(scene.orders)
            await keeper.look()
            if len(scene.orders) > before:
                tried.append(scene.now_s)
            scene.now_s += KEEPER_INTERVAL_S
        before = len(scene.orders)
        keeper.wake()
        await keeper.look()
        assert len(scene.orders) > before
        return tried

    tried = asyncio.run(rounds())
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert pauses == sorted(pauses) and pauses[0] == KEEPER_INTERVAL_S and pauses[-1] == 3600
    assert 5 < len(tried) < 15


def test_a_block_that_nobody_has_is_known_until_it_is_repaired() -> None:
    known: dict[str, set[int]] = {}
    note_unreadable(known, "a", [1, 2, 3], {"unreadable": [2, 3, 99, "x"]})
    assert known == {"a": {2, 3}}
    note_unreadable(known, "a", [2], {"unreadable": []})  # it was written anew
    note_unreadable(known, "b", [5], None)
    assert known == {"a": {3}}
    note_unreadable(known, "a", [3], {"repaired": [3], "unreadable": []})
    assert known == {}
