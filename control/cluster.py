"""The cluster: every operation the outside can ask for, on top of documents and controllers.

Owns the operations (create, attach, ...), the controllers and supervisors, and their tasks. Does not
own HTTP (``control/api.py``), the decisions (``control/reconcile.py``) or the tables
(``control/observe.py``).

An operation writes what is wanted, durably, and then may wait for it: so a caller that gives up, or
a daemon that dies, changes nothing about the outcome. Every operation may be repeated: it is done,
already true, or refused with a reason.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from control.documents import Document, Store, update
from control.engines import EngineSlot
from control.errors import NameNotFound, NodeNotFound, ShuttingDown
from control.executor import (
    DETACH_WAITING,
    VolumeController,
    change_volume_spec,
    change_volume_status,
)
from control.layout import Layout
from control.links import Link
from control.model import (
    KIND_ATTACHMENT,
    KIND_DISK,
    KIND_NODE,
    KIND_VOLUME,
    Attachment,
    AttachmentSpec,
    DiskSpec,
    Node,
    NodeSpec,
    NodeStatus,
    NodeWanted,
    Volume,
    VolumeSpec,
    VolumeStatus,
    dump,
    new_volume,
)
from control.observe import (
    ServerSaid,
    ask_engine,
    ask_servers,
    node_facts,
    view_node,
    view_volume,
    volume_facts,
)
from control.placement import NodeSpace, place
from control.processes import Programs, Running, running
from control.reconcile import REPLACE_AFTER_S, NodeState
from control.replacing import begin, check_node, choose_node, new_place, refuse_replacement
from control.since import Since
from control.stamp import StateStamp
from control.supervisor import NodeSupervisor, disk_name
from control.views import (
    SERVING,
    NodeView,
    ReplacementView,
    ReplicaReplace,
    VolumeCreate,
    VolumeState,
    VolumeView,
)
from control.why import (
    Facts,
    Finding,
    conditions_of_node,
    conditions_of_volume,
    explain,
    relevant,
)
from protocol.errors import (
    BadRequest,
    Conflict,
    DiskError,
    ShrinkRefused,
    StorageError,
    Unreachable,
    VolumeExistsWithOtherSpec,
    VolumeInUse,
    VolumeNotAttached,
    VolumeNotFound,
)

POLL_FIRST_S = 0.01
POLL_MAX_S = 0.25
"""While a request waits for an engine's state, which no event announces: soon at first, because an
attach takes a tenth of a second; then rarely."""

SHUTDOWN_DETACH_S = 20.0
"""A clean detach at shutdown. An engine that waits for replicas is ended after this: nothing
acknowledged is lost."""


LOOK_INTERVAL_S = 10.0
"""How often the daemon looks at everything by itself: one question to each process, a few ms in all."""


@dataclass(frozen=True, slots=True)
class _Looked:
    servers: Mapping[str, ServerSaid]
    views: list[VolumeView]
    findings: list[Finding]


class Cluster:
    """``start`` inside a task group that outlives every call; ``forget`` or ``stop_everything`` last."""

    def __init__(
        self,
        layout: Layout,
        store: Store,
        stamp: StateStamp,
        programs: Programs,
        *,
        key: bytes,
        tasks: asyncio.TaskGroup,
        replace_after_s: float = REPLACE_AFTER_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.store = store
        self.replace_after_s = replace_after_s
        self._stamp = stamp
        self.supervisors: dict[str, NodeSupervisor] = {}
        self.slots: dict[str, EngineSlot] = {}
        self.unreadable: dict[str, set[int]] = {}  # by replica: blocks that nobody has a good copy of
        self._controllers: dict[str, VolumeController] = {}
        self._programs = programs
        self._key = key
        self._tasks = tasks
        self._now = now
        self._locks: dict[str, asyncio.Lock] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._since = Since()
        self._log = structlog.get_logger()

    # Starting and ending

    async def start(self, node_count: int) -> None:
        """Make the nodes' documents, adopt what runs, and begin to reconcile."""
        for index in range(1, node_count + 1):
            await self._ensure_node(f"node{index}")
        for document in await self.store.list(KIND_NODE):
            self._supervise(document.name)
        alive = running()
        for document in await self.store.list(KIND_VOLUME):
            self._control(document.name, alive)
        for kind, changed in (
            (KIND_NODE, self._node_changed),
            (KIND_VOLUME, self._volume_changed),
            (KIND_ATTACHMENT, self._volume_changed),
        ):
            self._spawn(self._watch(kind, changed), name=f"watch {kind}")
        self._spawn(self._keep_looking(), name="look")

    async def _ensure_node(self, name: str) -> None:
        path = str(self.layout.disk_dir(name))
        for document in (
            Document(KIND_NODE, name, dump(NodeSpec()), dump(NodeStatus())),
            Document(KIND_DISK, disk_name(name), dump(DiskSpec(node=name, path=path))),
        ):
            if await self.store.get(document.kind, document.name) is None:
                await self.store.put(document)

    def _spawn(self, work: Any, *, name: str) -> None:
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _supervise(self, name: str) -> None:
        supervisor = NodeSupervisor(
            name,
            self.store,
            self.layout,
            self._programs,
            key=self._key,
            tasks=self._tasks,
            changed=self._server_changed,
            now=self._now,
        )
        self.supervisors[name] = supervisor
        self._spawn(supervisor.run(), name=f"supervise {name}")

    def _control(self, name: str, alive: Sequence[Running] | None = None) -> None:
        def changed() -> None:
            if name in self._controllers:
                self._controllers[name].wake()

        slot = EngineSlot(
            name, self.layout, self._programs, tasks=self._tasks, changed=changed, now=self._now
        )
        slot.find_living(alive)
        self.slots[name] = slot
        self._controllers[name] = VolumeController(name, self.store, self._stamp, self, slot, self._now)
        self._spawn(self._run_controller(name), name=f"volume {name}")

    async def _run_controller(self, name: str) -> None:
        await self._controllers[name].run()
        del self._controllers[name], self.slots[name]
        if name in self._locks and not self._locks[name].locked():
            del self._locks[name]
        if await self.store.get(KIND_VOLUME, name) is not None and name not in self._controllers:
            self._control(name)  # a new volume took the name at that moment

    async def _watch(self, kind: str, changed: Callable[[str, bool], None]) -> None:
        async for change in self.store.watch(kind):
            changed(change.name, change.document is not None)

    def _node_changed(self, name: str, exists: bool) -> None:
        if name in self.supervisors:
            self.supervisors[name].wake()
        elif exists:
            self._supervise(name)

    def _volume_changed(self, name: str, exists: bool) -> None:
        if name in self._controllers:
            self._controllers[name].wake()
        elif exists:
            self._control(name)

    def _server_changed(self, node: str) -> None:
        for controller in self._controllers.values():
            controller.retry_now()

    async def forget(self) -> None:
        """The daemon ends, its processes go on."""
        await self._stop_tasks()
        for slot in self.slots.values():
            slot.forget()
        for supervisor in self.supervisors.values():
            supervisor.forget()

    async def stop_everything(self) -> None:
        """Engines end cleanly, then replica servers. What is wanted stays written: the next ``up``
        serves the same volumes again."""
        self._closing = True
        await self._stop_tasks()
        await asyncio.gather(*(self._stop_engine(slot) for slot in self.slots.values()))
        for slot in self.slots.values():
            slot.remove_sockets()
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors.values()))

    async def _stop_tasks(self) -> None:
        """Nobody reconciles any more: nothing is started again behind our back."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _stop_engine(self, slot: EngineSlot) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_DETACH_S):
                await slot.detach()
        except (StorageError, TimeoutError) as error:
            self._log.warning("engine ended without a clean detach", volume=slot.name, error=str(error))
            await slot.end()

    # What controllers need of nodes

    def states(self) -> Mapping[str, NodeState]:
        return {name: supervisor.state for name, supervisor in self.supervisors.items()}

    def link(self, node: str) -> Link:
        if node not in self.supervisors:
            raise Unreachable(peer=f"node {node}", reason="the daemon does not know it")
        return self.supervisors[node].link

    def port(self, node: str) -> int:
        return self.supervisors[node].port if node in self.supervisors else 0

    async def spare_node(self, volume: Volume) -> str:
        return choose_node(volume, await self._spaces())

    # Volumes

    async def create_volume(self, wanted: VolumeCreate, *, wait_s: float) -> VolumeView:
        """Raises NotEnoughNodes, VolumeExistsWithOtherSpec."""
        self._refuse_if_closing()
        async with self._lock(wanted.name):
            document = await self.store.get(KIND_VOLUME, wanted.name)
            if document is None:
                nodes = place(await self._spaces(), wanted.replica_count)
                document = new_volume(wanted.name, uuid.uuid4().hex, wanted.size_bytes, nodes)
                await self.store.put(document)
            else:
                _refuse_other_spec(Volume(document), wanted)
        return await self.view_when(wanted.name, lambda v: v.state is not VolumeState.CREATING, wait_s)

    async def _spaces(self) -> list[NodeSpace]:
        servers = await ask_servers(self.supervisors.values())
        return [
            NodeSpace(
                node=name,
                up=said.volumes is not None,
                free_bytes=said.space_free_bytes or 0,
                replica_count=len(said.volumes or ()),
            )
            for name, said in servers.items()
        ]

    async def attach_volume(self, name: str, *, tcp: bool, wait_s: float) -> VolumeView:
        self._refuse_if_closing()
        deadline_s = self._now() + wait_s
        async with self._lock(name):
            volume = await self._volume(name)
            if volume.spec.deleting:
                raise VolumeNotFound(volume=name)
            attachment = await self._attachment(name)
            if attachment is not None and attachment.spec.detaching:
                await self._gone(name, deadline_s)
                attachment = None
            if attachment is None:
                await self.store.put(_new_attachment(volume, tcp=tcp))
            elif tcp and not attachment.spec.tcp:
                raise VolumeInUse(
                    f"Volume {name} is attached without a TCP port. "
                    f"`dolmen volume detach {name}`, then attach it with --tcp.",
                    volume=name,
                )
        return await self.view_when(name, lambda v: v.state in SERVING, deadline_s - self._now())

    async def _gone(self, name: str, deadline_s: float) -> None:
        """Wait for a detach that is under way. Raises VolumeInUse."""
        interval_s = POLL_FIRST_S
        while await self._attachment(name) is not None:
            if self._now() >= deadline_s:
                raise VolumeInUse(
                    f"Volume {name} is still being detached. "
                    f"`dolmen volume show {name}` says what it waits for.",
                    volume=name,
                )
            await asyncio.sleep(interval_s)
            interval_s = min(POLL_MAX_S, interval_s * 1.5)

    async def detach_volume(self, name: str, *, force: bool, wait_s: float) -> VolumeView:
        async with self._lock(name):
            await self._volume(name)

            def change(document: Document) -> Document:
                spec = AttachmentSpec.model_validate(document.spec)
                wanted = spec.model_copy(update={"detaching": True, "force": spec.force or force})
                return document.with_spec(**dump(wanted))

            await update(self.store, KIND_ATTACHMENT, name, change)
            if force and name in self.slots:
                # The controller may be waiting for a clean detach that cannot end; this ends it.
                await self.slots[name].end()
                self._controllers[name].retry_now()

        def reached(view: VolumeView) -> bool:
            if any(condition.reason == DETACH_WAITING for condition in view.conditions):
                return not force  # it waits for an operator: no use in waiting with it
            return view.state not in SERVING | {VolumeState.DETACHING, VolumeState.ATTACHING}

        return await self.view_when(name, reached, wait_s)

    async def resize_volume(self, name: str, size_bytes: int, *, wait_s: float) -> VolumeView:
        async with self._lock(name):
            volume = await self._volume(name)
            if volume.spec.deleting:
                raise VolumeNotFound(volume=name)
            if size_bytes < volume.spec.size_bytes:
                raise ShrinkRefused(volume=name, current=volume.spec.size_bytes, wanted=size_bytes)

            def grown(spec: VolumeSpec) -> VolumeSpec:
                return spec.model_copy(update={"size_bytes": max(size_bytes, spec.size_bytes)})

            await change_volume_spec(self.store, name, grown)

        def reached(view: VolumeView) -> bool:
            served = self.slots[name].seen() if name in self.slots else None
            engine_bytes = served.size_bytes if served else None
            return view.size_bytes >= size_bytes and (engine_bytes is None or engine_bytes >= size_bytes)

        return await self.view_when(name, reached, wait_s)

    async def delete_volume(self, name: str, *, wait_s: float) -> VolumeView | None:
        """None when it is gone; else what it waits for. Raises VolumeNotFound, VolumeInUse."""
        async with self._lock(name):
            await self._volume(name)
            if await self._attachment(name) is not None:
                raise VolumeInUse(volume=name)
            await change_volume_spec(
                self.store, name, lambda spec: spec.model_copy(update={"deleting": True})
            )
        try:
            return await self.view_when(name, lambda _: False, wait_s)
        except VolumeNotFound:
            return None

    async def rebuild_replica(self, name: str, replica_id: str, *, wait_s: float) -> VolumeView:
        """Throw away a replica that cannot be opened, or make one that is gone, and have it filled from the
        others. Only on an operator's word, never by itself (C22). A daemon that dies in between leaves it
        missing: then it is asked for again. Raises BadRequest, which says why not."""
        self._refuse_if_closing()
        async with self._lock(name):
            volume = await self._volume(name)
            node = next((place.node for place in volume.spec.replicas if place.id == replica_id), None)
            if node is None:
                raise BadRequest(
                    reason=f"volume {name} has no replica {replica_id[:80]!r}. `dolmen replica ls` lists them"
                )
            link = self.link(node)
            said = (await ask_servers([self.supervisors[node]]))[node]
            if said.volumes is None:
                raise Unreachable(peer=f"the replica server of {node}", reason="it has to run for this")
            volume_id = volume.spec.volume_id
            found = said.volumes.get(volume_id, {"state": "missing"})
            refuse_rebuild(await self.volume(name), replica_id, str(found.get("state")))
            size_bytes = volume.status.replica_size_bytes[replica_id]
            await link.call("replica.delete", volume_id=volume_id)
            await link.call(
                "replica.create", volume_id=volume_id, replica_id=replica_id, name=name, size_bytes=size_bytes
            )
            self._log.info("replica made anew", volume=name, replica=replica_id, node=node)
        return await self.view_when(name, lambda v: replica_id in v.membership.in_sync, wait_s)

    async def replace_replica(
        self, name: str, replica_id: str, wanted: ReplicaReplace, *, wait_s: float
    ) -> ReplacementView:
        """Put a new replica on another node in the place of one that nobody counts on any more. What is
        written first is finished by whoever plans next, whatever dies meanwhile. Raises BadRequest,
        NodeNotFound, NotEnoughNodes."""
        self._refuse_if_closing()
        async with self._lock(name):
            volume = await self._volume(name)
            attached = await self._attachment(name) is not None
            refuse_replacement(volume, replica_id, attached=attached)
            if wanted.to is None:
                node = await self.spare_node(volume)
            elif wanted.to in self.supervisors:
                node = wanted.to
                check_node(volume, node, self.supervisors[node].state)
            else:
                raise NodeNotFound(node=wanted.to)
            new = new_place(volume, node)
            if not wanted.dry_run:
                await begin(self.store, name, replica_id, new)
                replacing = (await self._volume(name)).spec.replacing
                new = replacing.new if replacing is not None else new

        def reached(view: VolumeView) -> bool:
            return wanted.dry_run or new.id in view.membership.in_sync

        view = await self.view_when(name, reached, wait_s)
        return ReplacementView(
            old=replica_id,
            new=new.id,
            node=new.node,
            dry_run=wanted.dry_run,
            size_bytes=volume.status.size_bytes,
            volume=view,
        )

    async def volume(self, name: str) -> VolumeView:
        """Raises VolumeNotFound."""
        return (await self._views([await self._volume(name)]))[0]

    async def volumes(self) -> list[VolumeView]:
        return await self._views([Volume(document) for document in await self.store.list(KIND_VOLUME)])

    async def _views(self, volumes: list[Volume]) -> list[VolumeView]:
        needed = {place.node for volume in volumes for place in volume.spec.replicas}
        looked = await self._look(volumes, needed)
        return looked.views

    async def _look(self, volumes: list[Volume], nodes: Collection[str], *, all_: bool = False) -> _Looked:
        """Ask everybody concerned at once, and explain what is not as desired. ``all_``: these are all."""
        asked = [s for name, s in self.supervisors.items() if name in nodes]
        servers, engines, attachments = await asyncio.gather(
            ask_servers(asked),
            asyncio.gather(*(self._ask(volume.name) for volume in volumes)),
            asyncio.gather(*(self._attachment(volume.name) for volume in volumes)),
        )
        known_ids = {volume.spec.volume_id for volume in volumes} if all_ else None
        facts = []
        for volume, engine, attachment in zip(volumes, engines, attachments, strict=True):
            slot = self.slots.get(volume.name)
            pid = slot.pid if slot else None
            view = view_volume(volume, attachment, pid, servers, self.supervisors, engine, self.layout)
            facts.append(volume_facts(volume, attachment, slot, servers, engine, view, self.unreadable))
        node_list = [node_facts(s, servers[s.name], self.layout, known_ids) for s in asked]
        explained = explain(Facts(node_list, facts))
        if all_:
            self._log_new(explained)
        findings = self._since.stamp(explained, time.time())
        views = [
            fact.view.model_copy(update={"conditions": conditions_of_volume(fact.view, findings)})
            for fact in facts
        ]
        return _Looked(servers, views, findings)

    def _log_new(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if not finding.because and self._since.is_new(finding):
                self._log.warning("not as desired", about=finding.about, text=finding.text)

    async def why(self, name: str = "") -> list[Finding]:
        """What is not as desired, root causes first; of one node, volume or replica, or of all. While the
        state store fails, that alone. Raises NameNotFound."""
        try:
            volumes = [Volume(document) for document in await self.store.list(KIND_VOLUME)]
            looked = await self._look(volumes, self.supervisors.keys(), all_=True)
        except DiskError as error:
            facts = Facts(store_error=str(error))
            return self._since.stamp(explain(facts), time.time())
        if not name:
            return looked.findings
        known = {place.id for volume in volumes for place in volume.places}
        if name not in known | self.supervisors.keys() | {volume.name for volume in volumes}:
            raise NameNotFound(name=name[:100])
        return relevant(looked.findings, name)

    async def _keep_looking(self) -> None:
        """So that it is known since when something is so, though nobody asked."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            try:
                await self.why()
            except Exception:  # noqa: BLE001 - a bug in looking must not end what is looked at
                self._log.exception("looking failed by a bug")

    async def _ask(self, name: str) -> Mapping[str, Any] | None:
        return await ask_engine(self.slots[name]) if name in self.slots else None

    async def view_when(self, name: str, reached: Callable[[VolumeView], bool], wait_s: float) -> VolumeView:
        """The view as soon as ``reached``; or as it is after ``wait_s``, its conditions say why not."""
        deadline_s = self._now() + wait_s
        interval_s = POLL_FIRST_S
        while True:
            view = await self.volume(name)
            if reached(view) or self._now() >= deadline_s:
                return view
            await asyncio.sleep(interval_s)
            interval_s = min(POLL_MAX_S, interval_s * 1.3)

    async def _volume(self, name: str) -> Volume:
        document = await self.store.get(KIND_VOLUME, name)
        if document is None:
            raise VolumeNotFound(volume=name)
        return Volume(document)

    async def _attachment(self, name: str) -> Attachment | None:
        document = await self.store.get(KIND_ATTACHMENT, name)
        return Attachment(document) if document else None

    def _lock(self, name: str) -> asyncio.Lock:
        """Operations on one volume write one after the other: two documents are involved."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def taken_ports(self) -> frozenset[int]:
        """Ports that processes of this cluster will want again, though nobody may listen there now."""
        nodes = [Node(document).status.port for document in await self.store.list(KIND_NODE)]
        attachments = await self.store.list(KIND_ATTACHMENT)
        return frozenset(nodes) | {Attachment(document).status.tcp_port for document in attachments}

    async def write_membership(self, name: str, change: Callable[[VolumeStatus], VolumeStatus]) -> None:
        """Change what opening a volume rests on. Durable when it returns, the stamp too. Raises
        VolumeNotFound, DiskError, and what ``change`` raises."""
        stored = await change_volume_status(self.store, name, change)
        await self._stamp.advance(stored.revision)

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise ShuttingDown()

    async def engine_call(self, name: str, call: str, **args: Any) -> Any:
        """Raises VolumeNotAttached, or what the engine answers."""
        link = self.slots[name].link if name in self.slots else None
        if link is None:
            raise VolumeNotAttached(volume=name)
        return await link.call(call, **args)

    # Nodes

    async def nodes(self) -> list[NodeView]:
        looked = await self._look([], self.supervisors.keys())
        return [self._view_node(name, looked) for name in sorted(self.supervisors, key=_by_number)]

    def _view_node(self, name: str, looked: _Looked) -> NodeView:
        view = view_node(self.supervisors[name], looked.servers[name], self.layout)
        return view.model_copy(update={"conditions": conditions_of_node(name, looked.findings)})

    async def set_node(self, name: str, wanted: NodeWanted, *, kill: bool, wait_s: float) -> NodeView:
        """Start or stop a node's replica server, and remember it. Raises NodeNotFound."""
        supervisor = self.supervisors.get(name)
        if supervisor is None:
            raise NodeNotFound(node=name)
        supervisor.next_stop_kills = kill  # before the document changes: it is acted upon at once
        await update(self.store, KIND_NODE, name, lambda d: d.with_spec(wanted=wanted.value))
        supervisor.wake()
        if kill and wanted is NodeWanted.STOPPED:
            supervisor.kill_now()  # also when a clean stop is under way
        goal = NodeState.UP if wanted is NodeWanted.RUNNING else NodeState.STOPPED
        deadline_s = self._now() + wait_s
        interval_s = POLL_FIRST_S
        while supervisor.state is not goal and self._now() < deadline_s:
            await asyncio.sleep(interval_s)
            interval_s = min(POLL_MAX_S, interval_s * 1.3)
        return self._view_node(name, await self._look([], [name]))

    async def waits_for(self) -> list[str]:
        """What is not as wanted: nodes that should serve, volumes that should be served."""
        waiting = [
            f"node {name}: {supervisor.state.value}"
            for name, supervisor in self.supervisors.items()
            if supervisor.state not in (NodeState.UP, NodeState.STOPPED)
        ]
        attached = {document.name for document in await self.store.list(KIND_ATTACHMENT)}
        for name in attached:
            seen = self.slots[name].seen() if name in self.slots else None
            if seen is None or not seen.answering:
                waiting.append(f"volume {name}: its engine")
        return waiting


