"""Processes that outlive the daemon: start them, find them again, watch them end.

Owns spawning and the identity of a process: pid, start time and the exact arguments, never a name.
A process is watched by pidfd, which works for processes that are not our children: those that an
earlier daemon started. Does not own when to start or stop what (``control/supervisor.py``,
``control/engines.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_BYTES_MAX = 4 * 1024 * 1024
"""A log file past this is renamed to ``.1`` when its process starts: at most twice this per process."""

ARGV_BYTES_MAX = 64 * 1024
"""Of /proc/PID/cmdline: ours are below 1 KiB, others do not matter."""

LAST_WORDS_BYTES_MAX = 4096
LAST_WORDS_CHARS_MAX = 300
"""Of a log, for a sentence that people read."""

SMALL_MEMORY = {
    # glibc keeps one arena per thread and core otherwise; each costs megabytes that stay.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class Programs:
    """What is run, without its arguments. Tests hand in stand-ins."""

    # -P: a folder named "engine" in somebody's working directory must not be imported.
    replica_server: tuple[str, ...] = (sys.executable, "-P", "-m", "replica.main")
    engine: tuple[str, ...] = (sys.executable, "-P", "-m", "engine.main")


class Process:
    """One running process. ``on_exit`` is called once, from the event loop, when it has ended."""

    def __init__(self, pid: int, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self.exit_code: int | None = None  # None: running, or not our child
        self._pidfd = pidfd
        self._child = child
        self._on_exit: list[Callable[[], None]] = []
        asyncio.get_running_loop().add_reader(pidfd, self._readable)

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def on_exit(self, call: Callable[[], None]) -> None:
        assert self.alive
        self._on_exit.append(call)

    def signal(self, number: signal.Signals) -> None:
        """Nothing happens if it has ended: the pidfd can never mean another process."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, *, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``. Returns when it has ended."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.ended.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.ended.wait()

    def forget(self) -> None:
        """Stop watching; the process goes on. For a daemon that ends before its processes."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            if self._child is not None:
                self._child.returncode = 0  # silences Popen's warning: it shall outlive us

    def _readable(self) -> None:
        if self._child is not None:
            self.exit_code = self._child.wait()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.ended.set()
        for call in self._on_exit:
            call()


def spawn(argv: Sequence[str], *, log: Path, cwd: Path, pass_fds: Sequence[int] = ()) -> Process:
    """Start in its own session, with its output in ``log``. Raises OSError."""
    rotate(log)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=cwd,
            env={**os.environ, **SMALL_MEMORY},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    finally:
        os.close(out)
    return Process(child.pid, os.pidfd_open(child.pid), child)


def rotate(log: Path) -> None:
    try:
        if log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_name(log.name + ".1"))
    except FileNotFoundError:
        pass


def is_standing(pid: int) -> bool:
    """Stopped by a signal or a debugger: it lives, and does nothing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def last_words(log: Path) -> str:
    """The last line of a log, without its date: why a process ended, if it said so."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS_BYTES_MAX))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    said = next((line for line in reversed(lines) if line), "")
    return said.rpartition(" ERROR ")[2][:LAST_WORDS_CHARS_MAX]


@dataclass(frozen=True, slots=True)
class Running:
    """A process of ours as /proc showed it at one moment."""

    pid: int
    started_ticks: int  # since boot; a pid is used again, this pair is not
    arguments: tuple[bytes, ...]  # after the interpreter


def running() -> list[Running]:
    """All processes of this user, oldest first. For many questions at once: one look at /proc."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            pid = int(entry.name)
            arguments, started_ticks = _arguments_of(pid), _started_ticks(pid)
            if arguments is not None and started_ticks is not None:
                found.append(Running(pid, started_ticks, tuple(arguments)))
    return sorted(found, key=lambda process: process.started_ticks)


def find(arguments: Sequence[str], among: Sequence[Running] | None = None) -> list[int]:
    """Pids of our own processes whose arguments (after the interpreter) begin with these; oldest
    first. For processes that a daemon started and could not remember: it was killed."""
    wanted = tuple(os.fsencode(argument) for argument in arguments)
    looked_at = running() if among is None else among
    return [process.pid for process in looked_at if process.arguments[: len(wanted)] == wanted]


def adopt(pid: int, arguments: Sequence[str]) -> Process | None:
    """Watch a process found by ``find``; None if it has ended meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    # Only now is the pid pinned: what it names cannot change any more. Look again.
    if not matches(pid, arguments):
        os.close(pidfd)
        return None
    return Process(pid, pidfd, None)


def matches(pid: int, arguments: Sequence[str]) -> bool:
    found = _arguments_of(pid)
    return found is not None and found[: len(arguments)] == [os.fsencode(a) for a in arguments]


def _arguments_of(pid: int) -> list[bytes] | None:
    """None for a process of another user, or one that is gone."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return None
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(ARGV_BYTES_MAX).split(b"\0")[1:]
    except OSError:
        return None


def _started_ticks(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, so count from the last parenthesis.
            return int(file.read().rsplit(b")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None
