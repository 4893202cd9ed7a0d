"""The workloads: what fio's nbd engine is asked to do, and what its answer means.

Owns the list of workloads, fio's command line and the reading of its JSON. Does not own when
or against what they run (``runner.py``).

Promises: a run in which fio saw any error is an error here, never a number.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIO_START_TIMEOUT_S = 30.0
"""Beyond the asked run time: connecting, and the last requests of a system that is being killed."""


class WorkloadFailed(Exception):
    """fio could not run, saw an error or answered something else than its result."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One way of asking for blocks. ``depth`` is per job; every job has its own connection."""

    name: str
    text: str
    rw: str
    block_bytes: int
    depth: int
    jobs: int = 1
    flush_each: bool = False
    half_load_of: str | None = None
    """Run at half the rate that the system under test reached in this other workload."""

    @property
    def writes(self) -> bool:
        return "write" in self.rw


_4K = 4096
_1M = 1024 * 1024

WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("randwrite-qd1", "random 4 KiB writes, one at a time", "randwrite", _4K, 1),
        Workload("randwrite-qd32", "random 4 KiB writes, 32 at once", "randwrite", _4K, 32),
        Workload("randwrite-4xqd32", "random 4 KiB writes, 4 clients of 32", "randwrite", _4K, 32, jobs=4),
        Workload("randread-qd1", "random 4 KiB reads, one at a time", "randread", _4K, 1),
        Workload("randread-qd32", "random 4 KiB reads, 32 at once", "randread", _4K, 32),
        Workload("randread-4xqd32", "random 4 KiB reads, 4 clients of 32", "randread", _4K, 32, jobs=4),
        Workload("write-1m-qd8", "1 MiB writes in a row, 8 at once", "write", _1M, 8),
        Workload("read-1m-qd8", "1 MiB reads in a row, 8 at once", "read", _1M, 8),
        Workload(
            "randwrite-qd1-flush",
            "random 4 KiB writes, a flush after each",
            "randwrite",
            _4K,
            1,
            flush_each=True,
        ),
        Workload(
            "randwrite-half-load",
            "random 4 KiB writes at half of the system's own maximum",
            "randwrite",
            _4K,
            32,
            half_load_of="randwrite-qd32",
        ),
    )
}

PREFILL = Workload("prefill", "fill the volume once", "write", _1M, 8)
"""The same for every system, in size of request too: the page cache keeps the shape of the first write."""


@dataclass(frozen=True, slots=True)
class FioResult:
    iops: float
    bytes_per_s: float
    samples: int
    latency_us_mean: float
    latency_us_p50: float
    latency_us_p99: float
    latency_us_p999: float
    latency_us_max: float
    flush_us_p50: float | None


def fio_args(
    workload: Workload,
    *,
    uri: str,
    size_bytes: int,
    seed: int,
    seconds: float | None,
    iops_max: int | None = None,
) -> list[str]:
    """The command line. ``seconds=None``: once over the whole volume."""
    args = [
        "fio",
        f"--name={workload.name}",
        "--thread",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={workload.rw}",
        f"--bs={workload.block_bytes}",
        f"--iodepth={workload.depth}",
        f"--numjobs={workload.jobs}",
        f"--size={size_bytes}",
        f"--randseed={seed}",
        "--norandommap",
        "--refill_buffers=0",
        "--group_reporting",
        "--clat_percentiles=0",
        "--lat_percentiles=1",
        "--percentile_list=50:99:99.9",
        "--output-format=json",
        "--eta=never",
    ]
    if seconds is not None:
        args += ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    if workload.flush_each:
        args.append("--fsync=1")
    if iops_max is not None:
        args.append(f"--rate_iops={iops_max}")
    return args


def parse_fio(output: str, workload: Workload) -> FioResult:
    """fio prints lines of the nbd engine before its JSON. Raises WorkloadFailed."""
    start = output.find("{\n")
    if start < 0:
        raise WorkloadFailed(f"fio printed no result: {output.strip()[-300:]}")
    try:
        document, _ = json.JSONDecoder().raw_decode(output, start)
        jobs = document["jobs"]
        if len(jobs) != 1:
            raise WorkloadFailed(f"fio reported {len(jobs)} groups instead of one")
        if jobs[0]["error"] != 0:
            raise WorkloadFailed(f"fio saw error {jobs[0]['error']}")
        return _result(jobs[0], "write" if workload.writes else "read")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise WorkloadFailed(f"fio's result is not as expected: {type(error).__name__} {error}") from error


def _result(job: dict[str, Any], direction: str) -> FioResult:
    side = job[direction]
    if side["total_ios"] <= 0:
        raise WorkloadFailed("fio finished no request")
    latency = side["lat_ns"]
    percentile = latency["percentile"]
    flush = job.get("sync", {}).get("lat_ns", {}).get("percentile")
    return FioResult(
        iops=float(side["iops"]),
        bytes_per_s=float(side["bw_bytes"]),
        samples=int(side["total_ios"]),
        latency_us_mean=latency["mean"] / 1e3,
        latency_us_p50=percentile["50.000000"] / 1e3,
        latency_us_p99=percentile["99.000000"] / 1e3,
        latency_us_p999=percentile["99.900000"] / 1e3,
        latency_us_max=latency["max"] / 1e3,
        flush_us_p50=flush["50.000000"] / 1e3 if flush and job["sync"]["total_ios"] else None,
    )


def run_fio(args: list[str], workload: Workload, *, timeout_s: float) -> FioResult:
    """Run fio to its end. Raises WorkloadFailed; never leaves fio running."""
    with subprocess.Popen(
        args,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output = process.communicate(timeout=timeout_s)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            raise WorkloadFailed(f"fio did not end within {timeout_s:.0f} s") from None
        except BaseException:
            process.send_signal(signal.SIGKILL)
            raise
    if process.returncode != 0:
        raise WorkloadFailed(f"fio ended with {process.returncode}: {output.strip()[-300:]}")
    return parse_fio(output, workload)
