"""A machine boots from a Dolmen volume: firmware, boot loader, kernel and root file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.boot import Disk, booting_from
from tests.guest.bootable import build_guest
from tests.support.cluster import Cluster
from tests.support.processes import run

IMAGE_BYTES = 128 * 1024 * 1024
SCRIPT = """
set -e
echo "this is boot $(($(cat /data/count 2>/dev/null || echo 0) + 1))"
[ ! -f /data/noise ] || md5sum -c /data/sum
echo $(($(cat /data/count 2>/dev/null || echo 0) + 1)) >/data/count
dd if=/dev/urandom of=/data/noise bs=64k count=64 2>/dev/null
md5sum /data/noise >/data/sum
echo "written once"
dd if=/dev/urandom of=/data/more bs=64k count=16 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
md5sum -c /data/sum
if dmesg | grep -i 'i/o error'; then exit 9; fi
"""


@pytest.mark.guest
def test_a_guest_boots_from_its_volume_and_survives_the_loss_of_engine_and_replica(
    dolmen: Cluster, tmp_path: Path
) -> None:
    image = tmp_path / "guest.raw"
    build_guest(image, script=SCRIPT, size_bytes=IMAGE_BYTES)
    uri = dolmen.create_and_attach("machine", size=str(IMAGE_BYTES))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    disk = Disk(uri, reconnect_delay_s=60)
    for boot in (1, 2):
        with booting_from(disk) as guest:
            if boot == 2:
                guest.wait_for("this is boot")
                dolmen.kill_engine("machine")
                guest.wait_for("written once")
                dolmen.kill_replica("machine", sorted(dolmen.replica_pids("machine"))[0])
            result = guest.result()
        assert result.exit_code == 0, result.console
        lines = result.output.splitlines()
        assert lines[0] == f"this is boot {boot}"
        assert lines[-1] == "/data/noise: OK"
    dolmen.wait_for_state("machine", "healthy")
    dolmen.verify("machine")
    back = tmp_path / "back.raw"
    run("nbdcopy", uri, back)
    run("e2fsck", "-fn", f"{back}?offset={1024 * 1024}")
    dolmen.remove("machine")
