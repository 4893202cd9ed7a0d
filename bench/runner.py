"""Runs a comparison: rounds in which the systems take turns, and a record for every measurement.

Owns the order of things, and everything that a comparison leaves on the machine: all systems, their files
and sockets are gone when ``compare`` returns or raises, Ctrl-C included. Does not own what a system or a
workload is (``systems.py``, ``workloads.py``) or what the numbers mean (``summary.py``, ``goals.py``).

Promises: one record for each system, workload and round that was planned, failed ones included. Before each
measurement what others wrote is on disk and the systems are quiet, so that none pays for its neighbour.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from bench import processes, record
from bench.processes import ProcessFailed
from bench.record import GaugeRecord, Machine, RunRecord, Use
from bench.summary import IDLE
from bench.systems import SYSTEMS, Dolmen, System, make_system
from bench.workloads import (
    FIO_START_TIMEOUT_S,
    PREFILL,
    WORKLOADS,
    FioResult,
    Workload,
    WorkloadFailed,
    fio_args,
    run_fio,
)

QUIET_CORES = 0.03
"""All systems together use less than this before the next measurement begins: one timer tick in 0.3 s."""

QUIET_WINDOW_S = 0.25
QUIET_TIMEOUT_S = 8.0
"""A system may clean up for a few seconds after load (Dolmen clears dirty marks after 3 s). One that is never
quiet is measured as it is: the record shows the others' processor time."""

PREFILL_TIMEOUT_S = 600.0
"""2 GiB at the slowest system's 20 MiB/s, with room."""

FREE_SPACE_FACTOR = 1.25
"""Of the data files' size must be free: block maps, logs, and not filling somebody's disk."""

DATA_PREFIX = "data-"


class NotPossible(Exception):
    """The comparison cannot run here; ``next_step`` says what to do."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(message)
        self.next_step = next_step


@dataclass(frozen=True, slots=True)
class Plan:
    systems: tuple[str, ...]
    workloads: tuple[str, ...]
    rounds: int
    seconds: float
    warmup_s: float
    idle_s: float
    size_bytes: int
    seed: int
    out: Path
    cache: Path
    """The compiled ceiling program, and while it runs the data files."""
    repository: Path

    @property
    def steps(self) -> int:
        """Measurements, for a progress bar."""
        return len(self.systems) * (1 + len(self.workloads) * self.rounds + (1 if self.idle_s else 0))


Progress = Callable[[str, int], None]
"""Called with what happens next and how many steps are done."""


@dataclass(slots=True)
class Session:
    """What holds for the whole comparison."""

    plan: Plan
    run: str
    machine: Machine
    commit: str
    systems: dict[str, System]
    broken: dict[str, str] = field(default_factory=dict)
    """Systems that did not start, and why: all their measurements fail with it."""
    pids: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    records: list[RunRecord] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.plan.out / f"{self.run}.jsonl"

    def pids_of(self, name: str) -> dict[str, list[int]]:
        """Asked again only when one is gone: asking Dolmen starts an interpreter."""
        known = self.pids.get(name)
        if known is None or not all(processes.is_alive(pid) for pids in known.values() for pid in pids):
            known = self.pids[name] = self.systems[name].pids_by_role()
        return processes.with_descendants(known)

    def new_record(self, name: str, workload: str, round_index: int, order_index: int) -> RunRecord:
        return RunRecord(
            run=self.run,
            commit=self.commit,
            machine=self.machine,
            seed=self.plan.seed + round_index,
            system=name,
            copies=SYSTEMS[name].copies,
            workload=workload,
            round_index=round_index,
            order_index=order_index,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            size_bytes=self.plan.size_bytes,
            failure=None,
            result=None,
            use=None,
            ceiling_iops=None,
        )


Extra = Callable[[Session], GaugeRecord]
"""A measurement after the rounds, while the systems still run."""


def compare(plan: Plan, progress: Progress, *extras: Extra) -> Path:
    """Run ``plan``, then ``extras``; returns the file of records.

    Raises NotPossible before anything was started.
    """
    with session(plan) as running:
        for name in plan.systems:
            progress(f"start and fill {name}", 0)
            start_and_fill(running, name)
        done = len(plan.systems)
        for round_index in range(plan.rounds):
            for workload_index, workload in enumerate(plan.workloads):
                cells = []
                order = rotated(plan.systems, round_index + workload_index)
                for order_index, name in enumerate(order):
                    progress(f"round {round_index + 1}/{plan.rounds}: {workload} on {name}", done)
                    cells.append(measure(running, name, WORKLOADS[workload], round_index, order_index))
                    done += 1
                keep(running, cells)
        for order_index, name in enumerate(plan.systems if plan.idle_s else ()):
            progress(f"idle: {name}", done)
            keep(running, [measure_idle(running, name, order_index)])
            done += 1
        for extra in extras:
            progress("extra measurement", done)
            record.append(running.file, [extra(running)])
        progress("stopping", done)
        return running.file


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Each system is first, second and last equally often."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def keep(running: Session, cells: list[RunRecord]) -> None:
    """Write a round's records of one workload, each with the ceiling of that minute."""
    ceiling = next((c.result.iops for c in cells if c.system == "ceiling" and c.result), None)
    finished = [replace(cell, ceiling_iops=ceiling) for cell in cells]
    running.records += finished
    record.append(running.file, finished)


