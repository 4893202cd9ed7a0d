"""Bringing one stale replica up to date, from its first comparison to the record that names it. Pure.

Owns the order of a resync. The replica X may be named by a record only when it holds every write that was
or will be acknowledged:

==  ==================  ====================================================================
#   state               why
==  ==================  ====================================================================
1   COMPARING           R = what a source marked since X was last in sync, and what X marked itself
2   MARKING             parts of blocks in R wait from now on (X lacks the rest of the block);
                        X marks R durably: if it dies half-way it still knows what to compare
3   LINKING, SETTLING   writes begin to reach X; those that began before are done at the members
4   COMPARING again     regions first written between 1 and 3: the members hold them, X does not
5   MARKING, SETTLING   the same for those, if there are any. X forgot which blocks were fresh; the
                        barrier makes the source hold all that X received before
6   PULLING             copy what differs, never over a block that a live write made fresh; what is
                        equal may be cleaned at X: R is remembered by the members' stamps
7   JOINING             acknowledgements need X too; writes sent to it earlier are done
8   FLUSHING            what was pulled is as durable as the members' copies
9   RECORDING           members, X and the state store hold a record that names X
==  ==================  ====================================================================

A failure of X at any point begins again from 1, with what was pulled already equal and cheap to compare. A
source that dies is replaced: R does not depend on which source named it, since all of them are in sync.

What X wrote under a history that was given up (``forked``), or before it was put back to an older state, need
not be in anybody's marks: then R is all that a source ever wrote and all that X ever wrote.

A region in which one source has damaged blocks is pulled from the others, one after the other; each gives
what it has. Only when all have been asked is what is left recorded at X as damaged, as it is at them: a
resync that waits for bytes that exist nowhere would never end.

Does not own sessions, records or who is required: ``volume.py``, which is handed in as ``Host``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.events import (
    Action,
    AttachLink,
    Barrier,
    BeginResync,
    CompleteRegions,
    EndResync,
    LinkMode,
    ListChanged,
    ListDirty,
    PartialDone,
    PullRegions,
    SetPartialWait,
)
from engine.pace import PullPace
from engine.regions import Regions, RegionSet
from engine.replica_entry import ReplicaEntry, ReplicaState
from engine.resync import PullPlan

COMPLETE_BATCH_REGIONS = 256
"""1 GiB: how much of a target an unclean stop may leave to be looked at again when it opens."""


class Host(Protocol):
    """What a part of the volume's machine may do to the rest."""

    def act(self, action: Action) -> None: ...
    def move(self, entry: ReplicaEntry, to: ReplicaState) -> None: ...
    def next_token(self) -> int: ...
    def retry_pulls_later(self) -> None: ...
    def announce_members(self) -> None: ...
    def requires(self, entry: ReplicaEntry) -> bool: ...


