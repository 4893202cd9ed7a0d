"""fio's answer becomes a number only when fio saw no error and finished something."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.workloads import PREFILL, WORKLOADS, WorkloadFailed, fio_args, parse_fio, run_fio

NOISE = "fio: connected to NBD server\n"


def job(**changed: Any) -> dict[str, Any]:
    side = {
        "iops": 1301.4,
        "bw_bytes": 5330522,
        "total_ios": 652,
        "lat_ns": {
            "mean": 178307.4,
            "max": 4637604,
            "percentile": {"50.000000": 108032, "99.000000": 3194880, "99.900000": 4620288},
        },
    }
    idle = {"iops": 0.0, "bw_bytes": 0, "total_ios": 0, "lat_ns": {"mean": 0.0, "max": 0}}
    return {"error": 0, "write": side, "read": idle, "sync": {"total_ios": 0, "lat_ns": {}}, **changed}


def output(*jobs: dict[str, Any]) -> str:
    return NOISE + json.dumps({"fio version": "fio-3.33", "jobs": list(jobs)}, indent=2) + "\n"


def test_nanoseconds_become_microseconds_of_the_direction_that_was_asked() -> None:
    found = parse_fio(output(job()), WORKLOADS["randwrite-qd1"])
    assert found.iops == 1301.4
    assert found.samples == 652
    assert found.latency_us_p50 == pytest.approx(108.032)
    assert found.latency_us_p99 == pytest.approx(3194.88)
    assert found.latency_us_max == pytest.approx(4637.604)
    assert found.flush_us_p50 is None


def test_flush_latency_is_reported_when_fio_flushed() -> None:
    sync = {"total_ios": 652, "lat_ns": {"percentile": {"50.000000": 419840}}}
    found = parse_fio(output(job(sync=sync)), WORKLOADS["randwrite-qd1-flush"])
    assert found.flush_us_p50 == pytest.approx(419.84)


def test_a_job_that_saw_an_error_is_a_failure_though_it_has_numbers() -> None:
    with pytest.raises(WorkloadFailed, match="error 5"):
        parse_fio(output(job(error=5)), WORKLOADS["randwrite-qd1"])


def test_a_job_that_finished_nothing_is_a_failure() -> None:
    with pytest.raises(WorkloadFailed, match="finished no request"):
        parse_fio(output(job()), WORKLOADS["randread-qd1"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        NOISE + "fio: failed to connect\n",
        NOISE + '{\n  "jobs": [',
        output(),
        output(job(), job()),
        output({"error": 0}),
        output(job(write={"total_ios": "many"})),
    ],
)
def test_anything_else_is_a_failure_and_never_a_traceback(text: str) -> None:
    with pytest.raises(WorkloadFailed):
        parse_fio(text, WORKLOADS["randwrite-qd1"])


def test_a_server_that_is_not_there_is_a_failure() -> None:
    workload = WORKLOADS["randread-qd1"]
    uri = "nbd+unix:///?socket=/nonexistent/bench.sock"
    args = fio_args(workload, uri=uri, size_bytes=2**20, seed=1, seconds=0.5)
    with pytest.raises(WorkloadFailed):
        run_fio(args, workload, timeout_s=30.0)


def test_every_workload_asks_fio_for_what_its_name_says() -> None:
    for name, workload in WORKLOADS.items():
        args = fio_args(workload, uri="nbd://x", size_bytes=2**30, seed=7, seconds=2.5)
        assert f"--name={name}" in args
        assert "--runtime=2500ms" in args
        assert "--randseed=7" in args
        assert ("--fsync=1" in args) == name.endswith("-flush")
        assert workload.half_load_of is None or workload.half_load_of in WORKLOADS
    assert not [
        arg for arg in fio_args(PREFILL, uri="", size_bytes=1, seed=1, seconds=None) if "runtime" in arg
    ]
