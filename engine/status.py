"""What ``engine.status`` answers: the machine's state in the glossary's words. Pure.

States of a volume: attaching, healthy, degraded, waiting, detached; of a replica: in_sync, resyncing, stale,
offline (ARCHITECTURE.md, "Words").
"""

from __future__ import annotations

from typing import Any

from engine.phase import VolumePhase
from engine.replica_entry import RESYNC_STATES, ReplicaEntry, ReplicaState
from engine.volume import Volume
from protocol.membership import MembershipRecord

RUNNING = (VolumePhase.SERVING, VolumePhase.DETACHING, VolumePhase.CLEANING)


def volume_status(volume: Volume, *, clients: int) -> dict[str, Any]:
    return {
        "volume_id": volume.spec.volume_id,
        "name": volume.spec.name,
        "epoch": volume.spec.epoch,
        "state": volume_state(volume),
        "size_bytes": volume.size_bytes,
        "membership": _record(volume).to_wire(),
        "replicas": [_replica(volume, entry) for entry in volume.entries],
        "waiting_for": waiting_for(volume),
        "clients": clients,
    }


def _record(volume: Volume) -> MembershipRecord:
    """The committed record, or the newest known one while the volume is being opened."""
    ledger = volume.ledger
    return ledger.committed if ledger is not None and ledger.opened else volume.opening.newest


def volume_state(volume: Volume) -> str:
    if volume.ended:
        return "detached"
    opening = volume.opening
    if volume.phase not in RUNNING:
        return "waiting" if opening.must_wait is not None and opening.stragglers_waited else "attaching"
    up = {entry.id for entry in volume.members_up()}
    assert volume.ledger is not None
    if not volume.ledger.exposed <= up | _joiner(volume):
        return "waiting"  # for moments, at every loss; longer when the record can't be committed
    return "healthy" if len(up) == len(volume.entries) else "degraded"


def _joiner(volume: Volume) -> set[str]:
    return {volume.joining.target.id} if volume.joining is not None else set()


def waiting_for(volume: Volume) -> list[dict[str, str]]:
    """Who must come back before requests go on, and why. Empty while they flow."""
    ledger = volume.ledger
    if volume.ended or volume_state(volume) not in ("waiting", "attaching"):
        return []
    if ledger is None:
        wait = volume.opening.must_wait
        if wait is None:
            return []
        return [{"replica": replica, "reason": wait.reason} for replica in sorted(wait.waiting_for)]
    found = [
        {"replica": entry.id, "reason": entry.reason or "on its way"}
        for entry in volume.entries
        if entry.id in ledger.exposed and not entry.in_sync and not volume.members_up()
    ]
    if ledger.proposed is not None and ledger.needs_store() and not volume.store_up:
        found.append({"store": "state store", "reason": volume.store_reason})
    return found


def replica_state(volume: Volume, entry: ReplicaEntry) -> str:
    if entry.state is ReplicaState.OFFLINE:
        return "offline"
    if entry.state in RESYNC_STATES:
        return "resyncing"
    if entry.in_sync:
        return "in_sync"
    # Connected, and not (yet) part of I/O: what the record says of it.
    return "in_sync" if entry.id in _record(volume).in_sync and not entry.suspect else "stale"


def _replica(volume: Volume, entry: ReplicaEntry) -> dict[str, Any]:
    state = replica_state(volume, entry)
    said: dict[str, Any] = {
        "id": entry.id,
        "slot": entry.slot,
        "state": state,
        "reason": "" if state == "in_sync" else entry.reason,
    }
    joining = volume.joining
    if joining is not None and joining.target is entry:
        plan = joining.plan
        said["resync"] = {
            "regions_done": plan.done_count if plan else 0,
            "regions_total": plan.total_count if plan else 0,
            "bytes_copied": plan.bytes_copied if plan else 0,
        }
        if joining.waits_for_store:
            said["reason"] = "up to date; the state store must record it"
    return said
