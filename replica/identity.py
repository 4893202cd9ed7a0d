"""Which file a file is: what a copy of it, put in its place, cannot have.

Owns the value, how it is asked of the kernel, and when two of them are two files. Does not own what follows
from it (``metadata.py``, ``epoch.py``).

A file is told from every other by its file system's type, its inode number, and the file handle: the inode's
generation, and on btrfs the subvolume. Where the file system gives no handle (overlayfs), by the time of its
birth, which no program can set. A rename, a remount, a reboot and another mount point change none of these. A
copy (cp, rsync, tar), another file system and a btrfs snapshot do.

Promises: never a false alarm. What is not known on both sides is not compared, and a file system that may
number its files anew at each mount (FUSE, network file systems, whatever is not in _LASTING) is unknown.
Does not see: a whole file system put back block by block, where all of it is as it was.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

HANDLE_BYTES_MAX = 128
"""MAX_HANDLE_SZ of the kernel. The ones in use have 8 to 20 bytes."""

_LASTING = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs: as long as it is mounted, like its files
        0x794C7630,  # overlayfs
    }
)
"""Types of file systems whose inode numbers, handles and birth times last as long as the file: each was tried
over remounts. Of others only the type counts."""

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_STATFS_BYTES = 256


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """One file, as far as its file system says. Zero and empty stand for "not known"."""

    fs_type: int  # statfs f_type
    inode: int = 0
    handle_type: int = 0
    handle: bytes = b""
    birth_ns: int = 0

    def __post_init__(self) -> None:
        assert len(self.handle) <= HANDLE_BYTES_MAX

    def to_wire(self) -> list[Any]:
        return [self.fs_type, self.inode, self.handle_type, self.handle, self.birth_ns]


def parse_identity(wire: object) -> FileIdentity | None:
    """None for an empty list, which says that nothing was known. Raises ValueError."""
    match wire:
        case []:
            return None
        case [int(fs_type), int(inode), int(handle_type), bytes(handle), int(birth_ns)] if (
            len(handle) <= HANDLE_BYTES_MAX
        ):
            return FileIdentity(fs_type, inode, handle_type, handle, birth_ns)
        case _:
            raise ValueError("not a file's identity")


def is_another(recorded: FileIdentity | None, found: FileIdentity | None) -> bool:
    """Whether ``found`` is certainly not the file of which ``recorded`` was noted."""
    if recorded is None or found is None:
        return False
    if recorded.fs_type != found.fs_type:
        return True
    if recorded.inode and found.inode and recorded.inode != found.inode:
        return True
    # The form of a handle may change with a mount option (xfs: inode32). Then it says nothing.
    comparable = recorded.handle and found.handle and recorded.handle_type == found.handle_type
    if comparable and recorded.handle != found.handle:
        return True
    return bool(recorded.birth_ns and found.birth_ns) and recorded.birth_ns != found.birth_ns


def identify_path(path: str) -> FileIdentity | None:
    """Of the file at ``path``, not through a link; None if there is none. Blocking. Raises OSError."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return identify(fd)
    finally:
        os.close(fd)


def identify(fd: int) -> FileIdentity | None:
    """Of an open file; None where the kernel or the C library does not even tell the file system's type.
    Blocking, never raises: not to know is an answer."""
    fs_type = _fs_type(fd)
    if fs_type is None:
        return None
    if fs_type not in _LASTING:
        return FileIdentity(fs_type)
    handle_type, handle = _handle(fd)
    return FileIdentity(fs_type, os.fstat(fd).st_ino, handle_type, handle, _birth_ns(fd))


# -- the kernel's answers. ctypes, because Python has none of the three calls.


class _FileHandle(ctypes.Structure):
    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * HANDLE_BYTES_MAX),
    ]


def _libc_call(name: str, *args: Any) -> bool:
    """Whether the C library has the call and the call worked."""
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    return call is not None and call(*args) == 0


def _fs_type(fd: int) -> int | None:
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if not _libc_call("fstatfs", fd, found):
        return None
    return ctypes.c_ulong.from_buffer(found).value & 0xFFFFFFFF  # the first field; 32 bits count


def _handle(fd: int) -> tuple[int, bytes]:
    found, mount_id = _FileHandle(handle_bytes=HANDLE_BYTES_MAX), ctypes.c_int()
    if not _libc_call(
        "name_to_handle_at", fd, b"", ctypes.byref(found), ctypes.byref(mount_id), _AT_EMPTY_PATH
    ):
        return 0, b""  # not supported by the file system, or not allowed in this container
    return int(found.handle_type), bytes(found.f_handle[: found.handle_bytes])


def _birth_ns(fd: int) -> int:
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if not _libc_call("statx", fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, found):
        return 0
    # struct statx: u32 mask at 0; the birth time at 80: i64 seconds, u32 nanoseconds.
    if not ctypes.c_uint32.from_buffer(found, 0).value & _STATX_BTIME:
        return 0
    seconds = ctypes.c_int64.from_buffer(found, 80).value
    return seconds * 1_000_000_000 + ctypes.c_uint32.from_buffer(found, 88).value
