"""One replica of the cluster in ``simulation.py``: what its disk and its process remember."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.events import (
    ReplicaReport,
)
from protocol.membership import MembershipRecord

GIB = 1024**3
Half = tuple[int, int]  # region, half of its block
Halves = tuple[Half, ...]
Stamp = tuple[int, int]


@dataclass
class SimReplica:
    """What one replica's disk and process remember."""

    slot: int
    id: str
    alive: bool = True
    epoch: int = 0
    claimed_by: int = 0
    record: MembershipRecord = field(default_factory=lambda: MembershipRecord(0, 0, frozenset()))
    synced_at: Stamp = (0, 0)
    size_bytes: int = GIB
    suspect: bool = False
    opens: int = 1
    restored: bool = False
    closed: bool = False  # its epoch ended with a clean detach
    state: str = "open"
    content: dict[Half, int] = field(default_factory=dict)
    stable: dict[Half, int] = field(default_factory=dict)  # what a power loss leaves
    stamps: dict[int, Stamp] = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    doubtful: set[int] = field(default_factory=set)  # may not be cleaned until complete_regions
    last_write: dict[int, int] = field(default_factory=dict)
    fresh: dict[int, bool] = field(default_factory=dict)  # the begin_resync set
    process: int = 1
    rotten: set[int] = field(default_factory=set)  # regions with a block that verifies nowhere here
    lost: set[int] = field(default_factory=set)  # regions taken as damaged

    def report(self) -> ReplicaReport:
        return ReplicaReport(
            replica_id=self.id,
            size_bytes=self.size_bytes,
            epoch=self.epoch,
            record=self.record,
            synced_at=self.synced_at,
            process_id=str(self.process),
            suspect=self.suspect,
            state=self.state,
            reason="" if self.state == "open" else "injected",
            opens=self.opens,
            restored=self.restored,
            closed=self.closed,
        )

    def mark(self, region: int) -> None:
        self.dirty.add(region)
        self.stamps[region] = max(self.stamps.get(region, (0, 0)), self.record.stamp)

    def apply(self, halves: Halves, write: int) -> None:
        region = halves[0][0]
        self.mark(region)
        self.content.update(dict.fromkeys(halves, write))
        self.last_write[region] = write
        if region in self.fresh and len(halves) == 2:
            self.fresh[region] = True

    def persist(self, record: MembershipRecord) -> None:
        assert record.stamp >= self.record.stamp
        self.record = record
        for region in self.dirty:
            self.stamps[region] = record.stamp
        if self.id in record.in_sync:
            self.synced_at = record.stamp

    def flush(self) -> None:
        self.stable = dict(self.content)

    def clean(self, completed: int) -> None:
        """The lazy cleaner, at its most eager."""
        for region in sorted(self.dirty - self.doubtful - self.fresh.keys()):
            if self.last_write.get(region, 0) <= completed:
                self.stable.update({b: w for b, w in self.content.items() if b[0] == region})
                self.dirty.discard(region)

    def lose_process(self) -> None:
        self.alive = False
        self.process += 1
        self.opens += 1
        self.fresh.clear()
        self.doubtful = set(self.dirty) | (self.stamps.keys() if self.restored else set())

    def lose_power(self) -> None:
        self.lose_process()
        if self.dirty:
            self.suspect = True
            self.content = dict(self.stable)
