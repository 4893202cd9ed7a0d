"""The engine's shell: carries events to the pure machine and does what it answers.

Owns the tasks and connections of the process. Decides nothing: ``volume.py`` does.

An event is stepped at once, where it arises, on the event loop's thread; actions never await. Slow work is a
task that posts an event when it is done. So between a lost link and the new members stand one step, the calls
that make the record durable, and one step.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import AsyncExitStack
from random import Random
from typing import Any

from engine.config import EngineConfig, ReplicaAddress
from engine.events import (
    Action,
    CloseSession,
    DetachAsked,
    Event,
    Log,
    Paced,
    PullIncomplete,
    RegionsPulled,
    ReplaceAsked,
    Reply,
    ResizeAsked,
    Retarget,
    Started,
    StartTimer,
    Stop,
    StoreRecord,
    TimerFired,
)
from engine.frontend import Frontend
from engine.io_path import IoPath, Notice
from engine.negotiation import Export, ExportTable
from engine.pace import PACE_INTERVAL_S, STARTING, LoadMeter, Pace, is_worth_telling
from engine.replica_link import CALL_OF, ReplicaLink
from engine.rpc_api import serve_control
from engine.scrub import Repairs
from engine.status import volume_status
from engine.store_link import StoreLink
from engine.volume import Volume
from protocol.errors import BadRequest, StorageError
from protocol.jsonlog import log_event
from protocol.limits import BLOCK_BYTES

log = logging.getLogger("dolmen.engine")

EXIT_BUG = 1
EXIT_TERMINATED = 143
"""After SIGTERM: nothing is lost, nothing is cleaned."""


class _Ended(Exception):
    """The machine, or a signal, ended the engine."""


class EngineServer:
    """One attached volume. ``run()`` is its whole life and returns the exit code."""

    def __init__(self, config: EngineConfig, *, key: bytes, io: IoPath, random: Random) -> None:
        self._config = config
        self._key = key
        self._io = io
        self._random = random
        self._volume = Volume(config.spec())
        self._addresses = list(config.replicas)  # by slot
        self._inbox: deque[Event] = deque()
        self._stepping = False
        self._pacing: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._exit_code = EXIT_BUG
        self._links: list[ReplicaLink] = []
        self._tasks: asyncio.TaskGroup | None = None
        self._store: StoreLink | None = None
        self._frontend: Frontend | None = None
        self._replies: dict[int, asyncio.Future[None]] = {}
        self._next_request = 1
        self._repairs = Repairs(io.repair_block)
        self._resync_bytes = 0  # copied for resyncs and reconciles
        self._repaired_count = 0
        self._unreadable_count = 0

    async def run(self) -> int:
        """Serve until detached, fenced or stopped. If a part fails by a bug, the process ends."""
        config = self._config
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        async with AsyncExitStack() as undo:
            undo.callback(self._io.stop)
            await undo.enter_async_context(serve_control(config.control_socket, self))
            try:
                async with asyncio.TaskGroup() as tasks:
                    self._start(tasks)
                    await self._stopped.wait()
                    raise _Ended  # the group cancels what is left: links, calls, negotiations
            except* _Ended:
                pass
            finally:
                if self._frontend is not None:
                    self._frontend.close()
        return self._exit_code

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        config = self._config
        self._tasks = tasks
        self._links = [
            ReplicaLink(
                slot,
                address,
                volume_id=config.volume_id,
                epoch=config.epoch,
                engine_id=config.engine_id,
                key=self._key,
                io=self._io,
                random=self._random,
                address_of=self._address_of,
                tasks=tasks,
                post=self.post,
            )
            for slot, address in enumerate(config.replicas)
        ]
        self._store = StoreLink(
            config.daemon_socket,
            volume_id=config.volume_id,
            epoch=config.epoch,
            random=self._random,
            post=self.post,
        )
        self._frontend = Frontend(config.listeners, exports=self._exports, io=self._io, tasks=tasks)
        self._io.on_events(self.post, self._on_notice)
        self.post(Started())
        for link in self._links:
            tasks.create_task(link.run(), name="replica link")
        tasks.create_task(self._store.run(), name="store link")
        self._frontend.start()

    def stop(self, exit_code: int) -> None:
        if not self._stopped.is_set():
            self._exit_code = exit_code
            self._stopped.set()

    # Events and actions

    def post(self, event: Event) -> None:
        """Step the machine. An event that arises in the middle of a step waits for its end."""
        if isinstance(event, RegionsPulled | PullIncomplete):
            self._resync_bytes += event.bytes_copied
        self._inbox.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._inbox:
                for action in self._volume.step(self._inbox.popleft()):
                    self._perform(action)
            self._pace_if_resyncing()
        except Exception:  # a bug of ours: what the machine believes is no longer sure
            log.exception("the volume's machine failed by a bug")
            self.stop(EXIT_BUG)
            raise
        finally:
            self._stepping = False

    def _pace_if_resyncing(self) -> None:
        """The client's load is looked at only while somebody is brought up to date: idle costs nothing."""
        joining = self._volume.joining
        if (
            self._pacing is None
            and joining is not None
            and joining.plan is not None
            and self._tasks is not None
        ):
            self._pacing = self._tasks.create_task(self._keep_pace(), name="pace")

    async def _keep_pace(self) -> None:
        pace, meter, said_bytes_s = Pace(), LoadMeter(), 0
        clock = asyncio.get_running_loop().time
        try:
            before_s = clock()
            while (joining := self._volume.joining) is not None and not self._volume.ended:
                copied = joining.plan.bytes_copied if joining.plan is not None else 0
                now_s = clock()
                load = meter.window(self._io.stats(), window_s=now_s - before_s, copied_bytes=copied)
                before_s = now_s
                if load is not None:
                    was = self._volume.pace
                    now = pace.step(load)
                    if now != was:
                        self.post(Paced(now))
                    if is_worth_telling(said_bytes_s, now.rate_bytes_s):
                        said_bytes_s = now.rate_bytes_s
                        log.info("resync paced", extra={"fields": pace.told()})
                await asyncio.sleep(PACE_INTERVAL_S)
        finally:
            self._pacing = None
        self.post(Paced(STARTING))

    def _perform(self, action: Action) -> None:
        if type(action) in CALL_OF:
            self._links[action.slot].start(action)  # type: ignore[union-attr, arg-type]  # by CALL_OF
            return
        match action:
            case Log(event, fields):
                log.info("%s", event, extra={"fields": fields})
            case CloseSession(slot, session, retry_after_s):
                self._links[slot].close_session(session, retry_after_s)
            case StoreRecord():
                assert self._store is not None
                self._store.store(action)
            case Retarget(slot, id_, node, host, port):
                self._addresses[slot] = ReplicaAddress(id=id_, node=node, host=host, port=port)
                self._links[slot].retarget(self._addresses[slot])
            case StartTimer(timer, delay_s):
                asyncio.get_running_loop().call_later(delay_s, self.post, TimerFired(timer))
            case Reply(request, error):
                self._settle(request, error)
            case Stop(exit_code):
                self.stop(exit_code)
            case _:
                self._io.do(action)  # type: ignore[arg-type]  # what is left are LoopCommands

    def _on_notice(self, notice: Notice) -> None:
        """What the data plane tells that decides nothing."""
        match notice:
            case ("client_closed", int(client_id), str(reason)):
                assert self._frontend is not None
                self._frontend.on_client_closed(client_id, reason)
            case ("block_repaired", int(slot), int(block)):
                self._repaired_count += 1
                self._repairs.note_repaired(slot, block)
                replica = self._addresses[slot].id
                log_event(log, "block repaired", level=logging.WARNING, replica=replica, block_index=block)
            case ("block_unreadable", int(block)):
                self._unreadable_count += 1
                self._repairs.note_unreadable(block)
                log_event(log, "block unreadable on all replicas", level=logging.ERROR, block_index=block)
            case _:
                log_event(log, "unknown event of the data plane", level=logging.ERROR, notice=repr(notice))

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback failed: a bug of ours. Going on would hide it."""
        error = context.get("exception")
        log.error("%s", context.get("message", "a callback failed"), exc_info=error)
        self.stop(EXIT_BUG)

    # What others ask: rpc_api.Engine

    def status(self) -> dict[str, Any]:
        clients = self._frontend.client_count if self._frontend is not None else 0
        return volume_status(self._volume, clients=clients)

    def stats(self) -> dict[str, Any]:
        return {
            **self._io.stats(),
            "resync_bytes": self._resync_bytes,
            "resync_rate_bytes_s": self._volume.pace.rate_bytes_s if self._volume.joining else 0,
            "blocks_repaired": self._repaired_count,
            "unreadable": self._unreadable_count,
        }

    async def resize(self, size_bytes: int) -> None:
        await self._ask(lambda request: ResizeAsked(request, size_bytes))

    async def repair(self, replica: str, blocks: list[int]) -> dict[str, Any]:
        """Give ``replica`` good copies of blocks that it found damaged. Raises BadRequest."""
        entry = next((entry for entry in self._volume.entries if entry.id == replica), None)
        if entry is None:
            raise BadRequest(reason=f"volume {self._config.name} has no replica {replica[:80]!r}")
        if not entry.in_sync:
            raise BadRequest(reason=f"replica {replica} is not in sync; its resync brings good copies")
        block_count = self._volume.size_bytes // BLOCK_BYTES
        if any(not 0 <= block < block_count for block in blocks):
            raise BadRequest(reason=f"blocks are numbers below {block_count}")
        return (await self._repairs.run(entry.slot, blocks)).to_wire()

    async def replace_replica(self, old: str, new: ReplicaAddress) -> None:
        await self._ask(lambda request: ReplaceAsked(request, old, new.id, new.node, new.host, new.port))

    async def detach(self) -> None:
        await self._ask(DetachAsked)

    async def _ask(self, make: Any) -> None:
        request, self._next_request = self._next_request, self._next_request + 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replies[request] = future
        try:
            self.post(make(request))
            await future
        finally:
            self._replies.pop(request, None)

    def _settle(self, request: int, error: StorageError | None) -> None:
        future = self._replies.get(request)
        if future is None or future.done():
            return  # who asked is gone
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    # For the parts

    def _address_of(self, slot: int) -> ReplicaAddress:
        return self._addresses[slot]

    def _exports(self) -> ExportTable:
        return ExportTable(
            [
                Export(
                    name=self._config.name,
                    size_bytes=self._volume.size_bytes,
                    read_only=self._config.read_only,
                    description=f"Dolmen volume {self._config.name}",
                )
            ]
        )
