"""What the documents say: specs and statuses of nodes, disks, volumes and attachments, checked.

Owns the meaning and the limits of every field in the state store. Does not own what is shown to
people (``control/views.py``) or what is done about it (``control/reconcile.py``).

A spec is what somebody wants, a status what was done. Everything here is a value: read a document,
``model_copy(update=...)``, write it back by compare-and-swap.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from control.documents import Document
from control.names import check_name
from control.sizes import check_size
from protocol.errors import BadRequest
from protocol.limits import REPLICAS_MAX
from protocol.membership import MembershipRecord, parse_record

KIND_NODE = "node"
KIND_DISK = "disk"
KIND_VOLUME = "volume"
KIND_ATTACHMENT = "attachment"

NODES_MAX = 16
"""Of a local cluster: one machine. Each node costs a process."""


def _name_for_pydantic(name: str) -> str:
    try:
        return check_name(name)
    except BadRequest as error:
        raise ValueError(error.fields["reason"]) from error


def _size_for_pydantic(size_bytes: int) -> int:
    try:
        return check_size(size_bytes)
    except BadRequest as error:
        raise ValueError(error.fields["reason"]) from error


Name = Annotated[str, AfterValidator(_name_for_pydantic)]
SizeBytes = Annotated[int, Field(strict=True), AfterValidator(_size_for_pydantic)]
ReplicaCount = Annotated[int, Field(strict=True, ge=1, le=REPLICAS_MAX)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Who(Enum):
    """Who must act before a condition goes away."""

    DOLMEN = "dolmen"  # nobody: it is being worked on
    OPERATOR = "operator"


class Condition(Model):
    """Why an object is not as desired. Empty lists of these mean that it is."""

    reason: str  # a word that never changes: "node_down", "engine_starting", ...
    waits_for: str  # for people, with the next step if there is one
    who: Who
    since: str = ""  # ISO 8601, UTC; when this condition was first seen without a break

    def same_as(self, other: Condition) -> bool:
        return (self.reason, self.waits_for, self.who) == (other.reason, other.waits_for, other.who)


class NodeWanted(Enum):
    RUNNING = "running"
    STOPPED = "stopped"  # by an operator: the supervisor leaves it down


class NodeSpec(Model):
    wanted: NodeWanted = NodeWanted.RUNNING


class NodeStatus(Model):
    port: int = 0  # remembered, so that a restarted replica server is found where it was; 0: not chosen yet


class DiskSpec(Model):
    node: Name
    path: str


class DiskStatus(Model):
    disk_id: str = ""


class ReplicaPlace(Model):
    """Where one replica of a volume lives. Decided once, when it is created: one that is to live elsewhere is
    another replica, with another id."""

    id: str
    node: Name


class Replacement(Model):
    """A replica that is gone gives its place to a new one. Written first; gone when ``new`` stands among the
    replicas. See ``control.replacing``."""

    old: str
    new: ReplicaPlace


class VolumeSpec(Model):
    volume_id: str
    size_bytes: SizeBytes
    replicas: tuple[ReplicaPlace, ...]
    deleting: bool = False
    replacing: Replacement | None = None
    replica_number: int = 0  # the highest that a replica's id ever had; 0: as many as there are


class Record(Model):
    """The membership record as the state store holds it. See ``protocol.membership``."""

    epoch: int
    version: int
    in_sync: tuple[str, ...]


class Grant(Model):
    """Who may write: the holder of the newest epoch. Written before its engine starts."""

    epoch: int
    engine_id: str
    node: Name


class Distrust(Model):
    """The state store may have missed records of this volume: an older copy of it was put back, or it was
    made anew. Until a record of an epoch newer than ``epoch`` is stored, a newer record may hide at any
    member of the newest known one that is away. Changed only by ``control.trust``."""

    reason: str
    epoch: int
    since: str


class Override(Model):
    """An operator's word to open with exactly these replicas, whatever others may hold. It counts while
    ``newest`` is still the newest record known, and is spent by the first record of an epoch newer than
    ``epoch``. Changed only by ``control.trust``."""

    members: tuple[str, ...]
    newest: tuple[int, int]  # epoch, version
    epoch: int
    since: str


class VolumeStatus(Model):
    size_bytes: int  # what engines serve: the spec's size once the in-sync replicas have grown
    replica_size_bytes: dict[str, int] = {}  # by replica id; not there: not created yet
    grant: Grant | None = None
    record: Record
    opens: dict[str, int] = {}  # by replica id: how often its server had opened it, as of the record
    distrust: Distrust | None = None
    forked: tuple[str, ...] = ()  # replicas whose history was given up: they may hold writes nobody else has
    override: Override | None = None
    left_at: dict[str, str] = {}  # by replica id, not in sync: when a record first left it out
    retired: tuple[ReplicaPlace, ...] = ()  # replaced; what is left of them goes once all others are well
    deleted: tuple[str, ...] = ()  # replicas that are gone, while the volume is being deleted
    conditions: tuple[Condition, ...] = ()

    @property
    def epoch(self) -> int:
        return self.grant.epoch if self.grant else 0


class AttachmentSpec(Model):
    volume_id: str
    node: Name
    tcp: bool = False
    detaching: bool = False
    force: bool = False  # detach without waiting for replicas


class AttachmentStatus(Model):
    tcp_port: int = 0  # remembered, so that a new listener stands where the old one did


class Volume:
    """A volume's document, read."""

    def __init__(self, document: Document) -> None:
        assert document.kind == KIND_VOLUME
        self.document = document
        self.name = document.name
        self.spec = VolumeSpec.model_validate(document.spec)
        self.status = VolumeStatus.model_validate(document.status)

    @property
    def membership(self) -> MembershipRecord:
        return record_of(self.status)

    @property
    def places(self) -> tuple[ReplicaPlace, ...]:
        """Wherever something of this volume may lie: its replicas, the one being made, those replaced."""
        coming = (self.spec.replacing.new,) if self.spec.replacing is not None else ()
        return (*self.spec.replicas, *coming, *self.status.retired)

    def node_of(self, replica_id: str) -> str:
        return next(place.node for place in self.spec.replicas if place.id == replica_id)


