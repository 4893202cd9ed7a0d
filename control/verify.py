"""``replica verify``: do all replicas hold the same bytes, and does every checksum verify?

Owns the comparison and its honesty. The replicas do the reading (``replica.verify``: every present
block is read and its checksum checked; the digest covers number and checksum of every block).

An attached volume is written while it is looked at, and replicas apply a write at slightly different
moments. So a region that differs is looked at again, at most LOOKS_MAX times, with pauses longer
than a write may be under way. It is *equal* as soon as all digests agree in one look; *different*
when no replica's digest changed between two looks and they still disagree; *busy* when it kept
changing at every look: then its checksums verify, but that the copies are equal is not proven.

Only replicas that are in sync at the beginning and at the end are compared; the others are named
with the reason. Nothing is repaired here: reads repair what they find.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from control.views import ReplicaVerified, Verdict, VerifyResult
from protocol.errors import ProtocolViolation
from protocol.limits import LINK_STALL_TIMEOUT_S, REGION_BYTES

SLICE_REGIONS = 8
"""Regions per call: 32 MiB, a fraction of a second of reading, so progress moves and a replica's
verify thread is never held for long."""

CALL_TIMEOUT_S = 120.0
"""One slice from a slow disk under load."""

LOOKS_MAX = 6
LOOK_PAUSE_S = 1.5
"""Between two looks at a region that differs. A write that one replica has applied and another has
not is acknowledged by both within LINK_STALL_TIMEOUT_S, or the other one has left the in-sync set."""

COMPARED_MIN = 2
"""With fewer there is nothing to compare: checksums are checked, and no region is called equal."""

LISTED_MAX = 100
"""Regions and blocks named in a result; the counts are complete."""

assert LOOK_PAUSE_S > LINK_STALL_TIMEOUT_S

Ask = Callable[[str, int, int], Awaitable[Any]]
"""(replica id, first region, region count) -> the answer of replica.verify."""


@dataclass(slots=True)
class _Tally:
    blocks_verified: int = 0
    blocks_zero: int = 0
    damaged: list[int] = field(default_factory=list)
    damaged_count: int = 0
    digests: dict[int, int] = field(default_factory=dict)  # by first region of a slice


@dataclass(slots=True)
class Progress:
    done: int = 0
    total: int = 0


class Verification:
    """One run. ``replicas``: id -> node of those to compare."""

    def __init__(
        self,
        replicas: Mapping[str, str],
        size_bytes: int,
        *,
        online: bool,
        ask: Ask,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.progress = Progress(total=-(-size_bytes // REGION_BYTES))
        self._replicas = replicas
        self._online = online
        self._ask = ask
        self._pause = pause
        self._tallies = {replica: _Tally() for replica in replicas}
        self._equal_count = 0
        self._different: list[int] = []
        self._busy: list[int] = []
        self._exact = True  # every slice agreed at the first look, or nobody writes

    async def run(self) -> None:
        """Raises the first error of a replica that cannot be asked."""
        suspects: list[int] = []
        for first in range(0, self.progress.total, SLICE_REGIONS):
            count = min(SLICE_REGIONS, self.progress.total - first)
            answers = await self._look(first, count)
            for replica, answer in answers.items():
                self._note(replica, first, answer)
            if len({answer["digest"] for answer in answers.values()}) <= 1:
                self._equal_count += count
            else:
                suspects += range(first, first + count)
            self.progress.done = first + count
        if suspects:
            self._exact = not self._online
            await self._settle(suspects)

    def _note(self, replica: str, first: int, answer: Mapping[str, Any]) -> None:
        tally = self._tallies[replica]
        tally.blocks_verified += answer["blocks_verified"]
        tally.blocks_zero += answer["blocks_zero"]
        tally.damaged_count += answer["damaged_count"]
        tally.damaged += answer["damaged"][: LISTED_MAX - len(tally.damaged)]
        tally.digests[first] = answer["digest"]

    async def _look(self, first: int, count: int) -> dict[str, Mapping[str, Any]]:
        names = list(self._replicas)
        answers = await asyncio.gather(*(self._ask(name, first, count) for name in names))
        return {name: _checked(answer) for name, answer in zip(names, answers, strict=True)}

    async def _settle(self, suspects: Sequence[int]) -> None:
        """Look again, region by region, all suspects per round: one pause serves them all."""
        open_regions = list(suspects)
        before: dict[int, dict[str, int]] = {}
        for look in range(LOOKS_MAX):
            if look and self._online:
                await self._pause(LOOK_PAUSE_S)
            still_open: list[int] = []
            for region in open_regions:
                answers = await self._look(region, 1)
                digests = {name: answer["digest"] for name, answer in answers.items()}
                if len(set(digests.values())) <= 1:
                    self._equal_count += 1
                elif not self._online or before.get(region) == digests:
                    self._different.append(region)
                else:
                    before[region] = digests
                    still_open.append(region)
            open_regions = still_open
            if not open_regions:
                return
        self._busy = open_regions

    def result(self, left_out: Mapping[str, tuple[str, str]]) -> VerifyResult:
        """``left_out``: id -> (node, reason) of replicas that were not compared, or not to the end."""
        replicas = []
        for replica, node in self._replicas.items():
            if replica not in left_out:
                replicas.append(_verified(replica, node, self._tallies[replica], exact=self._exact))
        for replica, (node, reason) in left_out.items():
            replicas.append(ReplicaVerified(id=replica, node=node, compared=False, reason=reason))
        enough = sum(replica.compared for replica in replicas) >= COMPARED_MIN
        damaged = any(tally.damaged_count for tally in self._tallies.values())
        if damaged or self._different:
            verdict = Verdict.DIFFERENT
        elif self._busy or left_out or not enough:
            verdict = Verdict.INCOMPLETE
        else:
            verdict = Verdict.SAME
        return VerifyResult(
            verdict=verdict,
            online=self._online,
            regions_total=self.progress.total,
            regions_equal=self._equal_count if enough else 0,
            regions_different=self._different[:LISTED_MAX],
            regions_different_count=len(self._different),
            regions_busy=self._busy[:LISTED_MAX],
            regions_busy_count=len(self._busy),
            replicas=sorted(replicas, key=lambda replica: replica.id),
        )


def _verified(replica: str, node: str, tally: _Tally, *, exact: bool) -> ReplicaVerified:
    """Without ``exact`` the slices are from different moments, and a digest over them says nothing."""
    whole = hashlib.sha256()
    for first in sorted(tally.digests):
        whole.update(tally.digests[first].to_bytes(8, "little"))
    return ReplicaVerified(
        id=replica,
        node=node,
        compared=True,
        blocks_verified=tally.blocks_verified,
        blocks_zero=tally.blocks_zero,
        damaged_count=tally.damaged_count,
        damaged_blocks=tally.damaged,
        digest=whole.hexdigest()[:16] if exact else "",
    )


def _checked(answer: Any) -> Mapping[str, Any]:
    match answer:
        case {
            "blocks_verified": int(),
            "blocks_zero": int(),
            "damaged": list(),
            "damaged_count": int(),
            "digest": int(digest),
        } if 0 <= digest < 2**64:
            return dict(answer)
        case _:
            raise ProtocolViolation(expected="an answer to replica.verify", got=type(answer).__name__)
