"""Who holds every acknowledged write: when a volume may be opened, when a record is committed, and who must
have answered lately before a read is given to a client.

Owns the rules on which no acknowledged write is ever lost, and none is ever read that was overtaken:

*Open.* The newest record among the state store's and the reachable replicas' rules. A newer one may hide
only at members of it that are silent: not reachable, or no longer what they were. And only if it was
committed without the state store, so with a majority of the volume's replicas. Hence: open unless the silent
members of the newest record are a majority; with a state store that may itself have missed records, only if
no replica at all is silent.

*Commit.* A record is committed when all that it names hold it durably; and, unless it only takes away from
every record that may be durable somewhere and leaves a majority, when the state store holds it too. Then
whatever hides from the state store is a shrunken form of what it, or any reachable replica, knows.

*Lease.* Of every record that a newer engine could open from, so many members must have answered a moment ago
that at least one of those that the newer engine claims is among them (``lease_quorums``).

Does not own who is connected, what is asked of whom, or when (``volume.py``, ``opening.py``). Pure values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.events import ReplicaReport
from protocol.membership import MembershipRecord, majority

Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Override:
    """An operator's decision to open with these, made when ``newest`` was the newest record known."""

    members: frozenset[str]
    newest: Stamp


@dataclass(frozen=True, slots=True)
class Hints:
    """What the daemon knows beyond the state store's record. The default says: nothing unusual."""

    opens: Mapping[str, int] = field(default_factory=dict)  # of each replica's directory, when last recorded
    distrust_store: bool = False  # the state store may have missed records
    override: Override | None = None


NO_HINTS = Hints()


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
    stored: MembershipRecord,
    reports: Mapping[str, ReplicaReport],
    replica_ids: Sequence[str],
    hints: Hints = NO_HINTS,
) -> MayOpen | MustWait:
    """``stored`` is the state store's record; ``reports`` are the reachable replicas, by id, with the epoch
    each had before this engine claimed it."""
    # Of two records with one stamp the store's rules: a blank replica's record names nobody.
    newest = max([stored, *(reports[r].record for r in sorted(reports))], key=lambda record: record.stamp)
    if hints.override is not None:
        return _decide_override(hints.override, newest, reports, hints)
    # Also one that this volume does not have: a state store that forgot records may have forgotten replicas.
    in_sync = newest.in_sync
    absent = in_sync - reports.keys()
    usable = frozenset(r for r in in_sync & reports.keys() if _is_usable(reports[r], newest, hints))
    # A member that was put back, made anew or can't be opened knows no more of a newer record than one that
    # is not there.
    silent = in_sync - usable
    if len(silent) >= majority(len(replica_ids)):
        return MustWait(newest, silent, "a newer record may exist there" if absent else _FORGOTTEN)
    if hints.distrust_store and (silent := silent | _silent_outside(newest, reports, replica_ids, hints)):
        return MustWait(newest, silent, "the state store may have missed a record that they hold")
    if not usable:
        return MustWait(newest, in_sync, _NOBODY_ELSE if absent else _FORGOTTEN)
    certain = frozenset(r for r in usable if not reports[r].suspect)
    if not certain:
        # A member that does not hold the newest record proves that it was never committed. Then those that
        # the record before it names hold every acknowledged write as well.
        lagging = [reports[r].record for r in usable if reports[r].record.stamp < newest.stamp]
        before = frozenset(r for r in replica_ids if any(r in record.in_sync for record in lagging))
        absent |= before - reports.keys()
        certain = frozenset(r for r in before & reports.keys() if _is_certain(reports[r], hints))
    if not certain and absent:
        return MustWait(newest, absent, "the others may have lost writes with their machines' page cache")
    # Leaving out is always safe: who is left out is resynced.
    return MayOpen(newest, certain or usable, absent)


_NOBODY_ELSE = "nobody else holds every acknowledged write"
_FORGOTTEN = "put back to an older state, made anew or damaged; nobody else can come who holds every write"


def _decide_override(
    override: Override, newest: MembershipRecord, reports: Mapping[str, ReplicaReport], hints: Hints
) -> MayOpen | MustWait:
    """What the operator was shown is what counts; whom it named is waited for, and nobody else.

    Members are equal but for what their marks tell. So of several that it named, those that the newest record
    names are opened with. If there are none, the one that was in sync last: to make the others equal to it
    is a resync, which may be interrupted, and not to be a member.
    """
    # A record that names nobody else is of an engine that acted on this very decision and died.
    if newest.stamp > override.newest and not newest.in_sync <= override.members:
        reason = f"record {newest.stamp} came to light after the operator decided on {override.newest}"
        return MustWait(newest, newest.in_sync, reason)
    opened = frozenset(r for r in override.members & reports.keys() if reports[r].state == "open")
    if missing := override.members - opened:
        return MustWait(newest, missing, "the operator decided to open with them")
    members = frozenset(r for r in opened & newest.in_sync if _is_usable(reports[r], newest, hints))
    last = max(sorted(opened), key=lambda r: (reports[r].synced_at, not reports[r].suspect))
    return MayOpen(newest, members or frozenset({last}), frozenset())


