"""How long a client waits when a part of Dolmen dies: real kills under one writer.

Owns the faults, the writer and the finding of the longest gap between two completions. Does not own what
heals the volume (Dolmen does, and we wait for it between repeats).

Promises: a gap counts from the last completion before it to the first after it, whatever the client had to
do in between; an error that the client saw is a failure, not a gap; after a repeat the volume is healthy
again, or the rest is reported as failed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import record
from bench.nbdclient import Client, ServerFailed, socket_and_export
from bench.network import NetworkUnavailable, private_network
from bench.processes import ProcessFailed
from bench.record import GaugeRecord
from bench.runner import Plan, Progress, Session, session, start_and_fill
from bench.systems import Dolmen

BLOCK_BYTES = 4096

BEFORE_S = 1.0
"""Load before the fault: the longest gap in it is the noise of this machine, and is shown beside."""

AFTER_S = 4.0
"""Load after the fault: more than twice the longest stall that is allowed."""

HEALTHY_TIMEOUT_S = 60.0
"""A killed replica is back and resynced well within this, or the measurement says that it is not."""

POLL_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """``shown``: what the daemon shows of the volume."""

    system: Dolmen
    shown: Mapping[str, Any]
    chance: random.Random

    def any_replica(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.chance.choice(self.shown["replicas"])
        return found


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    text: str
    strike: Callable[[Target], Callable[[], None]]
    """Returns what undoes the fault."""
    needs_network: bool = False


def _kill(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGKILL)
    return lambda: None


def _stop(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


def _vanish(target: Target) -> Callable[[], None]:
    network = target.system.network
    assert network is not None, "a fault that needs a network is struck only in one"
    network.drop(target.system.replica_ports()[target.any_replica()["id"]])
    return network.heal


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault(
            "stall-replica-killed",
            "SIGKILL to a replica server",
            lambda target: _kill(int(target.any_replica()["pid"])),
        ),
        Fault(
            "stall-replica-stopped",
            "SIGSTOP to a replica server: it stays connected and is silent",
            lambda target: _stop(int(target.any_replica()["pid"])),
        ),
        Fault(
            "stall-replica-vanished",
            "every packet to and from a replica server is dropped",
            _vanish,
            needs_network=True,
        ),
        Fault(
            "stall-engine-killed",
            "SIGKILL to the engine; the client connects again",
            lambda target: _kill(int(target.shown["engine"]["pid"])),
        ),
    )
}


@dataclass(slots=True)
class Writer:
    """Writes random blocks one at a time, in a thread, and keeps the time of every completion."""

    client: Client
    block_count: int
    seed: int
    completions_s: list[float] = field(default_factory=list)
    failure: str | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def _run(self) -> None:
        choice = random.Random(self.seed)
        data = choice.randbytes(BLOCK_BYTES)
        try:
            while not self._stop.is_set():
                self.client.write(choice.randrange(self.block_count) * BLOCK_BYTES, data)
                self.completions_s.append(time.monotonic())
        except ServerFailed as error:
            self.failure = str(error)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        self.client.connect(time.monotonic() + 10.0)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
            self.client.close()


def longest_gap_s(completions_s: Sequence[float], from_s: float, until_s: float) -> float:
    """The longest time without a completion that touches [from_s, until_s]; the whole of it if there is none.

    A gap still open at ``until_s`` counts up to there.
    """
    longest, last = 0.0, from_s
    for at_s in completions_s:
        if at_s < from_s:
            last = at_s
            continue
        longest = max(longest, min(at_s, until_s) - last)
        if at_s >= until_s:
            return longest
        last = at_s
    return max(longest, until_s - last)


@dataclass(frozen=True, slots=True)
class Stall:
    gap_ms: float
    noise_ms: float
    """The longest gap before the fault."""


def measure_stall(system: Dolmen, fault: Fault, seed: int) -> Stall:
    """One fault under load. Raises ServerFailed or ProcessFailed."""
    path, export = socket_and_export(system.uri)
    writer = Writer(Client(path, export), system.size_bytes // BLOCK_BYTES, seed)
    undo: Callable[[], None] | None = None
    shown = system.show()
    with writer.writing():
        begun_s = time.monotonic()
        time.sleep(BEFORE_S)
        struck_s = time.monotonic()
        try:
            undo = fault.strike(Target(system, shown, random.Random(seed)))
            time.sleep(AFTER_S)
            ended_s = time.monotonic()
        finally:
            if undo is not None:
                undo()
    if writer.failure:
        raise ServerFailed(writer.failure)
    return Stall(
        1e3 * longest_gap_s(writer.completions_s, struck_s, ended_s),
        1e3 * longest_gap_s(writer.completions_s, begun_s, struck_s),
    )


def wait_until_healthy(system: Dolmen) -> None:
    """Raises ProcessFailed."""
    deadline_s = time.monotonic() + HEALTHY_TIMEOUT_S
    while (state := system.show()["state"]) != "healthy":
        if time.monotonic() > deadline_s:
            raise ProcessFailed(f"the volume is {state}, not healthy, after {HEALTHY_TIMEOUT_S:.0f} s")
        time.sleep(POLL_INTERVAL_S)


def failover(plan: Plan, faults: Sequence[str], repeats: int, progress: Progress) -> Path:
    """Strike each fault ``repeats`` times; returns the file of records."""
    with session(plan) as running, ExitStack() as stack:
        progress("start and fill dolmen", 0)
        system = running.systems[Dolmen.name]
        assert isinstance(system, Dolmen)
        missing = None
        if any(FAULTS[name].needs_network for name in faults):
            try:
                system.network = stack.enter_context(private_network())
            except NetworkUnavailable as error:
                missing = str(error)
        start_and_fill(running, Dolmen.name)
        for index, name in enumerate(faults):
            reason = running.broken.get(Dolmen.name) or (missing if FAULTS[name].needs_network else None)
            if reason:
                record.append(running.file, [_gauge(running, FAULTS[name], [], reason)])
                continue

            def say(repeat: int, name: str = name, done: int = index * repeats) -> None:
                progress(f"{name} {repeat + 1}/{repeats}", 1 + done + repeat)

            record.append(running.file, [_repeat(running, system, FAULTS[name], repeats, say)])
        progress("stopping", 1 + len(faults) * repeats)
        return running.file


def _repeat(
    running: Session, system: Dolmen, fault: Fault, repeats: int, say: Callable[[int], None]
) -> GaugeRecord:
    stalls: list[Stall] = []
    failure = None
    for repeat in range(repeats):
        say(repeat)
        try:
            wait_until_healthy(system)
            stalls.append(measure_stall(system, fault, running.plan.seed + repeat))
        except (ServerFailed, ProcessFailed, OSError) as error:
            failure = f"repeat {repeat + 1} of {repeats}: {error}"
            break
    return _gauge(running, fault, stalls, failure)


def _gauge(running: Session, fault: Fault, stalls: Sequence[Stall], failure: str | None) -> GaugeRecord:
    noise_ms = max((stall.noise_ms for stall in stalls), default=0.0)
    method = (
        f"{fault.text} under one writer of 4 KiB; longest time between two completions;"
        f" in the second before the fault it was {noise_ms:.1f} ms at most"
    )
    return GaugeRecord(
        run=running.run,
        commit=running.commit,
        machine=running.machine,
        system=Dolmen.name,
        name=fault.name,
        unit="ms",
        method=method,
        values=tuple(stall.gap_ms for stall in stalls),
        failure=failure,
    )
