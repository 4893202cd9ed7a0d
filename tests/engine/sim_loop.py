"""The data plane of an engine in ``simulation.py``: links, unfinished writes, acknowledgements, the lease."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.events import (
    Barrier,
    DetachLink,
    Drained,
    LinkMode,
    PartialDone,
    Pause,
    Quorums,
    RegionsEqual,
    SetLease,
    SetMembers,
    SetPartialWait,
    SetReaders,
    SetSize,
    SetUnequal,
)
from protocol.limits import READ_LEASE_S
from tests.engine.sim_replica import Half, Halves

if TYPE_CHECKING:
    from tests.engine.simulation import Cluster


@dataclass
class Link:
    generation: int
    mode: LinkMode
    queue: list[int] = field(default_factory=list)  # ids of writes not yet applied there


@dataclass
class Write:
    id: int
    halves: Halves
    answered: set[int] = field(default_factory=set)
    done: bool = False


class SimLoop:
    """The data plane, as far as membership can see it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.epoch = cluster.epoch
        self.links: dict[int, Link] = {}
        self.lease: Quorums = ()
        self.heard_s: dict[int, float] = {}  # when the newest frame that a slot answered was sent
        self.generation = 0
        self.members: tuple[int, ...] = ()
        self.readers: tuple[int, ...] = ()
        self.unequal: set[int] = set()
        self.partial_wait: set[int] = set()
        self.diverged: dict[int, int] = {}  # region -> first write that failed everywhere
        self.diverged_at: dict[int, int] = {}  # region -> number of the last such event
        self.diverged_count = 0
        self.diverged_seen = 0  # events that the machine was told
        self.paused = False
        self.writes: list[Write] = []  # unfinished, in order
        self.barriers: list[tuple[int, int]] = []  # token, last write before it
        self.last_id = 0

    def write(self, write_id: int, halves: Halves) -> None:
        self.last_id = write_id
        self.writes.append(Write(write_id, halves))
        for link in self.links.values():
            link.queue.append(write_id)

    def attach(self, slot: int, mode: LinkMode) -> int:
        self.generation += 1
        unfinished = [write.id for write in self.writes] if mode is LinkMode.SYNC else []
        for write in self.writes:
            write.answered.discard(slot)
        self.links[slot] = Link(self.generation, mode, unfinished)
        return self.generation

    def detach(self, slot: int) -> Link | None:
        return self.links.pop(slot, None)

    def answers(self, slot: int) -> bool:
        """Whether a frame to this slot is answered: a replica checks the epoch when it applies."""
        replica = self.cluster.replicas[slot]
        return slot in self.links and replica.alive and replica.epoch == self.epoch

    def renew(self) -> None:
        """A LEASE frame to everybody who is connected is sent, and answered at once."""
        self.heard_s.update({slot: self.cluster.now_s for slot in self.links if self.answers(slot)})

    def lease_holds(self) -> bool:
        fresh = {slot for slot, at_s in self.heard_s.items() if self.cluster.now_s - at_s < READ_LEASE_S}
        return bool(self.lease) and all(len(fresh & set(slots)) >= need for slots, need in self.lease)

    def readable(self, half: Half) -> set[int]:
        """What a client may be told now that the half holds: the readers' answers. A read stands behind the
        writes sent before it, and is answered when all members have those that it met (C9)."""
        if not self.lease_holds() or half[0] in self.unequal:
            return set()
        if any(half in write.halves for write in self.writes):
            return set()
        return {self.cluster.replicas[s].content.get(half, 0) for s in self.readers if self.answers(s)}

    def deliver(self, slot: int) -> None:
        """The oldest frame of a link is applied and answered."""
        if not self.answers(slot):
            return
        link = self.links[slot]
        replica = self.cluster.replicas[slot]
        write_id = link.queue.pop(0)
        replica.apply(self.cluster.written[write_id], write_id)
        for write in self.writes:
            if write.id == write_id:
                write.answered.add(slot)
        self.settle()

    def settle(self) -> None:
        """Acknowledge what is held by all members; answer barriers."""
        if not self.members:
            return
        for write in self.writes:
            if write.answered >= set(self.members):
                write.done = True
                self.cluster.on_acked(write)
        self.writes = [write for write in self.writes if not write.done]
        for token, last in list(self.barriers):
            waiting = any(write.id <= last for write in self.writes)
            queued = any(
                slot not in self.links or any(w <= last for w in self.links[slot].queue)
                for slot in self.members
            )
            if not waiting and not queued:
                self.barriers.remove((token, last))
                self.cluster.inbox.append(Drained(token))

    @property
    def completed(self) -> int:
        """All writes up to this one are done, and none of them left the members unequal."""
        first_undone = min([write.id for write in self.writes] + list(self.diverged.values()), default=0)
        return first_undone - 1 if first_undone else self.last_id

    def do(self, action: object) -> None:
        match action:
            case DetachLink(slot, generation):
                link = self.links.get(slot)
                if link is not None and link.generation == generation:
                    self.detach(slot)
            case SetMembers(slots):
                self.members = slots
            case SetLease(quorums):
                assert all(0 < need <= len(slots) for slots, need in quorums)
                self.lease = quorums
            case SetReaders(slots):
                assert set(slots) <= set(self.members), "who serves reads is a member"
                self.readers = slots
            case SetUnequal(regions):
                self.unequal |= set(regions)
            case PartialDone(regions):
                self.partial_wait -= set(regions)
            case SetPartialWait(regions):
                self.partial_wait = set(regions)
            case RegionsEqual(regions):
                for region in regions:
                    if self.diverged_at.get(region, 0) <= self.diverged_seen:
                        self.unequal.discard(region)
                        self.partial_wait.discard(region)
                        self.diverged.pop(region, None)
            case Barrier(token):
                self.barriers.append((token, self.last_id))
            case Pause(paused):
                self.paused = paused
            case SetSize():
                pass
            case _:
                raise AssertionError(action)
        self.settle()
