"""Every goal gets a verdict, and none is reached by leaving something out."""

from __future__ import annotations

from bench.goals import GOALS, SUBJECT, Goal, Judgement, Verdict, judge
from bench.record import Record
from bench.systems import SYSTEMS
from bench.workloads import WORKLOADS
from tests.bench.synthetic import gauge, record, use

W = "randwrite-qd32"


def verdict_of(records: list[Record], text: str, wanted: str) -> Judgement:
    return next(j for j in judge(records) if j.text == text and wanted in j.wanted)


def against_ceiling(records: list[Record]) -> Judgement:
    return verdict_of(records, "random writes, QD32", "ceiling")


def test_goals_name_systems_and_workloads_that_exist() -> None:
    assert SUBJECT in SYSTEMS
    for goal in GOALS:
        if isinstance(goal, Goal):
            assert goal.workload in WORKLOADS or goal.workload == "idle"
            assert goal.reference is None or goal.reference in SYSTEMS


def test_an_empty_run_reaches_nothing_and_names_every_goal() -> None:
    judgements = judge([])
    assert len(judgements) == len(GOALS)
    assert {j.verdict for j in judgements} == {Verdict.NOT_MEASURED}
    assert all(j.reason for j in judgements)


def test_a_goal_is_reached_at_its_limit_and_missed_below() -> None:
    at = against_ceiling([record("dolmen", W, 900.0), record("ceiling", W, 1000.0)])
    below = against_ceiling([record("dolmen", W, 899.0), record("ceiling", W, 1000.0)])
    assert (at.verdict, below.verdict) == (Verdict.REACHED, Verdict.MISSED)


def test_one_failed_round_of_ours_fails_the_goal_however_fast_the_others_were() -> None:
    judgement = against_ceiling(
        [
            record("dolmen", W, 5000.0),
            record("ceiling", W, 1000.0),
            record("dolmen", W, None, round_index=1, failure="fio saw error 5"),
            record("ceiling", W, 1000.0, round_index=1),
        ]
    )
    assert judgement.verdict is Verdict.FAILED
    assert "fio saw error 5" in judgement.reason


def test_a_goal_whose_reference_failed_is_failed_and_not_unmeasured() -> None:
    judgement = against_ceiling([record("dolmen", W, 900.0), record("ceiling", W, None, failure="no gcc")])
    assert judgement.verdict is Verdict.FAILED
    assert judgement.found is None


def test_idle_and_memory_are_judged_without_a_reference() -> None:
    records: list[Record] = [record("dolmen", "idle", None, used=use(cpu_s=0.004, rss_mib=31.0))]
    assert verdict_of(records, "idle, all processes", "").verdict is Verdict.REACHED
    assert verdict_of(records, "memory of the engine", "").verdict is Verdict.MISSED
    assert verdict_of(records, "memory of a replica server", "").verdict is Verdict.REACHED


def test_stalls_are_judged_by_median_and_by_worst() -> None:
    records: list[Record] = [gauge("stall-replica-killed", 10.0, 20.0, 300.0)]
    assert verdict_of(records, "client stall, replica killed, median", "").verdict is Verdict.REACHED
    assert verdict_of(records, "client stall, replica killed, worst", "").verdict is Verdict.MISSED


def test_a_gauge_that_broke_half_way_is_failed_though_its_values_are_good() -> None:
    records: list[Record] = [gauge("stall-replica-killed", 10.0, failure="repeat 2 of 5: a write failed")]
    judgement = verdict_of(records, "client stall, replica killed, median", "")
    assert judgement.verdict is Verdict.FAILED
    assert "a write failed" in judgement.reason
