"""The simulated network: connections between processes on hosts, each direction with its own delay.

Owns order, delay, loss and resets. In one direction of one connection messages stay in order; between
connections nothing is ordered. A one-way block holds what is sent, as TCP's retransmission does, until it is
lifted. A reset delivers some of what was under way and then tells both sides, each when it hears of it.

Does not own what messages mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from protocol.errors import Unreachable
from tests.sim.kernel import Future, Process, Sim, Steps, expire

RETRANSMIT_MAX_S = 0.3
"""After a block is lifted the first packet goes out at the next retransmission."""


class _Closed:
    """Travels in order behind the messages before it."""


CLOSED = _Closed()


class Endpoint:
    """One end of a connection, owned by a process. ``on_message`` and ``on_closed`` are set by the owner."""

    def __init__(self, network: Network, owner: Process, number: int) -> None:
        self.network = network
        self.owner = owner
        self.number = number
        self.open = True
        self.peer: Endpoint
        self.on_message: Callable[[Any], None] | None = None
        self.on_closed: Callable[[], None] | None = None
        self._early: list[Any] = []  # came before somebody listened
        self._queue: deque[tuple[float, Any]] = deque()  # under way to the peer
        self._pumping = False
        self._last_at = 0.0
        owner.endpoints[number] = self

    def send(self, message: Any) -> None:
        if self.open:
            self._put(message)

    def _put(self, message: Any) -> None:
        sim = self.network.sim
        at = sim.now + self.network.delay_s(self.owner.host, self.peer.owner.host)
        at = self._last_at = max(at, self._last_at)
        self._queue.append((at, message))
        self._pump()

    def _pump(self) -> None:
        if not self._pumping and self._queue:
            self._pumping = True
            sim = self.network.sim
            sim.after(max(0.0, self._queue[0][0] - sim.now), self._arrive)

    def _arrive(self) -> None:
        self._pumping = False
        if not self._queue:
            return
        if self.network.is_blocked(self.owner.host, self.peer.owner.host):
            self.network.stalled.append(self)
            return
        _, message = self._queue.popleft()
        self.peer.receive(message)
        self._pump()

    def retransmit(self) -> None:
        sim = self.network.sim
        if not self._pumping and self._queue:
            self._pumping = True
            sim.after(sim.random.uniform(0.0, RETRANSMIT_MAX_S), self._arrive)

    def receive(self, message: Any) -> None:
        if not self.owner.alive:
            # Its process is gone without a word (power loss): whoever answers there now knows nothing of it.
            if self.peer.open and message is not CLOSED:
                self._put(CLOSED)
            return
        self.owner.fire(self._take, (message,))

    def _take(self, message: Any) -> None:
        if not self.open:
            return
        if message is CLOSED:
            self._shut()
            if self.on_closed is not None:
                self.on_closed()
        elif self.on_message is not None:
            self.on_message(message)
        else:
            self._early.append(message)

    def listen(self, on_message: Callable[[Any], None], on_closed: Callable[[], None]) -> None:
        self.on_message, self.on_closed = on_message, on_closed
        early, self._early = self._early, []
        for message in early:
            if self.open:
                on_message(message)

    def close(self) -> None:
        """From our side. What was sent still arrives, then the peer hears of it."""
        if self.open:
            self._put(CLOSED)
            self._shut()

    def _shut(self) -> None:
        self.open = False
        self.owner.endpoints.pop(self.number, None)

    def reset(self) -> None:
        """The connection breaks: some of what is under way arrives, then each side hears of it."""
        for end in (self, self.peer):
            end._cut()
            if end.open:
                end._put(CLOSED)

    def _cut(self) -> None:
        keep = self.network.sim.random.randint(0, len(self._queue))
        while len(self._queue) > keep:
            self._queue.pop()

    def owner_died(self, *, silently: bool) -> None:
        self._cut()
        if not silently:
            self._put(CLOSED)
        else:
            self._queue.clear()
        self.open = False


class Network:
    def __init__(self, sim: Sim, *, base_s: float, jitter_s: float) -> None:
        self.sim = sim
        self.base_s = base_s
        self.jitter_s = jitter_s
        self.slow_s: dict[tuple[str, str], float] = {}  # extra delay of a direction
        self.stalled: list[Endpoint] = []
        self.listeners: dict[str, Process] = {}  # by address, which names a process's place
        self._blocked: dict[tuple[str, str], int] = {}
        self._down: set[str] = set()  # hosts without power
        self._number = 0

    def delay_s(self, source: str, target: str) -> float:
        if source == target:
            return self.sim.random.uniform(0.00001, 0.0001)
        extra = self.slow_s.get((source, target), 0.0)
        return self.base_s + self.sim.random.expovariate(1.0) * self.jitter_s + extra

    def is_blocked(self, source: str, target: str) -> bool:
        return (source, target) in self._blocked or source in self._down or target in self._down

    def power(self, host: str, on: bool) -> None:
        if on:
            self._down.discard(host)
            self._release()
        else:
            self._down.add(host)

    def block(self, source: str, target: str) -> None:
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def unblock(self, source: str, target: str) -> None:
        left = self._blocked.get((source, target), 0) - 1
        if left > 0:
            self._blocked[source, target] = left
            return
        self._blocked.pop((source, target), None)
        self._release()

    def _release(self) -> None:
        waiting, self.stalled = self.stalled, []
        for end in waiting:
            if self.is_blocked(end.owner.host, end.peer.owner.host):
                self.stalled.append(end)
            else:
                end.retransmit()

    def heal(self) -> None:
        self.slow_s.clear()
        for source, target in list(self._blocked):
            self._blocked[source, target] = 1
            self.unblock(source, target)

    def join(self, one: Process, other: Process) -> tuple[Endpoint, Endpoint]:
        """A connection that is there at once."""
        self._number += 2
        first, second = Endpoint(self, one, self._number), Endpoint(self, other, self._number + 1)
        first.peer, second.peer = second, first
        return first, second

    def connect(self, client: Process, address: str, hello: Any, *, timeout_s: float) -> Steps:
        """A connection past its hello, and the server's greeting. Raises Unreachable, Timeout, or what the
        server refused with."""
        there = address.partition(":")[0]
        if self.is_blocked(client.host, there) or self.is_blocked(there, client.host):
            yield timeout_s
            raise Unreachable(peer=address, reason="no answer")
        yield self.delay_s(client.host, there) + self.delay_s(there, client.host)
        server = self.listeners.get(address)
        if server is None or not server.alive:
            raise Unreachable(peer=address, reason="connection refused")
        mine, theirs = self.join(client, server)
        answer = Future()

        def on_message(message: Any) -> None:
            kind, value = message
            if kind == "welcome":
                mine.on_message = mine.on_closed = None
                answer.set(value)
            else:
                mine.close()
                answer.fail(value)

        mine.listen(on_message, lambda: answer.fail(Unreachable(peer=address, reason="hung up")))
        server.fire(server.accept, (theirs, hello))  # type: ignore[attr-defined]  # every listener has it
        expire(client, answer, timeout_s, f"hello at {address}")
        try:
            greeting = yield answer
        except BaseException:
            mine.close()
            raise
        return mine, greeting


class Calls:
    """Control messages over one connection, from the caller's side: protocol/rpc.py on virtual time."""

    def __init__(self, process: Process, end: Endpoint, peer: str) -> None:
        self.lost = Future()
        self._process = process
        self._end = end
        self._peer = peer
        self._waiting: dict[int, Future] = {}
        self._number = 0
        end.listen(self._on_message, self._on_closed)

    def call(self, name: str, *, timeout_s: float, **args: Any) -> Steps:
        """Raises the peer's error, Unreachable when the connection is lost, or Timeout."""
        if not self._end.open:
            raise Unreachable(peer=self._peer, reason="connection lost")
        self._number += 1
        number, answer = self._number, Future()
        self._waiting[number] = answer
        self._end.send((number, name, args))
        expire(self._process, answer, timeout_s, f"{name} at {self._peer}")
        try:
            result = yield answer
        finally:
            self._waiting.pop(number, None)
        return result

    def _on_message(self, message: Any) -> None:
        number, result, error = message
        answer = self._waiting.get(number)
        if answer is None:
            return
        if error is not None:
            answer.fail(error)
        else:
            answer.set(result)

    def _on_closed(self) -> None:
        self.lost.set()
        for answer in list(self._waiting.values()):
            answer.fail(Unreachable(peer=self._peer, reason="connection lost"))

    def close(self) -> None:
        self._end.close()
        self._on_closed()
