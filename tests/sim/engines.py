"""An engine process on virtual time: the real ``engine/volume.py`` in a shell that does what
``engine/server.py``, ``engine/replica_link.py`` and ``engine/store_link.py`` do.

Owns connecting, reconnecting with backoff, timeouts, and carrying events and actions. Decides nothing: the
machine does, and it is the real one. Does not own the data plane (``dataplane.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from engine import events as ev
from engine.backoff import Backoff
from engine.limits import (
    CALL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    LONG_CALL_TIMEOUT_S,
    RECONNECT_BASE_S,
    RECONNECT_CAP_S,
)
from engine.regions import Regions, RegionSet
from engine.replica_link import CALL_OF
from engine.volume import Volume, VolumeSpec
from protocol.errors import StaleEpoch, StorageError, Unreachable
from protocol.limits import REGION_BLOCKS
from tests.sim.dataplane import DataPlane, Done
from tests.sim.kernel import Future, Process, Sim, Steps, Task
from tests.sim.network import Calls, Network

STORE_ADDRESS = "d:store"

EXIT_KILLED = -9

REPORT_FIELDS = frozenset(field.name for field in fields(ev.ReplicaReport))


def report_of(wire: dict[str, Any]) -> ev.ReplicaReport:
    return ev.ReplicaReport(**{name: value for name, value in wire.items() if name in REPORT_FIELDS})


class EngineProcess(Process):
    """One engine of one epoch. ``watch`` is told after each step, ``ended`` when the process is over."""

    def __init__(
        self,
        sim: Sim,
        network: Network,
        *,
        spec: VolumeSpec,
        engine_id: str,
        host: str,
        addresses: list[str],
        watch: Callable[[EngineProcess], None],
        ended: Callable[[EngineProcess], None],
    ) -> None:
        super().__init__(sim, f"e{spec.epoch}", host)
        self.network = network
        self.epoch = spec.epoch
        self.engine_id = engine_id
        self.addresses = addresses
        self.exit_code: int | None = None
        self.volume = Volume(spec)
        self.io = DataPlane(self, epoch=spec.epoch, slots=len(addresses), post=self.post)
        self.links = [ReplicaLink(self, slot) for slot in range(len(addresses))]
        self.store = StoreLink(self)
        self.clients: list[Callable[[], None]] = []  # told when the process is gone
        self.replies: dict[int, StorageError | None] = {}
        self._watch = watch
        self._ended = ended
        self._inbox: deque[ev.Event] = deque()
        self._stepping = False
        self.after(0.0, self._start)

    def _start(self) -> None:
        self.post(ev.Started())
        for link in self.links:
            self.spawn(link.run())
        self.spawn(self.store.run())

    # Events and actions: server.py

    def post(self, event: ev.Event) -> None:
        if not self.alive:
            return
        self._inbox.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._inbox and self.alive:
                event = self._inbox.popleft()
                if self.sim.traced:
                    self.note("event", event)
                for action in self.volume.step(event):
                    self._perform(action)
                    if not self.alive:
                        return
                self._watch(self)
        finally:
            self._stepping = False

    def _perform(self, action: Any) -> None:
        if type(action) in CALL_OF:
            self.links[action.slot].start(action)
            return
        match action:
            case ev.Log(event, details):
                if self.sim.traced:
                    self.note("log", event, details)
            case ev.CloseSession(slot, session, retry_after_s):
                self.links[slot].close_session(session, retry_after_s)
            case ev.StoreRecord():
                self.store.store(action)
            case ev.StartTimer(timer, delay_s):
                self.after(delay_s, self.post, ev.TimerFired(timer))
            case ev.Reply(request, error):
                self.replies[request] = error
            case ev.Stop(exit_code):
                self.end(exit_code)
            case _:
                self.io.do(action)

    def end(self, exit_code: int) -> None:
        """The process ends, by itself (``exit_code``) or killed. Clients see their connections close."""
        if not self.alive:
            return
        self.exit_code = exit_code
        self.note("ended", exit_code)
        self.io.stop()
        self.kill()
        clients, self.clients = self.clients, []
        for gone in clients:
            gone()
        self._ended(self)

    # What NBD clients ask: intake.rs

    def write(self, block: int, cells: tuple[int, int], *, fua: bool, done: Done) -> None:
        def frame(number: int) -> tuple[Any, ...]:
            return ("W", number, self.epoch, block, cells, fua)

        self.fire(self.io.write, (frame, block // REGION_BLOCKS, "whole", done))

    def write_partial(self, block: int, half: int, value: int, *, fua: bool, done: Done) -> None:
        def frame(number: int) -> tuple[Any, ...]:
            return ("P", number, self.epoch, block, half, value, fua)

        self.fire(self.io.write, (frame, block // REGION_BLOCKS, "partial", done))

    def flush(self, done: Done) -> None:
        self.fire(self.io.write, (lambda number: ("F", number, self.epoch), -1, "whole", done))

    def read(self, block: int, done: Done) -> None:
        self.fire(self.io.read, (block, done))


class ReplicaLink:
    """The conversation with one replica: engine/replica_link.py."""

    def __init__(self, engine: EngineProcess, slot: int) -> None:
        self.engine = engine
        self.slot = slot
        self.address = engine.addresses[slot]
        self._backoff = Backoff(engine.sim.random, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S)
        self._session = 0
        self._client: Calls | None = None
        self._claimed_process_id = ""
        self._closing = Future()
        self._retry_after_s = 0.0
        self._calls: list[Task] = []

    def run(self) -> Steps:
        while True:
            try:
                client, report = yield from self._open()
            except StorageError as error:
                self.engine.post(ev.ReplicaDown(self.slot, 0, str(error)))
                yield self._backoff.next_delay_s()
                continue
            self._backoff.reset()
            yield from self._hold(client, report)
            self._client = None
            calls, self._calls = self._calls, []
            for call in calls:
                call.cancel()
            client.close()
            delay_s, self._retry_after_s = self._retry_after_s, 0.0
            yield max(delay_s, self._backoff.next_delay_s())

    def _open(self) -> Steps:
        engine = self.engine
        end, _ = yield from engine.network.connect(
            engine, self.address, ("control", 0), timeout_s=CONNECT_TIMEOUT_S
        )
        client = Calls(engine, end, self.address)
        try:
            wire = yield from client.call("inspect", timeout_s=CALL_TIMEOUT_S)
        except StorageError:
            client.close()
            raise
        return client, report_of(wire)

    def _hold(self, client: Calls, report: ev.ReplicaReport) -> Steps:
        self._session += 1
        self._client = client
        self._closing = closing = Future()
        self.engine.post(ev.ReplicaUp(self.slot, self._session, report))
        either = Future()
        client.lost.when_done(either.set)
        closing.when_done(either.set)
        yield either
        if not closing.done:
            self._client = None
            self.engine.post(ev.ReplicaDown(self.slot, self._session, "connection lost"))

    def close_session(self, session: int, retry_after_s: float) -> None:
        if session == self._session and self._client is not None:
            self._client = None
            self._retry_after_s = retry_after_s
            self._closing.set()

    def start(self, action: Any) -> None:
        client = self._client
        if client is None or action.session != self._session:
            return
        task = self.engine.spawn(self._call(client, action))
        if not task.result.done:
            self._calls.append(task)
            self._calls = [call for call in self._calls if not call.result.done]

    def _call(self, client: Calls, action: Any) -> Steps:
        try:
            event = yield from self._perform(client, action)
        except StorageError as error:
            event = self._failed(action, error)
        if event is not None and self._client is client:
            self.engine.post(event)

    def _failed(self, action: Any, error: StorageError) -> ev.Event:
        regions: Regions = ()
        other = -1
        if isinstance(action, ev.PullRegions):
            regions, other = action.regions, action.source
        elif isinstance(action, ev.ListChanged):
            other = action.target
        return ev.CallFailed(
            self.slot, action.session, CALL_OF[type(action)], error.code, str(error), regions, other
        )

    def _perform(self, client: Calls, action: Any) -> Steps:
        slot, session, epoch = self.slot, action.session, self.engine.epoch
        quick, slow = CALL_TIMEOUT_S, LONG_CALL_TIMEOUT_S
        match action:
            case ev.Claim():
                wire = yield from client.call(
                    "claim",
                    timeout_s=quick,
                    epoch=epoch,
                    engine_id=self.engine.engine_id,
                    opens_known=action.opens,
                )
                self._claimed_process_id = wire["process_id"]
                return ev.Claimed(slot, session, report_of(wire))
            case ev.AttachLink():
                return (yield from self._attach(client, action))
            case ev.PersistRecord(record=record):
                yield from client.call("persist_record", timeout_s=quick, epoch=epoch, record=record)
                return ev.RecordPersisted(slot, session, record.stamp)
            case ev.ListDirty():
                dirty = yield from client.call("dirty_regions", timeout_s=quick)
                return ev.DirtyListed(slot, session, RegionSet(dirty))
            case ev.ListChanged(target=target, since=since):
                changed = yield from client.call("changed_since", timeout_s=quick, stamp=since)
                return ev.ChangedListed(slot, session, target, RegionSet(changed))
            case ev.BeginResync(regions=regions):
                yield from client.call("begin_resync", timeout_s=slow, epoch=epoch, regions=list(regions))
                return ev.ResyncBegun(slot, session)
            case ev.PullRegions():
                return (yield from self._pull(client, action))
            case ev.EndResync():
                yield from client.call("end_resync", timeout_s=slow, epoch=epoch)
                return ev.ResyncEnded(slot, session)
            case ev.CompleteRegions(regions=regions):
                yield from client.call("complete_regions", timeout_s=slow, epoch=epoch, regions=list(regions))
                return None
            case ev.CleanReplica():
                yield from client.call("detach_clean", timeout_s=slow, epoch=epoch)
                return ev.Cleaned(slot, session)
            case _:
                raise AssertionError(f"a call the shell does not know: {action}")

    def _pull(self, client: Calls, action: Any) -> Steps:
        wire = yield from client.call(
            "pull_regions",
            timeout_s=LONG_CALL_TIMEOUT_S,
            epoch=self.engine.epoch,
            source=self.engine.addresses[action.source],
            regions=list(action.regions),
            take_damaged=action.take_damaged,
            source_process=action.source_process,
        )
        if wire["regions"] < len(action.regions):
            copied = wire["bytes_copied"]
            return ev.PullIncomplete(self.slot, action.session, action.source, action.regions, copied)
        return ev.RegionsPulled(
            self.slot, action.session, action.regions, wire["bytes_copied"], wire["blocks_damaged"]
        )

    def _attach(self, client: Calls, action: ev.AttachLink) -> Steps:
        engine = self.engine
        end, process_id = yield from engine.network.connect(
            engine, self.address, ("data", engine.epoch), timeout_s=CONNECT_TIMEOUT_S
        )
        try:
            if process_id != self._claimed_process_id:
                raise Unreachable(peer=self.address, reason="another process answers since the claim")
            if self._client is not client:
                raise Unreachable(peer=self.address, reason="its session ended meanwhile")
        except Unreachable:
            end.close()
            raise
        sync = action.mode is ev.LinkMode.SYNC
        generation = engine.io.attach_link(self.slot, end, sync=sync)
        return ev.LinkAttached(self.slot, action.session, generation)


class StoreLink:
    """The line to the state store: engine/store_link.py."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._backoff = Backoff(engine.sim.random, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S)
        self._wanted: ev.StoreRecord | None = None
        self._changed = Future()

    def store(self, action: ev.StoreRecord) -> None:
        self._wanted = action
        self._changed.set()

    def run(self) -> Steps:
        engine = self._engine
        while True:
            try:
                end, _ = yield from engine.network.connect(
                    engine, STORE_ADDRESS, ("engine", engine.epoch), timeout_s=CONNECT_TIMEOUT_S
                )
            except StorageError as error:
                engine.post(ev.StoreDown(str(error)))
            else:
                client = Calls(engine, end, STORE_ADDRESS)
                engine.post(ev.StoreUp())
                yield from self._serve(client)
                client.close()
            yield self._backoff.next_delay_s()

    def _serve(self, client: Calls) -> Steps:
        while not client.lost.done:
            if self._wanted is not None:
                if not (yield from self._store_one(client, self._wanted)):
                    return
                continue
            self._changed = changed = Future()
            either = Future()
            client.lost.when_done(either.set)
            changed.when_done(either.set)
            yield either
        self._engine.post(ev.StoreDown("connection lost"))

    def _store_one(self, client: Calls, action: ev.StoreRecord) -> Steps:
        engine, record = self._engine, action.record
        try:
            yield from client.call(
                "store.record",
                timeout_s=CALL_TIMEOUT_S,
                volume_id="v",
                epoch=engine.epoch,
                record=record.to_wire(),
                opens=dict(action.opens),
            )
        except StaleEpoch:
            engine.post(ev.Fenced("the state store"))
            self._wanted = None
            return False
        except StorageError as error:
            engine.post(ev.StoreDown(str(error)))
            return False
        self._backoff.reset()
        if self._wanted is action:
            self._wanted = None
        engine.post(ev.RecordStored(record.stamp))
        return True
