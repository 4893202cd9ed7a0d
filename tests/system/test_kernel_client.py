"""The Linux kernel's NBD client, inside a guest because this host's kernel may lack it, over TCP."""

from __future__ import annotations

import urllib.parse

import pytest

from tests.guest.boot import Network, run_guest
from tests.guest.programs import nbd_client
from tests.support.cluster import Cluster
from tests.support.nbd_clients import ReconnectingClient

SIZE = 64 * 1024 * 1024
SCRIPT = """
set -e
ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0
nbd-client 10.0.2.2 PORT /dev/nbd0 -N kernel -C 2
[ "$(blockdev --getsize64 /dev/nbd0)" = SIZE ]
mke2fs -q /dev/nbd0
mount -t ext4 -o discard /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=100 2>/dev/null
sync
before=$(md5sum </mnt/file)
dd if=/dev/zero of=/mnt/gone bs=64k count=100 2>/dev/null
rm /mnt/gone
fstrim /mnt
umount /mnt
nbd-client -d /dev/nbd0
nbd-client 10.0.2.2 PORT /dev/nbd0 -N kernel
mount -t ext4 -o ro /dev/nbd0 /mnt
[ "$before" = "$(md5sum </mnt/file)" ]
umount /mnt
nbd-client -d /dev/nbd0
if dmesg | grep -iE 'i/o error|nbd0: other side returned error'; then exit 9; fi
echo all good
"""


@pytest.mark.guest
def test_the_kernels_nbd_client_holds_a_file_system_on_a_volume(dolmen: Cluster) -> None:
    dolmen.create("kernel", size=str(SIZE))
    uri = dolmen.attach_tcp("kernel")
    port = urllib.parse.urlsplit(uri).port
    script = SCRIPT.replace("PORT", str(port)).replace("SIZE", str(SIZE))
    result = run_guest(disks=[], script=script, files=nbd_client(), network=Network.HOST)
    assert result.exit_code == 0, result.console
    assert result.output.splitlines()[-1] == "all good"
    with ReconnectingClient(uri) as client:
        assert client.read(1024 + 56, 2) == b"\x53\xef", "the superblock of the guest's file system"
    dolmen.verify("kernel")
    dolmen.remove("kernel")
