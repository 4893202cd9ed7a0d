"""The replicas of one disk while they are served: their state, and the order of what happens to each.

Owns each replica's metadata in memory and its state, and one lock per replica: what changes a replica holds
the lock until it is durable, so claims, records and resyncs of one volume happen one after the other. Does
not own what is allowed (``epoch.py``), what calls look like (``calls.py``) or sockets (``server.py``).

Promises: nothing is answered before it is durable. One damaged replica disturbs no other.

These methods must not be cancelled in the middle unless they say so, since a thread may still be writing
when the lock is gone: ``calls.Calls.finish`` shields them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from enum import Enum
from typing import Any

from protocol.errors import (
    BadRequest,
    DiskError,
    ReplicaDamaged,
    ReplicaNotFound,
    ShrinkRefused,
    StorageError,
    VolumeExistsWithOtherSpec,
    VolumeInUse,
)
from protocol.hello import Role
from protocol.limits import REGION_BYTES
from protocol.membership import MembershipRecord
from replica import epoch as epochs
from replica.disk import Disk
from replica.io_path import Event, IoPath
from replica.metadata import NEVER_SYNCED, ReplicaMeta, has_meta, read_meta, write_meta
from replica.peer import Pulls
from replica.scrubber import Scrubber

log = logging.getLogger("dolmen.replica")

FIRST_LAYER = "layer-1"

OPENS_AT_ONCE_MAX = 4
"""Replicas recovered at the same time when a server starts: enough to keep one disk busy."""

REOPEN_INTERVAL_S = 1.0
"""Between two attempts to open a failed replica: each may read gigabytes, and engines retry."""

SESSIONS_PER_REPLICA_MAX = 32
"""Data and peer sessions of one replica: one engine, and every other replica pulling in several streams,
several times over. More is somebody reconnecting in a loop."""

EMPTY_RECORD = MembershipRecord(epoch=0, version=0, in_sync=frozenset())


class ReplicaState(Enum):
    """What a replica server can do with one replica.

    ::

        OPENING --> OPEN --store failed--> FAILED --somebody wants it--> OPENING
           |  |                              ^
           |  +------ the disk failed -------+
           +--> DAMAGED                 any of the four, deleted --> GONE
    """

    OPENING = "opening"  # being recovered; calls wait
    OPEN = "open"
    DAMAGED = "damaged"  # its files contradict themselves; only delete helps
    FAILED = "failed"  # the disk refused something; tried again when somebody wants it
    GONE = "gone"  # deleted


_NEXT: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.OPENING: frozenset(
        {ReplicaState.OPEN, ReplicaState.DAMAGED, ReplicaState.FAILED, ReplicaState.GONE}
    ),
    ReplicaState.OPEN: frozenset({ReplicaState.FAILED, ReplicaState.GONE}),
    ReplicaState.DAMAGED: frozenset({ReplicaState.GONE}),
    ReplicaState.FAILED: frozenset({ReplicaState.OPENING, ReplicaState.GONE}),
    ReplicaState.GONE: frozenset(),
}
assert _NEXT.keys() == set(ReplicaState)  # a new state must say where it may go


class Replica:
    """One replica of this disk."""

    def __init__(
        self,
        volume_id: str,
        path: str,
        io: IoPath,
        pulls: Pulls,
        *,
        boot_id: str,
        on_open: Callable[[], None] = lambda: None,
    ) -> None:
        self.volume_id = volume_id
        self.path = path
        self.state = ReplicaState.OPENING
        self.reason = ""
        self.meta: ReplicaMeta | None = None
        self.data_sessions: set[int] = set()
        self.peer_sessions: set[int] = set()
        self._closed_early: set[int] = set()  # closed before attach() learned their ids
        self._durable: ReplicaMeta | None = None  # what replica.meta holds; None: not known
        self._doubtful: set[int] = set()  # see epoch.regions_completed
        self._io = io
        self._pulls = pulls
        self._boot_id = boot_id
        self._on_open = on_open
        self._reopen_after_s = 0.0
        self._claim_due = False  # its store failed since it was claimed: see _check_epoch
        self._lock = asyncio.Lock()

    def transition(self, to: ReplicaState, reason: str = "") -> None:
        """The only assignment to ``state`` in the program."""
        assert to in _NEXT[self.state], f"replica {self.volume_id}: {self.state.name} -> {to.name}"
        log.info("replica state changed volume=%s was=%s now=%s reason=%s",
                 self.volume_id, self.state.value, to.value, reason)  # fmt: skip
        self.state, self.reason = to, reason

    # -- what is known of it; without metadata it has no size and no layers

    @property
    def is_open(self) -> bool:
        return self.state is ReplicaState.OPEN

    @property
    def replica_id(self) -> str:
        return self.meta.replica_id if self.meta else ""

    @property
    def size_bytes(self) -> int:
        return self.meta.size_bytes if self.meta else 0

    @property
    def chain(self) -> tuple[str, ...]:
        return self.meta.chain if self.meta else ()

    # -- opening and closing

    async def open(self) -> None:
        """Recover it. Never raises: what is wrong becomes its state."""
        async with self._lock:
            if self.state is ReplicaState.OPENING:
                await self._open()

    async def _open(self, *, distrust_cache: bool = False) -> None:
        assert self._lock.locked()
        try:
            self.meta = meta = await self._read_meta()
            self._durable = None  # what was read may be more than what stands there
            if meta.suspect or distrust_cache:
                # The page cache lies after a failed sync: what it holds as clean may not be on the disk.
                await self._io.run_long(_drop_cache, self.path)
            found = await self._io.open_store(
                self.volume_id,
                self.path,
                chain=meta.chain,
                size_bytes=meta.size_bytes,
                epoch=_native_epoch(meta),
                stamp=meta.record.stamp,
            )
            dirty_count = found["dirty_regions"] + found["regions_damaged"]
            sync_failed = bool(found.get("sync_failed"))
            self.meta = epochs.opened(
                meta, boot_id=self._boot_id, dirty_count=dirty_count, sync_failed=sync_failed
            )
            self._doubtful = await self._find_doubtful(self.meta)
            if sync_failed:
                # The store forgets its own note at its first flush.
                await self._persist(self.meta)
            await self._count_open(self.meta)
        except ReplicaDamaged as error:
            self.transition(ReplicaState.DAMAGED, str(error.fields.get("reason", error)))
        except StorageError as error:
            self.transition(ReplicaState.FAILED, str(error))
        else:
            log.info("replica opened volume=%s opens=%d suspect=%s restored=%s %s",
                     self.volume_id, self.meta.opens, self.meta.suspect, self.meta.restored,
                     " ".join(f"{key}={value}" for key, value in found.items()))  # fmt: skip
            self.transition(ReplicaState.OPEN)
            self._on_open()

    async def _find_doubtful(self, meta: ReplicaMeta) -> set[int]:
        """See epoch.regions_completed. A copy may be wrong wherever anything was ever written."""
        doubtful: set[int] = set()
        if meta.suspect or meta.restored:
            doubtful |= set(await self._io.dirty_regions(self.volume_id))
        if meta.restored:
            doubtful |= set(await self._io.changed_since(self.volume_id, NEVER_SYNCED))
        return doubtful

    async def _count_open(self, meta: ReplicaMeta) -> None:
        """Make durable that it was opened, and what was found: before it is answered for. A disk that
        refuses keeps what it had, and the next open finds the same: the number is given out twice then."""
        try:
            await self._persist(meta)
        except StorageError as error:
            log.error("open not counted volume=%s error=%s", self.volume_id, error)

    async def _read_meta(self) -> ReplicaMeta:
        meta = await self._io.run_long(read_meta, self.path)
        if meta.volume_id != self.volume_id:
            raise ReplicaDamaged(path=self.path, reason=f"it says that it belongs to volume {meta.volume_id}")
        return meta

    async def close(self) -> None:
        """Flush and close; the server stops. Marked clean only if all of that worked."""
        async with self._lock:
            if self.state is not ReplicaState.OPEN:
                return
            meta = self._known()
            await self._pulls.settle()
            await self._io.close_store(self.volume_id)
            await self._persist(epochs.closed(meta))

    async def note_store_failed(self, reason: str) -> None:
        """The data plane could not make something durable (C15)."""
        async with self._lock:
            if self.state is not ReplicaState.OPEN:
                return
            self.transition(ReplicaState.FAILED, reason)
            self.meta = epochs.store_failed(self._known())
            try:
                await self._persist(self.meta)
            except StorageError as error:
                # Kept in memory, and written with whatever is persisted next.
                log.error("suspicion not persisted volume=%s error=%s", self.volume_id, error)

    async def note_files_gone(self) -> None:
        """Somebody deleted them under us. What is open would serve on until we stop, and then be lost: opened
        again at once it is what it is, damaged, and its engine looks for another."""
        async with self._lock:
            if self.state is not ReplicaState.OPEN:
                return
            self.transition(ReplicaState.FAILED, "its files were deleted while it was served")
            try:
                await self._ready()
            except StorageError as error:
                log.error("files gone volume=%s error=%s", self.volume_id, error)

    async def _ready(self) -> ReplicaMeta:
        """The metadata of an open replica; one that waits to be opened is opened first, a failed one is
        tried again. Raises why not."""
        assert self._lock.locked()
        if self.state is ReplicaState.OPENING:
            await self._open()
        now_s = asyncio.get_running_loop().time()
        if self.state is ReplicaState.FAILED and now_s >= self._reopen_after_s:
            self._reopen_after_s = now_s + REOPEN_INTERVAL_S
            await self._reopen()
        return self._check_open()

    async def _reopen(self) -> None:
        self.transition(ReplicaState.OPENING, self.reason)
        suspect = self.meta is not None and self.meta.suspect
        await self._pulls.settle()
        try:
            await self._io.close_store(self.volume_id)
        except StorageError as error:
            log.info("failed store closed volume=%s error=%s", self.volume_id, error)
        self._claim_due = True
        await self._open(distrust_cache=True)
        if self.state is ReplicaState.OPEN and suspect and not self._known().suspect:
            self.meta = epochs.store_failed(self._known())  # it could not be persisted then
            self._doubtful = await self._find_doubtful(self._known())

    def _check_open(self) -> ReplicaMeta:
        match self.state:
            case ReplicaState.OPEN:
                return self._known()
            case ReplicaState.GONE:
                raise ReplicaNotFound(volume=self.volume_id)
            case ReplicaState.DAMAGED:
                raise ReplicaDamaged(path=self.path, reason=self.reason)
            case _:
                raise DiskError(path=self.path, reason=self.reason or "it is being opened")

    def _known(self) -> ReplicaMeta:
        assert self.meta is not None, f"replica {self.volume_id} is open without metadata"
        return self.meta

    async def _persist(self, meta: ReplicaMeta) -> None:
        """Make ``meta`` durable, then true. Raises NoSpace or DiskError; then nothing has changed here."""
        assert self._lock.locked()
        if meta != self._durable:
            self._durable = None  # until we know
            await self._io.run_short(write_meta, self.path, meta)
            self._durable = meta
        self.meta = meta

    # -- who may write

    async def claim(self, *, epoch: int, engine_id: str, opens_known: int = 0) -> int:
        """The epoch that this claim replaced; the same one when it is repeated."""
        async with self._lock:
            meta = await self._ready()
            claimed = epochs.claim(
                meta, epoch=epoch, engine_id=engine_id, boot_id=self._boot_id, opens_known=opens_known
            )
            if claimed.restored and not meta.restored:
                self._doubtful = await self._find_doubtful(claimed)
            await self._persist(claimed)
            self._claim_due = False
            # Also when repeated: the first time may have failed between the two, and an engine that claims
            # again begins anew. Frames and pulls that its earlier session left end before this is answered.
            await self._io.set_epoch(self.volume_id, epoch)
            await self._pulls.settle()
            if epoch > meta.epoch:
                log.info("epoch claimed volume=%s epoch=%d engine=%s", self.volume_id, epoch, engine_id)
            return meta.epoch

    async def persist_record(self, *, epoch: int, record: MembershipRecord) -> None:
        async with self._lock:
            meta = await self._ready()
            self._check_epoch(meta, epoch)
            meta = epochs.persist_record(meta, epoch=epoch, record=record)
            meta = epochs.regions_completed(meta, epoch=epoch, doubtful_count=len(self._doubtful))
            # The stamp first: a crash between the two leaves regions that look newer than they are, which
            # costs a comparison. The other way round they would look older, and be missed.
            await self._io.set_stamp(self.volume_id, record.stamp)
            await self._persist(meta)

    async def detach_clean(self, *, epoch: int) -> None:
        async with self._lock:
            ready = await self._ready()
            meta = epochs.detached(ready, epoch=epoch)
            if meta == ready:
                return  # said before
            self._check_epoch(ready, epoch)
            await self._io.set_epoch(self.volume_id, _native_epoch(meta))
            await self._pulls.settle()
            await self._io.clean_all(self.volume_id)
            await self._persist(meta)
            self._doubtful = set()
            log.info("replica detached clean volume=%s epoch=%d", self.volume_id, epoch)

    async def attach(self, fd: int, *, role: Role, epoch: int) -> None:
        """Give a connected socket to the data plane, which duplicates it."""
        assert role is not Role.CONTROL
        async with self._lock:
            meta = await self._ready()
            self._check_epoch(meta, epoch)
            if len(self.data_sessions) + len(self.peer_sessions) >= SESSIONS_PER_REPLICA_MAX:
                raise BadRequest(reason=f"volume {self.volume_id} has {SESSIONS_PER_REPLICA_MAX} sessions")
            if role is Role.DATA:
                await self._persist(epochs.open_for_writing(meta, boot_id=self._boot_id))
            session = await self._io.attach_session(self.volume_id, fd, epoch=epoch, role=role.value)
            if session in self._closed_early:
                self._closed_early.discard(session)
            else:
                (self.data_sessions if role is Role.DATA else self.peer_sessions).add(session)

    def note_session_closed(self, session: int) -> None:
        if session in self.data_sessions or session in self.peer_sessions:
            self.data_sessions.discard(session)
            self.peer_sessions.discard(session)
        else:
            self._closed_early.add(session)

    # -- resync

    async def dirty_regions(self) -> list[int]:
        async with self._lock:
            await self._ready()
            return await self._io.dirty_regions(self.volume_id)

    async def changed_since(self, *, stamp: tuple[int, int]) -> list[int]:
        async with self._lock:
            await self._ready()
            return await self._io.changed_since(self.volume_id, stamp)

    async def begin_resync(self, *, epoch: int, regions: list[int]) -> None:
        async with self._lock:
            self._check_call(await self._ready(), epoch, regions)
            await self._pulls.settle()
            await self._io.begin_resync(self.volume_id, regions)

    async def prepare_pull(self, *, epoch: int, regions: list[int]) -> int:
        """What pull_regions is to be given: a pull is over when anything ends the pulls after this."""
        async with self._lock:
            self._check_call(await self._ready(), epoch, regions)
            return self._pulls.round

    async def pull_regions(
        self,
        *,
        epoch: int,
        host: str,
        port: int,
        regions: list[int],
        pull_round: int,
        rate_bytes_s: int = 0,
        take_damaged: bool = False,
        source_process: str = "",
    ) -> dict[str, int]:
        """After prepare_pull. May be cancelled. Not under the lock: a newer claim must not wait for it; it
        stops it, and the data plane checks the epoch of what is still under way."""
        return await self._pulls.pull(
            self.volume_id,
            epoch=epoch,
            host=host,
            port=port,
            regions=regions,
            pull_round=pull_round,
            rate_bytes_s=rate_bytes_s,
            take_damaged=take_damaged,
            source_process=source_process,
        )

    async def end_resync(self, *, epoch: int) -> None:
        async with self._lock:
            self._check_call(await self._ready(), epoch, [])
            await self._io.end_resync(self.volume_id)

    async def complete_regions(self, *, epoch: int, regions: list[int]) -> None:
        async with self._lock:
            meta = await self._ready()
            self._check_call(meta, epoch, regions)
            await self._io.complete_regions(self.volume_id, regions)
            self._doubtful.difference_update(regions)
            await self._persist(
                epochs.regions_completed(meta, epoch=epoch, doubtful_count=len(self._doubtful))
            )

    def _check_epoch(self, meta: ReplicaMeta, epoch: int) -> None:
        """Also refuses whoever claimed before the store failed and was opened again: it must not go on as if
        nothing had been lost, but look at the replica anew (C15). Not as fenced: nobody else claimed."""
        epochs.check_epoch(meta, epoch)
        if self._claim_due:
            raise DiskError(path=self.path, reason="its store failed since it was claimed")

    def _check_call(self, meta: ReplicaMeta, epoch: int, regions: list[int]) -> None:
        self._check_epoch(meta, epoch)
        if regions and regions[-1] * REGION_BYTES >= meta.size_bytes:  # they ascend
            raise BadRequest(reason=f"region {regions[-1]} is past the end of volume {self.volume_id}")

    # -- the rest

    async def resize(self, *, size_bytes: int) -> None:
        async with self._lock:
            meta = await self._ready()
            if size_bytes < meta.size_bytes:
                raise ShrinkRefused(volume=self.volume_id, current=meta.size_bytes, wanted=size_bytes)
            # The files first: larger files under a smaller size are what a repeated resize finds.
            await self._io.resize(self.volume_id, size_bytes)
            await self._persist(epochs.resized(meta, size_bytes=size_bytes))

    async def prepare_verify(self) -> None:
        async with self._lock:
            await self._ready()

    async def verify(self, *, first_region: int, region_count: int) -> dict[str, object]:
        """After prepare_verify. May be cancelled; not under the lock, because it takes long."""
        return await self._io.verify(self.volume_id, first_region=first_region, region_count=region_count)

    async def stats(self) -> dict[str, int]:
        self._check_open()
        return await self._io.stats(self.volume_id)

    async def settle(self) -> None:
        """Wait until it is opened; try a failed one again. What does not help shows in its state."""
        async with self._lock:
            try:
                await self._ready()
            except StorageError as error:
                log.info("replica not open volume=%s error=%s", self.volume_id, error)

    async def inspect(self) -> dict[str, Any]:
        """Answers in every state, at once: it takes no lock."""
        dirty_count = 0
        if self.state is ReplicaState.OPEN:
            try:
                dirty_count = (await self._io.stats(self.volume_id))["dirty_regions"]
            except StorageError as error:
                log.info("stats failed volume=%s error=%s", self.volume_id, error)
        meta = self.meta
        return {
            "volume_id": self.volume_id,
            "replica_id": meta.replica_id if meta else "",
            "name": meta.name if meta else "",
            "size_bytes": meta.size_bytes if meta else 0,
            "path": self.path,
            "epoch": meta.epoch if meta else 0,
            "claimed_by": meta.claimed_by if meta else "",
            "record": (meta.record if meta else EMPTY_RECORD).to_wire(),
            "synced_at": list(meta.synced_at if meta else NEVER_SYNCED),
            "chain": list(meta.chain) if meta else [],
            "suspect": meta.suspect if meta else False,
            "restored": meta.restored if meta else False,
            "opens": meta.opens if meta else 0,
            "dirty_count": dirty_count,
            "data_sessions": len(self.data_sessions),
            "state": self.state.value,
            "reason": self.reason,
        }

    async def matches(self, wanted: ReplicaMeta) -> bool:
        """Whether a repeated create finds what it asks for; False when it has just been deleted. Raises
        VolumeExistsWithOtherSpec, or why the replica that is here cannot be opened (C22)."""
        async with self._lock:
            if self.state is ReplicaState.GONE:
                return False
            meta = await self._ready()
        for field, word in (("replica_id", "replica id"), ("size_bytes", "size"), ("name", "name")):
            if getattr(meta, field) != getattr(wanted, field):
                raise VolumeExistsWithOtherSpec(volume=self.volume_id, difference=word)
        return True

    async def remove(self, bury: Callable[[str], str]) -> str:
        """Take it out of service and out of sight; returns the path of what is left to remove."""
        async with self._lock:
            if self.state is ReplicaState.GONE:
                raise ReplicaNotFound(volume=self.volume_id)
            if self.data_sessions:
                raise VolumeInUse(volume=self.volume_id)
            await self._pulls.settle()
            try:
                if self.state in (ReplicaState.OPEN, ReplicaState.FAILED):
                    await self._io.close_store(self.volume_id)
            except StorageError as error:
                log.info("deleted store closed volume=%s error=%s", self.volume_id, error)
            try:
                grave = await self._io.run_short(bury, self.volume_id)
            except StorageError as error:
                if self.state is ReplicaState.OPEN:
                    self.transition(ReplicaState.FAILED, str(error))
                raise
            self.transition(ReplicaState.GONE)
            return grave


def _native_epoch(meta: ReplicaMeta) -> int:
    """What the data plane lets through: after a detach, nothing before the next claim."""
    return meta.epoch if meta.claimed_by else meta.epoch + 1


def _drop_cache(path: str) -> None:
    """Make the next reads come from the disk. Blocking."""
    for directory, _, names in os.walk(path):
        for name in names:
            fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class Replicas:
    """All replicas of one disk."""

    def __init__(
        self,
        disk: Disk,
        io: IoPath,
        *,
        key: bytes,
        boot_id: str,
        process_id: str,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
    ) -> None:
        self.disk = disk
        self.boot_id = boot_id
        self.process_id = process_id
        self._io = io
        self._key = key
        self._spawn = spawn
        self._by_volume: dict[str, Replica] = {}
        self._create_lock = asyncio.Lock()
        self.scrubber = Scrubber(io, lambda: list(self._by_volume.values()))
        io.on_events(self._on_event)

    async def load(self) -> None:
        """Find what is on the disk. Fast; open_all() is the slow half. Raises StorageError."""
        listing = await self._io.run_short(self.disk.list_replicas)
        for name in listing.strange:
            log.warning(
                "left alone: not a replica's name path=%s", os.path.join(self.disk.replicas_path, name)
            )
        for name in listing.leftovers:
            self._spawn(self._sweep(os.path.join(self.disk.replicas_path, name)), f"sweep {name}")
        for volume_id in listing.volume_ids:
            self._add(volume_id)

    async def open_all(self) -> None:
        slots = asyncio.Semaphore(OPENS_AT_ONCE_MAX)

        async def open_one(replica: Replica) -> None:
            async with slots:
                await replica.open()

        async with asyncio.TaskGroup() as tasks:
            for replica in list(self._by_volume.values()):
                tasks.create_task(open_one(replica), name=f"open {replica.volume_id}")

    async def close_all(self) -> None:
        """Flush and close every replica, then the data plane."""
        await self.scrubber.save_all()
        replicas = list(self._by_volume.values())
        results = await asyncio.gather(*(replica.close() for replica in replicas), return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, BaseException):
                log.error("replica not closed clean volume=%s error=%s", replica.volume_id, result)
        await self._io.shutdown()

    def get(self, volume_id: str) -> Replica:
        replica = self._by_volume.get(volume_id)
        if replica is None:
            raise ReplicaNotFound(volume=volume_id)
        return replica

    async def create(self, *, volume_id: str, replica_id: str, name: str, size_bytes: int) -> Replica:
        """Make and open a replica; repeatable. Leaves nothing behind when it fails."""
        meta = ReplicaMeta(
            volume_id=volume_id,
            replica_id=replica_id,
            name=name,
            size_bytes=size_bytes,
            chain=(FIRST_LAYER,),
            epoch=0,
            claimed_by="",
            record=EMPTY_RECORD,
            synced_at=NEVER_SYNCED,
            last_boot_id=self.boot_id,
            clean=True,
            suspect=False,
        )
        async with self._create_lock:
            existing = self._by_volume.get(volume_id)
            if existing is not None and await existing.matches(meta):
                return existing
            await self._make(meta)
            replica = self._add(volume_id)
        await replica.open()
        if replica.state is not ReplicaState.OPEN:
            raise DiskError(path=replica.path, reason=replica.reason)
        log.info("replica created volume=%s replica=%s size_bytes=%d", volume_id, replica_id, size_bytes)
        return replica

    async def _make(self, meta: ReplicaMeta) -> None:
        temporary = await self._io.run_short(self.disk.begin_replica, meta.volume_id)
        try:
            await self._io.create_store(temporary, layer=FIRST_LAYER, size_bytes=meta.size_bytes)
            await self._io.run_short(write_meta, temporary, meta)
            await self._io.run_short(self.disk.finish_replica, temporary, meta.volume_id)
        except StorageError:
            await self._sweep(temporary)
            if self.disk.has_replica(meta.volume_id):
                # Renamed, but the disk did not confirm it. Whatever it is, it has to be seen.
                await self._add(meta.volume_id).open()
            raise

    async def delete(self, volume_id: str) -> None:
        """Repeatable. The space comes back in the background."""
        replica = self._by_volume.get(volume_id)
        if replica is None:
            return
        try:
            grave = await replica.remove(self.disk.bury_replica)
        except ReplicaNotFound:
            return
        if self._by_volume.get(volume_id) is replica:
            del self._by_volume[volume_id]
        self._spawn(self._sweep(grave), f"sweep {volume_id}")

    async def status(self) -> dict[str, Any]:
        total_bytes, free_bytes = await self._io.run_short(self.disk.space_bytes)
        return {
            "node_id": self.disk.identity.node_id,
            "disk_id": self.disk.identity.disk_id,
            "boot_id": self.boot_id,
            "process_id": self.process_id,
            "space_total_bytes": total_bytes,
            "space_free_bytes": free_bytes,
            "volumes": [await self.inspect(replica) for replica in list(self._by_volume.values())],
        }

    async def inspect(self, replica: Replica) -> dict[str, Any]:
        if replica.is_open and not await self._io.run_short(has_meta, replica.path):
            self._spawn(replica.note_files_gone(), f"files gone {replica.volume_id}")
        return {
            **await replica.inspect(),
            "damaged_count": self.scrubber.damaged_count(replica.volume_id),
            "boot_id": self.boot_id,
            "process_id": self.process_id,
        }

    def _add(self, volume_id: str) -> Replica:
        pulls = Pulls(self._io, key=self._key, server_id=f"replica-server/{self.process_id}")
        path = self.disk.replica_path(volume_id)
        replica = Replica(volume_id, path, self._io, pulls, boot_id=self.boot_id, on_open=self.scrubber.wake)
        self._by_volume[volume_id] = replica
        return replica

    async def _sweep(self, path: str) -> None:
        try:
            await self._io.run_long(self.disk.sweep, path)
        except StorageError as error:
            log.warning("leftover not removed; tried again at the next start path=%s error=%s", path, error)

    def _on_event(self, event: Event) -> None:
        match event:
            case ("session_closed", str(volume_id), int(session), reason):
                log.info("session closed volume=%s session=%d reason=%s", volume_id, session, reason)
                if (replica := self._by_volume.get(volume_id)) is not None:
                    replica.note_session_closed(session)
            case ("store_failed", str(volume_id), reason):
                log.error("store failed volume=%s reason=%s", volume_id, reason)
                if (replica := self._by_volume.get(volume_id)) is not None:
                    self._spawn(replica.note_store_failed(str(reason)), f"store failed {volume_id}")
            case ("block_damaged", str(volume_id), int(block_index)):
                log.error("block damaged volume=%s block=%d", volume_id, block_index)
                self.scrubber.note_damaged(volume_id, block_index)
            case _:
                log.error("unknown event from the data plane: %r", event)
