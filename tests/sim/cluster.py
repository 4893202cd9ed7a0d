"""One run: a cluster, its clients and its faults, from one seed.

A *safety* phase in which things fail, then a *liveness* phase in which nothing does and everything is
started: the volume must become healthy within a bounded time, serve, and hold what it must. Then all machines
lose power at once, and what was flushed must be there.

Checked on the way: the machine's own invariants, after each step (by the machine), two engines in one epoch.
Checked at the end: every half of a block is a linearizable register, nothing flushed is gone, the replicas
are equal, no old engine lives on."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engine import membership
from engine.phase import VolumePhase
from protocol.limits import REGION_BYTES
from tests.sim.clients import Client, Load, blocks_of
from tests.sim.daemons import Control
from tests.sim.engines import EngineProcess
from tests.sim.faults import Faults
from tests.sim.history import History, Oracle
from tests.sim.kernel import Process, Sim
from tests.sim.network import Network
from tests.sim.servers import Machine
from tests.sim.themes import BY_NAME, Theme, theme_of

HEALTHY_MAX_S = 90.0
"""A replica that failed often waits up to RETRY_CAP_S before it is tried again, and then may have to be
brought up to date after another that waited as well."""

FORGOTTEN_S = 10.0
"""After this long a volume that an old directory keeps closed is opened by an operator."""

OPERATOR_REASONS = frozenset(
    {membership._FORGOTTEN, "the state store may have missed a record that they hold"}
)

NOTICED_S = 1.5
"""With clients at work: a link that is dead without having said so is found out by LINK_STALL_TIMEOUT_S."""

STOPPED_MAX_S = 15.0
"""For requests under way when clients stop: one stall and a change of members."""


@dataclass
class Result:
    seed: int
    failure: str = ""
    theme: str = ""
    operations: int = 0
    errors: int = 0
    unanswered: int = 0
    virtual_s: float = 0.0
    events: int = 0
    epochs: int = 0
    losses: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


class Cluster:
    def __init__(self, seed: int, theme: Theme, *, trace: Callable[[str], None] | None = None) -> None:
        self.sim = Sim(seed, trace=trace)
        self.theme = theme
        random = self.sim.random
        count = random.choice(theme.replica_counts or (2, 3, 3, 3, 3, 5))
        regions = random.choice((theme.region_count,) if theme.region_count else (2, 3, 4, 6))
        base_s = theme.delay_s or random.choice((0.0001, 0.0005, 0.003))
        self.network = Network(self.sim, base_s=base_s, jitter_s=base_s * random.choice((0.2, 1.0, 4.0)))
        self.world = Process(self.sim, "world", "world")
        ids = [f"v-r{slot + 1}" for slot in range(count)]
        size_bytes = regions * REGION_BYTES
        self.machines = [
            Machine(self.sim, self.network, slot, replica_id, size_bytes)
            for slot, replica_id in enumerate(ids)
        ]
        self.history = History(self.sim)
        self.oracle = Oracle(self.sim, self.history, ids)
        for machine in self.machines:
            machine.on_loss = self.oracle.lost
        self.control = Control(
            self.sim,
            self.network,
            replica_ids=ids,
            addresses=[machine.address for machine in self.machines],
            size_bytes=size_bytes,
            watch=self.oracle.watch,
        )
        self.load = Load(
            blocks=blocks_of(regions, random.choice((1, 2))),
            think_s=random.choice((0.02, 0.05, 0.2)),
            read_share=random.choice((0.3, 0.5, 0.7)),
            partial_share=random.choice((0.0, 0.0, 0.3)),
            flush_share=random.choice((0.0, 0.05, 0.2)),
            fua_share=random.choice((0.0, 0.1)),
            close_share=random.choice((0.0, 0.02)),
            patience_s=random.choice((0.5, 3.0, 100.0)),
            readers_count=0,
        )
        self._set_the_theme()
        self.clients = [
            Client(self.sim, number, self.control, self.history, self.load)
            for number in range(random.choice((2, 3, 4)) + self.load.readers_count)
        ]
        # Blocks that rotted on one replica. Should the others be lost while it is the only one in sync,
        # nobody has a good copy that is known to be the newest: an error, and never wrong bytes (C16).
        self.rotten: set[int] = set()
        self.faults = Faults(self)
        self.recovered = False  # by an operator
        self.safety_s = random.uniform(6.0, 16.0) * (1.0 if theme.name == "mixed" else 0.6)

    def _set_the_theme(self) -> None:
        theme, random = self.theme, self.sim.random
        changed: dict[str, Any] = {}
        if theme.block_count_max:
            changed["blocks"] = self.load.blocks[: theme.block_count_max]
        if theme.think_s:
            changed["think_s"] = theme.think_s * random.choice((0.5, 1.0, 4.0))
        for name in ("read_share", "partial_share", "flush_share"):
            if (share := getattr(theme, name)) is not None:
                changed[name] = share * random.choice((0.0, 1.0, 1.0)) if name == "partial_share" else share
        if theme.readers_count:
            changed["readers_count"] = theme.readers_count
        if theme.patience_s:
            changed["patience_s"] = random.choice(theme.patience_s)
        if theme.straggler_waits_s:
            self.control.straggler_wait_s = random.choice(theme.straggler_waits_s)
        if changed:
            self.load = replace(self.load, **changed)

    def lose_power(self, machine: Machine) -> None:
        machine.lose_power()

    def run(self) -> None:
        for machine in self.machines:
            machine.start()
        self.control.start_daemon()
        self.faults.start()
        self.sim.run(until_s=self.safety_s)
        self._heal()
        self.sim.run(until_s=self.sim.now + NOTICED_S)
        self._become_healthy("after the faults")
        self._stop_clients()
        self._become_healthy("without clients")
        self._check_replicas_equal()
        self._read_everything(flush=True)
        self._lose_power_everywhere()
        self._become_healthy("after power was lost everywhere")
        self._read_everything(flush=False)
        self.history.judge()

    def _heal(self) -> None:
        self.sim.note("world", "liveness")
        self.faults.active = False
        self.network.heal()
        for machine in self.machines:
            machine.regain_power()
            machine.store.fail_next, machine.store.fail_sync, machine.meta_fault = "", False, ""
            machine.disk_s = 0.0005
            if machine.server is not None:
                machine.server.resume()
            machine.start()
        for engine in self.control.engines:
            engine.resume()
        self.control.start_daemon()

    @property
    def healthy(self) -> bool:
        engine = self.control.engine
        if engine is None or engine is not self.control.engines[-1] or engine.paused:
            return False
        volume, io = engine.volume, engine.io
        return (
            volume.phase is VolumePhase.SERVING
            and volume.reconcile is None
            and volume.joining is None
            and all(entry.in_sync for entry in volume.entries)
            and len(io.readers) == len(self.machines)
            and not io.unequal
            and not io.partial_wait
            and not any(other.alive for other in self.control.engines[:-1])
        )

    def _become_healthy(self, when: str) -> None:
        self._recover_if_needed()
        if not self.sim.run(until_s=self.sim.now + HEALTHY_MAX_S, stop=lambda: self.healthy):
            raise AssertionError(f"not healthy {HEALTHY_MAX_S:g} s {when}: {self._why()}")
        self.sim.note("world", "healthy", when)

    def _recover_if_needed(self) -> None:
        """An old directory and another loss at the same moment can be more than any rule can decide: then an
        operator does, who sees what is there. Whatever was acknowledged before may be gone by that.

        So is a replica that no engine ever reached, when the state store was put back: it looks like an empty
        disk in the place of one that knew more."""
        counts = self.faults.counts
        if not counts["old directory"] and not counts["old state store"]:
            return
        self.sim.run(until_s=self.sim.now + FORGOTTEN_S, stop=lambda: self.healthy)
        engine = self.control.engine
        blank = engine is not None and any(entry.epoch_before == 0 for entry in engine.volume.entries)
        if not counts["old directory"] and not blank:
            return
        wait = engine.volume.opening.must_wait if engine is not None else None
        if engine is None or wait is None or wait.reason not in OPERATOR_REASONS:
            return
        reports = {e.id: e.report for e in engine.volume.entries if e.report is not None}
        chosen = max(reports, key=lambda r: (not reports[r].restored, reports[r].record.stamp, r))
        self.sim.note("operator", "recovers with", chosen)
        self.history.judge()
        self.history.start_over()
        self.control.recover((chosen,), wait.newest.stamp)
        self.recovered = True
        for other in self.control.engines:
            if other.alive:
                other.end(-15)

    def _why(self) -> str:
        alive = [other.name for other in self.control.engines if other.alive]
        engine = self.control.engine
        if engine is None:
            return f"no engine; the last ended with {[e.exit_code for e in self.control.engines[-3:]]}"
        volume = engine.volume
        states = [f"{e.id}:{e.state.value}:{e.reason}" for e in volume.entries]
        unequal = f"unequal={sorted(engine.io.unequal)} partial={sorted(engine.io.partial_wait)}"
        return (
            f"{alive} {volume.phase.value} {states} {volume.opening.must_wait} {unequal} {volume.reconcile}"
        )

    def _stop_clients(self) -> None:
        for client in self.clients:
            client.running = client.only_reads = False
        idle = lambda: not any(client.busy for client in self.clients)  # noqa: E731
        if not self.sim.run(until_s=self.sim.now + STOPPED_MAX_S, stop=idle):
            raise AssertionError(f"a healthy volume leaves requests unanswered: {self._why()}")
        self.sim.run(until_s=self.sim.now + 0.5)

    def _check_replicas_equal(self) -> None:
        for block in self.load.blocks:
            found = {machine.replica_id: machine.store.read(block) for machine in self.machines}
            if block in self.rotten:
                found = {replica_id: cells for replica_id, cells in found.items() if cells is not None}
            assert len(set(found.values())) <= 1, f"replicas differ at block {block}: {found}"

    def _read_everything(self, *, flush: bool) -> None:
        client = self.clients[0]
        client.engine = self.control.engine

        def steps():  # type: ignore[no-untyped-def]  # a generator of the kernel's
            for block in self.load.blocks:
                outcome = yield from client.read(block)
                assert outcome == "" or block in self.rotten, (
                    f"block {block} can't be read from a healthy volume: {outcome}"
                )
            if flush:
                outcome = yield from client.flush()
                assert outcome == "", f"a healthy volume can't be flushed: {outcome}"
            done.append(True)

        done: list[bool] = []
        client.spawn(steps())
        if not self.sim.run(until_s=self.sim.now + STOPPED_MAX_S, stop=lambda: bool(done)):
            raise AssertionError(f"a healthy volume does not answer reads: {self._why()}")

    def _lose_power_everywhere(self) -> None:
        self.sim.note("world", "power lost everywhere")
        for engine in list(self.control.engines):
            engine.end(-9)
        for machine in self.machines:
            self.lose_power(machine)
        self.control.kill_daemon()
        self.sim.run(until_s=self.sim.now + 1.0)
        for machine in self.machines:
            machine.regain_power()
            machine.start()
        self.control.start_daemon()

    def result(self, failure: str = "") -> Result:
        history = self.history
        result = Result(seed=0, failure=failure)
        result.operations = len(history.operations)
        result.errors, result.unanswered = history.errors, history.unanswered
        result.virtual_s, result.events = self.sim.now, self.sim.event_count
        result.epochs, result.losses = len(self.control.engines), len(history.losses)
        result.faults = +self.faults.counts
        for engine in self.control.engines:
            result.counts.update(engine.io.counts)
        return result


def run_seed(seed: int, theme: str = "", *, trace: Callable[[str], None] | None = None) -> Result:
    """``theme``: empty for the one that the seed draws."""
    chosen = BY_NAME[theme] if theme else theme_of(seed)
    cluster = Cluster(seed, chosen, trace=trace)
    failure = ""
    try:
        cluster.run()
    except AssertionError as error:
        failure = str(error) or traceback.format_exc()
        if not str(error) or "Runaway" in type(error).__name__:
            failure = traceback.format_exc(limit=-6)
        elif not failure.startswith(("not healthy", "replicas differ")):
            failure += "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    except Exception:  # noqa: BLE001  # a bug of the code under test, or of ours: both are findings
        failure = traceback.format_exc(limit=-8)
    result = cluster.result(failure)
    result.seed, result.theme = seed, chosen.name
    return result


__all__ = ["Cluster", "EngineProcess", "Result", "run_seed"]
