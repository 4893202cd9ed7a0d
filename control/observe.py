"""What is shown of volumes, replicas and nodes: documents joined with what the processes say now.

Owns the words people read (``VolumeState``, ``ReplicaState``) and how they follow from what is known.
Asks replica servers and engines at once, each with a short deadline: who does not answer is shown
as not answering, and nobody waits for it. Changes nothing, but tells an engine's slot whether it answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from control.engines import EngineSlot
from control.layout import Layout
from control.links import ASK_TIMEOUT_S
from control.listeners import LOOPBACK
from control.model import Attachment, Volume
from control.supervisor import NodeSupervisor
from control.views import (
    SERVING,
    EngineView,
    MembershipView,
    NodeView,
    ReplicaState,
    ReplicaView,
    ResyncView,
    VolumeState,
    VolumeView,
)
from control.why import NodeFacts, ProcessFacts, VolumeFacts
from protocol.errors import StorageError


@dataclass(frozen=True, slots=True)
class ServerSaid:
    """What a replica server answered to server.status; empty when it did not."""

    disk_id: str = ""
    space_total_bytes: int | None = None
    space_free_bytes: int | None = None
    volumes: Mapping[str, Mapping[str, Any]] | None = None  # by volume id; None: it did not answer


async def ask_server(supervisor: NodeSupervisor) -> ServerSaid:
    try:
        said = await supervisor.link.call("server.status", timeout_s=ASK_TIMEOUT_S)
    except StorageError:
        return ServerSaid()
    if not isinstance(said, dict):
        return ServerSaid()
    volumes = said.get("volumes")
    listed = volumes if isinstance(volumes, list) else []
    return ServerSaid(
        disk_id=str(said.get("disk_id", "")),
        space_total_bytes=_int(said.get("space_total_bytes")),
        space_free_bytes=_int(said.get("space_free_bytes")),
        volumes={str(v.get("volume_id")): v for v in listed if isinstance(v, dict)},
    )


async def ask_servers(supervisors: Iterable[NodeSupervisor]) -> dict[str, ServerSaid]:
    asked = list(supervisors)
    answers = await asyncio.gather(*(ask_server(supervisor) for supervisor in asked))
    return {supervisor.name: said for supervisor, said in zip(asked, answers, strict=True)}


async def ask_engine(slot: EngineSlot) -> Mapping[str, Any] | None:
    """engine.status, or None when there is no engine or it does not answer."""
    link = slot.link
    if link is None:
        return None
    try:
        said = await link.call("engine.status", timeout_s=ASK_TIMEOUT_S)
    except StorageError:
        slot.missed()
        return None
    if not isinstance(said, dict):
        return None
    slot.heard()
    return said


def volume_state(
    volume: Volume, attachment: Attachment | None, engine: Mapping[str, Any] | None
) -> VolumeState:
    if volume.spec.deleting:
        return VolumeState.DELETING
    if attachment is None:
        created = all(place.id in volume.status.replica_size_bytes for place in volume.spec.replicas)
        return VolumeState.DETACHED if created else VolumeState.CREATING
    if attachment.spec.detaching:
        return VolumeState.DETACHING
    word = None if engine is None or engine.get("epoch") != volume.status.epoch else engine.get("state")
    # An engine that speaks of a state we do not know is not yet serving as far as we can tell.
    return VolumeState(word) if word in {state.value for state in SERVING} else VolumeState.ATTACHING


def replica_state(
    replica_id: str,
    volume: Volume,
    said_by_engine: Mapping[str, Any] | None,
    said_by_server: Mapping[str, Any] | None,
) -> tuple[ReplicaState, str]:
    """The state and, unless it is in sync, the reason."""
    if said_by_engine is not None:
        word, reason = said_by_engine.get("state"), str(said_by_engine.get("reason") or "")
        if word == "offline" and said_by_server is not None:
            # The engine has no session with it (a full disk, a damaged file), but its server answers.
            if said_by_server.get("state") != "open":
                return ReplicaState.STALE, str(said_by_server.get("reason") or said_by_server.get("state"))
            if replica_id not in volume.status.record.in_sync:
                word = ReplicaState.STALE.value
        if word in {state.value for state in ReplicaState}:
            return ReplicaState(word), reason
    if said_by_server is None:
        return ReplicaState.OFFLINE, "its replica server does not answer"
    if said_by_server.get("state") != "open":
        return ReplicaState.STALE, str(said_by_server.get("reason") or said_by_server.get("state"))
    if replica_id not in volume.status.record.in_sync:
        return ReplicaState.STALE, "it missed writes; it is resynced while the volume is attached"
    return ReplicaState.IN_SYNC, ""


def view_volume(
    volume: Volume,
    attachment: Attachment | None,
    engine_pid: int | None,
    servers: Mapping[str, ServerSaid],
    supervisors: Mapping[str, NodeSupervisor],
    engine: Mapping[str, Any] | None,
    layout: Layout,
) -> VolumeView:
    state = volume_state(volume, attachment, engine)
    replicas = _replica_views(volume, servers, supervisors, engine, layout)
    # While an engine restarts, connects wait in the socket's backlog: the address stays good.
    attached = attachment is not None and not attachment.spec.detaching
    reachable = state in SERVING or (attached and layout.nbd_socket(volume.name).exists())
    tcp_port = attachment.status.tcp_port if attachment else 0
    return VolumeView(
        name=volume.name,
        volume_id=volume.spec.volume_id,
        size_bytes=volume.status.size_bytes,
        wanted_size_bytes=volume.spec.size_bytes,
        replica_count=len(volume.spec.replicas),
        state=state,
        nbd_uri=nbd_uri(layout, volume.name) if reachable else None,
        nbd_tcp_uri=nbd_tcp_uri(tcp_port, volume.name) if reachable and tcp_port else None,
        epoch=volume.status.epoch,
        membership=_membership(volume, engine),
        engine=_engine_view(engine_pid, volume, engine),
        replicas=replicas,
        conditions=list(volume.status.conditions),
    )


def volume_facts(
    volume: Volume,
    attachment: Attachment | None,
    slot: EngineSlot | None,
    servers: Mapping[str, ServerSaid],
    engine: Mapping[str, Any] | None,
    view: VolumeView,
    unreadable: Mapping[str, Collection[int]],
) -> VolumeFacts:
    by_engine = _by_engine(engine)
    offline = {id_: r for id_, r in by_engine.items() if r.get("state") == "offline"}
    status = volume.status
    said = {place.id: _said(volume, place.node, servers) for place in volume.spec.replicas}
    return VolumeFacts(
        view=view,
        attached=attachment is not None,
        process=slot.process_facts(answers=engine is not None) if slot else ProcessFacts(),
        said=said,
        scrub_found={id_: _int(found.get("damaged_count")) or 0 for id_, found in said.items() if found},
        scrub_unreadable={id_: len(unreadable.get(id_, ())) for id_ in said},
        offline=frozenset(offline),
        reasons={id_: str(r.get("reason") or "") for id_, r in offline.items()},
        distrust=status.distrust,
        override=status.override,
        forked=status.forked,
        left_at=status.left_at,
    )


def node_facts(
    supervisor: NodeSupervisor, said: ServerSaid, layout: Layout, known_ids: Collection[str] | None
) -> NodeFacts:
    """``known_ids``: of all volumes; None: not all are looked at."""
    held = said.volumes or {}
    strays = [v for id_, v in held.items() if known_ids is not None and id_ not in known_ids]
    return NodeFacts(
        name=supervisor.name,
        state=supervisor.state,
        process=supervisor.process_facts(answers=said.volumes is not None),
        path=str(layout.disk_dir(supervisor.name)),
        space_total_bytes=said.space_total_bytes,
        space_free_bytes=said.space_free_bytes,
        strays=tuple(sorted(str(stray.get("path")) for stray in strays)),
    )


def _membership(volume: Volume, engine: Mapping[str, Any] | None) -> MembershipView:
    """The engine's committed record is the newest; the store's may lag by a version."""
    stored = volume.status.record
    match engine:
        case {"membership": {"epoch": int(epoch), "version": int(version), "in_sync": list(members)}} if (
            epoch,
            version,
        ) >= (stored.epoch, stored.version):
            return MembershipView(epoch=epoch, version=version, in_sync=sorted(map(str, members)))
        case _:
            return MembershipView(epoch=stored.epoch, version=stored.version, in_sync=sorted(stored.in_sync))


def _engine_view(pid: int | None, volume: Volume, engine: Mapping[str, Any] | None) -> EngineView | None:
    if pid is None or volume.status.grant is None:
        return None
    return EngineView(
        node=volume.status.grant.node,
        pid=pid,
        answering=engine is not None,
        clients=_count(engine.get("clients")) if engine else None,
        waiting_for=_waiting_for(engine.get("waiting_for")) if engine else [],
    )


def _by_engine(engine: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """By replica id, what the engine says of it."""
    listed = engine.get("replicas") if engine else None
    return {str(r.get("id")): r for r in listed if isinstance(r, dict)} if isinstance(listed, list) else {}


def _said(volume: Volume, node: str, servers: Mapping[str, ServerSaid]) -> Mapping[str, Any] | None:
    """replica.inspect, or None when its server does not answer."""
    volumes = servers.get(node, ServerSaid()).volumes
    if volumes is None:
        return None
    missing = {"state": "missing", "reason": "the replica server does not hold it (yet)"}
    return volumes.get(volume.spec.volume_id, missing)


def _replica_views(
    volume: Volume,
    servers: Mapping[str, ServerSaid],
    supervisors: Mapping[str, NodeSupervisor],
    engine: Mapping[str, Any] | None,
    layout: Layout,
) -> list[ReplicaView]:
    by_engine = _by_engine(engine)
    views = []
    for place in volume.spec.replicas:
        said = _said(volume, place.node, servers)
        state, reason = replica_state(place.id, volume, by_engine.get(place.id), said)
        supervisor = supervisors.get(place.node)
        path = layout.disk_dir(place.node) / "replicas" / volume.spec.volume_id
        views.append(
            ReplicaView(
                id=place.id,
                volume=volume.name,
                node=place.node,
                pid=supervisor.pid if supervisor else None,
                state=state,
                reason=reason,
                path=str(said.get("path") or path) if said else str(path),
                size_bytes=volume.status.replica_size_bytes.get(place.id, 0),
                dirty_count=_int(said.get("dirty_count")) if said else None,
                resync=_resync(by_engine.get(place.id)),
            )
        )
    return views


def _resync(said: Mapping[str, Any] | None) -> ResyncView | None:
    match said:
        case {
            "resync": {
                "regions_done": int(done),
                "regions_total": int(total),
                "bytes_copied": int(copied),
            }
        }:
            return ResyncView(regions_done=done, regions_total=total, bytes_copied=copied)
        case _:
            return None


def view_node(supervisor: NodeSupervisor, said: ServerSaid, layout: Layout) -> NodeView:
    return NodeView(
        name=supervisor.name,
        state=supervisor.state.value,
        pid=supervisor.pid,
        address=f"{LOOPBACK}:{supervisor.port}" if supervisor.port else "",
        path=str(layout.disk_dir(supervisor.name)),
        disk_id=said.disk_id,
        space_total_bytes=said.space_total_bytes,
        space_free_bytes=said.space_free_bytes,
        replica_count=len(said.volumes) if said.volumes is not None else None,
        conditions=[],
    )


def nbd_uri(layout: Layout, name: str) -> str:
    socket = quote(str(layout.nbd_socket(name)), safe="/")
    return f"nbd+unix:///{name}?socket={socket}"


def nbd_tcp_uri(port: int, name: str) -> str:
    return f"nbd://{LOOPBACK}:{port}/{name}"


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _waiting_for(value: Any) -> list[dict[str, str]]:
    listed = value if isinstance(value, list) else []
    return [{str(k): str(v) for k, v in item.items()} for item in listed if isinstance(item, dict)]


def _count(value: Any) -> int | None:
    return len(value) if isinstance(value, list | dict) else _int(value)
