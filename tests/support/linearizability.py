"""Was every block a linearizable register? Checks the history that a workload recorded.

Each block is a register of its own. Each write's value is unique (``encode_tag``: block, writer,
sequence), so it is known which write a read saw, and a check takes n log n instead of a search:
a value's *cluster* is its write and the reads that saw it, and in a linear order every cluster is
contiguous. With f the earliest end in a cluster and s its latest start, cluster a must come before
b when f(a) < s(b). The history is linearizable exactly if

1. no read ended before the write that it saw began, and nothing was read that nobody wrote, and
2. no two clusters must each come before the other. (A longer cycle contains such a pair: its member
   with the latest s has a predecessor in the cycle, and also must come after its own successor.)

A cluster with f < s is a *forward* zone: it holds the register from f to s. Rule 2 then says that
forward zones do not overlap and that no other cluster lies strictly inside one.

A write without an answer, or answered with an error, may take effect at any time after it began, or
never. Reads without an answer say nothing and are not recorded. Zeroes are the value that was there
before the first write; a history must not contain writes of zeroes.
"""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

BLOCK_BYTES = 4096
TAG = struct.Struct("<8sQQQ")  # magic, block, writer, sequence
TAG_MAGIC = b"DLMN-tag"
TAGS_PER_BLOCK = BLOCK_BYTES // TAG.size
assert BLOCK_BYTES % TAG.size == 0


class Value(NamedTuple):
    """What one write wrote."""

    writer: int
    sequence: int


INITIAL: Value | None = None
"""What is read where nothing was written yet: zeroes."""


class TornBlock(Exception):
    """A block that no write can have produced: a mix of two, damage, or another block's content."""


def encode_tag(block: int, value: Value) -> bytes:
    """A whole block. Every 32 bytes say the same, so a mix of two writes cannot pass for one."""
    return TAG.pack(TAG_MAGIC, block, value.writer, value.sequence) * TAGS_PER_BLOCK


def decode_tag(block: int, raw: bytes) -> Value | None:
    """Raises TornBlock."""
    if len(raw) != BLOCK_BYTES:
        raise TornBlock(f"block {block}: {len(raw)} bytes")
    if raw.count(0) == BLOCK_BYTES:
        return INITIAL
    magic, tagged_block, writer, sequence = TAG.unpack_from(raw)
    if raw != raw[: TAG.size] * TAGS_PER_BLOCK:
        tags = {raw[i : i + TAG.size] for i in range(0, BLOCK_BYTES, TAG.size)}
        raise TornBlock(f"block {block} mixes {len(tags)} contents: {sorted(tags)[:4]}")
    if magic != TAG_MAGIC or tagged_block != block:
        raise TornBlock(f"block {block} holds what was never written to it: {raw[: TAG.size]!r}")
    return Value(writer, sequence)


class Kind(Enum):
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Operation:
    """``end`` is None when the outcome is unknown. Times: any clock that all workers share. ``durable``: a
    write that was to be on the disk when it was answered (FUA)."""

    kind: Kind
    block: int
    value: Value | None
    start: float
    end: float | None
    durable: bool = False

    def __str__(self) -> str:
        end = "?" if self.end is None else f"{self.end}"
        value = "zeroes" if self.value is None else f"{self.value.writer}:{self.value.sequence}"
        return f"{self.kind.value} {value} [{self.start}, {end}]"


@dataclass(frozen=True, slots=True)
class Violation:
    """Why one block's history has no linear order, with the operations that prove it."""

    block: int
    reason: str
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        return f"block {self.block}: {self.reason}\n" + "".join(f"    {op}\n" for op in self.operations)


@dataclass(slots=True)
class _Cluster:
    """One value's write and reads; see the module's text for f and s."""

    write: Operation | None  # None: the initial value, written before time began
    first_end: float
    last_start: float
    ends_first: Operation | None
    starts_last: Operation | None

    def add(self, op: Operation) -> None:
        end = math.inf if op.end is None else op.end
        if end < self.first_end:
            self.first_end, self.ends_first = end, op
        if op.start > self.last_start:
            self.last_start, self.starts_last = op.start, op

    def witnesses(self) -> list[Operation]:
        return [op for op in (self.ends_first, self.starts_last) if op is not None]


def check(history: Iterable[Operation]) -> list[Violation]:
    """Violations, at most one per block. Empty: every block was linearizable."""
    by_block: defaultdict[int, list[Operation]] = defaultdict(list)
    for op in history:
        by_block[op.block].append(op)
    found = (check_block(block, by_block[block]) for block in sorted(by_block))
    return [violation for violation in found if violation is not None]


def assert_linearizable(history: Sequence[Operation]) -> None:
    violations = check(history)
    assert not violations, f"{len(violations)} blocks are not linearizable:\n" + "\n".join(
        str(violation) for violation in violations[:5]
    )


def check_block(block: int, operations: Sequence[Operation]) -> Violation | None:
    clusters: dict[Value | None, _Cluster] = {
        INITIAL: _Cluster(None, -math.inf, -math.inf, None, None),
    }
    for op in operations:
        if op.kind is Kind.WRITE:
            assert op.value is not INITIAL, "a workload must not write zeroes"
            assert op.value not in clusters, f"two writes of {op.value}: the workload is broken"
            clusters[op.value] = _Cluster(op, math.inf, -math.inf, None, None)
            clusters[op.value].add(op)
    for op in operations:
        if op.kind is Kind.WRITE:
            continue
        assert op.end is not None, "a read without an answer says nothing"
        cluster = clusters.get(op.value)
        if cluster is None:
            return Violation(block, "a read saw a value that was never written", (op,))
        if cluster.write is not None and op.end < cluster.write.start:
            return Violation(block, "a read saw a value before its write began", (op, cluster.write))
        cluster.add(op)
    return _conflict(block, list(clusters.values()))


