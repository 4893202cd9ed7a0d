"""The compiled data plane. Doors: engine/io_path.py and replica/io_path.py; nothing else imports it.

Errors: every failing call raises ``NativeError`` with ``.args == (kind, message)``, where ``kind`` is
one of: "no_space", "io_error", "damaged", "stale_epoch", "bad_request", "not_found", "unreachable",
"source_failed", "closed". The doors translate.
"""

from collections.abc import Sequence

class NativeError(Exception): ...

class ReplicaLoop:
    """All replicas of one disk: one epoll thread that serves sessions, one thread that syncs,
    a small pool for reads that miss the page cache. Code: dataplane/core/src/replica/."""

    def __init__(self) -> None: ...
    def event_fd(self) -> int:
        """Readable when poll_events() has something. Owned by this object."""

    def poll_events(self) -> list[tuple[object, ...]]:
        """Drains, never blocks. Events:
        ("session_closed", volume_id, session_id, reason)
        ("store_failed", volume_id, reason)        # a failed fdatasync or map write: C15. The store has
                                                   # noted it on its disk, closed its sessions without an
                                                   # answer, and refuses everything until it is opened again
        ("block_damaged", volume_id, block_index)  # found by a read or by verify
        Only block_damaged is ever dropped (stats: damage_events_dropped), when thousands wait."""

    def shutdown(self) -> None:
        """Close sessions and stores (flushed, not cleaned); join the threads."""

    def create_store(self, path: str, layer: str, size_bytes: int) -> None:
        """Make the ``regions`` file and the layer directory ``layer`` (its ``data`` and ``map``) in the
        existing directory ``path``. Fails if any exists (C22). Durable on return. Blocking."""

    def open_store(
        self, volume_id: str, path: str, chain: list[str], size_bytes: int, epoch: int, stamp: tuple[int, int]
    ) -> dict[str, int]:
        """Open and recover. ``chain``: layer directory names, head first. Operations of epochs other
        than ``epoch`` are refused. ``stamp`` marks regions written from now on.
        Returns {"dirty_regions", "blocks_verified", "blocks_recomputed", "blocks_dropped",
        "regions_damaged", "sync_failed"}. ``sync_failed`` 1: a sync failed when it was last open, so it may
        have lost acknowledged writes. The store remembers that until a flush succeeds: the caller makes it
        durable before it lets anybody in. Blocking."""

    def close_store(self, volume_id: str) -> None:
        """Close its sessions, flush, close. Blocking."""

    def set_epoch(self, volume_id: str, epoch: int) -> None:
        """When this returns, no operation of an older epoch will be applied or answered with data,
        and sessions of older epochs are closed (C11). So are data sessions of this very epoch: no frame that
        was sent before a repeated claim is applied after it (C12). Pulls that run end with "closed" or
        "stale_epoch". Blocking, short."""

    def set_stamp(self, volume_id: str, epoch: int, version: int) -> None:
        """Dirty regions are restamped durably, then later marks carry the new stamp. Blocking."""

    def attach_session(self, volume_id: str, fd: int, epoch: int, role: str) -> int:
        """Give a connected socket, past its hello, to the loop. ``role``: "data" or "peer". The fd is
        duplicated; the caller closes its own. Returns a session id. Raises stale_epoch. A data session
        ends an earlier one of its volume, whose frames that were not applied yet never will be (C12)."""

    def dirty_regions(self, volume_id: str) -> list[int]: ...
    def changed_since(self, volume_id: str, epoch: int, version: int) -> list[int]:
        """Regions whose stamp is newer than (epoch, version); (0, 0) gives every region ever written."""

    def begin_resync(self, volume_id: str, regions: list[int]) -> None:
        """Mark these regions dirty, durably. From now on remember, for these regions, which blocks
        live writes have made fresh: writes of whole blocks only. A write of part of a block leaves the
        rest of it as stale as it was.
        Replaces an earlier set; a pull begun before writes nothing more and ends with "closed"."""

    def pull_regions(
        self,
        volume_id: str,
        fd: int,
        epoch: int,
        regions: list[int],
        rate_bytes_s: int = 0,
        take_damaged: bool = False,
    ) -> dict[str, int]:
        """Make ``regions`` equal to the peer behind ``fd`` (a socket past its hello as "peer"):
        compare checksums, copy what differs, never over a fresh block. A region that is done leaves
        the begin_resync set. Returns {"regions", "blocks_compared", "blocks_copied", "bytes_copied",
        "blocks_unreadable", "blocks_damaged"}: ``regions`` that are done.
        ``rate_bytes_s``: bytes read per second, 0 for as fast as it goes. A block of which the source has no
        good copy is unreadable, and its region is not done; with ``take_damaged`` it becomes damaged here too
        (unless a live write or another source gave it), and the region is done.
        Raises "source_failed" and "unreachable" for what the source did, "closed" and "stale_epoch" when this
        replica was closed, claimed, or is in another resync. Blocking; several calls may run at once."""

    def end_resync(self, volume_id: str) -> None:
        """Flush everything; forget the set. Blocking."""

    def complete_regions(self, volume_id: str, regions: list[int]) -> None:
        """These regions are equal on all in-sync replicas: they may be cleaned once idle."""

    def flush(self, volume_id: str) -> None: ...
    def clean_all(self, volume_id: str) -> None:
        """Flush, then clear every dirty mark: the engine says all replicas are equal. Blocking."""

    def resize(self, volume_id: str, size_bytes: int) -> None:
        """Grow the head. Idempotent. Raises bad_request for a shrink."""

    def verify(self, volume_id: str, first_region: int, region_count: int) -> dict[str, object]:
        """Read and verify all present blocks in the range, as a reader would see them through the chain.
        Returns {"blocks_verified", "blocks_zero", "damaged": list[int] (block indices, at most 1000),
        "damaged_count", "digest": int}: ``digest`` is xxh3_64 over (block_index, checksum) of every
        block that does not read as zero, so equal digests mean equal bytes. Blocking; call it in slices."""

    def stats(self, volume_id: str) -> dict[str, int]:
        """Counters since open and gauges: reads, writes, flushes, read_bytes, write_bytes,
        checksum_errors, repairs, regions_damaged, damage_events_dropped, dirty_regions, blocks_present,
        allocated_bytes, sessions."""

