"""NBD clients for system tests: one that reconnects, and a workload that records a history.

Both treat the loss of a connection, and the error ESHUTDOWN, as a pause: they connect again and
repeat what was not answered, as QEMU does with reconnect-delay. Any other error is an answer.

A write that is repeated may be applied twice, and a write of another client in between: NBD has no
name for a request that would outlive its connection. So the workload repeats a write with a new
value, and records the lost one as a write whose outcome is unknown: each value has one effect.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.support.linearizability import (
    BLOCK_BYTES,
    Kind,
    Operation,
    Value,
    decode_tag,
    encode_tag,
)
from tests.support.nbd_library import nbd
from tests.support.processes import wait_until

CONNECT_TIMEOUT_S = 5.0
"""One attempt: a socket may accept while nobody answers yet."""

RECONNECT_TIMEOUT_S = 60.0
RECONNECT_PAUSE_S = 0.02
POLL_MS = 50
"""How often a worker that waits for answers looks whether it should stop."""

Result = TypeVar("Result")


def connect(uri: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> nbd.NBD:
    """One attempt with a deadline. Raises nbd.Error."""
    handle = nbd.NBD()
    # Requests of any alignment are the server's business, and the tests'.
    handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
    handle.add_meta_context("base:allocation")
    handle.aio_connect_uri(uri)
    deadline = time.monotonic() + timeout_s
    while not handle.aio_is_ready():
        remaining_ms = int((deadline - time.monotonic()) * 1000)
        if remaining_ms <= 0 or handle.poll(remaining_ms) == 0:
            raise nbd.Error(f"{uri}: no answer within {timeout_s} s", errno.ETIMEDOUT)
    return handle


def is_alive(handle: nbd.NBD) -> bool:
    """Not simply ``aio_is_ready``: a handle in the middle of a message is not ready, and lives."""
    return not handle.aio_is_dead() and not handle.aio_is_closed()


def connect_patiently(uri: str, *, timeout_s: float = RECONNECT_TIMEOUT_S) -> nbd.NBD:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return connect(uri)
        except nbd.Error:
            if time.monotonic() > deadline:
                raise
        time.sleep(RECONNECT_PAUSE_S)  # the pause of a client that retries, not a guess at readiness


class ReconnectingClient:
    """Synchronous requests that survive the server's restart. Not for use by two threads at once."""

    def __init__(self, uri: str, *, reconnect_timeout_s: float = RECONNECT_TIMEOUT_S) -> None:
        self.uri = uri
        self.reconnect_count = 0
        self._reconnect_timeout_s = reconnect_timeout_s
        self._handle = connect_patiently(uri, timeout_s=reconnect_timeout_s)

    def call(self, request: Callable[[Any], Result]) -> Result:
        while True:
            try:
                return request(self._handle)
            except nbd.Error as error:
                if is_alive(self._handle) and error.errnum != errno.ESHUTDOWN:
                    raise
            self._handle = connect_patiently(self.uri, timeout_s=self._reconnect_timeout_s)
            self.reconnect_count += 1

    def size(self) -> int:
        return int(self.call(lambda h: h.get_size()))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.call(lambda h: h.pread(length, offset)))

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self.call(lambda h: h.pwrite(data, offset, nbd.CMD_FLAG_FUA if fua else 0))

    def flush(self) -> None:
        self.call(lambda h: h.flush())

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(lambda h: h.zero(length, offset, flags))

    def trim(self, offset: int, length: int) -> None:
        self.call(lambda h: h.trim(length, offset))

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, base:allocation state) of consecutive runs."""

        def request(handle: Any) -> list[int]:
            found: list[int] = []
            handle.block_status(length, offset, lambda name, start, entries, error: found.extend(entries))
            return found

        flat = self.call(request)
        return list(zip(flat[::2], flat[1::2], strict=True))

    def close(self) -> None:
        try:
            self._handle.shutdown()
        except nbd.Error:
            pass  # the server is gone, and so is the connection

    def __enter__(self) -> ReconnectingClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(slots=True)
class _Pending:
    """A request that has no answer yet. ``since`` is when its first attempt was sent."""

    kind: Kind
    block: int
    value: Value | None
    start: float
    since: float
    buffer: Any


class Worker(threading.Thread):
    """One connection with ``depth`` requests under way, each one block."""

    def __init__(self, workload: Workload, writer: int, *, depth: int, chance: random.Random) -> None:
        super().__init__(name=f"worker {writer}", daemon=True)
        self.history: list[Operation] = []
        self.errors: list[str] = []
        self.reconnect_count = 0
        self.latency_max_s = 0.0
        self.failure: BaseException | None = None
        self._workload = workload
        self._writer = writer
        self._depth = depth
        self._chance = chance
        self._sequence = 0
        self._next_key = 0
        self._pending: dict[int, _Pending] = {}
        # Used again and again: libnbd's binding never gives up the buffer of an asynchronous request.
        self._buffers: list[Any] = []
        self._answers: list[tuple[int, int]] = []

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that joins
            self.failure = error

    def _run(self) -> None:
        handle = self._connect()
        while not self._workload.stopping or self._pending:
            while len(self._pending) < self._depth and not self._workload.stopping:
                self._send(handle, self._new_request())
            try:
                handle.poll(POLL_MS)
                alive = is_alive(handle)
            except nbd.Error:
                alive = False
            if not self._take_answers(alive=alive) or not alive:
                handle = self._connect()
                self.reconnect_count += 1
                self._repeat_lost(handle)
        handle.shutdown()

    def _connect(self) -> Any:
        self._answers.clear()
        return connect_patiently(self._workload.uri)

    def _new_request(self) -> int:
        block = self._chance.choice(self._workload.blocks)
        read = self._chance.random() < self._workload.read_fraction
        return self._add(Kind.READ if read else Kind.WRITE, block, since=time.monotonic())

    def _add(self, kind: Kind, block: int, *, since: float) -> int:
        value, buffer = None, self._buffers.pop() if self._buffers else nbd.Buffer(BLOCK_BYTES)
        if kind is Kind.WRITE:
            value, self._sequence = Value(self._writer, self._sequence), self._sequence + 1
            memoryview(buffer.to_buffer())[:] = encode_tag(block, value)
        key, self._next_key = self._next_key, self._next_key + 1
        self._pending[key] = _Pending(kind, block, value, time.monotonic(), since, buffer)
        return key

    def _repeat_lost(self, handle: Any) -> None:
        lost, self._pending = self._pending, {}
        for request in lost.values():
            if request.kind is Kind.WRITE:
                self.history.append(Operation(Kind.WRITE, request.block, request.value, request.start, None))
            self._send(handle, self._add(request.kind, request.block, since=request.since))

    def _send(self, handle: Any, key: int) -> None:
        request = self._pending[key]
        answers = self._answers

        def completed(error: Any) -> int:
            answers.append((key, error.value))
            return 1

        try:
            if request.kind is Kind.READ:
                handle.aio_pread(request.buffer, request.block * BLOCK_BYTES, completed)
            else:
                handle.aio_pwrite(request.buffer, request.block * BLOCK_BYTES, completed)
        except nbd.Error:
            return  # the connection is dead; the loop finds that out and sends it again

    def _take_answers(self, *, alive: bool) -> bool:
        """False when the server said that it is going away."""
        now = time.monotonic()
        going_away = False
        taken, self._answers[:] = self._answers[:], []
        for key, error in taken:
            if error == errno.ESHUTDOWN or (error and not alive):
                going_away = True
                continue  # not an answer: it stays pending
            request = self._pending.pop(key)
            self.latency_max_s = max(self.latency_max_s, now - request.since)
            self._record(request, error, now)
            self._buffers.append(request.buffer)
        return not going_away

    def _record(self, request: _Pending, error: int, now: float) -> None:
        end: float | None = now
        if error:
            self.errors.append(f"{request.kind.value} of block {request.block}: {errno.errorcode[error]}")
            if request.kind is Kind.READ:
                return
            end = None  # an error does not say that the write did not happen
        value = request.value
        if request.kind is Kind.READ:
            value = decode_tag(request.block, bytes(request.buffer.to_buffer()))
        self.history.append(Operation(request.kind, request.block, value, request.start, end))
        self._workload.note_answer()


@dataclass(slots=True)
class Workload:
    """Random whole-block reads and writes by several workers; every answer is recorded.

    ::

        with Workload(uri, blocks=range(64), seed=1) as workload:
            workload.wait_for_answers(1000)
            ...                                  # kill something
            workload.wait_for_answers(2000)
        assert workload.errors == []
        assert_linearizable(workload.history)

    When the block ends, what is under way is answered, then every block is read once more. Few
    blocks make conflicts frequent, and conflicts are what the checker feeds on.
    """

    uri: str
    blocks: Sequence[int]
    seed: int
    worker_count: int = 2
    first_writer: int = (
        0  # for histories that are put together: writers of all of them have their own numbers
    )
    depth: int = 8
    read_fraction: float = 0.5
    stop_timeout_s: float = 90.0
    stopping: bool = False
    history: list[Operation] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reconnect_count: int = 0
    _answer_count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _workers: list[Worker] = field(default_factory=list)

    def note_answer(self) -> None:
        with self._lock:
            self._answer_count += 1

    @property
    def answer_count(self) -> int:
        return self._answer_count

    @property
    def latency_max_s(self) -> float:
        """The longest wait for an answer so far, reconnecting included."""
        return max((worker.latency_max_s for worker in self._workers), default=0.0)

    def wait_for_answers(self, count: int, *, timeout_s: float = 60.0) -> None:
        """``count`` more answers than now."""
        goal = self._answer_count + count

        def reached() -> bool:
            for worker in self._workers:
                if worker.failure is not None:
                    raise worker.failure
            return self._answer_count >= goal

        wait_until(reached, timeout_s=timeout_s, what=f"{count} more answers")

    def __enter__(self) -> Workload:
        chance = random.Random(self.seed)
        for writer in range(self.first_writer, self.first_writer + self.worker_count):
            own = random.Random(chance.random())
            self._workers.append(Worker(self, writer, depth=self.depth, chance=own))
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.stopping = True
        for worker in self._workers:
            worker.join(self.stop_timeout_s)
            if kind is None:
                assert not worker.is_alive(), f"{worker.name} still waits for {len(worker._pending)} answers"
                if worker.failure is not None:
                    raise worker.failure
            self.history += worker.history
            self.errors += worker.errors
            self.reconnect_count += worker.reconnect_count
        if kind is None:
            self.history += read_back(self.uri, self.blocks)


def read_back(uri: str, blocks: Sequence[int]) -> list[Operation]:
    """Every block once, as operations for the checker."""
    history = []
    with ReconnectingClient(uri) as client:
        for block in blocks:
            start = time.monotonic()
            raw = client.read(block * BLOCK_BYTES, BLOCK_BYTES)
            history.append(Operation(Kind.READ, block, decode_tag(block, raw), start, time.monotonic()))
    return history
