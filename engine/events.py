"""What the shell tells the volume's step machine, and what the machine asks the shell to do. Values only.

``session`` numbers a replica's control connections, ``generation`` its data links. An answer that carries
an old number is about something that is gone, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.pace import PullPace
from engine.regions import Regions
from protocol.errors import StorageError
from protocol.membership import MembershipRecord


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What replica.inspect and replica.claim answer, checked."""

    replica_id: str
    size_bytes: int
    epoch: int
    record: MembershipRecord
    synced_at: tuple[int, int]
    process_id: str
    suspect: bool
    state: str  # "open", "damaged", "failed"
    reason: str
    opens: int  # how often a server process opened it, or an engine claimed it
    restored: bool  # its directory is a copy that was put back
    closed: bool = False  # its epoch ended with a clean detach
    epoch_was: int | None = None  # of a claim: the epoch that it replaced, ours when it was repeated


Quorums = tuple[tuple[tuple[int, ...], int], ...]  # (slots, how many of them)


class Call(Enum):
    """A control call to a replica that can fail."""

    CLAIM = "claim"
    ATTACH = "attach_link"
    PERSIST = "persist_record"
    DIRTY = "dirty_regions"
    CHANGED = "changed_since"
    BEGIN = "begin_resync"
    PULL = "pull_regions"
    END = "end_resync"
    COMPLETE = "complete_regions"
    RESIZE = "resize"
    CLEAN = "detach_clean"


class LinkMode(Enum):
    SYNC = "sync"
    RESYNC = "resync"


class TimerKind(Enum):
    STRAGGLERS = "stragglers"  # an open stops waiting for members that do not answer
    LEASE = "lease"  # no older engine gives a read to anybody any more
    PULL_RETRY = "pull_retry"  # every source failed a moment ago
    STABLE = "stable"  # a replica stayed in sync for a while
    DETACH = "detach"  # requests under way had their time


@dataclass(frozen=True, slots=True)
class Timer:
    kind: TimerKind
    slot: int = -1
    number: int = 0  # a later timer of the same kind has another number


# Events


@dataclass(frozen=True, slots=True)
class Started:
    pass


@dataclass(frozen=True, slots=True)
class ReplicaUp:
    """A control session is there and the replica was inspected."""

    slot: int
    session: int
    report: ReplicaReport


@dataclass(frozen=True, slots=True)
class ReplicaDown:
    """The control session ended, or (session 0) a connection attempt failed."""

    slot: int
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Claimed:
    slot: int
    session: int
    report: ReplicaReport


@dataclass(frozen=True, slots=True)
class LinkAttached:
    slot: int
    session: int
    generation: int


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The data plane lost or closed a link. ``status`` is a frame status, 0 when there was none."""

    slot: int
    generation: int
    reason: str
    status: int = 0


@dataclass(frozen=True, slots=True)
class RecordPersisted:
    slot: int
    session: int
    stamp: tuple[int, int]


@dataclass(frozen=True, slots=True)
class RecordStored:
    stamp: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StoreUp:
    pass


@dataclass(frozen=True, slots=True)
class StoreDown:
    reason: str


@dataclass(frozen=True, slots=True)
class DirtyListed:
    slot: int
    session: int
    regions: Regions


@dataclass(frozen=True, slots=True)
class ChangedListed:
    """``slot`` says what replica ``target`` may have missed, or, itself being ``target``, ever wrote."""

    slot: int
    session: int
    target: int
    regions: Regions


@dataclass(frozen=True, slots=True)
class ResyncBegun:
    slot: int
    session: int


@dataclass(frozen=True, slots=True)
class RegionsPulled:
    slot: int
    session: int
    regions: Regions
    bytes_copied: int
    blocks_damaged: int = 0  # recorded as lost: no source had them


@dataclass(frozen=True, slots=True)
class PullIncomplete:
    """The source has no good copy of a block in one of these regions. The rest of them was copied."""

    slot: int
    session: int
    source: int
    regions: Regions
    bytes_copied: int


@dataclass(frozen=True, slots=True)
class Paced:
    """What the pulls that begin from now on may take."""

    pace: PullPace


@dataclass(frozen=True, slots=True)
class ResyncEnded:
    slot: int
    session: int


@dataclass(frozen=True, slots=True)
class Resized:
    slot: int
    session: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Cleaned:
    slot: int
    session: int


@dataclass(frozen=True, slots=True)
class CallFailed:
    """``code`` is that of the error (protocol/errors.py). ``regions``: of a pull. ``other``: the slot of a
    pull's source, or of the replica for which CHANGED was asked."""

    slot: int
    session: int
    call: Call
    code: str
    reason: str
    regions: Regions = ()
    other: int = -1


@dataclass(frozen=True, slots=True)
class Drained:
    token: int


@dataclass(frozen=True, slots=True)
class RegionWanted:
    region: int


@dataclass(frozen=True, slots=True)
class RegionDiverged:
    region: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    timer: Timer


@dataclass(frozen=True, slots=True)
class Fenced:
    """Somebody answered stale_epoch: a newer epoch exists."""

    by: str


@dataclass(frozen=True, slots=True)
class DetachAsked:
    request: int


@dataclass(frozen=True, slots=True)
class ResizeAsked:
    request: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ReplaceAsked:
    """The slot of ``old``, which is gone, is to be the new replica's."""

    request: int
    old: str
    new_id: str
    new_node: str
    host: str
    port: int


