"""Picks real files of this machine and makes an ext4 image of them: the demo's input.

Owns the choice (the same on every run of the same machine) and the image. Reads the system's
directories, writes only below the directory it is given.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import BadRequest

TREE_BYTES_MIN = 512 * 1024 * 1024
"""Of file contents. Enough that a copy takes seconds and a resync has something to do."""

SMALL_FILES_MAX = 3000
SMALL_FILE_BYTES = 64 * 1024
"""After that many files, only larger ones: making the image costs per file, and an hour of waiting
for 50,000 icons shows nothing."""

IMAGE_OVERHEAD = 1.12
"""Inode tables, directories, partly filled blocks and the journal, on top of the contents."""

MIB = 1024 * 1024


def roots() -> list[Path]:
    """Where every Linux machine has files that anybody may read, largest files first."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    return [
        Path(p) for p in (f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/lib", "/usr/bin", "/usr/share", "/opt")
    ]


@dataclass(slots=True)
class Tree:
    path: Path
    file_count: int = 0
    bytes: int = 0
    sources: tuple[str, ...] = ()


def copy_tree(target: Path) -> Tree:
    """Copy files, links and directories until there are TREE_BYTES_MIN. Raises BadRequest when the
    machine has less."""
    tree = Tree(target)
    for root in roots():
        if not root.is_dir() or root.is_symlink():
            continue
        before = tree.bytes
        for source in _files(root):
            _copy(source, target / source.relative_to("/"), tree)
            if tree.bytes >= TREE_BYTES_MIN:
                break
        if tree.bytes > before:
            tree.sources += (str(root),)
        if tree.bytes >= TREE_BYTES_MIN:
            return tree
    raise BadRequest(
        reason=f"this machine has only {tree.bytes // MIB} MiB of files under "
        f"{', '.join(map(str, roots()))}. The demo needs {TREE_BYTES_MIN // MIB} MiB."
    )


def _files(root: Path) -> Iterator[Path]:
    """Files and links, in an order that does not depend on the file system."""
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            yield Path(directory, name)


def _copy(source: Path, target: Path, tree: Tree) -> None:
    try:
        found = source.lstat()
        if tree.file_count >= SMALL_FILES_MAX and found.st_size < SMALL_FILE_BYTES:
            return
        if target.is_symlink() or target.exists():
            return  # a root inside a root
        if stat.S_ISLNK(found.st_mode):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source))
        elif stat.S_ISREG(found.st_mode):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            tree.bytes += found.st_size
        else:
            return
    except PermissionError:
        return  # not ours to read
    tree.file_count += 1


def make_image(tree: Tree, image: Path, mke2fs: str) -> int:
    """An ext4 file system of the tree, in a raw file. Returns the file's size in bytes."""
    mib = int(tree.bytes * IMAGE_OVERHEAD) // MIB + 64
    mib += -mib % 4
    command = [
        mke2fs,
        "-q",
        "-F",
        "-t",
        "ext4",
        "-L",
        "dolmen-demo",
        "-d",
        str(tree.path),
        str(image),
        f"{mib}M",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BadRequest(reason=f"mke2fs failed: {done.stderr.strip()[:300]}")
    return image.stat().st_size
