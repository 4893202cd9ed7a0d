"""The checker agrees with a brute-force search, and decodes only blocks that one write produced."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.linearizability import (
    BLOCK_BYTES,
    INITIAL,
    Kind,
    Operation,
    TornBlock,
    Value,
    assert_linearizable,
    check,
    decode_tag,
    encode_tag,
)


def write(sequence: int, start: float, end: float | None) -> Operation:
    return Operation(Kind.WRITE, 0, Value(1, sequence), start, end)


def read(sequence: int | None, start: float, end: float) -> Operation:
    value = INITIAL if sequence is None else Value(1, sequence)
    return Operation(Kind.READ, 0, value, start, end)


def linearizable_by_search(history: Sequence[Operation]) -> bool:
    """Try every order that respects real time, and every choice of which unknown writes happened."""

    def search(rest: frozenset[Operation], value: Value | None) -> bool:
        if all(op.end is None for op in rest):
            return True  # what is left never happened
        for op in rest:
            # ``op`` may come next only if nothing else had ended before it began.
            if any(other.end is not None and other.end < op.start for other in rest if other is not op):
                continue
            if op.kind is Kind.WRITE:
                if search(rest - {op}, op.value):
                    return True
                if op.end is None and search(rest - {op}, value):
                    return True
            elif op.value == value and search(rest - {op}, value):
                return True
        return False

    return search(frozenset(history), INITIAL)


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Small and dense: few distinct times, so that ties and overlaps are common."""
    writes = draw(st.integers(0, 4))
    times = st.integers(0, 12)
    history = []
    for sequence in range(writes):
        start = draw(times)
        end = draw(st.none() | st.integers(start, 13))
        history.append(write(sequence, start, end))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(times)
        seen = draw(st.none() | st.integers(0, max(0, writes - 1))) if writes else None
        op = read(seen, start, draw(st.integers(start, 13)))
        if op not in history:
            history.append(op)
    return history


@settings(max_examples=1000, deadline=None)
@given(histories())
@example([write(0, 0, 1), read(None, 2, 3)])
@example([write(0, 0, None), read(0, 5, 6), read(None, 7, 8)])
def test_the_checker_agrees_with_a_search_of_all_orders(history: list[Operation]) -> None:
    assert (check(history) == []) == linearizable_by_search(history)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [read(None, 0, 1)],
        [write(0, 0, 1), read(0, 2, 3)],
        [write(0, 0, 5), read(None, 1, 2), read(0, 3, 4)],
        [write(0, 0, None), read(None, 1, 2)],  # an unknown write that did not happen
        [write(0, 0, None), read(None, 1, 2), read(0, 3, 4)],  # one that did, late
        [write(0, 0, 10), write(1, 0, 10), read(1, 11, 12), read(1, 13, 14)],
        [write(0, 0, 1), write(1, 1, 2), read(0, 1, 2)],  # equal times are concurrent
    ],
)
def test_histories_that_are_fine(history: list[Operation]) -> None:
    assert_linearizable(history)


@pytest.mark.parametrize(
    "history",
    [
        [write(0, 0, 1), read(None, 2, 3)],  # a lost acknowledged write
        [write(0, 0, 1), write(1, 2, 3), read(0, 4, 5)],  # a stale read
        [write(0, 0, 9), write(1, 0, 9), read(0, 1, 2), read(1, 3, 4), read(0, 5, 6)],  # back and forth
        [write(0, 0, None), read(0, 5, 6), read(None, 7, 8)],  # an unacknowledged write decided twice
        [read(0, 0, 1), write(0, 2, 3)],  # from the future
        [read(3, 0, 1)],  # from nowhere
        [write(0, 0, None), write(1, 2, 3), read(1, 4, 5), read(0, 6, 7), read(1, 8, 9)],
    ],
)
def test_histories_that_are_not(history: list[Operation]) -> None:
    with pytest.raises(AssertionError, match="not linearizable"):
        assert_linearizable(history)


def test_a_violation_names_the_block_and_its_witnesses() -> None:
    lost = write(0, 0, 1)
    (violation,) = check([lost, read(None, 2, 3), Operation(Kind.READ, 5, INITIAL, 0, 1)])
    assert violation.block == 0
    assert lost in violation.operations
    assert "write 1:0 [0, 1]" in str(violation)


def test_a_long_sound_history_is_checked_in_one_pass() -> None:
    # A real register: operations take effect in one order, with overlapping intervals around it.
    chance = random.Random(7)
    history, current, now = [], INITIAL, 0.0
    for sequence in range(50_000):
        now += 1
        start, end = now - chance.random() * 3, now + chance.random() * 3
        if chance.random() < 0.5:
            current = Value(1, sequence)
            history.append(Operation(Kind.WRITE, 0, current, start, end))
        else:
            history.append(Operation(Kind.READ, 0, current, start, end))
    assert_linearizable(history)


@given(block=st.integers(0, 2**40), writer=st.integers(0, 2**32), sequence=st.integers(0, 2**40))
def test_a_tag_comes_back(block: int, writer: int, sequence: int) -> None:
    raw = encode_tag(block, Value(writer, sequence))
    assert len(raw) == BLOCK_BYTES
    assert decode_tag(block, raw) == Value(writer, sequence)


def test_a_block_of_zeroes_is_the_initial_value() -> None:
    assert decode_tag(3, bytes(BLOCK_BYTES)) is INITIAL


@given(cut=st.integers(1, BLOCK_BYTES - 1))
def test_a_mix_of_two_writes_is_torn(cut: int) -> None:
    older, newer = encode_tag(1, Value(1, 0xFFFF)), encode_tag(1, Value(2, 0x10000))
    mixed = older[:cut] + newer[cut:]
    if mixed not in (older, newer):  # a cut inside equal bytes of the first or last tag mixes nothing
        with pytest.raises(TornBlock):
            decode_tag(1, mixed)


@pytest.mark.parametrize("raw", [encode_tag(2, Value(1, 1)), b"x" * BLOCK_BYTES, b"", bytes(512)])
def test_what_was_never_written_to_this_block_is_torn(raw: bytes) -> None:
    with pytest.raises(TornBlock):
        decode_tag(1, raw)
