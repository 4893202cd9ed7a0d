"""Switchable bugs, each of which the simulator must catch: the test of the test.

Owns the bugs, hunting each over seeds from 1 on, and the table in docs/testing-canaries.md. A bug is a patch
of the deciding code, of the model of the data plane, of the replica server or of the store, made while a run
lasts. The machine's own invariants are switched off with it where they would catch it at once: what is tested
is that a history, or a cluster that does not become healthy, gives it away.

Run: ``python -m tests.sim.canaries [--write FILE] [NAME ...]``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any
from unittest.mock import patch

from engine import events as ev
from engine import membership, opening
from engine.reconcile import Reconcile
from engine.replica_entry import ReplicaEntry
from engine.volume import Volume
from replica import epoch as epochs
from tests.sim.cluster import run_seed
from tests.sim.dataplane import DataPlane, Link, Read, Write
from tests.sim.kernel import Steps
from tests.sim.servers import ReplicaServer
from tests.sim.stores import Flushing, ModelStore
from tests.sim.themes import theme_of

SEEDS_MAX = 300
"""Within so many runs each bug must be caught."""

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Canary:
    name: str
    bug: str
    contract: str  # the promises it breaks
    patches: Callable[[], list[Patch]]
    invariants: bool = True  # False: the machine's own checks are off, since they would name it at once
    themes: tuple[
        str, ...
    ] = ()  # seeds of other themes are skipped: that costs time, and proves nothing more

    @contextmanager
    def alive(self) -> Iterator[None]:
        with ExitStack() as stack:
            for target, name, value in self.patches():
                stack.enter_context(patch.object(target, name, value, create=True))
            if not self.invariants:
                stack.enter_context(patch.object(Volume, "check_invariants", lambda self: None))
            yield


@dataclass(frozen=True)
class Caught:
    name: str
    seed: int  # 0: never
    how: str
    took_s: float


def hunt(name: str, seeds_max: int = SEEDS_MAX) -> Caught:
    """Run seeds with the bug until one fails."""
    canary = BY_NAME[name]
    began = time.monotonic()
    with canary.alive():
        for seed in range(1, seeds_max + 1):
            if canary.themes and theme_of(seed).name not in canary.themes:
                continue
            result = run_seed(seed)
            if result.failure:
                return Caught(name, seed, kind_of(result.failure), time.monotonic() - began)
    return Caught(name, 0, "not caught", time.monotonic() - began)


def kind_of(failure: str) -> str:
    for sign, kind in (
        ("older than the last flush", "flushed data is gone"),
        ("after a loss two different", "two values after a loss"),
        ("not linearizable", "a history that is no register"),
        ("replicas differ", "replicas differ at the end"),
        ("not healthy", "does not become healthy"),
        ("reads as a mix", "a block of two writes"),
        ("can't be read", "a block cannot be read"),
        ("unanswered", "requests stay unanswered"),
        ("does not answer reads", "requests stay unanswered"),
        ("Runaway", "does not come to rest"),
        ("two engines serve", "two engines in one epoch"),
    ):
        if sign in failure:
            return kind
    return "an assertion of the code under test"


# The data plane


def _finish_when(self: DataPlane, write: Write, enough: Callable[[Write], bool]) -> None:
    if not write.finished and self.members and write.ok & self.members and enough(write):
        self._finish(write, "")
    _judge(self, write)


_judge = DataPlane._judge
_answered = DataPlane._answered


def _ack_at_one() -> list[Patch]:
    return [(DataPlane, "_judge", lambda self, write: _finish_when(self, write, lambda w: True))]


def _flush_by_one() -> list[Patch]:
    return [(DataPlane, "_judge", lambda self, write: _finish_when(self, write, lambda w: w.region < 0))]


def _resend_backwards() -> list[Patch]:
    attach = DataPlane._attach

    def backwards(self: DataPlane, *args: Any) -> None:
        self.writes = dict(sorted(self.writes.items(), reverse=True))
        attach(self, *args)
        self.writes = dict(sorted(self.writes.items()))

    return [(DataPlane, "_attach", backwards)]


def _resend_nothing() -> list[Patch]:
    attach = DataPlane._attach

    def without(self: DataPlane, slot: int, *args: Any) -> None:
        kept, self.writes = self.writes, {}
        attach(self, slot, *args)
        self.writes = kept
        for write in list(kept.values()):
            write.ok.add(slot)
            self._judge(write)

    return [(DataPlane, "_attach", without)]


def _partial_does_not_wait() -> list[Patch]:
    must_wait = DataPlane._must_wait
    return [
        (DataPlane, "_must_wait", lambda self, r, touch: touch != "partial" and must_wait(self, r, touch))
    ]


def _unequal_is_read() -> list[Patch]:
    must_wait = DataPlane._must_wait
    return [(DataPlane, "_must_wait", lambda self, r, touch: touch != "read" and must_wait(self, r, touch))]


def _any_link_reads() -> list[Patch]:
    def choose(self: DataPlane, without: set[int]) -> int | None:
        slots = [slot for slot in sorted(self.links) if slot not in without]
        if not slots or not self.readers:
            return None
        self._turn += 1
        return slots[self._turn % len(slots)]

    return [(DataPlane, "_choose_reader", choose)]


def _hedge_from_stale() -> list[Patch]:
    def hedge(self: DataPlane, key: int, number: int) -> None:
        read = self.reads.get(key)
        if read is None or number not in read.asked or read.answered or self.stopped:
            return
        asked = {slot for slot, _ in read.asked.values()} | read.tried
        for slot in sorted(set(self.links) - asked):
            self._ask(read, slot)
            return

    return [(DataPlane, "_hedge", hedge)]


def _barrier_at_once() -> list[Patch]:
    def drained(self: DataPlane) -> None:
        for token, _ in self.barriers:
            self._event(ev.Drained(token))
        self.barriers.clear()

    return [(DataPlane, "_drained", drained)]


# The engine's decisions


def _with_globals(function: FunctionType, **changed: Any) -> FunctionType:
    """The same code, with other names behind it."""
    made = FunctionType(
        function.__code__, {**function.__globals__, **changed}, function.__name__, function.__defaults__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _stale_mark_after_ack() -> list[Patch]:
    def required(self: Volume) -> frozenset[str]:
        assert self.ledger is not None
        return self.ledger.latest.in_sync

    return [(Volume, "_required", required)]


def _no_reconcile() -> list[Patch]:
    def start(self: Volume, members: list[ReplicaEntry], regions: Any) -> None:
        if self._diverged or regions:
            self.act(ev.RegionsEqual(tuple(regions)))
        for entry in members:
            self.act(ev.CompleteRegions(entry.slot, entry.session, regions))

    return [(Volume, "_start_reconcile", start)]


def _two_sources() -> list[Patch]:
    def pull(self: Reconcile, source: ReplicaEntry) -> None:
        slots = [source.slot, *self._targets]
        for at, target in enumerate(self._targets.values()):
            while batch := target.plan.next_call():
                slot, session = target.entry.slot, target.entry.session
                self._host.act(ev.PullRegions(slot, session, slots[at], batch))

    return [(Reconcile, "_pull", pull)]


def _no_lease_wait() -> list[Patch]:
    init = opening.Opening.__init__

    def at_once(self: opening.Opening, spec: opening.VolumeSpec) -> None:
        init(self, spec)
        self.lease_over = True

    return [(opening.Opening, "__init__", at_once)]


def _suspect_ignored() -> list[Patch]:
    real = epochs.opened
    return [
        (epochs, "opened", lambda meta, **found: replace(real(meta, **found), suspect=False)),
        (epochs, "store_failed", lambda meta: meta),
        (ReplicaEntry, "suspect", False),
    ]


def _restored_ignored() -> list[Patch]:
    never = lambda report, known_opens: False  # noqa: E731
    real = epochs.opened
    return [
        (membership, "is_put_back", never),
        (opening, "is_put_back", never),
        (epochs, "opened", lambda meta, **found: replace(real(meta, **found), restored=False)),
    ]


def _changes_forgotten() -> list[Patch]:
    return [(ModelStore, "changed_since", lambda self, stamp: [])]


def _stamps_stay() -> list[Patch]:
    def set_stamp(self: ModelStore, stamp: Any) -> None:
        self.check_alive()
        self.stamp = stamp

    def is_marked(self: ModelStore, region: int) -> bool:
        known = self.regions.get(region)
        return known is not None and known.dirty

    return [(ModelStore, "set_stamp", set_stamp), (ModelStore, "is_marked", is_marked)]


# The replica server and its store


def _in_memory_only(name: str) -> Callable[[], list[Patch]]:
    """A step of the server whose durable write is left out: true until the process ends."""

    def patches() -> list[Patch]:
        step, persist = getattr(ReplicaServer, name), ReplicaServer._persist

        def remember(self: ReplicaServer, meta: Any) -> Steps:
            self.known = meta
            yield 0.0

        def without(self: ReplicaServer, *args: Any) -> Steps:
            self._persist = lambda meta: remember(self, meta)  # type: ignore[method-assign]
            try:
                return (yield from step(self, *args))
            finally:
                self._persist = lambda meta: persist(self, meta)  # type: ignore[method-assign]

        return [(ReplicaServer, name, without)]

    return patches


def _fsync_retried() -> list[Patch]:
    finish = ModelStore.finish_flush

    def retry(self: ModelStore, flushing: Flushing) -> None:
        if self.fail_sync:
            self.fail_sync = False
            self._lose_silently()  # and the second call says that all is well
            flushing = Flushing({}, flushing.sequence, flushing.cleaning)
        finish(self, flushing)

    return [(ModelStore, "finish_flush", retry)]


def _pull_over_fresh() -> list[Patch]:
    return [(ModelStore, "_note_fresh", lambda self, block: None)]


def _cleaned_early() -> list[Patch]:
    begin = ModelStore.begin_flush

    def eager(self: ModelStore, now_s: float, **clean: bool) -> Flushing:
        flushing = begin(self, now_s, **clean)
        return Flushing(flushing.blocks, flushing.sequence, self.dirty_regions())

    return [(ModelStore, "begin_flush", eager)]


def _repair_unconditional() -> list[Patch]:
    def repair(self: ModelStore, block: int, cells: Any, now_s: float) -> bool:
        self._may_write(block)
        self.bad.discard(block)
        self._put(block, cells, 0, now_s)
        return True

    delay = DataPlane._on_read_answer

    def late(self: DataPlane, link: Link, read: Read, number: int, status: int, value: Any) -> None:
        tried = set(read.tried)
        delay(self, link, read, number, status, value)
        if tried and read.answered:
            for slot in sorted(tried & set(self.links)):  # again, when newer writes may be there
                self.process.after(0.05, self._repair_late, slot, read.block, read.value)

    def repair_late(self: DataPlane, slot: int, block: int, value: Any) -> None:
        if slot in self.links and not self.stopped:
            self.last_id += 1
            self._send(self.links[slot], ("X", self.last_id, self.epoch, block, value))

    DataPlane._repair_late = repair_late  # type: ignore[attr-defined]
    return [(ModelStore, "repair", repair), (DataPlane, "_on_read_answer", late)]


def _flush_of_nothing() -> list[Patch]:
    return [(ModelStore, "is_flushed", True)]


CANARIES = [
    Canary("ack_at_one", "a write is acknowledged when one replica has it", "C7 C13", _ack_at_one),
    Canary(
        "flush_by_one",
        "a flush is answered when one replica has flushed",
        "C2",
        _flush_by_one,
        themes=("dark",),
    ),
    Canary(
        "stale_mark_after_ack",
        "acknowledged before the record without the lost replica is durable",
        "C13",
        _stale_mark_after_ack,
        invariants=False,
    ),
    Canary(
        "cleaned_early",
        "a region's mark is cleared though its writes are not on all replicas",
        "C9",
        _cleaned_early,
    ),
    Canary(
        "fsync_retried", "a failed sync is repeated and believed", "C15 C2", _fsync_retried, themes=("dark",)
    ),
    Canary(
        "pull_over_fresh",
        "a resync copies over what a client has just written",
        "C12",
        _pull_over_fresh,
        themes=("return",),
    ),
    Canary(
        "record_in_memory",
        "a record is answered before it is durable",
        "C13",
        _in_memory_only("_persist_record"),
        themes=("alone",),
    ),
    Canary(
        "reads_while_resyncing",
        "a replica serves reads before the record that names it",
        "C8",
        _any_link_reads,
    ),
    Canary(
        "no_reconcile", "dirty regions are believed to be equal after an engine's death", "C9", _no_reconcile
    ),
    Canary("two_sources", "members are made equal to different sources", "C9", _two_sources),
    Canary("unequal_is_read", "a region is read before it was made equal", "C9", _unequal_is_read),
    Canary(
        "partial_does_not_wait",
        "part of a block is written to a replica that lacks the rest",
        "C1",
        _partial_does_not_wait,
        themes=("return",),
    ),
    Canary(
        "lease_never_expires",
        "an engine answers reads however long it has heard from nobody",
        "C11",
        lambda: [(DataPlane, "_lease_holds", lambda self, age_s: True)],
        themes=("takeover",),
    ),
    Canary(
        "no_lease_wait",
        "a new engine serves at once, whoever may still be answering reads",
        "C11",
        _no_lease_wait,
        themes=("takeover",),
    ),
    Canary(
        "restored_ignored",
        "a directory that was put back is believed",
        "C8",
        _restored_ignored,
        themes=(
            "dark",
            "deaths",
        ),
    ),
    Canary("suspect_ignored", "a replica whose machine lost power is believed", "C8 C15", _suspect_ignored),
    Canary(
        "resend_backwards", "unfinished writes are sent again in the wrong order", "C12", _resend_backwards
    ),
    Canary("resend_nothing", "a link that returns does not get the unfinished writes", "C7", _resend_nothing),
    Canary(
        "hedge_from_stale",
        "a slow read is asked of whoever has a link",
        "C8",
        _hedge_from_stale,
        themes=("return",),
    ),
    Canary(
        "repair_unconditional",
        "a repair writes whatever is there by now",
        "C12 C16",
        _repair_unconditional,
        themes=(
            "dark",
            "deaths",
        ),
    ),
    Canary(
        "read_undecided",
        "a read shows a write that not all members have",
        "C9",
        lambda: [(DataPlane, "_undecided", lambda self, read: False)],
        themes=("deaths",),
    ),
    Canary(
        "changes_forgotten",
        "a resync copies only what the returning replica marked itself",
        "C8",
        _changes_forgotten,
    ),
    Canary("stamps_stay", "regions keep the stamp under which they were first written", "C8", _stamps_stay),
    Canary(
        "barrier_at_once",
        "a resync does not wait for writes from before its link",
        "C8",
        _barrier_at_once,
        themes=("return",),
    ),
    Canary("flush_of_nothing", "a flush syncs nothing", "C2", _flush_of_nothing),
]

BY_NAME = {canary.name: canary for canary in CANARIES}
assert len(BY_NAME) == len(CANARIES)


HEAD = f"""# Canaries

