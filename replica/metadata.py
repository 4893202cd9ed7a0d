"""replica.meta: what a replica says of itself, so that a cluster can be rebuilt from disks alone.

Owns the value, its byte format and its durable write. Does not own who may change it (``epoch.py``), the
replica's other files (``dataplane/core/src/replica/``), or the directory around it (``disk.py``).

Byte table, little-endian:

======  ======  ==============================================================================
offset  size    field
======  ======  ==============================================================================
0       8       magic ``DLMNMETA``
8       2       format version, 2
10      2       reserved, 0
12      4       body_bytes, at most META_BODY_BYTES_MAX
16      n       body: one msgpack map with exactly the fields of ReplicaMeta, and ``identity``
16 + n  8       xxh3_64 over every byte before
======  ======  ==============================================================================

How it is written, and what a crash leaves:

==  ==========================================  ===============================================
#   step                                        a crash after it leaves
==  ==========================================  ===============================================
1   write ``replica.meta.tmp``                  the old file; the tmp file is junk, overwritten
                                                by the next write and never read
2   fsync it                                    the same
3   rename it over ``replica.meta``             the old file or the new, never half
4   fsync the directory                         the new file; only now may we answer
5   preallocate the next ``replica.meta.tmp``   the new file
==  ==========================================  ===============================================

``identity`` is that of the very file that the body was written to: the tmp file of step 1, which stays the
same file when it is renamed. A replica.meta that stands in another file is a copy that somebody put there,
and so is one beside which ``regions``, ``data`` or ``map`` is another file than it was: ``read_meta`` returns
it ``restored``, and the next write makes that durable together with the new identities.

Version 1 had no ``identity``, ``files``, ``opens`` and ``restored``. It is read as not known, none, 0 and
False, and is version 2 from its next write, which is at open.

Step 5 is why a claim still succeeds on a full disk: the next write needs no new block. It is an attempt;
where it fails, the next write may answer NoSpace, and nothing has changed.

A write that fails at step 3 or 4 has an unknown outcome, like a lost answer: the caller keeps the old
value, and the next open may find the new one. Both were asked for by somebody who may ask again.

Proved by tests/replica/test_metadata.py, which cuts after every system call.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import msgpack

from protocol.errors import ProtocolViolation, ReplicaDamaged
from protocol.hello import ID_CHARS_MAX
from protocol.limits import BLOCK_BYTES, NAME_CHARS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN
from protocol.membership import MembershipRecord, parse_record
from replica.checksum import xxh3_64
from replica.identity import FileIdentity, identify, identify_path, is_another, parse_identity

FILE_NAME = "replica.meta"
TMP_NAME = "replica.meta.tmp"

MAGIC = b"DLMNMETA"
FORMAT_VERSION = 2
FORMAT_VERSION_READ_MIN = 1
HEADER = struct.Struct("<8sHHI")
TRAILER = struct.Struct("<Q")

META_BODY_BYTES_MAX = 1024 * 1024
"""A chain of LAYERS_MAX names fits three times over. A larger length is damage, not data."""

LAYERS_MAX = 4096
"""Layers of one chain. Far past what anybody keeps; bounds what a damaged file makes us hold."""

LAYER_NAME_CHARS_MAX = 80

SPARE_BYTES = 4096
"""What step 5 preallocates: a replica.meta without snapshots has about 700 bytes."""

assert LAYERS_MAX * LAYER_NAME_CHARS_MAX * 3 <= META_BODY_BYTES_MAX

StoreFiles = tuple[FileIdentity | None, ...]
"""Of ``regions`` and of the head's ``data`` and ``map``, in this order; empty: not recorded yet. Not of the
layers below, which never change: put back, they are what they were."""

STORE_FILES_COUNT = 3

Stamp = tuple[int, int]
"""(epoch, version) of a membership record."""

NEVER_SYNCED: Stamp = (0, 0)


@dataclass(frozen=True, slots=True)
class ReplicaMeta:
    """One replica's own knowledge. Changed only by the functions of ``epoch.py``."""

    volume_id: str
    replica_id: str
    name: str
    size_bytes: int
    chain: tuple[str, ...]  # layer directories, head first
    epoch: int  # the highest ever claimed
    claimed_by: str  # the engine that claimed it; "" after it detached: the epoch is closed
    record: MembershipRecord  # the newest persisted here
    synced_at: Stamp  # of the newest record persisted here that names this replica in sync
    last_boot_id: str  # the machine's boot under which it was last open for writing
    clean: bool  # closed with everything flushed, and not opened for writing since
    suspect: bool  # may have lost acknowledged writes
    opens: int = 0  # how often a server opened it or an engine claimed it
    restored: bool = False  # it is a copy that was put back: it may be of any age
    files: StoreFiles = ()  # which files its store's are

    def __post_init__(self) -> None:
        assert VOLUME_BYTES_MIN <= self.size_bytes <= VOLUME_BYTES_MAX and self.size_bytes % BLOCK_BYTES == 0
        assert 0 < len(self.chain) <= LAYERS_MAX
        assert self.record.epoch <= self.epoch
        assert self.synced_at <= self.record.stamp
        assert self.opens >= 0
        assert len(self.files) in (0, STORE_FILES_COUNT)


