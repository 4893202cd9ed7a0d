"""``dolmen recover --from-disks``: makes the state store anew when it is gone or cannot be used. Synchronous.

Owns looking at what is there, and the order in which the new state store takes its place. Does not own what
follows from the disks (``control/from_disks.py``) or reading them (``replica/survey.py``).

Promises: a state store that can be used is never touched; one that cannot is moved aside, never removed;
nothing on any disk is written; killed at any step, it may be run again. FORMAT.md, "The state store from
disks", has the order. Proved by tests/control/test_recover_disks.py and
tests/system/test_recover_from_disks.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from control.daemon import only_one
from control.documents import Document
from control.from_disks import LivingEngine, NodeDisk, Rebuilt, Report, rebuild
from control.layout import TEMPORARY_SUFFIX, Layout, fsync_dir, make_secret
from control.model import KIND_ATTACHMENT, KIND_NODE, KIND_VOLUME, Attachment, Volume
from control.processes import Programs, find
from control.sqlite_store import SqliteStore
from control.stamp import read_number
from control.supervisor import read_ready_file
from protocol.errors import BadRequest, DiskError, StorageError
from protocol.hello import KEY_BYTES
from replica.survey import survey_disk

SIDE_FILES = ("-wal", "-shm")
"""What SQLite keeps beside a database. Of another database they would damage the new one."""


def recover_from_disks(
    directory: Path, *, accept_blank: bool = False, dry_run: bool = False, programs: Programs | None = None
) -> Report:
    """Raises BadRequest, which says why not."""
    layout = Layout(directory)
    if not (layout.dir / "nodes").is_dir():
        raise BadRequest(reason=f"{layout.dir} has no nodes/ with disks in it. Name the directory with --dir")
    try:
        with only_one(layout):
            return _recover(layout, programs or Programs(), accept_blank=accept_blank, dry_run=dry_run)
    except BlockingIOError as error:
        raise BadRequest(
            reason=f"a daemon runs in {layout.dir}, and uses its state store. `dolmen why` says what is wrong"
        ) from error


def _recover(layout: Layout, programs: Programs, *, accept_blank: bool, dry_run: bool) -> Report:
    refuse_good_store(layout)
    nodes = _nodes(layout)
    engines = list(_living_engines(layout, programs))
    now = datetime.now(UTC)
    made = rebuild(nodes, engines, accept_blank=accept_blank, now=now.isoformat(timespec="seconds"))
    moved: list[str] = []
    if not dry_run:
        _make_key(layout, programs, nodes, engines)
        moved = _write(layout, made, aside=f".aside-{now:%Y%m%dT%H%M%S}")
    return Report(
        nodes=[found.node for found in nodes],
        volumes=made.volumes,
        left_out=made.left_out,
        written=not dry_run,
        moved_aside=moved,
    )


def refuse_good_store(layout: Layout) -> None:
    """Raises BadRequest if the state store can be used. What it says counts more than any disk (C22)."""
    if not layout.state.exists():
        return
    with tempfile.TemporaryDirectory(prefix="dolmen-state-") as copies:
        # Opening a database may write to it: a copy is opened.
        for suffix in ("", "-wal"):
            source = Path(f"{layout.state}{suffix}")
            if source.exists():
                shutil.copyfile(source, Path(copies) / source.name)
        try:
            asyncio.run(_read_all(Path(copies) / layout.state.name))
        except (StorageError, ValueError, AssertionError):
            return
    raise BadRequest(
        reason=f"{layout.state} can be used, and is left as it is. `dolmen up --dir {layout.dir}` uses it"
    )


def store_fault(layout: Layout) -> str:
    """What is wrong with a state store that no daemon uses; "" if it can be used, or there never was one."""
    if not layout.state.exists():
        had_one = layout.stamp.exists() or any(layout.dir.glob("nodes/*/disk0/disk.json"))
        return "is gone" if had_one else ""
    try:
        refuse_good_store(layout)
    except BadRequest:
        return ""
    return "cannot be read"


async def _read_all(path: Path) -> None:
    """Raises StorageError or ValueError when a document can't be read, or there is none: the first thing that
    a cluster's state store ever holds is its nodes."""
    store = await SqliteStore.open(path)
    try:
        if not await store.list(KIND_NODE):
            raise ValueError("it is empty")
        for document in await store.list(KIND_VOLUME):
            Volume(document)
        for document in await store.list(KIND_ATTACHMENT):
            Attachment(document)
    finally:
        await store.close()


