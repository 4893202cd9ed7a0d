"""What a measurement leaves behind: lines of JSON that carry what is needed to doubt them.

Owns the form of the files in ``bench/out/``: one ``<run>.jsonl`` per run, one record a line, written as the
run goes, so that an interrupted run keeps what it measured. Does not own what the numbers mean
(``summary.py``, ``goals.py``).

Promises: a measurement that failed is a record with its reason, not a missing line.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.workloads import FioResult

FORMAT_VERSION = 1
"""Grows when the meaning of a field changes; an older file is refused, not misread."""


class BadRecord(Exception):
    """A line of a run's file is not a record of this version."""


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    file_system: str
    fio: str
    qemu: str


@dataclass(frozen=True, slots=True)
class Use:
    """What the machine's processors did during a measurement, and what processes held after it."""

    seconds: float
    cpu_s_by_role: dict[str, float]
    """All processes of the system with their children, by role."""
    client_cpu_s: float
    """fio's own; not the system's."""
    other_cpu_s: float
    """Everything else: kernel threads, and whoever else used this machine. High means: doubt it."""
    stolen_s: float
    """Taken by the hypervisor."""
    rss_bytes_by_role: dict[str, int]
    """The largest process of each role."""

    @property
    def cpu_s(self) -> float:
        return sum(self.cpu_s_by_role.values())


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One system under one workload in one round.

    Comparable only with records of the same run: absolute figures drift from hour to hour.
    """

    run: str
    commit: str
    machine: Machine
    seed: int
    system: str
    copies: int
    workload: str
    round_index: int
    order_index: int
    """Which system of the round this was: the order rotates."""
    started_at: str
    size_bytes: int
    failure: str | None
    result: FioResult | None
    """None when it failed, and for the workload ``idle``."""
    use: Use | None
    ceiling_iops: float | None
    """The ceiling program's, same workload, same round."""

    def __post_init__(self) -> None:
        assert self.failure is None or self.result is None, "a failed measurement has no result"

    @property
    def efficiency(self) -> float | None:
        """Fraction of what moving the bytes alone reached. This, not ``iops``, is the number to watch."""
        return self.result.iops / self.ceiling_iops if self.result and self.ceiling_iops else None


@dataclass(frozen=True, slots=True)
class GaugeRecord:
    """A measurement that is not a fio run: a stall in milliseconds, a share in percent."""

    run: str
    commit: str
    machine: Machine
    system: str
    name: str
    unit: str
    method: str
    values: tuple[float, ...]
    failure: str | None


Record = RunRecord | GaugeRecord
_KINDS: dict[str, type[Record]] = {"run": RunRecord, "gauge": GaugeRecord}


def to_line(record: Record) -> str:
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    return json.dumps({"version": FORMAT_VERSION, "kind": kind, **asdict(record)}, separators=(",", ":"))


def from_line(line: str) -> Record:
    """Raises BadRecord."""
    from pydantic import TypeAdapter, ValidationError

    try:
        fields = json.loads(line)
        if fields.pop("version") != FORMAT_VERSION:
            raise BadRecord(f"a record of another version than {FORMAT_VERSION}")
        adapter: TypeAdapter[Any] = TypeAdapter(_KINDS[fields.pop("kind")])
        record: Record = adapter.validate_python(fields)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise BadRecord(f"not a record: {type(error).__name__}: {error}") from error
    return record


def append(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_line(record) + "\n" for record in records)


def load(path: Path) -> list[Record]:
    """Raises BadRecord with the line's number."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(from_line(line))
        except BadRecord as error:
            raise BadRecord(f"{path.name}, line {number}: {error}") from error
    return records


def runs_in(out: Path) -> Iterator[Path]:
    """Files of runs, newest first (their names begin with the time)."""
    return iter(sorted(out.glob("*.jsonl"), reverse=True))


# ---- where it was measured ----


def describe_machine(directory: Path) -> Machine:
    return Machine(
        cpu=_first_after("/proc/cpuinfo", "model name"),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        file_system=_file_system_of(directory),
        fio=_first_line(["fio", "--version"]),
        qemu=_first_line(["qemu-nbd", "--version"]),
    )


def describe_commit(repository: Path) -> str:
    """The commit, with ``+changes`` when the tree differs from it; ``unknown`` outside a checkout."""
    commit = _first_line(["git", "-C", str(repository), "rev-parse", "--short=12", "HEAD"])
    if commit == "unknown":
        return commit
    changes = _first_line(["git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no"])
    return commit if changes == "unknown" else f"{commit}+changes"


def _first_line(args: list[str]) -> str:
    try:
        lines = subprocess.run(args, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return lines[0].strip() if lines else "unknown"


def _first_after(path: str, key: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _file_system_of(directory: Path) -> str:
    """Type and device of the mount that holds ``directory``."""
    best, found = "", "unknown"
    resolved = str(directory.resolve())
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        device, mount_point, kind = line.split()[:3]
        inside = mount_point == "/" or (resolved + "/").startswith(mount_point + "/")
        if inside and len(mount_point) >= len(best):
            best, found = mount_point, f"{kind} on {device}"
    return found