_META_FIELDS = frozenset(field.name for field in fields(ReplicaMeta))
_FIELDS = _META_FIELDS | {"identity"}
_SINCE_VERSION_2 = {"identity": [], "files": [], "opens": 0, "restored": False}


def encode_meta(meta: ReplicaMeta, *, identity: FileIdentity | None) -> bytes:
    """``identity``: of the file that the bytes go to."""
    body: bytes = msgpack.packb(
        {
            **{name: getattr(meta, name) for name in _META_FIELDS},
            "chain": list(meta.chain),
            "record": meta.record.to_wire(),
            "synced_at": list(meta.synced_at),
            "files": [_identity_to_wire(file) for file in meta.files],
            "identity": _identity_to_wire(identity),
        }
    )
    assert len(body) <= META_BODY_BYTES_MAX
    data = HEADER.pack(MAGIC, FORMAT_VERSION, 0, len(body)) + body
    return data + TRAILER.pack(xxh3_64(data))


def _identity_to_wire(identity: FileIdentity | None) -> list[Any]:
    return identity.to_wire() if identity is not None else []


def decode_meta(data: bytes, *, path: str) -> tuple[ReplicaMeta, FileIdentity | None]:
    """The metadata, and the file that they were written to. Raises ReplicaDamaged, which names ``path``, for
    anything encode_meta did not make."""
    if len(data) < HEADER.size + TRAILER.size:
        raise ReplicaDamaged(path=path, reason=f"{FILE_NAME} has {len(data)} bytes")
    magic, version, reserved, body_bytes = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ReplicaDamaged(path=path, reason=f"{FILE_NAME} does not begin with {MAGIC.decode()}")
    if not FORMAT_VERSION_READ_MIN <= version <= FORMAT_VERSION or reserved != 0:
        raise ReplicaDamaged(path=path, reason=f"{FILE_NAME} has format {version}, this is {FORMAT_VERSION}")
    if len(data) != HEADER.size + body_bytes + TRAILER.size:
        raise ReplicaDamaged(path=path, reason=f"{FILE_NAME} has {len(data)} bytes and says otherwise")
    if TRAILER.unpack_from(data, len(data) - TRAILER.size)[0] != xxh3_64(data[: -TRAILER.size]):
        raise ReplicaDamaged(path=path, reason=f"{FILE_NAME} does not match its checksum")
    try:
        body = msgpack.unpackb(data[HEADER.size : -TRAILER.size], raw=False, max_array_len=LAYERS_MAX)
        if version < 2 and isinstance(body, dict):
            if body.keys() & _SINCE_VERSION_2.keys():
                raise ValueError("fields of a later format")
            body |= _SINCE_VERSION_2
        return _meta_of(body)
    except (ValueError, AssertionError, ProtocolViolation, msgpack.UnpackException) as error:
        raise ReplicaDamaged(path=path, reason=f"{FILE_NAME}: {error}") from error


