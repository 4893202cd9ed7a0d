"""One attached volume: who is in sync, what is done about who is not. The engine's pure step machine.

Owns the volume's phases, the replicas' sessions and roles, the membership records of this epoch, and whose
answer an acknowledgement needs. ``step(event)`` returns what the shell (``server.py``) must do; there is no
clock, socket, task or chance in here. Parts with an order of their own stand apart: ``membership.py`` (open
and commit rules), ``joining.py`` (a resync), ``reconcile.py``, ``requests.py`` (growth, detach).

Does not own requests, blocks or sockets: that is ``dataplane/core/src/engine/``, reached through
``io_path.py``.

Promises, checked after each step (``invariants.py``): while clients are served, a write is acknowledged
only when it is held by every replica that any record named which may be durable anywhere (C13); only replicas
that the committed record names, and that have a link, serve reads (C8); at most one resync runs, and none
while members are being made equal.
"""

from __future__ import annotations

from engine import events as ev
from engine import invariants, replacing
from engine.joining import Joining
from engine.limits import (
    LEASE_WAIT_S,
    NO_SPACE_RETRY_S,
    PULL_RETRY_S,
    RECONNECT_CAP_S,
    RETRY_BASE_S,
    RETRY_CAP_S,
    STABLE_AFTER_S,
)
from engine.membership import Ledger, MustWait, lease_quorums
from engine.opening import Opening
from engine.opening import VolumeSpec as VolumeSpec
from engine.pace import STARTING
from engine.phase import NEXT_PHASES, VolumePhase
from engine.reconcile import Reconcile
from engine.regions import Regions, RegionSet
from engine.replica_entry import (
    REQUIRED_RESYNC_STATES,
    RESYNC_STATES,
    ReplicaEntry,
    ReplicaState,
)
from engine.requests import Detach, Growth
from protocol.errors import BadRequest, StaleEpoch, StorageError, from_wire
from protocol.frames import Status
from protocol.membership import MembershipRecord

SOURCE_CODES = frozenset({"unreachable", "source_failed"})
"""A pull that failed so says nothing against the replica that was to be brought up to date."""

UPKEEP_PASSES_MAX = 32
"""Each pass but the last does something that cannot be undone within the step; a handful is normal."""


