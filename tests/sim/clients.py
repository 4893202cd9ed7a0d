"""NBD clients: each has a connection to one engine, a queue of one request, and writes down what it saw.

Owns choosing requests, reconnecting, and giving up on an engine that does not answer. Does not own judging
(``history.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protocol.limits import REGION_BLOCKS
from tests.sim.daemons import Control
from tests.sim.engines import EngineProcess
from tests.sim.history import History
from tests.sim.kernel import Future, Process, Sim, Steps

READER_PATIENCE_S = 0.15
"""Of clients that only read: their next request follows whether this one is answered or not."""

ANSWER_S = 0.00005
"""From the engine to a client on the same machine."""


@dataclass(frozen=True)
class Load:
    """What clients of one run do."""

    blocks: tuple[int, ...]
    think_s: float
    read_share: float
    partial_share: float
    flush_share: float
    fua_share: float
    close_share: float  # of requests after which the client cuts its connection
    readers_count: int  # clients that only read, and stay with their engine while it lives
    patience_s: float  # an engine that answers nothing for so long is left for the newest


class Client(Process):
    def __init__(self, sim: Sim, number: int, control: Control, history: History, load: Load) -> None:
        super().__init__(sim, f"c{number}", f"client{number}")
        self.number = number
        self.control = control
        self.history = history
        self.load = load
        self.answered = 0
        self.running = True
        self.engine: EngineProcess | None = None
        self.busy = False
        self.only_reads = number < load.readers_count
        self.spawn(self._run())

    def _run(self) -> Steps:
        random = self.sim.random
        while True:
            yield random.expovariate(1.0) * self.load.think_s
            if not self.running:
                continue
            yield from self._connect()
            self.busy = True
            yield from self._request()
            self.busy = False

    def _connect(self) -> Steps:
        while self.engine is None or not self.engine.alive:
            self.engine = self.control.engines[-1] if self.control.engines else None
            if self.engine is None or not self.engine.alive:
                self.engine = None
                yield 0.02

    def _request(self) -> Steps:
        random, load = self.sim.random, self.load
        block = random.choice(load.blocks)
        chosen = random.random()
        if self.only_reads:
            yield from self.read(block)
        elif chosen < load.flush_share:
            yield from self.flush()
        elif chosen < load.flush_share + load.read_share:
            yield from self.read(block)
        else:
            yield from self._write(block, fua=random.random() < load.fua_share)
        if random.random() < load.close_share:
            self.engine = None

    def _write(self, block: int, *, fua: bool) -> Steps:
        random = self.sim.random
        engine = self.engine
        assert engine is not None
        partial = random.random() < self.load.partial_share
        half = random.randint(0, 1)
        halves = (half,) if partial else (0, 1)
        write_id = self.history.begin_write(self.number, block, halves)
        answer = self._ask()
        if partial:
            engine.write_partial(block, half, write_id, fua=fua, done=answer)
        else:
            engine.write(block, (write_id, write_id), fua=fua, done=answer)
        outcome, _ = yield from self._answer(answer)
        self.history.end_write(write_id, answered=outcome == "", durable=fua)
        self.note("wrote", block, halves, write_id, "fua" if fua else "", outcome or "ok")

    def read(self, block: int) -> Steps:
        start_s = self.sim.now
        engine = self.engine
        assert engine is not None
        answer = self._ask()
        engine.read(block, answer)
        outcome, cells = yield from self._answer(answer)
        if outcome == "":
            self.history.read(block, cells, start_s, may_mix=self.load.partial_share > 0)
        self.note("read", block, cells, outcome or "ok", f"of e{engine.epoch}")
        return outcome

    def flush(self) -> Steps:
        start_s = self.sim.now
        assert self.engine is not None
        answer = self._ask()
        self.engine.flush(answer)
        outcome, _ = yield from self._answer(answer)
        if outcome == "":
            self.history.flushed(start_s)
        self.note("flush", outcome or "ok")
        return outcome

    def _ask(self) -> _Answer:
        engine = self.engine
        assert engine is not None
        answer = _Answer(self)
        engine.clients.append(answer.gone)
        return answer

    def _answer(self, answer: _Answer) -> Steps:
        """What the engine said, or "gone"."""
        self.after(READER_PATIENCE_S if self.only_reads else self.load.patience_s, answer.impatient)
        outcome = yield answer.future
        engine = self.engine
        if engine is not None and answer.gone in engine.clients:
            engine.clients.remove(answer.gone)
        if outcome[0] == "impatient" and self.only_reads:
            pass  # a read that is not answered says nothing; the next may be of another block
        elif outcome[0] in ("gone", "impatient"):
            self.history.unanswered += 1
            self.engine = None
        elif outcome[0]:
            self.history.errors += 1
        else:
            self.answered += 1
        return outcome


class _Answer:
    """An answer on its way from an engine to a client. Callable, as the data plane's ``Done``."""

    def __init__(self, client: Client) -> None:
        self.future = Future()
        self._client = client

    def __call__(self, error: str, value: Any) -> None:
        self._client.after(ANSWER_S, self._settle, (error, value))

    def gone(self) -> None:
        self._client.after(ANSWER_S, self._settle, ("gone", None))

    def impatient(self) -> None:
        newest = self._client.control.engines[-1]
        if not self.future.done and (self._client.only_reads or self._client.engine is not newest):
            self._settle(("impatient", None))
        elif not self.future.done:
            self._client.after(self._client.load.patience_s, self.impatient)

    def _settle(self, outcome: tuple[str, Any]) -> None:
        self.future.set(outcome)


def blocks_of(region_count: int, per_region: int) -> tuple[int, ...]:
    return tuple(
        region * REGION_BLOCKS + index for region in range(region_count) for index in range(per_region)
    )