def refuse_rebuild(view: VolumeView, replica_id: str, state: str) -> None:
    """``state``: what its server says of it. Raises BadRequest unless nothing can be lost."""
    if state not in ("damaged", "missing"):
        raise BadRequest(
            reason=f"replica {replica_id} is {state}, only one that is damaged or missing is made anew. "
            f"`dolmen volume show {view.name}` says what it waits for."
        )
    if view.state is not VolumeState.DEGRADED:
        raise BadRequest(
            reason=f"volume {view.name} is {view.state.value}, a replica is filled while it is attached and "
            f"served by others. `dolmen volume attach {view.name}` first."
        )
    if replica_id in view.membership.in_sync:
        raise BadRequest(reason=f"replica {replica_id} is named in sync. Try again in a moment.")


def _refuse_other_spec(volume: Volume, wanted: VolumeCreate) -> None:
    if volume.spec.deleting:
        raise Conflict(
            f"Volume {volume.name} is being deleted. "
            f"`dolmen volume show {volume.name}` says what it waits for.",
            kind=KIND_VOLUME,
            name=volume.name,
            revision=volume.document.revision,
        )
    if volume.spec.size_bytes != wanted.size_bytes:
        raise VolumeExistsWithOtherSpec(volume=volume.name, difference="size")
    if len(volume.spec.replicas) != wanted.replica_count:
        raise VolumeExistsWithOtherSpec(volume=volume.name, difference="number of replicas")


def _new_attachment(volume: Volume, *, tcp: bool) -> Document:
    # On one machine every node is here; the first replica's node is as near as any.
    node = volume.spec.replicas[0].node
    spec = AttachmentSpec(volume_id=volume.spec.volume_id, node=node, tcp=tcp)
    return Document(KIND_ATTACHMENT, volume.name, dump(spec))


def _by_number(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