class Attachment:
    """An attachment's document, read. Named like its volume: a volume has at most one."""

    def __init__(self, document: Document) -> None:
        assert document.kind == KIND_ATTACHMENT
        self.document = document
        self.name = document.name
        self.spec = AttachmentSpec.model_validate(document.spec)
        self.status = AttachmentStatus.model_validate(document.status)


class Node:
    """A node's document, read."""

    def __init__(self, document: Document) -> None:
        assert document.kind == KIND_NODE
        self.document = document
        self.name = document.name
        self.spec = NodeSpec.model_validate(document.spec)
        self.status = NodeStatus.model_validate(document.status)


def record_of(status: VolumeStatus) -> MembershipRecord:
    return MembershipRecord(status.record.epoch, status.record.version, frozenset(status.record.in_sync))


def record_from_wire(wire: Any) -> Record:
    """Raises ProtocolViolation."""
    record = parse_record(wire)
    return Record(epoch=record.epoch, version=record.version, in_sync=tuple(sorted(record.in_sync)))


def new_volume(name: str, volume_id: str, size_bytes: int, nodes: tuple[str, ...]) -> Document:
    """Nothing was written yet, so every replica holds every acknowledged write: record (0, 0)."""
    places = tuple(ReplicaPlace(id=f"{name}-r{index}", node=node) for index, node in enumerate(nodes, 1))
    spec = VolumeSpec(volume_id=volume_id, size_bytes=size_bytes, replicas=places)
    record = Record(epoch=0, version=0, in_sync=tuple(sorted(place.id for place in places)))
    status = VolumeStatus(size_bytes=size_bytes, record=record)
    return Document(KIND_VOLUME, check_name(name), dump(spec), dump(status))


def dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json")
