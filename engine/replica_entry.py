"""The engine's view of one replica: its state, and what is known of it in this session.

Owns the states and the only assignment to ``state``. Does not own what happens in them: ``volume.py``
moves replicas between sessions and membership, ``joining.py`` through the states of a resync.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from engine.events import ReplicaReport
from engine.regions import Regions
from protocol.membership import MembershipRecord

Stamp = tuple[int, int]


class ReplicaState(Enum):
    """::

    OFFLINE -> FOUND -> CLAIMING -> CLAIMED -- a member --> ATTACHING ----------------> IN_SYNC
                                       |                                                  ^
                                       +-- not one --> STALE                              |
                                                         |                                |
                 +----------------- COMPARING <----------+                                |
                 |                    ^     |                                             |
                 |                    |     +-----+ nothing new                           |
                 v                    |           v                                       |
              MARKING -> LINKING -> SETTLING -> PULLING -> JOINING -> FLUSHING -> RECORDING
                 |                    ^
                 +--- linked already -+

    STALE -> ATTACHING when the record that names it is committed only after it was lost and came back.
    PULLING -> MARKING after a source failed in the middle of a pull.

    The session lost, the link lost, or a failure: OFFLINE, from any state.
    """

    OFFLINE = "offline"  # no session
    FOUND = "found"  # inspected; not claimed, so it may still serve an older engine
    CLAIMING = "claiming"  # the claim is under way
    CLAIMED = "claimed"  # ours; what it is to the volume is not decided
    ATTACHING = "attaching"  # a member; its link and its list of dirty regions are on the way
    IN_SYNC = "in_sync"  # a member with a link: every acknowledgement needs it
    STALE = "stale"  # missed writes; waits for its resync
    COMPARING = "comparing"  # which regions may differ is being asked for
    MARKING = "marking"  # it marks those regions
    LINKING = "linking"  # its link is being attached: live writes begin to reach it
    SETTLING = "settling"  # writes from before it was linked or marked are being finished
    PULLING = "pulling"  # regions are copied
    JOINING = "joining"  # acknowledgements need it; writes sent to it earlier are being finished
    FLUSHING = "flushing"  # it makes everything durable
    RECORDING = "recording"  # a record that names it is being committed


_S = ReplicaState

_NEXT: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    _S.OFFLINE: frozenset({_S.FOUND}),
    _S.FOUND: frozenset({_S.CLAIMING, _S.OFFLINE}),
    _S.CLAIMING: frozenset({_S.CLAIMED, _S.OFFLINE}),
    _S.CLAIMED: frozenset({_S.ATTACHING, _S.STALE, _S.OFFLINE}),
    _S.ATTACHING: frozenset({_S.IN_SYNC, _S.OFFLINE}),
    _S.IN_SYNC: frozenset({_S.OFFLINE}),
    _S.STALE: frozenset({_S.COMPARING, _S.ATTACHING, _S.OFFLINE}),
    _S.COMPARING: frozenset({_S.MARKING, _S.PULLING, _S.OFFLINE}),
    _S.MARKING: frozenset({_S.LINKING, _S.SETTLING, _S.OFFLINE}),
    _S.LINKING: frozenset({_S.SETTLING, _S.OFFLINE}),
    _S.SETTLING: frozenset({_S.COMPARING, _S.PULLING, _S.OFFLINE}),
    _S.PULLING: frozenset({_S.JOINING, _S.MARKING, _S.OFFLINE}),
    _S.JOINING: frozenset({_S.FLUSHING, _S.OFFLINE}),
    _S.FLUSHING: frozenset({_S.RECORDING, _S.OFFLINE}),
    _S.RECORDING: frozenset({_S.IN_SYNC, _S.OFFLINE}),
}
assert _NEXT.keys() == set(ReplicaState)

CLAIMED_STATES = frozenset(ReplicaState) - {_S.OFFLINE, _S.FOUND, _S.CLAIMING}
"""It has persisted our epoch; older engines are locked out of it."""

RESYNC_STATES = frozenset(
    {
        _S.COMPARING,
        _S.MARKING,
        _S.LINKING,
        _S.SETTLING,
        _S.PULLING,
        _S.JOINING,
        _S.FLUSHING,
        _S.RECORDING,
    }
)

REQUIRED_RESYNC_STATES = frozenset({_S.JOINING, _S.FLUSHING, _S.RECORDING})
"""A replica that is becoming a member: acknowledgements wait for it already."""


class ReplicaEntry:
    """Fields without a comment are as of the current session."""

    def __init__(self, slot: int, replica_id: str) -> None:
        self.slot = slot
        self.id = replica_id
        self.state = ReplicaState.OFFLINE
        self.session = 0  # of the last session, also after it ended
        self.reason = "not connected yet"  # why it is not in sync; "" when it is
        self.failures = 0  # since it was last stable; over sessions
        self.stable_number = 0  # of the timer that clears ``failures``
        self.epoch_before: int | None = None  # its epoch when it was first found; over sessions
        self.closed_before = False  # its epoch then had ended with a clean detach; over sessions
        self.opens_seen = 0  # how often its directory had been opened; over sessions
        self.accepted = False  # a member although it may lack what the others have; over sessions
        self.claimed_once = False  # by us; over sessions
        self.rolled_back = False  # it lost what it had held durably; over sessions
        self.forked = False  # its history was given up: it may hold what nobody else ever had; over sessions
        self.vouched = False  # equal to the other members since this epoch was opened; over sessions
        self.failed_here = False  # an fsync failed under this engine: its page cache lies; over sessions
        self.report: ReplicaReport | None = None
        self.size_bytes = 0
        self.generation: int | None = None  # of its link
        self.dirty: Regions | None = None
        self.written: Regions | None = None  # all it ever wrote; asked for only of one that was put back
        self.held: Stamp = (0, 0)  # the newest record that it holds durably
        self.persisting: Stamp | None = None  # a call under way
        self.resizing = False  # a call under way

    def transition(self, to: ReplicaState) -> None:
        """The only assignment to ``state`` after the first."""
        assert to in _NEXT[self.state], f"replica {self.id}: {self.state.name} -> {to.name}"
        self.state = to

    def begin_session(self, session: int, report: ReplicaReport, our_epoch: int) -> None:
        assert self.state is ReplicaState.OFFLINE and session > self.session
        self.session = session
        # Ours means: claimed by us before. What it had then is what counts.
        if report.epoch < our_epoch or self.epoch_before is None:
            self.epoch_before = report.epoch
            self.closed_before = report.closed
        if report.epoch < our_epoch and self.claimed_once:
            self.rolled_back = True
        self.take_report(report)
        self.generation = None
        self.dirty = None
        self.written = None
        self.persisting = None
        self.resizing = False

    def take_report(self, report: ReplicaReport) -> None:
        # Another engine may have claimed it since it was found: the claim that we replaced says so, and a
        # record that was left there.
        was = max(report.record.epoch, report.epoch_was or 0)
        if self.epoch_before is not None and was > self.epoch_before:
            self.epoch_before, self.closed_before = was, False
        self.report = report
        self.held = report.record.stamp
        self.size_bytes = report.size_bytes

    @property
    def claimed(self) -> bool:
        return self.state in CLAIMED_STATES

    @property
    def in_sync(self) -> bool:
        return self.state is ReplicaState.IN_SYNC

    @property
    def suspect(self) -> bool:
        return self.failed_here or self.rolled_back or (self.report is not None and self.report.suspect)

    @property
    def compare_all(self) -> bool:
        """Whether nobody's marks tell what may be different in it."""
        return self.rolled_back or self.forked

    @property
    def process_id(self) -> str:
        """Of the server process whose word its state is: another at its address may lack what it had."""
        return self.report.process_id if self.report is not None else ""

    @property
    def record(self) -> MembershipRecord:
        assert self.report is not None
        return self.report.record
