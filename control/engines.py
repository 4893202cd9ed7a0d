"""One volume's engine process, as the daemon holds it: its sockets, its process, its control link.

Owns the files ``nbd.sock``, ``engine.json`` and ``engine.log`` of a volume, starting, finding again and
ending its engine, and since when it is silent. Does not own when to start or end it
(``control/reconcile.py``) or under which epoch.

A living engine is never disturbed by the daemon's own start or end: ``forget`` lets it go on, and
``adopt`` finds it again by its exact arguments.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from control.layout import Layout, prepare_runtime_dir, write_private
from control.links import Link, engine_link
from control.listeners import listen_tcp, listen_unix
from control.processes import Process, Programs, Running, adopt, find, is_standing, last_words, spawn
from control.reconcile import EngineSeen
from control.why import ProcessFacts
from protocol.errors import NotEnoughReplicas, StorageError

HELLO_INTERVAL_S = 0.02
"""How often a starting engine is asked until it answers: part of the pause a client sees only when
its engine was killed; 20 ms is a tenth of what Python needs to start."""

HELLO_INTERVAL_MAX_S = 0.5
PING_TIMEOUT_S = 5.0

SILENT_AFTER_S = 5.0
"""An engine that answered before is called silent only after so long without an answer: every question of
``observe`` may be late on a busy machine, and what follows from silence is seen by users."""

QUICK_DEATH_S = 1.0
"""An engine that lived shorter than this, or that never answered, was probably killed by what it found;
after two of them in a row the next one waits. Longer would slow down one that others kill."""

RESTART_WAIT_FIRST_S = 0.1
RESTART_WAIT_MAX_S = 1.0
"""The contract wants I/O within 2 s after a kill, so a crash loop is slowed only this much."""

ENDS_WINDOW_S = 60.0
ENDS_KEPT_MAX = 32
"""Ends of engines that nobody asked for: within the window they are told as a reason, and as a crash loop
when they are many. More than 32 tell nothing more."""

VOLUME_WAITING = "waiting"
"""An engine's word for: I/O waits for replicas."""

EXIT_FENCED = 3
"""An engine's exit code, PROTOCOL.md: a replica or the state store knows a newer epoch."""

STOP_GRACE_S = 5.0
DETACH_TIMEOUT_S = 60.0
"""A clean detach flushes all replicas: seconds on a slow disk. Past this it is asked again."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is told; written as JSON. PROTOCOL.md, "What the daemon hands to a process"."""

    volume_id: str
    name: str
    size_bytes: int
    epoch: int
    engine_id: str
    node: str
    replicas: list[dict[str, Any]]
    record: dict[str, Any]
    grant: dict[str, Any] = field(default_factory=dict)  # optional keys: control.trust.grant_keys


