"""Which faults a run meets, and when: drawn from its seed.

Owns the kinds, their rates and what each does to the cluster. A fault that has an end ends by itself; the
liveness phase ends the rest. Does not own what must hold under them (``history.py``, ``cluster.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine import events as ev
from engine.phase import VolumePhase
from tests.sim.kernel import Steps

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


LATER = frozenset({"old state store", "servers killed"})
"""Kinds that only themes have: mixed runs draw as they did before these were there."""


class Faults:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.sim = cluster.sim
        self.counts: Counter[str] = Counter()
        self.active = True
        self._kinds: dict[str, Callable[[], Steps]] = {
            "replica killed": self._kill_replica,
            "replica stopped": self._pause_replica,
            "power lost": self._power_one,
            "power lost everywhere": self._power_all,
            "engine killed": self._kill_engine,
            "engine stopped": self._pause_engine,
            "engine superseded": self._supersede,
            "detach": self._detach,
            "everything killed": self._kill_all,
            "servers killed": self._kill_servers,
            "state store away": self._kill_daemon,
            "partition": self._partition,
            "one-way cut": self._one_way,
            "flapping": self._flap,
            "reset": self._reset,
            "slow": self._slow,
            "slow disk": self._slow_disk,
            "write failed": self._fail_write,
            "write failed everywhere": self._fail_everywhere,
            "sync failed": self._fail_sync,
            "replica.meta failed": self._fail_meta,
            "rot": self._rot,
            "old directory": self._restore,
            "old state store": self._restore_store,
        }

    def start(self) -> None:
        if every_s := self.cluster.theme.every_s:
            for kind, mean_s in every_s.items():
                self.cluster.world.spawn(self._repeat(kind, self._kinds[kind], mean_s))
            return
        random = self.sim.random
        eagerness = random.choice((0.5, 1.0, 1.0, 2.0))
        for kind, inject in self._kinds.items():
            if kind in LATER:
                continue
            if random.random() < 0.35:
                mean_s = random.uniform(1.5, 8.0) / eagerness
                self.cluster.world.spawn(self._repeat(kind, inject, mean_s))

    def _repeat(self, kind: str, inject: Callable[[], Steps], mean_s: float) -> Steps:
        while True:
            yield self.sim.random.expovariate(1.0) * mean_s + 0.05
            if not self.active:
                return
            before = self.counts[kind]
            self.counts[kind] = before + 1
            done = yield from inject()
            if done is False:
                self.counts[kind] = before  # there was nothing to do it to

    def _note(self, what: str, *fields: object) -> None:
        self.sim.note("fault", what, *fields)

    def _some_s(self, mean_s: float) -> float:
        return self.sim.random.expovariate(1.0) * mean_s + 0.01

    # Processes

    def _kill_replica(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        if machine.server is None:
            return False
        self._note("kill", machine.host)
        machine.kill()
        away_s = self.cluster.theme.away_s or (0.05, 0.5, 3.0)
        yield self._some_s(self.sim.random.choice(away_s))
        machine.start()
        return True

    def _pause_replica(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        server = machine.server
        if server is None:
            return False
        self._note("stop", machine.host)
        server.pause()
        yield self._some_s(self.sim.random.choice((0.3, 1.5, 6.0)))
        self._note("continue", machine.host)
        server.resume()
        return True

    def _power_one(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        if not machine.powered:
            return False
        self._note("power off", machine.host)
        self.cluster.lose_power(machine)
        yield self._some_s(self.sim.random.choice((0.3, 2.0)))
        machine.regain_power()
        machine.start()
        return True

    def _power_all(self) -> Steps:
        self._note("power off everywhere")
        for machine in self.cluster.machines:
            self.cluster.lose_power(machine)
        engines = self.sim.random.random() < 0.7
        if engines:
            for engine in list(self.cluster.control.engines):
                engine.end(-9)
            self.cluster.control.kill_daemon()
        for machine in self.sim.random.sample(self.cluster.machines, len(self.cluster.machines)):
            yield self._some_s(self.sim.random.choice((0.02, 0.5)))
            machine.regain_power()
            machine.start()
        self.cluster.control.start_daemon()
        return True

    def _kill_engine(self) -> Steps:
        engine = self.cluster.control.engine
        if engine is None:
            return False
        self._note("kill", engine.name)
        engine.end(-9)
        yield 0.0
        return True

    def _kill_all(self) -> Steps:
        self._note("kill everything")
        for engine in list(self.cluster.control.engines):
            engine.end(-9)
        for machine in self.cluster.machines:
            machine.kill()
        for machine in self.sim.random.sample(self.cluster.machines, len(self.cluster.machines)):
            yield self._some_s(self.sim.random.choice((0.01, 0.5)))
            machine.start()
        return True

    def _kill_servers(self) -> Steps:
        """All replicas, and no engine."""
        self._note("kill all replica servers")
        for machine in self.cluster.machines:
            machine.kill()
        for machine in self.sim.random.sample(self.cluster.machines, len(self.cluster.machines)):
            yield self._some_s(0.02)
            machine.start()
        return True

    def _pause_engine(self) -> Steps:
        engine = self.cluster.control.engine
        if engine is None:
            return False
        self._note("stop", engine.name)
        engine.pause()
        yield self._some_s(self.sim.random.choice((0.3, 1.5, 6.0)))
        self._note("continue", engine.name)
        engine.resume()
        return True

    def _supersede(self) -> Steps:
        """The daemon takes the engine for dead. It is stopped, cut off, or very much alive."""
        control, random = self.cluster.control, self.sim.random
        engine, daemon = control.engine, control.daemon
        if engine is None or daemon is None or daemon.holds is not engine:
            return False
        how = random.choice(("stopped", "cut", "cut off from some", "alive"))
        if self.cluster.theme.name == "takeover":
            how = random.choice(("split", "split", "stopped shortly", "cut off from some", "cut"))
        self._note("supersede", engine.name, how)
        cut: list[tuple[str, str]] = []
        other = "h2" if engine.host == "h1" else "h1"
        if how == "stopped":
            engine.pause()
        elif how == "cut":
            cut = [(engine.host, "d"), ("d", engine.host)]
        elif how == "cut off from some":
            hosts = [machine.host for machine in self.cluster.machines]
            for host in random.sample(hosts, random.randint(1, len(hosts))):
                cut += [(engine.host, host), (host, engine.host)]
        if how == "stopped shortly":
            engine.pause()
        elif how == "split":  # each reaches those that the other does not
            hosts = [machine.host for machine in self.cluster.machines]
            kept = random.sample(hosts, random.randint(1, len(hosts) - 1))
            cut = [(engine.host, "d"), ("d", engine.host)] if random.random() < 0.5 else []
            for host in hosts:
                away = other if host in kept else engine.host
                cut += [(away, host), (host, away)]
        elif random.random() < 0.5:  # the new one does not reach everybody either
            host = random.choice(self.cluster.machines).host
            cut += [(other, host), (host, other)]
        for pair in cut:
            self.cluster.network.block(*pair)
        if how != "stopped shortly":
            yield random.choice((0.0, 0.3))
        if control.daemon is not None and control.daemon.holds is engine:
            control.daemon.give_up_engine()
        if how == "stopped shortly":
            yield random.uniform(0.3, 0.9)  # shorter than a lease
        elif how == "split":
            yield random.uniform(2.5, 5.0)  # longer than an open that waits for stragglers and for a lease
        else:
            yield self._some_s(random.choice((0.5, 2.0, 5.0)))
        for pair in cut:
            self.cluster.network.unblock(*pair)
        engine.resume()
        return True

    def _detach(self) -> Steps:
        engine = self.cluster.control.engine
        if engine is None or engine.paused or engine.volume.phase is not VolumePhase.SERVING:
            return False
        self._note("detach", engine.name)
        engine.post(ev.DetachAsked(1))
        yield 0.0
        return True

    def _kill_daemon(self) -> Steps:
        self._note("state store away")
        self.cluster.control.kill_daemon()
        yield self._some_s(self.sim.random.choice((0.5, 4.0, 10.0)))
        self.cluster.control.start_daemon()
        return True

    # The network

    def _pair(self) -> tuple[str, str]:
        random = self.sim.random
        replicas = [machine.host for machine in self.cluster.machines]
        if self.cluster.theme.every_s and random.random() < 0.7:  # where it matters most
            return self.cluster.control.host, random.choice(replicas)
        kind = random.choice(("engine", "engine", "peer", "store"))
        if kind == "peer" and len(replicas) > 1:
            one, other = random.sample(replicas, 2)
            return one, other
        return random.choice(("h1", "h2")), "d" if kind == "store" else random.choice(replicas)

    def _partition(self) -> Steps:
        one, other = self._pair()
        self._note("partition", one, other)
        network = self.cluster.network
        network.block(one, other)
        network.block(other, one)
        yield self._some_s(self.sim.random.choice((0.3, 1.5, 5.0)))
        network.unblock(one, other)
        network.unblock(other, one)
        return True

    def _one_way(self) -> Steps:
        one, other = self._pair()
        if self.sim.random.random() < 0.5:
            one, other = other, one
        self._note("one-way cut", one, "->", other)
        self.cluster.network.block(one, other)
        yield self._some_s(self.sim.random.choice((0.3, 1.5, 5.0)))
        self.cluster.network.unblock(one, other)
        return True

    def _flap(self) -> Steps:
        one, other = self._pair()
        self._note("flapping", one, other)
        for _ in range(self.sim.random.randint(3, 8)):
            self.cluster.network.block(one, other)
            yield self.sim.random.uniform(0.02, 0.6)
            self.cluster.network.unblock(one, other)
            yield self.sim.random.uniform(0.02, 0.6)
        return True

    def _reset(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        server = machine.server
        if server is None or not server.endpoints:
            return False
        ends = list(server.endpoints.values())
        for end in self.sim.random.sample(ends, self.sim.random.randint(1, len(ends))):
            self._note("reset", end.owner.name, end.peer.owner.name)
            end.reset()
        yield 0.0
        return True

    def _slow(self) -> Steps:
        one, other = self._pair()
        self._note("slow", one, other)
        slow_s = self.sim.random.choice((0.03, 0.1, 0.4))
        self.cluster.network.slow_s[one, other] = slow_s
        yield self._some_s(4.0)
        self.cluster.network.slow_s.pop((one, other), None)
        return True

    # Disks

    def _slow_disk(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        self._note("slow disk", machine.host)
        before, machine.disk_s = machine.disk_s, self.sim.random.choice((0.02, 0.2))
        yield self._some_s(3.0)
        machine.disk_s = before
        return True

    def _fail_write(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        code = self.sim.random.choice(("no_space", "io_error"))
        self._note("next write fails", machine.host, code)
        machine.store.fail_next = code
        yield 0.0
        return True

    def _fail_everywhere(self) -> Steps:
        code = self.sim.random.choice(("no_space", "io_error"))
        self._note("next write fails everywhere", code)
        for machine in self.cluster.machines:
            machine.store.fail_next = code
        yield 0.0
        return True

    def _fail_sync(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        self._note("next sync fails", machine.host)
        machine.store.fail_sync = True
        yield 0.0
        return True

    def _fail_meta(self) -> Steps:
        machine = self.sim.random.choice(self.cluster.machines)
        machine.meta_fault = self.sim.random.choice(("no_space", "io_error"))
        self._note("replica.meta fails", machine.host, machine.meta_fault)
        yield 0.0
        return True

    def _rot(self) -> Steps:
        """One replica's disk only, and while the others hold everything."""
        machine = self.cluster.machines[0]
        if len(self.cluster.oracle.floor) < len(self.cluster.machines):
            return False
        block = self.sim.random.choice(self.cluster.load.blocks)
        if not machine.store.holds(block):
            return False  # a hole has nothing that could rot
        self._note("rot", machine.host, block)
        machine.store.rot(block)
        self.cluster.rotten.add(block)
        yield 0.0
        return True

    def _restore(self) -> Steps:
        """A directory from earlier is put in the place of the newest, while others hold everything."""
        machine: Any = self.sim.random.choice(self.cluster.machines)
        machine.take_copy()
        yield self._some_s(3.0)
        oracle = self.cluster.oracle
        others = oracle.floor - {machine.replica_id}
        sound = others and all(oracle.lost_at[r] < oracle.sound_since[r] for r in others)
        # One at a time: when a majority of a record's members has forgotten, no rule can tell what they knew.
        whole = all(at < oracle.sound_since[r] for r, at in oracle.put_back_at.items() if at >= 0)
        if not sound or not whole or machine.server is None or not self.active:
            return False
        everything = self.cluster.theme.every_s and self.sim.random.random() < 0.7
        self._note("old directory put back", machine.host, "with everything killed" if everything else "")
        killed = [machine]
        if everything:
            for engine in list(self.cluster.control.engines):
                engine.end(-9)
            killed = [other for other in self.cluster.machines if other.server is not None]
        for other in killed:
            other.kill()
        yield 0.01
        if machine.server is None:
            machine.restore_copy()
            oracle.put_back(machine.replica_id)
        for other in killed:
            other.start()
        return True

    def _restore_store(self) -> Steps:
        """The state store's files from a while ago, as if by a hand that meant well."""
        control = self.cluster.control
        copy = control.store.copy()
        yield self._some_s(2.0)
        if not self.active:
            return False
        self._note("older state store put back")
        control.kill_daemon()
        yield 0.05
        control.kill_daemon()
        control.store = copy
        control.start_daemon()
        return True
