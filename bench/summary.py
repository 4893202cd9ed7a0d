"""Medians, spreads and ratios of records. Pure: records in, numbers out.

Owns how rounds become one number. A ratio is formed inside each round, between measurements of the same
minute, and the median is taken over rounds: that cancels the drift of a machine that others use too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.record import RunRecord
from bench.workloads import WORKLOADS

IDLE = "idle"
"""The workload of records in which nothing was asked of the system."""

Metric = Callable[[RunRecord], float | None]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))


# ---- metrics ----


def iops(record: RunRecord) -> float | None:
    return record.result.iops if record.result else None


def mib_per_s(record: RunRecord) -> float | None:
    return record.result.bytes_per_s / 2**20 if record.result else None


def latency_us_p50(record: RunRecord) -> float | None:
    return record.result.latency_us_p50 if record.result else None


def latency_us_p99(record: RunRecord) -> float | None:
    return record.result.latency_us_p99 if record.result else None


def tail(record: RunRecord) -> float | None:
    """p99 as a multiple of the median."""
    return record.result.latency_us_p99 / record.result.latency_us_p50 if record.result else None


def us_per_step(record: RunRecord) -> float | None:
    """Time from one request's begin to the next one's, flush included: for one request at a time."""
    assert WORKLOADS[record.workload].depth == 1
    return 1e6 / record.result.iops if record.result else None


def cpu_us_per_op(record: RunRecord) -> float | None:
    """Processor time of all processes of the system for one request; fio's is not in it."""
    return record.use.cpu_s * 1e6 / record.result.samples if record.result and record.use else None


def core_percent(record: RunRecord) -> float | None:
    return 100 * record.use.cpu_s / record.use.seconds if record.use else None


def other_cores(record: RunRecord) -> float | None:
    """Processors that neither the system nor fio used: how much the measurement was disturbed."""
    return record.use.other_cpu_s / record.use.seconds if record.use else None


def rss_mib(role: str) -> Metric:
    def of(record: RunRecord) -> float | None:
        held = record.use.rss_bytes_by_role.get(role) if record.use else None
        return held / 2**20 if held else None

    return of


# ---- over rounds ----


def select(records: Iterable[RunRecord], *, system: str, workload: str) -> list[RunRecord]:
    return [r for r in records if r.system == system and r.workload == workload]


def over_rounds(records: Iterable[RunRecord], metric: Metric) -> Spread | None:
    return spread(value for record in records if (value := metric(record)) is not None)


def ratio(
    records: Sequence[RunRecord], metric: Metric, *, workload: str, system: str, reference: str
) -> Spread | None:
    """``system`` / ``reference``, formed round by round; rounds in which either failed do not count."""
    below = {r.round_index: metric(r) for r in select(records, system=reference, workload=workload)}
    ratios = []
    for record in select(records, system=system, workload=workload):
        value, base = metric(record), below.get(record.round_index)
        if value is not None and base:
            ratios.append(value / base)
    return spread(ratios)


def failures(records: Iterable[RunRecord]) -> list[str]:
    return [record.failure for record in records if record.failure is not None]
