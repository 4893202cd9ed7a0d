"""The daemon on virtual time: the real rules of the state store and of who may have an engine.

Owns the volume's document, in a store that survives the daemon, and engine processes. What a record may
replace (``control/engine_rpc.py``), when an epoch is granted and an engine started (``control/reconcile.py``)
are the real functions, over a store in memory. Does not own REST, sockets or files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from control.documents import ANY_REVISION, Change, Document
from control.engine_rpc import EngineCalls
from control.model import (
    KIND_ATTACHMENT,
    KIND_VOLUME,
    Attachment,
    AttachmentSpec,
    Grant,
    Volume,
    VolumeStatus,
    dump,
    new_volume,
)
from control.reconcile import EndEngine, EngineSeen, GrantEpoch, NodeState, Seen, StartEngine, plan
from control.trust import NEWER_EPOCH, OLDER_COPY, distrusted, grant_keys, overridden
from engine.config import _grant
from engine.events import EXIT_FENCED
from engine.limits import STRAGGLER_WAIT_S
from engine.opening import VolumeSpec
from protocol.errors import Conflict, StorageError
from tests.sim.engines import STORE_ADDRESS, EngineProcess
from tests.sim.kernel import Process, Sim, Steps
from tests.sim.network import Endpoint, Network

PLAN_INTERVAL_S = 1.0
NOTICE_S = 0.02
"""From the end of a process to the daemon's knowing it."""

START_S = 0.15
"""What a Python process needs to start."""

VOLUME = "v"


def drive(steps: Coroutine[Any, Any, Any]) -> Any:
    """Run real code that would await only a store that is in memory."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for something that is not simulated")


class MemoryStore:
    """control/documents.Store over a dictionary."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str], Document] = {}
        self.revision = 0

    def copy(self) -> MemoryStore:
        made = MemoryStore()
        made.documents, made.revision = dict(self.documents), self.revision
        return made

    async def get(self, kind: str, name: str) -> Document | None:
        return self.documents.get((kind, name))

    async def list(self, kind: str) -> list[Document]:
        return [self.documents[key] for key in sorted(self.documents) if key[0] == kind]

    async def put(self, document: Document) -> Document:
        current = self.documents.get((document.kind, document.name))
        if (current.revision if current else 0) != document.revision:
            raise Conflict(kind=document.kind, name=document.name, revision=document.revision)
        self.revision += 1
        written = Document(document.kind, document.name, document.spec, document.status, self.revision)
        self.documents[document.kind, document.name] = written
        return written

    async def delete(self, kind: str, name: str, *, revision: int = ANY_REVISION) -> None:
        self.documents.pop((kind, name), None)

    def watch(self, kind: str) -> AsyncIterator[Change]:
        raise AssertionError("nobody watches here")

    async def close(self) -> None:
        pass


class Stamp:
    """control/stamp.StateStamp without its file."""

    def __init__(self) -> None:
        self.number = 0

    async def advance(self, number: int) -> None:
        self.number = max(self.number, number)