Each row is a bug that can be switched on (`tests/sim/canaries.py`). `make sim-canaries` switches on
one after the other and runs simulated clusters, seed by seed from 1 on, until one fails. It writes this
table, and fails if a bug survives {SEEDS_MAX} seeds. Where a bug needs certain faults to do harm, seeds of
other themes (`tests/sim/themes.py`) are skipped, but counted. The machine's own invariants are off where
they would name a bug at once.

Some bugs the simulator does not meet often enough, and other tests catch them: an open that ignores an
unreachable majority (`tests/engine/test_open_rule.py` goes through every case), an epoch that is checked at
receipt only, a claim that is not persisted (`tests/replica/test_calls.py`, `tests/replica/test_process.py`).

| canary | the bug | breaks | what gives it away first | seeds needed |
|---|---|---|---|---|
"""


def table(caught: list[Caught]) -> str:
    rows = ""
    for one in caught:
        canary = BY_NAME[one.name]
        cells = (f"`{one.name}`", canary.bug, canary.contract, one.how, str(one.seed or "none"))
        rows += f"| {' | '.join(cells)} |\n"
    return HEAD + rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.canaries")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", default="", help="where the table goes")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.names or [canary.name for canary in CANARIES]
    with ProcessPoolExecutor(arguments.processes) as pool:
        caught = []
        for one in pool.map(hunt, names, [arguments.seeds] * len(names)):
            print(f"{one.name:24} {one.seed or '-':>4} {one.how} ({one.took_s:.0f} s)", flush=True)
            caught.append(one)
    if arguments.write:
        with open(arguments.write, "w", encoding="utf-8") as file:
            file.write(table(caught))
    return 0 if all(one.seed for one in caught) else 1


if __name__ == "__main__":
    sys.exit(main())
