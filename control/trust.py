"""What a grant says about the past, and how a record changes it. Pure.

Owns every change of ``distrust``, ``override``, ``forked``, ``opens`` and ``left_at`` of a volume's status,
and how they reach an engine. Does not own what an engine makes of them (``engine/membership.py``) or the
writes (``control/executor.py``, ``control/engine_rpc.py``).

Promises: a distrust, an override and a fork end only by the record that makes them pointless, in the same
write: whatever is killed when, the next engine is told all that still counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from control.model import Distrust, Override, Record, Volume, VolumeStatus

OLDER_COPY = "an older copy of the state store was put back"
REBUILT = "the state store was rebuilt from the disks"
NEWER_EPOCH = "replicas were claimed in an epoch that the state store never granted"


def distrusted(status: VolumeStatus, reason: str, now: str) -> VolumeStatus:
    """Repeatable: what is distrusted already keeps its reason, and since when. An override may be among what
    was forgotten, so every replica may be a fork until a record names it."""
    distrust = status.distrust or Distrust(reason=reason, epoch=0, since=now)
    distrust = distrust.model_copy(update={"epoch": status.epoch})
    forked = tuple(sorted(status.replica_size_bytes))
    return status.model_copy(update={"distrust": distrust, "forked": forked})


def overridden(
    status: VolumeStatus, members: tuple[str, ...], newest: tuple[int, int], now: str
) -> VolumeStatus:
    """An operator decided. The engine that runs does not know it, and is fenced in the same write."""
    fenced = _fenced(status)
    override = Override(members=members, newest=newest, epoch=fenced.epoch, since=now)
    return fenced.model_copy(update={"override": override})


def withdrawn(status: VolumeStatus) -> VolumeStatus:
    """The decision is taken back; an engine that was told of it is fenced in the same write."""
    return _fenced(status).model_copy(update={"override": None})


def _fenced(status: VolumeStatus) -> VolumeStatus:
    """An epoch that nobody has: the state store takes no record of the engine before it any more, the daemon
    ends that engine, and the next grant is above it. Whatever is killed when."""
    assert status.grant is not None
    grant = status.grant.model_copy(update={"epoch": status.epoch + 1, "engine_id": "nobody"})
    return status.model_copy(update={"grant": grant})


def with_record(status: VolumeStatus, record: Record, opens: Mapping[str, int], now: str) -> VolumeStatus:
    """The status once ``record`` is stored."""
    replicas = status.replica_size_bytes.keys()
    in_sync = frozenset(record.in_sync)
    forked = frozenset(status.forked)
    override, distrust = status.override, status.distrust
    if override is not None and record.epoch > override.epoch:
        forked |= replicas - in_sync  # whatever they hold beyond this record was given up
        override = None
    if distrust is not None and record.epoch > distrust.epoch:
        distrust = None
    left = {r: status.left_at.get(r, now) for r in sorted(replicas - in_sync)}
    known = {**status.opens, **opens}
    return status.model_copy(
        update={
            "record": record,
            "opens": {r: known[r] for r in sorted(known.keys() & replicas)},
            "distrust": distrust,
            "override": override,
            "forked": tuple(sorted(forked - in_sync)),
            "left_at": left,
        }
    )


def grant_keys(volume: Volume, *, predecessor_ended: bool) -> dict[str, Any]:
    """What the engine is told beyond the record; only what differs from the defaults of PROTOCOL.md."""
    status = volume.status
    forked = set(status.forked)
    keys: dict[str, Any] = {}
    if status.override is not None:
        keys["override"] = {
            "members": list(status.override.members),
            "newest": list(status.override.newest),
        }
        # At once, not only when its record is stored: who comes back meanwhile is one of them.
        forked |= {place.id for place in volume.spec.replicas} - set(status.override.members)
    if predecessor_ended:
        keys["predecessor_ended"] = True
    if status.opens:
        keys["opens"] = dict(status.opens)
    if status.distrust is not None:
        keys["distrust_store"] = True
    if forked:
        keys["forked"] = sorted(forked)
    return keys
