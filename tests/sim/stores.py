"""What a replica's store promises, without its files: a model for runs that must be fast.

Owns a replica's blocks as the page cache and as the disk hold them, its region log, and what a crash, a power
loss, a failed sync and rot leave. Passive: the caller says when a sync begins and when it has ended. What the
real store does is held against a dictionary, on a disk in memory, by ``dataplane/core/tests/store_model.rs``.

A block is two halves (``Cells``): a write replaces both, a partial write one. A half holds the id of the
write that it shows; 0 is "never written". Zeroes carry the id of the write that zeroed, so that a stale zero
shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from protocol.limits import REGION_BLOCKS

Stamp = tuple[int, int]
Cells = tuple[int, int]

UNWRITTEN: Cells = (0, 0)

CLEAN_IDLE_S = 3.0
"""As in the store: a region that nobody wrote to for this long may be cleaned."""


class StoreFailed(Exception):
    """The store serves nothing any more until it is opened again."""


class DiskFault(Exception):
    """One operation failed. ``code``: "no_space" or "io_error"."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class RegionState:
    stamp: Stamp = (0, 0)
    dirty: bool = False
    held: bool = False
    last_write_id: int = 0
    touched_s: float = 0.0


@dataclass
class Flushing:
    """A sync under way: the blocks it covers, as they were when it began, and what it may clean."""

    blocks: dict[int, Cells]
    sequence: int
    cleaning: list[int]