Event = (
    Started
    | ReplicaUp
    | ReplicaDown
    | Claimed
    | LinkAttached
    | LinkDown
    | RecordPersisted
    | RecordStored
    | StoreUp
    | StoreDown
    | DirtyListed
    | ChangedListed
    | ResyncBegun
    | RegionsPulled
    | PullIncomplete
    | Paced
    | ResyncEnded
    | Resized
    | Cleaned
    | CallFailed
    | Drained
    | RegionWanted
    | RegionDiverged
    | TimerFired
    | Fenced
    | DetachAsked
    | ResizeAsked
    | ReplaceAsked
)

SessionEvent = ReplicaUp | Claimed | LinkAttached | ReplicaDown | LinkDown

ResyncEvent = (
    DirtyListed
    | ChangedListed
    | ResyncBegun
    | RegionsPulled
    | PullIncomplete
    | ResyncEnded
    | Drained
    | RegionWanted
    | RegionDiverged
)


# Actions: calls to a replica. Each is answered by one event with the same session.


@dataclass(frozen=True, slots=True)
class Claim:
    """``opens``: how often its directory was opened, as far as anybody remembers. It keeps it when it counts
    fewer: the claim itself would hide that it was put back."""

    slot: int
    session: int
    opens: int = 0


@dataclass(frozen=True, slots=True)
class AttachLink:
    slot: int
    session: int
    mode: LinkMode


@dataclass(frozen=True, slots=True)
class PersistRecord:
    slot: int
    session: int
    record: MembershipRecord


@dataclass(frozen=True, slots=True)
class ListDirty:
    slot: int
    session: int


@dataclass(frozen=True, slots=True)
class ListChanged:
    """Ask ``slot`` what changed after ``since``, for the replica ``target``: a source, or the target itself
    when what it holds may be something that nobody else ever had."""

    slot: int
    session: int
    target: int
    since: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BeginResync:
    slot: int
    session: int
    regions: Regions


@dataclass(frozen=True, slots=True)
class PullRegions:
    slot: int
    session: int
    source: int
    regions: Regions
    rate_bytes_s: int = 0  # 0: no limit
    source_process: str = ""  # the process that answered the source's claim; "": not known
    take_damaged: bool = False  # record as lost what the source has no good copy of: nobody has one


@dataclass(frozen=True, slots=True)
class EndResync:
    slot: int
    session: int


@dataclass(frozen=True, slots=True)
class CompleteRegions:
    """Not answered when it succeeds: a region that stays dirty costs a comparison, not safety."""

    slot: int
    session: int
    regions: Regions


@dataclass(frozen=True, slots=True)
class ResizeReplica:
    slot: int
    session: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CleanReplica:
    slot: int
    session: int


# Actions: sessions, the state store, timers, answers. Done at once.


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Close the control connection and try again after ``retry_after_s``. No ReplicaDown follows."""

    slot: int
    session: int
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Retarget:
    """The slot is another replica's, at another address, from now on."""

    slot: int
    id: str
    node: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """Keep trying to store this record until it is stored or a later StoreRecord replaces it. ``opens``: how
    often the directory of each replica that it names was opened."""

    record: MembershipRecord
    opens: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StartTimer:
    timer: Timer
    delay_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    request: int
    error: StorageError | None


@dataclass(frozen=True, slots=True)
class Log:
    event: str
    fields: dict[str, object]


@dataclass(frozen=True, slots=True)
class Stop:
    """Close clients and links and end the process."""

    exit_code: int


# Actions: the data plane. Done at once, in order.


@dataclass(frozen=True, slots=True)
class DetachLink:
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class SetMembers:
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetReaders:
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetLease:
    """A read is given to a client only while, of each quorum's slots, so many answered lately. None: no read
    is answered."""

    quorums: Quorums


@dataclass(frozen=True, slots=True)
class SetUnequal:
    regions: Regions


@dataclass(frozen=True, slots=True)
class SetPartialWait:
    regions: Regions


@dataclass(frozen=True, slots=True)
class RegionsEqual:
    regions: Regions


@dataclass(frozen=True, slots=True)
class PartialDone:
    regions: Regions


@dataclass(frozen=True, slots=True)
class Barrier:
    token: int


@dataclass(frozen=True, slots=True)
class Pause:
    paused: bool


@dataclass(frozen=True, slots=True)
class SetSize:
    size_bytes: int


ReplicaCall = (
    Claim
    | AttachLink
    | PersistRecord
    | ListDirty
    | ListChanged
    | BeginResync
    | PullRegions
    | EndResync
    | CompleteRegions
    | ResizeReplica
    | CleanReplica
)

LoopCommand = (
    DetachLink
    | SetMembers
    | SetReaders
    | SetLease
    | SetUnequal
    | SetPartialWait
    | RegionsEqual
    | PartialDone
    | Barrier
    | Pause
    | SetSize
)

Action = ReplicaCall | LoopCommand | CloseSession | Retarget | StoreRecord | StartTimer | Reply | Log | Stop

EXIT_DETACHED = 0
EXIT_FENCED = 3
EXIT_REOPEN = 4
"""What this process knows of its replicas is no longer enough; a new epoch starts from what they say."""
