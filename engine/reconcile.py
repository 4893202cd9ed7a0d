"""Making the members' dirty regions equal: after an unclean stop of an engine, or a write that failed
everywhere. Pure.

Owns which member is the source, who pulls what, and when a region is equal on all. What an unacknowledged
write left behind is decided once (C9): no read of a region is answered before all members have the source's
copy of it.

Order: the data plane holds back requests in these regions; each target marks them and remembers from then on
which blocks live writes made fresh; a barrier, so that the source holds all that reached a target before;
then pulls, regions that requests wait for first. If the source is lost, a target takes its place for what is
not equal yet, once nothing is being copied to it.

If the source has a damaged block in a region, the next member takes its place, and it pulls like the others:
so a block that any member has good gets to all. When each has been the source, what is still damaged is
so everywhere, and the region counts as equal; nothing is recorded as lost here, for a copy of a member is
as good as another's.

Does not own sessions or records. A member that was lost has left the set for good: should it come back while
a reconcile is under way and still be a member, ``volume.py`` starts over in a new epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.events import Barrier, BeginResync, CompleteRegions, EndResync, PullRegions, RegionsEqual
from engine.joining import Host
from engine.limits import WANTED_MAX
from engine.regions import Regions, RegionSet
from engine.replica_entry import ReplicaEntry
from engine.resync import PullPlan

COMPLETE_BATCH_REGIONS = 256
"""Regions are reported to the members as equal in batches: a call to each per region would cost more than
its marks do."""


class _Target:
    def __init__(self, entry: ReplicaEntry, regions: Regions) -> None:
        self.entry = entry
        self.plan = PullPlan(regions)
        self.begun = False


class Reconcile:
    def __init__(self, host: Host, members: Sequence[ReplicaEntry], regions: Regions) -> None:
        assert members and regions
        self._host = host
        self._remaining = RegionSet(regions)
        self._equal: list[int] = []  # not yet reported to the members
        self._wanted: set[int] = set()
        self._source: ReplicaEntry | None = members[0]
        self._lost: list[ReplicaEntry] = []  # since a record was last committed without them
        self._targets = {entry.slot: _Target(entry, regions) for entry in members[1:]}
        self._token = 0
        self._settled = False
        self._must_begin = True
        self._retry_due = True  # False while a source that could not be read is given time
        self._source_damaged = False  # another member is to be the source next
        self._refused: dict[int, set[int]] = {}  # region -> slots of sources with damaged blocks in it
        self.total_count = self._remaining.count
        self.done = False

    @property
    def done_count(self) -> int:
        return self.total_count - self._remaining.count

    def advance(self) -> None:
        self._drop_lost()
        self._choose_source()
        self._rotate_source()
        if self._source is None or self._undecided():
            return
        if self._lost or not self._targets:
            self._lost.clear()
            self._settle_equal()
        if self._remaining.count == 0:
            if self._idle():  # a pull that is still under way must not meet the next reconcile's
                self._finish()
            return
        self._begin()
        if not self._settled and self._token == 0 and all(t.begun for t in self._targets.values()):
            self._token = self._host.next_token()
            self._host.act(Barrier(self._token))
        if self._settled and not self._must_begin:
            self._pull(self._source)

    def _pull(self, source: ReplicaEntry) -> None:
        for target in self._targets.values():
            while batch := target.plan.next_call():
                slot, session = target.entry.slot, target.entry.session
                process = source.process_id
                self._host.act(PullRegions(slot, session, source.slot, batch, source_process=process))

    def _begin(self) -> None:
        """Begin anew for all that is not equal yet.

        After a failed or foreign pull a target no longer tracks which blocks are fresh in regions that it
        believes done; what is pulled again must be tracked again, and then a barrier is due again.
        """
        if not (self._must_begin and self._retry_due and self._idle()):
            return
        self._must_begin, self._settled, self._token = False, False, 0
        regions = self._remaining.copy()
        for target in self._targets.values():
            target.plan = PullPlan(regions)
            target.begun = False
            for region in self._wanted:
                target.plan.want(region)
            self._host.act(BeginResync(target.entry.slot, target.entry.session, regions))

    def _idle(self) -> bool:
        return not any(target.plan.in_flight_count for target in self._targets.values())

    def _drop_lost(self) -> None:
        lost = [slot for slot, target in self._targets.items() if not target.entry.in_sync]
        for slot in lost:
            self._lost.append(self._targets.pop(slot).entry)
        if self._source is not None and not self._source.in_sync:
            self._lost.append(self._source)
            self._source = None

    def _undecided(self) -> bool:
        """Whether somebody who was lost on the way may still be counted on: then what the others agreed on
        could yet be replaced by what it has, so nobody may read it."""
        return any(self._host.requires(entry) for entry in self._lost)

    def _choose_source(self) -> None:
        """When the source was lost. Waits for pulls under way: what a target is still being given must not
        change after others have copied it."""
        if self._source is not None or not self._targets or not self._idle():
            return
        # The one that pulled most: what it has already need not be copied to it.
        chosen = max(self._targets.values(), key=lambda t: t.plan.done_count)
        self._source = chosen.entry
        del self._targets[chosen.entry.slot]
        for target in self._targets.values():
            target.plan.add(chosen.plan.remaining())  # what the new source has there is its own
        self._must_begin = True

    def _rotate_source(self) -> None:
        """After the source was found to be damaged. Waits for pulls under way, as when a source was lost."""
        if not self._source_damaged or self._source is None or not self._targets or not self._idle():
            return
        self._source_damaged = False
        was = self._source
        following = min(self._targets, key=lambda slot: (slot <= was.slot, slot))  # each gets its turn
        self._source = self._targets.pop(following).entry
        self._targets[was.slot] = _Target(was, self._remaining)
        self._must_begin = True

    def _settle_equal(self) -> None:
        """After somebody is gone: regions that no target has still to pull are equal on all members."""
        equal = self._remaining.copy()
        for target in self._targets.values():
            equal.difference_update(target.plan.remaining())
        self._report_equal(equal)

    def _report_equal(self, regions: Regions) -> None:
        newly = RegionSet(region for region in regions if self._remaining.discard(region))
        self._wanted.difference_update(newly)
        if newly.count:
            self._host.act(RegionsEqual(newly))
            self._equal.extend(newly)
        if len(self._equal) >= COMPLETE_BATCH_REGIONS or self._remaining.count == 0:
            self._complete()

    def _complete(self) -> None:
        entries = [target.entry for target in self._targets.values()]
        if self._source is not None:
            entries.append(self._source)
        regions, self._equal = RegionSet(self._equal), []
        if regions.count:
            for entry in entries:
                self._host.act(CompleteRegions(entry.slot, entry.session, regions))

    def _finish(self) -> None:
        self._complete()
        for target in self._targets.values():
            self._host.act(EndResync(target.entry.slot, target.entry.session))
        self.done = True

    def retry(self) -> None:
        self._retry_due = True

    def want(self, region: int) -> None:
        if region in self._remaining and len(self._wanted) < WANTED_MAX:
            self._wanted.add(region)
        for target in self._targets.values():
            target.plan.want(region)

    def forget(self, region: int) -> None:
        """A write failed everywhere in it: whatever was copied may be old. It gets a reconcile of its own."""
        self._remaining.discard(region)
        self._wanted.discard(region)

    def on_begun(self, slot: int) -> None:
        if slot in self._targets:
            self._targets[slot].begun = True

    def on_drained(self, token: int) -> None:
        if token == self._token != 0:
            self._settled = True

    def on_pulled(self, slot: int, regions: Regions, bytes_copied: int) -> None:
        target = self._targets.get(slot)
        if target is None:
            return
        target.plan.on_done(regions, bytes_copied)
        if not self._undecided():
            targets = self._targets.values()
            self._report_equal(RegionSet(r for r in regions if not any(r in t.plan for t in targets)))

    def on_incomplete(self, slot: int, source_slot: int, regions: Regions, bytes_copied: int) -> None:
        """The source lacks good copies of some blocks there."""
        target = self._targets.get(slot)
        if target is None:
            return
        members = {source_slot, *self._targets}
        for region in regions:
            self._refused.setdefault(region, set()).add(source_slot)
        if all(self._refused[region] >= members for region in regions):
            self.on_pulled(slot, regions, bytes_copied)  # nobody has more
            return
        target.plan.on_failed(regions)
        self._must_begin = self._source_damaged = True

    def on_source_failed(self, slot: int, source_slot: int, regions: Regions) -> None:
        if slot not in self._targets:
            return
        self._targets[slot].plan.on_failed(regions)
        self._must_begin = True
        if self._source is not None and self._source.slot == source_slot:
            self._retry_due = False
            self._host.retry_pulls_later()

    def check_invariants(self) -> None:
        for target in self._targets.values():
            target.plan.check_invariants()
            assert target.entry is not self._source
