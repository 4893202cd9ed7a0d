"""Who holds every acknowledged write: when a volume may be opened, and when a record is committed.

Owns the two rules on which no acknowledged write is ever lost:

*Open.* The newest record among the state store's and the reachable replicas' rules. A newer one may hide
only at unreachable replicas that it names, and only if it was committed without the state store, so with a
majority of the volume's replicas. Hence: open unless the unreachable members of the newest record are a
majority.

*Commit.* A record is committed when all that it names hold it durably; and, unless it only takes away from
every record that may be durable somewhere and leaves a majority, when the state store holds it too. Then
whatever hides from the state store is a shrunken form of what it, or any reachable replica, knows.

Does not own who is connected, what is asked of whom, or when (``volume.py``). Pure values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.events import ReplicaReport
from protocol.membership import MembershipRecord, majority

Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MayOpen:
    """``members`` hold every acknowledged write. ``newest`` is the record that says so."""

    newest: MembershipRecord
    members: frozenset[str]
    absent: frozenset[str]  # members of ``newest`` that are not reachable: worth a short wait


@dataclass(frozen=True, slots=True)
class MustWait:
    newest: MembershipRecord
    waiting_for: frozenset[str]
    reason: str


def decide_open(
    stored: MembershipRecord, reports: Mapping[str, ReplicaReport], replica_ids: Sequence[str]
) -> MayOpen | MustWait:
    """``stored`` is the state store's record; ``reports`` are the reachable replicas, by id, with the epoch
    each had before this engine claimed it."""
    # Of two records with one stamp the store's rules: a blank replica's record names nobody.
    newest = max([stored, *(reports[r].record for r in sorted(reports))], key=lambda record: record.stamp)
    in_sync = newest.in_sync & frozenset(replica_ids)
    absent = in_sync - reports.keys()
    if len(absent) >= majority(len(replica_ids)):
        return MustWait(newest, absent, "a newer record may exist there")
    usable = frozenset(r for r in in_sync & reports.keys() if _is_usable(reports[r], newest))
    if not usable:
        return MustWait(newest, in_sync, "nobody else holds every acknowledged write")
    certain = frozenset(r for r in usable if not reports[r].suspect)
    if not certain:
        # A member that does not hold the newest record proves that it was never committed. Then those that
        # the record before it names hold every acknowledged write as well.
        lagging = [reports[r].record for r in usable if reports[r].record.stamp < newest.stamp]
        before = frozenset(r for r in replica_ids if any(r in record.in_sync for record in lagging))
        absent |= before - reports.keys()
        certain = frozenset(r for r in before & reports.keys() if _is_certain(reports[r]))
    if not certain and absent:
        return MustWait(newest, absent, "the others may have lost writes with their machines' page cache")
    # Leaving out is always safe: who is left out is resynced.
    return MayOpen(newest, certain or usable, absent)


def _is_certain(report: ReplicaReport) -> bool:
    return _is_usable(report, report.record) and not report.suspect


def _is_usable(report: ReplicaReport, newest: MembershipRecord) -> bool:
    """Whether a member of the newest record still is what it was when the record was made.

    Whoever a record of epoch e names had claimed e, durably, before. A replica with an older epoch was put
    back to an older state since, or made anew: an empty disk is not a fresh volume (C22).
    """
    return report.state == "open" and report.epoch >= newest.epoch


class Ledger:
    """The membership records of one epoch: the committed one, and the one being proposed.

    Invariants: ``exposed`` is the union, ``floor`` the intersection, of the in_sync sets of the committed
    record and of every record proposed since; each of those may be durable somewhere, so a write must be
    held by all of ``exposed`` before it is acknowledged, and only a subset of ``floor`` may do without the
    state store.
    """

    def __init__(self, *, epoch: int, newest: MembershipRecord, members: frozenset[str], replica_count: int):
        assert members and newest.epoch < epoch
        self._replica_count = replica_count
        self._epoch = epoch
        self._version = 0
        self.committed = MembershipRecord(newest.epoch, newest.version, members)
        self.proposed: MembershipRecord | None = None
        self.exposed = members
        # The first record of an epoch always needs the state store: an earlier engine may have left a
        # record that was never committed at a replica that is not reachable now, and that record must not
        # be the newest known at the next open.
        self.floor: frozenset[str] = frozenset()
        self._shrinks = False  # the proposal is a subset of every record that may be durable

    @property
    def opened(self) -> bool:
        """The first record of this epoch is committed."""
        return self.committed.epoch == self._epoch

    @property
    def latest(self) -> MembershipRecord:
        return self.proposed or self.committed

    def propose(self, in_sync: frozenset[str]) -> MembershipRecord:
        """Replaces a proposal that is under way: the new one has the next version."""
        assert in_sync
        self._version += 1
        self._shrinks = in_sync <= self.floor
        self.proposed = MembershipRecord(self._epoch, self._version, in_sync)
        self.exposed |= in_sync
        self.floor &= in_sync
        return self.proposed

    def needs_store(self) -> bool:
        assert self.proposed is not None
        return not (self._shrinks and len(self.proposed.in_sync) >= majority(self._replica_count))

    def can_commit(self, held: Mapping[str, Stamp], stored: Stamp) -> bool:
        """``held``: the newest record each replica holds durably, ``stored``: the state store."""
        record = self.proposed
        if record is None:
            return False
        if any(held.get(member) != record.stamp for member in record.in_sync):
            return False
        return stored == record.stamp or not self.needs_store()

    def commit(self) -> None:
        assert self.proposed is not None
        self.committed, self.proposed = self.proposed, None
        self.exposed = self.floor = self.committed.in_sync

    def check_invariants(self) -> None:
        assert self.committed.in_sync
        assert self.committed.in_sync <= self.exposed
        assert self.floor <= self.committed.in_sync
        if self.proposed is not None:
            assert self.proposed.in_sync and self.proposed.in_sync <= self.exposed
            assert self.proposed.stamp > self.committed.stamp
        else:
            assert self.exposed == self.committed.in_sync