class EngineLoop:
    """One attached volume: one epoll thread that serves NBD clients and fans out to replicas.
    Code: dataplane/core/src/engine/."""

    def __init__(self, size_bytes: int, epoch: int, slot_count: int) -> None:
        """``slot_count``: replicas of the volume; a replica's slot is its index in the engine's config."""

    def event_fd(self) -> int: ...
    def poll_events(self) -> list[tuple[object, ...]]:
        """Drains, never blocks. Events (``generation`` is what attach_link returned):
        ("link_lost", slot, generation, reason)      # closed, reset, bad frame
        ("link_failed", slot, generation, status)    # a write or flush got an error; link closed
        ("link_stalled", slot, generation)           # oldest request older than LINK_STALL_TIMEOUT_S;
                                                     # link closed
        ("block_repaired", slot, block_index)        # a bad copy was answered from elsewhere and rewritten
        ("block_unreadable", block_index)            # no copy verifies; the client got EIO
        ("region_wanted", region_index)              # a request waits for an unequal region
        ("region_diverged", region_index)            # a write failed everywhere; the region is now unequal
        ("drained", token)
        ("client_closed", client_id, reason)
        """

    def add_client(self, fd: int, structured: bool, meta_context: int, read_only: bool) -> int:
        """Give an NBD client's socket, past negotiation, to the loop. ``meta_context``: the id of
        base:allocation, or 0 when not negotiated. ``fd`` is duplicated; the caller closes its own."""

    def attach_link(self, slot: int, fd: int, mode: str) -> int:
        """Add a replica's data socket, past its hello. ``mode``: "sync" (all unfinished writes are sent
        again, in order, then new ones; serves reads) or "resync" (gets new writes only; serves no
        reads). Returns its generation."""

    def detach_link(self, slot: int, generation: int) -> None:
        """Close a link. Its slot stays required until set_members says otherwise."""

    def set_members(self, slots: list[int]) -> None:
        """The replicas whose answer every write and flush needs, and which may serve reads: union of
        the committed and the proposed record. Removing a slot completes what waited for it alone.
        Adding a slot whose link is in mode "resync" turns it into "sync"; writes sent to it earlier
        count as well. An empty list: everything waits."""

    def set_readers(self, slots: list[int]) -> None:
        """Slots that may serve reads: a subset of the committed in-sync replicas."""

    def set_lease(self, quorums: list[tuple[list[int], int]]) -> None:
        """What a client reads needs recent answers of replicas (C11): of each quorum (slots, need), at least
        ``need`` of ``slots`` have answered a frame sent less than READ_LEASE_S before. Until then finished
        reads and block statuses are held; when one comes and the answers are getting old, those slots are
        sent a LEASE frame. Replaces the earlier quorums. An empty list: nothing read is answered. Before the
        first call nothing is held back: call it before the first client is added. What a slot answered on an
        earlier link does not count on its next one. Raises bad_request for a quorum that cannot be."""

    def barrier(self, token: int) -> None:
        """Event ("drained", token) when every write accepted before now is done at all members."""

    def set_unequal(self, regions: Sequence[int]) -> None:
        """Reconcile: every request in these regions but whole-block writes waits until
        regions_equal(). Adds to the set: a region that diverged meanwhile stays in it."""

    def set_partial_wait(self, regions: Sequence[int]) -> None:
        """Resync: only writes of part of a block wait in these regions. Replaces the set."""

    def regions_equal(self, regions: Sequence[int], diverged_seen: int) -> None:
        """Reconcile: remove regions from both sets and let waiting requests go. ``diverged_seen``: how many
        region_diverged events were taken from poll_events() before; a region that diverged later stays."""

    def partial_done(self, regions: Sequence[int]) -> None:
        """Resync: remove regions from the set_partial_wait() set only, and let waiting requests go. A region
        that diverged meanwhile stays unequal."""

    def repair_block(self, slot: int, block_index: int) -> None:
        """Read a block from another reader than ``slot`` and send it to ``slot``, which takes it if its own
        copy does not verify. Events: ("block_repaired", slot, block_index) also when its copy was good by
        then; ("block_unreadable", block_index) when no other reader has a good copy. Forgotten without an
        event when ``slot`` has no link in mode "sync", or loses it. Raises bad_request when 1024 wait
        already."""

    def pause(self, paused: bool) -> None:
        """While paused, new requests queue (bounded) and none is sent."""

    def set_size(self, size_bytes: int) -> None: ...
    def stop(self) -> None:
        """Answer what is done, close clients and links, join the thread."""

    def stats(self) -> dict[str, object]:
        """Counters: reads, writes, flushes, trims, zeroes, read_bytes, write_bytes, errors, clients,
        in_flight, in_flight_bytes, waiting, repairs, lease_waits (answers held until the lease held again),
        lease_frames (sent), order_waits (answers held until a write they may show was done at all members),
        hedged_reads (asked of a second replica because the first was late), hedge_wins (it answered first);
        latency_us_read / _write / _flush: list of
        bucket counts (bucket i: up to 2**i microseconds, 24 buckets) with latency_us_*_sum;
        slots: list of {"connected", "mode", "slow" (reads go elsewhere), "in_flight", "requests", "bytes",
        "latency_us_sum"}."""

