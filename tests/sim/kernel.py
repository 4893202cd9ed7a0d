"""Virtual time: a heap of what happens when, processes that can be stopped and killed, and tasks.

Owns the clock, the only source of chance of a run, and the trace. Does not own what processes do.

Promises: one seed, one run. Nothing here reads a clock, a global random or the order of a set; two things due
at one moment happen in the order in which they were asked for.

A task is a generator: it yields a number of seconds, or a Future, and goes on when that is over. It ends with
its process, at whatever it was waiting for, which is what a kill does to a real one.
"""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from random import Random
from typing import Any

from protocol.errors import StorageError, Timeout

Steps = Generator[Any, Any, Any]
Call = tuple[Callable[..., None], tuple[Any, ...]]

EVENTS_MAX = 400_000
"""Of one run. A healthy one takes some ten thousand; past this something spins, and that is a finding."""


class Runaway(AssertionError):
    """The run does not come to rest: somebody retries without a pause."""


class Sim:
    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.event_count = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._trace = trace

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, call, args))

    def run(self, *, until_s: float, stop: Callable[[], bool] | None = None) -> bool:
        """Let things happen until ``until_s``. True if ``stop`` said so before."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now, _, call, args = heapq.heappop(heap)
            self.event_count += 1
            if self.event_count > EVENTS_MAX:
                raise Runaway(f"{EVENTS_MAX} events at {self.now:.3f} s")
            call(*args)
            if stop is not None and stop():
                return True
        self.now = until_s
        return False

    @property
    def traced(self) -> bool:
        return self._trace is not None

    def note(self, who: str, what: str, *fields: object) -> None:
        if self._trace is not None:
            line = f"{self.now:12.6f} {who:<8} {what} {' '.join(map(str, fields))}".rstrip()
            self._trace(_SET.sub(_sorted_set, line))


_SET = re.compile(r"frozenset\(\{(.*?)\}\)")


def _sorted_set(found: re.Match[str]) -> str:
    """A set prints in an order that changes from process to process."""
    return "{" + ", ".join(sorted(found[1].split(", "))) + "}"


class Future:
    """A value or an error that comes later; one task waits for it at most, others look at ``done``."""

    __slots__ = ("_waiting", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: StorageError | None = None
        self._waiting: list[Callable[[], None]] = []

    def set(self, value: Any = None) -> None:
        self._settle(value, None)

    def fail(self, error: StorageError) -> None:
        self._settle(None, error)

    def _settle(self, value: Any, error: StorageError | None) -> None:
        if self.done:
            return
        self.done, self.value, self.error = True, value, error
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def when_done(self, call: Callable[[], None]) -> None:
        if self.done:
            call()
        else:
            self._waiting.append(call)


class Process:
    """Something that can be stopped (SIGSTOP), continued and killed. What comes for it while it is stopped
    waits; what comes after its death is lost."""

    def __init__(self, sim: Sim, name: str, host: str) -> None:
        self.sim = sim
        self.name = name
        self.host = host
        self.alive = True
        self.paused = False
        self._backlog: deque[Call] = deque()
        self.endpoints: dict[int, Any] = {}  # network.Endpoint, by number

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self.sim.after(delay_s, self.fire, call, args)

    def fire(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.alive:
            return
        if self.paused:
            self._backlog.append((call, args))
        else:
            call(*args)

    def note(self, what: str, *fields: object) -> None:
        self.sim.note(self.name, what, *fields)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """What waited happens in the order in which it came, each as an event of its own."""
        if not self.paused:
            return
        self.paused = False
        backlog, self._backlog = self._backlog, deque()
        for call, args in backlog:
            self.sim.after(0.0, self.fire, call, args)

    def kill(self, *, power: bool = False) -> None:
        """The process is gone. Its sockets are closed by the kernel, unless that went too (``power``)."""
        if not self.alive:
            return
        self.alive = False
        self._backlog.clear()
        for endpoint in list(self.endpoints.values()):
            endpoint.owner_died(silently=power)
        self.endpoints.clear()

    def spawn(self, steps: Steps) -> Task:
        task = Task(self, steps)
        task.step()
        return task


class Task:
    """A generator that a process runs. ``result`` is settled when it ends."""

    __slots__ = ("_process", "_steps", "result")

    def __init__(self, process: Process, steps: Steps) -> None:
        self._process = process
        self._steps = steps
        self.result = Future()

    def step(self, value: Any = None, error: StorageError | None = None) -> None:
        if self.result.done:
            return
        while True:
            try:
                waits_for = self._steps.throw(error) if error is not None else self._steps.send(value)
            except StopIteration as end:
                self.result.set(end.value)
                return
            except StorageError as failure:
                self.result.fail(failure)
                return
            if isinstance(waits_for, Future):
                if waits_for.done:
                    value, error = waits_for.value, waits_for.error
                    continue
                # Not at once: who settles it may be in the middle of something, as with asyncio.
                future = waits_for
                future.when_done(partial(self._process.after, 0.0, self._resume, future))
            else:
                self._process.after(waits_for, self.step)
            return

    def _resume(self, future: Future) -> None:
        self.step(future.value, future.error)

    def cancel(self, error: StorageError | None = None) -> None:
        """It ends where it is. Who waits for it gets ``error``; without one nobody hears of it."""
        if self.result.done:
            return
        if error is None:
            self.result.done = True
        else:
            self.result.fail(error)
        self._steps.close()


class Lock:
    """First come, first served. A task that is cancelled in between gives it back by ``finally``."""

    def __init__(self) -> None:
        self._held = False
        self._queue: deque[Future] = deque()

    def take(self) -> Steps:
        if self._held:
            turn = Future()
            self._queue.append(turn)
            try:
                yield turn
            except GeneratorExit:  # cancelled while it waited
                if turn.done:
                    self.give()
                else:
                    self._queue.remove(turn)
                raise
        else:
            self._held = True

    def give(self) -> None:
        if self._queue:
            self._queue.popleft().set()
        else:
            self._held = False


def expire(process: Process, future: Future, timeout_s: float, what: str) -> None:
    """Fail ``future`` if it is not settled in time."""

    def late() -> None:
        if not future.done:
            future.fail(Timeout(what=what, timeout_s=timeout_s))

    process.after(timeout_s, late)
