"""The engine's conversation with one replica: a control connection that is kept up, calls over it, and the
data connection that goes to the data plane.

Owns connecting, reconnecting with backoff, and turning each ``ReplicaCall`` into exactly one event of the
same session. Does not own what is called when (``volume.py``).

Promises: at most one session at a time, numbered upwards; what comes in after a session ended is dropped;
cancelling ``run`` closes everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from engine.backoff import Backoff
from engine.config import ReplicaAddress
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
    CompleteRegions,
    DirtyListed,
    EndResync,
    Event,
    LinkAttached,
    ListChanged,
    ListDirty,
    PersistRecord,
    PullIncomplete,
    PullRegions,
    RecordPersisted,
    RegionsPulled,
    ReplicaCall,
    ReplicaDown,
    ReplicaReport,
    ReplicaUp,
    Resized,
    ResizeReplica,
    ResyncBegun,
    ResyncEnded,
)
from engine.io_path import IoPath
from engine.limits import (
    CALL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    LONG_CALL_TIMEOUT_S,
    RECONNECT_BASE_S,
    RECONNECT_CAP_S,
)
from engine.regions import Regions, RegionSet
from protocol.connect import connect, connect_socket
from protocol.errors import ProtocolViolation, StorageError, Unreachable
from protocol.hello import Role
from protocol.membership import parse_record
from protocol.regions import pack_regions
from protocol.rpc import RpcClient

Post = Callable[[Event], None]

CALL_OF: Mapping[type, Call] = {
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


def parse_report(wire: Any) -> ReplicaReport:
    """Check what replica.inspect or replica.claim answered. Raises ProtocolViolation."""
    match wire:
        case {
            "replica_id": str(replica_id),
            "size_bytes": int(size_bytes),
            "epoch": int(epoch),
            "record": record,
            "synced_at": [int(synced_epoch), int(synced_version)],
            "process_id": str(process_id),
            "suspect": bool(suspect),
            "state": str(state),
            "reason": str(reason),
            "opens": int(opens),
            "restored": bool(restored),
            "claimed_by": str(claimed_by),
        }:
            return ReplicaReport(
                replica_id=replica_id,
                size_bytes=size_bytes,
                epoch=epoch,
                record=parse_record(record),
                synced_at=(synced_epoch, synced_version),
                process_id=process_id,
                suspect=suspect,
                state=state,
                reason=reason,
                opens=opens,
                restored=restored,
                closed=epoch > 0 and not claimed_by,
                epoch_was=epoch_was if isinstance(epoch_was := wire.get("epoch_was"), int) else None,
            )
        case _:
            raise ProtocolViolation(expected="a replica's report", got=type(wire).__name__)


def _packed(regions: Regions) -> bytes:
    return regions.packed() if isinstance(regions, RegionSet) else pack_regions(regions)


class ReplicaLink:
    def __init__(
        self,
        slot: int,
        address: ReplicaAddress,
        *,
        volume_id: str,
        epoch: int,
        engine_id: str,
        key: bytes,
        io: IoPath,
        random: Random,
        address_of: Callable[[int], ReplicaAddress],
        tasks: asyncio.TaskGroup,
        post: Post,
    ) -> None:
        self._slot = slot
        self._address = address
        self._volume_id = volume_id
        self._epoch = epoch
        self._engine_id = engine_id
        self._key = key
        self._io = io
        self._backoff = Backoff(random, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S)
        self._address_of = address_of
        self._tasks = tasks
        self._post = post
        self._session = 0
        self._client: RpcClient | None = None
        self._claimed_process_id = ""  # of the server process that answered the last claim
        self._closing = asyncio.Event()  # this session is to end from our side
        self._retry_after_s = 0.0
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Keep a session up until cancelled."""
        while True:
            address = self._address
            try:
                client, report = await self._open()
            except StorageError as error:
                self._post(ReplicaDown(self._slot, 0, str(error)))
                await asyncio.sleep(self._backoff.next_delay_s())
                continue
            if self._address is not address:
                await client.close()
                continue
            self._backoff.reset()
            try:
                await self._hold(client, report)
            finally:
                self._client = None
                for call in tuple(self._calls):
                    call.cancel()
                await client.close()
            delay_s, self._retry_after_s = self._retry_after_s, 0.0
            await asyncio.sleep(max(delay_s, self._backoff.next_delay_s()))

    async def _open(self) -> tuple[RpcClient, ReplicaReport]:
        """A control connection and what the replica says of itself. Raises StorageError."""
        peer = f"{self._address.id} at {self._address.host}:{self._address.port}"
        reader, writer = await connect(
            self._address.host,
            self._address.port,
            key=self._key,
            engine_id=self._engine_id,
            timeout_s=CONNECT_TIMEOUT_S,
        )
        client = RpcClient(reader, writer, peer=peer)
        try:
            wire = await client.call("replica.inspect", timeout_s=CALL_TIMEOUT_S, volume_id=self._volume_id)
            return client, parse_report(wire)
        except BaseException:
            await client.close()
            raise

    async def _hold(self, client: RpcClient, report: ReplicaReport) -> None:
        """Until the connection is lost or the machine has had enough of it."""
        self._session += 1
        self._client = client
        self._closing.clear()
        self._post(ReplicaUp(self._slot, self._session, report))
        lost = asyncio.ensure_future(client.lost.wait())
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({lost, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
            closing.cancel()
        if not self._closing.is_set():
            self._client = None
            self._post(ReplicaDown(self._slot, self._session, "connection lost"))

    def retarget(self, address: ReplicaAddress) -> None:
        """From the next connection on. What still is under way to the old address comes to nothing."""
        self._address = address
        self._backoff.reset()

    def close_session(self, session: int, retry_after_s: float) -> None:
        """The machine gives this session up. Nothing of it is posted any more."""
        if session == self._session and self._client is not None:
            self._client = None
            self._retry_after_s = retry_after_s
            self._closing.set()

    # Calls

    def start(self, action: ReplicaCall) -> None:
        """Begin a call; its one event follows, unless the session ends first."""
        client = self._client
        if client is None or action.session != self._session:
            return  # the machine hears, or has heard, that the session is gone
        task = self._tasks.create_task(self._call(client, action), name=f"call {CALL_OF[type(action)].value}")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, client: RpcClient, action: ReplicaCall) -> None:
        event: Event | None
        try:
            event = await self._perform(client, action)
        except StorageError as error:
            event = self._failed(action, error)
        if event is not None and self._client is client:
            self._post(event)

    def _failed(self, action: ReplicaCall, error: StorageError) -> Event:
        regions: Regions = ()
        other = -1
        if isinstance(action, PullRegions):
            regions, other = action.regions, action.source
        elif isinstance(action, ListChanged):
            other = action.target
        code = error.code if error.code != StorageError.code else str(error.fields.get("code", error.code))
        return CallFailed(self._slot, action.session, CALL_OF[type(action)], code, str(error), regions, other)

    async def _perform(self, client: RpcClient, action: ReplicaCall) -> Event | None:
        slot, session = self._slot, action.session
        match action:
            case Claim(opens=opens):
                wire = await self._ask(
                    client, "claim", epoch=self._epoch, engine_id=self._engine_id, opens=opens
                )
                report = parse_report(wire)
                self._claimed_process_id = report.process_id
                return Claimed(slot, session, report)
            case AttachLink():
                return await self._attach(client, action)
            case PersistRecord(record=record):
                await self._ask(client, "persist_record", epoch=self._epoch, record=record.to_wire())
                return RecordPersisted(slot, session, record.stamp)
            case ListDirty():
                return DirtyListed(slot, session, await self._regions(client, "dirty_regions"))
            case ListChanged(target=target, since=(epoch, version)):
                regions = await self._regions(client, "changed_since", epoch=epoch, version=version)
                return ChangedListed(slot, session, target, regions)
            case BeginResync(regions=regions):
                await self._ask_long(client, "begin_resync", regions=_packed(regions))
                return ResyncBegun(slot, session)
            case PullRegions():
                return await self._pull(client, action)
            case EndResync():
                await self._ask_long(client, "end_resync")
                return ResyncEnded(slot, session)
            case CompleteRegions(regions=regions):
                await self._ask_long(client, "complete_regions", regions=_packed(regions))
                return None
            case ResizeReplica(size_bytes=size_bytes):
                await self._ask(client, "resize", timeout_s=LONG_CALL_TIMEOUT_S, size_bytes=size_bytes)
                return Resized(slot, session, size_bytes)
            case CleanReplica():
                await self._ask_long(client, "detach_clean")
                return Cleaned(slot, session)

    async def _ask(
        self, client: RpcClient, call: str, *, timeout_s: float = CALL_TIMEOUT_S, **args: Any
    ) -> Any:
        return await client.call(f"replica.{call}", timeout_s=timeout_s, volume_id=self._volume_id, **args)

    async def _ask_long(self, client: RpcClient, call: str, **args: Any) -> Any:
        return await self._ask(client, call, timeout_s=LONG_CALL_TIMEOUT_S, epoch=self._epoch, **args)

    async def _regions(self, client: RpcClient, call: str, **args: Any) -> RegionSet:
        match await self._ask(client, call, **args):
            case {"regions": packed}:
                return RegionSet.from_packed(packed)
            case other:
                raise ProtocolViolation(expected="regions", got=type(other).__name__)

    async def _pull(self, client: RpcClient, action: PullRegions) -> Event:
        source = self._address_of(action.source)
        options: dict[str, Any] = {}
        if action.rate_bytes_s:
            options["rate_bytes_s"] = action.rate_bytes_s
        if action.source_process:
            options["source_process"] = action.source_process
        if action.take_damaged:
            options["take_damaged"] = True
        wire = await self._ask_long(
            client,
            "pull_regions",
            source=[source.host, source.port],
            regions=_packed(action.regions),
            **options,
        )
        match wire:
            case {"regions": int(region_count), "bytes_copied": int(bytes_copied)}:
                if region_count < len(action.regions):
                    return PullIncomplete(
                        self._slot, action.session, action.source, action.regions, bytes_copied
                    )
                damaged = wire.get("blocks_damaged", 0)
                return RegionsPulled(self._slot, action.session, action.regions, bytes_copied, int(damaged))
            case _:
                raise ProtocolViolation(expected="what was pulled", got=type(wire).__name__)

    async def _attach(self, client: RpcClient, action: AttachLink) -> Event | None:
        sock, greeting = await connect_socket(
            self._address.host,
            self._address.port,
            key=self._key,
            role=Role.DATA,
            volume_id=self._volume_id,
            epoch=self._epoch,
            engine_id=self._engine_id,
            timeout_s=CONNECT_TIMEOUT_S,
        )
        with sock:
            # The claim's answer speaks for the process that gave it. One that started since may have lost
            # what that one held (C8): an address proves nothing.
            if greeting.process_id != self._claimed_process_id:
                raise Unreachable(peer=self._address.id, reason="another process answers since the claim")
            if self._client is not client:
                raise Unreachable(peer=self._address.id, reason="its session ended meanwhile")
            # No await from here to the event: the machine must hear of the link before the link's end.
            generation = self._io.attach_link(self._slot, sock, action.mode)
            return LinkAttached(self._slot, action.session, generation)
