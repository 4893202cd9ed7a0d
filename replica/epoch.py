"""Who may write to a replica, and what its metadata becomes: pure functions, no I/O.

Owns every change of a ReplicaMeta: each function takes the metadata as it is on disk and returns what must be
on disk before the caller answers; an equal value means that nothing needs writing. Does not own the value and
its durable write (``metadata.py``), or the order of write, fence and answer (``replicas.py``).

An epoch is *open* between its claim and its detach. Only then are sessions and epoch-carrying calls of
that epoch accepted (C11).

Promises: epochs, records and ``synced_at`` never go back; a replica that may have lost acknowledged writes is
suspect until a record names it *and* its dirty regions were made equal; one that was put back from a
copy is restored until a record names it and every region that it ever held was.
"""

from __future__ import annotations

from dataclasses import replace

from protocol.errors import BadRequest, StaleEpoch
from protocol.membership import MembershipRecord
from replica.metadata import ReplicaMeta


def claim(
    meta: ReplicaMeta, *, epoch: int, engine_id: str, boot_id: str, opens_known: int = 0
) -> ReplicaMeta:
    """``engine_id`` takes ``epoch``. Repeatable by the same engine; the epoch of another is stale.

    A claim counts like an open: so the number that an engine knows of is higher than what any older state of
    the replica has when it is opened again. ``opens_known``: the highest number that anybody remembers. Fewer
    here say that an older state was put back; this claim would hide it, and so keeps it as ``restored``.
    """
    assert engine_id
    if epoch < meta.epoch or (epoch == meta.epoch and engine_id != meta.claimed_by):
        raise StaleEpoch(volume=meta.volume_id, offered=epoch, current=meta.epoch)
    restored = meta.restored or meta.opens < opens_known
    meta = replace(meta, epoch=epoch, claimed_by=engine_id, opens=meta.opens + 1, restored=restored)
    return open_for_writing(meta, boot_id=boot_id)


def open_for_writing(meta: ReplicaMeta, *, boot_id: str) -> ReplicaMeta:
    """From here on acknowledged writes may live in this boot's page cache only."""
    return replace(meta, clean=False, last_boot_id=boot_id)


def check_epoch(meta: ReplicaMeta, epoch: int) -> None:
    """Raises StaleEpoch unless ``epoch`` is current and open.

    An epoch newer than ours was never claimed here: the caller is not fenced, it has to claim first,
    so it must not be told that it is stale.
    """
    if epoch > meta.epoch:
        raise BadRequest(reason=f"epoch {epoch} is not claimed here; current is {meta.epoch}")
    if epoch < meta.epoch or not meta.claimed_by:
        raise StaleEpoch(volume=meta.volume_id, offered=epoch, current=meta.epoch)


def persist_record(meta: ReplicaMeta, *, epoch: int, record: MembershipRecord) -> ReplicaMeta:
    """Repeatable. A record that does not name this replica is kept as well: it stamps what is written
    from now on, but ``synced_at`` stays."""
    check_epoch(meta, epoch)
    if record.epoch != epoch:
        raise BadRequest(reason=f"a record of epoch {record.epoch} under epoch {epoch}")
    if record.stamp < meta.record.stamp:
        raise BadRequest(reason=f"record {record.stamp} is older than {meta.record.stamp}")
    if record.stamp == meta.record.stamp and record != meta.record:
        raise BadRequest(reason=f"another record {record.stamp} is persisted here")
    named = meta.replica_id in record.in_sync
    return replace(meta, record=record, synced_at=record.stamp if named else meta.synced_at)


def opened(meta: ReplicaMeta, *, boot_id: str, dirty_count: int, sync_failed: bool = False) -> ReplicaMeta:
    """The store was recovered; this open counts. ``dirty_count``: regions whose mark was set, or unreadable.
    ``sync_failed``: the store says that its disk had failed it (C15), by its own note that outlives a kill.

    What a lost page cache took with it lies in marked regions, since a mark is durable before the first
    write; so without marks nothing was lost. ``last_boot_id`` moves only in open_for_writing: until then
    another open must come to the same answer.
    """
    lost_cache = not meta.clean and meta.last_boot_id != boot_id
    suspect = meta.suspect or sync_failed or (lost_cache and dirty_count > 0)
    return replace(meta, suspect=suspect, opens=meta.opens + 1)


def store_failed(meta: ReplicaMeta) -> ReplicaMeta:
    """A failed fdatasync: the page cache lies (C15). Its acknowledged writes may be gone."""
    return replace(meta, suspect=True)


def regions_completed(meta: ReplicaMeta, *, epoch: int, doubtful_count: int) -> ReplicaMeta:
    """``doubtful_count``: regions that were dirty when this replica was opened (of a restored one: all that
    were ever written), and that no engine has made equal on all replicas since. At none, and with a record of
    this epoch that names it, a suspect or restored replica is trusted again. Not earlier: the record of an
    open comes before its reconcile, and an engine that dies between the two must not leave a suspect that
    looks like a source."""
    check_epoch(meta, epoch)
    named = meta.record.epoch == epoch and meta.replica_id in meta.record.in_sync
    if not named or doubtful_count:
        return meta
    return replace(meta, suspect=False, restored=False)


def detached(meta: ReplicaMeta, *, epoch: int) -> ReplicaMeta:
    """Every mark is cleared and everything flushed; the epoch is closed. Repeatable."""
    if epoch == meta.epoch and not meta.claimed_by:
        return meta
    check_epoch(meta, epoch)
    equal = regions_completed(meta, epoch=epoch, doubtful_count=0)
    return replace(equal, claimed_by="", clean=True)


def closed(meta: ReplicaMeta) -> ReplicaMeta:
    """The server stops; everything is flushed. The epoch stays open: its engine may come back."""
    return replace(meta, clean=True)


def resized(meta: ReplicaMeta, *, size_bytes: int) -> ReplicaMeta:
    assert size_bytes >= meta.size_bytes
    return replace(meta, size_bytes=size_bytes)
