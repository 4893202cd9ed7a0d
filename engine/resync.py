"""Which region to copy next: the plan of a resync or a reconcile. Pure; no session, no clock.

Owns the order (regions that requests wait for first), how many calls are in flight, which regions no source
could give whole, and progress. Does not own who copies from whom (``joining.py``, ``reconcile.py``) or how
fast (``pace.py``).

A plan takes one bit per region of the volume, whatever is in it: 2 MiB for the largest volume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.limits import WANTED_CALLS_IN_FLIGHT_MAX, WANTED_MAX
from engine.pace import CALLS_UNLIMITED, PullPace
from engine.regions import Regions, RegionSet

UNHINDERED = PullPace()


class PullPlan:
    """The regions one target has to pull.

    Invariant: each region is in exactly one of ``_pending``, ``_flying`` and done.
    """

    def __init__(self, regions: Iterable[int]) -> None:
        self._pending = RegionSet(regions)
        self._flying: set[int] = set()
        self._background: set[int] = set()  # first regions of the background calls in flight
        self._wanted_calls = 0
        self._wanted: deque[int] = deque()
        self._cursor = 0  # where the background goes on
        self._alone = RegionSet()  # of a batch that a source could not give whole: which one is it?
        self._refused: dict[int, set[int]] = {}  # region -> slots of sources that cannot give it whole
        self.total_count = self._pending.count
        self.bytes_copied = 0
        self.blocks_damaged = 0

    @property
    def done_count(self) -> int:
        return self.total_count - self._pending.count - len(self._flying)

    @property
    def done(self) -> bool:
        return self.done_count == self.total_count

    @property
    def in_flight_count(self) -> int:
        return len(self._flying)

    def __contains__(self, region: int) -> bool:
        """Whether it is still to be pulled, or being pulled."""
        return region in self._pending or region in self._flying

    def remaining(self) -> RegionSet:
        left = self._pending.copy()
        left.update(self._flying)
        return left

    def add(self, regions: Iterable[int]) -> None:
        """More to pull. What is done must be named again if it has to be done again."""
        if isinstance(regions, RegionSet) and not self._flying:
            self.total_count -= self._pending.count
            self._pending.update(regions)
            self.total_count += self._pending.count
            return
        for region in regions:
            if region not in self._flying and self._pending.add(region):
                self.total_count += 1

    def want(self, region: int) -> None:
        """A request waits for it."""
        if region in self._pending and len(self._wanted) < WANTED_MAX:
            self._wanted.append(region)

    def next_call(self, pace: PullPace = UNHINDERED) -> tuple[int, ...]:
        """The regions of the next pull call, now in flight; empty when none is due."""
        while self._wanted and self._wanted_calls < WANTED_CALLS_IN_FLIGHT_MAX:
            region = self._wanted.popleft()
            if region in self._pending:
                self._wanted_calls += 1
                return self._launch([region])
        if len(self._background) >= pace.calls_max or not self._pending.count:
            return ()
        batch = self._pending.take_from(self._cursor, pace.batch_regions)
        if not batch:  # regions that failed lie below
            batch = self._pending.take_from(0, pace.batch_regions)
        if self._alone.count:
            batch = self._apart(batch)
        self._cursor = batch[-1] + 1
        self._background.add(batch[0])
        return self._launch(batch)

    def _apart(self, batch: list[int]) -> list[int]:
        """Up to the first region that has to go alone, or that one."""
        first = next((at for at, region in enumerate(batch) if region in self._alone), len(batch))
        return batch[: max(1, first)]

    def is_background(self, batch: Regions) -> bool:
        return next(iter(batch)) in self._background

    def on_done(self, batch: Regions, bytes_copied: int, blocks_damaged: int = 0) -> None:
        self._land(batch)
        self.bytes_copied += bytes_copied
        self.blocks_damaged += blocks_damaged
        for region in batch:
            if self._alone.count:
                self._alone.discard(region)
            self._refused.pop(region, None)

    def on_failed(self, batch: Regions) -> None:
        self._land(batch)
        for region in batch:
            self._pending.add(region)

    def on_incomplete(self, batch: Regions, source: int, bytes_copied: int) -> None:
        """``source`` has no good copy of some block in it. Which region, is found by pulling each alone."""
        self.on_failed(batch)
        self.bytes_copied += bytes_copied
        for region in batch:
            if len(batch) == 1 or region in self._alone:
                self._refused.setdefault(region, set()).add(source)
            self._alone.add(region)

    def refused_by(self, region: int) -> frozenset[int]:
        """Slots of the sources that could not give it whole."""
        return frozenset(self._refused.get(region, ()))

    def _launch(self, batch: list[int]) -> tuple[int, ...]:
        for region in batch:
            self._pending.discard(region)
            self._flying.add(region)
        return tuple(batch)

    def _land(self, batch: Regions) -> None:
        assert batch and self._flying.issuperset(batch)
        first = next(iter(batch))
        if first in self._background:
            self._background.discard(first)
        else:
            self._wanted_calls -= 1
        self._flying.difference_update(batch)

    def check_invariants(self) -> None:
        assert 0 <= self.done_count <= self.total_count
        assert 0 <= self._wanted_calls <= WANTED_CALLS_IN_FLIGHT_MAX
        assert len(self._background) <= CALLS_UNLIMITED
        assert not any(region in self._pending for region in self._flying)