def is_put_back(report: ReplicaReport, known_opens: int) -> bool:
    """Whether its directory is an older copy of itself: it says so, or it counts fewer opens than it did."""
    return report.restored or report.opens < known_opens


def _silent_outside(
    newest: MembershipRecord, reports: Mapping[str, ReplicaReport], replica_ids: Sequence[str], hints: Hints
) -> frozenset[str]:
    """Replicas that the newest record does not name, and that can't say whether they know a newer one.

    They matter only when the state store may have forgotten. The newest record may then be a proposal that
    all its members hold, and that was given up for one that names only others.
    """
    others = frozenset(replica_ids) - newest.in_sync
    known = (reports[r] for r in others & reports.keys())
    telling = frozenset(
        said.replica_id
        for said in known
        if said.state == "open"
        and (said.epoch > 0 or newest.epoch == 0)
        and not is_put_back(said, hints.opens.get(said.replica_id, 0))
    )
    return others - telling


def _is_complete_copy(report: ReplicaReport, newest: MembershipRecord, hints: Hints) -> bool:
    """A copy made after the clean detach of the last epoch that ever served. Nothing can have been written
    since: that epoch is closed there, and a later one would have begun with a record in the state store."""
    return report.closed and report.epoch == newest.epoch and not hints.distrust_store


def _is_certain(report: ReplicaReport, hints: Hints) -> bool:
    return _is_usable(report, report.record, hints) and not report.suspect


def _is_usable(report: ReplicaReport, newest: MembershipRecord, hints: Hints) -> bool:
    """Whether a member of the newest record still is what it was when the record was made.

    Whoever a record of epoch e names had claimed e, durably, before. A replica with an older epoch was put
    back to an older state since, or made anew: an empty disk is not a fresh volume (C22). ``opening.py``
    claims such a one only after a record without it is stored, so that this stays visible.
    """
    if report.state != "open" or report.epoch < newest.epoch:
        return False
    put_back = is_put_back(report, hints.opens.get(report.replica_id, 0))
    return not put_back or _is_complete_copy(report, newest, hints)


def lease_quorums(possible: Iterable[frozenset[str]], replica_count: int) -> list[tuple[frozenset[str], int]]:
    """Of each set: how many of its members must have answered within the lease.

    ``possible``: the members of every record that may be durable somewhere, the committed one first. A newer
    engine opens only from one of these, and only if fewer of its members than a majority of the replicas are
    missing, and at least one is there. So ``min(majority, all)`` of them always include one that it claimed,
    and that one answers this engine no more.
    """
    return [(members, min(majority(replica_count), len(members))) for members in possible]


class Ledger:
    """The membership records of one epoch: the committed one, and the one being proposed.

    ``possible``: the in_sync sets of the committed record and of every record proposed since. Each may be
    durable somewhere, and no older one matters: no engine can open from it. Invariants: ``exposed`` is their
    union, ``floor`` their intersection; a write must be held by all of ``exposed`` before it is acknowledged,
    and only a subset of ``floor`` may do without the state store.
    """

    def __init__(self, *, epoch: int, newest: MembershipRecord, members: frozenset[str], replica_count: int):
        assert members and newest.epoch < epoch
        self._replica_count = replica_count
        self._epoch = epoch
        self._version = 0
        self.committed = MembershipRecord(newest.epoch, newest.version, members)
        self.proposed: MembershipRecord | None = None
        self.possible: tuple[frozenset[str], ...] = (members,)
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
        if in_sync not in self.possible:  # so there are at most as many as there are sets
            self.possible = (*self.possible, in_sync)
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
        self.possible = (self.committed.in_sync,)
        self.exposed = self.floor = self.committed.in_sync

    def check_invariants(self) -> None:
        assert self.committed.in_sync
        assert self.exposed == frozenset().union(*self.possible)
        assert self.committed.in_sync in self.possible
        assert self.floor <= self.committed.in_sync
        if self.proposed is not None:
            assert self.proposed.in_sync and self.proposed.in_sync <= self.exposed
            assert self.proposed.stamp > self.committed.stamp
        else:
            assert self.exposed == self.committed.in_sync