def _conflict(block: int, clusters: list[_Cluster]) -> Violation | None:
    """Two clusters of which each must come before the other."""
    forward = sorted((c for c in clusters if c.first_end < c.last_start), key=lambda c: c.first_end)
    for earlier, later in itertools.pairwise(forward):
        if later.first_end < earlier.last_start:
            return _stale(block, earlier, later)
    begins = [cluster.first_end for cluster in forward]
    for inner in clusters:
        if inner.first_end < inner.last_start:
            continue
        index = bisect.bisect_left(begins, inner.last_start) - 1  # the last zone that began before it
        if index >= 0 and inner.first_end < forward[index].last_start:
            return _stale(block, forward[index], inner)
    return None


def _stale(block: int, held: _Cluster, other: _Cluster) -> Violation:
    proof = [*held.witnesses(), *other.witnesses()]
    return Violation(
        block,
        "two values were each seen, or acknowledged, strictly before and after the other",
        tuple(sorted(set(proof), key=lambda op: op.start)),
    )


# Power loss: what was not flushed may be gone


@dataclass(frozen=True, slots=True)
class Flush:
    """A FLUSH that was answered: what was acknowledged before ``start`` survives what comes after ``end``."""

    start: float
    end: float


def check_with_losses(
    history: Iterable[Operation],
    flushes: Sequence[Flush],
    losses: Sequence[float],
    begins_with: frozenset[Value | None] = frozenset({INITIAL}),
) -> list[Violation]:
    """``begins_with``: what a register may hold at the beginning, one of these. ``losses``: moments at which
    every page cache that held something was lost. Without any this is check().

    A loss sets each register to a value it had since the last flush, or to that of a write that was not
    answered: never older. Which one is decided once: reads afterwards agree. So the history is cut at the
    losses, and each part is checked by itself, beginning with the value that its reads saw of those it may
    begin with. Lenient only where the answer is not known from the history: a read that runs over a loss says
    nothing, and a write without an answer may take effect in any later part.
    """
    by_block: defaultdict[int, list[Operation]] = defaultdict(list)
    for op in history:
        by_block[op.block].append(op)
    cuts = sorted(losses)
    found = (_check_parts(block, by_block[block], flushes, cuts, begins_with) for block in sorted(by_block))
    return [violation for violation in found if violation is not None]


def _check_parts(
    block: int,
    operations: Sequence[Operation],
    flushes: Sequence[Flush],
    cuts: Sequence[float],
    begins_with: frozenset[Value | None],
) -> Violation | None:
    bounds = [-math.inf, *cuts, math.inf]
    may_begin_with: set[Value | None] = set(begins_with)
    open_writes: list[Operation] = []  # of earlier parts, without an answer when their part ended
    known = {op.value for op in operations if op.kind is Kind.WRITE} | begins_with
    for begin, end in itertools.pairwise(bounds):
        part = [op for op in operations if begin <= op.start < end]
        writes = [
            replace(op, end=None) if op.end is not None and op.end >= end else op
            for op in part
            if op.kind is Kind.WRITE
        ]
        reads = [op for op in part if op.kind is Kind.READ and op.end is not None and op.end < end]
        here = {op.value for op in (*writes, *open_writes)}
        inherited = {op.value: op for op in reads if op.value not in here}
        for value, read in inherited.items():
            if value not in known:
                return Violation(block, "a read saw a value that was never written", (read,))
            if value not in may_begin_with:
                return Violation(block, "a read saw a value older than the last flush", (read,))
        if len(inherited) > 1:
            return Violation(block, "after a loss two different values were seen", tuple(inherited.values()))
        first = next(iter(inherited), None)
        renamed = [replace(op, value=INITIAL) if inherited and op.value == first else op for op in reads]
        violation = check_block(block, [*open_writes, *writes, *renamed])
        if violation is not None:
            return violation
        done = _done_when_seen([*open_writes, *writes], reads)
        may_begin_with = _survivors(may_begin_with, inherited.keys(), done, flushes, begin, end)
        open_writes += [op for op in writes if op.end is None]
    return None


def _done_when_seen(writes: Iterable[Operation], reads: Iterable[Operation]) -> list[Operation]:
    """A write that nobody answered is decided when a read shows it: a flush after that covers it."""
    seen_at: dict[Value | None, float] = {}
    for op in reads:
        assert op.end is not None
        seen_at[op.value] = min(seen_at.get(op.value, math.inf), op.end)
    return [
        replace(op, end=seen_at[op.value], durable=False) if op.end is None and op.value in seen_at else op
        for op in writes
    ]


def _survivors(
    began_with: set[Value | None],
    seen: Iterable[Value | None],
    writes: Sequence[Operation],
    flushes: Sequence[Flush],
    begin: float,
    end: float,
) -> set[Value | None]:
    """Answered writes, and earlier values, that the register may hold after the loss at ``end``."""
    flush_start = max((f.start for f in flushes if f.end < end and f.start >= begin), default=-math.inf)
    answered = [op for op in writes if op.end is not None]
    flushed_from = max(
        (op.start for op in answered if op.durable or op.end < flush_start),  # type: ignore[operator]
        default=None,
    )
    if flushed_from is not None:
        return {op.value for op in answered if op.end >= flushed_from}  # type: ignore[operator]
    earlier = set(seen) if flush_start > -math.inf and seen else set(began_with)
    return earlier | {op.value for op in answered}