class Volume:
    def __init__(self, spec: VolumeSpec) -> None:
        self.spec = spec
        self.size_bytes = spec.size_bytes
        self.phase = VolumePhase.INSPECTING
        self.entries = tuple(ReplicaEntry(slot, r) for slot, r in enumerate(spec.replica_ids))
        for entry in self.entries:
            entry.forked = entry.id in spec.grant.forked
        self.opening = Opening(spec)
        self.ledger: Ledger | None = None
        self.joining: Joining | None = None
        self.reconcile: Reconcile | None = None
        self.pace = STARTING
        self.store_up = False
        self.store_reason = "not connected yet"
        self.members: tuple[int, ...] = ()  # as last told to the data plane
        self.readers: tuple[int, ...] = ()
        self.lease: ev.Quorums = ()
        self._stored_stamp = spec.stored.stamp
        self._opened_suspect = False  # all members the volume was opened with were suspect
        self._diverged: set[int] = set()  # regions to reconcile next
        self._token = 0
        self._to_complete: dict[
            int, tuple[int, int]
        ] = {}  # token -> slot, session of a member that came back
        self._retry_started = False
        self._growth = Growth(self)
        self._detach = Detach(self)
        self._out: list[ev.Action] = []

    @property
    def ended(self) -> bool:
        return self.phase is VolumePhase.ENDED

    def step(self, event: ev.Event) -> list[ev.Action]:
        """Apply one event; what the shell must do, in this order. No I/O, no clock, no await."""
        self._out = []
        if not self.ended:
            self._apply(event)
            self._upkeep()
            self.check_invariants()
        return self._out

    # What the parts may do (joining.Host, requests.Host)

    @property
    def name(self) -> str:
        return self.spec.name

    def grown(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.act(ev.SetSize(size_bytes))

    def act(self, action: ev.Action) -> None:
        self._out.append(action)

    def move(self, entry: ReplicaEntry, to: ReplicaState) -> None:
        was = entry.state
        entry.transition(to)
        self._log("replica state changed", replica=entry.id, was=was.value, now=to.value, reason=entry.reason)

    def next_token(self) -> int:
        self._token += 1
        return self._token

    def retry_pulls_later(self) -> None:
        if not self._retry_started:
            self._retry_started = True
            self.act(ev.StartTimer(ev.Timer(ev.TimerKind.PULL_RETRY), PULL_RETRY_S))

    def _enter(self, to: VolumePhase) -> None:
        """The only assignment to ``phase`` after the first."""
        assert to in NEXT_PHASES[self.phase], f"{self.phase.name} -> {to.name}"
        self._log("volume phase changed", was=self.phase.value, now=to.value)
        self.phase = to

    def _log(self, event: str, **fields: object) -> None:
        self.act(ev.Log(event, fields))

    # Events

    def _apply(self, event: ev.Event) -> None:
        match event:
            case ev.Started():
                timer = ev.Timer(ev.TimerKind.STRAGGLERS)
                self.act(ev.StartTimer(timer, self.spec.straggler_wait_s))
            case ev.ReplicaUp() | ev.Claimed() | ev.LinkAttached() | ev.ReplicaDown() | ev.LinkDown():
                self._on_session_event(event)
            case ev.RecordPersisted(slot, session, stamp):
                if entry := self._current(slot, session):
                    entry.persisting = None
                    entry.held = max(entry.held, stamp)
            case ev.RecordStored(stamp):
                self._stored_stamp = stamp
                self._store_is(True, "")
            case ev.StoreUp():
                self._store_is(True, "")
            case ev.StoreDown(reason):
                self._store_is(False, reason)
            case (
                ev.DirtyListed()
                | ev.ChangedListed()
                | ev.ResyncBegun()
                | ev.RegionsPulled()
                | ev.PullIncomplete()
                | ev.ResyncEnded()
                | ev.Drained()
                | ev.RegionWanted()
                | ev.RegionDiverged()
            ):
                self._on_resync_event(event)
            case ev.Paced(pace):
                self.pace = pace
            case ev.Resized(slot, session, size_bytes):
                if entry := self._current(slot, session):
                    entry.resizing = False
                    entry.size_bytes = max(entry.size_bytes, size_bytes)
            case ev.Cleaned(slot, _):
                self._detach.on_cleaned(slot)
            case ev.CallFailed():
                self._on_call_failed(event)
            case ev.TimerFired(timer):
                self._on_timer(timer)
            case ev.Fenced(by):
                self._end(ev.EXIT_FENCED, f"fenced by {by}")
            case ev.DetachAsked(request):
                self._on_detach(request)
            case ev.ReplaceAsked():
                if (change := replacing.decide(self.entries, self.ledger, event, self.act)) is not None:
                    self._drop(change.old, f"replaced by {event.new_id}")
                    self.entries = change.entries
            case ev.ResizeAsked():
                self._growth.ask(event)

    def _current(self, slot: int, session: int) -> ReplicaEntry | None:
        """The replica, if the event is about its present session."""
        entry = self.entries[slot]
        alive = entry.state is not ReplicaState.OFFLINE and entry.session == session
        return entry if alive else None

    def _store_is(self, up: bool, reason: str) -> None:
        if self.store_up != up:
            self._log("state store reachable" if up else "state store lost", reason=reason)
        self.store_up, self.store_reason = up, reason

    def _on_session_event(self, event: ev.SessionEvent) -> None:
        match event:
            case ev.ReplicaUp(slot, session, report):
                self._on_up(self.entries[slot], session, report)
            case ev.ReplicaDown(slot, session, reason):
                if entry := self._current(slot, session):
                    self._lose(entry, reason)
                elif self.entries[slot].state is ReplicaState.OFFLINE and session == 0:
                    self.entries[slot].reason = reason
            case ev.Claimed(slot, session, report):
                if entry := self._current(slot, session):
                    entry.take_report(report)
                    entry.opens_seen = max(entry.opens_seen, report.opens)
                    entry.claimed_once = True
                    self.move(entry, ReplicaState.CLAIMED)
            case ev.LinkAttached(slot, session, generation):
                entry = self._current(slot, session)
                if entry is None:
                    self.act(ev.DetachLink(slot, generation))
                    return
                entry.generation = generation
                if entry.state is ReplicaState.LINKING and self.joining is not None:
                    self.joining.on_linked()
            case ev.LinkDown(slot, generation, reason, status):
                entry = self.entries[slot]
                if entry.generation == generation:
                    entry.generation = None
                    self._on_link_down(entry, reason, status)

    def _on_up(self, entry: ReplicaEntry, session: int, report: ev.ReplicaReport) -> None:
        if report.epoch > self.spec.epoch:
            self._end(ev.EXIT_FENCED, f"{entry.id} was claimed in epoch {report.epoch}")
            return
        if report.state != "open":
            # It can't be claimed, or (its metadata can't be read) not even say who it is. So it is as good as
            # away, and is looked at again: its server may yet open it, or it is made anew.
            entry.reason = report.reason or report.state
            self.act(ev.CloseSession(entry.slot, session, RECONNECT_CAP_S))
            return
        if report.replica_id != entry.id:
            entry.reason = f"its address answers as {report.replica_id}"
            self.act(ev.CloseSession(entry.slot, session, RETRY_CAP_S))
            return
        entry.begin_session(session, report, self.spec.epoch)
        self.opening.on_up(entry)
        self.move(entry, ReplicaState.FOUND)

    def _on_link_down(self, entry: ReplicaEntry, reason: str, status: int) -> None:
        if status == Status.STALE_EPOCH:
            self._end(ev.EXIT_FENCED, f"fenced by {entry.id}")
            return
        if status == Status.IO_ERROR:
            entry.failed_here = True
        self._drop(entry, reason, no_space=status == Status.NO_SPACE)

    def _drop(self, entry: ReplicaEntry, reason: str, *, no_space: bool = False) -> None:
        """End a session from our side; it is tried again later."""
        if entry.state is ReplicaState.OFFLINE:
            return
        delay_s = NO_SPACE_RETRY_S if no_space else 0.0
        if entry.failures:
            delay_s = max(delay_s, min(RETRY_CAP_S, RETRY_BASE_S * 2 ** (entry.failures - 1)))
        if self._is_member(entry):
            delay_s = min(delay_s, RECONNECT_CAP_S)  # everybody may be waiting for it
        entry.failures += 1
        self.act(ev.CloseSession(entry.slot, entry.session, delay_s))
        self._lose(entry, reason)

    def _lose(self, entry: ReplicaEntry, reason: str) -> None:
        entry.reason = reason
        if entry.generation is not None:
            self.act(ev.DetachLink(entry.slot, entry.generation))
            entry.generation = None
        self.move(entry, ReplicaState.OFFLINE)
        if self.joining is not None and self.joining.target is entry:
            self.joining.on_dropped()
            self.joining = None
        self._detach.on_cleaned(entry.slot)

    def _on_resync_event(self, event: ev.ResyncEvent) -> None:
        match event:
            case ev.Drained(token):
                self._on_drained(token)
                return
            case ev.RegionWanted(region):
                for part in (self.joining, self.reconcile):
                    if part is not None:
                        part.want(region)
                return
            case ev.RegionDiverged(region):
                self._diverged.add(region)
                if self.reconcile is not None:
                    self.reconcile.forget(region)
                return
        entry = self._current(event.slot, event.session)
        if entry is None:
            return
        joining = self.joining if self.joining is not None and self.joining.target is entry else None
        match event:
            case ev.DirtyListed(regions=regions):
                entry.dirty = regions
            case ev.ChangedListed(target=target, regions=regions):
                if entry.slot == target and entry.state is ReplicaState.ATTACHING:
                    entry.written = regions
                elif self.joining is not None and self.joining.target.slot == target:
                    self.joining.on_changed(entry, regions)
            case ev.ResyncBegun(slot):
                if joining is not None:
                    joining.on_begun()
                elif self.reconcile is not None:
                    self.reconcile.on_begun(slot)
            case ev.RegionsPulled(slot, _, regions, bytes_copied, blocks_damaged):
                if blocks_damaged:
                    self._log("blocks lost on all replicas", replica=entry.id, block_count=blocks_damaged)
                if joining is not None:
                    joining.on_pulled(regions, bytes_copied, blocks_damaged)
                elif self.reconcile is not None:
                    self.reconcile.on_pulled(slot, regions, bytes_copied)
            case ev.PullIncomplete(slot, _, source, regions, bytes_copied):
                if joining is not None:
                    joining.on_incomplete(source, regions, bytes_copied)
                elif self.reconcile is not None:
                    self.reconcile.on_incomplete(slot, source, regions, bytes_copied)
            case ev.ResyncEnded():
                if joining is not None:
                    joining.on_ended()

    def _on_drained(self, token: int) -> None:
        self._detach.on_drained(token)
        if token in self._to_complete:
            slot, session = self._to_complete.pop(token)
            entry = self._current(slot, session)
            if entry is not None and entry.in_sync and entry.dirty:
                self.act(ev.CompleteRegions(slot, session, entry.dirty))
                entry.dirty = ()
        if self.joining is not None:
            self.joining.on_drained(token)
        if self.reconcile is not None:
            self.reconcile.on_drained(token)

    def _on_call_failed(self, event: ev.CallFailed) -> None:
        entry = self._current(event.slot, event.session)
        if event.code == StaleEpoch.code:
            self._end(ev.EXIT_FENCED, f"fenced by {self.entries[event.slot].id}")
            return
        if entry is None:
            return
        joining = self.joining
        match event.call:
            case ev.Call.CHANGED if event.other != event.slot:
                if joining is not None and joining.target.slot == event.other:
                    joining.on_changed_failed(entry)
                return
            case ev.Call.PULL if event.code in SOURCE_CODES:
                if joining is not None and joining.target is entry:
                    joining.on_source_failed(event.other, event.regions)
                elif self.reconcile is not None:
                    self.reconcile.on_source_failed(event.slot, event.other, event.regions)
                return
            case ev.Call.COMPLETE:
                self._log("complete_regions failed", replica=entry.id, reason=event.reason)
                return
            case ev.Call.RESIZE if self._growth.under_way and entry.in_sync:
                entry.resizing = False
                self._growth.answer(from_wire({"code": event.code, "message": f"{entry.id}: {event.reason}"}))
                return
            case ev.Call.CLEAN:
                self._detach.on_cleaned(event.slot)
                return
        self._drop(entry, event.reason, no_space=event.code == "no_space")

    def _on_timer(self, timer: ev.Timer) -> None:
        match timer.kind:
            case ev.TimerKind.STRAGGLERS:
                self.opening.stragglers_waited = True
            case ev.TimerKind.LEASE:
                self.opening.lease_over = True
            case ev.TimerKind.PULL_RETRY:
                self._retry_started = False
                if self.joining is not None:
                    self.joining.forgive_sources()
                if self.reconcile is not None:
                    self.reconcile.retry()
            case ev.TimerKind.STABLE:
                entry = self.entries[timer.slot]
                if entry.in_sync and entry.stable_number == timer.number:
                    entry.failures = 0
            case ev.TimerKind.DETACH:
                self._end(ev.EXIT_DETACHED, "detached without cleaning")

    # Upkeep: level-triggered, until nothing is left to do

    def _upkeep(self) -> None:
        for _ in range(UPKEEP_PASSES_MAX):
            before = len(self._out)
            if self.phase in (VolumePhase.INSPECTING, VolumePhase.CLAIMING):
                self._advance_opening()
            self._claim_found()
            if self.phase in (VolumePhase.RECORDING, VolumePhase.SERVING, VolumePhase.DETACHING):
                self._advance_membership()
                self._assign_roles()
                self._begin_serving()
                self._inform_others()
                self._growth.advance()
                self._advance_resyncs()
                self.announce_members()
            self._advance_detach()
            if len(self._out) == before:
                return
        raise AssertionError(f"upkeep does not settle: {self._out[-5:]}")

    # Opening

    def _advance_opening(self) -> None:
        if self.phase is VolumePhase.INSPECTING:
            opening = self.opening
            decision = opening.decide(e for e in self.entries if e.state is not ReplicaState.OFFLINE)
            if self._look_again():
                return
            if isinstance(decision, MustWait) or (decision.absent and not opening.stragglers_waited):
                return
            self._enter(VolumePhase.CLAIMING)
            self._claim_found()
        if any(entry.state is ReplicaState.CLAIMING for entry in self.entries):
            return
        # Only now are the records final: an older engine may have committed one until it was locked out. One
        # that must not be claimed counts as what it is, not as one that may still come.
        decision = self.opening.decide(
            entry for entry in self.entries if entry.claimed or entry.state is ReplicaState.FOUND
        )
        if self._look_again():
            self._enter(VolumePhase.INSPECTING)
            return
        if isinstance(decision, MustWait):
            self._enter(VolumePhase.INSPECTING)
            return
        self.opening.judge(self.entries)
        self._opened_suspect = any(e.suspect for e in self.entries if e.id in decision.members)
        if not self.opening.lease_over:
            self.act(ev.StartTimer(ev.Timer(ev.TimerKind.LEASE), LEASE_WAIT_S))
        self.ledger = Ledger(
            epoch=self.spec.epoch,
            newest=decision.newest,
            members=decision.members,
            replica_count=len(self.entries),
        )
        self._log("open decided", record=decision.newest.to_wire(), members=sorted(decision.members))
        self._enter(VolumePhase.RECORDING)

    def _look_again(self) -> bool:
        """Replicas whose report may be older than a record that has come to light since, of an engine that
        claimed them meanwhile, are asked anew."""
        outdated = [e for e in self.entries if e.state is ReplicaState.FOUND and self.opening.is_outdated(e)]
        for entry in outdated:
            self.act(ev.CloseSession(entry.slot, entry.session, 0.0))
            self._lose(entry, "it was looked at before the newest record was made")
        return bool(outdated)

    def _claim_found(self) -> None:
        # While cleaning: one that was cleaned is closed to this epoch, and would answer that it is stale.
        if self.phase in (VolumePhase.INSPECTING, VolumePhase.CLEANING):
            return
        opened = self.ledger is not None and self.ledger.opened
        for entry in self.entries:
            if entry.state is ReplicaState.FOUND and self.opening.may_claim(entry, opened=opened):
                self.move(entry, ReplicaState.CLAIMING)
                self.act(ev.Claim(entry.slot, entry.session, self.opening.known_opens(entry)))

    # Membership

    def _is_member(self, entry: ReplicaEntry) -> bool:
        """Named by the committed record (before this epoch's first: to be named by it)."""
        return self.ledger is not None and entry.id in self.ledger.committed.in_sync

    def members_up(self) -> list[ReplicaEntry]:
        return [entry for entry in self.entries if entry.in_sync and self._is_member(entry)]

    def _advance_membership(self) -> None:
        ledger = self.ledger
        assert ledger is not None
        opening = self.phase is VolumePhase.RECORDING
        if opening and any(self._is_member(e) and self._may_attach(e) for e in self.entries):
            return  # they are about to be there, or gone
        target = frozenset(entry.id for entry in self.members_up())
        if target:
            target |= self._joiner_to_record(ledger)
            if target != ledger.latest.in_sync or (ledger.proposed is None and not ledger.opened):
                record = ledger.propose(target)
                self._log("record proposed", record=record.to_wire())
                self._announce_lease()  # first: from here on the record may be durable somewhere
                self.act(ev.StoreRecord(record, self._opens_of(record)))
        self._drive_proposal(ledger)

    def _joiner_to_record(self, ledger: Ledger) -> frozenset[str]:
        """The replica whose resync is done, if it may be named now."""
        joiner = self.joining.target if self.joining is not None else None
        if joiner is None or joiner.state is not ReplicaState.RECORDING:
            return frozenset()
        if self.store_up:
            return frozenset({joiner.id})
        if joiner.id not in ledger.exposed:
            return frozenset()  # without the state store it would only hold everybody up
        if len(self.members_up()) < len(ledger.committed.in_sync):
            # A member was lost while the state store is away. Without the joiner a majority may go on.
            self._drop(joiner, "state store unreachable while it was being added")
            return frozenset()
        return frozenset({joiner.id})

    def _drive_proposal(self, ledger: Ledger) -> None:
        record = ledger.proposed
        if record is None:
            return
        named = [entry for entry in self.entries if entry.id in record.in_sync]
        for entry in named:
            ready = entry.state in (ReplicaState.IN_SYNC, ReplicaState.RECORDING)
            if ready and entry.held != record.stamp and entry.persisting is None:
                self._persist(entry, record)
        if ledger.can_commit({entry.id: entry.held for entry in self.entries}, self._stored_stamp):
            self._commit(ledger)

    def _opens_of(self, record: MembershipRecord) -> tuple[tuple[str, int], ...]:
        named = [entry for entry in self.entries if entry.id in record.in_sync and entry.report is not None]
        return tuple((entry.id, entry.report.opens) for entry in named if entry.report is not None)

    def _persist(self, entry: ReplicaEntry, record: MembershipRecord) -> None:
        entry.persisting = record.stamp
        self.act(ev.PersistRecord(entry.slot, entry.session, record))

    def _commit(self, ledger: Ledger) -> None:
        were = ledger.committed.in_sync if ledger.opened else frozenset[str]()
        ledger.commit()
        self._log("record committed", record=ledger.committed.to_wire())
        for entry in self.entries:
            if not self._is_member(entry):
                entry.vouched = False
                if entry.state is ReplicaState.ATTACHING:
                    self._drop(entry, "left out while it came back")
            elif entry.id not in were and self.phase is not VolumePhase.RECORDING:
                self._grew(entry)

    def _grew(self, entry: ReplicaEntry) -> None:
        """A record that names it for the first time is committed, whatever became of it meanwhile."""
        entry.vouched = True
        if entry.state is ReplicaState.RECORDING:
            entry.failed_here = False
            entry.rolled_back = entry.forked = False
            self._finish_joining(entry)
        elif entry.state in RESYNC_STATES:
            self._drop(entry, "named in sync while it was resynced again")

    def _finish_joining(self, entry: ReplicaEntry) -> None:
        joining = self.joining
        assert joining is not None and joining.target is entry
        self.joining = None
        self._enter_in_sync(entry)
        self.act(ev.CompleteRegions(entry.slot, entry.session, joining.regions))

    def _enter_in_sync(self, entry: ReplicaEntry) -> None:
        entry.reason = ""
        self.move(entry, ReplicaState.IN_SYNC)
        entry.stable_number += 1
        timer = ev.Timer(ev.TimerKind.STABLE, entry.slot, entry.stable_number)
        self.act(ev.StartTimer(timer, STABLE_AFTER_S))

    def announce_members(self) -> None:
        """Tell the data plane whose answers count, when that changed."""
        members: tuple[int, ...] = ()
        readers: tuple[int, ...] = ()
        if self.phase in (VolumePhase.SERVING, VolumePhase.DETACHING):
            required = self._required()
            members = tuple(entry.slot for entry in self.entries if entry.id in required)
            readers = tuple(entry.slot for entry in self.members_up())
        self._announce_lease()
        if not set(readers) <= set(self.readers):
            self._set_members(members)  # who serves reads must be a member first
        if readers != self.readers:
            self.readers = readers
            self.act(ev.SetReaders(readers))
        self._set_members(members)

    def _announce_lease(self) -> None:
        """Whose fresh answers a read needs. A proposal's quorum is in force before the proposal is sent to
        anybody; an older record's is dropped when a later record is committed, for then no engine can open
        from it any more."""
        lease: ev.Quorums = ()
        if self.phase in (VolumePhase.SERVING, VolumePhase.DETACHING):
            assert self.ledger is not None
            quorums = lease_quorums(self.ledger.possible, len(self.entries))
            lease = tuple((tuple(e.slot for e in self.entries if e.id in ids), need) for ids, need in quorums)
        if lease != self.lease:
            self.lease = lease
            self.act(ev.SetLease(lease))

    def _set_members(self, members: tuple[int, ...]) -> None:
        if members != self.members:
            self.members = members
            self.act(ev.SetMembers(members))

    def requires(self, entry: ReplicaEntry) -> bool:
        """Whether acknowledgements need it, connected or not."""
        return entry.id in self._required()

    def _required(self) -> frozenset[str]:
        assert self.ledger is not None
        if self.joining is not None and self.joining.target.state in REQUIRED_RESYNC_STATES:
            return self.ledger.exposed | {self.joining.target.id}
        return self.ledger.exposed

    # Roles

    def _may_attach(self, entry: ReplicaEntry) -> bool:
        """On its way to being a member with a link."""
        if entry.state in (ReplicaState.CLAIMED, ReplicaState.STALE):
            return self._obstacle(entry) == ""
        return entry.state is ReplicaState.ATTACHING

    def _obstacle(self, entry: ReplicaEntry) -> str:
        """Why a claimed member can't simply go on as one; "" if it can."""
        assert entry.report is not None
        if entry.report.state != "open":
            return entry.report.reason or entry.report.state
        if entry.suspect and not (self.phase is VolumePhase.RECORDING and self._opened_suspect):
            return "it may have lost acknowledged writes"
        opening = self.phase is VolumePhase.RECORDING
        if not opening and (self.reconcile is not None or not entry.vouched):
            return "members were being made equal when it was lost"
        return ""

    def _assign_roles(self) -> None:
        for entry in self.entries:
            if entry.state is ReplicaState.ATTACHING:
                known = entry.dirty is not None and (entry.written is not None or not entry.accepted)
                if entry.generation is not None and known:
                    self._enter_in_sync(entry)
                    if self.phase is not VolumePhase.RECORDING:
                        self._complete_later(entry)
                continue
            # STALE and a member: it was lost and came back while the record that names it was committed.
            decidable = entry.state is ReplicaState.CLAIMED or (
                entry.state is ReplicaState.STALE and self._is_member(entry)
            )
            if not decidable or entry.size_bytes < self.size_bytes:
                continue
            if not self._is_member(entry):
                if entry.report is not None and entry.report.state == "open":
                    entry.reason = "it missed writes and waits for its turn"
                    self.move(entry, ReplicaState.STALE)
                else:
                    entry.reason = self._obstacle(entry)
            elif obstacle := self._obstacle(entry):
                entry.reason = obstacle
            else:
                self.move(entry, ReplicaState.ATTACHING)
                self.act(ev.ListDirty(entry.slot, entry.session))
                if entry.accepted:
                    self.act(ev.ListChanged(entry.slot, entry.session, entry.slot, (0, 0)))
                self.act(ev.AttachLink(entry.slot, entry.session, ev.LinkMode.SYNC))
        self._reopen_if_stuck()

    def _complete_later(self, entry: ReplicaEntry) -> None:
        """A member came back. Once it has the unfinished writes, what it had dirty is equal everywhere."""
        token = self.next_token()
        self._to_complete[token] = (entry.slot, entry.session)
        self.act(ev.Barrier(token))

    def _reopen_if_stuck(self) -> None:
        """All members were lost, and those that came back can't go on where they were: a new epoch starts
        from what they say. Clients see a pause; what was acknowledged is decided by the open rule."""
        members = [entry for entry in self.entries if self._is_member(entry)]
        coming = (ReplicaState.FOUND, ReplicaState.CLAIMING)
        if any(e.in_sync or self._may_attach(e) or e.state in coming for e in members):
            return
        here = (ReplicaState.CLAIMED, ReplicaState.STALE)
        back = [e for e in members if e.state in here and e.report and e.report.state == "open"]
        certain = [entry for entry in back if not entry.suspect]
        unequal = any(self.reconcile is not None or not entry.vouched for entry in certain)
        if unequal or (not certain and len(back) == len(members)):
            self._end(ev.EXIT_REOPEN, "members came back without what they had")

    def _begin_serving(self) -> None:
        ledger = self.ledger
        if self.phase is not VolumePhase.RECORDING or ledger is None or not ledger.opened:
            return
        members = self.members_up()
        if len(members) < len(self._required()):
            return  # it comes back, or a record without it is committed
        if not self.opening.lease_over:
            return  # an older engine may still answer reads
        regions = RegionSet()
        for entry in members:
            assert entry.dirty is not None
            regions.update(entry.dirty)
            regions.update(entry.written or ())
            entry.vouched = True
        self._enter(VolumePhase.SERVING)
        self._start_reconcile(members, regions)

    def _inform_others(self) -> None:
        """Replicas that are not members hold the committed record too: it stamps what they write."""
        ledger = self.ledger
        if ledger is None or not ledger.opened:
            return
        for entry in self.entries:
            outside = entry.state is ReplicaState.STALE or (
                entry.state in RESYNC_STATES and entry.id not in ledger.latest.in_sync
            )
            if outside and entry.held < ledger.committed.stamp and entry.persisting is None:
                self._persist(entry, ledger.committed)

    # Resync and reconcile

    def _start_reconcile(self, members: list[ReplicaEntry], regions: Regions) -> None:
        if len(members) > 1 and regions:
            self._log("reconcile started", region_count=len(regions), source=members[0].id)
            self.act(ev.SetUnequal(regions))
            self.reconcile = Reconcile(self, members, regions)
            return
        for entry in members:
            # Also without regions: it is what clears a suspicion.
            self.act(ev.CompleteRegions(entry.slot, entry.session, regions))

    def _advance_resyncs(self) -> None:
        if self.phase not in (VolumePhase.SERVING, VolumePhase.DETACHING):
            return
        if self._diverged and self.reconcile is None:
            self._reconcile_diverged()
        if self.reconcile is not None:
            self.reconcile.advance()
            if self.reconcile.done:
                self._log("reconcile done", region_count=self.reconcile.total_count)
                self.reconcile = None
        if self.reconcile is None and not self._diverged and self.phase is VolumePhase.SERVING:
            self._start_joining()
        if self.joining is not None:
            self.joining.advance(self.members_up(), store_up=self.store_up, pace=self.pace)

    def _reconcile_diverged(self) -> None:
        """A write failed on all members; each may have some of it."""
        if self.joining is not None:
            self._drop(self.joining.target, "a write failed on all members during its resync")
        members = self.members_up()
        if len(members) < len(self._required()):
            return  # it comes back, or a record without it is committed
        regions = tuple(sorted(self._diverged))
        self._diverged.clear()
        if len(members) > 1:
            self._start_reconcile(members, regions)
        else:
            self.act(ev.RegionsEqual(regions))  # one copy is equal to itself

    def _start_joining(self) -> None:
        ledger = self.ledger
        if self.joining is not None or ledger is None or not self.members_up():
            return
        for entry in self.entries:
            waits = entry.state is ReplicaState.STALE and not self._is_member(entry)
            if waits and entry.held >= ledger.committed.stamp:
                self.joining = Joining(self, entry)
                return

    # Detach and the end

    def _on_detach(self, request: int) -> None:
        self._detach.ask(request)
        if self.phase in (VolumePhase.INSPECTING, VolumePhase.CLAIMING, VolumePhase.RECORDING):
            self._end(ev.EXIT_DETACHED, "detached before it was open")
        elif self.phase is VolumePhase.SERVING:
            if self.joining is not None:
                self._drop(self.joining.target, "the volume is being detached")
            self._enter(VolumePhase.DETACHING)
            self._growth.answer(BadRequest(reason=f"volume {self.spec.name} is being detached"))
            self._detach.begin()

    def _advance_detach(self) -> None:
        if self.phase is VolumePhase.DETACHING and self._detach.drained:
            ledger = self.ledger
            assert ledger is not None
            unequal = self.reconcile is not None or bool(self._diverged)
            all_up = len(self.members_up()) == len(ledger.committed.in_sync)
            if ledger.proposed is None and not unequal and all_up:
                # Every request is answered.
                self._enter(VolumePhase.CLEANING)
                self._detach.clean()
        if self.phase is VolumePhase.CLEANING and self._detach.cleaned:
            self._end(ev.EXIT_DETACHED, "detached")

    def _end(self, exit_code: int, reason: str) -> None:
        if self.ended:
            return
        self._log("volume closed", exit_code=exit_code, reason=reason)
        self._enter(VolumePhase.ENDED)
        error: StorageError | None = None
        if exit_code != ev.EXIT_DETACHED:
            error = StorageError(f"volume {self.spec.name}: {reason}")
        self._growth.answer(error or BadRequest(reason=f"volume {self.spec.name} was detached"))
        self._detach.answer(error)
        self.act(ev.Stop(exit_code))

    def check_invariants(self) -> None:
        invariants.check(self)
