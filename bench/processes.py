"""What processes use, read from /proc, and how the processes of a comparison are started and ended.

Owns every process it starts until ``end()`` returns. Does not own what they serve (``systems.py``).

Promises: processor time counts children that have already ended; nothing is left running when the caller
ends in an orderly way, and children of ours die with us when it does not (the parent-death signal).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

END_TIMEOUT_S = 10.0
"""From SIGTERM to SIGKILL: a server that writes back a gigabyte may need a few seconds."""

POLL_INTERVAL_S = 0.02
"""Between looks at a process that is starting or ending: short beside starting an interpreter."""


class ProcessFailed(Exception):
    """A process of a system under test ended early or could not be started."""


@dataclass(frozen=True, slots=True)
class MachineTime:
    """Processor seconds of the whole machine since boot."""

    busy_s: float
    stolen_s: float


def machine_time() -> MachineTime:
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(field) for field in stat.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    return MachineTime((user + nice + system + irq + softirq) / TICKS_PER_S, steal / TICKS_PER_S)


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (field 3 of proc(5) is index 0); None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def cpu_s(pid: int) -> float:
    """Processor seconds of a process, its ended threads and its ended, waited-for children. 0 when gone."""
    fields = _stat_fields(pid)
    return sum(map(int, fields[11:15])) / TICKS_PER_S if fields else 0.0


def thread_cpu_ns(pids: Iterable[int]) -> dict[int, int]:
    """Processor time of every living thread, in the scheduler's own grain: for what does next to nothing."""
    used = {}
    for pid in pids:
        try:
            for task in os.scandir(f"/proc/{pid}/task"):
                used[int(task.name)] = int(
                    Path(task.path, "schedstat").read_text(encoding="ascii").split()[0]
                )
        except (FileNotFoundError, ProcessLookupError):
            continue
    return used


def fine_cpu_s(before_ns: Mapping[int, int], after_ns: Mapping[int, int]) -> float:
    """Between two looks at ``thread_cpu_ns``; what a thread did that ended in between is not seen."""
    return sum(ns - before_ns.get(thread, 0) for thread, ns in after_ns.items()) / 1e9


def rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_alive(pid: int) -> bool:
    fields = _stat_fields(pid)
    return fields is not None and fields[0] not in "ZX"


def _children_by_parent() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat_fields(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    return children


def with_descendants(pids_by_role: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Add to each role the descendants of its processes that no role names."""
    children = _children_by_parent()
    named = {pid for pids in pids_by_role.values() for pid in pids}
    found: dict[str, list[int]] = {}
    for role, pids in pids_by_role.items():
        todo, seen = list(pids), []
        while todo:
            pid = todo.pop()
            seen.append(pid)
            todo += [child for child in children.get(pid, []) if child not in named]
        found[role] = seen
    return found


def cpu_s_by_role(pids_by_role: Mapping[str, Iterable[int]]) -> dict[str, float]:
    return {role: sum(map(cpu_s, pids)) for role, pids in pids_by_role.items()}


def rss_bytes_by_role(pids_by_role: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """Resident bytes of the largest process of each role: goals are per process."""
    return {role: max(map(rss_bytes, pids), default=0) for role, pids in pids_by_role.items()}


def spawn(
    args: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own (Ctrl-C is ours to handle) that dies with us."""
    setpriv = shutil.which("setpriv")
    prefix = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
    with log.open("ab") as out:
        return subprocess.Popen(
            [*prefix, *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=dict(env) if env is not None else None,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask, then kill; always waits."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, *, timeout_s: float = 10.0
) -> None:
    """Raises ProcessFailed with the end of the log when the process ends first or takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = log.read_text(errors="replace")[-500:].strip() if log.exists() else ""
            raise ProcessFailed(f"{log.stem} did not start: {tail}")
        time.sleep(POLL_INTERVAL_S)


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the unix socket exists."""
    wait_until(path.is_socket, process, log)
