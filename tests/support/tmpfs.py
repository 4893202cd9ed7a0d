"""A small file system in memory: the way to a full disk that is full on purpose."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MOUNT_TIMEOUT_S = 30


@contextlib.contextmanager
def tmpfs(directory: Path, *, size_bytes: int) -> Iterator[Path]:
    """Mount an empty tmpfs over ``directory`` (made if missing). Skips the test where mounting is
    not allowed. ``resize`` changes its size while it is mounted."""
    directory.mkdir(parents=True, exist_ok=True)
    done = _mount("-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", directory)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        # Lazily: a process that the test still ends may have files open here.
        subprocess.run(["umount", "--lazy", directory], check=True, timeout=MOUNT_TIMEOUT_S)


def resize(directory: Path, *, size_bytes: int) -> None:
    done = _mount("-o", f"remount,size={size_bytes}", directory)
    assert done.returncode == 0, done.stderr


def free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_bsize


def _mount(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["mount", *map(str, arguments)], capture_output=True, text=True, timeout=MOUNT_TIMEOUT_S, check=False
    )