class SimPass:
    """The right to pull for the resync that was under way when ``SimStore.pull_pass`` made it."""

class SimPull:
    """One region on its way to be equal to a source's. Made by ``SimStore.pull_compare``."""

    @property
    def reads(self) -> list[tuple[int, int]]:
        """(first_block, count): each must be read from the source and given to ``SimStore.pull_copy``."""

    def counts(self) -> dict[str, int]:
        """{"blocks_compared", "blocks_copied", "bytes_copied", "blocks_unreadable", "blocks_damaged"}."""

class SimStore:
    """For the simulator, and only in builds with the cargo feature ``sim`` (``make build`` has it, a release
    wheel has not): the code of one replica's store, exactly, on a disk in memory, driven call by call. No
    thread, no socket, no clock, no randomness of its own: the same calls give the same answers.
    Code: dataplane/core/src/simstore.rs over simdisk.rs.

    Errors are NativeError like everywhere; "closed" also says that the process was killed (``kill_after``)
    or that the store is not open. A store whose disk failed refuses everything with "io_error" until it is
    opened again (C15)."""

    def __init__(self) -> None:
        """An empty disk."""

    @staticmethod
    def canary(name: str, on: bool = True) -> None:
        """Switch a bug on or off, for every store of this process: the real bug in the real code path.
        Clear it in a ``finally``. What each is: dataplane/core/src/canary.rs."""

    @staticmethod
    def canaries() -> list[str]:
        """Their names."""

    @staticmethod
    def checksums(first_block: int, data: bytes) -> bytes:
        """What an engine sends along with these whole blocks: 8 bytes each."""

    def copy(self) -> SimStore:
        """A closed store on a copy of the disk as it is now: a directory copied aside, to be put back later
        by using the copy in this one's stead. Page cache and what is not synced yet included."""

    # -- its life

    def create(self, size_bytes: int) -> None:
        """Make the files. Whole blocks, at least one region (4 MiB). Durable on return."""

    def open(self, size_bytes: int, epoch: int, stamp: tuple[int, int]) -> dict[str, int]:
        """Open and recover, as ReplicaLoop.open_store; the same answer. Needs an end before: ``crash``,
        ``power_loss`` or ``close``. Also after "closed", when the process was killed, and after a failure."""

    @property
    def is_open(self) -> bool: ...
    def close(self) -> None:
        """Flush and close. Closed even if it raises."""

    def crash(self) -> None:
        """The process dies here; the page cache lives. Faults stay."""

    def power_loss(self, seed: int, loss: str = "torn") -> None:
        """The machine dies and boots again: of what was not synced a part is lost, chosen by ``seed``.
        ``loss``: "torn" each 512-byte sector stops at a moment of its own; "all_or_nothing" each sector keeps
        all or nothing; "prefix" each file keeps everything up to one moment; "all" nothing is kept."""

    def kill_after(self, operations: int) -> None:
        """The process dies in the middle of the call that does this many more disk operations (a write, a
        punch, a sync each count 1); that call raises "closed". Then ``crash`` or ``power_loss``, then
        ``open``."""

    def drop_cache(self) -> None:
        """The page cache forgets everything that it believes to be on the disk: reads show the disk's own
        bytes. Changes something only after a failed sync."""

    def set_now_ms(self, now_ms: int) -> None:
        """The store's clock, which only tells idle regions (3000 ms) for ``flush("idle")``."""

    def take_events(self) -> list[tuple[str, str] | tuple[str, int]]:
        """("store_failed", reason) and ("block_damaged", block_index), since the last call."""

    # -- requests. ``epoch``: the frame's; None: the store's own. Another one raises "stale_epoch".

    def write(
        self,
        offset_bytes: int,
        data: bytes,
        request_id: int = 0,
        epoch: int | None = None,
        checksums: bytes | None = None,
    ) -> None:
        """WRITE of whole blocks (at most 1 MiB), or WRITE_PARTIAL within one block. Marks its regions first.
        ``checksums``: as they came with the frame, where they are not right for this place; then
        "bad_request". An answer means: a crash keeps it; a power loss may take it until the next flush."""

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        request_id: int = 0,
        epoch: int | None = None,
        keep_space: bool = False,
    ) -> None:
        """WRITE_ZEROES, of whole blocks; ``keep_space``: with NO_HOLE."""

    def trim(
        self, offset_bytes: int, length_bytes: int, request_id: int = 0, epoch: int | None = None
    ) -> None:
        """TRIM, of whole blocks: reads as zeroes afterwards."""

    def repair(self, block_index: int, data: bytes, epoch: int | None = None) -> bool:
        """REPAIR: whether the copy here was bad, and was written."""

    def read(self, offset_bytes: int, length_bytes: int, epoch: int | None = None) -> tuple[list[int], bytes]:
        """READ of whole blocks: one entry per block (0, 1: zeroes; 2: no good copy here; more: its checksum,
        verified) and all bytes of the range, zeroes where the entry is 0, 1 or 2."""

    def read_reply(self, offset_bytes: int, length_bytes: int, epoch: int | None = None) -> bytes:
        """The payload of the same READ's answer, for ``pull_copy``."""

    def flush(self, clean: str = "nothing") -> None:
        """A whole flush. ``clean``: "nothing"; "idle": also clean regions that are equal (``completed``,
        ``complete_regions``) and idle; "all": clean all, for a detach."""

    def flush_step(self, clean: str = "nothing") -> bool:
        """Begin a flush, or take the one under way one step on (sync data, write stable bits, sync map,
        finish). True when it is done: what was answered *before it began* is durable. Other calls may come
        between."""

    # -- regions, as ReplicaLoop's calls of the same names

    def dirty_regions(self) -> list[int]: ...
    def changed_since(self, epoch: int, version: int) -> list[int]: ...
    def set_epoch(self, epoch: int) -> None: ...
    def set_stamp(self, epoch: int, version: int) -> None: ...
    def completed(self, request_id: int) -> None:
        """Frame COMPLETED: everything up to this id is answered by all replicas in sync."""

    def complete_regions(self, regions: list[int]) -> None: ...
    def resize(self, size_bytes: int) -> None: ...
    def begin_resync(self, regions: list[int]) -> None: ...
    def end_resync(self) -> None: ...
    def summary(self, region: int) -> bytes:
        """REGION_SUMMARY's answer, for ``pull_compare``."""

    def entries(self, region: int) -> list[int]:
        """The same as numbers."""

    def pull_pass(self, take_damaged: bool = False) -> SimPass:
        """What ReplicaLoop.pull_regions notes when it begins; after ``set_epoch``, ``begin_resync`` or
        ``end_resync`` it is void ("stale_epoch", "closed")."""

    def pull_compare(self, pull_pass: SimPass, region: int, summary: bytes) -> SimPull:
        """First step: compare with the source's ``summary``."""

    def pull_copy(self, pull: SimPull, first_block: int, count: int, reply: bytes) -> None:
        """Second step, once for each of ``pull.reads``, with the source's ``read_reply`` of that range. What
        live writes made fresh meanwhile is left alone. Raises "source_failed" if it does not verify."""

    def pull_finish(self, pull: SimPull) -> bool:
        """Last step: is the region equal to the source now? Then it has left the set of begin_resync."""

    def pull_region(
        self, source: SimStore, region: int, take_damaged: bool = False
    ) -> tuple[bool, dict[str, int]]:
        """All steps for one region, with nothing between."""

    # -- what happens to disks. ``file``: "data", "map" or "regions".

    def fail_next(
        self,
        operation: str,
        errno: int,
        file: str = "",
        after: int = 0,
        count: int = 1,
        written_bytes: int = 0,
    ) -> None:
        """After ``after`` good ones, the next ``count`` of these operations ("read", "write", "sync",
        "punch", "reserve") on ``file`` (empty: any) fail with ``errno`` (5 EIO, 28 ENOSPC).
        ``written_bytes`` of a failing write arrive. After a failed sync some of what was unsynced is lost,
        the page cache does not know, and no later sync writes it."""

    def fill_up(self, file: str = "data", left_bytes: int = 0) -> None:
        """The disk is full for this file, but for the first ``left_bytes`` of each write."""

    def clear_faults(self) -> None:
        """Of ``fail_next`` and ``fill_up``."""

    def rot(self, block_index: int, bit: int = 0) -> None:
        """One bit of the block changes on the disk. The next read finds it. In a dirty region, after a crash
        and before any read, the next open takes it for an overwrite that was not flushed (FORMAT.md,
        "Recovery"): no store can tell the two apart, so let clean regions rot, or read first."""

    def swap(self, block_index: int, other_index: int) -> None:
        """Two blocks change places on the disk, with their entries. As for ``rot``."""

    def flip(self, file: str, offset_bytes: int) -> None:
        """One bit of a file changes on the disk."""

    def truncate(self, file: str, length_bytes: int) -> None: ...
    @property
    def allocated_blocks(self) -> int: ...
