"""Rounds become one number by medians, and ratios are formed inside a round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import summary
from tests.bench.synthetic import record, result, use

W = "randwrite-qd32"


def test_median_low_and_high_of_the_rounds() -> None:
    found = summary.spread([3.0, 1.0, 2.0, 10.0])
    assert found == summary.Spread(median=2.5, low=1.0, high=10.0, count=4)
    assert summary.spread([]) is None


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9))
def test_a_median_lies_between_the_lowest_and_the_highest_round(values: list[float]) -> None:
    found = summary.spread(values)
    assert found is not None
    assert found.low <= found.median <= found.high
    assert found.count == len(values)


def test_a_ratio_is_not_disturbed_by_a_machine_that_slows_down_between_rounds() -> None:
    speed_of_machine = [1.0, 0.5, 0.1]
    records = [
        record(system, W, iops * speed, round_index=index)
        for index, speed in enumerate(speed_of_machine)
        for system, iops in (("dolmen", 900.0), ("ceiling", 1000.0))
    ]
    found = summary.ratio(records, summary.iops, workload=W, system="dolmen", reference="ceiling")
    assert found is not None
    assert found.low == found.high == pytest.approx(0.9)


def test_a_round_in_which_one_side_failed_gives_no_ratio() -> None:
    records = [
        record("dolmen", W, 500.0, round_index=0),
        record("ceiling", W, None, round_index=0, failure="it broke"),
        record("dolmen", W, 900.0, round_index=1),
        record("ceiling", W, 1000.0, round_index=1),
    ]
    found = summary.ratio(records, summary.iops, workload=W, system="dolmen", reference="ceiling")
    assert found is not None
    assert found.median == pytest.approx(0.9)
    assert found.count == 1
    assert summary.failures(records) == ["it broke"]


def test_processor_time_is_divided_by_the_requests_that_were_answered() -> None:
    measured = record("dolmen", W, 1000.0, used=use(cpu_s=0.05))
    assert summary.cpu_us_per_op(measured) == pytest.approx(50.0)


def test_tail_is_the_99th_percentile_over_the_median() -> None:
    found = result(1.0, latency_us_p50=100.0, latency_us_p99=450.0)
    assert summary.tail(record("dolmen", "randwrite-half-load", None, found=found)) == pytest.approx(4.5)


def test_a_failed_measurement_has_no_metric_at_all() -> None:
    failed = record("dolmen", W, None, failure="no")
    for metric in (
        summary.iops,
        summary.mib_per_s,
        summary.tail,
        summary.cpu_us_per_op,
        summary.core_percent,
    ):
        assert metric(failed) is None