class Joining:
    """The resync of one replica. Thrown away when it ends, whichever way."""

    def __init__(self, host: Host, target: ReplicaEntry) -> None:
        assert target.state is ReplicaState.STALE
        self._host = host
        self.target = target
        self.plan: PullPlan | None = None
        self.waits_for_store = False
        self._linked = False
        self._compared_twice = False
        self._source: ReplicaEntry | None = None
        self._bad_sources: set[int] = set()  # until the retry timer
        self._asked_session: tuple[int, int] | None = None  # slot and session of the source that was asked
        self._changed: Regions | None = None
        self._own: Regions | None = None if target.compare_all else ()  # what the target itself ever wrote
        self._own_asked = False
        self._dirty_asked = False
        self._token = 0
        self._everything = RegionSet()
        self._equal: list[int] = []  # pulled, not yet reported to the target
        self._must_begin = False  # a pull failed: some of its regions may no longer be tracked
        target.reason = "it missed writes"
        host.move(target, ReplicaState.COMPARING)

    @property
    def regions(self) -> Regions:
        """All regions that were made equal."""
        return self._everything

    def advance(self, members: Sequence[ReplicaEntry], *, store_up: bool, pace: PullPace) -> None:
        """Do what is due. ``members``: in sync now, and so possible sources."""
        self._choose_source(members)
        state = self.target.state
        if state is ReplicaState.COMPARING:
            self._ask()
            self._compare()
        elif state is ReplicaState.PULLING:
            self._pull(members, store_up=store_up, pace=pace)

    def _choose_source(self, members: Sequence[ReplicaEntry]) -> None:
        candidates = [entry for entry in members if entry.slot not in self._bad_sources]
        if self._source in candidates:
            return
        self._source = candidates[0] if candidates else None
        if self._source is None and members:
            self._host.retry_pulls_later()

    def forgive_sources(self) -> None:
        self._bad_sources.clear()

    # COMPARING

    def _ask(self) -> None:
        if not self._linked and self.target.dirty is None and not self._dirty_asked:
            self._dirty_asked = True
            self._host.act(ListDirty(self.target.slot, self.target.session))
        if self._own is None and not self._own_asked:
            self._own_asked = True
            slot, session = self.target.slot, self.target.session
            self._host.act(ListChanged(slot, session, slot, (0, 0)))
        source = self._source
        if source is None or self._changed is not None:
            return
        if self._asked_session != (source.slot, source.session):
            self._asked_session = (source.slot, source.session)
            assert self.target.report is not None
            # Its own word for what it has is worth nothing if it was put back to an older state.
            since = (0, 0) if self.target.compare_all else self.target.report.synced_at
            self._host.act(ListChanged(source.slot, source.session, self.target.slot, since))

    def on_changed(self, source: ReplicaEntry, regions: Regions) -> None:
        if source is self.target:
            self._own = regions
            return
        asked = self._asked_session == (source.slot, source.session)
        if self.target.state is ReplicaState.COMPARING and asked:
            self._changed = regions

    def _compare(self) -> None:
        if self._changed is None or self.target.dirty is None or self._own is None:
            return
        extra = RegionSet(self._changed)
        extra.update(self.target.dirty)
        extra.update(self._own)
        extra.difference_update(self._everything)
        self._changed, self._asked_session = None, None
        if self._linked and not extra:
            self._host.move(self.target, ReplicaState.PULLING)
            return
        self._everything.update(extra)
        if self.plan is None:
            self.plan = PullPlan(())
        self.plan.add(extra)
        self._mark()

    def _mark(self) -> None:
        """X tracks from here on which blocks live writes made fresh, in all regions still to be pulled."""
        assert self.plan is not None
        regions = self.plan.remaining()
        self._host.move(self.target, ReplicaState.MARKING)
        self._host.act(SetPartialWait(regions))
        self._host.act(BeginResync(self.target.slot, self.target.session, regions))

    # MARKING, LINKING, SETTLING

    def on_begun(self) -> None:
        assert self.target.state is ReplicaState.MARKING
        if self._linked:
            self._settle()
        else:
            self._host.move(self.target, ReplicaState.LINKING)
            self._host.act(AttachLink(self.target.slot, self.target.session, LinkMode.RESYNC))

    def on_linked(self) -> None:
        assert self.target.state is ReplicaState.LINKING
        self._linked = True
        self._settle()

    def _settle(self) -> None:
        self._host.move(self.target, ReplicaState.SETTLING)
        self._token = self._host.next_token()
        self._host.act(Barrier(self._token))

    def on_drained(self, token: int) -> None:
        if token != self._token:
            return
        if self.target.state is ReplicaState.SETTLING:
            # The second comparison comes after the first barrier: see step 4.
            to = ReplicaState.PULLING if self._compared_twice else ReplicaState.COMPARING
            self._compared_twice = True
            self._host.move(self.target, to)
        elif self.target.state is ReplicaState.JOINING:
            # Before the record: the one that names it also ends its doubts about itself, in one write. If its
            # machine then loses power, it is not still taken for a copy that was put back.
            self._complete()
            self._host.move(self.target, ReplicaState.FLUSHING)
            self._host.act(EndResync(self.target.slot, self.target.session))

    # PULLING

    def _pull(self, members: Sequence[ReplicaEntry], *, store_up: bool, pace: PullPace) -> None:
        plan = self.plan
        assert plan is not None
        if plan.done:
            # A record that names it needs the state store. To propose one that can't be committed would
            # make acknowledgements depend on X for nothing.
            self.waits_for_store = not store_up
            if store_up:
                self._host.move(self.target, ReplicaState.JOINING)
                self._host.announce_members()
                self._token = self._host.next_token()
                self._host.act(Barrier(self._token))
            return
        if self._must_begin:
            if plan.in_flight_count == 0:
                self._must_begin = False
                self._mark()
            return
        while self._source is not None and (batch := plan.next_call(pace)):
            background = plan.is_background(batch)
            source, take_damaged = self._source_for(batch, members)
            if source is None:
                plan.on_failed(batch)
                self._host.retry_pulls_later()
                return
            self._host.act(
                PullRegions(
                    self.target.slot,
                    self.target.session,
                    source.slot,
                    batch,
                    rate_bytes_s=pace.rate_of_one_bytes_s if background else 0,
                    source_process=source.process_id,
                    take_damaged=take_damaged,
                )
            )

    def _source_for(
        self, batch: tuple[int, ...], members: Sequence[ReplicaEntry]
    ) -> tuple[ReplicaEntry | None, bool]:
        """Who gives it, None if nobody can just now; and whether what is damaged there is to be taken so."""
        assert self._source is not None and self.plan is not None
        refused = self.plan.refused_by(batch[0]) if len(batch) == 1 else frozenset()
        left = [entry for entry in members if entry.slot not in refused]
        if not refused or self._source in left:
            return self._source, False
        usable = [entry for entry in left if entry.slot not in self._bad_sources]
        if usable:
            return usable[0], False
        # Somebody else may have it but can't be read for now: too early to give it up.
        return (None, False) if left else (self._source, True)

    def want(self, region: int) -> None:
        if self.plan is not None:
            self.plan.want(region)

    def on_pulled(self, regions: Regions, bytes_copied: int, blocks_damaged: int = 0) -> None:
        assert self.plan is not None
        self.plan.on_done(regions, bytes_copied, blocks_damaged)
        self._host.act(PartialDone(regions))
        # Equal, so that its marks can go: a target that is killed opens without reading it all again.
        self._equal.extend(regions)
        if len(self._equal) >= COMPLETE_BATCH_REGIONS:
            self._complete()

    def _complete(self) -> None:
        equal, self._equal = tuple(sorted(self._equal)), []
        if equal:
            self._host.act(CompleteRegions(self.target.slot, self.target.session, equal))

    def on_incomplete(self, source_slot: int, regions: Regions, bytes_copied: int) -> None:
        """The source lacks good copies of some blocks. Those of its regions that are whole are no longer
        tracked at the target; a region that was pulled alone is."""
        assert self.plan is not None
        self.plan.on_incomplete(regions, source_slot, bytes_copied)
        if len(regions) > 1:
            self._must_begin = True

    def on_source_failed(self, source_slot: int, regions: Regions) -> None:
        """The target is well, but could not read from the source."""
        assert self.plan is not None
        self.plan.on_failed(regions)
        self._must_begin = True
        self._bad_sources.add(source_slot)

    def on_changed_failed(self, source: ReplicaEntry) -> None:
        if self._asked_session == (source.slot, source.session):
            self._asked_session = None
            self._bad_sources.add(source.slot)

    # FLUSHING

    def on_ended(self) -> None:
        if self.target.state is ReplicaState.FLUSHING:
            self._host.move(self.target, ReplicaState.RECORDING)

    def on_dropped(self) -> None:
        """The target was lost: nobody needs to wait for its regions."""
        self._host.act(SetPartialWait(()))

    def check_invariants(self) -> None:
        if self.plan is not None:
            self.plan.check_invariants()
