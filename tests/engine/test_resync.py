"""The plan of what to copy next, against plain sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.limits import PULL_BATCH_REGIONS, PULL_CALLS_IN_FLIGHT_MAX, WANTED_CALLS_IN_FLIGHT_MAX
from engine.resync import PullPlan, RegionSet

regions = st.integers(0, 300)


@given(st.lists(st.tuples(st.booleans(), regions)))
def test_a_region_set_is_a_set(steps: list[tuple[bool, int]]) -> None:
    ours, plain = RegionSet(), set[int]()
    for add, region in steps:
        changed = ours.add(region) if add else ours.discard(region)
        assert changed == (region not in plain if add else region in plain)
        plain = plain | {region} if add else plain - {region}
        assert ours.count == len(plain)
    assert list(ours) == sorted(plain)
    assert ours.take_from(100, 5) == [r for r in sorted(plain) if r >= 100][:5]


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
    first = [plan.next_call() for _ in range(PULL_CALLS_IN_FLIGHT_MAX)]
    assert [len(call) for call in first] == [PULL_BATCH_REGIONS] * PULL_CALLS_IN_FLIGHT_MAX
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
    assert len(calls) == WANTED_CALLS_IN_FLIGHT_MAX + PULL_CALLS_IN_FLIGHT_MAX


def test_more_regions_may_be_added_while_some_are_under_way() -> None:
    plan = PullPlan([1, 2])
    call = plan.next_call()
    plan.add([2, 3])
    assert plan.total_count == 3
    plan.on_done(call, 10)
    assert plan.done_count == 2 and plan.remaining() == (3,)
