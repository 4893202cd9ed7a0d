"""A disk image that boots by itself: boot sector, GRUB, kernel, initramfs and root file system.

::

    sector 0            MBR: GRUB's boot code, and a table with one Linux partition
    sector 1 to 2047    GRUB's core image, which reads ext4 and /boot/grub.cfg
    1 MiB to the end    ext4: /boot (grub.cfg, vmlinuz, initramfs), busybox, /payload.sh, empty /data

Written to a volume and given to a machine as its only disk, everything the guest runs has come out
of that volume. GRUB's parts come from Debian's grub-pc-bin; no loop device, mount or root is needed.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from tests.guest.boot import KERNEL_ARGUMENTS
from tests.guest.initramfs import BUSYBOX, GUEST_MAIN, base_archive
from tests.guest.kernel import get_kernel

GRUB_DIR = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "normal", "serial", "terminal", "linux", "boot")
SECTOR_BYTES = 512
PARTITION_START_BYTES = 1024 * 1024
LINUX_PARTITION = 0x83
BOOTABLE = 0x80

GRUB_CONFIG = f"""serial --unit=0
terminal_output serial
linux (hd0,msdos1)/boot/vmlinuz {KERNEL_ARGUMENTS} guest.root=/dev/vda1
initrd (hd0,msdos1)/boot/initramfs
boot
"""


def build_guest(image: Path, *, script: str, size_bytes: int = 128 * 1024 * 1024) -> None:
    """Write a sparse raw image to ``image``. At each boot it runs ``script`` with its own root file
    system writable, and powers off."""
    with tempfile.TemporaryDirectory(prefix="dolmen-guest-") as name:
        work = Path(name)
        core = _grub_core(work)
        tree = _root_tree(work, script)
        with image.open("wb") as file:
            file.truncate(size_bytes)
            file.write(_boot_sector(size_bytes))
            file.seek(SECTOR_BYTES)
            file.write(core)
        subprocess.run(
            [
                *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "guest", "-d", tree),
                *("-E", f"offset={PARTITION_START_BYTES},root_owner=0:0"),
                # What GRUB 2.06 can read.
                *("-O", "^metadata_csum_seed,^orphan_file"),
                *(image, f"{(size_bytes - PARTITION_START_BYTES) // 1024}k"),
            ],
            check=True,
            timeout=60,
        )


def _root_tree(work: Path, script: str) -> Path:
    kernel = get_kernel()
    tree = work / "root"
    for name in ("bin", "sbin", "boot", "proc", "sys", "dev", "tmp", "mnt", "data"):
        (tree / name).mkdir(parents=True)
    (tree / "boot/grub.cfg").write_text(GRUB_CONFIG)
    shutil.copy(kernel.image, tree / "boot/vmlinuz")
    shutil.copy(base_archive(kernel), tree / "boot/initramfs")
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True, timeout=10)
    for applet in set(applets.stdout.split()) - {"busybox"}:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "payload.sh").write_text(script)
    main = tree / "sbin/guest-main"
    main.write_text(GUEST_MAIN)
    main.chmod(0o755)
    return tree


def _grub_core(work: Path) -> bytes:
    """GRUB's second stage, with the modules that it needs to read the rest."""
    core = work / "core.img"
    subprocess.run(
        ["grub-mkimage", "-O", "i386-pc", "-o", core, "-p", "(hd0,msdos1)/boot", *GRUB_MODULES],
        check=True,
        timeout=60,
    )
    raw = core.read_bytes()
    assert len(raw) <= PARTITION_START_BYTES - SECTOR_BYTES, "GRUB's core does not fit before the partition"
    return raw


def _boot_sector(size_bytes: int) -> bytes:
    """GRUB's boot code as shipped expects its core at sector 1; only the partition table is added,
    over code for floppies."""
    sector = bytearray((GRUB_DIR / "boot.img").read_bytes())
    assert len(sector) == SECTOR_BYTES
    start = PARTITION_START_BYTES // SECTOR_BYTES
    count = size_bytes // SECTOR_BYTES - start
    # Status, then (cylinder, head, sector) that nobody uses, type, the same, first sector, count.
    entry = struct.pack(
        "<B3sB3sII", BOOTABLE, b"\xfe\xff\xff", LINUX_PARTITION, b"\xfe\xff\xff", start, count
    )
    sector[446:510] = entry.ljust(4 * 16, b"\0")
    sector[510:512] = b"\x55\xaa"
    return bytes(sector)
