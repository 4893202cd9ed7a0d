"""When a replica's checksums are verified in the background, how fast, and what was found: pure decisions.

Owns ScrubState and every change of it, the choice of who is next, and the pace. Does not own reading blocks,
files, clocks or tasks (``scrubber.py``), or repair: the engine does that (``engine/scrub.py``), because only
it knows who holds what.

A *pass* verifies every block that is present, from the first region to the last. A background pass begins
SCRUB_PERIOD_S after the last one ended; one that was asked for begins at once, anew, and goes faster. Both
give way to clients. Wall clock seconds are used for what must last over restarts; a clock that was put back
makes a pass due at most a period late.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from protocol.limits import BLOCK_BYTES, REGION_BLOCKS

SCRUB_PERIOD_S = 7 * 24 * 3600
"""Between two passes: a disk of 1 TiB read once a week costs it 2 MiB/s on average."""

RETRY_S = 3600
"""After a pass that the disk ended."""

SCRUB_BYTES_S = 16 * 2**20
"""A background pass on a disk where nothing else happens: a tenth of what a slow disk reads."""

SCRUB_ASKED_BYTES_S = 256 * 2**20
"""Of a pass that somebody asked for, and maybe waits for."""

BUSY_SHARE = 8
"""While clients work, the rate is so many times less."""

BUSY_OPS_S = 100
"""Requests of clients per second, on one disk, from which on it counts as busy."""

STRIDE_REGIONS_MAX = 16
"""Regions of one call where the last ones were empty: a sparse volume is passed quickly, and the first full
stride, 64 MiB, still ends within a second."""

DAMAGED_KEPT_MAX = 4096
"""Blocks known as damaged of one replica. A disk that has more is to be replaced, not repaired."""

LOOK_MAX_S = 600.0
"""Until an idle server looks again who is due."""


class Pass(Enum):
    """::

    NONE -- due --> BACKGROUND -- the last region, a failure, stop --> NONE
      |                 |
      +--- start -------+--> ASKED -- the last region, a failure, stop --> NONE
    """

    NONE = "none"
    BACKGROUND = "background"
    ASKED = "asked"


@dataclass(frozen=True, slots=True)
class ScrubState:
    """What lasts of one replica's scrub."""

    running: Pass = Pass.NONE
    position: int = 0  # the next region of the pass
    blocks_verified: int = 0  # in this pass, or, between passes, in the last one
    found_count: int = 0  # damaged blocks, likewise
    due_s: int = 0  # when the next background pass begins, wall clock
    last_done_s: int = 0  # when a pass last reached the end; 0: never
    passes_count: int = 0  # that reached the end
    damaged: tuple[int, ...] = ()  # blocks known as damaged, ascending; not repaired as far as is known here

    def __post_init__(self) -> None:
        assert min(self.position, self.blocks_verified, self.found_count, self.due_s, self.last_done_s) >= 0
        assert self.passes_count >= 0
        assert len(self.damaged) <= DAMAGED_KEPT_MAX


def first_state(*, replica_id: str, now_s: int) -> ScrubState:
    """Of a replica that was never scrubbed: due somewhere in the next period, not all of a disk at once."""
    share = zlib.crc32(replica_id.encode()) / 2**32
    return ScrubState(due_s=now_s + int(share * SCRUB_PERIOD_S))


def started(state: ScrubState) -> ScrubState:
    """Asked for. A pass that was asked for before goes on; a background pass begins anew as this one."""
    return state if state.running is Pass.ASKED else _begun(state, Pass.ASKED)


def begun_if_due(state: ScrubState, *, now_s: int) -> ScrubState:
    due = state.due_s <= now_s or state.due_s > now_s + SCRUB_PERIOD_S
    return _begun(state, Pass.BACKGROUND) if due and state.running is Pass.NONE else state


def _begun(state: ScrubState, running: Pass) -> ScrubState:
    return replace(state, running=running, position=0, blocks_verified=0, found_count=0)


def stopped(state: ScrubState, *, due_s: int) -> ScrubState:
    """Not to the end: asked to stop, or the disk failed. What was verified does not count."""
    if state.running is Pass.NONE:
        return state
    return replace(state, running=Pass.NONE, position=0, due_s=due_s)


def verified(
    state: ScrubState,
    *,
    first_region: int,
    region_count: int,
    blocks_verified: int,
    damaged: list[int],
    damaged_count: int,
) -> ScrubState:
    """A slice of the pass is done. ``damaged`` may name fewer than ``damaged_count``."""
    assert state.running is not Pass.NONE and first_region == state.position
    state = checked(state, first_region=first_region, region_count=region_count, damaged=damaged)
    return replace(
        state,
        position=first_region + region_count,
        blocks_verified=state.blocks_verified + blocks_verified,
        found_count=state.found_count + damaged_count,
    )


def checked(state: ScrubState, *, first_region: int, region_count: int, damaged: list[int]) -> ScrubState:
    """These regions were read just now: what is not among ``damaged`` there has a good copy again."""
    first, end = first_region * REGION_BLOCKS, (first_region + region_count) * REGION_BLOCKS
    kept = {block for block in state.damaged if not first <= block < end}
    return _with_damaged(state, kept | set(damaged))


def noted(state: ScrubState, block_index: int) -> ScrubState:
    """A read met a damaged block."""
    return _with_damaged(state, {*state.damaged, block_index})


def _with_damaged(state: ScrubState, blocks: set[int]) -> ScrubState:
    return replace(state, damaged=tuple(sorted(blocks)[:DAMAGED_KEPT_MAX]))


def finished(state: ScrubState, *, now_s: int) -> ScrubState:
    assert state.running is not Pass.NONE
    return replace(
        state,
        running=Pass.NONE,
        position=0,
        last_done_s=now_s,
        passes_count=state.passes_count + 1,
        due_s=now_s + SCRUB_PERIOD_S,
    )


# -- who is next


def choose(states: Mapping[str, ScrubState]) -> str | None:
    """Of the replicas of one disk, whose pass goes on now: one at a time, since they share the disk. Asked
    for comes first; a pass that has begun before one that has not."""
    rank = {Pass.ASKED: 0, Pass.BACKGROUND: 1}
    running = [(rank[s.running], -s.position, name) for name, s in states.items() if s.running in rank]
    return min(running)[2] if running else None


def seconds_to_look(states: Mapping[str, ScrubState], *, now_s: int) -> float:
    """How long nothing will be due."""
    due = [state.due_s - now_s for state in states.values()]
    return min([LOOK_MAX_S, *(max(1.0, float(left_s)) for left_s in due)])


# -- how fast


def next_stride(stride_regions: int, *, blocks_verified: int) -> int:
    return 1 if blocks_verified else min(STRIDE_REGIONS_MAX, stride_regions * 2)


def pause_s(
    *, running: Pass, blocks_verified: int, took_s: float, busy: bool, rate_bytes_s: int = 0
) -> float:
    """How long to rest after a slice. ``rate_bytes_s``: instead of the usual one; 0: the usual one."""
    usual = SCRUB_ASKED_BYTES_S if running is Pass.ASKED else SCRUB_BYTES_S
    rate = (rate_bytes_s or usual) / (BUSY_SHARE if busy else 1)
    return max(0.0, blocks_verified * BLOCK_BYTES / rate - took_s)


def is_busy(*, client_ops: int, window_s: float) -> bool:
    return window_s > 0 and client_ops / window_s > BUSY_OPS_S
