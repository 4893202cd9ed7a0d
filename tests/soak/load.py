"""What the soak's clients do, and how they know that every answer is right.

Two kinds at once, each in its own part of the volume:

- *registers*: few blocks, several connections, deep queues; each window's history is checked for
  linearizability. A window begins with what the last one's end read.
- *shadow*: one connection, requests of every kind, size and alignment, compared with a copy in memory.

Owns these clients. Does not own the faults. Promises: an answer that cannot be right raises, or stands in
``mismatches``; a connection that is lost is made again and is no error.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.linearizability import BLOCK_BYTES, Kind, Operation, Value, check
from tests.support.nbd_clients import ReconnectingClient, Workload

MIB = 1024 * 1024
REGISTER_COUNT = 96
REGISTER_WORKERS = 2
REGISTER_DEPTH = 4

SHADOW_OFFSET = 8 * MIB
SHADOW_BYTES = 24 * MIB
SHADOW_REQUEST_BYTES_MAX = 2 * MIB
SHADOW_PAUSE_S = 0.002
"""Between its requests, so that the registers' clients and the servers get a share of a small machine."""

VIOLATIONS_KEPT_MAX = 20

BEFORE_EVERYTHING_S = 0.0


@dataclass(slots=True)
class Registers:
    """Successive windows over the same blocks."""

    uri: str
    chance: random.Random
    operation_count: int = 0
    reconnect_count: int = 0
    violations: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stall_max_s: float = 0.0  # of the last window
    _known: dict[int, Value] = field(default_factory=dict)
    _window_count: int = 0

    @contextlib.contextmanager
    def window(self) -> Iterator[Workload]:
        """Load while the block lasts; when it ends, what was answered is checked."""
        workload = Workload(
            self.uri,
            blocks=range(REGISTER_COUNT),
            seed=self.chance.randrange(2**32),
            worker_count=REGISTER_WORKERS,
            first_writer=1 + self._window_count * REGISTER_WORKERS,
            depth=REGISTER_DEPTH,
        )
        self._window_count += 1
        with workload:
            yield workload
        self._judge(workload)

    def _judge(self, workload: Workload) -> None:
        before = [
            Operation(Kind.WRITE, block, value, BEFORE_EVERYTHING_S, BEFORE_EVERYTHING_S)
            for block, value in self._known.items()
        ]
        self.violations += [str(found) for found in check([*before, *workload.history])]
        del self.violations[VIOLATIONS_KEPT_MAX:]
        self.errors += workload.errors
        self.operation_count += len(workload.history)
        self.reconnect_count += workload.reconnect_count
        self.stall_max_s = workload.latency_max_s
        # The last read of each block has decided what it holds.
        last = {op.block: op for op in workload.history[-REGISTER_COUNT:]}
        self._known = {block: op.value for block, op in last.items() if op.value is not None}


class Shadow(threading.Thread):
    """Requests of every kind, one at a time, until ``stop``."""

    def __init__(self, uri: str, seed: int) -> None:
        super().__init__(name="shadow", daemon=True)
        self.operations: dict[str, int] = {}
        self.mismatches: list[str] = []
        self.failure: BaseException | None = None
        self.reconnect_count = 0
        self._uri = uri
        self._chance = random.Random(seed)
        self._copy = bytearray(SHADOW_BYTES)
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        self._stall_max_s = 0.0

    def stop(self) -> None:
        """What is under way is answered; then all of it is read once more."""
        self._ending.set()
        self.join()
        if self.failure is not None:
            raise self.failure

    def take_stall_max_s(self) -> float:
        """The longest request since the last look, one that still waits included."""
        with self._lock:
            longest = max(self._stall_max_s, time.monotonic() - self._began_s)
            self._stall_max_s = 0.0
        return longest

    def run(self) -> None:
        try:
            with ReconnectingClient(self._uri) as client:
                while not self._ending.wait(SHADOW_PAUSE_S):
                    self._one(client)
                for at in range(0, SHADOW_BYTES, SHADOW_REQUEST_BYTES_MAX):
                    self._read(client, at, SHADOW_REQUEST_BYTES_MAX)
                self.reconnect_count = client.reconnect_count
        except BaseException as error:  # noqa: BLE001 - handed to the thread that stops it
            self.failure = error

    def _one(self, client: ReconnectingClient) -> None:
        chance = self._chance
        kind = chance.choices(("write", "read", "zero", "trim", "flush", "fua"), (40, 40, 6, 5, 5, 4))[0]
        length = min(int(chance.paretovariate(0.6) * 512), SHADOW_REQUEST_BYTES_MAX)
        if chance.random() < 0.5:
            length = -(-length // BLOCK_BYTES) * BLOCK_BYTES
        at = chance.randrange(SHADOW_BYTES - length + 1)
        if chance.random() < 0.7:
            at -= at % BLOCK_BYTES
        with self._lock:
            self._began_s = time.monotonic()
        self._perform(client, kind, at, length)
        with self._lock:
            now = time.monotonic()
            self._stall_max_s = max(self._stall_max_s, now - self._began_s)
            self._began_s = now
        self.operations[kind] = self.operations.get(kind, 0) + 1

    def _perform(self, client: ReconnectingClient, kind: str, at: int, length: int) -> None:
        where = SHADOW_OFFSET + at
        match kind:
            case "write" | "fua":
                data = self._chance.randbytes(min(length, 4096)) * (length // 4096 + 1)
                client.write(where, data[:length], fua=kind == "fua")
                self._copy[at : at + length] = data[:length]
            case "zero":
                client.zero(where, length)
                self._copy[at : at + length] = bytes(length)
            case "trim":
                client.trim(where, length)
                # Any content may be there now, but one and the same from the first read on.
                self._copy[at : at + length] = client.read(where, length)
            case "flush":
                client.flush()
            case _:
                self._read(client, at, length)

    def _read(self, client: ReconnectingClient, at: int, length: int) -> None:
        found = client.read(SHADOW_OFFSET + at, length)
        wanted = self._copy[at : at + length]
        if found != wanted and len(self.mismatches) < VIOLATIONS_KEPT_MAX:
            first = next(i for i in range(length) if found[i] != wanted[i])
            self.mismatches.append(
                f"at byte {SHADOW_OFFSET + at + first}: {found[first : first + 16].hex()} "
                f"instead of {bytes(wanted[first : first + 16]).hex()}"
            )
