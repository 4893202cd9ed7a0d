"""The plan of what to copy next, against plain sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.limits import WANTED_CALLS_IN_FLIGHT_MAX
from engine.pace import BATCH_REGIONS_FIRST, CALLS_UNLIMITED, PullPace
from engine.resync import PullPlan

regions = st.integers(0, 300)


@given(st.sets(regions, min_size=1), st.randoms(use_true_random=False))
def test_every_region_is_pulled_once_however_often_calls_fail(wanted: set[int], random: object) -> None:
    plan = PullPlan(wanted)
    flying: list[tuple[int, ...]] = []
    done: list[int] = []
    failures = 0
    for _ in range(10_000):
        if plan.done:
            break
        while call := plan.next_call():
            flying.append(call)
        plan.check_invariants()
        call = flying.pop(random.randrange(len(flying)))  # type: ignore[attr-defined]
        if failures < 50 and random.random() < 0.5:  # type: ignore[attr-defined]
            failures += 1
            plan.on_failed(call)
        else:
            plan.on_done(call, 1)
            done += call
    assert sorted(done) == sorted(wanted)
    assert plan.done_count == plan.total_count == len(wanted)


def test_a_region_that_a_request_waits_for_goes_first_and_alone() -> None:
    plan = PullPlan(range(100))
    first = [plan.next_call() for _ in range(CALLS_UNLIMITED)]
    assert [len(call) for call in first] == [BATCH_REGIONS_FIRST] * CALLS_UNLIMITED
    assert plan.next_call() == ()  # the background has its share
    plan.want(70)
    plan.want(3)  # on its way already
    assert plan.next_call() == (70,)
    assert plan.next_call() == ()


def test_waiting_requests_have_a_limit_of_their_own() -> None:
    plan = PullPlan(range(100))
    for region in range(50, 90):
        plan.want(region)
    calls = []
    while call := plan.next_call():
        calls.append(call)
    assert sum(len(call) == 1 for call in calls) == WANTED_CALLS_IN_FLIGHT_MAX
    assert len(calls) == WANTED_CALLS_IN_FLIGHT_MAX + CALLS_UNLIMITED


def test_more_regions_may_be_added_while_some_are_under_way() -> None:
    plan = PullPlan([1, 2])
    call = plan.next_call()
    plan.add([2, 3])
    assert plan.total_count == 3
    plan.on_done(call, 10)
    assert plan.done_count == 2 and plan.remaining() == (3,)


def test_a_slower_pace_means_smaller_and_fewer_calls() -> None:
    plan = PullPlan(range(100))
    pace = PullPace(rate_bytes_s=4 << 20, batch_regions=1, calls_max=1)
    assert plan.next_call(pace) == (0,)
    assert plan.next_call(pace) == ()
    plan.want(50)
    assert plan.next_call(pace) == (50,), "a request that waits is not held back"


def test_of_a_batch_that_came_incomplete_each_region_is_pulled_alone() -> None:
    plan = PullPlan(range(4))
    plan.on_incomplete(plan.next_call(), 1, 100)
    assert all(plan.refused_by(region) == frozenset() for region in range(4)), "which one is not known"
    for region in range(4):
        call = plan.next_call()
        assert call == (region,)
        if region == 2:
            plan.on_incomplete(call, 1, 0)
        else:
            plan.on_done(call, 1)
    assert plan.refused_by(2) == {1} and plan.remaining() == (2,)
    call = plan.next_call()
    assert call == (2,)
    plan.on_done(call, 1, blocks_damaged=3)
    assert plan.done and plan.blocks_damaged == 3 and plan.bytes_copied == 104