# ---- the life of a comparison ----


@contextmanager
def session(plan: Plan) -> Iterator[Session]:
    """Directories and systems (not started) of a run; all gone at the end."""
    sweep(plan.cache)
    data = plan.cache / f"{DATA_PREFIX}{os.getpid()}"
    check_possible(plan, plan.cache)
    with ExitStack() as undo:
        undo.enter_context(_signals_kept())
        undo.callback(shutil.rmtree, data, ignore_errors=True)
        data.mkdir(parents=True)
        sockets = Path(tempfile.mkdtemp(prefix="dolmen-bench-"))
        undo.callback(shutil.rmtree, sockets, ignore_errors=True)
        systems = {}
        for name in plan.systems:
            system = make_system(
                name, data=data, sockets=sockets, size_bytes=plan.size_bytes, cache=plan.cache
            )
            undo.callback(system.stop)
            systems[name] = system
        undo.enter_context(_interrupts_wait_for_the_end())
        yield Session(
            plan=plan,
            run=datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
            machine=record.describe_machine(data),
            commit=record.describe_commit(plan.repository),
            systems=systems,
        )


@contextmanager
def _signals_kept() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    was = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(numbers, was, strict=True):
                signal.signal(number, handler)


@contextmanager
def _interrupts_wait_for_the_end() -> Iterator[None]:
    """From its exit on, a further Ctrl-C is not heard: half a clean-up would leave a cluster running."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def check_possible(plan: Plan, directory: Path) -> None:
    for program, package in (("fio", "fio"), ("qemu-nbd", "qemu-utils"), ("gcc", "gcc")):
        if shutil.which(program) is None:
            raise NotPossible(f"{program} is missing", f"apt-get install {package}")
    directory.mkdir(parents=True, exist_ok=True)
    needed = int(sum(SYSTEMS[name].copies for name in plan.systems) * plan.size_bytes * FREE_SPACE_FACTOR)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NotPossible(
            f"{needed / 2**30:.1f} GiB must be free under {directory}, there are {free / 2**30:.1f}",
            "choose a smaller --size or fewer --systems, or another --dir",
        )


def sweep(cache: Path) -> None:
    """Remove what a comparison left that was killed: its cluster first, then its files."""
    for left in cache.glob(f"{DATA_PREFIX}*"):
        owner = left.name.removeprefix(DATA_PREFIX)
        if owner.isdigit() and processes.is_alive(int(owner)):
            continue
        cluster = left / Dolmen.name
        if cluster.exists():
            system = Dolmen(cluster, left, 0)
            try:
                system.command("down", "--dir", str(cluster))
            except ProcessFailed:
                pass  # nothing of it runs any more, or never did
        shutil.rmtree(left, ignore_errors=True)


def start_and_fill(running: Session, name: str) -> None:
    """Every system is filled once by the same requests, so that reads meet real blocks."""
    system = running.systems[name]
    try:
        system.start()
        args = fio_args(
            PREFILL, uri=system.uri, size_bytes=system.size_bytes, seed=running.plan.seed, seconds=None
        )
        run_fio(args, PREFILL, timeout_s=PREFILL_TIMEOUT_S)
    except (ProcessFailed, WorkloadFailed, OSError) as error:
        running.broken[name] = f"did not start: {error}"


# ---- one measurement ----


@dataclass(frozen=True, slots=True)
class _Meter:
    """Processor time at one moment."""

    at_s: float
    by_role: dict[str, float]
    client_s: float
    machine: processes.MachineTime


def _read_meter(pids: dict[str, list[int]]) -> _Meter:
    client = resource.getrusage(resource.RUSAGE_CHILDREN)
    return _Meter(
        time.monotonic(),
        processes.cpu_s_by_role(pids),
        client.ru_utime + client.ru_stime,
        processes.machine_time(),
    )


def _use_between(before: _Meter, after: _Meter, rss_bytes_by_role: dict[str, int]) -> Use:
    by_role = {role: after.by_role[role] - before.by_role[role] for role in before.by_role}
    client_s = after.client_s - before.client_s
    busy_s = after.machine.busy_s - before.machine.busy_s
    return Use(
        seconds=after.at_s - before.at_s,
        cpu_s_by_role=by_role,
        client_cpu_s=client_s,
        other_cpu_s=max(0.0, busy_s - client_s - sum(by_role.values())),
        stolen_s=after.machine.stolen_s - before.machine.stolen_s,
        rss_bytes_by_role=rss_bytes_by_role,
    )


def measure(running: Session, name: str, workload: Workload, round_index: int, order_index: int) -> RunRecord:
    blank = running.new_record(name, workload.name, round_index, order_index)
    if name in running.broken:
        return replace(blank, failure=running.broken[name])
    try:
        result, use = _load(running, name, workload, blank.seed)
    except (ProcessFailed, WorkloadFailed, OSError) as error:
        return replace(blank, failure=str(error))
    return replace(blank, result=result, use=use)


def _load(running: Session, name: str, workload: Workload, seed: int) -> tuple[FioResult, Use]:
    plan, system = running.plan, running.systems[name]
    limit = _half_of_maximum(running, name, workload)

    def run(seconds: float, seed: int) -> FioResult:
        args = fio_args(
            workload,
            uri=system.uri,
            size_bytes=plan.size_bytes,
            seed=seed,
            seconds=seconds,
            iops_max=limit,
        )
        return run_fio(args, workload, timeout_s=seconds + FIO_START_TIMEOUT_S)

    wait_until_quiet(running)
    if plan.warmup_s:
        run(plan.warmup_s, seed + 1_000_000)
    pids = running.pids_of(name)
    before = _read_meter(pids)
    result = run(plan.seconds, seed)
    after = _read_meter(pids)
    gone = [role for role, some in pids.items() for pid in some if not processes.is_alive(pid)]
    if gone:
        raise ProcessFailed(f"a process ended during the measurement: {', '.join(gone)}")
    return result, _use_between(before, after, processes.rss_bytes_by_role(pids))


def _half_of_maximum(running: Session, name: str, workload: Workload) -> int | None:
    """The rate for a workload at half load, from this run's rounds so far."""
    if workload.half_load_of is None:
        return None
    reached = [
        r.result.iops
        for r in running.records
        if r.system == name and r.workload == workload.half_load_of and r.result
    ]
    if not reached:
        raise WorkloadFailed(f"no result of {workload.half_load_of} to take half of")
    return max(1, int(statistics.median(reached) / 2))


