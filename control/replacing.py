"""Replacing a replica that is gone by a new one on another node: what is written, and who counts as gone.

Owns every change of a volume's document on this way, each a compare-and-swap that checks what must still be
true; how ids of new replicas are made (never one that was used); and the watch over replicas that are not in
sync. Does not own the order of the steps (``control/reconcile.py``) or the filling (the engine's).

Promises: a replica that the state store's record names is never replaced; from the moment it is, no record
that names it can be stored any more; nothing of it is deleted before every other replica is in sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog

from control.documents import Document, Store, update
from control.links import ASK_TIMEOUT_S, Link
from control.model import KIND_VOLUME, Replacement, ReplicaPlace, Volume, VolumeStatus, dump
from control.placement import NodeSpace, place
from control.reconcile import NodeState
from protocol.errors import BadRequest, NotEnoughNodes, ReplicaNotFound, StorageError

GONE_STATES = frozenset({"damaged", "failed"})
"""What a server may say of a replica that will not come back by itself."""


class Servers(Protocol):
    def states(self) -> Mapping[str, NodeState]: ...
    def link(self, node: str) -> Link: ...


class GoneWatch:
    """Which replicas of one volume are gone, and for how long. In memory and by a clock that cannot be set:
    a daemon that restarts waits anew, which is never too short."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since_s: dict[str, float] = {}
        self.watching = False  # somebody is not in sync

    def gone_s(self) -> dict[str, float]:
        return {replica: self._now() - since_s for replica, since_s in self._since_s.items()}

    async def look(self, volume: Volume, servers: Servers) -> None:
        in_sync = volume.status.record.in_sync
        missing = [p for p in volume.spec.replicas if p.id not in in_sync]
        self.watching = bool(missing)
        found = await asyncio.gather(*(self._is_gone(p, volume, servers) for p in missing))
        for looked_at, gone in zip(missing, found, strict=True):
            if gone is True:
                self._since_s.setdefault(looked_at.id, self._now())
            elif gone is False:
                self._since_s.pop(looked_at.id, None)
        names = {p.id for p in missing}
        self._since_s = {r: since_s for r, since_s in self._since_s.items() if r in names}

    async def _is_gone(self, looked_at: ReplicaPlace, volume: Volume, servers: Servers) -> bool | None:
        """None: it can't be told just now."""
        match servers.states().get(looked_at.node, NodeState.DOWN):
            case NodeState.DOWN:
                return True
            case NodeState.STOPPED:
                return False  # somebody stopped it, and will start it
            case NodeState.STARTING:
                return None
        try:
            said = await servers.link(looked_at.node).call(
                "replica.inspect", timeout_s=ASK_TIMEOUT_S, volume_id=volume.spec.volume_id
            )
        except ReplicaNotFound:
            return True
        except StorageError:
            return None
        return isinstance(said, dict) and said.get("state") in GONE_STATES


def new_place(volume: Volume, node: str) -> ReplicaPlace:
    """An id that no replica of this volume ever had."""
    return ReplicaPlace(id=f"{volume.name}-r{_highest_number(volume) + 1}", node=node)


def _highest_number(volume: Volume) -> int:
    numbers = [place.id.rpartition("-r")[2] for place in volume.places]
    return max(
        volume.spec.replica_number,
        len(volume.spec.replicas),
        *(int(number) for number in numbers if number.isdigit()),
    )


def choose_node(volume: Volume, nodes: list[NodeSpace]) -> str:
    """The best that has nothing of this volume. Raises NotEnoughNodes."""
    used = {p.node for p in volume.places}
    try:
        return place([node for node in nodes if node.node not in used], 1)[0]
    except NotEnoughNodes:
        raise NotEnoughNodes(
            f"There is nowhere to go: every node that is up already has a replica of {volume.name} "
            f"({len(nodes)} nodes, {len(volume.spec.replicas)} replicas). "
            f"`dolmen down`, then `dolmen up --nodes {len(nodes) + 1}` adds one.",
            wanted=len(used) + 1,
            available=sum(node.up for node in nodes),
        ) from None


def check_node(volume: Volume, node: str, state: NodeState) -> None:
    """Raises BadRequest unless a new replica may go there."""
    if any(p.node == node for p in volume.places):
        raise BadRequest(reason=f"node {node} has, or had, a replica of {volume.name}. Name another one")
    if state is not NodeState.UP:
        raise BadRequest(reason=f"node {node} is {state.value}, it has to be up")


