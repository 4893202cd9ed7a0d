"""Invented records for tests of tables and judgements. They say so: their commit is ``synthetic``."""

from __future__ import annotations

from bench.record import GaugeRecord, Machine, RunRecord, Use
from bench.workloads import FioResult

COMMIT = "synthetic"
RUN = "synthetic-run"

MACHINE = Machine(
    cpu="an invented processor",
    cores=2,
    memory_bytes=24 * 2**30,
    kernel="6.0-invented",
    file_system="ext4 on /dev/invented",
    fio="fio-0",
    qemu="qemu-nbd 0",
)


def result(iops: float, *, latency_us_p50: float = 100.0, latency_us_p99: float = 300.0) -> FioResult:
    return FioResult(
        iops=iops,
        bytes_per_s=iops * 4096,
        samples=int(iops),
        latency_us_mean=latency_us_p50,
        latency_us_p50=latency_us_p50,
        latency_us_p99=latency_us_p99,
        latency_us_p999=latency_us_p99,
        latency_us_max=latency_us_p99,
        flush_us_p50=None,
    )


def use(cpu_s: float = 0.5, rss_mib: float = 10.0, other_cpu_s: float = 0.2) -> Use:
    return Use(
        seconds=1.0,
        cpu_s_by_role={"engine": cpu_s / 2, "replica": cpu_s / 2},
        client_cpu_s=0.1,
        other_cpu_s=other_cpu_s,
        stolen_s=0.0,
        rss_bytes_by_role={"engine": int(rss_mib * 2**20), "replica": int(rss_mib * 2**20)},
    )


def record(
    system: str,
    workload: str,
    iops: float | None,
    *,
    round_index: int = 0,
    failure: str | None = None,
    used: Use | None = None,
    found: FioResult | None = None,
) -> RunRecord:
    return RunRecord(
        run=RUN,
        commit=COMMIT,
        machine=MACHINE,
        seed=1 + round_index,
        system=system,
        copies=3,
        workload=workload,
        round_index=round_index,
        order_index=0,
        started_at="2000-01-01T00:00:00+00:00",
        size_bytes=2**30,
        failure=failure,
        result=found or (result(iops) if iops is not None else None),
        use=None if failure else used or use(),
        ceiling_iops=None,
    )


def gauge(name: str, *values: float, failure: str | None = None) -> GaugeRecord:
    return GaugeRecord(
        run=RUN,
        commit=COMMIT,
        machine=MACHINE,
        system="dolmen",
        name=name,
        unit="ms",
        method="invented",
        values=values,
        failure=failure,
    )
