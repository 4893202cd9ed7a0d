"""Verification: equal, different, busy, and what it never claims."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from control.verify import LOOKS_MAX, Verification
from control.views import Verdict, VerifyResult
from protocol.errors import ProtocolViolation, Unreachable
from protocol.limits import REGION_BYTES

REPLICAS = {"r1": "node1", "r2": "node2", "r3": "node3"}
REGIONS = 20

Digest = Callable[[str, int, int, int], int]
"""(replica, first region, count, how often this replica was asked for exactly this) -> digest"""


def verify(
    digest: Digest, *, online: bool, damaged: int = 0, left_out: dict[str, Any] | None = None
) -> VerifyResult:
    asked: dict[tuple[str, int, int], int] = {}
    pauses: list[float] = []

    async def ask(replica: str, first: int, count: int) -> Any:
        key = (replica, first, count)
        asked[key] = asked.get(key, 0) + 1
        bad = damaged if replica == "r2" and first == 0 else 0
        return {
            "blocks_verified": count,
            "blocks_zero": 0,
            "damaged": list(range(bad)),
            "damaged_count": bad,
            "digest": digest(replica, first, count, asked[key]),
        }

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def run() -> VerifyResult:
        run = Verification(REPLICAS, REGIONS * REGION_BYTES - 4096, online=online, ask=ask, pause=pause)
        await run.run()
        assert run.progress.done == run.progress.total == REGIONS
        assert len(pauses) <= LOOKS_MAX
        return run.result(left_out or {})

    return asyncio.run(run())


def test_equal_replicas_are_the_same() -> None:
    result = verify(lambda r, first, count, n: first + 1, online=False)
    assert result.verdict is Verdict.SAME and result.regions_equal == REGIONS
    assert len({replica.digest for replica in result.replicas}) == 1 and result.replicas[0].digest


def covers(first: int, count: int, region: int) -> bool:
    return first <= region < first + count


def test_a_region_that_stays_different_is_named() -> None:
    result = verify(lambda r, first, count, n: int(r == "r2" and covers(first, count, 9)), online=True)
    assert result.verdict is Verdict.DIFFERENT and result.regions_different == [9]
    assert result.regions_equal == REGIONS - 1


def test_offline_nobody_writes_so_one_look_is_enough() -> None:
    result = verify(lambda r, first, count, n: int(r == "r3" and covers(first, count, 0)), online=False)
    assert result.regions_different == [0]


def test_a_region_that_was_written_during_the_first_look_is_equal_at_a_later_one() -> None:
    def digest(replica: str, first: int, count: int, n: int) -> int:
        return int(replica == "r1" and covers(first, count, 5) and (count > 1 or n == 1))

    result = verify(digest, online=True)
    assert result.verdict is Verdict.SAME and result.regions_equal == REGIONS
    assert all(replica.digest == "" for replica in result.replicas)  # slices of different moments


def test_a_region_that_is_written_all_the_time_is_said_to_be_busy_not_different() -> None:
    def digest(replica: str, first: int, count: int, n: int) -> int:
        return int(replica[1]) * 100 + n if covers(first, count, 3) else 0

    result = verify(digest, online=True)
    assert result.verdict is Verdict.INCOMPLETE and result.regions_busy == [3]
    assert result.regions_different_count == 0


def test_damage_is_a_difference_even_where_digests_agree() -> None:
    result = verify(lambda r, first, count, n: 1, online=False, damaged=3)
    assert result.verdict is Verdict.DIFFERENT
    assert {r.id: r.damaged_count for r in result.replicas} == {"r1": 0, "r2": 3, "r3": 0}


def test_a_replica_that_was_not_compared_makes_it_incomplete() -> None:
    result = verify(lambda r, first, count, n: 1, online=True, left_out={"r3": ("node3", "resyncing")})
    assert result.verdict is Verdict.INCOMPLETE
    assert [replica.compared for replica in result.replicas] == [True, True, False]


def test_one_replica_is_equal_to_nothing() -> None:
    left_out = {"r2": ("node2", "offline"), "r3": ("node3", "offline")}
    result = verify(lambda r, first, count, n: 1, online=True, left_out=left_out)
    assert result.verdict is Verdict.INCOMPLETE and result.regions_equal == 0


@pytest.mark.parametrize("answer", [None, {}, {"digest": -1}, {"digest": "x"}])
def test_an_answer_that_is_none_is_refused(answer: Any) -> None:
    async def ask(replica: str, first: int, count: int) -> Any:
        return answer

    with pytest.raises(ProtocolViolation):
        asyncio.run(Verification(REPLICAS, REGION_BYTES, online=False, ask=ask).run())


def test_a_replica_that_cannot_be_asked_ends_the_verification() -> None:
    async def ask(replica: str, first: int, count: int) -> Any:
        raise Unreachable(peer=replica, reason="gone")

    with pytest.raises(Unreachable):
        asyncio.run(Verification(REPLICAS, REGION_BYTES, online=False, ask=ask).run())
