"""A replica server of one replica: replica/replicas.py, replica/calls.py and the data plane's service on
virtual time, over the real rules of replica/epoch.py and a simulated disk.

Owns the order of what happens to a replica: what is durable before what is answered. The rules (who may
claim, what a record changes, when a replica is suspect) are the real functions. Does not own what a store
keeps (``stores.py``) or who calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from protocol.errors import (
    DiskError,
    NoSpace,
    SourceFailed,
    StaleEpoch,
    StorageError,
    Unreachable,
)
from protocol.frames import Status
from protocol.limits import REGION_BLOCKS
from protocol.membership import MembershipRecord
from replica import epoch as epochs
from replica.metadata import NEVER_SYNCED, ReplicaMeta
from tests.sim.kernel import Lock, Process, Sim, Steps, Task
from tests.sim.network import Calls, Endpoint, Network
from tests.sim.stores import DiskFault, ModelStore, StoreFailed

VOLUME_ID = "v"

REOPEN_INTERVAL_S = 1.0
CLEAN_TICK_S = 1.0
PEER_SILENCE_S = 10.0
"""As in the real server."""


class MetaFile:
    """replica.meta: what a process reads, and what a power loss leaves."""

    def __init__(self, meta: ReplicaMeta) -> None:
        self.visible = meta
        self.durable = [meta]  # more than one: a rename that the directory's sync did not confirm

    def lose_cache(self, random: Random) -> None:
        self.visible = random.choice(self.durable)
        self.durable = [self.visible]


class Machine:
    """A host with one disk that holds one replica. Outlives the server process."""

    def __init__(self, sim: Sim, network: Network, slot: int, replica_id: str, size_bytes: int) -> None:
        self.sim = sim
        self.network = network
        self.slot = slot
        self.host = f"r{slot}"
        self.address = f"r{slot}:replica"
        self.replica_id = replica_id
        self.boot = 1
        self.process_count = 0
        self.powered = True
        self.disk_s = 0.0005  # of one sync
        self.store: Any = ModelStore(sim.random)
        self.meta = MetaFile(first_meta(replica_id, size_bytes, boot_id=self.boot_id))
        self.meta_fault = ""  # "no_space" or "io_error": of the next write of replica.meta
        self.server: ReplicaServer | None = None
        self.on_loss: Callable[[str], None] = lambda replica_id: None  # acknowledged writes may be gone here
        self.backup: tuple[ReplicaMeta, Any] | None = None
        self.put_back = False  # replica.meta stands in another file than it was written to

    @property
    def boot_id(self) -> str:
        return f"{self.host}-boot{self.boot}"

    def start(self) -> None:
        if self.powered and self.server is None:
            self.process_count += 1
            self.server = ReplicaServer(self)
            self.network.listeners[self.address] = self.server

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server = None
            self.store.crash()

    def lose_power(self) -> None:
        if not self.powered:
            return
        if self.server is not None:
            self.server.kill(power=True)
            self.server = None
        self.powered = False
        self.network.power(self.host, False)
        self.store.crash()
        if self.store.dirty_regions():
            self.on_loss(self.replica_id)
        self.store.lose_cache()
        self.meta.lose_cache(self.sim.random)

    def regain_power(self) -> None:
        if not self.powered:
            self.powered = True
            self.boot += 1
            self.network.power(self.host, True)

    def take_copy(self) -> None:
        """An operator's cp -a: of no use in place of the original, and yet it is put there."""
        self.backup = (self.meta.durable[0], self.store.copy())

    def restore_copy(self) -> None:
        """While the server is down."""
        assert self.server is None and self.backup is not None
        meta, store = self.backup
        self.meta = MetaFile(meta)
        self.store = store.copy()
        self.put_back = True


def first_meta(replica_id: str, size_bytes: int, *, boot_id: str) -> ReplicaMeta:
    return ReplicaMeta(
        volume_id=VOLUME_ID,
        replica_id=replica_id,
        name="v",
        size_bytes=size_bytes,
        chain=("layer-1",),
        epoch=0,
        claimed_by="",
        record=MembershipRecord(0, 0, frozenset()),
        synced_at=NEVER_SYNCED,
        last_boot_id=boot_id,
        clean=True,
        suspect=False,
    )


@dataclass
class Session:
    """A data or peer connection past its hello."""

    end: Endpoint
    epoch: int
    peer: bool


