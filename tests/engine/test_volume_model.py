"""The machine lets itself be told any story: hypothesis chooses what fails, and in which order calls, answers
and frames arrive. After every step, no way of opening the volume may lose an acknowledged write, and whoever
may serve reads must answer alike. At the end faults stop, and the volume must become healthy."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.events import Event, PullRegions, TimerKind
from engine.phase import VolumePhase
from protocol.frames import Status
from protocol.membership import MembershipRecord
from tests.engine.simulation import Cluster, SimReplica

REGIONS = 4
HEAL_ROUNDS_MAX = 30
OPEN_TIMERS = (TimerKind.STRAGGLERS, TimerKind.LEASE)

slots = st.integers(0, 4)
picks = st.integers(0, 30)


def stream(event: Event) -> str:
    """Events of one origin arrive in order; those of different origins in any."""
    slot = getattr(event, "slot", None)
    name = type(event).__name__
    if name in ("LinkAttached", "LinkDown", "Drained", "RegionWanted", "RegionDiverged"):
        return "loop"
    if name in ("StoreUp", "StoreDown", "RecordStored"):
        return "store"
    return f"slot {slot}"


class VolumeMachine(RuleBasedStateMachine):
    photo: SimReplica | None = None
    stored_once: MembershipRecord | None = None

    @initialize(count=st.sampled_from([3, 3, 3, 2, 5]), opened=st.booleans())
    def begin(self, count: int, opened: bool) -> None:
        self.cluster = Cluster(count)
        if opened:
            self.cluster.open()

    def slot(self, slot: int) -> int:
        return slot % len(self.cluster.replicas)

    # Things go on

    @precondition(lambda self: self.cluster.running and self.cluster.inbox)
    @rule(pick=picks)
    def event_arrives(self, pick: int) -> None:
        seen: set[str] = set()
        first = [
            at
            for at, event in enumerate(self.cluster.inbox)
            if not (stream(event) in seen or seen.add(stream(event)))  # type: ignore[func-returns-value]
        ]
        self.cluster.run_event(first[pick % len(first)])

    @precondition(lambda self: self.cluster.running and self.cluster.calls)
    @rule(pick=picks)
    def call_is_answered(self, pick: int) -> None:
        self.cluster.run_call(pick % len(self.cluster.calls))

    @precondition(lambda self: any(isinstance(call, PullRegions) for call in self.cluster.calls))
    @rule()
    def pull_fails_half_way(self) -> None:
        calls = self.cluster.calls
        index = next(at for at, call in enumerate(calls) if isinstance(call, PullRegions))
        call = calls[index]
        assert isinstance(call, PullRegions)
        replica, source = self.cluster.replicas[call.slot], self.cluster.replicas[call.source]
        half = tuple(call.regions)[: len(call.regions) // 2]
        if replica.alive and source.alive and replica.epoch == source.epoch:
            self.cluster._pull(replica, source, call.slot, call.session, half)
        self.cluster.run_call(index, fail="source_failed")

    @rule(slot=slots)
    def frame_arrives(self, slot: int) -> None:
        link = self.cluster.loop.links.get(self.slot(slot))
        if self.cluster.running and link is not None and link.queue:
            self.cluster.loop.deliver(self.slot(slot))

    @rule(region=st.integers(0, REGIONS - 1), half=st.sampled_from([None, None, 0, 1]))
    def client_writes(self, region: int, half: int | None) -> None:
        cluster = self.cluster
        serving = cluster.running and cluster.volume.phase is VolumePhase.SERVING
        if half is not None and cluster.partial_must_wait(region):
            return
        if serving and len(cluster.loop.writes) < 8:
            cluster.write(region, half)

    @rule(steps=st.integers(1, 40))
    def much_goes_on(self, steps: int) -> None:
        left = iter(range(steps))
        if self.cluster.running:
            self.cluster.settle(until=lambda: next(left, None) is None)

    @rule(slot=slots)
    def marks_are_cleaned(self, slot: int) -> None:
        replica = self.cluster.replicas[self.slot(slot)]
        if self.cluster.running and replica.alive and self.slot(slot) in self.cluster.loop.links:
            replica.clean(self.cluster.loop.completed)

    @precondition(lambda self: self.cluster.running and self.cluster.wanted_record is not None)
    @rule()
    def store_answers(self) -> None:
        if self.cluster.store_alive:
            self.cluster.store_now()

    @rule(slot=slots)
    def connection_is_made(self, slot: int) -> None:
        at = self.slot(slot)
        if self.cluster.running and self.cluster.replicas[at].alive and self.cluster.can_connect(at):
            self.cluster.connect(at)

    @rule(kind=st.sampled_from([*OPEN_TIMERS, TimerKind.PULL_RETRY, TimerKind.STABLE]))
    def time_passes(self, kind: TimerKind) -> None:
        if self.cluster.running:
            self.cluster.fire(kind)

    @rule(seconds=st.sampled_from([0.3, 0.6, 1.2]))
    def the_clock_moves(self, seconds: float) -> None:
        self.cluster.now_s += seconds

    @rule()
    def lease_is_renewed(self) -> None:
        if self.cluster.running:
            self.cluster.loop.renew()

    @rule(region=st.integers(0, REGIONS - 1), half=st.integers(0, 1))
    def client_reads(self, region: int, half: int) -> None:
        if self.cluster.running:
            self.cluster.loop.renew()
            self.cluster.read((region, half))

    @precondition(lambda self: self.cluster.running and self.cluster.loop.links and self.cluster.loop.writes)
    @rule(slot=slots, pick=picks)
    def client_reads_what_one_replica_has(self, slot: int, pick: int) -> None:
        loop = self.cluster.loop
        write = loop.writes[pick % len(loop.writes)]
        link = loop.links.get(self.slot(slot))
        while link is not None and write.id in link.queue and loop.answers(self.slot(slot)):
            loop.deliver(self.slot(slot))
        loop.renew()
        self.cluster.read(write.halves[0])

    # An older engine that was stopped

    @rule()
    def engine_is_stopped(self) -> None:
        if self.cluster.running and len(self.cluster.asleep) < 2:
            self.cluster.stop_engine()

    @precondition(lambda self: self.cluster.asleep)
    @rule(steps=st.integers(0, 20), region=st.integers(0, REGIONS - 1), connect=st.booleans())
    def stopped_engine_wakes_for_a_moment(self, steps: int, region: int, connect: bool) -> None:
        cluster = self.cluster
        left = iter(range(steps))
        with cluster.as_sleeper():
            cluster.loop.renew()
            cluster.read((region, 0))
            if cluster.volume.phase is VolumePhase.SERVING and len(cluster.loop.writes) < 4:
                cluster.write(region)
            cluster.settle(connect=connect, until=lambda: next(left, None) is None)
            if cluster.running:
                cluster.loop.renew()
                cluster.check()

    @rule(slot=slots)
    def newest_engine_is_cut_off(self, slot: int) -> None:
        self.cluster.out_of_reach = {self.slot(slot)}
        if self.cluster.running:
            self.cluster.cut(self.cluster.ids[self.slot(slot)])

    @rule()
    def newest_engine_reaches_all(self) -> None:
        self.cluster.out_of_reach.clear()

    # Things fail

    @rule(slot=slots)
    def replica_is_killed(self, slot: int) -> None:
        replica = self.cluster.replicas[self.slot(slot)]
        if replica.alive:
            self.cluster.kill(replica.id)

    @rule()
    def machine_of_a_loses_power(self) -> None:
        # One machine only, and only while others hold all that A holds: more is beyond the contract.
        cluster = self.cluster
        if not cluster.running or cluster.volume.ledger is None or not cluster.replicas[0].alive:
            return
        ledger, up = cluster.volume.ledger, cluster.volume.members_up()
        others = [entry for entry in up if entry.slot in cluster.loop.links and entry.slot != 0]
        if any(replica.suspect or replica.restored for replica in cluster.replicas) or cluster.asleep:
            return
        if ledger.opened and ledger.proposed is None and others and len(up) == len(ledger.committed.in_sync):
            cluster.kill("A", power=True)

    @rule(slot=slots)
    def directory_is_copied(self, slot: int) -> None:
        self.photo = self.cluster.photograph(self.cluster.ids[self.slot(slot)])

    @precondition(lambda self: self.photo is not None)
    @rule(in_place=st.booleans())
    def directory_is_put_back(self, in_place: bool) -> None:
        # One at a time, and while another member has all that is lost here. Of two the operator decides.
        cluster, photo = self.cluster, self.photo
        assert photo is not None
        ledger = cluster.volume.ledger
        if not cluster.running or ledger is None or not ledger.opened or ledger.proposed is not None:
            return
        others = [entry for entry in cluster.volume.members_up() if entry.id != photo.id]
        uncertain = any(replica.suspect or replica.restored for replica in cluster.replicas)
        if not others or uncertain or cluster.hints.distrust_store or cluster.asleep or photo.suspect:
            return
        if cluster.volume.reconcile is not None or cluster.loop.unequal:
            return
        in_place = in_place and photo.opens + 1 < cluster.hints.opens.get(photo.id, 0)
        cluster.put_back(photo, in_place=in_place)
        self.photo = None

    @rule()
    def state_store_is_copied(self) -> None:
        self.stored_once = self.cluster.stored

    @precondition(lambda self: self.stored_once is not None)
    @rule()
    def state_store_is_put_back(self) -> None:
        cluster = self.cluster
        stored = self.stored_once
        assert stored is not None
        uncertain = any(replica.suspect or replica.restored for replica in cluster.replicas)
        if not cluster.running and not uncertain and cluster.store_alive:
            cluster.put_back_store(stored)

    @rule(slot=slots)
    def replica_is_started(self, slot: int) -> None:
        self.cluster.replicas[self.slot(slot)].alive = True

    @rule(slot=slots)
    def connection_is_cut(self, slot: int) -> None:
        self.cluster.cut(self.cluster.ids[self.slot(slot)])

    @rule(slot=slots, status=st.sampled_from([Status.NO_SPACE, Status.IO_ERROR]))
    def write_fails_at_one(self, slot: int, status: Status) -> None:
        if self.cluster.running and self.slot(slot) in self.cluster.loop.links:
            replica = self.cluster.replicas[self.slot(slot)]
            if status is Status.IO_ERROR:
                if any(other.suspect or other.restored for other in self.cluster.replicas):
                    return  # two disks that lie are beyond the contract
                replica.suspect = True
            self.cluster.fail_write(replica.id, status)

    @rule(region=st.integers(0, REGIONS - 1))
    def write_fails_everywhere(self, region: int) -> None:
        cluster = self.cluster
        serving = cluster.running and cluster.volume.phase is VolumePhase.SERVING
        members = cluster.loop.members
        if serving and members and all(slot in cluster.loop.links for slot in members):
            cluster.diverge(region)

    @rule()
    def store_fails(self) -> None:
        if self.cluster.running and self.cluster.store_alive:
            self.cluster.store_down()

    @rule()
    def store_returns(self) -> None:
        if not self.cluster.store_alive:
            self.cluster.store_back()

    @rule()
    def engine_is_killed(self) -> None:
        if self.cluster.running:
            self.cluster.crash_engine()

    @rule()
    def engine_is_started(self) -> None:
        if not self.cluster.running and self.cluster.store_alive:
            self.cluster.start_engine()

    # What always holds

    @invariant()
    def nothing_acknowledged_can_be_lost(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check()

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.heal()

    def heal(self) -> None:
        cluster = self.cluster
        cluster.out_of_reach.clear()
        for replica in cluster.replicas:
            replica.alive = True
        if not cluster.store_alive:
            cluster.store_back()
        for _ in range(HEAL_ROUNDS_MAX):
            if not cluster.running:
                cluster.start_engine()
            cluster.settle()
            cluster.check()
            for kind in (*OPEN_TIMERS, TimerKind.PULL_RETRY):
                if cluster.running:
                    cluster.fire(kind)
            if cluster.running and all(entry.in_sync for entry in cluster.volume.entries):
                break
        cluster.settle()
        cluster.check()
        volume = cluster.volume
        states = [f"{e.id} {e.state.value} {e.reason}" for e in volume.entries if not e.in_sync]
        assert not states, f"{states} {volume.opening.must_wait} {cluster.exit_codes} {cluster.stored}"
        assert volume.phase is VolumePhase.SERVING
        assert volume.reconcile is None and not cluster.loop.unequal and not cluster.loop.partial_wait
        assert not cluster.loop.writes, "every write is acknowledged in the end"
        contents = [{b: w for b, w in r.content.items() if w} for r in cluster.replicas]
        assert all(content == contents[0] for content in contents), contents
        for block, write in cluster.acked.items():
            assert contents[0].get(block, 0) >= write


TestVolumeMachine = VolumeMachine.TestCase
TestVolumeMachine.settings = settings(
    max_examples=int(os.environ.get("DOLMEN_MODEL_EXAMPLES", "150")),
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate]
    + ([Phase.shrink] if os.environ.get("DOLMEN_MODEL_SHRINK") else []),
)
