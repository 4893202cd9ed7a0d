"""Repairs by order: each ends, few are under way, and what became of each is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from engine.rpc_api import answer
from engine.scrub import BLOCKS_PER_CALL_MAX, REPAIRS_AT_ONCE_MAX, RepairReport, Repairs
from protocol.errors import BadRequest


def run(scenario: Callable[[], Any]) -> Any:
    return asyncio.run(scenario())


def test_each_block_ends_as_the_data_plane_says() -> None:
    async def scenario() -> RepairReport:
        def order(slot: int, block: int) -> None:
            loop = asyncio.get_running_loop()
            if block == 9:
                loop.call_soon(repairs.note_unreadable, block)
            elif block == 11:
                raise BadRequest(reason="full")
            else:
                loop.call_soon(repairs.note_repaired, slot, block)

        repairs = Repairs(order)
        return await repairs.run(2, [7, 9, 11, 7])

    report = run(scenario)
    assert (report.repaired, report.unreadable, report.left) == ([7], [9], [11])
    assert "full" in report.reason


def test_one_that_is_never_answered_is_left_after_its_time() -> None:
    async def scenario() -> RepairReport:
        repairs = Repairs(lambda slot, block: None, timeout_s=0.01)
        report = await repairs.run(0, [1, 2])
        repairs.note_repaired(0, 1)  # too late: nobody waits
        return report

    report = run(scenario)
    assert report.left == [1, 2] and "no answer" in report.reason


def test_news_of_another_slot_or_block_ends_nothing() -> None:
    async def scenario() -> RepairReport:
        def order(slot: int, block: int) -> None:
            repairs.note_repaired(slot + 1, block)
            repairs.note_unreadable(block + 1)

        repairs = Repairs(order, timeout_s=0.01)
        return await repairs.run(0, [5])

    assert run(scenario).left == [5]


def test_no_more_than_a_few_are_under_way() -> None:
    async def scenario() -> int:
        under_way: set[int] = set()
        most = 0

        def done(slot: int, block: int) -> None:
            under_way.discard(block)
            repairs.note_repaired(slot, block)

        def order(slot: int, block: int) -> None:
            nonlocal most
            under_way.add(block)
            most = max(most, len(under_way))
            asyncio.get_running_loop().call_later(0.001, done, slot, block)

        repairs = Repairs(order)
        assert len((await repairs.run(0, range(100))).repaired) == 100
        return most

    assert run(scenario) == REPAIRS_AT_ONCE_MAX


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"replica": "r0"},
        {"replica": 1, "blocks": [1]},
        {"replica": "r0", "blocks": "1"},
        {"replica": "r0", "blocks": [True]},
        {"replica": "r0", "blocks": ["1"]},
        {"replica": "r0", "blocks": [0] * (BLOCKS_PER_CALL_MAX + 1)},
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"engine\.repair takes"):
        run(lambda: answer(None, "engine.repair", args))  # type: ignore[arg-type]
