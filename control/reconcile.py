"""What a volume needs next. Pure: no clock, no socket, no store.

Owns every decision about a volume and its attachment: which replicas to make, grow or delete, when
to grant an epoch, start, detach or end an engine. Does not own doing it (``control/executor.py``).

Level-triggered: ``plan`` looks only at what is desired and what is observed, never at how it came
to be. So it does not matter at which step a daemon was killed: the next one plans from what it
finds. The returned actions may run at once and in any order; what depends on them is planned when
they are done.

Why this order is safe:

==  =============================================  ==============================================
#   step                                           a kill after it leaves
==  =============================================  ==============================================
1   the volume's document, with its places         a volume without replicas: made by the next plan
2   replica.create at each place                   a replica nobody noted: created again (repeatable)
3   the attachment's document                      an attachment without engine: epoch granted next
4   epoch e+1 granted: compare-and-swap            a grant nobody uses: e+2 is granted next
5   the engine of e+1 starts                       an engine: found by its arguments, adopted
6   attachment marked ``detaching``                the engine is asked again (repeatable)
7   the engine ended: sockets removed              an attachment without engine: removed next
8   volume marked ``deleting``                     replicas are deleted (repeatable), then the document
9   ``replacing`` written: old id, new place       the new replica is created next (repeatable)
10  engine told: old's slot is new's               told again (repeatable); one that restarts knows the old
11  document: new stands in old's place, unless    the engine, or the next one, fills it; what is left of old
    a record names old (compare-and-swap)          is noted as ``retired``
12  all in sync: ``retired`` is deleted there      deleted again (repeatable)
==  =============================================  ==============================================

Growing: replicas first, then ``status.size_bytes``, then the engine: an engine never serves a size
that an in-sync replica does not have, and one that restarts in the middle never serves less than
before.

Replacing: step 10 comes before step 11, so that from 11 on nobody can add the old replica to a record any
more: the engine has forgotten it, and the state store refuses records that name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from control.model import Attachment, Condition, Volume, Who

ENGINE_SILENT_MAX_S = 15.0
"""An engine that lives but answers no control call for this long is ended and replaced: it also
cannot change membership. Longer than any pause we know (a page-cache flush on a slow disk)."""

REPLACE_AFTER_S = 600.0
"""How long a replica's server or disk may be gone until another node gets a new one: longer than a reboot or
a change of a cable, and shorter than the next failure is likely to take. `dolmen up --replace-after`."""

GONE_LOOK_INTERVAL_S = 5.0
"""How often it is looked whether a replica that is not in sync is gone, or back."""

ENGINE_CHECK_INTERVAL_S = 1.0
"""How soon a silent engine is looked at again."""


class NodeState(Enum):
    """A replica server, as its supervisor sees it."""

    UP = "up"
    STARTING = "starting"
    DOWN = "down"  # it ended, and will be started again
    STOPPED = "stopped"  # an operator wants it so


@dataclass(frozen=True, slots=True)
class EngineSeen:
    epoch: int | None  # None: it has not said yet
    size_bytes: int | None
    answering: bool
    silent_s: float  # since it last answered, or started


@dataclass(frozen=True, slots=True)
class Seen:
    """What is observed of one volume."""

    nodes: Mapping[str, NodeState]
    engine: EngineSeen | None = None
    unused_epoch: int = 0  # granted by this daemon and not yet handed to an engine; 0: none
    engine_wait_s: float = 0.0  # until a dead engine may be started again
    engine_end: str = ""  # how the last one ended, for people
    sockets: bool = False  # listening sockets or their files exist
    gone_s: Mapping[str, float] = field(default_factory=dict)  # by replica id: its server or disk is gone
    replace_after_s: float = REPLACE_AFTER_S  # 0: never


# Actions. Values; the executor has one function for each.


@dataclass(frozen=True, slots=True)
class CreateReplica:
    replica_id: str
    node: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ResizeReplica:
    replica_id: str
    node: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DeleteReplica:
    replica_id: str
    node: str


@dataclass(frozen=True, slots=True)
class SetSize:
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GrowEngine:
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GrantEpoch:
    epoch: int


@dataclass(frozen=True, slots=True)
class StartEngine:
    epoch: int


@dataclass(frozen=True, slots=True)
class DetachEngine:
    force: bool


@dataclass(frozen=True, slots=True)
class EndEngine:
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveSockets:
    pass


@dataclass(frozen=True, slots=True)
class RemoveAttachment:
    pass


@dataclass(frozen=True, slots=True)
class RemoveVolume:
    pass


@dataclass(frozen=True, slots=True)
class BeginReplacement:
    """Choose a node, and write that ``old`` is to be replaced there."""

    old: str


@dataclass(frozen=True, slots=True)
class DropReplacement:
    """``old`` is named in sync again."""

    old: str


@dataclass(frozen=True, slots=True)
class SwapReplica:
    """Tell the engine, if there is one, then the document."""

    old: str
    new_id: str


@dataclass(frozen=True, slots=True)
class RemoveRetired:
    replica_id: str
    node: str


Action = (
    CreateReplica
    | ResizeReplica
    | DeleteReplica
    | SetSize
    | GrowEngine
    | GrantEpoch
    | StartEngine
    | DetachEngine
    | EndEngine
    | RemoveSockets
    | RemoveAttachment
    | RemoveVolume
    | BeginReplacement
    | DropReplacement
    | SwapReplica
    | RemoveRetired
)


@dataclass(slots=True)
class Plan:
    """``conditions`` say why the volume is not as desired; no conditions and no actions: it is."""

    actions: list[Action] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    wake_in_s: float | None = None

    def wait(self, reason: str, waits_for: str, who: Who = Who.DOLMEN) -> None:
        self.conditions.append(Condition(reason=reason, waits_for=waits_for, who=who))

    def wake(self, in_s: float) -> None:
        self.wake_in_s = in_s if self.wake_in_s is None else min(self.wake_in_s, in_s)


def plan(volume: Volume, attachment: Attachment | None, seen: Seen) -> Plan:
    made = Plan()
    if attachment is None or attachment.spec.detaching:
        _close(made, attachment, seen)
        if made.actions:
            return made
    if volume.spec.deleting:
        if attachment is None:
            _delete(made, volume, seen)
        else:
            made.wait("detaching", "the attachment to end")
        return made
    _create(made, volume, seen)
    _grow(made, volume, seen)
    _replace(made, volume, attachment, seen)
    _remove_retired(made, volume, seen)
    if attachment is not None and not attachment.spec.detaching:
        _serve(made, volume, seen)
    return made


def _close(made: Plan, attachment: Attachment | None, seen: Seen) -> None:
    """Nobody shall write: no engine, then no sockets, then no attachment."""
    if seen.engine is not None:
        if attachment is None:
            made.actions.append(EndEngine("no attachment wants it"))
        else:
            made.actions.append(DetachEngine(attachment.spec.force))
        made.wait("engine_detaching", "the engine to flush and end")
    elif seen.sockets:
        made.actions.append(RemoveSockets())
    elif attachment is not None:
        made.actions.append(RemoveAttachment())


def _delete(made: Plan, volume: Volume, seen: Seen) -> None:
    waiting = False
    for place in volume.places:
        if place.id in volume.status.deleted:
            continue
        waiting = True
        if _up(made, seen, place.node, "its replica can be deleted"):
            made.actions.append(DeleteReplica(place.id, place.node))
    if not waiting:
        made.actions.append(RemoveVolume())
    made.wait("deleting", "the replicas to be deleted")


def _create(made: Plan, volume: Volume, seen: Seen) -> None:
    for place in volume.spec.replicas:
        if place.id not in volume.status.replica_size_bytes:
            made.wait("replica_creating", f"replica {place.id} to be created on {place.node}")
            if _up(made, seen, place.node, f"replica {place.id} can be created"):
                # Not the wanted size: that may change before a repetition, and a replica that was
                # created without a note must be found as it is asked for. It grows afterwards.
                made.actions.append(CreateReplica(place.id, place.node, volume.status.size_bytes))


def _grow(made: Plan, volume: Volume, seen: Seen) -> None:
    wanted_bytes = volume.spec.size_bytes
    sizes = volume.status.replica_size_bytes
    for place in volume.spec.replicas:
        if sizes.get(place.id, wanted_bytes) < wanted_bytes:
            made.wait("replica_growing", f"replica {place.id} on {place.node} to grow")
            if _up(made, seen, place.node, f"replica {place.id} can grow"):
                made.actions.append(ResizeReplica(place.id, place.node, wanted_bytes))
    # A replica that is not in sync grows when it is back; it must not hold up the others.
    ready = all(sizes.get(member, 0) >= wanted_bytes for member in volume.status.record.in_sync)
    if volume.status.size_bytes < wanted_bytes and ready:
        made.actions.append(SetSize(wanted_bytes))
        made.wait("growing", "the new size to be recorded")
    engine = seen.engine
    served_bytes = engine.size_bytes if engine is not None and engine.answering else None
    if served_bytes is not None and served_bytes < volume.status.size_bytes:
        made.actions.append(GrowEngine(volume.status.size_bytes))
        made.wait("growing", "the engine to serve the new size")


def _replace(made: Plan, volume: Volume, attachment: Attachment | None, seen: Seen) -> None:
    replacing = volume.spec.replacing
    if replacing is None:
        if attachment is not None and not attachment.spec.detaching:
            _replace_gone(made, volume, seen)
        return
    new = replacing.new
    if replacing.old in volume.status.record.in_sync:
        made.actions.append(DropReplacement(replacing.old))
        return
    made.wait("replica_replacing", f"replica {replacing.old} to be replaced by {new.id} on {new.node}")
    if new.id not in volume.status.replica_size_bytes:
        if _up(made, seen, new.node, f"replica {new.id} can be created"):
            made.actions.append(CreateReplica(new.id, new.node, volume.status.size_bytes))
        return
    engine = seen.engine
    serving = engine is not None and engine.answering and engine.epoch == volume.status.epoch
    # An engine that is about to be granted an epoch, or to say which it has, still goes by the old list.
    if serving or (attachment is None and engine is None):
        made.actions.append(SwapReplica(replacing.old, new.id))


def _replace_gone(made: Plan, volume: Volume, seen: Seen) -> None:
    """A replica whose server or disk is gone for long is replaced, if a node has no replica yet."""
    if not seen.replace_after_s:
        return
    used = {place.node for place in volume.places}
    spare = [node for node, state in seen.nodes.items() if state is NodeState.UP and node not in used]
    for place in volume.spec.replicas:
        gone_s = seen.gone_s.get(place.id)
        if gone_s is None or place.id in volume.status.record.in_sync:
            continue
        if not spare:
            made.wait(
                "no_spare_node",
                f"replica {place.id} on {place.node} to come back, or a node without a replica of "
                f"{volume.name} for a new one: `dolmen down`, then `dolmen up --nodes {len(seen.nodes) + 1}`",
                Who.OPERATOR,
            )
        elif gone_s >= seen.replace_after_s:
            made.actions.append(BeginReplacement(place.id))
            return  # one at a time
        else:
            made.wait(
                "replica_gone",
                f"replica {place.id} on {place.node} to come back; after {seen.replace_after_s:.0f} s "
                f"another node gets a new one; at once: `dolmen replica replace {volume.name} {place.id}`",
            )
            made.wake(seen.replace_after_s - gone_s)


def _remove_retired(made: Plan, volume: Volume, seen: Seen) -> None:
    """Only when every replica is well: until then an old copy may be the last resort of somebody."""
    if volume.spec.replacing is not None:
        return
    if not {place.id for place in volume.spec.replicas} <= set(volume.status.record.in_sync):
        return
    for place in volume.status.retired:
        if seen.nodes.get(place.node) is NodeState.UP:
            made.actions.append(RemoveRetired(place.id, place.node))


def _serve(made: Plan, volume: Volume, seen: Seen) -> None:
    """Exactly one engine, and it holds the newest epoch."""
    if any(place.id not in volume.status.replica_size_bytes for place in volume.spec.replicas):
        return  # _create said what it waits for
    engine, epoch = seen.engine, volume.status.epoch
    ended = f" (the last one {seen.engine_end})" if seen.engine_end else ""
    if engine is None:
        made.wait("engine_starting", f"the engine to start{ended}")
        if seen.engine_wait_s > 0:
            made.wake(seen.engine_wait_s)
        elif epoch and seen.unused_epoch == epoch:
            made.actions.append(StartEngine(epoch))
        else:
            made.actions.append(GrantEpoch(epoch + 1))
    elif engine.epoch is not None and engine.epoch != epoch:
        made.actions.append(EndEngine(f"it holds epoch {engine.epoch}, the newest is {epoch}"))
        made.wait("engine_stale", "an engine of an older epoch to end")
    elif not engine.answering:
        made.wait("engine_starting", f"the engine to answer{ended}")
        if engine.silent_s >= ENGINE_SILENT_MAX_S:
            made.actions.append(EndEngine(f"it has not answered for {engine.silent_s:.0f} s"))
        else:
            made.wake(ENGINE_CHECK_INTERVAL_S)


def _up(made: Plan, seen: Seen, node: str, purpose: str) -> bool:
    state = seen.nodes.get(node, NodeState.DOWN)
    if state is NodeState.STOPPED:
        made.wait(
            "node_stopped",
            f"node {node} to be started, then {purpose}: `dolmen node start {node}`",
            Who.OPERATOR,
        )
    elif state is not NodeState.UP:
        made.wait("node_down", f"node {node} to come up, then {purpose}")
    return state is NodeState.UP
