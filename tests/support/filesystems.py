"""Small file systems of several types in a file, for what differs between them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.tmpfs import tmpfs

MOUNT_TIMEOUT_S = 60

SIZE_BYTES = {"ext4": 64 * 2**20, "xfs": 320 * 2**20, "btrfs": 160 * 2**20}
"""Little more than the smallest that its mkfs accepts. Sparse."""

FILESYSTEMS = ("ext4", "xfs", "btrfs", "overlay", "tmpfs")

Remount = Callable[[], None]


@contextlib.contextmanager
def filesystem(kind: str, directory: Path) -> Iterator[tuple[Path, Remount]]:
    """A new file system of type ``kind`` at ``directory``/mount, and a function that takes it away and
    mounts it again, as a reboot does (on tmpfs, which would lose all, it does nothing). Skips the test where
    the type or the tools for it are not there."""
    mount = directory / "mount"
    mount.mkdir(parents=True)
    if kind == "tmpfs":
        with tmpfs(mount, size_bytes=64 * 2**20):
            yield mount, lambda: None
        return
    command = _overlay(directory) if kind == "overlay" else _image(kind, directory)
    done = _run(*command, str(mount))
    if done.returncode != 0:
        pytest.skip(f"cannot mount {kind} here: {done.stderr.strip()}")

    def remount() -> None:
        assert _run("umount", str(mount)).returncode == 0
        assert _run(*command, str(mount)).returncode == 0

    try:
        yield mount, remount
    finally:
        _run("umount", "--lazy", str(mount))


def _image(kind: str, directory: Path) -> list[str]:
    mkfs = shutil.which(f"mkfs.{kind}")
    if mkfs is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES[kind])
    done = _run(mkfs, "-q", str(image))
    assert done.returncode == 0, done.stderr
    return ["mount", "-o", "loop", str(image)]


def _overlay(directory: Path) -> list[str]:
    for name in ("lower", "upper", "work"):
        (directory / name).mkdir()
    options = ",".join(f"{name}dir={directory / name}" for name in ("lower", "upper", "work"))
    return ["mount", "-t", "overlay", "-o", options, "overlay"]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=MOUNT_TIMEOUT_S, check=False)
