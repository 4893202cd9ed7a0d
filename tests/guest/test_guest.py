"""The guest builder itself, over QEMU's own NBD server: what a guest does reaches the image."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.boot import Disk, GuestTimeout, Network, booting, booting_from, run_guest
from tests.guest.bootable import build_guest
from tests.guest.initramfs import Archive
from tests.guest.programs import nbd_client
from tests.support.processes import Started, accepts, running

MIB = 1024 * 1024


@contextlib.contextmanager
def qemu_nbd(image: Path, path: Path) -> Iterator[Started]:
    path.unlink(missing_ok=True)
    command = ["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-x", "disk", "-k", str(path), str(image)]
    with running(command, log=path.with_suffix(".log"), ready=lambda: accepts(path)) as started:
        yield started


def test_the_archive_is_one_that_cpio_reads() -> None:
    archive = Archive()
    archive.directory("bin")
    archive.file("bin/tool", b"#!/bin/sh\n", mode=0o755)
    archive.file("odd", b"x" * 4097)
    listed = subprocess.run(
        ["cpio", "-tv", "--quiet"], input=archive.close(), capture_output=True, check=True, timeout=10
    )
    lines = listed.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--"]
    assert [line.split()[-1] for line in lines] == ["bin", "bin/tool", "odd"]


@pytest.mark.guest
def test_what_a_guest_writes_and_syncs_is_in_the_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(32 * MIB))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image), "24M"], check=True, timeout=60)
    script = """
        set -e
        mount -t ext4 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null
        sync
        before=$(md5sum </mnt/file)
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        mount -t ext4 -o ro /dev/vda /mnt
        [ "$before" = "$(md5sum </mnt/file)" ]
        umount /mnt
        printf 'written by the guest' | dd of=/dev/vda bs=1 seek=33550336 conv=notrunc,fsync 2>/dev/null
        echo all good
    """
    with qemu_nbd(image, tmp_path / "nbd.sock"):
        uri = f"nbd+unix:///disk?socket={tmp_path}/nbd.sock"
        result = run_guest(disks=[uri], script=script)
    assert result.exit_code == 0, result.console
    assert result.output.splitlines()[-1] == "all good"
    assert image.read_bytes()[33550336:][:20] == b"written by the guest"


@pytest.mark.guest
def test_a_guest_boots_from_its_own_disk_and_finds_what_it_wrote(tmp_path: Path) -> None:
    image = tmp_path / "boot.raw"
    script = "grep ' / ' /proc/mounts; echo booted >>/data/boots; sync; wc -l </data/boots"
    build_guest(image, script=script)
    with qemu_nbd(image, tmp_path / "nbd.sock"):
        for boots in (1, 2):
            with booting_from(f"nbd+unix:///disk?socket={tmp_path}/nbd.sock") as guest:
                result = guest.result()
            assert result.exit_code == 0, result.console
            mounted, counted = result.output.splitlines()
            assert mounted.startswith("/dev/vda1 / ext4 rw")
            assert counted == str(boots)
    check = subprocess.run(
        ["e2fsck", "-fn", f"{image}?offset={MIB}"], capture_output=True, timeout=60, check=False
    )
    assert check.returncode == 0, check.stdout


@pytest.mark.guest
def test_a_script_that_fails_says_how(tmp_path: Path) -> None:
    result = run_guest(disks=[], script="echo about to fail; exit 7")
    assert (result.exit_code, result.output) == (7, "about to fail\n")


@pytest.mark.guest
def test_a_guest_that_panics_has_no_exit_code() -> None:
    result = run_guest(disks=[], script="echo c >/proc/sysrq-trigger; sleep 60")
    assert result.exit_code is None
    assert "sysrq triggered crash" in result.console


@pytest.mark.guest
def test_a_guest_that_never_ends_is_ended() -> None:
    with booting(disks=[], script="echo waiting; read never </dev/ttyS0") as guest:
        guest.wait_for("waiting")
        with pytest.raises(GuestTimeout, match="waiting"):
            guest.result(timeout_s=0.1)


@pytest.mark.guest
def test_a_guest_waits_for_an_nbd_server_that_restarts(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(8 * MIB))
    path = tmp_path / "nbd.sock"
    script = """
        set -e
        for i in $(seq 0 99); do
            printf "block %04d" $i | dd of=/dev/vda bs=4096 seek=$i conv=notrunc,fsync 2>/dev/null
            [ $i = 20 ] && echo "twenty done"
        done
        echo all done
    """
    with contextlib.ExitStack() as processes:
        server = processes.enter_context(qemu_nbd(image, path))
        disk = Disk(f"nbd+unix:///disk?socket={path}", reconnect_delay_s=30)
        guest = processes.enter_context(booting(disks=[disk], script=script))
        guest.wait_for("twenty done")
        server.kill()
        processes.enter_context(qemu_nbd(image, path))
        result = guest.result()
        assert result.exit_code == 0, result.console
    raw = image.read_bytes()
    assert [raw[i * 4096 :][:10] for i in range(100)] == [b"block %04d" % i for i in range(100)]


@pytest.mark.guest
def test_a_program_of_a_package_runs_in_the_guest_and_reaches_the_host(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(8 * MIB))
    script = """
        set -e
        ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0
        nbd-client 10.0.2.2 PORT /dev/nbd0 -N disk
        echo "size $(blockdev --getsize64 /dev/nbd0)"
        printf 'by the kernel' | dd of=/dev/nbd0 bs=4096 seek=3 conv=notrunc,fsync 2>/dev/null
        nbd-client -d /dev/nbd0
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-b", "127.0.0.1", "-p", str(port), str(image)]
    with running(command, log=tmp_path / "qemu-nbd.log"):
        result = run_guest(
            disks=[], script=script.replace("PORT", str(port)), files=nbd_client(), network=Network.HOST
        )
    assert result.exit_code == 0, result.console
    assert f"size {8 * MIB}" in result.output
    assert image.read_bytes()[3 * 4096 :][:13] == b"by the kernel"
