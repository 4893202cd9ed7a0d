"""ext4 on the kernel's NBD client, in a guest, while everything beneath it is killed, the guest last."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.guest.boot import Network, booting
from tests.guest.programs import nbd_client
from tests.support.processes import kill, run, running
from tests.system.conftest import Volume

PLUGIN = Path(__file__).parents[2] / "engine" / "nbdkit_plugin.py"

FILE_BYTES = 48 * 1024
STEPS = ("one replica", "engine", "all replicas", "engine and all replicas", "daemon")
FILES_PER_STEP = 8

# The kernel's client gives up when its server goes away (nbd-client cannot ask it not to), so nbdkit with our
# plugin stands between: it waits for the next engine.
SCRIPT = """
set -e
ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0
nbd-client 10.0.2.2 PORT /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
i=0
while [ $i -lt COUNT ]; do
    i=$((i + 1))
    yes "file $i" | dd of=/mnt/file-$i bs=BYTES count=1 iflag=fullblock conv=fsync 2>/dev/null
    echo "synced $i."
done
if dmesg | grep -iE 'i/o error|other side|block nbd0|ext4-fs error|remounting'; then exit 9; fi
echo "no errors"
while true; do yes "never synced" | head -c BYTES >/mnt/loose; done
"""


def content(number: int) -> bytes:
    line = f"file {number}\n".encode()
    return (line * (FILE_BYTES // len(line) + 1))[:FILE_BYTES]


def format_volume(uri: str, image: Path, size_bytes: int) -> None:
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    run("nbdcopy", image, uri)
    image.unlink()


def strike(volume: Volume, what: str) -> None:
    dolmen, name = volume.dolmen, volume.name
    replicas = dolmen.replica_pids(name)
    if what == "daemon":
        dolmen.kill_daemon()
        return
    if what == "one replica":
        dolmen.kill_replica(name, sorted(replicas)[0])
        return
    pids = [dolmen.engine_pid(name)] if what.startswith("engine") else []
    pids += list(replicas.values()) if "replicas" in what else []
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.guest
def test_every_file_that_a_guest_synced_is_there_after_every_kill_beneath_it(
    volume: Volume, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    format_volume(volume.uri, image, 64 * 1024 * 1024)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    count = FILES_PER_STEP * (len(STEPS) + 1)
    script = SCRIPT
    for word, value in (("PORT", port), ("COUNT", count), ("BYTES", FILE_BYTES)):
        script = script.replace(word, str(value))
    plugin = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "python", str(PLUGIN)]
    plugin += [f"volume={volume.name}", f"dir={volume.dolmen.dir}"]
    with (
        running(plugin, log=tmp_path / "nbdkit.log"),
        booting(disks=[], script=script, files=nbd_client(), network=Network.HOST) as guest,
    ):
        for step, what in enumerate(STEPS, 1):
            guest.wait_for(f"synced {step * FILES_PER_STEP}.")
            strike(volume, what)
        volume.dolmen.up()  # the daemon was killed last
        guest.wait_for("no errors")
        kill(guest.pid)
        synced = [int(number) for number in re.findall(r"synced (\d+)\.", guest.console)]
    assert synced == list(range(1, count + 1))
    volume.dolmen.wait_for_state(volume.name, "healthy")
    volume.dolmen.verify(volume.name)
    check_files(volume.uri, image, synced)


def check_files(uri: str, image: Path, synced: list[int]) -> None:
    """On a copy: the journal is recovered as at the next boot, then everything is looked at."""
    run("nbdcopy", uri, image)
    recovered = subprocess.run(["e2fsck", "-fp", image], capture_output=True, text=True, check=False)
    assert recovered.returncode in (0, 1), recovered.stdout + recovered.stderr
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    for number in synced:
        found = subprocess.run(
            ["debugfs", "-R", f"cat /file-{number}", image], capture_output=True, check=False
        )
        assert found.stdout == content(number), f"file {number}: {len(found.stdout)} bytes"
