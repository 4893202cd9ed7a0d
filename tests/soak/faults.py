"""What the soak breaks: each fault strikes, holds and mends by itself.

Owns the list of kinds and what each does to an incident's cluster. Does not own when (``run.py``). A kind
whose means are missing here (a private network, a disk in memory) is left out, and the report says so.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.network import Direction
from tests.faults.incident import Incident
from tests.support.tmpfs import free_bytes

MIB = 1024 * 1024
GROW_BYTES = 4 * MIB
VOLUME_BYTES_MAX = 256 * MIB
LEFT_BYTES = MIB
"""What a full disk has left."""


@dataclass(frozen=True, slots=True)
class Stage:
    """``small_disk``: a node's disk that is a small file system of its own, None if there is none."""

    incident: Incident
    chance: random.Random
    small_disk: Path | None

    def replica(self) -> str:
        return self.chance.choice(self.incident.replica_ids)

    def hold(self, shortest_s: float, longest_s: float) -> None:
        """The fault lasts this long."""
        time.sleep(self.chance.uniform(shortest_s, longest_s))


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    act: Callable[[Stage], None]
    needs_network: bool = False
    needs_small_disk: bool = False


def _kill_replicas(stage: Stage, count: int) -> None:
    pids = list(stage.incident.dolmen.replica_pids(stage.incident.name).values())
    for pid in stage.chance.sample(pids, min(count, len(pids))):
        os.kill(pid, signal.SIGKILL)


def _kill_engine(stage: Stage) -> None:
    stage.incident.dolmen.kill_engine(stage.incident.name)


def _kill_engine_and_replica(stage: Stage) -> None:
    _kill_replicas(stage, 1)
    _kill_engine(stage)


def _kill_everything(stage: Stage) -> None:
    dolmen, name = stage.incident.dolmen, stage.incident.name
    for pid in (dolmen.daemon_pid(), dolmen.engine_pid(name), *dolmen.replica_pids(name).values()):
        os.kill(pid, signal.SIGKILL)
    dolmen.up()


def _freeze(stage: Stage, pid: int, shortest_s: float, longest_s: float) -> None:
    stage.incident.freeze(pid)
    try:
        stage.hold(shortest_s, longest_s)
    finally:
        stage.incident.thaw(pid)


def _freeze_replica(stage: Stage) -> None:
    _freeze(stage, stage.incident.pid_of(stage.replica()), 0.2, 10.0)


def _freeze_engine(stage: Stage) -> None:
    _freeze(stage, stage.incident.dolmen.engine_pid(stage.incident.name), 0.2, 4.0)


def _freeze_daemon(stage: Stage) -> None:
    _freeze(stage, stage.incident.dolmen.daemon_pid(), 1.0, 6.0)


def _kill_daemon(stage: Stage) -> None:
    stage.incident.dolmen.kill_daemon()
    stage.hold(0.0, 3.0)
    stage.incident.dolmen.up()


def _lose_replica_without_daemon(stage: Stage) -> None:
    victim = stage.incident.pid_of(stage.replica())
    stage.incident.dolmen.kill_daemon()
    os.kill(victim, signal.SIGKILL)
    stage.hold(0.5, 3.0)
    stage.incident.dolmen.up()


def _stop_node(stage: Stage) -> None:
    """As an operator does for maintenance."""
    victim = stage.replica()
    stage.incident.stop_cleanly(victim)
    stage.hold(0.0, 4.0)
    stage.incident.start(victim)


def _detach_and_attach(stage: Stage) -> None:
    stage.incident.client.detach(stage.incident.name)
    stage.incident.client.attach(stage.incident.name)


def _resize(stage: Stage) -> None:
    size_bytes = int(stage.incident.show()["size_bytes"])
    if size_bytes + GROW_BYTES <= VOLUME_BYTES_MAX:
        stage.incident.client.resize(stage.incident.name, size_bytes + GROW_BYTES)


def _vanish(stage: Stage) -> None:
    direction = stage.chance.choice(list(Direction))
    stage.incident.network.drop(stage.incident.port_of(stage.replica()), direction)
    stage.hold(0.5, 8.0)
    stage.incident.network.heal()


def _all_vanish(stage: Stage) -> None:
    for replica in stage.incident.replica_ids:
        stage.incident.network.drop(stage.incident.port_of(replica))
    stage.hold(0.5, 4.0)
    stage.incident.network.heal()


def _reset(stage: Stage) -> None:
    stage.incident.network.reset(stage.incident.port_of(stage.replica()))
    stage.hold(0.0, 3.0)
    stage.incident.network.heal()


def _lose_packets(stage: Stage) -> None:
    port = stage.incident.port_of(stage.replica())
    stage.incident.network.lose(port, percent=stage.chance.randrange(1, 20))
    stage.hold(1.0, 5.0)
    stage.incident.network.heal()


def _flap(stage: Stage) -> None:
    port = stage.incident.port_of(stage.replica())
    for _ in range(stage.chance.randrange(2, 8)):
        stage.chance.choice((stage.incident.network.drop, stage.incident.network.reset))(port)
        stage.hold(0.05, 1.5)
        stage.incident.network.heal()
        stage.hold(0.05, 1.5)


def _fill_disk(stage: Stage) -> None:
    assert stage.small_disk is not None
    ballast = stage.small_disk / "ballast"
    try:
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free_bytes(stage.small_disk) - LEFT_BYTES))
        stage.hold(1.0, 5.0)
    finally:
        ballast.unlink(missing_ok=True)


FAULTS = (
    Fault("replica killed", lambda stage: _kill_replicas(stage, 1)),
    Fault("two replicas killed", lambda stage: _kill_replicas(stage, 2)),
    Fault("all replicas killed", lambda stage: _kill_replicas(stage, 3)),
    Fault("replica frozen", _freeze_replica),
    Fault("engine killed", _kill_engine),
    Fault("engine frozen", _freeze_engine),
    Fault("engine and replica killed", _kill_engine_and_replica),
    Fault("everything killed", _kill_everything),
    Fault("daemon killed", _kill_daemon),
    Fault("daemon frozen", _freeze_daemon),
    Fault("daemon and replica killed", _lose_replica_without_daemon),
    Fault("node stopped", _stop_node),
    Fault("detach and attach", _detach_and_attach),
    Fault("resize", _resize),
    Fault("replica vanished", _vanish, needs_network=True),
    Fault("all replicas vanished", _all_vanish, needs_network=True),
    Fault("connections reset", _reset, needs_network=True),
    Fault("packets lost", _lose_packets, needs_network=True),
    Fault("link flaps", _flap, needs_network=True),
    Fault("disk full", _fill_disk, needs_small_disk=True),
)
