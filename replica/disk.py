"""One disk: a directory that says whose it is, and the replicas in it.

Owns ``disk.json``, ``disk.lock`` and the names under ``replicas/``. Does not own what is inside a replica's
directory (``metadata.py`` and the data plane).

Layout::

    disk.json                     {"format": "dolmen-disk", "version": 1, "disk_id", "node_id"}
    disk.lock                     locked by the replica server that serves this disk
    replicas/<volume_id>/         a replica
    replicas/.new-<volume_id>-*   one being created; swept at open
    replicas/.del-<volume_id>-*   one being deleted; swept at open

Promises: a directory is made ours only if it is missing or empty; an error while looking is an error, never
an empty disk (C22). What has a name we did not give is left alone and reported. A replica appears under
its name complete, and disappears whole.

======================================  ====================================================
creating, step                          a crash after it leaves
======================================  ====================================================
1 make and fill ``.new-*``              ``.new-*``, swept at open
2 fsync its files and itself            the same
3 rename to ``<volume_id>``             either name
4 fsync ``replicas/``                   the replica; only now may we answer
======================================  ====================================================

======================================  ====================================================
deleting, step                          a crash after it leaves
======================================  ====================================================
1 rename to ``.del-*``                  either name
2 fsync ``replicas/``                   ``.del-*``, swept at open; only now may we answer
3 remove ``.del-*``                     part of it, swept at open
======================================  ====================================================
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from protocol.errors import DiskError, DiskRefused, NoSpace, StorageError
from replica.metadata import fsync_directory, write_all

DISK_FILE = "disk.json"
LOCK_FILE = "disk.lock"
REPLICAS_DIR = "replicas"
FORMAT = "dolmen-disk"
FORMAT_VERSION = 1

DISK_FILE_BYTES_MAX = 4096
"""Four short fields. More is not our file."""

_VOLUME_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")
_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_NEW, _DEAD = ".new-", ".del-"

# What a disk may contain and still count as empty: what mkfs leaves, and what we leave when we die early.
_HARMLESS = frozenset({"lost+found", LOCK_FILE, DISK_FILE + ".tmp"})


def is_volume_id(text: object) -> bool:
    """A volume id is a directory name: nothing that could point elsewhere."""
    return isinstance(text, str) and _VOLUME_ID.match(text) is not None


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    disk_id: str
    node_id: str


class Verdict(Enum):
    OURS = "ours"
    EMPTY = "empty"


def judge_directory(names: Iterable[str], *, path: str) -> Verdict:
    """Decide from its entries whether a directory is ours or may become ours. Raises DiskRefused."""
    present = set(names)
    if DISK_FILE in present:
        return Verdict.OURS
    strange = sorted(present - _HARMLESS)
    if strange:
        reason = f"it has no {DISK_FILE}, and is not empty (there is {strange[0]!r})"
        raise DiskRefused(path=path, reason=reason)
    return Verdict.EMPTY


def parse_identity(data: bytes, *, path: str, node_id: str, disk_id: str | None) -> DiskIdentity:
    """Check disk.json against who we are. ``disk_id``: the one expected, None for any.

    Raises DiskRefused, which says what to do.
    """
    try:
        wire: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DiskRefused(path=path, reason=f"{DISK_FILE} is damaged: {error}") from error
    match wire:
        case {"format": "dolmen-disk", "version": 1, "disk_id": str(found_disk), "node_id": str(found_node)}:
            pass
        case {"format": "dolmen-disk", "version": int(version)} if version != FORMAT_VERSION:
            reason = f"{DISK_FILE} has version {version}, this program knows {FORMAT_VERSION}"
            raise DiskRefused(path=path, reason=reason)
        case _:
            raise DiskRefused(path=path, reason=f"{DISK_FILE} is not a Dolmen disk's")
    if found_node != node_id:
        raise DiskRefused(path=path, reason=f"it belongs to node {found_node}, this is {node_id}")
    if disk_id is not None and found_disk != disk_id:
        raise DiskRefused(path=path, reason=f"it is disk {found_disk}, expected {disk_id}")
    return DiskIdentity(disk_id=found_disk, node_id=found_node)


@dataclass(frozen=True, slots=True)
class Listing:
    """What stands under ``replicas/``, sorted by what to do with it."""

    volume_ids: tuple[str, ...]
    leftovers: tuple[str, ...]  # ours, half made or half deleted: to be swept
    strange: tuple[str, ...]  # not ours: left alone, reported


def judge_replicas(names: Iterable[str]) -> Listing:
    volume_ids, leftovers, strange = [], [], []
    for name in sorted(names):
        if is_volume_id(name):
            volume_ids.append(name)
        elif name.startswith((_NEW, _DEAD)):
            leftovers.append(name)
        else:
            strange.append(name)
    return Listing(tuple(volume_ids), tuple(leftovers), tuple(strange))


def to_storage_error(error: OSError, *, path: str) -> StorageError:
    """What an operating system error means to whoever asked."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(path=path)
    return DiskError(path=path, reason=error.strerror or str(error))