class EngineSlot:
    """``changed`` is called whenever what ``seen`` answers may have changed."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        programs: Programs,
        *,
        tasks: asyncio.TaskGroup,
        changed: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        self.name = name
        self.unused_epoch = 0
        self.fenced_epoch = 0  # of the last engine that ended because a newer epoch is known somewhere
        self.last_end = ""
        self._layout = layout
        self._programs = programs
        self._tasks = tasks
        self._changed = changed
        self._now = now
        self._sockets: dict[str, socket.socket] = {}
        self._process: Process | None = None
        self._link: Link | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._epoch: int | None = None
        self._size_bytes: int | None = None
        self._answering = False
        self._greeted = False  # it has answered since it was started
        self._started_at_s = 0.0
        self._silent_from_s = 0.0  # of one that does not answer: since it was found so, or started
        self._quick_deaths = 0
        self._start_not_before_s = 0.0
        self._ending_on_purpose = False
        self._last_how = ""
        self._last_code: int | None = None
        self._ends_at_s: deque[float] = deque(maxlen=ENDS_KEPT_MAX)  # not on purpose
        self._log = structlog.get_logger().bind(volume=name)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def link(self) -> Link | None:
        """None unless a process lives."""
        return self._link

    @property
    def wait_s(self) -> float:
        return max(0.0, self._start_not_before_s - self._now())

    @property
    def has_sockets(self) -> bool:
        return bool(self._sockets) or self._layout.nbd_socket(self.name).exists()

    def seen(self) -> EngineSeen | None:
        if self._process is None:
            return None
        silent_s = 0.0 if self._answering else self._now() - self._silent_from_s
        return EngineSeen(self._epoch, self._size_bytes, self._answering, silent_s)

    def _arguments(self) -> list[str]:
        config = os.fspath(self._layout.engine_config(self.name))
        return [*self._programs.engine, "--config", config]

    def find_living(self, among: Sequence[Running] | None = None) -> None:
        """Adopt the engine an earlier daemon started, if one lives. Of several, the youngest: the
        others hold older epochs, are fenced and end by themselves; we end them now."""
        pids = find(self._arguments()[1:], among)
        for pid in pids:
            process = adopt(pid, self._arguments()[1:])
            if process is None:
                continue
            if pid != pids[-1]:
                process.signal(signal.SIGKILL)
                continue
            self._log.info("engine adopted", pid=pid)
            self._hold(process, epoch=None, size_bytes=None)

    def predecessors_ended(self) -> bool:
        """Whether no process that an earlier grant was given to can answer anybody any more: they run on
        this machine, under these arguments, or not at all."""
        return self._process is None and not find(self._arguments()[1:])

    def start(self, config: EngineConfig, *, tcp_port: int) -> None:
        """Start the engine of ``config.epoch``. The caller wrote the grant before. Raises OSError or
        BadRequest; then nothing was started."""
        assert self._process is None and config.epoch == self.unused_epoch
        self._layout.volume_dir(self.name).mkdir(parents=True, exist_ok=True)
        self._open_sockets(tcp_port)
        fds = {kind: sock.fileno() for kind, sock in self._sockets.items()}
        content = {
            "volume_id": config.volume_id,
            "name": config.name,
            "size_bytes": config.size_bytes,
            "epoch": config.epoch,
            "engine_id": config.engine_id,
            "node": config.node,
            "replicas": config.replicas,
            "record": config.record,
            **config.grant,
            "key_file": os.fspath(self._layout.key),
            "daemon_socket": os.fspath(self._layout.engine_rpc_socket),
            "control_socket": os.fspath(self._layout.engine_socket(self.name)),
            "listeners": [{"fd": fd, "kind": kind} for kind, fd in fds.items()],
        }
        write_private(self._layout.engine_config(self.name), json.dumps(content, indent=1).encode())
        process = spawn(
            self._arguments(),
            log=self._layout.engine_log(self.name),
            cwd=self._layout.volume_dir(self.name),
            pass_fds=list(fds.values()),
        )
        self.unused_epoch = 0
        self._log.info("engine started", pid=process.pid, epoch=config.epoch)
        self._hold(process, epoch=config.epoch, size_bytes=config.size_bytes)

    def _open_sockets(self, tcp_port: int) -> None:
        if "unix" not in self._sockets:
            path = self._layout.nbd_socket(self.name)
            if path.parent == self._layout.runtime:
                prepare_runtime_dir(path.parent)
            self._sockets["unix"] = listen_unix(path)
        if tcp_port and "tcp" not in self._sockets:
            self._sockets["tcp"] = listen_tcp(tcp_port)

    def _hold(self, process: Process, *, epoch: int | None, size_bytes: int | None) -> None:
        self._process = process
        self._epoch = epoch
        self._size_bytes = size_bytes
        self._answering = self._greeted = False
        self._started_at_s = self._silent_from_s = self._now()
        self._ending_on_purpose = False
        self._link = engine_link(os.fspath(self._layout.engine_socket(self.name)), volume=self.name)
        self._ask_until_it_answers(process, self._link)
        process.on_exit(lambda: self._ended(process))
        self._changed()

    def _ask_until_it_answers(self, process: Process, link: Link) -> None:
        self._greeting = self._tasks.create_task(
            self._greet(process, link), name=f"greet engine of {self.name}"
        )

    async def _greet(self, process: Process, link: Link) -> None:
        """Ask until it answers. Ends with the process (``_ended`` cancels it)."""
        interval_s = HELLO_INTERVAL_S
        while process.alive:
            try:
                status = await link.call("engine.status", timeout_s=PING_TIMEOUT_S)
            except StorageError:
                status = None
            epoch = status.get("epoch") if isinstance(status, dict) else None
            # The path may still lead to the engine before this one, which is about to end.
            if isinstance(status, dict) and isinstance(epoch, int) and self._epoch in (None, epoch):
                self._epoch = epoch
                self._size_bytes = int(status.get("size_bytes") or 0) or None
                self.heard()
                self._changed()
                return
            if self._answering and self._now() - self._silent_from_s >= SILENT_AFTER_S:
                self._answering = False
                self._changed()
            await asyncio.sleep(interval_s)
            interval_s = min(interval_s * 1.2, HELLO_INTERVAL_MAX_S)

    def heard(self) -> None:
        self._answering, self._greeted, self.last_end = True, True, ""
        self._silent_from_s = self._now()

    def missed(self) -> None:
        """It did not answer a question. A busy machine does that too, so it is asked until it answers: only
        one that still does not after ``SILENT_AFTER_S`` counts as silent."""
        process, link = self._process, self._link
        if process is None or link is None or self._greeting is None or not self._greeting.done():
            return
        self._silent_from_s = self._now()
        self._ask_until_it_answers(process, link)

    def grown(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def _ended(self, process: Process) -> None:
        assert process is self._process
        lived_s = self._now() - self._started_at_s
        code = process.exit_code
        if code == EXIT_FENCED and self._epoch is not None:
            self.fenced_epoch = self._epoch
        how = (
            "ended"
            if code is None
            else f"ended with exit code {code}"
            if code >= 0
            else f"was killed by signal {-code}"
        )
        if self._ending_on_purpose or code == 0:
            self.last_end, self._quick_deaths = "", 0
        else:
            self._last_how, self._last_code = how.removeprefix("was ").removeprefix("ended with "), code
            self._ends_at_s.append(self._now())
            self.last_end = f"{how} after {lived_s:.1f} s; its log: {self._layout.engine_log(self.name)}"
            quick = lived_s < QUICK_DEATH_S or not self._greeted
            self._quick_deaths = self._quick_deaths + 1 if quick else 0
        # The first death in a row is answered at once, whatever its age.
        if self._quick_deaths > 1:
            wait_s = min(RESTART_WAIT_MAX_S, RESTART_WAIT_FIRST_S * 2 ** (self._quick_deaths - 2))
            self._start_not_before_s = self._now() + wait_s
        self._log.info("engine ended", pid=process.pid, how=how, lived_s=round(lived_s, 1))
        self._let_go()
        self._changed()

    def _let_go(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()
        if self._link is not None:
            link = self._link
            self._tasks.create_task(link.close(), name=f"close link {link.peer}")
        self._process, self._link, self._greeting = None, None, None
        self._epoch, self._size_bytes = None, None
        self._answering = self._greeted = False

    async def detach(self) -> None:
        """Flush, clean, end. Returns when the process has ended. Raises what the engine answers, and
        NotEnoughReplicas while I/O waits: then nothing can be flushed, and nothing was asked for."""
        process, link = self._process, self._link
        if process is None or link is None:
            return
        await self._refuse_if_waiting(link)
        self._ending_on_purpose = True
        try:
            await link.call("engine.detach", timeout_s=DETACH_TIMEOUT_S)
        except StorageError:
            if process.alive:
                raise
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await process.ended.wait()
        except TimeoutError:
            self._log.warning("engine lingered after a detach", pid=process.pid)
            await process.kill()

    def process_facts(self, *, answers: bool) -> ProcessFacts:
        log = self._layout.engine_log(self.name)
        now_s, pid = self._now(), self.pid
        recent = [at_s for at_s in self._ends_at_s if now_s - at_s <= ENDS_WINDOW_S]
        return ProcessFacts(
            pid=pid,
            answers=answers,
            starting=pid is not None and not self._greeted,
            standing=not answers and pid is not None and is_standing(pid),
            how=self._last_how if recent else "",
            ended_ago_s=now_s - recent[-1] if recent else 0.0,
            exit_code=self._last_code if recent else None,
            ends=len(recent),
            last_words=last_words(log) if recent and self._last_code not in (None, 0) else "",
            log=os.fspath(log),
        )

    async def _refuse_if_waiting(self, link: Link) -> None:
        try:
            said = await link.call("engine.status", timeout_s=PING_TIMEOUT_S)
        except StorageError:
            return  # engine.detach meets the same, and says why
        if isinstance(said, dict) and said.get("state") == VOLUME_WAITING:
            # For a moment, while a loss is recorded, it names nobody; then those that are gone.
            waits = [w for w in said.get("waiting_for") or () if isinstance(w, dict)]
            gone = [
                r for r in said.get("replicas") or () if isinstance(r, dict) and r.get("state") != "in_sync"
            ]
            missing = [str(w["replica"]) for w in waits if "replica" in w]
            missing = missing if waits else [str(replica.get("id")) for replica in gone]
            raise NotEnoughReplicas(volume=self.name, missing=missing)

    async def end(self) -> None:
        """SIGTERM, then SIGKILL. Nothing acknowledged is lost: an engine has no volatile cache."""
        if self._process is not None:
            self._ending_on_purpose = True
            # One that is stopped by a signal gets no SIGTERM: clients would wait the grace out for nothing.
            grace_s = 0.0 if is_standing(self._process.pid) else STOP_GRACE_S
            await self._process.stop(grace_s=grace_s)

    def remove_sockets(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._layout.nbd_socket(self.name).unlink(missing_ok=True)
        self._layout.engine_socket(self.name).unlink(missing_ok=True)
        self._layout.engine_config(self.name).unlink(missing_ok=True)

    def remove_files(self) -> None:
        assert self._process is None
        shutil.rmtree(self._layout.volume_dir(self.name), ignore_errors=True)

    def forget(self) -> None:
        """The daemon ends; the engine goes on."""
        if self._process is not None:
            self._process.forget()
        for sock in self._sockets.values():
            sock.close()
        if self._greeting is not None:
            self._greeting.cancel()

    async def close_link(self) -> None:
        if self._link is not None:
            await self._link.close()
