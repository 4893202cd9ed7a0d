"""The goals as data, and the judgement of a run against them.

Owns the numbers we hold ourselves to. Does not own how they are measured. A goal that is reached gets
raised here; a goal that this run could not measure says so, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from bench import summary
from bench.record import GaugeRecord, Record, RunRecord
from bench.summary import IDLE, Metric, Spread

SUBJECT = "dolmen"
"""The system that the goals are about."""


class Bound(Enum):
    AT_LEAST = "at least"
    AT_MOST = "at most"


class Verdict(Enum):
    REACHED = "reached"
    MISSED = "missed"
    FAILED = "failed"  # it was tried, and the measurement failed
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """``metric`` of the subject under ``workload``, over the same of ``reference`` if there is one."""

    text: str
    workload: str
    metric: Metric
    bound: Bound
    limit: float
    unit: str = ""
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class GaugeGoal:
    """The median or the worst of a gauge's values."""

    text: str
    gauge: str
    limit: float
    unit: str
    worst: bool
    bound: Bound = Bound.AT_MOST


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A goal for which this benchmark has no means here."""

    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Judgement:
    text: str
    wanted: str
    found: Spread | None
    unit: str
    verdict: Verdict
    reason: str = ""


def _ratio(text: str, workload: str, metric: Metric, bound: Bound, limits: dict[str, float]) -> list[Goal]:
    return [Goal(text, workload, metric, bound, limit, "×", reference) for reference, limit in limits.items()]


_MORE, _LESS = Bound.AT_LEAST, Bound.AT_MOST
_WRITE_LIMITS = {"ceiling": 0.9, "qemu-nbd": 1.2, "quorum": 10.0}

GOALS: Sequence[Goal | GaugeGoal | Unmeasured] = (
    *_ratio("random writes, QD32", "randwrite-qd32", summary.iops, _MORE, _WRITE_LIMITS),
    *_ratio("random writes, 4 × QD32", "randwrite-4xqd32", summary.iops, _MORE, _WRITE_LIMITS),
    Unmeasured("random writes, QD32, 10 × Longhorn and 4 × Vitastor", "neither is installed beside us"),
    *_ratio(
        "random write latency, QD1",
        "randwrite-qd1",
        summary.latency_us_p50,
        _LESS,
        {"ceiling": 1.2, "qemu-nbd": 1.5},
    ),
    *_ratio("random reads, QD1", "randread-qd1", summary.iops, _MORE, {"ceiling": 0.9, "qemu-nbd": 1.0}),
    *_ratio("random reads, QD32", "randread-qd32", summary.iops, _MORE, {"ceiling": 0.9, "qemu-nbd": 1.0}),
    *_ratio("1 MiB writes, QD8", "write-1m-qd8", summary.mib_per_s, _MORE, {"ceiling": 0.9}),
    *_ratio("1 MiB reads, QD8", "read-1m-qd8", summary.mib_per_s, _MORE, {"qemu-nbd": 1.0}),
    *_ratio(
        "random write and flush, QD1", "randwrite-qd1-flush", summary.us_per_step, _LESS, {"qemu-nbd": 2.0}
    ),
    Unmeasured("random write and flush, 2 × Vitastor and 5 × Ceph", "neither is installed beside us"),
    GaugeGoal("checksums' share of processor time", "checksum-cost", 8.0, "%", worst=False),
    Goal("p99 over median at half load", "randwrite-half-load", summary.tail, _LESS, 5.0, "×"),
    *_ratio(
        "processor time per random write", "randwrite-qd32", summary.cpu_us_per_op, _LESS, {"ceiling": 1.2}
    ),
    Goal("idle, all processes", IDLE, summary.core_percent, _LESS, 0.5, "% of a core"),
    Goal("memory of the engine", IDLE, summary.rss_mib("engine"), _LESS, 30.0, "MiB"),
    # 30 MiB for the server and 8 MiB for its one replica.
    Goal("memory of a replica server", IDLE, summary.rss_mib("replica"), _LESS, 38.0, "MiB"),
    GaugeGoal("client stall, replica killed, median", "stall-replica-killed", 50.0, "ms", worst=False),
    GaugeGoal("client stall, replica killed, worst", "stall-replica-killed", 250.0, "ms", worst=True),
    GaugeGoal("client stall, replica stopped", "stall-replica-stopped", 1500.0, "ms", worst=True),
    GaugeGoal("client stall, replica silently gone", "stall-replica-vanished", 1500.0, "ms", worst=True),
    GaugeGoal("first I/O after the engine was killed", "stall-engine-killed", 2000.0, "ms", worst=True),
    Unmeasured("100 snapshots deep", "there are no snapshots yet"),
)


def judge(records: Sequence[Record]) -> list[Judgement]:
    """Every goal, in the order of GOALS; none is left out."""
    runs = [record for record in records if isinstance(record, RunRecord)]
    gauges = {record.name: record for record in records if isinstance(record, GaugeRecord)}
    judgements = []
    for goal in GOALS:
        match goal:
            case Goal():
                judgements.append(_judge_runs(goal, runs))
            case GaugeGoal():
                judgements.append(_judge_gauge(goal, gauges.get(goal.gauge)))
            case Unmeasured():
                judgements.append(Judgement(goal.text, "", None, "", Verdict.NOT_MEASURED, goal.reason))
    return judgements


def _verdict(value: float, bound: Bound, limit: float) -> Verdict:
    reached = value >= limit if bound is Bound.AT_LEAST else value <= limit
    return Verdict.REACHED if reached else Verdict.MISSED


def _wanted(bound: Bound, limit: float, unit: str, reference: str | None = None) -> str:
    sign = "≥" if bound is Bound.AT_LEAST else "≤"
    return f"{sign} {limit:g} {unit} {reference or ''}".strip()


def _judge_runs(goal: Goal, runs: Sequence[RunRecord]) -> Judgement:
    wanted = _wanted(goal.bound, goal.limit, goal.unit, goal.reference)
    mine = summary.select(runs, system=SUBJECT, workload=goal.workload)
    if goal.reference is None:
        found = summary.over_rounds(mine, goal.metric)
        needed = [(SUBJECT, mine)]
    else:
        found = summary.ratio(
            runs, goal.metric, workload=goal.workload, system=SUBJECT, reference=goal.reference
        )
        theirs = summary.select(runs, system=goal.reference, workload=goal.workload)
        needed = [(SUBJECT, mine), (goal.reference, theirs)]
    failed = [f"{system}: {failure}" for system, some in needed for failure in summary.failures(some)]
    reason = f"{len(failed)} failed, {failed[0]}" if failed else ""
    if found is None:
        absent = ", ".join(system for system, some in needed if not some)
        verdict = Verdict.FAILED if failed else Verdict.NOT_MEASURED
        return Judgement(goal.text, wanted, None, goal.unit, verdict, reason or f"not in this run: {absent}")
    # A round that failed cannot count for us, however the others went.
    ours_failed = bool(summary.failures(mine))
    verdict = Verdict.FAILED if ours_failed else _verdict(found.median, goal.bound, goal.limit)
    return Judgement(goal.text, wanted, found, goal.unit, verdict, reason)


def _judge_gauge(goal: GaugeGoal, gauge: GaugeRecord | None) -> Judgement:
    wanted = _wanted(goal.bound, goal.limit, goal.unit)
    found = summary.spread(gauge.values) if gauge else None
    reason = (gauge.failure or "") if gauge else "not in this run"
    if found is None:
        verdict = Verdict.FAILED if gauge else Verdict.NOT_MEASURED
        return Judgement(goal.text, wanted, None, goal.unit, verdict, reason)
    value = found.high if goal.worst else found.median
    # A gauge of which some repeats failed cannot be called reached.
    verdict = Verdict.FAILED if reason else _verdict(value, goal.bound, goal.limit)
    return Judgement(goal.text, wanted, found, goal.unit, verdict, reason)
