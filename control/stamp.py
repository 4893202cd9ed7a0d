"""state.stamp: the number of the last write to the state store that a membership decision rests on.

Owns the file. The number is the revision that the state store gave to the document with the grant or the
record. The file stands beside ``state.db`` and is written after it, so at a start it can't be ahead, unless
``state.db`` is an older copy. FORMAT.md, "state.stamp", has the order and what a crash leaves.

Does not own what is then distrusted (``control/trust.py``).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from control.layout import TEMPORARY_SUFFIX, fsync_dir
from protocol.errors import DiskError

STAMP_BYTES_MAX = 64
"""A number of 19 digits and a line end. More is not our file."""


class StateStamp:
    """``StateStamp.read(path)``; ``advance`` after each write that counts."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.number = number
        self._writing = asyncio.Lock()

    @classmethod
    def read(cls, path: Path) -> StateStamp:
        """Raises DiskError when it can't be read or makes no sense; 0 when there is none."""
        return cls(path, read_number(path))

    async def advance(self, number: int) -> None:
        """Durable when it returns, and never goes back. Raises DiskError; then it is asked again, because
        whoever waits for the write was not answered."""
        async with self._writing:
            if number > self.number:
                try:
                    await asyncio.to_thread(write_number, self.path, number)
                except OSError as error:
                    raise DiskError(path=str(self.path), reason=error.strerror or str(error)) from error
                self.number = number


def read_number(path: Path) -> int:
    """Raises DiskError."""
    try:
        with open(path, "rb") as file:
            data = file.read(STAMP_BYTES_MAX + 1)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise DiskError(path=str(path), reason=error.strerror or str(error)) from error
    text = data.strip()
    if not text.isdigit() or len(data) > STAMP_BYTES_MAX:
        raise DiskError(path=str(path), reason="it does not hold a number")
    return int(text)


def write_number(path: Path, number: int) -> None:
    """Steps 2 to 5 of the order in FORMAT.md. Blocking. Raises OSError."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, b"%d\n" % number)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    fsync_dir(path.parent)
