"""Opens the state store, and judges whether it is the newest there was.

Owns the question at each start: is ``state.db`` the one that ``state.stamp`` was written after? Does not own
either file (``control/sqlite_store.py``, ``control/stamp.py``), or what a distrusted volume may do
(``engine/membership.py``).

Promises: an empty state store is made only where no cluster ever was; one that is gone, damaged or older is
never taken for the truth: the first two end the start, the third makes every volume distrusted, in one
transaction, before anything else is written.
"""

from __future__ import annotations

from datetime import UTC, datetime

import structlog

from control.documents import Document
from control.errors import StateStoreGone
from control.layout import Layout
from control.model import KIND_VOLUME, Volume, dump
from control.sqlite_store import SqliteStore
from control.stamp import StateStamp
from control.trust import OLDER_COPY, distrusted


async def open_state(layout: Layout) -> tuple[SqliteStore, StateStamp]:
    """Raises StateStoreGone, DiskError."""
    stamp = StateStamp.read(layout.stamp)
    refuse_if_gone(layout, stamp)
    store = await SqliteStore.open(layout.state)
    try:
        await _distrust_older_copy(store, stamp)
    except BaseException:
        await store.close()
        raise
    return store, stamp


def refuse_if_gone(layout: Layout, stamp: StateStamp) -> None:
    """``state.db`` is made before the first disk: disks or a stamp without it mean that it was lost."""
    disks = sorted(layout.dir.glob("nodes/*/disk0/disk.json"))
    if not layout.state.exists() and (stamp.number or disks):
        raise StateStoreGone(path=str(layout.state), dir=str(layout.dir))


async def _distrust_older_copy(store: SqliteStore, stamp: StateStamp) -> None:
    revision = await store.revision()
    if stamp.number <= revision:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    volumes = [Volume(document) for document in await store.list(KIND_VOLUME)]
    marked = [
        Document(
            KIND_VOLUME,
            volume.name,
            volume.document.spec,
            dump(distrusted(volume.status, OLDER_COPY, now)),
            volume.document.revision,
        )
        for volume in volumes
    ]
    # The numbers go on above the stamp, in the same transaction: after it nothing tells any more that the
    # copy was older, but every volume says so itself.
    await store.put_all(marked, above=stamp.number)
    structlog.get_logger().warning(
        "state store is an older copy: volumes open only with all members until it is written anew",
        stamp=stamp.number,
        revision=revision,
        volumes=[volume.name for volume in volumes],
    )