Frame = tuple[Any, ...]
"""(kind, id, epoch, ...): "W" block cells fua, "P" block half value fua, "R" blocks, "F", "C" (no reply),
"L" lease, "X" block cells (repair), "S" region (summary)."""


class ReplicaServer(Process):
    """One life of a replica server."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.sim, f"{machine.host}.{machine.process_count}", machine.host)
        self.machine = machine
        self.process_id = f"{machine.host}-{machine.process_count}"
        self.state = "opening"
        self.reason = ""
        self.known: ReplicaMeta | None = None
        self.claim_due = False  # its store failed since it was claimed
        self.doubtful: set[int] = set()
        self.sessions: list[Session] = []
        self.held: deque[tuple[Session, Frame]] = deque()
        self.marking: set[int] = set()
        self.flush_waiters: list[tuple[Session, Frame]] = []
        self.flushing = False
        self.round = 0
        self.pulls: list[Task] = []
        self._reopen_after_s = 0.0
        self._lock = Lock()
        self.spawn(self._start())
        self.after(CLEAN_TICK_S, self._clean_tick)

    @property
    def store(self) -> Any:
        return self.machine.store

    @property
    def meta(self) -> ReplicaMeta:
        assert self.known is not None
        return self.known

    def _disk_s(self) -> float:
        return self.machine.disk_s * self.sim.random.uniform(0.3, 1.7)

    # Opening

    def _start(self) -> Steps:
        yield from self._lock.take()
        try:
            yield from self._open(distrust_cache=False)
        finally:
            self._lock.give()

    def _open(self, *, distrust_cache: bool) -> Steps:
        yield self._disk_s()
        meta = self.machine.meta.visible
        if self.machine.put_back:
            meta = replace(meta, restored=True)  # the file is not the one that it says it was written to
        if meta.suspect or distrust_cache:
            self.store.drop_cache()
        dirty_count = self.store.open(epoch=native_epoch(meta), stamp=meta.record.stamp)
        yield self._disk_s()
        self.known = epochs.opened(meta, boot_id=self.machine.boot_id, dirty_count=dirty_count)
        self.doubtful = self._find_doubtful(self.known)
        try:
            yield from self._persist(self.known)
        except StorageError as error:
            self.note("open not counted", error.code)
        self.state, self.reason = "open", ""
        said = f"suspect={self.known.suspect} restored={self.known.restored} opens={self.known.opens}"
        self.note("opened", f"epoch={meta.epoch} {said} dirty={dirty_count}")

    def _find_doubtful(self, meta: ReplicaMeta) -> set[int]:
        doubtful: set[int] = set()
        if meta.suspect or meta.restored:
            doubtful |= set(self.store.dirty_regions())
        if meta.restored:
            doubtful |= set(self.store.changed_since(NEVER_SYNCED))
        return doubtful

    def _ready(self) -> Steps:
        """Under the lock. A failed one is tried again, at most once a second."""
        if self.state == "failed" and self.sim.now >= self._reopen_after_s:
            self._reopen_after_s = self.sim.now + REOPEN_INTERVAL_S
            suspect = self.known is not None and self.known.suspect
            yield from self._settle_pulls()
            self._end_sessions(lambda session: True)  # closing the failed store ends them
            self.claim_due = True
            yield from self._open(distrust_cache=True)
            if suspect and not self.meta.suspect:
                self.known = epochs.store_failed(self.meta)
                self.doubtful = self._find_doubtful(self.known)
        if self.state != "open":
            raise DiskError(path=self.machine.host, reason=self.reason or "it is being opened")

    def _persist(self, meta: ReplicaMeta) -> Steps:
        """Durable, then true. After a failure nothing has changed here, though the file may have."""
        file = self.machine.meta
        if meta != file.visible or len(file.durable) > 1 or self.machine.put_back:
            yield self._disk_s()
            self._meta_fault(("no_space",))
            file.visible = meta
            file.durable = [*file.durable, meta]
            yield self._disk_s()
            self._meta_fault(("io_error",))
            file.durable = [meta]
            self.machine.put_back = False
        self.known = meta

    def _meta_fault(self, kinds: tuple[str, ...]) -> None:
        fault = self.machine.meta_fault
        if fault in kinds:
            self.machine.meta_fault = ""
            raise NoSpace() if fault == "no_space" else DiskError(path="replica.meta", reason="injected")

    def store_failed(self, reason: str) -> None:
        """C15: a sync failed."""
        self.note("store failed", reason)
        self.machine.on_loss(self.machine.replica_id)
        self.flush_waiters.clear()  # nothing is answered after it
        self._end_sessions(lambda session: True)
        self.spawn(self._note_store_failed(reason))

    def _note_store_failed(self, reason: str) -> Steps:
        yield from self._lock.take()
        try:
            if self.state == "open":
                self.state, self.reason = "failed", reason
                self.known = epochs.store_failed(self.meta)
                try:
                    yield from self._persist(self.known)
                except StorageError as error:
                    self.note("suspicion not persisted", error.code)
        finally:
            self._lock.give()

    def _check_epoch(self, epoch: int) -> None:
        epochs.check_epoch(self.meta, epoch)
        if self.claim_due:
            raise DiskError(path=self.machine.host, reason="its store failed since it was claimed")

    # Connections

    def accept(self, end: Endpoint, hello: Any) -> None:
        role, epoch = hello
        if role == "control":
            end.listen(lambda message: self._on_call(end, message), lambda: None)
            end.send(("welcome", self.process_id))
        else:
            self.spawn(self._attach(end, role, epoch))

    def _attach(self, end: Endpoint, role: str, epoch: int) -> Steps:
        yield from self._lock.take()
        try:
            yield from self._ready()
            self._check_epoch(epoch)
            if role == "data":
                yield from self._persist(epochs.open_for_writing(self.meta, boot_id=self.machine.boot_id))
            if epoch != self.store.epoch:
                raise StaleEpoch(volume=VOLUME_ID, offered=epoch, current=self.store.epoch)
            session = Session(end, epoch, role == "peer")
            if not session.peer:
                self._end_sessions(lambda other: not other.peer)
            self.sessions.append(session)
            # Its reply is sent before anything of the session: in order on one connection.
            end.send(("welcome", self.process_id))
            end.listen(lambda frame: self._on_frame(session, frame), lambda: self._forget(session))
        except StorageError as error:
            end.send(("refused", error))
        finally:
            self._lock.give()

    def _end_sessions(self, which: Any) -> None:
        for session in [s for s in self.sessions if which(s)]:
            self.sessions.remove(session)
            session.end.close()
        alive = self.sessions
        self.held = deque((s, frame) for s, frame in self.held if s in alive)

    def _forget(self, session: Session) -> None:
        if session in self.sessions:
            self.sessions.remove(session)
        self.held = deque((s, frame) for s, frame in self.held if s is not session)

    def _on_call(self, end: Endpoint, message: Any) -> None:
        number, name, args = message
        task = self.spawn(self._answer(end, number, name, args))
        if name == "pull_regions":
            # Nobody waits for its answer any more: it may be stopped (calls.py, "stoppable").
            closed = end.on_closed

            def cancel() -> None:
                task.cancel()
                if closed is not None:
                    closed()

            end.on_closed = cancel

    def _answer(self, end: Endpoint, number: int, name: str, args: dict[str, Any]) -> Steps:
        try:
            result = yield from getattr(self, f"call_{name}")(**args)
        except StorageError as error:
            self.note("refused", name, error.code)
            end.send((number, None, error))
        else:
            end.send((number, result, None))

    def _locked(self, work: Steps) -> Steps:
        yield from self._lock.take()
        try:
            yield from self._ready()
            return (yield from work)
        except StoreFailed as error:
            raise DiskError(path=self.machine.host, reason="the store failed") from error
        except DiskFault as fault:
            raise (
                NoSpace()
                if fault.code == "no_space"
                else DiskError(path=self.machine.host, reason=fault.code)
            ) from fault
        finally:
            self._lock.give()

    # Calls: one method per row of PROTOCOL.md

    def call_inspect(self) -> Steps:
        yield from self._lock.take()
        try:
            yield from self._ready()
        except StorageError as error:
            self.note("not open", error.code)
        finally:
            self._lock.give()
        return self.report()

    def report(self) -> dict[str, Any]:
        meta = self.known
        return {
            "replica_id": meta.replica_id if meta else "",
            "size_bytes": meta.size_bytes if meta else 0,
            "epoch": meta.epoch if meta else 0,
            "record": meta.record if meta else MembershipRecord(0, 0, frozenset()),
            "synced_at": meta.synced_at if meta else NEVER_SYNCED,
            "process_id": self.process_id,
            "suspect": meta.suspect if meta else False,
            "state": self.state,
            "reason": self.reason,
            "opens": meta.opens if meta else 0,
            "restored": meta.restored if meta else False,
            "closed": meta is not None and meta.epoch > 0 and not meta.claimed_by,
        }

    def call_claim(self, *, epoch: int, engine_id: str, opens_known: int = 0) -> Steps:
        return (yield from self._locked(self._claim(epoch, engine_id, opens_known)))

    def _claim(self, epoch: int, engine_id: str, opens_known: int) -> Steps:
        was = self.meta.epoch
        claimed = epochs.claim(
            self.meta,
            epoch=epoch,
            engine_id=engine_id,
            boot_id=self.machine.boot_id,
            opens_known=opens_known,
        )
        if claimed.restored and not self.meta.restored:
            self.doubtful = self._find_doubtful(claimed)
        yield from self._persist(claimed)
        self.claim_due = False
        self._fence(epoch)
        yield from self._settle_pulls()
        self.note("claimed", f"epoch={epoch} by={engine_id}")
        return {**self.report(), "epoch_was": was}

    def _fence(self, epoch: int) -> None:
        self.store.set_epoch(epoch)
        self._end_sessions(lambda s: s.epoch < epoch or not s.peer)

    def call_persist_record(self, *, epoch: int, record: MembershipRecord) -> Steps:
        return (yield from self._locked(self._persist_record(epoch, record)))

    def _persist_record(self, epoch: int, record: MembershipRecord) -> Steps:
        self._check_epoch(epoch)
        meta = epochs.persist_record(self.meta, epoch=epoch, record=record)
        meta = epochs.regions_completed(meta, epoch=epoch, doubtful_count=len(self.doubtful))
        yield self._disk_s()
        self.store.set_stamp(record.stamp)
        yield from self._persist(meta)
        self.note("record", record.stamp, sorted(record.in_sync))

    def call_dirty_regions(self) -> Steps:
        return (yield from self._locked(self._now(self.store.dirty_regions)))

    def call_changed_since(self, *, stamp: tuple[int, int]) -> Steps:
        return (yield from self._locked(self._now(self.store.changed_since, stamp)))

    def _now(self, call: Any, *args: Any) -> Steps:
        return call(*args)
        yield 0.0  # a generator without a wait

    def call_begin_resync(self, *, epoch: int, regions: list[int]) -> Steps:
        return (yield from self._locked(self._begin_resync(epoch, regions)))

    def _begin_resync(self, epoch: int, regions: list[int]) -> Steps:
        self._check_epoch(epoch)
        yield from self._settle_pulls()
        self.store.begin_resync(regions, self.sim.now)
        yield self._disk_s()

    def call_end_resync(self, *, epoch: int) -> Steps:
        return (yield from self._locked(self._end_resync(epoch)))

    def _end_resync(self, epoch: int) -> Steps:
        self._check_epoch(epoch)
        yield from self._flush_now()
        self.store.end_resync()

    def _flush_now(self, **clean: bool) -> Steps:
        flushing = self.store.begin_flush(self.sim.now, **clean)
        yield self._disk_s()
        try:
            self.store.finish_flush(flushing)
        except StoreFailed:
            self.store_failed("fdatasync failed")
            raise

    def call_complete_regions(self, *, epoch: int, regions: list[int]) -> Steps:
        return (yield from self._locked(self._complete_regions(epoch, regions)))

    def _complete_regions(self, epoch: int, regions: list[int]) -> Steps:
        self._check_epoch(epoch)
        self.store.complete_regions(regions)
        self.doubtful.difference_update(regions)
        meta = epochs.regions_completed(self.meta, epoch=epoch, doubtful_count=len(self.doubtful))
        yield from self._persist(meta)

    def call_detach_clean(self, *, epoch: int) -> Steps:
        return (yield from self._locked(self._detach_clean(epoch)))

    def _detach_clean(self, epoch: int) -> Steps:
        meta = epochs.detached(self.meta, epoch=epoch)
        if meta == self.meta:
            return
        self._check_epoch(epoch)
        self._fence(native_epoch(meta))
        yield from self._settle_pulls()
        yield from self._flush_now(clean_all=True)
        yield from self._persist(meta)
        self.doubtful = set()

    # Pulls: the target's side

    def call_pull_regions(
        self, *, epoch: int, source: str, regions: list[int], source_process: str, **options: Any
    ) -> Steps:
        pull_round = yield from self._locked(self._prepare_pull(epoch))
        end, process_id = yield from self.machine.network.connect(
            self, source, ("peer", epoch), timeout_s=PEER_SILENCE_S
        )
        if pull_round != self.round:
            end.close()
            raise Unreachable(peer=source, reason="the pulls were ended")
        if source_process not in ("", process_id):
            end.close()
            raise Unreachable(peer=source, reason="another process answers there by now")
        pulling = self.spawn(self._pull(end, epoch, regions, **options))
        self.pulls.append(pulling)
        try:
            return (yield pulling.result)
        finally:
            pulling.cancel()
            end.close()
            if pulling in self.pulls:
                self.pulls.remove(pulling)

    def _prepare_pull(self, epoch: int) -> Steps:
        self._check_epoch(epoch)
        return self.round
        yield 0.0

    def _settle_pulls(self) -> Steps:
        self.round += 1
        pulls, self.pulls = self.pulls, []
        for pulling in pulls:
            pulling.cancel(Unreachable(peer=self.name, reason="the pulls were ended"))
        yield 0.0001

    def _pull(self, end: Endpoint, epoch: int, regions: list[int], *, take_damaged: bool = False) -> Steps:
        """dataplane/core/src/replica/pull.rs: compare, copy what differs, never over a fresh block."""
        source = Calls(self, end, "the source")
        generation = self.store.generation
        done = copied = damaged = 0
        for region in regions:
            theirs = yield from source.call("S", timeout_s=PEER_SILENCE_S, epoch=epoch, region=region)
            self._check_pull(epoch, generation)
            differing = self._differing(region, theirs)
            unreadable = False
            if differing:
                found = yield from source.call("R", timeout_s=PEER_SILENCE_S, epoch=epoch, blocks=differing)
                yield self._disk_s()
                self._check_pull(epoch, generation)
                for block, cells in zip(differing, found, strict=True):
                    if cells is None and take_damaged:
                        damaged += int(self.store.take_damaged(block, self.sim.now))
                    elif cells is None:
                        unreadable = True
                    else:
                        copied += int(self._write_pulled(block, cells))
            if not unreadable:
                self.store.resync_done(region)
                done += 1
        return {"regions": done, "bytes_copied": 4096 * copied, "blocks_damaged": damaged}

    def _write_pulled(self, block: int, cells: Any) -> bool:
        try:
            return bool(self.store.write_pulled(block, cells, self.sim.now))
        except DiskFault as fault:
            if fault.code == "no_space":
                raise NoSpace() from fault
            raise DiskError(path=self.machine.host, reason=fault.code) from fault
        except StoreFailed as error:
            raise DiskError(path=self.machine.host, reason="the store failed") from error

    def _differing(self, region: int, theirs: dict[int, Any]) -> list[int]:
        mine = self.store.summary(region)
        fresh = self.store.fresh.get(region, set())
        blocks = sorted({*mine, *theirs} - set(fresh))
        return [b for b in blocks if mine.get(b, (0, 0)) != theirs.get(b, (0, 0)) or mine.get(b, 0) is None]

    def _check_pull(self, epoch: int, generation: int) -> None:
        if self.store.failed:
            raise DiskError(path=self.machine.host, reason="the store failed")
        if self.store.epoch != epoch:
            raise StaleEpoch(volume=VOLUME_ID, offered=epoch, current=self.store.epoch)
        if self.store.generation != generation:
            raise Unreachable(peer=self.name, reason="the resync that this pull belongs to is over")

    def _on_peer_frame(self, session: Session, message: Any) -> None:
        number, kind, args = message
        if session.epoch != self.store.epoch or args["epoch"] != self.store.epoch:
            stale = StaleEpoch(volume=VOLUME_ID, offered=session.epoch, current=self.store.epoch)
            session.end.send((number, None, stale))
            return
        try:
            if kind == "S":
                result: Any = self.store.summary(args["region"])
            else:
                result = [self.store.read(block) for block in args["blocks"]]
        except StoreFailed:
            session.end.send((number, None, SourceFailed(volume=VOLUME_ID, reason="its store failed")))
        else:
            session.end.send((number, result, None))

    # Frames: dataplane/core/src/replica/apply.rs

    def _on_frame(self, session: Session, frame: Any) -> None:
        if session not in self.sessions:
            return
        if session.peer:
            self._on_peer_frame(session, frame)
        else:
            self._apply(session, frame)

    def reply(self, session: Session, frame: Frame, status: int, value: Any = None) -> None:
        session.end.send((frame[1], status, value))

    def _check(self, session: Session, frame: Frame) -> int:
        if frame[2] != self.store.epoch or session.epoch != self.store.epoch:
            return Status.STALE_EPOCH
        return Status.IO_ERROR if self.store.failed else Status.OK

    def _apply(self, session: Session, frame: Frame) -> None:
        kind = frame[0]
        status = self._check(session, frame)
        if kind == "C":
            if status == Status.OK:
                self.store.note_completed(frame[1])
            return
        if status != Status.OK or kind == "L":
            self.reply(session, frame, status)
        elif kind == "F":
            self._flush_then_reply(session, frame)
        else:
            self._apply_in_order(session, frame)

    def _apply_in_order(self, session: Session, frame: Frame) -> None:
        region = frame[3] // REGION_BLOCKS
        changes = frame[0] != "R"
        waits = changes and not self.store.is_marked(region)
        if waits and region not in self.marking:
            self.marking.add(region)
            self.spawn(self._mark(region))
        if waits or any(other[3] // REGION_BLOCKS == region for _, other in self.held):
            self.held.append((session, frame))
            return
        self._execute(session, frame)

    def _mark(self, region: int) -> Steps:
        yield self._disk_s()
        self.marking.discard(region)
        if not self.store.failed:
            self.store.mark(region, self.sim.now)
        held, self.held = self.held, deque()
        for session, frame in held:
            if session in self.sessions:
                self._apply(session, frame)

    def _execute(self, session: Session, frame: Frame) -> None:
        store, now = self.store, self.sim.now
        try:
            match frame:
                case ("W", number, _, block, cells, fua):
                    store.write(block, cells, number, now)
                case ("P", number, _, block, half, value, fua):
                    store.write_partial(block, half, value, number, now)
                case ("X", _, _, block, cells):
                    store.repair(block, cells, now)
                    fua = False
                case ("R", _, _, block):
                    self.reply(session, frame, Status.OK, store.read(block))
                    return
                case _:
                    raise AssertionError(frame)
        except DiskFault as fault:
            self.reply(session, frame, Status.NO_SPACE if fault.code == "no_space" else Status.IO_ERROR)
            return
        if fua:
            self._flush_then_reply(session, frame)
        else:
            self.reply(session, frame, Status.OK)

    def _flush_then_reply(self, session: Session, frame: Frame) -> None:
        if self.store.is_flushed:
            self.reply(session, frame, Status.OK)
            return
        self.flush_waiters.append((session, frame))
        if not self.flushing:
            self.flushing = True
            self.spawn(self._flush())

    def _flush(self, **clean: bool) -> Steps:
        """One flush for all who wait; who comes meanwhile waits for the next."""
        while True:
            waiters, self.flush_waiters = self.flush_waiters, []
            try:
                yield from self._flush_now(**clean)
            except StoreFailed:
                self.flush_waiters[:0] = waiters
                self.flushing = False
                self._answer_flushes(Status.IO_ERROR)
                return
            for session, frame in waiters:
                if session in self.sessions:
                    self.reply(session, frame, Status.OK)
            if not self.flush_waiters:
                self.flushing = False
                return

    def _answer_flushes(self, status: int) -> None:
        waiters, self.flush_waiters = self.flush_waiters, []
        for session, frame in waiters:
            if session in self.sessions:
                self.reply(session, frame, status)

    def _clean_tick(self) -> None:
        if self.state == "open" and not self.flushing and self.store.has_cleanable(self.sim.now):
            self.flushing = True
            self.spawn(self._flush(clean_idle=True))
        self.after(CLEAN_TICK_S, self._clean_tick)


def native_epoch(meta: ReplicaMeta) -> int:
    """What the data plane lets through: after a detach, nothing before the next claim."""
    return meta.epoch if meta.claimed_by else meta.epoch + 1