class Disk:
    """An open disk: locked, checked, its own. All methods block; they are run in threads."""

    def __init__(self, path: str, identity: DiskIdentity, lock_fd: int) -> None:
        self.path = path
        self.identity = identity
        self.replicas_path = os.path.join(path, REPLICAS_DIR)
        self._lock_fd = lock_fd
        self._serial = 0

    @classmethod
    def open(cls, path: str, *, node_id: str, disk_id: str | None = None, make_id: Callable[[], str]) -> Disk:
        """Lock the directory and check that it is ours; an empty one becomes ours, unless ``disk_id``
        says that a certain disk must be there (then its mount is missing). Raises DiskRefused or OSError.
        """
        path = os.path.abspath(path)
        if not _NODE_ID.match(node_id):
            raise DiskRefused(path=path, reason=f"{node_id!r} cannot be a node's id")
        if disk_id is None:
            os.makedirs(path, mode=0o700, exist_ok=True)
        judge_directory(_names(path), path=path)  # before the first file of ours appears in it
        lock_fd = _lock(path)
        try:
            if judge_directory(_names(path), path=path) is Verdict.EMPTY:
                if disk_id is not None:
                    raise DiskRefused(path=path, reason=f"it is empty, expected disk {disk_id}")
                _write_identity(path, DiskIdentity(disk_id=make_id(), node_id=node_id))
            with open(os.path.join(path, DISK_FILE), "rb") as file:
                data = file.read(DISK_FILE_BYTES_MAX + 1)
            identity = parse_identity(data, path=path, node_id=node_id, disk_id=disk_id)
            os.makedirs(os.path.join(path, REPLICAS_DIR), mode=0o700, exist_ok=True)
            fsync_directory(path)
            return cls(path, identity, lock_fd)
        except BaseException:
            os.close(lock_fd)
            raise

    def close(self) -> None:
        os.close(self._lock_fd)

    def list_replicas(self) -> Listing:
        return judge_replicas(os.listdir(self.replicas_path))

    def replica_path(self, volume_id: str) -> str:
        assert is_volume_id(volume_id)
        return os.path.join(self.replicas_path, volume_id)

    def has_replica(self, volume_id: str) -> bool:
        return os.path.lexists(self.replica_path(volume_id))

    def begin_replica(self, volume_id: str) -> str:
        """Make the directory in which a replica is put together. Step 1 of creating."""
        path = self._unused_path(_NEW, volume_id)
        os.mkdir(path, mode=0o700)
        return path

    def finish_replica(self, temporary_path: str, volume_id: str) -> str:
        """Steps 2 to 4 of creating: the files themselves are durable already."""
        final = self.replica_path(volume_id)
        fsync_directory(temporary_path)
        if self.has_replica(volume_id):
            raise DiskRefused(path=final, reason="something has this name already")
        os.rename(temporary_path, final)
        fsync_directory(self.replicas_path)
        return final

    def bury_replica(self, volume_id: str) -> str:
        """Steps 1 and 2 of deleting; the path of what is left to remove."""
        grave = self._unused_path(_DEAD, volume_id)
        os.rename(self.replica_path(volume_id), grave)
        fsync_directory(self.replicas_path)
        return grave

    def sweep(self, path: str) -> None:
        """Remove what create or delete left. Raises OSError; then it is tried again at the next open."""
        name = os.path.basename(path)
        assert name.startswith((_NEW, _DEAD)) and os.path.dirname(path) == self.replicas_path
        shutil.rmtree(path)

    def space_bytes(self) -> tuple[int, int]:
        """Total, and free for us."""
        found = os.statvfs(self.path)
        return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

    def _unused_path(self, prefix: str, volume_id: str) -> str:
        assert is_volume_id(volume_id)
        while True:
            self._serial += 1
            path = os.path.join(self.replicas_path, f"{prefix}{volume_id}-{self._serial}")
            if not os.path.lexists(path):
                return path


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise DiskRefused(path=path, reason=error.strerror or str(error)) from error


def _lock(path: str) -> int:
    fd = os.open(os.path.join(path, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise DiskRefused(path=path, reason="another replica server serves it") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_identity(path: str, identity: DiskIdentity) -> None:
    """Atomic and durable: an interrupted start leaves an empty disk or one of ours."""
    text = json.dumps(
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "disk_id": identity.disk_id,
            "node_id": identity.node_id,
        }
    )
    tmp = os.path.join(path, DISK_FILE + ".tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, text.encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(tmp, os.path.join(path, DISK_FILE))
    fsync_directory(path)