def measure_idle(running: Session, name: str, order_index: int) -> RunRecord:
    """Nothing is asked. Threads' own counters are read, whose grain is a nanosecond, not a tick."""
    blank = running.new_record(name, IDLE, 0, order_index)
    if name in running.broken:
        return replace(blank, failure=running.broken[name])
    try:
        wait_until_quiet(running)
        pids = running.pids_of(name)
        before, fine_before = _read_meter(pids), _thread_cpu_ns(pids)
        time.sleep(running.plan.idle_s)
        after, fine_after = _read_meter(pids), _thread_cpu_ns(pids)
    except (ProcessFailed, OSError) as error:
        return replace(blank, failure=str(error))
    use = _use_between(before, after, processes.rss_bytes_by_role(pids))
    fine = {role: processes.fine_cpu_s(fine_before[role], fine_after[role]) for role in pids}
    return replace(blank, use=replace(use, cpu_s_by_role=fine))


def _thread_cpu_ns(pids: dict[str, list[int]]) -> dict[str, dict[int, int]]:
    return {role: processes.thread_cpu_ns(some) for role, some in pids.items()}


def wait_until_quiet(running: Session) -> None:
    """Write back what is dirty, then wait until no system has work left over."""
    os.sync()
    pids = list(_living_pids(running))
    deadline_s = time.monotonic() + QUIET_TIMEOUT_S
    while time.monotonic() < deadline_s:
        before_ns = processes.thread_cpu_ns(pids)
        time.sleep(QUIET_WINDOW_S)
        used_s = processes.fine_cpu_s(before_ns, processes.thread_cpu_ns(pids))
        if used_s < QUIET_CORES * QUIET_WINDOW_S:
            return


def _living_pids(running: Session) -> Iterator[int]:
    for name in running.systems:
        if name in running.broken:
            continue
        try:
            by_role = running.pids_of(name)
        except ProcessFailed:
            continue  # its own measurements will say so
        for pids in by_role.values():
            yield from pids
