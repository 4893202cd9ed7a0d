"""What the guest takes from Debian's packages without installing them on the host: its kernel.

Owns ``.cache/guest/``: one directory per thing, made once, whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE_DIR = Path(__file__).parents[2] / ".cache" / "guest"
META_PACKAGE = "linux-image-cloud-amd64"
APT_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Kernel:
    """``image`` for the boot loader; ``modules`` below ``lib/modules/<version>`` with modules.dep."""

    version: str
    image: Path
    modules_dir: Path

    def module_files(self, names: tuple[str, ...]) -> list[Path]:
        """These modules and what they need, in the order in which they must be loaded. Names that
        are built into the kernel are left out."""
        builtin = {Path(line).stem for line in self._lines("modules.builtin")}
        needs: dict[str, tuple[Path, list[str]]] = {}
        for line in self._lines("modules.dep"):
            path, _, rest = line.partition(":")
            needs[_module_name(path)] = (self.modules_dir / path, [_module_name(p) for p in rest.split()])
        ordered: list[Path] = []

        def add(name: str) -> None:
            path, wanted = needs[name]
            for other in wanted:
                add(other)
            if path not in ordered:
                ordered.append(path)

        for name in names:
            if name not in builtin:
                add(name)
        return ordered

    def _lines(self, name: str) -> list[str]:
        return (self.modules_dir / name).read_text().splitlines()


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def get_kernel() -> Kernel:
    """The newest cached kernel; downloads one the first time. Safe to call from several processes."""
    with _lock():
        found = _cached()
        if found is None:
            _download_kernel()
            found = _cached()
    assert found is not None
    return found


def get_packages(name: str, packages: tuple[str, ...]) -> Path:
    """The unpacked content of Debian packages, cached under ``name``."""
    target = CACHE_DIR / name
    with _lock():
        if not target.exists():
            with _unpacked(packages) as root:
                root.rename(target)
    return target


@contextmanager
def _lock() -> Iterator[None]:
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    fd = os.open(CACHE_DIR / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _cached() -> Kernel | None:
    for directory in sorted(CACHE_DIR.glob("kernel-*"), reverse=True):
        version = directory.name.removeprefix("kernel-")
        return Kernel(version, directory / "vmlinuz", directory / "lib/modules" / version)
    return None


@contextmanager
def _unpacked(packages: tuple[str, ...]) -> Iterator[Path]:
    """A directory with the packages' files, to be renamed into place or thrown away."""
    work = Path(tempfile.mkdtemp(dir=CACHE_DIR, prefix="download-"))
    try:
        root = work / "root"
        _apt("apt-get", "download", "-qq", *packages, cwd=work)
        for deb in work.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", deb, root], check=True, timeout=APT_TIMEOUT_S)
        yield root
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_kernel() -> None:
    with _unpacked((_kernel_package(),)) as root:
        (image,) = (root / "boot").glob("vmlinuz-*")
        version = image.name.removeprefix("vmlinuz-")
        # The package leaves the table of dependencies to the machine that installs it.
        subprocess.run(["/sbin/depmod", "-b", root, version], check=True, timeout=APT_TIMEOUT_S)
        image.rename(root / "vmlinuz")
        for unused in ("boot", "usr", "etc"):
            shutil.rmtree(root / unused, ignore_errors=True)
        root.rename(CACHE_DIR / f"kernel-{version}")


def _kernel_package() -> str:
    """The package with the kernel itself: what Debian's meta package depends on."""
    for attempt in ("as it is", "after an update"):
        listed = _apt("apt-cache", "depends", META_PACKAGE, check=False)
        found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)$", listed, re.MULTILINE)
        if found:
            return found[1]
        if attempt == "as it is":
            _apt("apt-get", "update", "-qq")
    raise RuntimeError(f"apt knows no {META_PACKAGE}: {listed}")


def _apt(*command: str, cwd: Path | None = None, check: bool = True) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=APT_TIMEOUT_S,
        check=False,
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}")
    return done.stdout
