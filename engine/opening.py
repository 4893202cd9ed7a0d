"""From what replicas report to the members a volume is opened with, and when it may serve. Pure.

Owns what the daemon granted with the epoch (``VolumeSpec``), the open decision and what it says about each
replica: who may be claimed when, whose word is not believed, who must be compared as a whole. The rules
themselves are in ``membership.py``; phases and sessions are ``volume.py``'s.

Order of an open: what is found is inspected; when the rule lets it, replicas are claimed; the rule is asked
again, for only now are the records final: an older engine may have committed one until it was locked out.
A member whose epoch shows that it lost what it held is claimed only after a record without it is stored:
the claim wipes out what shows it, and should this engine die, the next must see it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from engine.limits import STRAGGLER_WAIT_S
from engine.membership import NO_HINTS, Hints, MayOpen, MustWait, decide_open, is_put_back
from engine.replica_entry import ReplicaEntry
from protocol.membership import MembershipRecord


@dataclass(frozen=True, slots=True)
class Grant:
    """What the daemon says with the epoch about the past. The default is the careful one, and that nothing
    unusual happened."""

    predecessor_ended: bool = False  # no engine of an older epoch runs any more
    hints: Hints = NO_HINTS
    forked: frozenset[str] = frozenset()  # replicas whose history was given up


NOTHING_SAID = Grant()


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What the daemon grants the epoch for. The order of ``replica_ids`` gives the slots."""

    volume_id: str
    name: str
    size_bytes: int
    epoch: int
    stored: MembershipRecord
    replica_ids: tuple[str, ...]
    straggler_wait_s: float = STRAGGLER_WAIT_S
    grant: Grant = NOTHING_SAID


class Opening:
    """Lives as long as the engine: who comes late is judged as well."""

    def __init__(self, spec: VolumeSpec) -> None:
        self._spec = spec
        self.newest = spec.stored  # the newest record known before this epoch's first
        self.must_wait: MustWait | None = None  # why the volume can't be opened now
        self.stragglers_waited = False
        self.lease_over = spec.grant.predecessor_ended  # an older engine answers no read any more
        self._members: frozenset[str] = frozenset()  # of the decision, once it is taken
        self._found_under: dict[str, int] = {}  # epoch of the newest record known when a replica was found

    def decide(self, entries: Iterable[ReplicaEntry]) -> MayOpen | MustWait:
        """By what these replicas were before this engine touched them."""
        reports = {
            e.id: replace(e.report, epoch=e.epoch_before, closed=e.closed_before)
            for e in entries
            if e.report is not None and e.epoch_before is not None
        }
        decision = decide_open(self._spec.stored, reports, self._spec.replica_ids, self._spec.grant.hints)
        self.newest = decision.newest
        self.must_wait = decision if isinstance(decision, MustWait) else None
        self._members = decision.members if isinstance(decision, MayOpen) else frozenset()
        return decision

    def may_claim(self, entry: ReplicaEntry, *, opened: bool) -> bool:
        """``opened``: a record of this epoch is committed, and so stored, that names who is a member."""
        return opened or entry.id in self._members or not self._lost_its_past(entry)

    def _lost_its_past(self, entry: ReplicaEntry) -> bool:
        before = entry.epoch_before
        return entry.id in self.newest.in_sync and before is not None and before < self.newest.epoch

    def judge(self, entries: Sequence[ReplicaEntry]) -> None:
        """The decision was taken: whose word for what it has is worth nothing from now on."""
        assert self._members
        decided = self._spec.grant.hints.override is not None
        for entry in entries:
            put_back = entry.rolled_back or (entry.report is not None and entry.report.restored)
            lost = self._lost_its_past(entry)
            if entry.id in self._members:
                # Opened all the same: an operator said so, or the copy is complete.
                entry.accepted = put_back or lost
                entry.rolled_back = False
            elif lost or decided:
                entry.rolled_back = True

    def on_up(self, entry: ReplicaEntry) -> None:
        """A session began: was its directory put back to an older state since it was last seen?"""
        report = entry.report
        assert report is not None
        excused = replace(report, restored=report.restored and not entry.accepted)
        if is_put_back(excused, self.known_opens(entry)):
            entry.rolled_back = True
        entry.opens_seen = max(entry.opens_seen, report.opens)
        self._found_under[entry.id] = max(self.newest.epoch, report.record.epoch)

    def is_outdated(self, entry: ReplicaEntry) -> bool:
        """Whether a found one lost its past, or was only looked at too early to tell."""
        return self._lost_its_past(entry) and self._found_under[entry.id] < self.newest.epoch

    def known_opens(self, entry: ReplicaEntry) -> int:
        """The highest number that anybody remembers; of one that was accepted, since then."""
        before = 0 if entry.accepted else self._spec.grant.hints.opens.get(entry.id, 0)
        return max(before, entry.opens_seen)