def _meta_of(body: Any) -> tuple[ReplicaMeta, FileIdentity | None]:
    """Raises ValueError, ProtocolViolation or AssertionError: the checksum holds, so it was written so."""
    if not isinstance(body, Mapping) or body.keys() != _FIELDS:
        raise ValueError("not the fields of this format")
    match body:
        case {
            "volume_id": str(volume_id),
            "replica_id": str(replica_id),
            "name": str(name),
            "size_bytes": int(size_bytes),
            "chain": list(chain),
            "epoch": int(epoch),
            "claimed_by": str(claimed_by),
            "record": dict(record),
            "synced_at": [int(synced_epoch), int(synced_version)],
            "last_boot_id": str(last_boot_id),
            "clean": bool(clean),
            "suspect": bool(suspect),
            "opens": int(opens),
            "restored": bool(restored),
            "files": list(files),
            "identity": identity,
        } if (
            max(len(volume_id), len(replica_id), len(claimed_by), len(last_boot_id)) <= ID_CHARS_MAX
            and len(name) <= NAME_CHARS_MAX
            and 0 <= epoch < 2**63
            and all(is_layer_name(layer) for layer in chain)
        ):
            meta = ReplicaMeta(
                volume_id=volume_id,
                replica_id=replica_id,
                name=name,
                size_bytes=size_bytes,
                chain=tuple(chain),
                epoch=epoch,
                claimed_by=claimed_by,
                record=parse_record(record),
                synced_at=(synced_epoch, synced_version),
                last_boot_id=last_boot_id,
                clean=clean,
                suspect=suspect,
                opens=opens,
                restored=restored,
                files=tuple(parse_identity(file) for file in files),
            )
            return meta, parse_identity(identity)
        case _:
            raise ValueError("a field has the wrong type or is out of range")


def is_layer_name(name: object) -> bool:
    """A name that is one directory below the replica's, whatever wrote it."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= LAYER_NAME_CHARS_MAX
        and name[0].isalnum()
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    )


def has_meta(directory: str) -> bool:
    """Whether its file stands there. A write replaces it by renaming: it is never away for a moment."""
    return os.path.lexists(os.path.join(directory, FILE_NAME))


def read_meta(directory: str) -> ReplicaMeta:
    """What stands there, with ``files`` as they are now, and ``restored`` also if they, or replica.meta
    itself, are not the files that they were. Blocking. Raises ReplicaDamaged for a file that is missing or
    damaged, OSError for a failing disk."""
    path = os.path.join(directory, FILE_NAME)
    try:
        with open(path, "rb") as file:
            data = file.read(HEADER.size + META_BODY_BYTES_MAX + TRAILER.size + 1)
            found = identify(file.fileno())
    except FileNotFoundError as error:
        raise ReplicaDamaged(path=directory, reason=f"{FILE_NAME} is missing") from error
    meta, recorded = decode_meta(data, path=directory)
    files = identify_store(directory, meta.chain[0])
    strange = any(map(is_another, meta.files, files)) or is_another(recorded, found)
    return replace(meta, files=files, restored=meta.restored or strange)


def identify_store(directory: str, head: str) -> StoreFiles:
    """Which files the store consists of now. Blocking. Raises OSError; a missing one is for the store to
    notice."""
    names = ("regions", f"{head}/data", f"{head}/map")
    return tuple(identify_path(os.path.join(directory, name)) for name in names)


def write_meta(directory: str, meta: ReplicaMeta) -> None:
    """Durable when it returns: the table above. Blocking. Raises OSError; then the outcome is unknown."""
    final, tmp = os.path.join(directory, FILE_NAME), os.path.join(directory, TMP_NAME)
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        data = encode_meta(meta, identity=identify(fd))
        write_all(fd, data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(tmp, final)
    fsync_directory(directory)
    _preallocate(tmp)


def write_all(fd: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])  # a short write is legal; the next one says why


def fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _preallocate(path: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, SPARE_BYTES)
        finally:
            os.close(fd)
    except OSError:
        pass  # full, or a file system without it: the next write asks for its block itself
