"""The state store made anew from what disks say of themselves. Pure.

Owns what follows from a set of disks: nodes, disks, volumes, places, records and epochs, and what is left out
with the reason. Does not own reading or writing (``control/recover_disks.py``).

Promises: nothing is decided by age, size or majority of copies. What contradicts itself is listed and left
out; what is not known stays open: every volume is distrusted, a replica that a record names and nobody has
found keeps its place and is waited for, and all replicas outside the newest record are compared as a whole
before they count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from control.documents import Document
from control.model import (
    KIND_ATTACHMENT,
    KIND_DISK,
    KIND_NODE,
    KIND_VOLUME,
    NODES_MAX,
    AttachmentSpec,
    AttachmentStatus,
    DiskSpec,
    DiskStatus,
    Grant,
    Model,
    NodeSpec,
    NodeStatus,
    NodeWanted,
    Record,
    ReplicaPlace,
    VolumeSpec,
    VolumeStatus,
    dump,
)
from control.names import check_name
from control.supervisor import disk_name
from control.trust import REBUILT, distrusted
from protocol.errors import BadRequest
from protocol.limits import NAME_CHARS_MAX, REPLICAS_MAX
from protocol.membership import MembershipRecord
from replica.survey import SurveyedDisk, SurveyedReplica

ID_CHARS_SHOWN = 8
"""Of a volume's id, where two volumes have one name."""


@dataclass(frozen=True, slots=True)
class NodeDisk:
    """A node's directory as it was found."""

    node: str
    disk: SurveyedDisk
    port: int = 0  # where its replica server listened last, or listens; 0: not known


@dataclass(frozen=True, slots=True)
class LivingEngine:
    """An engine that runs on, without a daemon."""

    volume_id: str
    name: str
    epoch: int
    engine_id: str
    node: str
    tcp: bool


class RecoveredVolume(Model):
    name: str
    volume_id: str
    size_bytes: int
    epoch: int
    record: Record
    replicas: list[str]
    missing: list[str]  # replicas that a record names and nobody has found
    notes: list[str]


class LeftOut(Model):
    """Something that was found and is not used, and left as it is."""

    what: str
    reason: str


class Report(Model):
    nodes: list[str]
    volumes: list[RecoveredVolume]
    left_out: list[LeftOut]
    written: bool = False
    moved_aside: list[str] = []


@dataclass(slots=True)
class Rebuilt:
    documents: list[Document] = field(default_factory=list)
    volumes: list[RecoveredVolume] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, what: str, reason: str) -> None:
        self.left_out.append(LeftOut(what=what, reason=reason))


def rebuild(
    nodes: Sequence[NodeDisk], engines: Iterable[LivingEngine], *, accept_blank: bool, now: str
) -> Rebuilt:
    """``accept_blank``: also volumes of which every copy found is blank."""
    made = Rebuilt()
    used = _usable_disks(nodes, made)
    for found in nodes:
        _add_node(made, found, stopped=found not in used)
    living = {engine.volume_id: engine for engine in engines}
    by_volume: dict[str, list[tuple[str, SurveyedReplica]]] = {}
    for found in used:
        for replica in found.disk.replicas:
            by_volume.setdefault(replica.volume_id, []).append((found.node, replica))
        for name in found.disk.strange:
            made.leave_out(f"{found.disk.path}/replicas/{name}", "not a name that is given to a replica")
    troubled = [found.node for found in nodes if found not in used]
    drafts = []
    for volume_id, replicas in sorted(by_volume.items()):
        draft = _Draft(volume_id, replicas, living.get(volume_id))
        if reason := draft.contradiction(accept_blank=accept_blank):
            for _, replica in replicas:
                made.leave_out(replica.path, reason)
        else:
            drafts.append(draft)
    for draft in sorted(drafts, key=lambda draft: (draft.name, draft.volume_id)):
        name = _name(draft, drafts)
        draft.add_to(made, name, [found.node for found in nodes], troubled, now)
    return made


def _usable_disks(nodes: Sequence[NodeDisk], made: Rebuilt) -> list[NodeDisk]:
    """Those that can be read, stand where they belong, and are there once."""
    used = []
    ids = [found.disk.disk_id for found in nodes if not found.disk.trouble]
    for found in nodes:
        disk = found.disk
        if disk.trouble:
            made.leave_out(disk.path, disk.trouble)
        elif disk.node_id != found.node:
            made.leave_out(disk.path, f"it belongs to node {disk.node_id}, and stands at {found.node}")
        elif ids.count(disk.disk_id) > 1:
            made.leave_out(disk.path, f"disk {disk.disk_id} is there twice: one is a copy; take it away")
        else:
            used.append(found)
    return used


def _add_node(made: Rebuilt, found: NodeDisk, *, stopped: bool) -> None:
    """A node whose disk is in doubt stays stopped: its server would make an empty directory a new disk."""
    wanted = NodeWanted.STOPPED if stopped else NodeWanted.RUNNING
    node = Document(KIND_NODE, found.node, dump(NodeSpec(wanted=wanted)), dump(NodeStatus(port=found.port)))
    disk_id = "" if stopped else found.disk.disk_id
    disk = Document(
        KIND_DISK,
        disk_name(found.node),
        dump(DiskSpec(node=found.node, path=found.disk.path)),
        dump(DiskStatus(disk_id=disk_id)),
    )
    made.documents += [node, disk]


