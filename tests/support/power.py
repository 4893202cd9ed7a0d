"""A disk that loses power: what was not flushed to it is gone, and nothing else.

::

    with power_disk(mount_point, size_bytes=...) as disk:
        ...                     # ext4 at the mount point
        disk.lose_power()       # kill what writes there first
        disk.plug_in()          # the file system recovers its journal, as after a boot

ext4 over a loop device over a FUSE file over nbdkit's cache filter in write-back mode: writes wait in the
filter until a flush comes down, and SIGKILL to nbdkit loses exactly those. Owns the processes, the loop
device and the mounts. Promises: nothing of them is left when the block ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Started, accepts, run, running, wait_until

PROGRAMS = ("nbdkit", "nbdfuse", "losetup", "mkfs.ext4", "mount", "umount", "unshare")

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"


class PowerDisk:
    def __init__(self, mount_point: Path, work: Path, *, size_bytes: int) -> None:
        self.mount_point = mount_point
        self._work = work
        self._image = work / "image"
        self._server: Started | None = None
        self._loop = ""
        self._plugged = contextlib.ExitStack()
        self._plug_count = 0
        with open(self._image, "wb") as file:
            file.truncate(size_bytes)
        mount_point.mkdir(parents=True, exist_ok=True)
        # Tables are written at once: nothing of them in the background later.
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._image)

    def plug_in(self) -> None:
        assert self._server is None
        self._plug_count += 1
        with contextlib.ExitStack() as undo:
            path = self._work / f"nbd{self._plug_count}.sock"
            command = ["nbdkit", "-f", "-U", path, "--filter=cache", "file", self._image, "cache=writeback"]
            log = self._work / "log"
            self._server = undo.enter_context(running(command, log=log, ready=lambda: accepts(path)))
            undo.callback(setattr, self, "_server", None)
            fuse = self._work / f"fuse{self._plug_count}"
            fuse.mkdir()
            block = fuse / "disk"
            command = ["nbdfuse", block, f"nbd+unix:///?socket={path}"]
            undo.enter_context(running(command, log=log, ready=block.exists))
            undo.callback(run, "umount", "--lazy", fuse, check=False)
            self._loop = run("losetup", "-f", "--show", block).stdout.strip()
            undo.callback(self._detach_loop)
            run("mount", self._loop, self.mount_point)
            undo.callback(run, "umount", "--lazy", self.mount_point)
            self._plugged = undo.pop_all()

    def lose_power(self) -> None:
        """Whoever writes there must have been killed: they died with the machine."""
        assert self._server is not None
        self._server.kill()
        self.unplug()

    def unplug(self) -> None:
        self._plugged.close()

    def _detach_loop(self) -> None:
        run("losetup", "-d", self._loop)
        # Lazily unmounted file systems let go of it a moment later.
        wait_until(
            lambda: not run("losetup", "-j", self._loop).stdout and not self._is_attached(),
            what=f"the end of {self._loop}",
        )

    def _is_attached(self) -> bool:
        return os.path.exists(f"/sys/block/{Path(self._loop).name}/loop/backing_file")


@contextlib.contextmanager
def power_disk(mount_point: Path, *, size_bytes: int) -> Iterator[PowerDisk]:
    """Plugged in."""
    work = mount_point.parents[2].with_name(f"dolmen-power-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        disk = PowerDisk(mount_point, work, size_bytes=size_bytes)
        disk.plug_in()
        try:
            yield disk
        finally:
            disk.unplug()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def skip_without_power_disks() -> None:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=False)
    if os.getuid() != 0 or done.returncode != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root, loop devices and FUSE")


class BootId:
    """The machine's boot id as a cluster started with ``prefix`` sees it: ours to change."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.change()

    def change(self) -> None:
        """Processes that start from now on are on a machine that was booted anew."""
        self._file.write_text(f"{uuid.uuid4()}\n")

    @property
    def prefix(self) -> list[str]:
        """A mount namespace in which our file lies over the kernel's; mounts below a shared directory
        are still seen."""
        script = f'mount --bind "$0" {BOOT_ID_FILE} && exec "$@"'
        unshare = ["unshare", "--mount", "--propagation", "unchanged"]
        return [*unshare, "sh", "-c", script, str(self._file)]


@contextlib.contextmanager
def shared_mounts(directory: Path) -> Iterator[None]:
    """Mounts made below ``directory`` while the block lasts reach other mount namespaces."""
    run("mount", "--bind", directory, directory)
    try:
        run("mount", "--make-shared", directory)
        yield
    finally:
        run("umount", "--lazy", directory)