def _nodes(layout: Layout) -> list[NodeDisk]:
    found = []
    for entry in sorted(os.scandir(layout.dir / "nodes"), key=lambda entry: entry.name):
        if entry.is_dir():
            ready = read_ready_file(layout.ready_file(entry.name))
            disk = survey_disk(os.fspath(layout.disk_dir(entry.name)))
            found.append(NodeDisk(entry.name, disk, ready.port if ready is not None else 0))
    return found


def _living_engines(layout: Layout, programs: Programs) -> Iterator[LivingEngine]:
    """Engines outlive the daemon: none must be ended because nobody remembers that it was wanted."""
    volumes = layout.dir / "volumes"
    for path in sorted(volumes.iterdir()) if volumes.is_dir() else ():
        config = layout.engine_config(path.name)
        if not find([*programs.engine[1:], "--config", os.fspath(config)]):
            continue
        try:
            wire: Any = json.loads(config.read_bytes())
        except (OSError, ValueError):
            continue  # then it is ended by the next daemon, and the volume is attached anew
        match wire:
            case {
                "volume_id": str(volume_id),
                "name": str(name),
                "epoch": int(epoch),
                "engine_id": str(engine_id),
                "node": str(node),
                "listeners": list(listeners),
            }:
                tcp = any(isinstance(item, dict) and item.get("kind") == "tcp" for item in listeners)
                yield LivingEngine(volume_id, name, epoch, engine_id, node, tcp)


def _make_key(layout: Layout, programs: Programs, nodes: list[NodeDisk], engines: list[LivingEngine]) -> None:
    """A key that is lost is made anew, unless a process still has the old one."""
    if layout.key.exists():
        return
    servers = [
        found.node
        for found in nodes
        if find([*programs.replica_server[1:], "--dir", os.fspath(layout.disk_dir(found.node))])
    ]
    if servers or engines:
        raise BadRequest(
            reason=f"{layout.key} is gone, and processes that have it still run. "
            f"`dolmen down --dir {layout.dir}`, then again"
        )
    make_secret(layout.key, secrets.token_bytes(KEY_BYTES))


def _write(layout: Layout, made: Rebuilt, *, aside: str) -> list[str]:
    """The steps of FORMAT.md. Returns what was moved aside."""
    new = layout.state.with_name(layout.state.name + TEMPORARY_SUFFIX)
    for path in (new, *(Path(f"{new}{suffix}") for suffix in SIDE_FILES)):
        path.unlink(missing_ok=True)  # of a run that was killed
    try:
        above = read_number(layout.stamp)
    except DiskError:
        above = 0
        moved_stamp = layout.stamp.with_name(layout.stamp.name + aside)
        layout.stamp.rename(moved_stamp)
    asyncio.run(_fill(new, made.documents, above))
    _seal(new)
    moved = []
    for path in (layout.state, *(Path(f"{layout.state}{suffix}") for suffix in SIDE_FILES)):
        if path.exists():
            target = path.with_name(path.name + aside)
            path.rename(target)
            moved.append(os.fspath(target))
    fsync_dir(layout.dir)
    new.rename(layout.state)
    fsync_dir(layout.dir)
    return moved


async def _fill(path: Path, documents: list[Document], above: int) -> None:
    store = await SqliteStore.open(path)
    try:
        await store.put_all(documents, above=above)
    finally:
        await store.close()


def _seal(path: Path) -> None:
    """One file with everything in it, durable: it is about to be renamed."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode = DELETE")
    finally:
        connection.close()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
