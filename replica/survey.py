"""What a disk's directory says of itself, read without serving it: the way in for whoever rebuilds a cluster.

Owns reading. Does not own the formats (``disk.py``, ``metadata.py``) or what is made of it
(``control/recover_disks.py``). Works beside a replica server that runs: both files are replaced whole, and
hold what was answered.

Promises: writes nothing, locks nothing, creates nothing; what cannot be read is named, never taken for empty.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from protocol.errors import ReplicaDamaged
from protocol.membership import MembershipRecord
from replica.disk import DISK_FILE, DISK_FILE_BYTES_MAX, REPLICAS_DIR, judge_replicas
from replica.metadata import ReplicaMeta, read_meta

NO_RECORD = MembershipRecord(0, 0, frozenset())
"""What a replica holds that was never in use."""


@dataclass(frozen=True, slots=True)
class SurveyedReplica:
    """``trouble`` says why the rest is not known; "" when it is."""

    volume_id: str  # the name of its directory
    path: str
    trouble: str = ""
    replica_id: str = ""
    name: str = ""
    size_bytes: int = 0
    epoch: int = 0
    record: MembershipRecord = NO_RECORD
    synced_at: tuple[int, int] = (0, 0)
    chain: tuple[str, ...] = ()
    opens: int = 0
    suspect: bool = False
    restored: bool = False


@dataclass(frozen=True, slots=True)
class SurveyedDisk:
    """``trouble`` says why nothing of it is known; "" when it is."""

    path: str
    trouble: str = ""
    disk_id: str = ""
    node_id: str = ""
    replicas: tuple[SurveyedReplica, ...] = ()
    strange: tuple[str, ...] = ()  # names among the replicas that are not ours


def survey_disk(path: str) -> SurveyedDisk:
    """Blocking. Never raises for what it finds."""
    try:
        with open(os.path.join(path, DISK_FILE), "rb") as file:
            wire = json.loads(file.read(DISK_FILE_BYTES_MAX + 1))
    except FileNotFoundError:
        return SurveyedDisk(path, f"it has no {DISK_FILE}: not a disk of ours, or its mount is missing")
    except OSError as error:
        return SurveyedDisk(path, f"{DISK_FILE}: {error.strerror or error}")
    except (ValueError, RecursionError) as error:
        return SurveyedDisk(path, f"{DISK_FILE} is damaged: {str(error)[:100]}")
    match wire:
        case {"format": "dolmen-disk", "version": 1, "disk_id": str(disk_id), "node_id": str(node_id)}:
            pass
        case _:
            return SurveyedDisk(path, f"{DISK_FILE} is not one that this program knows")
    directory = os.path.join(path, REPLICAS_DIR)
    try:
        listing = judge_replicas(os.listdir(directory))
    except FileNotFoundError:
        return SurveyedDisk(path, "", disk_id, node_id)  # made after disk.json: it never held a replica
    except OSError as error:
        return SurveyedDisk(path, f"{REPLICAS_DIR}: {error.strerror or error}")
    replicas = tuple(_survey_replica(os.path.join(directory, id_), id_) for id_ in listing.volume_ids)
    return SurveyedDisk(path, "", disk_id, node_id, replicas, listing.strange)


def _survey_replica(path: str, volume_id: str) -> SurveyedReplica:
    try:
        meta = read_meta(path)
    except ReplicaDamaged as error:
        return SurveyedReplica(volume_id, path, str(error.fields.get("reason", error)))
    except OSError as error:
        return SurveyedReplica(volume_id, path, error.strerror or str(error))
    if meta.volume_id != volume_id:
        return SurveyedReplica(volume_id, path, f"it says that it belongs to volume {meta.volume_id}")
    return _known(meta, path)


def _known(meta: ReplicaMeta, path: str) -> SurveyedReplica:
    return SurveyedReplica(
        volume_id=meta.volume_id,
        path=path,
        replica_id=meta.replica_id,
        name=meta.name,
        size_bytes=meta.size_bytes,
        epoch=meta.epoch,
        record=meta.record,
        synced_at=meta.synced_at,
        chain=meta.chain,
        opens=meta.opens,
        suspect=meta.suspect,
        restored=meta.restored,
    )
