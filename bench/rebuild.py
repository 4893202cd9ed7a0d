"""How fast a lost replica is filled again, and what a client notices of it.

Owns the steps, the plain copy beside them and the client's latencies. Does not own the rebuild (Dolmen's).

One replica's server is killed and its directory removed; the server is started again and told to make the
replica anew. The time counts from that order to the record that names the replica in sync. Three figures,
each formed inside one repeat: the rate against a plain copy of the same bytes (``dd``, 1 MiB at a time, with
an fsync at the end) in the same directory a moment before; the client's p99 while a rebuild runs against its
p99 just before; and the rate under that client.

Promises: an error that the client saw is a failure; after a repeat the volume is healthy, or the rest is
reported as failed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import record
from bench.failover import BLOCK_BYTES, POLL_INTERVAL_S, wait_until_healthy
from bench.nbdclient import Client, ServerFailed, socket_and_export
from bench.processes import ProcessFailed
from bench.record import GaugeRecord
from bench.runner import Plan, Progress, Session, session, start_and_fill
from bench.systems import Dolmen

BEFORE_S = 8.0
"""Of the client alone, for its p99: a few ten thousand requests."""

REBUILD_TIMEOUT_S = 600.0
COPY_TIMEOUT_S = 600.0
STEPS_PER_REPEAT = 3
MIB = 1024 * 1024


@dataclass(slots=True)
class Writer:
    """Random 4 KiB writes, one at a time, in a thread; keeps when each ended and how long it took."""

    client: Client
    block_count: int
    seed: int
    seen: list[tuple[float, float]] = field(default_factory=list)
    failure: str | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def _run(self) -> None:
        choice = random.Random(self.seed)
        data = choice.randbytes(BLOCK_BYTES)
        try:
            while not self._stop.is_set():
                begun_s = time.monotonic()
                self.client.write(choice.randrange(self.block_count) * BLOCK_BYTES, data)
                ended_s = time.monotonic()
                self.seen.append((ended_s, ended_s - begun_s))
        except ServerFailed as error:
            self.failure = str(error)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        self.client.connect(time.monotonic() + 10.0)
        thread = threading.Thread(target=self._run, name="writer", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            self.client.close()

    def p99_ms(self, from_s: float, until_s: float) -> float:
        """Raises ServerFailed when the client saw an error, or nothing."""
        taken_s = sorted(taken for at_s, taken in self.seen if from_s <= at_s <= until_s)
        if self.failure or not taken_s:
            raise ServerFailed(self.failure or "no request was answered")
        return 1e3 * taken_s[min(len(taken_s) - 1, int(0.99 * len(taken_s)))]


@dataclass(frozen=True, slots=True)
class Result:
    copied_mib_s: float
    idle_mib_s: float
    loaded_mib_s: float
    p99_before_ms: float
    p99_during_ms: float
    load_average: float


def time_copy_s(source: Path, directory: Path) -> float:
    """A plain copy of the bytes, on stable storage at its end. Raises ProcessFailed."""
    target = directory / "copy-of-a-replica"
    command = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none"]
    begun_s = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COPY_TIMEOUT_S, check=False)
        taken_s = time.monotonic() - begun_s
    except subprocess.TimeoutExpired:
        raise ProcessFailed(f"dd took longer than {COPY_TIMEOUT_S:.0f} s") from None
    finally:
        target.unlink(missing_ok=True)
    if done.returncode != 0:
        raise ProcessFailed(f"dd: {done.stderr.strip()[-200:]}")
    return taken_s


def lose_replica(system: Dolmen, replica: Mapping[str, Any]) -> None:
    """Its server is killed, its directory removed, and the server is up again without it."""
    system.command("node", "stop", str(replica["node"]), "--kill")
    _until(lambda: replica["id"] not in system.show()["membership"]["in_sync"], "the loss of a replica")
    shutil.rmtree(replica["path"])
    system.command("node", "start", str(replica["node"]))
    _until(lambda: _state(system, str(replica["id"])) != "offline", "the server of the lost replica")


def _state(system: Dolmen, replica_id: str) -> str:
    return next(str(r["state"]) for r in system.show()["replicas"] if r["id"] == replica_id)


def time_rebuild_s(system: Dolmen, replica_id: str) -> tuple[float, float]:
    """When it was ordered, and when the replica was in sync."""
    from control.client import Client as Daemon
    from protocol.errors import StorageError

    begun_s = time.monotonic()
    try:
        Daemon(system.directory).rebuild_replica(system.volume, replica_id, wait_s=0.0)
    except StorageError as error:
        raise ProcessFailed(f"no rebuild: {error}") from error
    _until(
        lambda: replica_id in system.show()["membership"]["in_sync"],
        "the end of a rebuild",
        timeout_s=REBUILD_TIMEOUT_S,
        interval_s=POLL_INTERVAL_S / 4,
    )
    return begun_s, time.monotonic()


def _until(
    reached: Callable[[], bool], what: str, *, timeout_s: float = 60.0, interval_s: float = POLL_INTERVAL_S
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline_s:
            raise ProcessFailed(f"{what} took longer than {timeout_s:.0f} s")
        time.sleep(interval_s)


def measure(system: Dolmen, seed: int, say: Callable[[str], None]) -> Result:
    """One repeat. Raises ServerFailed or ProcessFailed."""
    replica = random.Random(seed).choice(system.show()["replicas"])
    source = next(r for r in system.show()["replicas"] if r["id"] != replica["id"])
    size_mib = system.size_bytes / MIB
    load_average = os.getloadavg()[0]

    say("a rebuild without a client")
    lose_replica(system, replica)
    os.sync()
    data = next(Path(source["path"]).glob("*/data"))
    copy_s = time_copy_s(data, system.directory)
    os.sync()
    begun_s, ended_s = time_rebuild_s(system, replica["id"])
    idle_s = ended_s - begun_s
    wait_until_healthy(system)

    say("a rebuild under a client")
    lose_replica(system, replica)
    path, export = socket_and_export(system.uri)
    writer = Writer(Client(path, export), system.size_bytes // BLOCK_BYTES, seed)
    with writer.writing():
        alone_s = time.monotonic()
        time.sleep(BEFORE_S)
        begun_s, ended_s = time_rebuild_s(system, replica["id"])
    wait_until_healthy(system)
    return Result(
        copied_mib_s=size_mib / copy_s,
        idle_mib_s=size_mib / idle_s,
        loaded_mib_s=size_mib / (ended_s - begun_s),
        p99_before_ms=writer.p99_ms(alone_s, begun_s),
        p99_during_ms=writer.p99_ms(begun_s, ended_s),
        load_average=load_average,
    )


def rebuild(plan: Plan, repeats: int, progress: Progress) -> Path:
    """Returns the file of records."""
    with session(plan) as running:
        progress("start and fill dolmen", 0)
        system = running.systems[Dolmen.name]
        assert isinstance(system, Dolmen)
        start_and_fill(running, Dolmen.name)
        results: list[Result] = []
        failure = running.broken.get(Dolmen.name)
        for repeat in range(0 if failure else repeats):
            step = 1 + STEPS_PER_REPEAT * repeat

            def say(text: str, repeat: int = repeat, step: int = step) -> None:
                progress(f"{text} {repeat + 1}/{repeats}", step)

            try:
                wait_until_healthy(system)
                results.append(measure(system, plan.seed + repeat, say))
            except (ServerFailed, ProcessFailed, OSError) as error:
                failure = f"repeat {repeat + 1} of {repeats}: {error}"
                break
        record.append(running.file, _gauges(running, results, failure))
        progress("stopping", 1 + STEPS_PER_REPEAT * repeats)
        return running.file


def _gauges(running: Session, results: Sequence[Result], failure: str | None) -> list[GaugeRecord]:
    busy = max((result.load_average for result in results), default=0.0)
    machine = f"; load average before it {busy:.1f} at most"

    def gauge(name: str, unit: str, method: str, values: Sequence[float]) -> GaugeRecord:
        return GaugeRecord(
            run=running.run,
            commit=running.commit,
            machine=running.machine,
            system=Dolmen.name,
            name=name,
            unit=unit,
            method=method + machine,
            values=tuple(round(value, 3) for value in values),
            failure=failure,
        )

    return [
        gauge(
            "rebuild-idle",
            "x a plain copy",
            "a lost replica filled again without a client, against dd with fsync of one replica's data",
            [result.idle_mib_s / result.copied_mib_s for result in results],
        ),
        gauge(
            "rebuild-idle-rate",
            "MiB/s",
            "the same, as a rate",
            [result.idle_mib_s for result in results],
        ),
        gauge(
            "rebuild-client-p99",
            "x before",
            "p99 of one writer of 4 KiB while a replica is filled, against the seconds before",
            [result.p99_during_ms / result.p99_before_ms for result in results],
        ),
        gauge(
            "rebuild-client-p99-before",
            "ms",
            "that p99 before",
            [result.p99_before_ms for result in results],
        ),
        gauge(
            "rebuild-loaded-rate",
            "MiB/s",
            "how fast the replica was filled under that writer",
            [result.loaded_mib_s for result in results],
        ),
    ]