class Control:
    """What outlives a daemon: the documents, and which engines run where."""

    def __init__(
        self,
        sim: Sim,
        network: Network,
        *,
        replica_ids: list[str],
        addresses: list[str],
        size_bytes: int,
        watch: Callable[[EngineProcess], None],
    ) -> None:
        self.sim = sim
        self.network = network
        self.store = MemoryStore()
        self.stamp = Stamp()
        self.grant_count = 0
        self.straggler_wait_s = STRAGGLER_WAIT_S
        self.newest_claimed: Callable[[], int] = lambda: 0  # of the replicas that answer at once
        self.replica_ids = replica_ids
        self.addresses = addresses
        self.size_bytes = size_bytes
        self.watch = watch
        self.engines: list[EngineProcess] = []  # all that ever ran, oldest first
        self.host = "h1"  # where the next engine runs
        self.wanted = True  # attached
        self.daemon: Daemon | None = None
        self.on_engine: list[Callable[[EngineProcess], None]] = []  # a new engine listens
        self._put_documents()

    def _put_documents(self) -> None:
        nodes = tuple(f"n{index}" for index in range(len(self.replica_ids)))
        document = new_volume(VOLUME, VOLUME, self.size_bytes, nodes)
        status = VolumeStatus.model_validate(document.status).model_copy(
            update={"replica_size_bytes": dict.fromkeys(self.replica_ids, self.size_bytes)}
        )
        drive(self.store.put(Document(KIND_VOLUME, VOLUME, document.spec, dump(status))))
        attachment = AttachmentSpec(volume_id=VOLUME, node="n0")
        drive(self.store.put(Document(KIND_ATTACHMENT, VOLUME, dump(attachment))))

    @property
    def volume(self) -> Volume:
        return Volume(self.store.documents[KIND_VOLUME, VOLUME])

    @property
    def engine(self) -> EngineProcess | None:
        """The newest that lives."""
        return next((engine for engine in reversed(self.engines) if engine.alive), None)

    def put_status(self, status: VolumeStatus) -> None:
        document = self.store.documents[KIND_VOLUME, VOLUME]
        changed = Document(document.kind, document.name, document.spec, dump(status), document.revision)
        drive(self.store.put(changed))

    def recover(self, members: tuple[str, ...], newest: tuple[int, int]) -> None:
        """``dolmen volume recover``: the operator's word."""
        self.put_status(overridden(self.volume.status, members, newest, ""))

    def start_daemon(self) -> None:
        if self.daemon is None:
            self.daemon = Daemon(self)
            self.network.listeners[STORE_ADDRESS] = self.daemon

    def kill_daemon(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon = None


class Daemon(Process):
    def __init__(self, control: Control) -> None:
        super().__init__(control.sim, "daemon", "d")
        self.control = control
        self.calls = EngineCalls(control.store, control.stamp)  # type: ignore[arg-type]  # of the same shape
        self.unused_epoch = 0
        # Adopted, if it runs where we look. Its end was not seen by us if it does not.
        self.holds: EngineProcess | None = control.engine
        self.fenced_epoch = 0
        self._trust_store()
        self.after(0.05, self._plan)

    def _trust_store(self) -> None:
        """control/cluster.py at a start: the stamp is ahead of a state.db that was put back."""
        control = self.control
        if control.stamp.number > control.store.revision:
            control.put_status(distrusted(control.volume.status, OLDER_COPY, ""))
            self.note("state store is distrusted")

    # store.record: what engines ask

    def accept(self, end: Endpoint, hello: Any) -> None:
        end.listen(lambda message: self._on_call(end, message), lambda: None)
        end.send(("welcome", ""))

    def _on_call(self, end: Endpoint, message: Any) -> None:
        self.spawn(self._answer(end, *message))

    def _answer(self, end: Endpoint, number: int, name: str, args: dict[str, Any]) -> Steps:
        yield self.sim.random.uniform(0.0005, 0.003)
        try:
            drive(self.calls.answer(name, args))
        except StorageError as error:
            yield self.sim.random.uniform(0.0, 0.001)
            end.send((number, None, error))
        else:
            self.note("stored", args["record"])
            yield self.sim.random.uniform(0.0, 0.002)
            end.send((number, {}, None))

    # Engines

    def engine_ended(self, engine: EngineProcess) -> None:
        self.after(NOTICE_S, self._noticed, engine)

    def _noticed(self, engine: EngineProcess) -> None:
        if self.holds is engine:
            self.holds = None
            if engine.exit_code == EXIT_FENCED:
                self.fenced_epoch = engine.epoch
            self._plan_now()

    def give_up_engine(self) -> None:
        """Its node does not answer: from here on it is taken for dead, which it may not be."""
        self.holds = None
        self.control.host = "h2" if self.control.host == "h1" else "h1"
        self._plan_now()

    def _plan(self) -> None:
        self._plan_now()
        self.after(PLAN_INTERVAL_S, self._plan)

    def _plan_now(self) -> None:
        for _ in range(8):
            made = plan(self.control.volume, self._attachment(), self._seen())
            if not made.actions:
                return
            for action in made.actions:
                self._do(action)

    def _attachment(self) -> Attachment:
        return Attachment(self.control.store.documents[KIND_ATTACHMENT, VOLUME])

    def _seen(self) -> Seen:
        engine = self.holds
        nodes = {f"n{index}": NodeState.UP for index in range(len(self.control.replica_ids))}
        seen = EngineSeen(engine.epoch, None, True, 0.0) if engine is not None else None
        return Seen(nodes=nodes, engine=seen, unused_epoch=self.unused_epoch, sockets=True)

    def _do(self, action: Any) -> None:
        match action:
            case GrantEpoch(epoch):
                self._grant(epoch)
            case StartEngine(epoch):
                self._start_engine(epoch)
            case EndEngine():
                if self.holds is not None:
                    self.holds.end(-15)
                    self.holds = None
            case _:
                raise AssertionError(f"an action that is not simulated: {action}")

    def _grant(self, epoch: int) -> None:
        """control/executor.py, _grant_epoch: the rule stands there in the middle of what it waits for."""
        control = self.control
        status = control.volume.status
        claimed = control.newest_claimed()
        epoch = max(epoch, claimed + 1)
        if claimed > status.epoch or (status.epoch and self.fenced_epoch == status.epoch):
            status = distrusted(status, NEWER_EPOCH, "")
        self.control.grant_count += 1
        grant = Grant(epoch=epoch, engine_id=f"engine-{epoch}-{control.grant_count}", node="n0")
        control.put_status(status.model_copy(update={"grant": grant}))
        control.stamp.number = control.store.revision
        self.unused_epoch = epoch
        self.note("granted", epoch)

    def _start_engine(self, epoch: int) -> None:
        control = self.control
        self.unused_epoch = 0
        volume = control.volume
        # Engines of one machine are found by their arguments, whoever started them.
        ended = not any(engine.alive for engine in control.engines)
        spec = VolumeSpec(
            volume_id=VOLUME,
            name=VOLUME,
            size_bytes=volume.status.size_bytes,
            epoch=epoch,
            stored=volume.membership,
            replica_ids=tuple(control.replica_ids),
            straggler_wait_s=control.straggler_wait_s,
            grant=_grant(grant_keys(volume, predecessor_ended=ended)),
        )
        assert volume.status.grant is not None
        engine = EngineProcess(
            control.sim,
            control.network,
            spec=spec,
            engine_id=volume.status.grant.engine_id,
            host=control.host,
            addresses=control.addresses,
            watch=control.watch,
            ended=self._on_end,
        )
        engine.pause()  # it is starting
        control.sim.after(START_S, engine.resume)
        self.holds = engine
        control.engines.append(engine)
        for call in list(control.on_engine):
            call(engine)
        self.note("engine started", epoch, engine.host)

    def _on_end(self, engine: EngineProcess) -> None:
        daemon = self.control.daemon
        if daemon is not None:
            daemon.engine_ended(engine)
