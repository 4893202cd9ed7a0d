"""The open rule against every small story: how records came about, who is reachable, what happened to disks,
and which state store is left. An opened volume never lacks an acknowledged write; when all is back it opens.
And the lease rule against the open rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import pytest

from engine.events import ReplicaReport
from engine.membership import Hints, MayOpen, MustWait, Override, decide_open, lease_quorums
from protocol.limits import REPLICAS_MAX
from protocol.membership import MembershipRecord, majority

IDS = "ABC"
FIRST = MembershipRecord(1, 1, frozenset(IDS))
BLANK = MembershipRecord(0, 0, frozenset())


def subsets(ids: str) -> Iterator[frozenset[str]]:
    sizes = range(len(ids) + 1)
    return (frozenset(s) for s in chain.from_iterable(combinations(ids, size) for size in sizes))


def report(replica_id: str, held: MembershipRecord, *, opens: int = 9, epoch: int = 1) -> ReplicaReport:
    return ReplicaReport(
        replica_id=replica_id,
        size_bytes=1 << 30,
        epoch=epoch,
        record=held,
        synced_at=held.stamp,
        process_id="p",
        suspect=False,
        state="open",
        reason="",
        opens=opens,
        restored=False,
    )


@dataclass(frozen=True)
class Story:
    """What became of records since all of A, B and C held and the store knew (1, 1).

    ``complete``: who has every write that may have been acknowledged: whoever any record named that was not
    overtaken by a committed one. Nobody else has the last of them.
    """

    held: tuple[tuple[MembershipRecord, ...], ...] = ((FIRST,),) * 3  # by replica, oldest first
    stored: tuple[MembershipRecord, ...] = (FIRST,)
    possible: tuple[frozenset[str], ...] = (frozenset(IDS),)
    version: int = 1

    @property
    def complete(self) -> frozenset[str]:
        return frozenset().union(*self.possible)

    def propose(self, in_sync: frozenset[str], holders: frozenset[str], *, stored: bool) -> Story:
        record = MembershipRecord(1, self.version + 1, in_sync)
        held = tuple((*h, record) if r in holders else h for r, h in zip(IDS, self.held, strict=True))
        shrinks = in_sync <= frozenset.intersection(*self.possible)
        allowed = stored or (shrinks and len(in_sync) >= majority(3))
        possible = (in_sync,) if in_sync <= holders and allowed else (*self.possible, in_sync)
        known = (*self.stored, record) if stored else self.stored
        return Story(held, known, possible, self.version + 1)


def next_stories(story: Story) -> Iterator[Story]:
    for in_sync in subsets(IDS):
        for holders in subsets("".join(sorted(in_sync))):
            for stored in (False, True):
                if in_sync:
                    yield story.propose(in_sync, holders, stored=stored)


ONE_STEP = list(next_stories(Story()))
TWO_STEPS = list({later for story in ONE_STEP for later in next_stories(story)})


def whole(story: Story) -> dict[str, ReplicaReport]:
    return {r: report(r, held[-1]) for r, held in zip(IDS, story.held, strict=True)}


def damaged(story: Story, count_max: int) -> Iterator[dict[str, ReplicaReport]]:
    """At most so many disks were put back to what they were at any earlier record, or replaced by empty
    ones."""
    choices: list[list[tuple[bool, ReplicaReport]]] = []
    for replica_id, held in zip(IDS, story.held, strict=True):
        older = {old: report(replica_id, old, opens=5) for old in (FIRST, *held)}
        blank = report(replica_id, BLANK, opens=1, epoch=0)
        choices.append(
            [(False, report(replica_id, held[-1])), (True, blank), *((True, o) for o in older.values())]
        )
    for picked in product(*choices):
        if sum(changed for changed, _ in picked) <= count_max:
            yield {r: p for r, (_, p) in zip(IDS, picked, strict=True)}


def check(story: Story, reports: dict[str, ReplicaReport], stored: MembershipRecord, hints: Hints) -> None:
    for reachable in subsets(IDS):
        some = {r: reports[r] for r in sorted(reachable)}
        decision = decide_open(stored, some, IDS, hints)
        if isinstance(decision, MayOpen):
            assert decision.members, "somebody holds it all"
            intact = {r for r in decision.members if reports[r].opens == 9}
            assert decision.members == intact <= story.complete, (story, some, stored, decision)


TOLD = Hints(opens=dict.fromkeys(IDS, 9))


def test_no_open_lacks_an_acknowledged_write_whatever_one_disk_became() -> None:
    assert len(TWO_STEPS) > 1000
    for story in TWO_STEPS:
        for reports in damaged(story, 1):
            check(story, reports, story.stored[-1], TOLD)


def test_no_open_lacks_an_acknowledged_write_whatever_all_disks_became() -> None:
    for story in ONE_STEP:
        for reports in damaged(story, 3):
            check(story, reports, story.stored[-1], TOLD)


def test_no_open_lacks_an_acknowledged_write_after_the_state_store_was_put_back_or_lost() -> None:
    for story in TWO_STEPS:
        for stored in {BLANK_STORE, *story.stored[:-1]}:
            distrust = replace(TOLD, distrust_store=True)
            check(story, whole(story), stored, distrust)
    for story in ONE_STEP:
        for reports in damaged(story, 1):
            for stored in (BLANK_STORE, story.stored[0]):
                check(story, reports, stored, replace(TOLD, distrust_store=True))


BLANK_STORE = MembershipRecord(0, 0, frozenset(IDS))
"""What a store that was made anew knows: the names of the replicas."""


def test_it_opens_when_all_are_back_and_whole_whatever_happened_to_the_store() -> None:
    for story in TWO_STEPS:
        for stored in {BLANK_STORE, *story.stored}:
            for distrust in (False, True):
                hints = replace(TOLD, distrust_store=distrust)
                decision = decide_open(stored, whole(story), IDS, hints)
                assert isinstance(decision, MayOpen), (story, stored, decision)
                assert not distrust or decision.members <= story.complete


def test_it_opens_when_all_are_back_and_each_lost_its_page_cache() -> None:
    for story in TWO_STEPS:
        suspects = {r: replace(said, suspect=True) for r, said in whole(story).items()}
        decision = decide_open(story.stored[-1], suspects, IDS, TOLD)
        assert isinstance(decision, MayOpen) and decision.members <= story.complete


def test_a_directory_that_was_put_back_is_no_member_however_it_is_found_out() -> None:
    fine = {r: report(r, FIRST) for r in "BC"}
    for old in (replace(report("A", FIRST), restored=True), report("A", FIRST, opens=8)):
        decision = decide_open(FIRST, fine | {"A": old}, IDS, TOLD)
        assert isinstance(decision, MayOpen) and decision.members == {"B", "C"}
        alone = decide_open(MembershipRecord(1, 2, frozenset("A")), {"A": old}, IDS, TOLD)
        assert isinstance(alone, MustWait) and alone.waiting_for == {"A"}


def test_those_that_lost_their_page_cache_come_before_those_that_were_put_back() -> None:
    reports = {r: report(r, FIRST) for r in IDS}
    reports["A"] = replace(reports["A"], restored=True)
    reports["B"] = replace(reports["B"], suspect=True)
    reports["C"] = replace(reports["C"], suspect=True)
    decision = decide_open(FIRST, reports, IDS, TOLD)
    assert isinstance(decision, MayOpen) and decision.members == {"B", "C"}


def test_a_copy_made_after_the_last_clean_detach_is_as_good_as_the_original() -> None:
    copies = {r: replace(report(r, FIRST), restored=True, closed=True) for r in IDS}
    decision = decide_open(FIRST, copies, IDS, TOLD)
    assert isinstance(decision, MayOpen) and decision.members == set(IDS)
    # A later epoch may have served, and the store forgotten it.
    assert isinstance(decide_open(FIRST, copies, IDS, replace(TOLD, distrust_store=True)), MustWait)
    # A later epoch served: the copy is older.
    later = MembershipRecord(2, 1, frozenset(IDS))
    assert isinstance(decide_open(later, copies, IDS, TOLD), MustWait)
    # Made while it was served.
    open_ = {r: replace(copy, closed=False) for r, copy in copies.items()}
    assert isinstance(decide_open(FIRST, open_, IDS, TOLD), MustWait)


def test_with_a_distrusted_store_every_replica_counts() -> None:
    # {A, B} may be a proposal that was given up: for {C}, which only C and the store's newer copy knew.
    for record in (FIRST, MembershipRecord(1, 2, frozenset("AB"))):
        reports = {r: report(r, record) for r in "AB"}
        assert isinstance(decide_open(FIRST, reports, IDS, TOLD), MayOpen)
        decision = decide_open(FIRST, reports, IDS, replace(TOLD, distrust_store=True))
        assert isinstance(decision, MustWait) and decision.waiting_for == {"C"}


def test_a_member_that_the_state_store_forgot_counts_as_silent() -> None:
    # D took C's place, and held every write alone; an older copy of the state store knows nothing of it.
    named = MembershipRecord(1, 4, frozenset("ABD"))
    reports = {"A": report("A", named), "B": report("B", named), "C": report("C", FIRST)}
    decision = decide_open(FIRST, reports, IDS, replace(TOLD, distrust_store=True))
    assert isinstance(decision, MustWait) and decision.waiting_for == {"D"}
    alone = {r: report(r, MembershipRecord(1, 5, frozenset("D"))) for r in IDS}
    assert isinstance(decide_open(FIRST, alone, IDS, TOLD), MustWait)
    # Where the store is trusted it would know of a later record.
    assert isinstance(decide_open(named, reports, IDS, TOLD), MayOpen)


# The operator's word


def decided(members: str, newest: MembershipRecord = FIRST) -> Hints:
    return replace(TOLD, override=Override(frozenset(members), newest.stamp))


def test_an_operator_opens_with_whom_it_named_and_the_best_of_them_decides() -> None:
    reports = {"A": replace(report("A", FIRST), restored=True), "B": report("B", FIRST)}
    for named, members in (("A", "A"), ("B", "B"), ("AB", "B")):
        decision = decide_open(FIRST, reports, IDS, decided(named))
        assert decision == MayOpen(FIRST, frozenset(members), frozenset())
    waits = decide_open(FIRST, reports, IDS, decided("AC"))
    assert isinstance(waits, MustWait) and waits.waiting_for == {"C"}
    failed = reports | {"B": replace(reports["B"], state="damaged")}
    assert isinstance(decide_open(FIRST, failed, IDS, decided("B")), MustWait)


def test_of_several_that_missed_writes_an_operator_opens_with_the_one_that_was_in_sync_last() -> None:
    # C alone has everything, and is gone. A was in sync longer than B; B only heard of later records.
    newest = MembershipRecord(1, 3, frozenset("C"))
    a = replace(report("A", MembershipRecord(1, 2, frozenset("AC"))), synced_at=(1, 2))
    b = replace(report("B", newest), synced_at=(1, 1))
    decision = decide_open(newest, {"A": a, "B": b}, IDS, decided("AB", newest))
    assert decision == MayOpen(newest, frozenset("A"), frozenset())


def test_an_operator_s_decision_does_not_cover_a_record_that_it_did_not_know() -> None:
    later = MembershipRecord(1, 2, frozenset("BC"))
    reports = {"A": report("A", FIRST), "B": report("B", later)}
    decision = decide_open(FIRST, reports, IDS, decided("A"))
    assert isinstance(decision, MustWait) and "came to light" in decision.reason
    assert isinstance(decide_open(FIRST, reports, IDS, decided("A", later)), MayOpen)


def test_an_engine_that_died_acting_on_the_decision_does_not_void_it() -> None:
    own = MembershipRecord(2, 1, frozenset("A"))
    reports = {"A": replace(report("A", own, epoch=2), restored=True)}
    assert isinstance(decide_open(FIRST, reports, IDS, decided("A")), MayOpen)


# The lease


@pytest.mark.parametrize("count", range(1, REPLICAS_MAX + 1))
def test_whoever_a_newer_engine_claims_one_of_any_quorum_is_among_them(count: int) -> None:
    ids = "ABCDE"[:count]
    for members in subsets(ids):
        if not members:
            continue
        record = MembershipRecord(1, 2, members)
        [(slots, need)] = lease_quorums([members], count)
        assert slots == members and 0 < need <= len(members)
        for claimed in subsets(ids):
            reports = {r: report(r, record) for r in sorted(claimed)}
            if isinstance(decide_open(record, reports, ids), MayOpen):
                for fresh in combinations(sorted(members), need):
                    assert claimed & set(fresh), (members, claimed, fresh)


@pytest.mark.parametrize("count", range(1, REPLICAS_MAX + 1))
def test_a_healthy_volume_reads_on_with_a_minority_of_its_members_away(count: int) -> None:
    [(_, need)] = lease_quorums([frozenset("ABCDE"[:count])], count)
    assert need == majority(count)
