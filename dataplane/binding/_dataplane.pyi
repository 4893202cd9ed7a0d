"""The compiled data plane. Doors: engine/io_path.py and replica/io_path.py; nothing else imports it.

Errors: every failing call raises ``NativeError`` with ``.args == (kind, message)``, where ``kind`` is
one of: "no_space", "io_error", "damaged", "stale_epoch", "bad_request", "not_found", "unreachable",
"source_failed", "closed". The doors translate.
"""

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
        ("store_failed", volume_id, reason)        # a failed fdatasync or map write: C15
        ("block_damaged", volume_id, block_index)  # found by a read or by verify
        """

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
        "regions_damaged"}. Blocking."""

    def close_store(self, volume_id: str) -> None:
        """Close its sessions, flush, close. Blocking."""

    def set_epoch(self, volume_id: str, epoch: int) -> None:
        """When this returns, no operation of an older epoch will be applied or answered with data,
        and sessions of older epochs are closed (C11). Blocking, short."""

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
        Replaces an earlier set."""

    def pull_regions(self, volume_id: str, fd: int, epoch: int, regions: list[int]) -> dict[str, int]:
        """Make ``regions`` equal to the peer behind ``fd`` (a socket past its hello as "peer"):
        compare checksums, copy what differs, never over a fresh block. A region that is done leaves
        the begin_resync set. Returns {"regions", "blocks_compared", "blocks_copied", "bytes_copied"}.
        Blocking (the interpreter lock is released); several calls may run at once."""

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
        checksum_errors, repairs, dirty_regions, blocks_present, allocated_bytes, sessions."""

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

    def barrier(self, token: int) -> None:
        """Event ("drained", token) when every write accepted before now is done at all members."""

    def set_unequal(self, regions: list[int]) -> None:
        """Reconcile: every request in these regions but whole-block writes waits until
        regions_equal(). Adds to the set: a region that diverged meanwhile stays in it."""

    def set_partial_wait(self, regions: list[int]) -> None:
        """Resync: only writes of part of a block wait in these regions. Replaces the set."""

    def regions_equal(self, regions: list[int], diverged_seen: int) -> None:
        """Reconcile: remove regions from both sets and let waiting requests go. ``diverged_seen``: how many
        region_diverged events were taken from poll_events() before; a region that diverged later stays."""

    def partial_done(self, regions: list[int]) -> None:
        """Resync: remove regions from the set_partial_wait() set only, and let waiting requests go. A region
        that diverged meanwhile stays unequal."""

    def pause(self, paused: bool) -> None:
        """While paused, new requests queue (bounded) and none is sent."""

    def set_size(self, size_bytes: int) -> None: ...
    def stop(self) -> None:
        """Answer what is done, close clients and links, join the thread."""

    def stats(self) -> dict[str, object]:
        """Counters: reads, writes, flushes, trims, zeroes, read_bytes, write_bytes, errors, clients,
        in_flight, in_flight_bytes, waiting, repairs; latency_us_read / _write / _flush: list of
        bucket counts (bucket i: up to 2**i microseconds, 24 buckets) with latency_us_*_sum;
        slots: list of {"connected", "mode", "in_flight", "requests", "bytes", "latency_us_sum"}."""