@dataclass
class ModelStore:
    random: Random
    epoch: int = 0
    stamp: Stamp = (0, 0)
    completed_id: int = 0
    failed: bool = False
    cached: dict[int, Cells] = field(default_factory=dict)
    disk: dict[int, Cells] = field(default_factory=dict)
    pending: dict[int, list[tuple[int, Cells]]] = field(
        default_factory=dict
    )  # sequence, what, since the sync
    lying: set[int] = field(default_factory=set)  # blocks that a failed sync left on the disk as they were
    bad: set[int] = field(default_factory=set)  # blocks without a good copy here
    regions: dict[int, RegionState] = field(default_factory=dict)
    fresh: dict[int, set[int]] = field(default_factory=dict)
    generation: int = 0
    sequence: int = 0
    flushed_sequence: int = 0
    fail_next: str = ""  # "no_space" or "io_error": of the next write
    fail_sync: bool = False  # of the next sync

    # Opening and fencing

    def open(self, *, epoch: int, stamp: Stamp) -> int:
        """The number of dirty regions found."""
        self.failed = False
        self.epoch, self.stamp = epoch, stamp
        self.completed_id = 0
        self.fresh.clear()
        self.generation += 1
        dirty = 0
        for region in self.regions.values():
            if region.dirty:
                region.held, region.last_write_id = True, 0
                dirty += 1
        if dirty:
            self.sequence += 1  # a flush also covers what earlier processes answered
        return dirty

    def set_epoch(self, epoch: int) -> None:
        assert epoch >= self.epoch
        self.generation += 1
        if epoch > self.epoch:
            self.epoch = epoch
            self.completed_id = 0
            for region in self.regions.values():
                region.held |= region.dirty
                region.last_write_id = 0

    def check_alive(self) -> None:
        if self.failed:
            raise StoreFailed

    def set_stamp(self, stamp: Stamp) -> None:
        self.check_alive()
        self.stamp = stamp
        for region in self.regions.values():
            if region.dirty:
                region.stamp = stamp

    # Reading and writing

    def is_marked(self, region: int) -> bool:
        known = self.regions.get(region)
        return known is not None and known.dirty and known.stamp == self.stamp

    def mark(self, region: int, now_s: float, *, held: bool = False) -> None:
        """Durable when it returns."""
        self.check_alive()
        known = self.regions.setdefault(region, RegionState())
        known.dirty, known.stamp = True, self.stamp
        known.held |= held
        known.touched_s = now_s

    def write(self, block: int, cells: Cells, request_id: int, now_s: float) -> None:
        self._may_write(block)
        self.bad.discard(block)
        self._put(block, cells, request_id, now_s)
        self._note_fresh(block)

    def write_partial(self, block: int, half: int, value: int, request_id: int, now_s: float) -> None:
        self._may_write(block)
        if block in self.bad:
            raise DiskFault("io_error")  # the rest of the block is not known
        old = self.cached.get(block, UNWRITTEN)
        cells = (value, old[1]) if half == 0 else (old[0], value)
        self._put(block, cells, request_id, now_s)

    def repair(self, block: int, cells: Cells, now_s: float) -> bool:
        self._may_write(block)
        if block not in self.bad:
            return False
        self.bad.discard(block)
        self._put(block, cells, 0, now_s)
        return True

    def _may_write(self, block: int) -> None:
        self.check_alive()
        assert self.is_marked(block // REGION_BLOCKS), "written without a mark"
        if self.fail_next:
            code, self.fail_next = self.fail_next, ""
            raise DiskFault(code)

    def _put(self, block: int, cells: Cells, request_id: int, now_s: float) -> None:
        self.cached[block] = cells
        self.sequence += 1
        self.pending.setdefault(block, []).append((self.sequence, cells))
        region = self.regions[block // REGION_BLOCKS]
        region.last_write_id = max(region.last_write_id, request_id)
        region.touched_s = now_s

    def _note_fresh(self, block: int) -> None:
        fresh = self.fresh.get(block // REGION_BLOCKS)
        if fresh is not None:
            fresh.add(block)

    def read(self, block: int) -> Cells | None:
        """None: no good copy here."""
        self.check_alive()
        return None if block in self.bad else self.cached.get(block, UNWRITTEN)

    def summary(self, region: int) -> dict[int, Cells | None]:
        """Of the blocks that are not as they were created."""
        self.check_alive()
        blocks = [b for b in (*self.cached, *self.bad) if b // REGION_BLOCKS == region]
        return {block: self.read(block) for block in sorted(set(blocks))}

    # Flushing and cleaning

    @property
    def is_flushed(self) -> bool:
        return self.flushed_sequence == self.sequence

    def begin_flush(self, now_s: float, *, clean_idle: bool = False, clean_all: bool = False) -> Flushing:
        self.check_alive()
        cleaning = [
            number
            for number, region in self.regions.items()
            if region.dirty
            and (
                clean_all
                or (
                    clean_idle
                    and not region.held
                    and region.last_write_id <= self.completed_id
                    and region.touched_s <= now_s - CLEAN_IDLE_S
                )
            )
        ]
        covered = {block: self.cached[block] for block in self.pending}
        return Flushing(covered, self.sequence, cleaning)

    def has_cleanable(self, now_s: float) -> bool:
        return not self.failed and bool(self.begin_flush(now_s, clean_idle=True).cleaning)

    def finish_flush(self, flushing: Flushing) -> None:
        """Durable now. Raises StoreFailed when a sync failed."""
        self.check_alive()
        if self.fail_sync:
            self.fail_sync = False
            self.failed = True
            self._lose_silently()
            raise StoreFailed
        for block, cells in flushing.blocks.items():
            self.disk[block] = cells
            later = [version for version in self.pending.pop(block, ()) if version[0] > flushing.sequence]
            if later:
                self.pending[block] = later
        self.flushed_sequence = max(self.flushed_sequence, flushing.sequence)
        for number in flushing.cleaning:
            region = self.regions[number]
            if not any(b // REGION_BLOCKS == number for b in self.pending):
                region.dirty = region.held = False

    def _lose_silently(self) -> None:
        """A sync failed: some of it arrived, and the page cache takes all of it for written."""
        for block in sorted(self.pending):
            self.disk[block] = self._torn(block)
            self.lying.add(block)
        self.pending.clear()

    def _torn(self, block: int) -> Cells:
        """What may be on the disk of a block that was not synced: any version of each half since then."""
        versions = [self.disk.get(block, UNWRITTEN), *(cells for _, cells in self.pending[block])]
        random = self.random
        if random.random() < 0.5:
            return random.choice(versions)
        return random.choice(versions)[0], random.choice(versions)[1]

    def note_completed(self, request_id: int) -> None:
        self.completed_id = max(self.completed_id, request_id)

    # Resync

    def dirty_regions(self) -> list[int]:
        return sorted(number for number, region in self.regions.items() if region.dirty)

    def changed_since(self, stamp: Stamp) -> list[int]:
        return sorted(number for number, region in self.regions.items() if region.stamp > stamp)

    def begin_resync(self, regions: list[int], now_s: float) -> None:
        self.check_alive()
        for region in regions:
            self.mark(region, now_s, held=True)
        self.generation += 1
        self.fresh = {region: set() for region in regions}

    def write_pulled(self, block: int, cells: Cells, now_s: float) -> bool:
        """False if a live write was faster."""
        region = block // REGION_BLOCKS
        if block in self.fresh.get(region, ()):
            return False
        if not self.is_marked(region):
            self.mark(region, now_s, held=True)
        self._may_write(block)
        self.bad.discard(block)
        self._put(block, cells, 0, now_s)
        return True

    def take_damaged(self, block: int, now_s: float) -> bool:
        """The source has no good copy, and ours is of no known version: nobody has. False if ours is live."""
        region = block // REGION_BLOCKS
        if block in self.fresh.get(region, ()):
            return False
        if not self.is_marked(region):
            self.mark(region, now_s, held=True)
        self.bad.add(block)
        return True

    def resync_done(self, region: int) -> None:
        self.fresh.pop(region, None)

    def end_resync(self) -> None:
        self.generation += 1
        self.fresh.clear()

    def complete_regions(self, regions: list[int]) -> None:
        for number in regions:
            if (region := self.regions.get(number)) is not None:
                region.held = False

    # What befalls it

    def crash(self) -> None:
        """The process died; the page cache lives."""
        self.fresh.clear()

    def lose_cache(self) -> None:
        """Power is gone, and with it what was not synced."""
        for block in sorted(self.pending):
            self.disk[block] = self._torn(block)
            self.cached[block] = self.disk[block]
        self.pending.clear()
        self.drop_cache()

    def drop_cache(self) -> None:
        """What is believed to be on the disk is read from there again. Unsynced pages stay."""
        for block in sorted(self.lying - self.pending.keys()):
            self.cached[block] = self.disk[block]
        self.lying.clear()

    def holds(self, block: int) -> bool:
        return block in self.cached

    def rot(self, block: int) -> None:
        self.bad.add(block)

    def copy(self) -> ModelStore:
        """Yesterday's directory: what the disk holds, as if it had been copied away."""
        return ModelStore(
            self.random,
            epoch=self.epoch,
            stamp=self.stamp,
            cached=dict(self.disk),
            disk=dict(self.disk),
            bad=set(self.bad),
            regions={n: RegionState(r.stamp, r.dirty, True) for n, r in self.regions.items()},
        )
