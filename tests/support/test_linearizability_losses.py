"""Power loss in the checker: it accepts whatever a search of all orders can explain, and refuses what no
loss can."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.linearizability import (
    INITIAL,
    Flush,
    Kind,
    Operation,
    Value,
    check,
    check_with_losses,
)


def write(sequence: int, start: float, end: float | None, *, durable: bool = False) -> Operation:
    return Operation(Kind.WRITE, 0, Value(1, sequence), start, end, durable)


def read(sequence: int | None, start: float, end: float) -> Operation:
    value = INITIAL if sequence is None else Value(1, sequence)
    return Operation(Kind.READ, 0, value, start, end)


def explained(history: Sequence[Operation], flushes: Sequence[Flush], losses: Sequence[float]) -> bool:
    """A register, and what it may show after a loss: its value at the last flush, or any it had since. A
    flush and a durable write take effect at a moment of their interval, a loss at its time."""
    items: list[Operation | Flush | float] = [*history, *flushes, *losses]
    Values = frozenset[Value | None]

    def start(item: Operation | Flush | float) -> float:
        return item if isinstance(item, float) else item.start

    def end(item: Operation | Flush | float) -> float | None:
        return item if isinstance(item, float) else item.end

    def search(rest: frozenset[int], value: Value | None, since_flush: Values) -> bool:
        if all(end(items[index]) is None for index in rest):
            return True
        for index in sorted(rest):
            item = items[index]
            others = rest - {index}
            if any(
                (other_end := end(items[other])) is not None and other_end < start(item) for other in others
            ):
                continue
            if isinstance(item, float):
                if any(search(others, kept, frozenset({kept})) for kept in since_flush):
                    return True
            elif isinstance(item, Flush):
                if search(others, value, frozenset({value})):
                    return True
            elif item.kind is Kind.WRITE:
                durable = item.durable and item.end is not None
                seen = frozenset({item.value}) if durable else since_flush | {item.value}
                if search(others, item.value, seen):
                    return True
                if item.end is None and search(others, value, since_flush):
                    return True
            elif item.value == value and search(others, value, since_flush):
                return True
        return False

    return search(frozenset(range(len(items))), INITIAL, frozenset({INITIAL}))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Operation], list[Flush], list[float]]:
    writes = draw(st.integers(1, 3))
    times = st.integers(0, 12)
    history = []
    for sequence in range(writes):
        start = draw(times)
        end = draw(st.none() | st.integers(start, 13))
        history.append(write(sequence, start, end, durable=draw(st.booleans())))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(times)
        seen = draw(st.none() | st.integers(0, writes - 1))
        op = read(seen, start, draw(st.integers(start, 13)))
        if op not in history:
            history.append(op)
    flushes = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(times)
        flushes.append(Flush(start, draw(st.integers(start, 13))))
    # At moments of their own: nothing else begins or ends there.
    losses = draw(st.lists(st.sampled_from([2.5, 5.5, 8.5]), max_size=2, unique=True))
    return history, flushes, sorted(losses)


@settings(max_examples=1500, deadline=None)
@given(histories())
def test_what_a_search_can_explain_is_accepted(
    case: tuple[list[Operation], list[Flush], list[float]],
) -> None:
    history, flushes, losses = case
    if explained(history, flushes, losses):
        assert check_with_losses(history, flushes, losses) == []


@settings(max_examples=300, deadline=None)
@given(histories())
def test_without_losses_it_is_the_strict_check(
    case: tuple[list[Operation], list[Flush], list[float]],
) -> None:
    history, flushes, _ = case
    assert (check_with_losses(history, flushes, []) == []) == (check(history) == [])


LOSS = [5.0]


@pytest.mark.parametrize(
    ("history", "flushes"),
    [
        ([write(0, 0, 1), write(1, 2, 3), read(0, 6, 7)], []),  # the newest was not flushed
        ([write(0, 0, 1), write(1, 2, 3), read(None, 6, 7)], []),  # nothing was
        ([write(0, 0, 1), write(1, 2, 3), read(1, 6, 7)], [Flush(3.5, 4)]),
        ([write(0, 0, 1), write(1, 2, None), read(1, 6, 7)], [Flush(1.5, 1.7)]),  # it came late
        ([write(0, 0, 1), write(1, 2, 3), read(1, 3, 4), read(0, 6, 7), read(0, 8, 9)], []),
    ],
)
def test_what_a_power_loss_may_do(history: list[Operation], flushes: list[Flush]) -> None:
    assert check_with_losses(history, flushes, LOSS) == []


@pytest.mark.parametrize(
    ("history", "flushes", "losses", "reason"),
    [
        ([write(0, 0, 1), write(1, 2, 3), read(0, 6, 7)], [Flush(3.5, 4)], LOSS, "older than the last flush"),
        (
            [write(0, 0, 1), write(1, 2, 3, durable=True), read(0, 6, 7)],
            [],
            LOSS,
            "older than the last flush",
        ),
        ([write(0, 0, 1), read(None, 6, 7)], [Flush(2, 3)], LOSS, "older than the last flush"),
        ([write(0, 0, 1), write(1, 2, 3), read(0, 6, 7), read(1, 8, 9)], [], LOSS, "two different values"),
        ([write(0, 0, 1), read(None, 6, 7)], [], [], "strictly before and after"),
        # Decided at the first loss and flushed since: the second may not bring the other back.
        ([write(0, 0, 1), read(None, 3, 4), read(0, 8, 9)], [Flush(4.5, 5)], [2.0, 7.0], "older than"),
        # Nobody answered it, but it was seen, and flushed after that: it is as safe as an answered one.
        ([write(0, 0, 1), write(1, 2, None), read(1, 3, 4), read(0, 6, 7)], [Flush(4.2, 4.5)], LOSS, "older"),
        (
            [write(0, 0, 1), write(1, 2, None), read(1, 6, 7), read(0, 9, 10)],
            [Flush(7.2, 7.5)],
            [5.0, 8.0],
            "older",
        ),
        # What was written after the loss is as safe as ever.
        ([write(0, 0, 1), write(1, 6, 7), read(0, 8, 9)], [], LOSS, "two"),
    ],
)
def test_what_no_power_loss_can_do(
    history: list[Operation], flushes: list[Flush], losses: list[float], reason: str
) -> None:
    found = check_with_losses(history, flushes, losses)
    assert found and reason in found[0].reason
