"""What the REST API takes and shows: requests and answers, as pydantic models.

Owns the names and the words of the outside face; ``/openapi.json`` is generated from here. Does not
own what is stored (``control/model.py``).
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from control.model import Condition, Model, Name, ReplicaCount, SizeBytes, Who


class VolumeState(Enum):
    """Words for the state of a volume."""

    CREATING = "creating"  # its replicas are being made
    DETACHED = "detached"  # no engine; nobody can read or write
    ATTACHING = "attaching"  # an engine starts, or claims its replicas
    HEALTHY = "healthy"  # attached; every replica is in sync
    DEGRADED = "degraded"  # attached; I/O flows, with fewer replicas in sync than there are
    WAITING = "waiting"  # attached; I/O waits for replicas
    DETACHING = "detaching"
    DELETING = "deleting"


SERVING = frozenset({VolumeState.HEALTHY, VolumeState.DEGRADED, VolumeState.WAITING})


class ReplicaState(Enum):
    """Words for the state of a replica."""

    IN_SYNC = "in_sync"  # holds every acknowledged write
    RESYNCING = "resyncing"  # is brought up to date
    STALE = "stale"  # reachable, has missed a write, or cannot be opened
    OFFLINE = "offline"  # its replica server does not answer


class Empty(Model):
    pass


class VolumeCreate(Model):
    name: Name
    size_bytes: SizeBytes
    replica_count: ReplicaCount = 3


class VolumeAttach(Model):
    tcp: bool = Field(default=False, description="also listen on a TCP port of 127.0.0.1")


class VolumeDetach(Model):
    force: bool = Field(
        default=False, description="do not wait for replicas; what was not acknowledged is dropped"
    )


class VolumeResize(Model):
    size_bytes: SizeBytes


class ReplicaReplace(Model):
    to: Name | None = Field(
        default=None, description="the node for the new replica; none: the best is chosen"
    )
    dry_run: bool = Field(default=False, description="only say what would be done")


class NodeStop(Model):
    kill: bool = Field(default=False, description="SIGKILL instead of a clean stop")


class Shutdown(Model):
    everything: bool = Field(default=False, description="also stop engines and replica servers")


WaitS = Annotated[float, Field(ge=0, le=300)]
"""How long a request may take until its goal is reached; then the answer says what it waits for."""


class MembershipView(Model):
    epoch: int
    version: int
    in_sync: list[str]


class EngineView(Model):
    node: str
    pid: int | None
    answering: bool
    clients: int | None = None
    waiting_for: list[dict[str, str]] = Field(default=[], description="who must come back before I/O goes on")


class ResyncView(Model):
    regions_done: int
    regions_total: int
    bytes_copied: int


class ReplicaView(Model):
    id: str
    volume: str
    node: str
    pid: int | None = Field(description="of its replica server")
    state: ReplicaState
    reason: str = ""
    path: str
    size_bytes: int
    dirty_count: int | None = Field(default=None, description="regions marked in its write-intent log")
    resync: ResyncView | None = None


class VolumeView(Model):
    name: str
    volume_id: str
    size_bytes: int
    wanted_size_bytes: int
    replica_count: int
    state: VolumeState
    nbd_uri: str | None
    nbd_tcp_uri: str | None
    epoch: int
    membership: MembershipView
    engine: EngineView | None
    replicas: list[ReplicaView]
    conditions: list[Condition]


class ReplacementView(Model):
    """A replica that gives its place to a new one; `volume` tells how far the new one is."""

    old: str
    new: str
    node: str
    dry_run: bool
    size_bytes: int
    volume: VolumeView


class VolumeDeleted(Model):
    gone: bool
    volume: VolumeView | None = Field(default=None, description="when it is not gone yet")


class VolumeList(Model):
    volumes: list[VolumeView]


class ReplicaList(Model):
    replicas: list[ReplicaView]


class NodeView(Model):
    name: str
    state: str = Field(description="up, starting, down, stopped")
    pid: int | None
    address: str
    path: str
    disk_id: str
    space_total_bytes: int | None
    space_free_bytes: int | None
    replica_count: int | None
    conditions: list[Condition]


class NodeList(Model):
    nodes: list[NodeView]


class JobState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # could not finish; the result says why


class Verdict(Enum):
    """What a verification found."""

    SAME = "same"  # every replica holds the same bytes and every checksum verifies
    DIFFERENT = "different"  # damaged blocks, or in-sync replicas that differ
    INCOMPLETE = "incomplete"  # nothing bad was found, but not everything could be compared


class ReplicaVerified(Model):
    id: str
    node: str
    compared: bool
    reason: str = ""  # why not compared
    blocks_verified: int = 0
    blocks_zero: int = 0
    damaged_count: int = 0
    damaged_blocks: list[int] = Field(default=[], description="the first of them, block numbers")
    digest: str = Field(default="", description="over all regions; equal digests mean equal bytes")


class VerifyResult(Model):
    verdict: Verdict
    online: bool
    regions_total: int
    regions_equal: int
    regions_different: list[int] = Field(description="the first of them")
    regions_different_count: int
    regions_busy: list[int] = Field(
        description="written at every look: their checksums verify, that the copies are equal is not proven"
    )
    regions_busy_count: int
    replicas: list[ReplicaVerified]


class ScrubVerdict(Enum):
    """What a scrub found and left."""

    CLEAN = "clean"  # every replica was read, and every checksum verifies
    REPAIRED = "repaired"  # damage was found, and none is left
    DAMAGED = "damaged"  # damage is left
    INCOMPLETE = "incomplete"  # no damage is left, but not every replica was read


class DamagedBlock(Model):
    block_index: int
    offset_bytes: int = Field(description="in the volume")
    repaired: bool
    unreadable: bool = Field(description="no replica has a good copy: reads of it fail until it is written")


class ReplicaScrubbed(Model):
    id: str
    node: str
    scrubbed: bool
    reason: str = ""  # why not to the end, or why damage is left
    blocks_verified: int = 0
    found_count: int = 0
    left_count: int = 0
    findings: list[DamagedBlock] = Field(default=[], description="the first of them")


class ScrubResult(Model):
    verdict: ScrubVerdict
    attached: bool = Field(description="damage is repaired only while the volume is attached")
    replicas: list[ReplicaScrubbed]


class JobView(Model):
    id: str
    kind: str
    volume: str
    state: JobState
    done: int
    total: int
    unit: str
    error: str = ""
    result: VerifyResult | ScrubResult | None = None


class JobList(Model):
    jobs: list[JobView]


class DaemonView(Model):
    version: str
    pid: int
    dir: str
    socket: str
    tcp_address: str
    uptime_s: float


class StatusView(Model):
    """The cluster at a glance."""

    daemon: DaemonView
    nodes: list[NodeView]
    volumes: list[VolumeView]


class FindingView(Model):
    """One thing that is not as desired."""

    about: str = Field(description='"node node2", "replica data-r2", "volume data", "the state store"')
    reason: str = Field(description="a word for programs; docs/states.md lists them")
    text: str = Field(description="what is wrong")
    then: str = Field(description="what happens by itself, or what to look at")
    command: str = Field(description="what to run, if anything")
    who: Who
    since: str
    because: str = Field(description="`about` of the finding that this one follows from; empty: a root cause")
    concerns: list[str] = Field(description="names of the nodes, replicas and volumes it is about or harms")


class WhyView(Model):
    """Root causes first."""

    healthy: bool
    findings: list[FindingView]


class Health(Model):
    ready: bool = Field(description="every node that should run serves, every attached volume is served")
    waits_for: list[str]


class ErrorView(Model):
    code: str
    message: str
    fields: dict[str, Any]