def _name(draft: _Draft, drafts: Sequence[_Draft]) -> str:
    """Its own; of several with one name each gets a piece of its id behind it, but for one that is served."""
    others = [other for other in drafts if other.name == draft.name and other is not draft]
    if not others or draft.engine is not None:
        return draft.name
    suffix = f"-{draft.volume_id[:ID_CHARS_SHOWN].lower().replace('_', '-').strip('-')}"
    draft.notes.append(f"another volume is named {draft.name} too")
    return draft.name[: NAME_CHARS_MAX - len(suffix)].rstrip("-") + suffix


class _Draft:
    """One volume, from the copies of it that were found."""

    def __init__(
        self, volume_id: str, found: Sequence[tuple[str, SurveyedReplica]], engine: LivingEngine | None
    ) -> None:
        self.volume_id = volume_id
        self.known = [(node, replica) for node, replica in found if not replica.trouble]
        self.damaged = [(node, replica) for node, replica in found if replica.trouble]
        self.notes: list[str] = [f"{r.path} cannot be read: {r.trouble}" for _, r in self.damaged]
        self.name = self.known[0][1].name if self.known else ""
        records = [replica.record for _, replica in self.known]
        blank = MembershipRecord(0, 0, frozenset())
        self.newest = max(records, key=lambda record: record.stamp, default=blank)
        self.found = {replica.replica_id: node for node, replica in self.known}
        self.ids = self.found.keys() | {id_ for record in records for id_ in record.in_sync}
        self.epoch = max((replica.epoch for _, replica in self.known), default=0)
        self.engine = engine if engine is not None and engine.epoch >= self.epoch else None

    def contradiction(self, *, accept_blank: bool) -> str:
        """Why it can't be recovered; "" if it can."""
        if not self.known:
            return "no copy of its volume says who it is: " + self.damaged[0][1].trouble
        if len({replica.name for _, replica in self.known}) > 1:
            return "copies of its volume have different names"
        if len(self.found) < len(self.known):
            return "one replica of its volume is there twice: one is a copy; take it away"
        if len(self.ids) > REPLICAS_MAX:
            return f"copies of its volume name more than {REPLICAS_MAX} replicas"
        try:
            check_name(self.name)
        except BadRequest:
            return f"its volume's name {self.name[:80]!r} is not one"
        if not self.newest.in_sync and not accept_blank:
            return (
                f"no copy of volume {self.name} that was found was ever in use: it is an empty volume, or "
                "copies that were to be filled; --accept-blank takes it for an empty volume"
            )
        return ""

    def add_to(
        self, made: Rebuilt, name: str, nodes: Sequence[str], troubled: Sequence[str], now: str
    ) -> None:
        in_sync = self.newest.in_sync or frozenset(self.ids)
        record = Record(epoch=self.newest.epoch, version=self.newest.version, in_sync=tuple(sorted(in_sync)))
        members = [replica for _, replica in self.known if replica.replica_id in in_sync]
        sizes = [replica.size_bytes for replica in members or [replica for _, replica in self.known]]
        places = self._places(made, nodes, troubled)
        spec = VolumeSpec(volume_id=self.volume_id, size_bytes=max(sizes), replicas=places)
        found_bytes = {replica.replica_id: replica.size_bytes for _, replica in self.known}
        status = VolumeStatus(
            size_bytes=min(sizes),
            # Also of those that were not found: they are missing, not still to be made.
            replica_size_bytes={place.id: found_bytes.get(place.id, max(sizes)) for place in places},
            grant=self._grant(places),
            record=record,
            opens={replica.replica_id: replica.opens for _, replica in self.known},
        )
        status = distrusted(status, REBUILT, now)
        made.documents.append(Document(KIND_VOLUME, name, dump(spec), dump(status)))
        if self.engine is not None:
            attachment = AttachmentSpec(volume_id=self.volume_id, node=self.engine.node, tcp=self.engine.tcp)
            made.documents.append(Document(KIND_ATTACHMENT, name, dump(attachment), dump(AttachmentStatus())))
            self.notes.append("an engine serves it: it stays attached")
        made.volumes.append(
            RecoveredVolume(
                name=name,
                volume_id=self.volume_id,
                size_bytes=spec.size_bytes,
                epoch=status.epoch,
                record=record,
                replicas=[f"{place.id} on {place.node}" for place in places],
                missing=sorted(self.ids - self.found.keys()),
                notes=self.notes,
            )
        )

    def _grant(self, places: Sequence[ReplicaPlace]) -> Grant | None:
        """The next one is above every epoch that was ever claimed."""
        if self.engine is not None:
            engine = self.engine
            return Grant(epoch=engine.epoch, engine_id=engine.engine_id, node=engine.node)
        if not self.epoch:
            return None
        return Grant(epoch=self.epoch, engine_id=f"recovered/{self.epoch}", node=places[0].node)

    def _places(
        self, made: Rebuilt, nodes: Sequence[str], troubled: Sequence[str]
    ) -> tuple[ReplicaPlace, ...]:
        """Where each replica lives. One that a record names and nobody found is waited for where it may be:
        where there is a damaged copy, on a disk in doubt, on a node without a copy, or on one to come."""
        places = [ReplicaPlace(id=id_, node=node) for id_, node in self.found.items()]
        taken = set(self.found.values())
        damaged = [node for node, _ in self.damaged]
        coming = [f"node{index}" for index in range(1, NODES_MAX + 1) if f"node{index}" not in nodes]
        for id_ in sorted(self.ids - self.found.keys()):
            free = (node for node in (*damaged, *troubled, *nodes, *coming) if node not in taken)
            node = next(free, None)
            assert node is not None, "more replicas than nodes there can be"
            taken.add(node)
            places.append(ReplicaPlace(id=id_, node=node))
            self.notes.append(f"replica {id_} was not found; it is waited for on {node}")
        return tuple(sorted(places, key=lambda place: place.id))
