"""A small Linux guest for tests: Debian's cloud kernel, busybox, one script, a serial console.

``from tests.guest.boot import run_guest`` boots it beside given disks; ``tests.guest.bootable`` makes a
disk image whose firmware, boot loader, kernel and root file system all come from that one disk.
"""
