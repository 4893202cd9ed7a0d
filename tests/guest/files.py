"""Files that a guest writes and syncs on kernel NBD, and the look at them afterwards, after any end.

Owns the guest's script, the nbdkit that stands between guest and volume, and what a file must hold. Does
not own the volume or what is done to it meanwhile. The kernel's client gives up when its server goes away
(nbd-client cannot ask it not to), so the guest talks to nbdkit with our plugin, which waits for the next
engine.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest.boot import Guest, Network, booting
from tests.guest.programs import nbd_client
from tests.support.processes import kill, run, running

PLUGIN = Path(__file__).parents[2] / "engine" / "nbdkit_plugin.py"
FILE_BYTES = 48 * 1024

# Each number goes into the file of its slot, over what an earlier one wrote there.
SCRIPT = """
set -e
ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0
nbd-client 10.0.2.2 PORT /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
i=0
while [ $i -lt COUNT ]; do
    i=$((i + 1))
    yes "file $i" | dd of=/mnt/file-$((i % SLOTS)) bs=BYTES count=1 iflag=fullblock conv=fsync 2>/dev/null
    echo "synced $i."
done
if dmesg | grep -iE 'i/o error|other side|block nbd0|ext4-fs error|remounting'; then exit 9; fi
echo "no errors"
while true; do yes "never synced" | head -c BYTES >/mnt/loose; done
"""


def content(number: int) -> bytes:
    line = f"file {number}\n".encode()
    return (line * (FILE_BYTES // len(line) + 1))[:FILE_BYTES]


@dataclass(frozen=True, slots=True)
class FileWriter:
    """A guest at work on a volume of which it made nothing but files."""

    guest: Guest
    uri: str
    image: Path
    slots: int

    def synced_count(self) -> int:
        numbers = [int(number) for number in re.findall(r"synced (\d+)\.", self.guest.console)]
        assert numbers == list(range(1, len(numbers) + 1))
        return len(numbers)

    def kill(self) -> int:
        """The guest's end, as a loss of its power is one; how many files it had synced."""
        kill(self.guest.pid)
        self.guest.wait_for_end()
        return self.synced_count()

    def check(self, synced_count: int) -> None:
        """On a copy: the journal is recovered as at the next boot, then everything is looked at."""
        run("nbdcopy", self.uri, self.image)
        recovered = _output("e2fsck", "-fp", str(self.image), codes=(0, 1))
        assert b"UNEXPECTED" not in recovered, recovered
        _output("e2fsck", "-fn", str(self.image), codes=(0,))
        newest = {number % self.slots: number for number in range(1, synced_count + 1)}
        newest.pop((synced_count + 1) % self.slots, None)  # it was being written over
        for slot, number in newest.items():
            found = _output("debugfs", "-R", f"cat /file-{slot}", str(self.image), codes=(0,))
            assert found == content(number), (
                f"file {number} in slot {slot}: {found[:40]!r}, {len(found)} bytes"
            )


def _output(*command: str, codes: tuple[int, ...]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode in codes, (command, done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@contextlib.contextmanager
def writing_files(
    *, uri: str, volume: str, dolmen_dir: Path, size_bytes: int, work: Path, count: int, slots: int
) -> Iterator[FileWriter]:
    """A guest that writes ``count`` files on the volume, which gets a new file system first."""
    image = work / "image"
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    run("nbdcopy", image, uri)
    image.unlink()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = SCRIPT
    for word, value in (("PORT", port), ("COUNT", count), ("SLOTS", slots), ("BYTES", FILE_BYTES)):
        script = script.replace(word, str(value))
    plugin = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "python", str(PLUGIN)]
    plugin += [f"volume={volume}", f"dir={dolmen_dir}"]
    with (
        running(plugin, log=work / "nbdkit.log"),
        booting(disks=[], script=script, files=nbd_client(), network=Network.HOST) as guest,
    ):
        yield FileWriter(guest, uri, image, slots)
