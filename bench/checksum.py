"""What checksums cost: the share of processor time that Dolmen's processes spend in xxh3.

Owns the sampling with perf and the reading of its report. Does not own the load (``workloads.py``).

Promises: an upper bound of what throughput would gain without checksums, since the processors are what
runs out. If no sample carries an xxh3 symbol (a stripped or fully inlined build), that is a failure and not
a cost of zero.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from bench.processes import ProcessFailed
from bench.record import GaugeRecord
from bench.runner import Session, wait_until_quiet
from bench.systems import Dolmen
from bench.workloads import FIO_START_TIMEOUT_S, WORKLOADS, WorkloadFailed, fio_args, parse_fio

NAME = "checksum-cost"
WORKLOAD = WORKLOADS["randwrite-qd32"]

SAMPLE_HZ = 997
"""Enough for 1 % of 1 % in a few seconds, and not in step with any timer."""

_LINE = re.compile(r"^\s*(\d+(?:\.\d+)?)%\s+\[[.k]\]\s+(.+?)\s*$")


def share_percent(report: str) -> float:
    """Of the lines of ``perf report --sort symbol``. Raises ProcessFailed when there is no xxh3 in it."""
    found = [(float(match[1]), match[2]) for line in report.splitlines() if (match := _LINE.match(line))]
    ours = [percent for percent, symbol in found if "xxh3" in symbol.lower()]
    if not ours:
        why = "stripped, or replaced while it ran"
        raise ProcessFailed(f"perf saw no xxh3 symbol among {len(found)}: the build is {why}")
    return sum(ours)


def measure_checksum_cost(running: Session) -> GaugeRecord:
    values: tuple[float, ...] = ()
    failure = running.broken.get(Dolmen.name)
    if failure is None:
        try:
            values = (_sample(running),)
        except (ProcessFailed, WorkloadFailed, OSError) as error:
            failure = str(error)
    return GaugeRecord(
        run=running.run,
        commit=running.commit,
        machine=running.machine,
        system=Dolmen.name,
        name=NAME,
        unit="%",
        method=f"perf, cpu-clock at {SAMPLE_HZ} Hz, engine and replica servers under {WORKLOAD.name}",
        values=values,
        failure=failure,
    )


def _sample(running: Session) -> float:
    if shutil.which("perf") is None:
        raise ProcessFailed("perf is missing: apt-get install linux-perf")
    plan, system = running.plan, running.systems[Dolmen.name]
    wait_until_quiet(running)
    by_role = running.pids_of(Dolmen.name)
    pids = ",".join(str(pid) for role in ("engine", "replica") for pid in by_role[role])
    data = Path(system.directory, "perf.data")
    args = fio_args(
        WORKLOAD, uri=system.uri, size_bytes=plan.size_bytes, seed=plan.seed, seconds=plan.seconds
    )
    perf = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(SAMPLE_HZ), "-p", pids, "-o", str(data)]
    # perf runs fio as its command, and so ends with it.
    try:
        done = subprocess.run(
            [*perf, "--", *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=plan.seconds + FIO_START_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise ProcessFailed(f"perf ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        parse_fio(done.stdout, WORKLOAD)
        report = ["perf", "report", "-q", "--stdio", "-g", "none", "--sort", "symbol", "-i", str(data)]
        text = subprocess.run(report, capture_output=True, text=True, timeout=60.0, check=False).stdout
    except subprocess.TimeoutExpired as error:
        raise ProcessFailed(f"perf did not end within {error.timeout:.0f} s") from error
    finally:
        data.unlink(missing_ok=True)
    return share_percent(text)
