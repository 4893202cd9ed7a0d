"""The file ``scrub`` of a replica: how far its scrub is and what it found.

Owns the bytes and the write. Does not own the value (``scrub.py``). Layout as that of ``replica.meta``, with
the magic ``DLMNSCRB``; the body is one msgpack map with exactly the fields of ScrubState.

==  =============================================  ===================================================
#   step                                           a crash or power loss after it leaves
==  =============================================  ===================================================
1   write ``scrub.tmp``, sync it                   the old file, or none
2   rename it to ``scrub``                         the old file or the new
==  =============================================  ===================================================

The directory is not synced: an older file means that some regions are read once more. A file that is missing
or damaged means a replica that was never scrubbed. Neither is worth a failure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgpack

from replica.checksum import xxh3_64
from replica.metadata import HEADER, TRAILER, write_all
from replica.scrub import DAMAGED_KEPT_MAX, Pass, ScrubState

SCRUB_NAME = "scrub"
SCRUB_TMP_NAME = "scrub.tmp"

MAGIC = b"DLMNSCRB"
FORMAT_VERSION = 1

BODY_BYTES_MAX = 64 * 1024
"""DAMAGED_KEPT_MAX block numbers of nine bytes, and a few words."""

assert DAMAGED_KEPT_MAX * 9 < BODY_BYTES_MAX - 1024

_FIELDS = frozenset(field.name for field in fields(ScrubState))


def encode(state: ScrubState) -> bytes:
    body: bytes = msgpack.packb(
        {
            **{name: getattr(state, name) for name in _FIELDS},
            "running": state.running.value,
            "damaged": list(state.damaged),
        }
    )
    data = HEADER.pack(MAGIC, FORMAT_VERSION, 0, len(body)) + body
    return data + TRAILER.pack(xxh3_64(data))


def decode(data: bytes) -> ScrubState | None:
    """None for anything that encode did not make."""
    if len(data) < HEADER.size + TRAILER.size:
        return None
    magic, version, reserved, body_bytes = HEADER.unpack_from(data)
    if (magic, version, reserved) != (MAGIC, FORMAT_VERSION, 0):
        return None
    if len(data) != HEADER.size + body_bytes + TRAILER.size:
        return None
    if TRAILER.unpack_from(data, len(data) - TRAILER.size)[0] != xxh3_64(data[: -TRAILER.size]):
        return None
    try:
        return _state_of(msgpack.unpackb(data[HEADER.size : -TRAILER.size], max_array_len=DAMAGED_KEPT_MAX))
    except (ValueError, AssertionError, TypeError, msgpack.UnpackException):
        return None


def _state_of(body: Any) -> ScrubState:
    if not isinstance(body, Mapping) or body.keys() != _FIELDS:
        raise ValueError("not the fields of this format")
    numbers = {name: body[name] for name in _FIELDS - {"running", "damaged"}}
    damaged = body["damaged"]
    if not isinstance(damaged, list) or not all(type(n) is int for n in (*numbers.values(), *damaged)):
        raise ValueError("not numbers")
    if sorted(set(damaged)) != damaged or (damaged and damaged[0] < 0):
        raise ValueError("not block numbers that ascend")
    return ScrubState(running=Pass(body["running"]), damaged=tuple(damaged), **numbers)


def read_scrub(directory: str) -> ScrubState | None:
    """Blocking. None: there is none, or none that can be read."""
    try:
        with open(os.path.join(directory, SCRUB_NAME), "rb") as file:
            return decode(file.read(HEADER.size + BODY_BYTES_MAX + TRAILER.size + 1))
    except OSError:
        return None


def write_scrub(directory: str, state: ScrubState) -> None:
    """Blocking. Raises OSError; then the old file stands."""
    final, tmp = os.path.join(directory, SCRUB_NAME), os.path.join(directory, SCRUB_TMP_NAME)
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, encode(state))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(tmp, final)


def drop_cached(path: str, *, offset_bytes: int, length_bytes: int) -> None:
    """Let the next read of this range come from the disk: a scrub of the page cache would prove nothing.
    Blocking. An attempt: what is not written back stays, and a file that fails is for the read to meet."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.posix_fadvise(fd, offset_bytes, length_bytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    except OSError:
        pass
