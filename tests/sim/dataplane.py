"""A model of the engine's data plane: dataplane/core/src/engine/ without bytes, sockets and limits.

Owns the table of frames under way (there ``requests``), the gates of regions (``regions``), reads with their
hedges and repairs (``reading``), the read lease, stalls (``upkeep``), and barriers. Commands reach it,
and its events reach the machine, through two queues that take a moment, as those between the two threads do.

Does not own sessions or membership (``engines.py``, and behind it the real ``engine/volume.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine import events as ev
from engine.io_path import failed_reason
from engine.regions import Regions
from protocol.frames import Status
from protocol.limits import LINK_STALL_TIMEOUT_S, REGION_BLOCKS
from tests.sim.kernel import Process
from tests.sim.network import Endpoint

STALL_CHECK_S = 0.125
SYNC_TIMEOUT_S = 10.0
SELF_PAUSE_S = 0.4
COMPLETED_INTERVAL_S = 1.0
HEDGE_S = 0.1
READ_LEASE_S = 1.0
"""As in dataplane/core/src/engine/limits.rs; HEDGE_S stands for the adaptive delay."""

EIO = "EIO"
ENOSPC = "ENOSPC"

Done = Callable[[str, Any], None]
"""What a request is answered with: an error or "", and what was read."""

QUEUE_S = 0.0003
"""A command or an event waits this long at most for the other thread."""


@dataclass
class Link:
    slot: int
    generation: int
    end: Endpoint
    sync: bool
    attached_s: float
    slow: bool = False
    sent_s: dict[int, float] = field(default_factory=dict)  # by frame id: for the lease
    lease_s: float = -1e9  # newest send time of a frame that was answered OK
    lease_asked: int = 0  # id of the LEASE frame under way


@dataclass
class Write:
    id: int
    frame: tuple[Any, ...]
    region: int  # -1 for a flush
    done: Done
    sent_s: float
    syncs: bool
    asked: set[int]
    ok: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)  # failed it once
    no_space: bool = False
    finished: bool = False
    error: str = ""


@dataclass
class Read:
    key: int
    block: int
    done: Done
    asked: dict[int, tuple[int, float]] = field(default_factory=dict)  # frame id -> slot, sent at
    tried: set[int] = field(default_factory=set)
    value: Any = None
    answered: int = 0  # the frame that brought good data; the lease decides when it is delivered


@dataclass
class Parked:
    touch: str  # "read", "partial", "whole"
    again: Callable[[], None]


class DataPlane:
    def __init__(self, process: Process, *, epoch: int, slots: int, post: Callable[[ev.Event], None]) -> None:
        self.process = process
        self.epoch = epoch
        self.slots = slots
        self.members: set[int] = set()
        self.readers: set[int] = set()
        self.links: dict[int, Link] = {}
        self.writes: dict[int, Write] = {}  # by id, ascending: all that are not released
        self.by_region: dict[int, deque[int]] = {}
        self.last_write: dict[int, int] = {}  # block -> id of the last frame that writes to it
        self.reads: dict[int, Read] = {}
        self.read_of: dict[int, int] = {}  # frame id -> key of its read
        self.waiting_reads: list[int] = []
        self.held_reads: list[int] = []  # answered, and the lease must be renewed first
        self.last_id = 0
        self.diverged: dict[int, int] = {}  # region -> id of the first write that failed there
        self.diverged_at: dict[int, int] = {}
        self.diverged_count = 0
        self.diverged_seen = 0
        self.unequal: set[int] = set()
        self.partial_wait: set[int] = set()
        self.queues: dict[int, deque[Parked]] = {}
        self.wanted: set[int] = set()
        self.barriers: list[tuple[int, int]] = []
        self.paused = False
        self.held: deque[Callable[[], None]] = deque()
        self.lease: ev.Quorums = ()
        self.stopped = False
        self.counts = {"acks": 0, "hedges": 0, "lease_waits": 0, "repairs": 0, "stalls": 0}
        self.completed_told = 0
        self._post = post
        self._next_key = 0
        self._generation = 0
        self._turn = 0
        self._ticking = False
        self._last_tick_s = 0.0
        self._not_before_s = 0.0
        self._commands: deque[Callable[[], None]] = deque()
        self._events: deque[ev.Event] = deque()

    # The two queues

    def command(self, call: Callable[[], None]) -> None:
        self._commands.append(call)
        self.process.after(self.process.sim.random.uniform(0.0, QUEUE_S), self._run_commands)

    def _run_commands(self) -> None:
        while self._commands and not self.stopped:
            self._commands.popleft()()
            self._drained()

    def _event(self, event: ev.Event) -> None:
        self._events.append(event)
        self.process.after(self.process.sim.random.uniform(0.0, QUEUE_S), self._deliver_events)

    def _deliver_events(self) -> None:
        while self._events and not self.stopped:
            event = self._events.popleft()
            if isinstance(event, ev.RegionDiverged):
                self.diverged_seen += 1
            self._post(event)

    def do(self, action: Any) -> None:
        """A command of the machine, as engine/io_path.py hands it on."""
        match action:
            case ev.SetMembers(slots):
                self.command(lambda: self._set_members(set(slots)))
            case ev.SetReaders(slots):
                self.command(lambda: self._set_readers(set(slots)))
            case ev.DetachLink(slot, generation):
                self.command(lambda: self.close_link(slot, generation, None))
            case ev.SetUnequal(regions):
                self.command(lambda: self.unequal.update(regions))
            case ev.SetPartialWait(regions):
                self.command(lambda: self._set_partial_wait(set(regions)))
            case ev.RegionsEqual(regions):
                seen = self.diverged_seen
                self.command(lambda: self._regions_equal(regions, seen))
            case ev.PartialDone(regions):
                self.command(lambda: self._partial_done(regions))
            case ev.Barrier(token):
                self.command(lambda: self.barriers.append((token, self.last_id)))
            case ev.Pause(paused):
                self.command(lambda: self._pause(paused))
            case ev.SetSize():
                pass
            case ev.SetLease(quorums):
                self.command(lambda: self._set_lease(quorums))
            case _:
                raise AssertionError(f"a command the model does not know: {action}")

    def stop(self) -> None:
        self.stopped = True
        for link in self.links.values():
            link.end.close()

    # Links

    def attach_link(self, slot: int, end: Endpoint, *, sync: bool) -> int:
        self._generation += 1
        generation = self._generation
        early: list[Any] = []
        end.listen(early.append, lambda: early.append(None))  # until the loop's thread has it
        self.command(lambda: self._attach(slot, generation, end, sync, early))
        return generation

    def _attach(self, slot: int, generation: int, end: Endpoint, sync: bool, early: list[Any]) -> None:
        if slot in self.links:
            self.close_link(slot, self.links[slot].generation, "replaced by a new link")
        sync = sync or slot in self.members
        link = self.links[slot] = Link(slot, generation, end, sync, self.now)
        end.listen(
            lambda message: self._on_answer(link, message),
            lambda: self.close_link(slot, generation, "the replica closed the connection"),
        )
        for message in early:
            if message is None:
                self.close_link(slot, generation, "the replica closed the connection")
                return
        self.completed_told = 0
        if sync:
            self._resend(link)
        self.retry_waiting_reads()

    def _resend(self, link: Link) -> None:
        """What its replica has not answered, in order; nothing that would undo what it has (``requests``)."""
        slot = link.slot
        undone: set[int] = set()  # blocks of frames that were refused once
        for write in list(self.writes.values()):
            held = slot in write.ok
            if write.region < 0:
                if write.finished or held:
                    continue
                frame = write.frame
            else:
                block = write.frame[3]
                follows, refused = block in undone, slot in write.refused
                if held and not follows:
                    continue
                if not follows and not refused and self._is_under_what_it_holds(slot, write):
                    frame = ("F", write.id, write.frame[2])
                else:
                    frame = write.frame
                    if follows or refused:
                        undone.add(block)
            write.asked.add(slot)
            write.ok.discard(slot)
            write.failed.discard(slot)
            self._send(link, frame)

    def _is_under_what_it_holds(self, slot: int, write: Write) -> bool:
        others = (self.writes[number] for number in self.by_region[write.region])
        return any(o.id > write.id and slot in o.ok and o.frame[3] == write.frame[3] for o in others)

    def close_link(self, slot: int, generation: int, reason: str | None, status: int = 0) -> None:
        """``reason`` None: the machine knows."""
        link = self.links.get(slot)
        if link is None or link.generation != generation:
            return
        del self.links[slot]
        link.end.close()
        if reason is not None:
            self._event(ev.LinkDown(slot, generation, reason, status))
        for write in list(self.writes.values()):
            write.asked.discard(slot)
            write.failed.discard(slot)
            self._judge(write)
        for read in list(self.reads.values()):
            for number in [n for n, (at, _) in read.asked.items() if at == slot]:
                self._forget_ask(read, number)
            if not read.asked and not read.answered:
                self._issue(read)
        self.retry_waiting_reads()

    def _send(self, link: Link, frame: tuple[Any, ...]) -> None:
        link.sent_s[frame[1]] = self.now
        link.end.send(frame)
        self._tick()

    @property
    def now(self) -> float:
        return self.process.sim.now

    # Writes: requests.rs

    def write(self, frame_of: Callable[[int], tuple[Any, ...]], region: int, touch: str, done: Done) -> None:
        """``frame_of`` makes the frame from its id. A flush has region -1."""
        again: Callable[[], None] = lambda: self.write(frame_of, region, touch, done)  # noqa: E731
        if region >= 0 and self._must_wait(region, touch):
            self._park(region, Parked(touch, again))
        elif self.paused:
            self.held.append(again)
        else:
            self._dispatch(frame_of, region, done)

    def _dispatch(self, frame_of: Callable[[int], tuple[Any, ...]], region: int, done: Done) -> None:
        self.last_id += 1
        frame = frame_of(self.last_id)
        syncs = frame[0] == "F" or frame[-1] is True
        write = Write(self.last_id, frame, region, done, self.now, syncs, set(self.links))
        self.writes[write.id] = write
        if region >= 0:
            self.last_write[frame[3]] = write.id
            self.by_region.setdefault(region, deque()).append(write.id)
        for link in self.links.values():
            self._send(link, frame)

    def _judge(self, write: Write) -> None:
        members = self.members
        held = write.ok & members
        if not write.finished and members:
            missing = members - write.ok
            if not missing:
                self._finish(write, "")
            elif not held and missing <= write.failed:
                self._finish(write, ENOSPC if write.no_space else EIO)
                if write.region >= 0:
                    self.diverged.setdefault(write.region, write.id)
                    self.diverged_count += 1
                    self.diverged_at[write.region] = self.diverged_count
                    self.unequal.add(write.region)
                    self._event(ev.RegionDiverged(write.region))
        behind = write.failed if held and not write.error else write.failed - members
        if behind:
            status = Status.NO_SPACE if write.no_space else Status.IO_ERROR
            for slot in sorted(behind):
                if (link := self.links.get(slot)) is not None:
                    self.close_link(slot, link.generation, failed_reason(status), status)
        self._release(write)

    def _finish(self, write: Write, error: str) -> None:
        write.finished, write.error = True, error
        self.counts["acks"] += 1
        write.done(error, None)

    def _releasable(self, write: Write) -> bool:
        answered = write.finished and (bool(write.error) or self.members <= write.ok)
        if write.asked or not answered:
            return False
        return write.region < 0 or self.by_region[write.region][0] == write.id

    def _release(self, write: Write) -> None:
        current: Write | None = write
        while current is not None and current.id in self.writes and self._releasable(current):
            del self.writes[current.id]
            if current.region < 0:
                return
            queue = self.by_region[current.region]
            queue.popleft()
            if not queue:
                del self.by_region[current.region]
                return
            current = self.writes[queue[0]]

    def _on_answer(self, link: Link, message: Any) -> None:
        if self.links.get(link.slot) is not link:
            return
        number, status, value = message
        sent_s = link.sent_s.pop(number, None)
        if status == Status.OK and sent_s is not None:
            link.lease_s = max(link.lease_s, sent_s)
        if number == link.lease_asked:
            link.lease_asked = 0
        if number in self.writes:
            write = self.writes[number]
            if status not in (Status.OK, Status.NO_SPACE, Status.IO_ERROR):
                self.close_link(link.slot, link.generation, failed_reason(status), status)
            elif link.slot in write.asked:
                write.asked.discard(link.slot)
                if status == Status.OK:
                    write.ok.add(link.slot)
                else:
                    write.failed.add(link.slot)
                    write.refused.add(link.slot)
                    write.no_space |= status == Status.NO_SPACE
                self._judge(write)
        elif number in self.read_of:
            self._on_read_answer(link, self.reads[self.read_of[number]], number, status, value)
        elif status == Status.STALE_EPOCH:
            self.close_link(link.slot, link.generation, failed_reason(status), status)
        self._deliver_held()
        self._drained()

    def completed_id(self) -> int:
        outstanding = [*self.writes, *self.read_of]
        base = min(outstanding) - 1 if outstanding else self.last_id
        return min([base, *(first - 1 for first in self.diverged.values())])

    def _set_members(self, members: set[int]) -> None:
        self.members = members
        for write in list(self.writes.values()):
            self._judge(write)
        for link in self.links.values():
            link.sync |= link.slot in members
        self.retry_waiting_reads()
        self._deliver_held()

    def _set_readers(self, readers: set[int]) -> None:
        self.readers = readers
        self._deliver_held()
        self.retry_waiting_reads()

    def _drained(self) -> None:
        if not self.barriers:
            return
        undone = [w.id for w in self.writes.values() if not self._answered(w)]
        first = min(undone) if undone else self.last_id + 1
        for token, last in list(self.barriers):
            if last < first:
                self.barriers.remove((token, last))
                self._event(ev.Drained(token))

    def _answered(self, write: Write) -> bool:
        return write.finished and (bool(write.error) or self.members <= write.ok)

    # Gates: regions.rs

    def _must_wait(self, region: int, touch: str) -> bool:
        if touch == "read":
            return region in self.unequal
        if touch == "partial":
            return region in self.unequal or region in self.partial_wait
        return any(parked.touch == "partial" for parked in self.queues.get(region, ()))

    def _park(self, region: int, parked: Parked) -> None:
        self.queues.setdefault(region, deque()).append(parked)
        if region not in self.wanted:
            self.wanted.add(region)
            self._event(ev.RegionWanted(region))

    def _let_go(self, regions: list[int]) -> None:
        for region in regions:
            for parked in self.queues.pop(region, ()):
                parked.again()

    def _set_partial_wait(self, regions: set[int]) -> None:
        self.partial_wait = regions
        self.wanted.clear()
        self._let_go(sorted(self.queues))

    def _regions_equal(self, regions: Regions, seen: int) -> None:
        settled = [r for r in regions if self.diverged_at.get(r, 0) <= seen]
        for region in settled:
            self.diverged.pop(region, None)
            self.diverged_at.pop(region, None)
            self.unequal.discard(region)
            self.partial_wait.discard(region)
            self.wanted.discard(region)
        self._let_go(settled)

    def _partial_done(self, regions: Regions) -> None:
        done = [region for region in regions if region in self.partial_wait]
        self.partial_wait.difference_update(done)
        self.wanted.difference_update(done)
        self._let_go(done)

    def _pause(self, paused: bool) -> None:
        self.paused = paused
        if not paused:
            held, self.held = self.held, deque()
            for again in held:
                again()

    # Reads: reading.rs

    def read(self, block: int, done: Done) -> None:
        self._next_key += 1
        read = self.reads[self._next_key] = Read(self._next_key, block, done)
        self._renew_lease()
        self._issue(read)

    def _gate(self, read: Read) -> bool:
        region = read.block // REGION_BLOCKS
        if not self._must_wait(region, "read"):
            return False
        for number in list(read.asked):
            self._forget_ask(read, number)
        del self.reads[read.key]
        self._park(region, Parked("read", lambda: self._again(read)))
        return True

    def _again(self, read: Read) -> None:
        read.answered, read.value = 0, None
        self.reads[read.key] = read
        self._issue(read)

    def _choose_reader(self, without: set[int]) -> int | None:
        best: tuple[bool, int, int] | None = None
        for step in range(self.slots):
            slot = (self._turn + step) % self.slots
            link = self.links.get(slot)
            if slot in self.readers and slot not in without and link is not None and link.sync:
                busy = sum(1 for read in self.reads.values() for at, _ in read.asked.values() if at == slot)
                if best is None or (link.slow, busy) < best[:2]:
                    best = (link.slow, busy, slot)
        if best is None:
            return None
        self._turn = (best[2] + 1) % self.slots
        return best[2]

    def _issue(self, read: Read) -> None:
        if self._gate(read):
            return
        slot = self._choose_reader(read.tried)
        if slot is not None:
            self._ask(read, slot)
        elif self.readers and self.readers <= read.tried:
            del self.reads[read.key]
            read.done(EIO, None)
        else:
            self.waiting_reads.append(read.key)

    def _ask(self, read: Read, slot: int) -> None:
        self.last_id += 1
        number = self.last_id
        read.asked[number] = (slot, self.now)
        self.read_of[number] = read.key
        self._send(self.links[slot], ("R", number, self.epoch, read.block))
        self.process.after(HEDGE_S, self._hedge, read.key, number)

    def _hedge(self, key: int, number: int) -> None:
        read = self.reads.get(key)
        if read is None or number not in read.asked or read.answered or self.stopped:
            return
        slot, _ = read.asked[number]
        other = self._choose_reader(read.tried | {at for at, _ in read.asked.values()})
        if other is not None:
            if slot in self.links:
                self.links[slot].slow = True
            self.counts["hedges"] += 1
            self._ask(read, other)

    def _forget_ask(self, read: Read, number: int) -> None:
        read.asked.pop(number, None)
        self.read_of.pop(number, None)

    def retry_waiting_reads(self) -> None:
        waiting, self.waiting_reads = self.waiting_reads, []
        for key in waiting:
            if (read := self.reads.get(key)) is not None and not read.asked and not read.answered:
                self._issue(read)

    def _on_read_answer(self, link: Link, read: Read, number: int, status: int, value: Any) -> None:
        self._forget_ask(read, number)
        link.slow = False
        if status not in (Status.OK, Status.IO_ERROR):
            if not read.asked and not read.answered:
                self.waiting_reads.append(read.key)
            self.close_link(link.slot, link.generation, failed_reason(status), status)
            return
        if read.answered:
            return  # the other one was faster
        if self._gate(read):
            return
        if status == Status.IO_ERROR or value is None:
            read.tried.add(link.slot)
            if not read.asked:
                self._issue(read)
            return
        # A copy that is older than a write sent since must not go where that write may have gone bad again.
        newer = self.last_write.get(read.block, 0) > number
        for slot in () if newer else sorted(read.tried & set(self.links)):
            self.counts["repairs"] += 1
            self.last_id += 1
            self._send(self.links[slot], ("X", self.last_id, self.epoch, read.block, value))
        for other in list(read.asked):
            self._forget_ask(read, other)
        read.answered, read.value = number, value
        self.held_reads.append(read.key)

    # The read lease

    def _set_lease(self, quorums: ev.Quorums) -> None:
        self.lease = quorums
        self._renew_lease()
        self._deliver_held()

    def _lease_holds(self, age_s: float) -> bool:
        if not self.lease:
            return False
        since_s = self.now - age_s
        fresh = {slot for slot, link in self.links.items() if link.lease_s > since_s}
        return all(len(fresh.intersection(slots)) >= need for slots, need in self.lease)

    def _renew_lease(self) -> None:
        if self._lease_holds(READ_LEASE_S / 2):
            return
        for link in self.links.values():
            if not link.lease_asked:
                self.last_id += 1
                link.lease_asked = self.last_id
                self._send(link, ("L", self.last_id, self.epoch))

    def _deliver_held(self) -> None:
        if not self.held_reads:
            return
        if not self._lease_holds(READ_LEASE_S):
            self.counts["lease_waits"] += 1
            self._renew_lease()
            return
        held, self.held_reads = self.held_reads, []
        for key in held:
            read = self.reads.get(key)
            if read is None or self._gate(read):
                continue
            if self._undecided(read):
                self.held_reads.append(key)
                continue
            del self.reads[key]
            read.done("", read.value)

    def _undecided(self, read: Read) -> bool:
        """Whether it may show a write that not all members hold yet: a client that has seen it must see it
        after whatever dies now (C9)."""
        queue = self.by_region.get(read.block // REGION_BLOCKS, ())
        writes = (self.writes[number] for number in queue if number < read.answered)
        return any(not write.finished and write.frame[3] == read.block for write in writes)

    # Timers: upkeep.rs

    def _tick(self) -> None:
        if not self._ticking and not self.stopped:
            self._ticking = True
            self._last_tick_s = self.now
            self.process.after(STALL_CHECK_S, self._on_tick)

    def _on_tick(self) -> None:
        self._ticking = False
        if self.stopped:
            return
        if self.now > self._last_tick_s + SELF_PAUSE_S:
            self._not_before_s = self.now  # we were stopped ourselves
        self._check_links()
        completed = self.completed_id()
        if completed != self.completed_told:
            self.completed_told = completed
            for link in self.links.values():
                link.end.send(("C", completed, self.epoch))
        if self.writes or self.read_of or self.held_reads:
            self._tick()
            self._deliver_held()
        self._drained()

    def _overdue(self, slot: int) -> str:
        floor = max(self.links[slot].attached_s, self._not_before_s)
        plain = [w.sent_s for w in self.writes.values() if slot in w.asked and not w.syncs]
        syncing = [w.sent_s for w in self.writes.values() if slot in w.asked and w.syncs]
        plain_s = self.now - max(plain[0], floor) if plain else 0.0
        syncing_s = self.now - max(syncing[0], floor) if syncing else 0.0
        if max(plain_s, syncing_s) > SYNC_TIMEOUT_S:
            return "hopeless"
        return "late" if plain_s > LINK_STALL_TIMEOUT_S else ""

    def _check_links(self) -> None:
        overdue = {slot: self._overdue(slot) for slot in self.links}
        healthy = any(not overdue[slot] for slot in self.links if slot in self.members)
        for slot, how in overdue.items():
            dispensable = healthy or slot not in self.members
            link = self.links.get(slot)
            if link is not None and (how == "hopeless" or (how == "late" and dispensable)):
                self.counts["stalls"] += 1
                self.close_link(slot, link.generation, f"no answer for {LINK_STALL_TIMEOUT_S:g} s")
        for read in list(self.reads.values()):
            for slot, sent_s in list(read.asked.values()):
                link = self.links.get(slot)
                if link is not None and self.now - max(sent_s, self._not_before_s) > SYNC_TIMEOUT_S:
                    self.close_link(slot, link.generation, "a read was not answered")
