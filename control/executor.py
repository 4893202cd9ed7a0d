"""Drives one volume: reads its documents, looks at its processes, does what ``reconcile.plan`` says.

Owns the loop around the pure plan: one controller per volume, so nobody else acts on it. Does not
decide anything: an action that fails is held back for a while and its reason becomes a condition;
everything else is planned again from what is then there.

A cancelled or killed controller leaves a state that the next one plans from (the table in
``control/reconcile.py``).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from control.documents import Document, Store, update
from control.engines import EngineConfig, EngineSlot
from control.links import Link
from control.listeners import LOOPBACK, choose_port
from control.model import (
    KIND_ATTACHMENT,
    KIND_VOLUME,
    Attachment,
    AttachmentStatus,
    Condition,
    Grant,
    Volume,
    VolumeSpec,
    VolumeStatus,
    Who,
    dump,
)
from control.reconcile import (
    GONE_LOOK_INTERVAL_S,
    Action,
    BeginReplacement,
    CreateReplica,
    DeleteReplica,
    DetachEngine,
    DropReplacement,
    EndEngine,
    GrantEpoch,
    GrowEngine,
    NodeState,
    Plan,
    RemoveAttachment,
    RemoveRetired,
    RemoveSockets,
    RemoveVolume,
    ResizeReplica,
    Seen,
    SetSize,
    StartEngine,
    SwapReplica,
    plan,
)
from control.replacing import GoneWatch, begin, drop, forget_retired, new_place, remove_retired, swap
from control.stamp import StateStamp
from control.trust import NEWER_EPOCH, distrusted, grant_keys
from protocol.errors import Conflict, NotEnoughReplicas, StorageError, Unreachable, VolumeNotFound

RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
"""A failed action is tried again after this, doubling. A change of what is observed does not
shorten it, except that a node coming up does: then everything is tried at once."""

RESYNC_INTERVAL_S = 60.0
"""Every controller looks again this often, should an event ever be missed. Costs microseconds."""

PLANS_IN_A_ROW_MAX = 100
"""Plans without a pause. More would mean that an action does not do what it says: a bug, and the
controller then goes slowly instead of spinning."""

BUG_WAIT_S = 5.0

CLAIMED_TIMEOUT_S = 0.25
"""Replicas are asked for their epoch before each grant, also when an engine was killed and clients wait: who
does not answer within this is not waited for. If it knows a newer epoch, the engine will be told."""

DETACH_WAITING = "detach_waiting"
"""The reason of the condition: a detach cannot flush, because I/O waits for replicas."""

WAITING_SAID_AFTER_TRIES = 4
"""After 1.4 s: I/O also waits for moments whenever a replica is lost, and that is not worth a word."""


class Nodes(Protocol):
    """What a controller needs of the node supervisors."""

    def states(self) -> Mapping[str, NodeState]: ...
    def link(self, node: str) -> Link:
        """Raises Unreachable when its replica server is not up."""
        ...

    def port(self, node: str) -> int: ...
    async def taken_ports(self) -> frozenset[int]: ...
    async def spare_node(self, volume: Volume) -> str:
        """The best node without a replica of it. Raises NotEnoughNodes."""
        ...

    @property
    def replace_after_s(self) -> float: ...


@dataclass(slots=True)
class _Failure:
    error: StorageError | OSError
    tries: int
    not_before_s: float


class VolumeController:
    """``run`` until the volume is gone. ``wake`` after anything changed that it should look at."""

    def __init__(
        self,
        name: str,
        store: Store,
        stamp: StateStamp,
        nodes: Nodes,
        engine: EngineSlot,
        now: Callable[[], float],
    ) -> None:
        self.name = name
        self.engine = engine
        self.volume: Volume | None = None  # as last read: for tables
        self.attachment: Attachment | None = None
        self._store = store
        self._stamp = stamp
        self._nodes = nodes
        self._now = now
        self._wake = asyncio.Event()
        self._failures: dict[Action, _Failure] = {}
        self._settled = asyncio.Condition()
        self._gone = GoneWatch(now)
        self._log = structlog.get_logger().bind(volume=name)

    def wake(self) -> None:
        self._wake.set()

    def retry_now(self) -> None:
        """What could not be done may be possible now."""
        for failure in self._failures.values():
            failure.not_before_s = 0.0
        self.wake()

    async def wait_until(self, reached: Callable[[], bool], *, timeout_s: float) -> bool:
        """True as soon as ``reached`` is; looked at after every plan. False after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s), self._settled:
                await self._settled.wait_for(reached)
        except TimeoutError:
            return reached()
        return True

    async def run(self) -> None:
        in_a_row = 0
        while True:
            self._wake.clear()
            try:
                made = await self._step()
            except Exception:  # noqa: BLE001 - a bug in one volume must not take the other volumes
                self._log.exception("controller failed by a bug")
                await asyncio.sleep(BUG_WAIT_S)
                continue
            async with self._settled:
                self._settled.notify_all()
            if self.volume is None:
                return
            in_a_row = in_a_row + 1 if made.actions else 0
            if made.actions and in_a_row < PLANS_IN_A_ROW_MAX:
                continue
            if made.actions:
                self._log.error(
                    "plans do not end", actions=[type(action).__name__ for action in made.actions]
                )
                in_a_row = 0
                made.wake(BUG_WAIT_S)
            await self._sleep(made.wake_in_s if made.wake_in_s is not None else RESYNC_INTERVAL_S)

    async def _sleep(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _step(self) -> Plan:
        await self._read()
        if self.volume is None:
            return Plan()
        if self.attachment is not None:
            await self._gone.look(self.volume, self._nodes)
        made = plan(self.volume, self.attachment, self._seen())
        if self._gone.watching:
            made.wake(GONE_LOOK_INTERVAL_S)
        self._hold_back(made)
        # At once: a note costs a write to disk, and an engine that was killed is waited for.
        await asyncio.gather(self._note(made.conditions), *(self._do(action) for action in made.actions))
        return made

    async def _read(self) -> None:
        volume = await self._store.get(KIND_VOLUME, self.name)
        attachment = await self._store.get(KIND_ATTACHMENT, self.name)
        self.volume = Volume(volume) if volume else None
        self.attachment = Attachment(attachment) if attachment else None

    def _seen(self) -> Seen:
        return Seen(
            nodes=self._nodes.states(),
            engine=self.engine.seen(),
            unused_epoch=self.engine.unused_epoch,
            engine_wait_s=self.engine.wait_s,
            engine_end=self.engine.last_end,
            sockets=self.engine.has_sockets,
            gone_s=self._gone.gone_s(),
            replace_after_s=self._nodes.replace_after_s,
        )

    def _hold_back(self, made: Plan) -> None:
        """Take out of the plan what failed a moment ago, and say so."""
        self._failures = {a: f for a, f in self._failures.items() if a in made.actions}
        for action, failure in self._failures.items():
            self._say(made, action, failure)
            wait_s = failure.not_before_s - self._now()
            if wait_s > 0:
                made.actions.remove(action)
                made.wake(wait_s)

    def _say(self, made: Plan, action: Action, failure: _Failure) -> None:
        error = failure.error
        if isinstance(error, NotEnoughReplicas) and failure.tries >= WAITING_SAID_AFTER_TRIES:
            made.wait(DETACH_WAITING, self._who_is_missing(error.fields["missing"]), Who.OPERATOR)
        else:
            made.wait("retrying", f"{_describe(action)} (tried {failure.tries} times: {error})")

    def _who_is_missing(self, missing: Sequence[str]) -> str:
        """Of a detach that has to wait: for whom, and what to do."""
        assert self.volume is not None
        places = [place for place in self.volume.spec.replicas if place.id in missing]
        who = ", ".join(f"replica {place.id} on {place.node}" for place in places) or "the state store"
        states = self._nodes.states()
        stopped = [place.node for place in places if states.get(place.node) is NodeState.STOPPED]
        start = " and ".join(f"`dolmen node start {node}`" for node in stopped)
        force = f"`dolmen volume detach {self.name} --force`, which drops what was not acknowledged"
        return f"{who}. {f'Start what is stopped ({start})' if start else 'It is finished then'}, or {force}"

    async def _note(self, conditions: list[Condition]) -> None:
        """Keep the conditions in the document, with the time they were first seen."""
        assert self.volume is not None
        before = self.volume.status.conditions
        now = _now()

        def since(condition: Condition) -> Condition:
            old = next((o for o in before if o.reason == condition.reason), None)
            return condition.model_copy(update={"since": old.since if old else now})

        noted = tuple(since(condition) for condition in conditions)
        if noted != before:
            await self._change_status(lambda status: status.model_copy(update={"conditions": noted}))
            for condition in noted:
                if not any(condition.same_as(old) for old in before):
                    self._log.info("volume waits", reason=condition.reason, waits_for=condition.waits_for)

    async def _do(self, action: Action) -> None:
        try:
            await self._perform(action)
        except (StorageError, OSError) as error:
            tries = self._failures[action].tries + 1 if action in self._failures else 1
            wait_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** (tries - 1))
            self._failures[action] = _Failure(error, tries, self._now() + wait_s)
            self._log.warning("action failed", action=_describe(action), error=str(error), tries=tries)
        else:
            self._failures.pop(action, None)
            self._log.info("action done", action=_describe(action))

    async def _perform(self, action: Action) -> None:
        volume = self.volume
        assert volume is not None
        match action:
            case CreateReplica(replica_id, node, size_bytes):
                await self._call(
                    node,
                    "replica.create",
                    volume_id=volume.spec.volume_id,
                    replica_id=replica_id,
                    name=volume.name,
                    size_bytes=size_bytes,
                )
                await self._replica_has(replica_id, size_bytes)
            case ResizeReplica(replica_id, node, size_bytes):
                await self._call(
                    node, "replica.resize", volume_id=volume.spec.volume_id, size_bytes=size_bytes
                )
                await self._replica_has(replica_id, size_bytes)
            case DeleteReplica(replica_id, node):
                await self._call(node, "replica.delete", volume_id=volume.spec.volume_id)
                await self._change_status(
                    lambda s: s.model_copy(update={"deleted": tuple(sorted({*s.deleted, replica_id}))})
                )
            case SetSize(size_bytes):
                await self._change_status(lambda s: s.model_copy(update={"size_bytes": size_bytes}))
            case GrowEngine(size_bytes):
                await self._call_engine("engine.resize", size_bytes=size_bytes)
                self.engine.grown(size_bytes)
            case GrantEpoch(epoch):
                await self._grant_epoch(volume, epoch)
            case StartEngine(epoch):
                await self._start_engine(volume, epoch)
            case DetachEngine(force):
                await (self.engine.end() if force else self.engine.detach())
            case EndEngine(reason):
                self._log.warning("engine is ended", reason=reason)
                await self.engine.end()
            case RemoveSockets():
                self.engine.remove_sockets()
            case RemoveAttachment():
                await self._store.delete(KIND_ATTACHMENT, self.name)
            case BeginReplacement(old):
                place = new_place(volume, await self._nodes.spare_node(volume))
                await begin(self._store, self.name, old, place)
            case DropReplacement(old):
                await drop(self._store, self.name, old)
            case SwapReplica(old, new_id):
                await self._swap_replica(volume, old, new_id)
            case RemoveRetired(replica_id, node):
                await remove_retired(self._nodes.link(node), volume, replica_id)
                await forget_retired(self._store, self.name, replica_id)
            case RemoveVolume():
                self.engine.remove_files()
                await self._store.delete(KIND_VOLUME, self.name)

    async def _swap_replica(self, volume: Volume, old: str, new_id: str) -> None:
        """The order is what makes it safe: see ``control/reconcile.py``, steps 10 and 11."""
        replacing = volume.spec.replacing
        assert replacing is not None and replacing.new.id == new_id
        if self.engine.link is not None:
            node = replacing.new.node
            address = {"id": new_id, "node": node, "host": LOOPBACK, "port": self._nodes.port(node)}
            await self._call_engine("engine.replace_replica", old=old, new=address)
        await swap(self._store, self.name, old)

    async def _replica_has(self, replica_id: str, size_bytes: int) -> None:
        await self._change_status(
            lambda s: s.model_copy(
                update={"replica_size_bytes": {**s.replica_size_bytes, replica_id: size_bytes}}
            )
        )

    async def _grant_epoch(self, volume: Volume, epoch: int) -> None:
        """The right to write, by compare-and-swap: from here on every older engine is fenced as soon
        as the new one claims its replicas."""
        assert self.attachment is not None
        node = self.attachment.spec.node
        claimed = await self._newest_claimed(volume)
        epoch = max(epoch, claimed + 1)
        grant = Grant(epoch=epoch, engine_id=f"{node}/{epoch}/{uuid.uuid4().hex[:8]}", node=node)

        def change(status: VolumeStatus) -> VolumeStatus:
            if status.epoch != volume.status.epoch:
                raise Conflict(kind=KIND_VOLUME, name=volume.name, revision=volume.document.revision)
            # Fenced while it held the newest epoch granted: somebody knows one that was not granted here.
            if claimed > status.epoch or (status.epoch and self.engine.fenced_epoch == status.epoch):
                status = distrusted(status, NEWER_EPOCH, _now())
            return status.model_copy(update={"grant": grant})

        stored = await self._change_status(change)
        await self._stamp.advance(stored.revision)
        if VolumeStatus.model_validate(stored.status).distrust != volume.status.distrust:
            self._log.warning("state store is distrusted", reason=NEWER_EPOCH, claimed=claimed, epoch=epoch)
        self.engine.unused_epoch = epoch

    async def _newest_claimed(self, volume: Volume) -> int:
        """The newest epoch that a replica which answers at once says was claimed. One that the state store
        never granted means that the store forgot it."""

        async def ask(node: str) -> int:
            try:
                said = await self._nodes.link(node).call(
                    "replica.inspect", timeout_s=CLAIMED_TIMEOUT_S, volume_id=volume.spec.volume_id
                )
            except StorageError:
                return 0
            epoch = said.get("epoch") if isinstance(said, dict) else None
            return epoch if isinstance(epoch, int) else 0

        return max(await asyncio.gather(*(ask(place.node) for place in volume.spec.replicas)), default=0)

    async def _start_engine(self, volume: Volume, epoch: int) -> None:
        attachment, grant = self.attachment, volume.status.grant
        assert attachment is not None and grant is not None and grant.epoch == epoch
        tcp_port = await self._tcp_port(attachment)
        config = EngineConfig(
            volume_id=volume.spec.volume_id,
            name=volume.name,
            size_bytes=volume.status.size_bytes,
            epoch=epoch,
            engine_id=grant.engine_id,
            node=grant.node,
            replicas=[
                {"id": place.id, "node": place.node, "host": LOOPBACK, "port": self._nodes.port(place.node)}
                for place in volume.spec.replicas
            ],
            record=volume.membership.to_wire(),
            grant=grant_keys(volume, predecessor_ended=self.engine.predecessors_ended()),
        )
        self.engine.start(config, tcp_port=tcp_port)

    async def _tcp_port(self, attachment: Attachment) -> int:
        """The port of the volume's TCP socket, chosen once; 0 when none is wanted."""
        if not attachment.spec.tcp or attachment.status.tcp_port:
            return attachment.status.tcp_port
        status = AttachmentStatus(
            tcp_port=choose_port(attachment.spec.volume_id, await self._nodes.taken_ports())
        )
        await update(self._store, KIND_ATTACHMENT, self.name, lambda d: d.with_status(**dump(status)))
        return status.tcp_port

    async def _call(self, node: str, name: str, /, **args: Any) -> Any:
        return await self._nodes.link(node).call(name, **args)

    async def _call_engine(self, name: str, /, **args: Any) -> Any:
        link = self.engine.link
        if link is None:
            raise Unreachable(peer=f"engine of {self.name}", reason="it is not running")
        return await link.call(name, **args)

    async def _change_status(self, change: Callable[[VolumeStatus], VolumeStatus]) -> Document:
        return await change_volume_status(self._store, self.name, change)


async def change_volume_status(
    store: Store, name: str, change: Callable[[VolumeStatus], VolumeStatus]
) -> Document:
    """Read, change, compare-and-swap. The only way a volume's status is written. Returns the document as it
    then stands. Raises VolumeNotFound."""

    def changed(document: Document) -> Document:
        status = change(VolumeStatus.model_validate(document.status))
        return Document(document.kind, document.name, document.spec, dump(status), document.revision)

    stored = await update(store, KIND_VOLUME, name, changed)
    if stored is None:
        raise VolumeNotFound(volume=name)
    return stored


async def change_volume_spec(store: Store, name: str, change: Callable[[VolumeSpec], VolumeSpec]) -> None:
    def changed(document: Document) -> Document:
        spec = change(VolumeSpec.model_validate(document.spec))
        return Document(document.kind, document.name, dump(spec), document.status, document.revision)

    await update(store, KIND_VOLUME, name, changed)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe(action: Action) -> str:
    fields = ", ".join(f"{name}={getattr(action, name)}" for name in action.__slots__)
    return f"{type(action).__name__}({fields})"
