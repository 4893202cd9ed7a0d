"""The guest's first file system: busybox, the drivers that its disks need, and one script.

An initramfs is an archive in the ``newc`` format of cpio. The kernel unpacks several that follow
each other, so the part that never changes is made once and a run adds its script at the end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from tests.guest.kernel import CACHE_DIR, Kernel

BUSYBOX = Path("/bin/busybox")
MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "ext4", "nbd")

BEGIN_MARK = "=== guest script begins"
END_MARK = "=== guest script ended"

INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /newroot
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
for module in $(cat /modules.list); do insmod /modules/$module || echo "cannot load $module"; done
root=$(sed -n 's/.*guest.root=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
if [ -n "$root" ]; then
    mount -t ext4 $root /newroot || poweroff -f
    for fs in proc sys dev; do mount --move /$fs /newroot/$fs; done
    exec switch_root /newroot /sbin/guest-main
fi
exec /sbin/guest-main
"""

# Runs the script as a child, so that whatever it does the guest still says how it ended and goes off.
GUEST_MAIN = f"""#!/bin/busybox sh
export PATH=/bin:/sbin HOME=/tmp
echo "{BEGIN_MARK}"
/bin/busybox sh /payload.sh </dev/null 2>&1
code=$?
cd /
mount -o remount,ro / 2>/dev/null
echo "{END_MARK} $code"
poweroff -f
"""


class Archive:
    """Collects files and gives the bytes of a newc archive. Owners are root, times are zero: equal
    content gives equal bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def console(self) -> None:
        """/dev/console, which init needs before devtmpfs is there."""
        self._add("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))

    def close(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, content: bytes, *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(raw), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts.append(_padded(header + raw) + _padded(content))


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 4)


def base_archive(kernel: Kernel) -> Path:
    """Everything but the script; cached beside the kernel."""
    modules = kernel.module_files(MODULES)
    archive = Archive()
    for name in ("bin", "sbin", "dev", "modules"):
        archive.directory(name)
    archive.console()
    archive.file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for module in modules:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules.list", "".join(f"{module.name}\n" for module in modules).encode())
    archive.file("init", INIT.encode(), mode=0o755)
    archive.file("sbin/guest-main", GUEST_MAIN.encode(), mode=0o755)
    return _write_once(CACHE_DIR / f"initramfs-{kernel.version}.cpio", archive.close())


def script_archive(script: str, files: Mapping[str, bytes] | None = None) -> bytes:
    """The script, and more files that it wants, all executable; by their paths in the guest."""
    archive = Archive()
    archive.file("payload.sh", script.encode(), mode=0o755)
    directories: set[str] = set()
    for path, content in (files or {}).items():
        for parent in reversed(Path(path.lstrip("/")).parents[:-1]):
            if str(parent) not in directories:
                directories.add(str(parent))
                archive.directory(str(parent))
        archive.file(path.lstrip("/"), content, mode=0o755)
    return archive.close()


def _write_once(path: Path, content: bytes) -> Path:
    """Replace only what differs, and never show half a file to another test process."""
    if not path.exists() or path.read_bytes() != content:
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.rename(path)
    return path
