"""Scrubs of a whole volume: every replica verifies itself, and what is damaged gets a good copy.

Owns the round trip: a pass at each replica (``replica.scrub``), what it found (``replica.damaged``), the
order to the engine (``engine.repair``), and the check that it helped. Does not own reading
(``replica/scrubber.py``) or repairing (``engine/scrub.py``). The passes belong to the replica servers: they
go on when this daemon ends.

Only an engine can repair, because it knows who is in sync; what is found on a detached volume is listed, and
handed on by ``DamageKeeper`` once the volume is attached.

Promises: what is called repaired was read again at the replica, and verified. Nothing here raises for a
replica that cannot be asked: it is named, with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from control.views import DamagedBlock, ReplicaScrubbed, ScrubResult, ScrubVerdict
from protocol.errors import ProtocolViolation, StorageError
from protocol.limits import BLOCK_BYTES

POLL_S = 0.2
"""Between two looks at passes under way: one small call per replica."""

AWAY_S_MAX = 60.0
"""A replica server that does not answer for so long is left out. One that restarts goes on with its pass."""

CHECK_TIMEOUT_S = 120.0
"""Of one replica.damaged with check: it reads up to 256 MiB."""

REPAIR_BATCH_BLOCKS = 64
REPAIR_TIMEOUT_S = 120.0
"""Of one engine.repair. Each of its blocks ends within 10 s, eight at a time."""

ROUNDS_MAX = 3
"""Repair and check again, so often: a block may have waited for a region that was being made equal."""

LISTED_MAX = 100
"""Blocks named per replica in a result; the counts are complete, up to what a replica remembers."""

KEEPER_INTERVAL_S = 60.0
"""Between two questions to every replica server whether it knows of damage."""

KEEPER_RETRY_S_MAX = 3600.0
"""For damage that no repair removes, the pause doubles up to this: it is known, and shown."""

Ask = Callable[..., Awaitable[Any]]
"""(replica id, call, timeout_s=..., **args) -> the answer of its replica server."""

Repair = Callable[[str, list[int]], Awaitable[Any]]
"""(replica id, blocks) -> the answer of engine.repair; raises StorageError, as without an engine."""


@dataclass(slots=True)
class Findings:
    """What is known of one replica during one scrub."""

    node: str
    reason: str = ""  # why it was not scrubbed to the end
    passes_before: int = 0
    done: bool = False
    position: int = 0
    total: int = 0
    blocks_verified: int = 0
    damaged_count: int = 0  # as of the last look
    found: set[int] = field(default_factory=set)  # blocks that were ever seen damaged
    left: set[int] = field(default_factory=set)  # of these, those that still are
    unreadable: set[int] = field(default_factory=set)  # nobody has a good copy
    not_repaired: str = ""  # why the last order was of no use
    away_since_s: float | None = None

    @property
    def under_way(self) -> bool:
        return not self.done and not self.reason


@dataclass(slots=True)
class Progress:
    done: int = 0
    total: int = 0


async def mend(replica: str, findings: Findings, ask: Ask, repair: Repair) -> None:
    """Have what is damaged repaired, and look whether it helped. Raises StorageError when the replica cannot
    be asked; an engine that is missing or refuses leaves things as they are."""
    for _ in range(ROUNDS_MAX):
        blocks = await _damaged(replica, ask, check=False)
        findings.found |= blocks
        if not blocks:
            findings.left = set()
            return
        ordered = await _order(replica, sorted(blocks), findings, repair)
        findings.left = await _damaged(replica, ask, check=True)
        findings.found |= findings.left
        if not ordered or findings.left <= findings.unreadable:
            return


async def _damaged(replica: str, ask: Ask, *, check: bool) -> set[int]:
    answer = await ask(replica, "replica.damaged", timeout_s=CHECK_TIMEOUT_S, check=check)
    match answer:
        case {"blocks": list(blocks)} if all(type(block) is int for block in blocks):
            return set(blocks)
        case _:
            raise ProtocolViolation(expected="damaged blocks", got=type(answer).__name__)


async def _order(replica: str, blocks: list[int], findings: Findings, repair: Repair) -> bool:
    """Whether it makes sense to order again what is still damaged."""
    findings.not_repaired = ""
    for first in range(0, len(blocks), REPAIR_BATCH_BLOCKS):
        batch = blocks[first : first + REPAIR_BATCH_BLOCKS]
        try:
            answer = await repair(replica, batch)
        except StorageError as error:
            findings.not_repaired = str(error)
            return False
        match answer:
            case {"unreadable": list(unreadable), "left": list(left), "reason": str(reason)}:
                findings.unreadable |= {block for block in unreadable if type(block) is int}
                if len(left) == len(batch):
                    findings.not_repaired = reason
                    return False
            case _:
                raise ProtocolViolation(expected="what was repaired", got=type(answer).__name__)
    return True


def note_unreadable(known: dict[str, set[int]], replica: str, blocks: Iterable[int], answer: Any) -> None:
    """Keep in ``known``, by replica, what the engine says of ``blocks``: that nobody has a good copy."""
    lost = answer.get("unreadable") if isinstance(answer, dict) else None
    asked = set(blocks)
    now = known.pop(replica, set()) - asked
    if isinstance(lost, list):
        now |= asked & {block for block in lost if type(block) is int}
    if now:
        known[replica] = now


class VolumeScrub:
    """One scrub of one volume. ``replicas``: id -> node."""

    def __init__(
        self,
        replicas: Mapping[str, str],
        *,
        ask: Ask,
        repair: Repair,
        now_s: Callable[[], float],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.progress = Progress()
        self._ask = ask
        self._repair = repair
        self._now_s = now_s
        self._pause = pause
        self._findings = {replica: Findings(node) for replica, node in replicas.items()}

    async def run(self) -> None:
        await asyncio.gather(*(self._start(replica) for replica in self._findings))
        while under_way := [r for r, findings in self._findings.items() if findings.under_way]:
            await asyncio.gather(*(self._look(replica) for replica in under_way))
            self.progress.done = sum(f.position for f in self._findings.values())
            self.progress.total = sum(f.total for f in self._findings.values())
            if any(findings.under_way for findings in self._findings.values()):
                await self._pause(POLL_S)
        for replica, findings in self._findings.items():
            if findings.damaged_count or findings.found:
                await self._mend_at_last(replica)

    async def _start(self, replica: str) -> None:
        findings = self._findings[replica]
        try:
            status = await self._ask(replica, "replica.scrub", action="start")
            findings.passes_before = int(_field(status, "passes"))
            _take(findings, status)
        except StorageError as error:
            findings.reason = str(error)

    async def _look(self, replica: str) -> None:
        findings = self._findings[replica]
        before = findings.damaged_count
        try:
            status = await self._ask(replica, "replica.scrub", action="status")
            _take(findings, status)
        except StorageError as error:
            if findings.away_since_s is None:
                findings.away_since_s = self._now_s()
            if self._now_s() - findings.away_since_s >= AWAY_S_MAX:
                findings.reason = str(error)
            return
        findings.away_since_s = None
        if findings.damaged_count > before:
            try:
                await mend(replica, findings, self._ask, self._repair)
            except StorageError:
                findings.damaged_count = before  # it went away just now: again when it is back
        if status["state"] == "none":
            if _field(status, "passes") > findings.passes_before:
                findings.done, findings.position = True, findings.total
            else:
                findings.reason = "the pass was stopped; its replica server's log says why"

    async def _mend_at_last(self, replica: str) -> None:
        findings = self._findings[replica]
        try:
            await mend(replica, findings, self._ask, self._repair)
        except StorageError as error:
            findings.left = findings.left or set(findings.found)
            findings.reason = findings.reason or str(error)

    def result(self, *, attached: bool) -> ScrubResult:
        replicas = [_scrubbed(replica, findings) for replica, findings in sorted(self._findings.items())]
        return ScrubResult(verdict=verdict(self._findings.values()), attached=attached, replicas=replicas)


def _take(findings: Findings, status: Any) -> None:
    findings.position = _field(status, "position")
    findings.total = _field(status, "total")
    findings.blocks_verified = _field(status, "blocks_verified")
    findings.damaged_count = _field(status, "damaged_count")


def _field(status: Any, name: str) -> int:
    match status:
        case {"state": str()} if type(status.get(name)) is int:
            value: int = status[name]
            return value
        case _:
            raise ProtocolViolation(expected="the state of a scrub", got=type(status).__name__)


def verdict(findings: Iterable[Findings]) -> ScrubVerdict:
    known = list(findings)
    if any(f.left for f in known):
        return ScrubVerdict.DAMAGED
    if any(not f.done for f in known):
        return ScrubVerdict.INCOMPLETE
    return ScrubVerdict.REPAIRED if any(f.found for f in known) else ScrubVerdict.CLEAN


def _scrubbed(replica: str, findings: Findings) -> ReplicaScrubbed:
    return ReplicaScrubbed(
        id=replica,
        node=findings.node,
        scrubbed=findings.done,
        reason=findings.reason or (findings.not_repaired if findings.left else ""),
        blocks_verified=findings.blocks_verified,
        found_count=len(findings.found),
        left_count=len(findings.left),
        findings=[
            DamagedBlock(
                block_index=block,
                offset_bytes=block * BLOCK_BYTES,
                repaired=block not in findings.left,
                unreadable=block in findings.unreadable and block in findings.left,
            )
            for block in sorted(findings.found)[:LISTED_MAX]
        ],
    )


# -- what was found while nobody asked


@dataclass(slots=True)
class _Waiting:
    not_before_s: float = 0.0
    pause_s: float = KEEPER_INTERVAL_S


Known = Callable[[], Awaitable[list[tuple[str, str, str, int]]]]
"""(volume, replica id, node, blocks known as damaged) of every replica of an attached volume that answers."""


class DamageKeeper:
    """Carries what replicas know to be damaged to the engines that can repair it, once a minute."""

    def __init__(
        self,
        known: Known,
        *,
        ask: Callable[[str, str], Ask],
        repair: Callable[[str], Repair],
        now_s: Callable[[], float],
    ) -> None:
        self._known = known
        self._ask = ask
        self._repair = repair
        self._now_s = now_s
        self._waiting: dict[tuple[str, str], _Waiting] = {}
        self._wake = asyncio.Event()
        self._log = structlog.get_logger()

    def wake(self) -> None:
        """A volume was attached: what waited for that is done now."""
        self._waiting.clear()
        self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.look()
            except StorageError as error:
                self._log.warning("damage not looked at", error=str(error))
            try:
                async with asyncio.timeout(KEEPER_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def look(self) -> None:
        """One round."""
        for volume, replica, node, damaged_count in await self._known():
            waiting = self._waiting.setdefault((volume, replica), _Waiting())
            if not damaged_count:
                del self._waiting[volume, replica]
            elif self._now_s() >= waiting.not_before_s:
                await self._mend(volume, replica, node, waiting)

    async def _mend(self, volume: str, replica: str, node: str, waiting: _Waiting) -> None:
        findings = Findings(node)
        try:
            await mend(replica, findings, self._ask(volume, replica), self._repair(volume))
        except StorageError as error:
            self._log.warning("damage not repaired", volume=volume, replica=replica, error=str(error))
            return
        repaired_count = len(findings.found - findings.left)
        self._log.warning(
            "damage repaired" if not findings.left else "damage left",
            volume=volume,
            replica=replica,
            repaired=repaired_count,
            left=len(findings.left),
            reason=findings.not_repaired,
            unreadable=len(findings.left & findings.unreadable),
        )
        if repaired_count:
            waiting.pause_s = KEEPER_INTERVAL_S
        waiting.not_before_s = self._now_s() + waiting.pause_s
        waiting.pause_s = min(KEEPER_RETRY_S_MAX, waiting.pause_s * 2)
