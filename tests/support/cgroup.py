"""A control group of the test's own: a limit on processes or memory that meets living processes."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import wait_until

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Of version 1: one controller, one directory."""

    directory: Path

    def add(self, *pids: int) -> None:
        for pid in pids:
            (self.directory / "cgroup.procs").write_text(str(pid))

    def set(self, name: str, value: int | str) -> None:
        (self.directory / name).write_text(str(value))

    def get(self, name: str) -> int:
        return int((self.directory / name).read_text())

    def empty(self) -> None:
        """Those that live go back to where everybody is."""
        for pid in (self.directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it ended meanwhile
                (self.directory.parent / "cgroup.procs").write_text(pid)


@contextlib.contextmanager
def cgroup(controller: str) -> Iterator[Cgroup]:
    """Skips the test where there is no such controller to use."""
    directory = ROOT / controller / f"dolmen-test-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for {controller} here: {error}")
    group = Cgroup(directory)
    try:
        yield group
    finally:

        def removed() -> bool:
            group.empty()
            with contextlib.suppress(OSError):  # the dead leave it a moment later
                directory.rmdir()
            return not directory.exists()

        wait_until(removed, what=f"the end of {directory}")
