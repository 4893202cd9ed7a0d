"""The open and commit rules, enumerated for every number of replicas there may be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations

import pytest

from engine.events import ReplicaReport
from engine.membership import Ledger, MayOpen, MustWait, decide_open
from protocol.limits import REPLICAS_MAX
from protocol.membership import MembershipRecord, majority

IDS = "ABCDE"
COUNTS = range(1, REPLICAS_MAX + 1)


def subsets(ids: str) -> Iterator[frozenset[str]]:
    sizes = range(len(ids) + 1)
    return (frozenset(s) for s in chain.from_iterable(combinations(ids, size) for size in sizes))


def record(epoch: int, version: int, in_sync: str | frozenset[str]) -> MembershipRecord:
    return MembershipRecord(epoch, version, frozenset(in_sync))


def report(
    replica_id: str,
    held: MembershipRecord,
    *,
    epoch: int | None = None,
    suspect: bool = False,
    state: str = "open",
    restored: bool = False,
) -> ReplicaReport:
    return ReplicaReport(
        replica_id=replica_id,
        size_bytes=1 << 30,
        epoch=held.epoch if epoch is None else epoch,
        record=held,
        synced_at=held.stamp,
        process_id="p",
        suspect=suspect,
        state=state,
        reason="",
        opens=1,
        restored=restored,
    )


@pytest.mark.parametrize("count", COUNTS)
def test_no_open_misses_a_record_that_was_committed_without_the_state_store(count: int) -> None:
    # The store knows K. Any removal that leaves a majority may have been committed without it, and a chain
    # of them ends in some H. Whoever is reachable: if the volume opens, all it opens with are in H.
    ids = IDS[:count]
    for known in subsets(ids):
        if not known:
            continue
        stored = record(1, 1, known)
        for hidden in subsets(ids):
            if not (hidden < known and len(hidden) >= majority(count)):
                continue
            for reachable in subsets(ids):
                # Members of H hold it, the others are as old as they may be.
                reports = {
                    r: report(r, record(1, 2, hidden) if r in hidden else stored) for r in sorted(reachable)
                }
                decision = decide_open(stored, reports, ids)
                if isinstance(decision, MayOpen):
                    assert decision.members <= hidden, (known, hidden, reachable)


@pytest.mark.parametrize("count", COUNTS)
def test_an_open_waits_only_while_a_majority_of_the_members_is_missing(count: int) -> None:
    ids = IDS[:count]
    stored = record(1, 1, ids)
    for reachable in subsets(ids):
        reports = {r: report(r, stored) for r in reachable}
        decision = decide_open(stored, reports, ids)
        if not reachable or len(ids) - len(reachable) >= majority(count):
            assert isinstance(decision, MustWait)
            assert decision.waiting_for == frozenset(ids) - reachable
        else:
            assert decision == MayOpen(stored, reachable, frozenset(ids) - reachable)


def test_a_fresh_volume_opens_although_its_replicas_name_nobody() -> None:
    stored = record(0, 0, "ABC")
    blank = {r: report(r, record(0, 0, "")) for r in "ABC"}
    assert decide_open(stored, blank, "ABC") == MayOpen(stored, frozenset("ABC"), frozenset())


def test_an_empty_disk_is_not_a_member() -> None:
    stored = record(3, 1, "AB")
    blank = report("A", record(0, 0, ""), epoch=0)
    assert isinstance(decide_open(stored, {"A": blank}, "AB"), MustWait)
    other = report("B", stored)
    decision = decide_open(stored, {"A": blank, "B": other}, "AB")
    assert isinstance(decision, MayOpen) and decision.members == {"B"}


def test_a_damaged_member_does_not_count() -> None:
    stored = record(3, 1, "ABC")
    reports = {r: report(r, stored) for r in "AB"} | {"C": report("C", stored, state="damaged")}
    decision = decide_open(stored, reports, "ABC")
    assert isinstance(decision, MayOpen) and decision.members == {"A", "B"}


def test_a_suspect_member_stays_out_while_another_is_certain() -> None:
    stored = record(3, 1, "ABC")
    reports = {"A": report("A", stored, suspect=True), "B": report("B", stored)}
    decision = decide_open(stored, reports, "ABC")
    assert isinstance(decision, MayOpen) and decision.members == {"B"}


def test_suspects_alone_open_only_all_together() -> None:
    stored = record(3, 1, "ABC")
    suspects = {r: report(r, stored, suspect=True) for r in "ABC"}
    assert isinstance(decide_open(stored, suspects, "ABC"), MayOpen)
    missing = {r: suspects[r] for r in "AB"}
    decision = decide_open(stored, missing, "ABC")
    assert isinstance(decision, MustWait) and decision.waiting_for == {"C"}


def test_a_record_that_a_member_never_got_does_not_exclude_who_came_before() -> None:
    # B's link was cut, {A} was proposed and stored; A's machine lost power before it heard of it. B has all.
    stored = record(3, 2, "A")
    suspect = report("A", record(3, 1, "AB"), suspect=True)
    decision = decide_open(stored, {"A": suspect}, "ABC")
    assert isinstance(decision, MustWait) and decision.waiting_for == {"B"}
    certain = report("B", record(3, 1, "AB"))
    opened = decide_open(stored, {"A": suspect, "B": certain}, "ABC")
    assert isinstance(opened, MayOpen) and opened.members == {"B"}


def ledger(count: int, *, opened: bool = True) -> Ledger:
    ids = frozenset(IDS[:count])
    made = Ledger(epoch=2, newest=record(1, 7, ids), members=ids, replica_count=count)
    if opened:
        made.propose(ids)
        made.commit()
    return made


@pytest.mark.parametrize("count", COUNTS)
def test_the_first_record_of_an_epoch_needs_the_state_store(count: int) -> None:
    made = ledger(count, opened=False)
    proposed = made.propose(frozenset(IDS[:count]))
    assert proposed.stamp == (2, 1)
    held = dict.fromkeys(IDS[:count], proposed.stamp)
    assert not made.can_commit(held, stored=(1, 7))
    assert made.can_commit(held, stored=proposed.stamp)


@pytest.mark.parametrize("count", COUNTS)
def test_a_removal_is_committed_when_all_that_remain_hold_it_and_are_a_majority(count: int) -> None:
    ids = IDS[:count]
    for left in subsets(ids):
        if not left or left == frozenset(ids):
            continue
        made = ledger(count)
        proposed = made.propose(left)
        for holders in subsets(ids):
            held = dict.fromkeys(holders, proposed.stamp)
            by_majority = left <= holders and len(left) >= majority(count)
            assert made.can_commit(held, stored=(2, 1)) == by_majority
            assert made.can_commit(held, stored=proposed.stamp) == (left <= holders)


@pytest.mark.parametrize("count", range(2, REPLICAS_MAX + 1))
def test_a_growth_needs_the_state_store(count: int) -> None:
    ids = frozenset(IDS[:count])
    made = ledger(count)
    made.propose(ids - {"A"})
    made.commit()
    proposed = made.propose(ids)
    held = dict.fromkeys(ids, proposed.stamp)
    assert not made.can_commit(held, stored=(2, 2))
    assert made.can_commit(held, stored=proposed.stamp)


def test_to_name_again_who_an_uncommitted_record_left_out_is_a_growth() -> None:
    # {B, C} may be durable at B. If {A, B, C} and then {A, C} were committed without the store, B alone
    # would open as a member of {B, C}.
    made = ledger(3)
    made.propose(frozenset("BC"))
    assert not made.needs_store()
    made.propose(frozenset("ABC"))
    assert made.needs_store()
    made.propose(frozenset("AC"))
    assert made.needs_store()


def test_who_was_named_by_any_record_since_the_committed_one_is_required() -> None:
    made = ledger(3)
    made.propose(frozenset("BC"))
    made.propose(frozenset("C"))
    assert made.exposed == frozenset("ABC")
    made.commit()
    assert made.exposed == frozenset("C")
    made.propose(frozenset("AC"))
    made.propose(frozenset("C"))
    assert made.exposed == frozenset("AC")  # A may hold a record that names it
