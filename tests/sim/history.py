"""What clients saw, and when which of it may rightly be gone.

Owns the recorded operations, flushes and losses of a run, and the judgement at its end. Does not own how the
judgement is made: ``tests/support/linearizability.py``.

A *loss* is a moment at which no replica that counts can vouch for what was acknowledged and not flushed:
every replica that all records name which may be durable (the *floor*) lost its page cache, or its directory,
since it was last made equal to the others. Anything less must lose nothing."""

from __future__ import annotations

from engine.phase import VolumePhase
from tests.sim.engines import EngineProcess
from tests.sim.kernel import Sim
from tests.support.linearizability import (
    INITIAL,
    Flush,
    Kind,
    Operation,
    Value,
    check_with_losses,
)

Cells = tuple[int, int]


class History:
    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.operations: list[Operation] = []
        self.flushes: list[Flush] = []
        self.losses: list[float] = []
        self.mixed: list[str] = []  # blocks that showed a mix though nobody writes parts of them
        self.starts_with_anything = False
        self.errors = 0
        self.unanswered = 0
        self._writers: dict[int, int] = {}  # write id -> client
        self._under_way: dict[int, tuple[int, tuple[int, ...], float]] = {}
        self._next_id = 0

    def begin_write(self, client: int, block: int, halves: tuple[int, ...]) -> int:
        self._next_id += 1
        self._writers[self._next_id] = client
        self._under_way[self._next_id] = (block, halves, self.sim.now)
        return self._next_id

    def end_write(self, write_id: int, *, answered: bool, durable: bool) -> None:
        """Not answered, or answered with an error: it may have happened or not, or happen yet."""
        block, halves, start_s = self._under_way.pop(write_id)
        end = self.sim.now if answered else None
        value = Value(self._writers[write_id], write_id)
        for half in halves:
            at = 2 * block + half
            self.operations.append(Operation(Kind.WRITE, at, value, start_s, end, durable and answered))

    def read(self, block: int, cells: Cells, start_s: float, *, may_mix: bool) -> None:
        for half, write_id in enumerate(cells):
            value = Value(self._writers[write_id], write_id) if write_id else INITIAL
            self.operations.append(Operation(Kind.READ, 2 * block + half, value, start_s, self.sim.now))
        torn = self.losses or self.starts_with_anything  # by a power loss: a mix of what was not flushed
        if cells[0] != cells[1] and not may_mix and not torn:
            self.mixed.append(f"block {block} reads as a mix {cells} at {self.sim.now:.3f}")

    def flushed(self, start_s: float) -> None:
        self.flushes.append(Flush(start_s, self.sim.now))

    def start_over(self) -> None:
        """Nothing that was said before binds any more."""
        self.operations.clear()
        self.flushes.clear()
        self.losses.clear()
        self.mixed.clear()
        self.starts_with_anything = True

    def judge(self) -> None:
        open_writes = [
            Operation(Kind.WRITE, 2 * block + half, Value(self._writers[write_id], write_id), start_s, None)
            for write_id, (block, halves, start_s) in self._under_way.items()
            for half in halves
        ]
        anything = frozenset(Value(writer, number) for number, writer in self._writers.items())
        begins_with = anything if self.starts_with_anything else frozenset()
        violations = check_with_losses(
            [*self.operations, *open_writes], self.flushes, self.losses, begins_with | {INITIAL}
        )
        assert not violations, f"{len(violations)} halves of blocks are not linearizable:\n" + "\n".join(
            f"(block {violation.block // 2}, half {violation.block % 2}) {violation}"
            for violation in violations[:3]
        )
        assert not self.mixed, self.mixed[0]


class Oracle:
    """Knows from outside what must survive."""

    def __init__(self, sim: Sim, history: History, replica_ids: list[str]) -> None:
        self.sim = sim
        self.history = history
        self.epoch = 0
        self.floor = frozenset(replica_ids)
        self.sound_since = dict.fromkeys(replica_ids, 0.0)  # made equal to the others
        self.lost_at = dict.fromkeys(replica_ids, -1.0)
        self.put_back_at = dict.fromkeys(replica_ids, -1.0)
        self.decided_epoch = 0
        self.served: dict[int, EngineProcess] = {}

    def watch(self, engine: EngineProcess) -> None:
        """After each step of an engine's machine."""
        volume = engine.volume
        ledger = volume.ledger
        if ledger is None or engine.epoch < self.epoch or not engine.alive:
            return
        if not ledger.opened:
            # Its first record may be durable somewhere, and then it counts, whoever is left out by it.
            self.floor &= ledger.latest.in_sync
            return
        if volume.phase is VolumePhase.SERVING:
            known = self.served.setdefault(engine.epoch, engine)
            assert known is engine, f"two engines serve in epoch {engine.epoch}"
        self.epoch = engine.epoch
        floor = ledger.floor & ledger.committed.in_sync
        if ledger.proposed is not None:
            floor &= ledger.proposed.in_sync
        if floor != self.floor:
            for replica_id in sorted(floor - self.floor):
                self.sound_since[replica_id] = self.sim.now
            self.floor = floor
        equal = volume.phase is VolumePhase.SERVING and volume.reconcile is None
        if equal and self.decided_epoch < engine.epoch:
            self.decided_epoch = engine.epoch
            for replica_id in sorted(floor):
                self.sound_since[replica_id] = self.sim.now

    def lost(self, replica_id: str) -> None:
        """It may lack what was acknowledged and not flushed, or more."""
        self.lost_at[replica_id] = self.sim.now
        if all(self.lost_at[r] >= self.sound_since[r] for r in self.floor):
            self.history.losses.append(self.sim.now)
            self.sim.note("oracle", "loss", sorted(self.floor))

    def put_back(self, replica_id: str) -> None:
        """Its directory is an older copy: it lacks what was flushed, too."""
        self.put_back_at[replica_id] = self.sim.now
        self.lost(replica_id)