def refuse_replacement(volume: Volume, replica_id: str, *, attached: bool) -> None:
    """Raises BadRequest unless nobody counts on that replica."""
    if replica_id not in {p.id for p in volume.spec.replicas}:
        raise BadRequest(
            reason=f"volume {volume.name} has no replica {replica_id[:80]!r}. `dolmen replica ls` lists them"
        )
    if volume.spec.deleting:
        raise BadRequest(reason=f"volume {volume.name} is being deleted")
    if replica_id in volume.status.record.in_sync:
        then = (
            "only one that is not is replaced. Stop its node first if it is to leave it"
            if attached
            else f"`dolmen volume attach {volume.name}` first, which takes it out of the record if it is gone"
        )
        raise BadRequest(reason=f"replica {replica_id} is named in sync: {then}")


# Changes of the document


async def begin(store: Store, name: str, old: str, new: ReplicaPlace) -> None:
    """Write the wish. Repeatable; one that is under way for ``old`` is aimed elsewhere. Raises BadRequest."""

    def change(volume: Volume) -> Volume | None:
        refuse_replacement(volume, old, attached=True)
        under_way = volume.spec.replacing
        if under_way is not None and under_way.old != old:
            raise BadRequest(reason=f"replica {under_way.old} is being replaced; one after the other")
        status = volume.status
        if under_way is not None:
            # Once it is made the engine may know it: it gets its place, and is replaced in turn if need be.
            if under_way.new.node == new.node or under_way.new.id in status.replica_size_bytes:
                return None
            status = _without(status, under_way.new)
        number = max(_highest_number(volume), int(new.id.rpartition("-r")[2]))
        spec = volume.spec.model_copy(
            update={"replacing": Replacement(old=old, new=new), "replica_number": number}
        )
        return _changed(volume, spec=spec, status=status)

    await _change(store, name, change)


async def drop(store: Store, name: str, old: str) -> None:
    """The wish is out of date: ``old`` is back in sync."""

    def change(volume: Volume) -> Volume | None:
        under_way = volume.spec.replacing
        if under_way is None or under_way.old != old or old not in volume.status.record.in_sync:
            return None
        status = _without(volume.status, under_way.new)
        return _changed(volume, spec=volume.spec.model_copy(update={"replacing": None}), status=status)

    await _change(store, name, change)


async def swap(store: Store, name: str, old: str) -> None:
    """The new replica takes the place of ``old``, which no record may name from here on. Raises BadRequest if
    one does by now."""

    def change(volume: Volume) -> Volume | None:
        under_way = volume.spec.replacing
        if under_way is None or under_way.old != old:
            return None
        if old in volume.status.record.in_sync:
            raise BadRequest(reason=f"replica {old} is named in sync by now")
        gone = next(p for p in volume.spec.replicas if p.id == old)
        replicas = tuple(under_way.new if p is gone else p for p in volume.spec.replicas)
        spec = volume.spec.model_copy(update={"replicas": replicas, "replacing": None})
        # Compared as a whole: engine/replacing.py says why.
        forked = tuple(sorted({*volume.status.forked, under_way.new.id} - {old}))
        status = _without(volume.status, gone).model_copy(update={"forked": forked})
        return _changed(volume, spec=spec, status=status)

    await _change(store, name, change)


async def forget_retired(store: Store, name: str, replica_id: str) -> None:
    def change(volume: Volume) -> Volume | None:
        left = tuple(p for p in volume.status.retired if p.id != replica_id)
        return _changed(volume, status=volume.status.model_copy(update={"retired": left}))

    await _change(store, name, change)


def _without(status: VolumeStatus, retired: ReplicaPlace) -> VolumeStatus:
    """``engine_rpc.py`` refuses records that name a replica without a size."""
    sizes = {r: size for r, size in status.replica_size_bytes.items() if r != retired.id}
    return status.model_copy(update={"replica_size_bytes": sizes, "retired": (*status.retired, retired)})


def _changed(volume: Volume, *, spec: Any = None, status: Any = None) -> Volume:
    document = volume.document
    wanted = document.spec if spec is None else dump(spec)
    done = document.status if status is None else dump(status)
    return Volume(Document(document.kind, document.name, wanted, done, document.revision))


async def _change(store: Store, name: str, change: Callable[[Volume], Volume | None]) -> None:
    def changed(document: Document) -> Document | None:
        made = change(Volume(document))
        return made.document if made is not None else None

    await update(store, KIND_VOLUME, name, changed)


async def remove_retired(link: Link, volume: Volume, replica_id: str) -> None:
    """Delete what is left of a replaced replica, if it still is that one (C22). Repeatable."""
    volume_id = volume.spec.volume_id
    try:
        said = await link.call("replica.inspect", volume_id=volume_id)
    except ReplicaNotFound:
        return
    found = said.get("replica_id") if isinstance(said, dict) else None
    if found not in (replica_id, ""):  # "": so damaged that it does not say
        structlog.get_logger().warning(
            "left alone: another replica than the one that was replaced",
            volume=volume.name,
            replica=replica_id,
            found=str(found)[:80],
        )
        return
    await link.call("replica.delete", volume_id=volume_id)
