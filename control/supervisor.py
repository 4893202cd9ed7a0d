"""Keeps one node's replica server running: starts it, finds it again, starts it anew when it dies.

Owns the process, its port, its ready file and its log. Does not own what its replicas hold.
The decision is ``plan_server``, pure; ``NodeSupervisor`` is the shell around it.

Promises: the server keeps its port over restarts, because engines look for it there. One that an
operator stopped stays down, also over a restart of the daemon, until an operator starts it. One
that was killed is started again at once, and slower each time if it keeps dying.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import structlog

from control.documents import Store, update
from control.layout import Layout
from control.links import Link, replica_server_link
from control.listeners import LOOPBACK, choose_port
from control.model import (
    KIND_DISK,
    KIND_NODE,
    Condition,
    DiskStatus,
    Node,
    NodeStatus,
    NodeWanted,
    Who,
    dump,
)
from control.processes import Process, Programs, adopt, find, is_standing, last_words, spawn
from control.reconcile import NodeState
from control.why import ProcessFacts
from protocol.errors import StorageError, Unreachable

RESTART_WAIT_FIRST_S = 0.5
RESTART_WAIT_MAX_S = 10.0
"""The first restart is immediate; then 0.5 s, doubling to this. A disk that stays broken is asked
six times a minute."""

STEADY_AFTER_S = 30.0
"""A server that ran this long starts again without waiting."""

READY_INTERVAL_S = 0.01
READY_INTERVAL_MAX_S = 0.2
STOP_GRACE_S = 20.0
"""A clean stop flushes every replica. Past this it is killed, which loses nothing acknowledged."""


class ServerAction(Enum):
    START = "start"
    STOP = "stop"
    KILL = "kill"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class ServerSeen:
    alive: bool
    wait_s: float  # until a dead one may be started again


def plan_server(wanted: NodeWanted, seen: ServerSeen, *, kill: bool) -> ServerAction:
    """``kill``: an operator wants it stopped the hard way."""
    if wanted is NodeWanted.STOPPED:
        if not seen.alive:
            return ServerAction.NOTHING
        return ServerAction.KILL if kill else ServerAction.STOP
    if not seen.alive and seen.wait_s <= 0:
        return ServerAction.START
    return ServerAction.NOTHING


def restart_wait_s(deaths_in_a_row: int) -> float:
    """How long to wait before the start after this many deaths in a row."""
    if deaths_in_a_row <= 1:
        return 0.0
    return min(RESTART_WAIT_MAX_S, RESTART_WAIT_FIRST_S * 2.0 ** (deaths_in_a_row - 2))


class NodeSupervisor:
    """``run`` until cancelled. ``changed(node)`` is called when ``state`` may have changed."""

    def __init__(
        self,
        name: str,
        store: Store,
        layout: Layout,
        programs: Programs,
        *,
        key: bytes,
        tasks: asyncio.TaskGroup,
        changed: Callable[[str], None],
        now: Callable[[], float],
    ) -> None:
        self.name = name
        self.port = 0
        self.wanted = NodeWanted.RUNNING
        self.condition: Condition | None = None
        self.next_stop_kills = False  # an operator wants the next stop to be a SIGKILL
        self._store = store
        self._layout = layout
        self._programs = programs
        self._key = key
        self._tasks = tasks
        self._changed = changed
        self._now = now
        self._wake = asyncio.Event()
        self._process: Process | None = None
        self._link: Link | None = None
        self._ready = False
        self._ready_interval_s = READY_INTERVAL_S
        self._started_at_s = 0.0
        self._deaths = 0
        self._start_not_before_s = 0.0
        self._last_end = ""
        self._last_how = ""
        self._last_code: int | None = None
        self._ended_at_s = 0.0
        self._log = structlog.get_logger().bind(node=name)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def state(self) -> NodeState:
        if self._process is not None:
            return NodeState.UP if self._ready else NodeState.STARTING
        return NodeState.STOPPED if self.wanted is NodeWanted.STOPPED else NodeState.DOWN

    @property
    def link(self) -> Link:
        """Raises Unreachable."""
        if self._link is None or not self._ready:
            raise Unreachable(peer=f"node {self.name}", reason=f"its replica server is {self.state.value}")
        return self._link

    def wake(self) -> None:
        """The node's document changed."""
        self._wake.set()

    def kill_now(self) -> None:
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    async def run(self) -> None:
        self._find_living()
        while True:
            self._wake.clear()
            try:
                await self._step()
            except (StorageError, OSError) as error:  # a full disk, a port in use, no memory for a process
                self._log.warning("node not looked after", error=str(error))
                self._failed(str(error), str(error))
            self._note()
            await self._sleep()

    async def _step(self) -> None:
        document = await self._store.get(KIND_NODE, self.name)
        assert document is not None, f"node {self.name} has no document"
        node = Node(document)
        self.wanted, self.port = node.spec.wanted, node.status.port
        seen = ServerSeen(self._process is not None, self._start_not_before_s - self._now())
        await self._perform(plan_server(self.wanted, seen, kill=self.next_stop_kills))
        await self._look_for_ready()

    async def _sleep(self) -> None:
        timeout_s: float | None = None
        if self._process is not None and not self._ready:
            timeout_s = self._ready_interval_s
            self._ready_interval_s = min(READY_INTERVAL_MAX_S, timeout_s * 1.2)
        elif self._process is None and self.wanted is NodeWanted.RUNNING:
            timeout_s = max(0.0, self._start_not_before_s - self._now())
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _perform(self, action: ServerAction) -> None:
        match action:
            case ServerAction.START:
                self.next_stop_kills = False
                await self._start()
            case ServerAction.STOP:
                assert self._process is not None
                self._log.info("replica server is stopped", pid=self._process.pid)
                await self._process.stop(grace_s=STOP_GRACE_S)
            case ServerAction.KILL:
                assert self._process is not None
                self._log.info("replica server is killed", pid=self._process.pid)
                await self._process.kill()
            case ServerAction.NOTHING:
                pass

    def _arguments(self) -> list[str]:
        """Those that say who it is; the rest may differ between daemons."""
        return [
            *self._programs.replica_server,
            *("--dir", os.fspath(self._layout.disk_dir(self.name))),
            *("--node", self.name),
        ]

    def _find_living(self) -> None:
        """Adopt the server an earlier daemon started. A disk directory has one lock, so there is at
        most one that serves; the youngest of several is it or is about to end."""
        for pid in reversed(find(self._arguments()[1:])):
            process = adopt(pid, self._arguments()[1:])
            if process is not None:
                self._log.info("replica server adopted", pid=pid)
                self._hold(process)
                return

    async def _start(self) -> None:
        if not self.port:
            await self._choose_port()
        self._layout.disk_dir(self.name).mkdir(parents=True, exist_ok=True)
        ready = self._layout.ready_file(self.name)
        ready.unlink(missing_ok=True)
        disk = await self._store.get(KIND_DISK, disk_name(self.name))
        disk_id = DiskStatus.model_validate(disk.status).disk_id if disk else ""
        process = spawn(
            [
                *self._arguments(),
                # Known since its first start: an empty directory is then a missing mount, not a new disk.
                *(("--disk-id", disk_id) if disk_id else ()),
                *("--port", str(self.port)),
                *("--key", os.fspath(self._layout.key)),
                *("--ready-file", os.fspath(ready)),
            ],
            log=self._layout.replica_log(self.name),
            cwd=self._layout.node_dir(self.name),
        )
        self._log.info("replica server started", pid=process.pid, port=self.port)
        self._hold(process)

    async def _choose_port(self) -> None:
        """Written to the node's document before it is used: whatever happens next, it stays."""
        nodes = [Node(document) for document in await self._store.list(KIND_NODE)]
        taken = frozenset(node.status.port for node in nodes)
        await self._set_port(choose_port(f"{self._layout.dir}/{self.name}", taken))

    async def _set_port(self, port: int) -> None:
        self.port = port
        status = NodeStatus(port=port)
        await update(self._store, KIND_NODE, self.name, lambda d: d.with_status(**dump(status)))

    def _hold(self, process: Process) -> None:
        self._process, self._ready = process, False
        self._ready_interval_s = READY_INTERVAL_S
        self._started_at_s = self._now()
        process.on_exit(lambda: self._ended(process))
        self._changed(self.name)

    async def _look_for_ready(self) -> None:
        """A server that lives says in a file where it serves."""
        process = self._process
        if process is None or self._ready:
            return
        found = read_ready_file(self._layout.ready_file(self.name))
        if found is None or found.pid != process.pid:
            return
        if found.port != self.port:
            await self._set_port(found.port)
        disk = DiskStatus(disk_id=found.disk_id)
        await update(self._store, KIND_DISK, disk_name(self.name), lambda d: d.with_status(**dump(disk)))
        if self._process is not process:
            return  # it ended while we wrote
        self._link = replica_server_link(LOOPBACK, self.port, key=self._key, node=self.name)
        self._ready = True
        self._log.info("replica server serves", pid=process.pid, port=self.port)
        self._changed(self.name)

    def _ended(self, process: Process) -> None:
        assert process is self._process
        lived_s = self._now() - self._started_at_s
        code = process.exit_code
        how = "ended" if code is None else f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        self._log.info("replica server ended", pid=process.pid, how=how, lived_s=round(lived_s, 1))
        if self._ready and lived_s >= STEADY_AFTER_S:
            self._deaths = 0
        self._last_code = code
        self._failed(how, f"{how} after {lived_s:.1f} s; its log: {self._layout.replica_log(self.name)}")
        self._process, self._ready = None, False
        link, self._link = self._link, None
        if link is not None:
            self._tasks.create_task(link.close(), name=f"close link {link.peer}")
        self._changed(self.name)
        self._wake.set()

    def _failed(self, how: str, said: str) -> None:
        self._deaths += 1
        self._last_end, self._last_how = said, how
        self._ended_at_s = self._now()
        self._start_not_before_s = self._now() + restart_wait_s(self._deaths)

    def _note(self) -> None:
        """Why the node is not as desired, and since when."""
        if self.state is NodeState.UP:
            self.condition = None
            return
        if self.state is NodeState.STOPPED:
            made = Condition(
                reason="node_stopped",
                waits_for=f"`dolmen node start {self.name}`",
                who=Who.OPERATOR,
            )
        elif self.state is NodeState.STARTING:
            made = Condition(reason="node_starting", waits_for="its replica server to serve", who=Who.DOLMEN)
        else:
            made = Condition(
                reason="node_down",
                waits_for=f"its replica server to be started again (the last one: {self._last_end})",
                who=Who.DOLMEN,
            )
        if self.condition is None or not self.condition.same_as(made):
            since = datetime.now(UTC).isoformat(timespec="seconds")
            self.condition = made.model_copy(update={"since": since})

    def process_facts(self, *, answers: bool) -> ProcessFacts:
        log = self._layout.replica_log(self.name)
        pid, ended = self.pid, bool(self._last_how)
        crashing = self._process is None and self._last_code not in (None, 0)
        return ProcessFacts(
            pid=pid,
            answers=answers,
            standing=not answers and pid is not None and is_standing(pid),
            how=self._last_how,
            ended_ago_s=self._now() - self._ended_at_s if ended else 0.0,
            exit_code=self._last_code,
            ends=self._deaths,
            last_words=last_words(log) if crashing else "",
            log=os.fspath(log),
            since=self.condition.since if self.condition else "",
        )

    async def stop(self) -> None:
        """For a shutdown of everything: a clean stop that is not remembered."""
        if self._process is not None:
            await self._process.stop(grace_s=STOP_GRACE_S)

    def forget(self) -> None:
        """The daemon ends; the server goes on."""
        if self._process is not None:
            self._process.forget()

    async def close_link(self) -> None:
        if self._link is not None:
            await self._link.close()


@dataclass(frozen=True, slots=True)
class ReadyFile:
    pid: int
    port: int
    disk_id: str


def read_ready_file(path: Path) -> ReadyFile | None:
    """None while there is none, or nothing that we understand."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    match found:
        case {"pid": int(pid), "port": int(port), "disk_id": str(disk_id)}:
            return ReadyFile(pid, port, disk_id)
        case _:
            return None


def disk_name(node: str) -> str:
    return f"{node}-disk0"
