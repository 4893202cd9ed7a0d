"""A cluster in one list: the pure volume machine, replicas that persist what they are told, a state store and
a data plane that follow the contract of ``_dataplane.pyi``. No clock, no socket: what is under way stands in
``calls`` and ``inbox`` until a test lets it happen.

A region is one block of two halves: a write replaces both, a partial write one. A half's content is the id of
the last write applied to it. Writes reach all links in one order, so a replica holds a write if the halves
have that id or a later one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, combinations
from typing import Any

from engine.events import (
    AttachLink,
    BeginResync,
    Call,
    CallFailed,
    ChangedListed,
    Claim,
    Claimed,
    Cleaned,
    CleanReplica,
    CloseSession,
    CompleteRegions,
    DirtyListed,
    EndResync,
    Event,
    Fenced,
    LinkAttached,
    LinkDown,
    ListChanged,
    ListDirty,
    Log,
    PersistRecord,
    PullIncomplete,
    PullRegions,
    RecordPersisted,
    RecordStored,
    RegionDiverged,
    RegionsPulled,
    RegionWanted,
    ReplicaCall,
    ReplicaDown,
    ReplicaUp,
    Reply,
    Resized,
    ResizeReplica,
    ResyncBegun,
    ResyncEnded,
    Retarget,
    Started,
    StartTimer,
    Stop,
    StoreDown,
    StoreRecord,
    StoreUp,
    Timer,
    TimerFired,
    TimerKind,
)
from engine.membership import Hints, MayOpen, decide_open
from engine.opening import Grant, VolumeSpec
from engine.replica_entry import ReplicaEntry
from engine.volume import Volume
from protocol.frames import Status
from protocol.membership import MembershipRecord
from tests.engine.sim_loop import SimLoop, Write
from tests.engine.sim_replica import GIB as GIB
from tests.engine.sim_replica import Half, Halves
from tests.engine.sim_replica import SimReplica as SimReplica

ENGINE_STATE = (
    "epoch",
    "calls",
    "inbox",
    "wanted_record",
    "wanted_opens",
    "timers",
    "lease_over_s",
    "replies",
    "log",
    "loop",
    "connected",
    "volume",
    "exit_code",
)

CALLS: dict[type, Call] = {
    Claim: Call.CLAIM,
    AttachLink: Call.ATTACH,
    PersistRecord: Call.PERSIST,
    ListDirty: Call.DIRTY,
    ListChanged: Call.CHANGED,
    BeginResync: Call.BEGIN,
    PullRegions: Call.PULL,
    EndResync: Call.END,
    CompleteRegions: Call.COMPLETE,
    ResizeReplica: Call.RESIZE,
    CleanReplica: Call.CLEAN,
}


class Cluster:
    """One volume on ``count`` replicas. Starts blank, with an engine of epoch 1 about to open it."""

    def __init__(self, count: int = 3, *, start: bool = True) -> None:
        self.replicas = [SimReplica(slot, "ABCDE"[slot]) for slot in range(count)]
        self.ids = tuple(replica.id for replica in self.replicas)
        self.stored = MembershipRecord(0, 0, frozenset(self.ids))
        self.store_alive = True
        self.epoch = 0  # of the engine that acts
        self.granted = 0  # the newest epoch
        self.now_s = 0.0
        self.asleep: list[dict[str, Any]] = []  # engines that are stopped, and do not know that time passes
        self.out_of_reach: set[int] = set()  # slots that the newest engine can't connect to
        self.hints = Hints()
        self.distrusted_epoch = 0
        self.forked: frozenset[str] = frozenset()
        self.size_bytes = GIB
        self.written: dict[int, Halves] = {}  # by write id
        self.acked: dict[Half, int] = {}  # the newest acknowledged write of each half
        self.sessions = [0] * count
        self.exit_codes: list[int] = []
        self.started = False
        self.copied_halves = 0  # by pulls
        self.backed_off: set[int] = set()  # slots that are tried again later, being what they are
        self.fail_pulls_from: set[int] = set()  # slots that no target can read from
        if start:
            self.start_engine()

    # The engine process

    def start_engine(self) -> None:
        """The daemon grants the next epoch and starts an engine."""
        assert self.store_alive, "an epoch is granted by the state store"
        self.granted += 1
        self.epoch = self.granted
        self.calls: list[ReplicaCall] = []
        self.inbox: list[Event] = []
        self.wanted_record: MembershipRecord | None = None
        self.wanted_opens: tuple[tuple[str, int], ...] = ()
        self.timers: list[Timer] = []
        self.lease_over_s = 0.0
        self.replies: dict[int, object] = {}
        self.log: list[Log] = []
        self.loop = SimLoop(self)
        self.loop.last_id = len(self.written)
        self.connected: dict[int, int] = {}  # slot -> session
        self.backed_off.clear()
        self.granted_record = self.stored
        grant = Grant(predecessor_ended=not self.asleep, hints=self.hints, forked=self.forked)
        spec = VolumeSpec("v", "v", self.size_bytes, self.epoch, self.stored, self.ids, grant=grant)
        self.volume = Volume(spec)
        self.exit_code: int | None = None
        self.tell(Started())
        self.tell(StoreUp())

    def tell(self, event: Event) -> None:
        """One step of the machine; its immediate actions are done, its calls are put under way."""
        if isinstance(event, RegionDiverged):
            self.loop.diverged_seen += 1
        for action in self.volume.step(event):
            self.carry_out(action)

    def carry_out(self, action: object) -> None:
        match action:
            case Log():
                self.log.append(action)
            case StartTimer(timer, delay_s):
                if timer.kind is TimerKind.LEASE:
                    self.lease_over_s = self.now_s + delay_s
                self.timers = [t for t in self.timers if (t.kind, t.slot) != (timer.kind, timer.slot)]
                self.timers.append(timer)
            case Retarget():
                pass
            case Reply(request, error):
                self.replies[request] = error
            case Stop(exit_code):
                self.exit_code = exit_code
                self.exit_codes.append(exit_code)
                self.calls.clear()
                self.inbox.clear()
                self.connected.clear()
                self.wanted_record = None
            case StoreRecord(record, opens):
                self.wanted_record, self.wanted_opens = record, opens
            case CloseSession(slot, session, _):
                if self.connected.get(slot) == session:
                    del self.connected[slot]
                if self.replicas[slot].state != "open":
                    self.backed_off.add(slot)
                self.calls = [c for c in self.calls if (c.slot, c.session) != (slot, session)]
            case (
                Claim()
                | AttachLink()
                | PersistRecord()
                | ListDirty()
                | ListChanged()
                | BeginResync()
                | PullRegions()
                | EndResync()
                | CompleteRegions()
                | ResizeReplica()
                | CleanReplica()
            ):
                self.calls.append(action)
            case _:
                self.loop.do(action)

    def crash_engine(self) -> None:
        """kill -9: what was queued to replicas never arrives."""
        self.exit_code = -9
        self.calls.clear()
        self.inbox.clear()
        self.loop.links.clear()
        self.loop.writes.clear()
        self.loop.members = self.loop.readers = ()
        self.connected.clear()

    def stop_engine(self) -> None:
        """SIGSTOP: it does nothing, and nobody tells it anything, until ``as_sleeper``."""
        assert self.running
        self.asleep.append({name: getattr(self, name) for name in ENGINE_STATE})
        self.exit_code = -19

    @contextmanager
    def as_sleeper(self, number: int = -1) -> Iterator[None]:
        """SIGCONT: what is done in here, this older engine does. Then it is stopped again, or has ended."""
        newer = {name: getattr(self, name) for name in ENGINE_STATE}
        older = self.asleep[number]
        for name in ENGINE_STATE:
            setattr(self, name, older[name])
        try:
            yield
        finally:
            older.update({name: getattr(self, name) for name in ENGINE_STATE})
            for name in ENGINE_STATE:
                setattr(self, name, newer[name])
            if older["exit_code"] is not None:
                older["loop"].links.clear()
                self.asleep.remove(older)

    def lock_out_sleepers(self, slot: int) -> None:
        """A claim, or the end of the process, closes the sessions of older engines."""
        for older in self.asleep:
            link = older["loop"].detach(slot)
            if link is not None:
                older["inbox"].append(LinkDown(slot, link.generation, "the replica closed it"))
            session = older["connected"].pop(slot, None)
            older["calls"] = [call for call in older["calls"] if call.slot != slot]
            if session is not None:
                older["inbox"].append(ReplicaDown(slot, session, "the replica closed it"))

    @property
    def running(self) -> bool:
        return self.exit_code is None

    # Replicas

    def replica(self, replica_id: str) -> SimReplica:
        return self.replicas[self.ids.index(replica_id)]

    def entry(self, replica_id: str) -> ReplicaEntry:
        return self.volume.entries[self.ids.index(replica_id)]

    def put_new_replica(self, slot: int, replica_id: str) -> None:
        """A blank one in the place of another; the daemon's next grant names it."""
        self.replicas[slot] = SimReplica(slot, replica_id)
        self.ids = tuple(replica.id for replica in self.replicas)

    def connect(self, slot: int) -> None:
        """The engine's connection attempt succeeds."""
        assert self.replicas[slot].alive and slot not in self.connected
        self.sessions[slot] += 1
        self.connected[slot] = self.sessions[slot]
        self.inbox.append(ReplicaUp(slot, self.sessions[slot], self.replicas[slot].report()))

    def kill(self, replica_id: str, *, power: bool = False) -> None:
        """The process dies, or the machine with its page cache."""
        replica = self.replica(replica_id)
        if power:
            replica.lose_power()
            self.forget_lost_writes()
        else:
            replica.lose_process()
        self.cut(replica_id, reason="connection reset")
        self.lock_out_sleepers(replica.slot)

    def photograph(self, replica_id: str) -> SimReplica:
        """A copy of its directory."""
        return deepcopy(self.replica(replica_id))

    def put_back(self, photo: SimReplica, *, in_place: bool = False) -> None:
        """The directory becomes what it was. ``in_place``: without new files, so that only its count of opens
        can tell."""
        slot = photo.slot
        self.kill(photo.id)
        old, new = self.replicas[slot], deepcopy(photo)
        assert not in_place or photo.opens + 1 < old.opens
        new.lose_process()
        new.process = old.process
        new.restored = new.restored or not in_place
        new.doubtful = new.dirty | new.stamps.keys()
        self.replicas[slot] = new

    def put_back_store(self, stored: MembershipRecord) -> None:
        """The state store becomes what it was, and the daemon finds out."""
        assert not self.running
        self.stored = stored
        self.distrusted_epoch = self.granted
        self.hints = Hints({}, True, None)

    def forget_lost_writes(self) -> None:
        """An acknowledged, unflushed write that this machine alone held is gone, and that is the contract."""
        for half, write in list(self.acked.items()):
            survivor = max(replica.content.get(half, 0) for replica in self.replicas)
            self.acked[half] = min(survivor, write)

    def cut(self, replica_id: str, reason: str = "cut", status: int = 0) -> None:
        """Link and session are lost; the process lives if it lived."""
        slot = self.ids.index(replica_id)
        if not self.running:
            return
        link = self.loop.detach(slot)
        if link is not None:
            self.inbox.append(LinkDown(slot, link.generation, reason, status))
        session = self.connected.pop(slot, None)
        self.calls = [call for call in self.calls if call.slot != slot]
        if session is not None:
            self.inbox.append(ReplicaDown(slot, session, reason))

    def start(self, replica_id: str) -> None:
        self.replica(replica_id).alive = True

    def fail_write(self, replica_id: str, status: Status) -> None:
        """The oldest write of a link is answered with an error by this replica alone."""
        slot = self.ids.index(replica_id)
        link = self.loop.detach(slot)
        assert link is not None
        self.inbox.append(LinkDown(slot, link.generation, "a write failed", status))

    def diverge(self, region: int) -> None:
        """A write that all members answer with an error; each may have applied it or not."""
        loop = self.loop
        for slot in loop.members:
            while loop.links[slot].queue:
                loop.deliver(slot)
        halves: Halves = ((region, 0), (region, 1))
        write_id = loop.last_id = self.new_write_id(halves)
        for slot, link in loop.links.items():
            if slot not in loop.members:
                link.queue.append(write_id)
            elif loop.members.index(slot) % 2 == 0:
                self.replicas[slot].apply(halves, write_id)
            else:
                self.replicas[slot].mark(region)
        loop.unequal.add(region)
        loop.diverged.setdefault(region, write_id)
        loop.diverged_count += 1
        loop.diverged_at[region] = loop.diverged_count
        self.inbox.append(RegionDiverged(region))

    def want(self, region: int) -> None:
        self.inbox.append(RegionWanted(region))

    # The state store

    def store_down(self) -> None:
        self.store_alive = False
        self.inbox.append(StoreDown("daemon is away"))

    def store_back(self) -> None:
        self.store_alive = True
        self.inbox.append(StoreUp())

    def store_now(self) -> None:
        record = self.wanted_record
        assert record is not None and self.store_alive
        self.wanted_record = None
        if record.epoch != self.granted:
            self.inbox.append(Fenced("the state store"))
            return
        self.stored = max(self.stored, record, key=lambda r: r.stamp)
        opens = {**self.hints.opens, **dict(self.wanted_opens)}
        distrust = self.hints.distrust_store and record.epoch <= self.distrusted_epoch
        self.hints = Hints(opens, distrust, None)
        self.forked -= record.in_sync
        self.inbox.append(RecordStored(record.stamp))

    # What is under way

    def new_write_id(self, halves: Halves) -> int:
        write_id = len(self.written) + 1
        self.written[write_id] = halves
        return write_id

    def write(self, region: int, half: int | None = None) -> int:
        """A client writes a block, or half of it."""
        assert self.running and not self.loop.paused
        assert half is None or not self.partial_must_wait(region)
        halves = tuple((region, h) for h in (0, 1) if half is None or half == h)
        write_id = self.new_write_id(halves)
        self.loop.write(write_id, halves)
        return write_id

    def partial_must_wait(self, region: int) -> bool:
        return region in self.loop.unequal or region in self.loop.partial_wait

    def on_acked(self, write: Write) -> None:
        for half in write.halves:
            self.acked[half] = max(self.acked.get(half, 0), write.id)

    def is_acked(self, write_id: int) -> bool:
        return all(self.acked.get(half, 0) >= write_id for half in self.written[write_id])

    def run_call(self, index: int = 0, *, fail: str = "") -> None:
        """A call reaches its replica and is answered, or fails with the code ``fail``."""
        call = self.calls.pop(index)
        replica = self.replicas[call.slot]
        if self.connected.get(call.slot) != call.session:
            return
        if not replica.alive:
            fail = "unreachable"
        answer = None if fail else self._execute(replica, call)
        if isinstance(answer, str):
            fail = answer
        if fail:
            regions = call.regions if isinstance(call, PullRegions) else ()
            other = -1
            if isinstance(call, ListChanged | PullRegions):
                other = call.target if isinstance(call, ListChanged) else call.source
            self.inbox.append(
                CallFailed(call.slot, call.session, CALLS[type(call)], fail, fail, regions, other)
            )
        elif answer is not None:
            self.inbox.append(answer)

    def _execute(self, replica: SimReplica, call: ReplicaCall) -> Event | str | None:
        slot, session = call.slot, call.session
        if not isinstance(call, Claim) and replica.epoch != self.epoch:
            return "stale_epoch"
        match call:
            case Claim(opens=opens):
                if replica.state != "open":
                    return f"replica_{replica.state}"
                if replica.epoch > self.epoch:
                    return "stale_epoch"
                if replica.opens < opens:
                    replica.restored = True
                replica.opens += 1
                if replica.epoch < self.epoch:
                    self.lock_out_sleepers(slot)
                    replica.doubtful = replica.dirty | (replica.stamps.keys() if replica.restored else set())
                    replica.fresh.clear()
                replica.epoch = self.epoch
                replica.closed = False
                return Claimed(slot, session, replica.report())
            case AttachLink(mode=mode):
                generation = self.loop.attach(slot, mode)
                return LinkAttached(slot, session, generation)
            case PersistRecord(record=record):
                replica.persist(record)
                return RecordPersisted(slot, session, record.stamp)
            case ListDirty():
                return DirtyListed(slot, session, tuple(sorted(replica.dirty)))
            case ListChanged(target=target, since=since):
                changed = tuple(sorted(r for r, stamp in replica.stamps.items() if stamp > since))
                return ChangedListed(slot, session, target, changed)
            case BeginResync(regions=regions):
                replica.fresh = dict.fromkeys(regions, False)
                for region in regions:
                    replica.mark(region)
                    replica.doubtful.add(region)
                return ResyncBegun(slot, session)
            case PullRegions(source=source, regions=regions):
                if source in self.fail_pulls_from:
                    return "unreachable"
                return self._pull_whole(replica, self.replicas[source], call)
            case EndResync():
                replica.flush()
                replica.fresh.clear()
                return ResyncEnded(slot, session)
            case CompleteRegions(regions=regions):
                replica.doubtful -= set(regions)
                if replica.id in replica.record.in_sync and not replica.doubtful:
                    replica.suspect = replica.restored = False
                return None
            case ResizeReplica(size_bytes=size_bytes):
                replica.size_bytes = max(replica.size_bytes, size_bytes)
                return Resized(slot, session, size_bytes)
            case CleanReplica():
                replica.flush()
                replica.dirty.clear()
                replica.doubtful.clear()
                replica.suspect = replica.restored = False
                replica.closed = True
                return Cleaned(slot, session)

    def _pull_whole(self, replica: SimReplica, source: SimReplica, call: PullRegions) -> Event | str:
        """What is damaged at the source is left as it is, or taken so if the call says it."""
        rotten = source.rotten.intersection(call.regions)
        whole = tuple(region for region in call.regions if region not in rotten)
        answer = self._pull(replica, source, call.slot, call.session, whole)
        if isinstance(answer, str) or not rotten:
            return answer
        if not call.take_damaged:
            return PullIncomplete(call.slot, call.session, call.source, call.regions, 4096)
        for region in rotten:
            replica.fresh.pop(region, None)
            replica.lost.add(region)
        return RegionsPulled(call.slot, call.session, call.regions, 4096, len(rotten))

    def _pull(
        self, replica: SimReplica, source: SimReplica, slot: int, session: int, regions: tuple[int, ...]
    ) -> Event | str:
        if not source.alive or source.epoch != self.epoch:
            return "source_failed"
        for region in regions:
            # A region that left the set is copied with nothing tracked, as badly as the contract allows.
            if not replica.fresh.pop(region, False):
                for half in ((region, 0), (region, 1)):
                    theirs = source.content.get(half, 0)
                    self.copied_halves += replica.content.get(half, 0) != theirs
                    replica.content[half] = theirs
        return RegionsPulled(slot, session, regions, 4096)

    def run_event(self, index: int = 0) -> None:
        self.tell(self.inbox.pop(index))

    def fire(self, kind: TimerKind) -> None:
        due = [timer for timer in self.timers if timer.kind is kind]
        if due and kind is TimerKind.LEASE:
            self.now_s = max(self.now_s, self.lease_over_s)
        self.timers = [timer for timer in self.timers if timer.kind is not kind]
        for timer in due:
            self.tell(TimerFired(timer))

    def settle(self, *, connect: bool = True, until: Callable[[], bool] | None = None) -> None:
        """Let everything happen in order until nothing is left (or ``until``). Timers do not fire."""
        for _ in range(10_000):
            if not self.running or (until is not None and until()):
                return
            if self.inbox:
                self.run_event()
            elif self.calls:
                self.run_call()
            elif self.wanted_record is not None and self.store_alive:
                self.store_now()
            elif slot := self._slot_with_frames():
                self.loop.deliver(slot - 1)
            elif connect and (missing := self._connectable()):
                self.connect(missing[0])
            else:
                return
        raise AssertionError("the cluster does not settle")

    def _slot_with_frames(self) -> int:
        """Slot + 1 of a link with frames, or 0."""
        for slot, link in self.loop.links.items():
            if link.queue and self.replicas[slot].alive:
                return slot + 1
        return 0

    def _connectable(self) -> list[int]:
        self.backed_off = {slot for slot in self.backed_off if self.replicas[slot].state != "open"}
        return [
            r.slot
            for r in self.replicas
            if r.alive and self.can_connect(r.slot) and r.slot not in self.backed_off
        ]

    def can_connect(self, slot: int) -> bool:
        cut_off = self.epoch == self.granted and slot in self.out_of_reach
        return slot not in self.connected and not cut_off

    def open(self) -> None:
        """From a new engine to one that serves, with whoever is there."""
        self.settle()
        self.fire(TimerKind.STRAGGLERS)
        self.settle()
        self.fire(TimerKind.LEASE)
        self.settle()

    # What must always hold

    def holds(self, replica_id: str, write: int) -> bool:
        """Whether a replica has this write, or a later one in its place."""
        content = self.replica(replica_id).content
        return all(content.get(half, 0) >= write for half in self.written[write])

    def check_no_open_loses_a_write(self) -> None:
        """Whatever subset of the replicas the next engine reaches: if it may open, all it opens with hold
        every acknowledged write (C7, C13)."""
        for reachable in _subsets(self.replicas):
            reports = {replica.id: replica.report() for replica in reachable}
            decision = decide_open(self.stored, reports, self.ids, self.hints)
            if not isinstance(decision, MayOpen):
                continue
            for member in decision.members:
                content = self.replica(member).content
                for half, write in self.acked.items():
                    assert content.get(half, 0) >= write, (
                        f"opened by {sorted(reports)} under {decision.newest}, {member} lacks write {write}"
                    )

    def check_reads(self) -> None:
        """Whoever may serve reads answers alike, and with every acknowledged write (C1, C8, C9)."""
        if not self.running:
            return
        answers: dict[Half, set[int]] = {}
        for slot in self.loop.readers:
            link = self.loop.links.get(slot)
            if link is None:
                continue
            content = dict(self.replicas[slot].content)
            for write_id in link.queue:  # a read stands behind them
                content.update(dict.fromkeys(self.written[write_id], write_id))
            for half in {h for halves in self.written.values() for h in halves}:
                if half[0] not in self.loop.unequal:
                    answers.setdefault(half, set()).add(content.get(half, 0))
        for half, found in answers.items():
            assert len(found) == 1, f"{half} reads as {found}"
            assert found.pop() >= self.acked.get(half, 0), f"{half} lost an acknowledged write"

    def check_no_stale_read(self) -> None:
        """Whatever any engine may tell a client now, paused or not, is no older than what was acknowledged or
        told by any (C11, C9)."""
        loops = [self.loop] if self.running else []
        for loop in [*loops, *(older["loop"] for older in self.asleep)]:
            for half, newest in self.acked.items():
                for said in loop.readable(half):
                    assert said >= newest, f"epoch {loop.epoch} reads {half} as {said}, newest is {newest}"

    def read(self, half: Half) -> bool:
        """A client is told what a half holds. From then on it stays so, or is overwritten."""
        said = self.loop.readable(half)
        for value in said:
            self.acked[half] = max(self.acked.get(half, 0), value)
        return bool(said)

    def check(self) -> None:
        self.check_no_open_loses_a_write()
        self.check_reads()
        self.check_no_stale_read()


def _subsets(items: list[SimReplica]) -> Iterable[tuple[SimReplica, ...]]:
    return chain.from_iterable(combinations(items, count) for count in range(len(items) + 1))
