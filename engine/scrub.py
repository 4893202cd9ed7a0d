"""Repairs by order: blocks that a scrub found damaged at one replica get a good copy from another.

Owns the orders under way and what became of each. Does not own finding damage (``replica/scrub.py``), the
copying (the data plane reads the block elsewhere and sends REPAIR, which a replica takes only while its own
copy does not verify), or whether the replica is good again: it says so itself, when it is asked to check.

Promises: every order ends, at the latest after REPAIR_TIMEOUT_S; at most REPAIRS_AT_ONCE_MAX are under way,
so that clients hardly notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from protocol.errors import StorageError

REPAIRS_AT_ONCE_MAX = 8
"""Each is a read and a write of one block, between those of the clients."""

REPAIR_TIMEOUT_S = 10.0
"""For one block. A replica that is slower is lost to its engine after a second anyway; what waits longer
waits for a region that is being made equal, and is left for the next time."""

BLOCKS_PER_CALL_MAX = 1024

Order = Callable[[int, int], None]
"""(slot, block index): the data plane is to repair it. Raises StorageError."""


class Outcome(Enum):
    REPAIRED = "repaired"  # the replica has taken a good copy, or had one
    UNREADABLE = "unreadable"  # nobody has a good copy
    LEFT = "left"  # not done now


@dataclass(slots=True)
class RepairReport:
    repaired: list[int] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    reason: str = ""  # why some are left

    def add(self, block_index: int, outcome: Outcome) -> None:
        {
            Outcome.REPAIRED: self.repaired,
            Outcome.UNREADABLE: self.unreadable,
            Outcome.LEFT: self.left,
        }[outcome].append(block_index)

    def to_wire(self) -> dict[str, Any]:
        return {
            "repaired": self.repaired,
            "unreadable": self.unreadable,
            "left": self.left,
            "reason": self.reason,
        }


class Repairs:
    def __init__(self, order: Order, *, timeout_s: float = REPAIR_TIMEOUT_S) -> None:
        self._order = order
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(REPAIRS_AT_ONCE_MAX)
        self._waiting: dict[tuple[int, int], asyncio.Future[Outcome]] = {}

    async def run(self, slot: int, blocks: Iterable[int]) -> RepairReport:
        """Repair these blocks of ``slot``. Does not raise for a block: the report names it."""
        report = RepairReport()
        listed = sorted(set(blocks))
        outcomes = await asyncio.gather(*(self._one(slot, block, report) for block in listed))
        for block, outcome in zip(listed, outcomes, strict=True):
            report.add(block, outcome)
        return report

    async def _one(self, slot: int, block: int, report: RepairReport) -> Outcome:
        async with self._slots:
            key = (slot, block)
            told = self._waiting.get(key)
            if told is None:
                told = self._waiting[key] = asyncio.get_running_loop().create_future()
                try:
                    self._order(slot, block)
                except StorageError as error:
                    report.reason = str(error)
                    self._tell(key, Outcome.LEFT)
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await asyncio.shield(told)
            except TimeoutError:
                report.reason = f"no answer within {self._timeout_s:g} s"
                return Outcome.LEFT
            finally:
                if self._waiting.get(key) is told:
                    del self._waiting[key]

    # -- what the data plane tells

    def note_repaired(self, slot: int, block_index: int) -> None:
        self._tell((slot, block_index), Outcome.REPAIRED)

    def note_unreadable(self, block_index: int) -> None:
        for key in [key for key in self._waiting if key[1] == block_index]:
            self._tell(key, Outcome.UNREADABLE)

    def _tell(self, key: tuple[int, int], outcome: Outcome) -> None:
        told = self._waiting.get(key)
        if told is not None and not told.done():
            told.set_result(outcome)
