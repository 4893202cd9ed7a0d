"""Everybody's NBD clients work on a Dolmen volume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.nbd_clients import ReconnectingClient
from tests.support.processes import accepts, run, running
from tests.system.conftest import VOLUME_BYTES, Volume

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as a volume: data, holes, and odd ends."""
    path = tmp_path_factory.mktemp("image") / "image.raw"
    with path.open("wb") as file:
        file.truncate(VOLUME_BYTES)
        for start_mib in (0, 7, 33):
            file.seek(start_mib * MIB)
            file.write(os.urandom(3 * MIB + 512 * start_mib + 17))
    return path


def content(uri: str) -> bytes:
    with ReconnectingClient(uri) as client:
        return b"".join(client.read(at, 16 * MIB) for at in range(0, VOLUME_BYTES, 16 * MIB))


def test_nbdinfo_shows_what_the_volume_can(shared_volume: Volume) -> None:
    found = json.loads(run("nbdinfo", "--json", shared_volume.uri).stdout)
    (export,) = found["exports"]
    assert export["export-size"] == VOLUME_BYTES
    assert export["is_read_only"] is False
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{ability}"] is True, ability
    assert export["contexts"] == ["base:allocation"]
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [512, 4096, 32 * MIB]
    listed = json.loads(run("nbdinfo", "--json", "--list", shared_volume.uri).stdout)
    assert [export["export-name"] for export in listed["exports"]] == [shared_volume.name]


def test_nbdinfo_maps_what_was_written(volume: Volume) -> None:
    with ReconnectingClient(volume.uri) as client:
        client.write(MIB, b"x" * 65536)
    runs = json.loads(run("nbdinfo", "--json", "--map", volume.uri).stdout)
    assert [(r["offset"], r["length"], r["type"]) for r in runs] == [
        (0, MIB, 3),
        (MIB, 65536, 0),
        (MIB + 65536, VOLUME_BYTES - MIB - 65536, 3),
    ]


def nbdcopy(image: Path, uri: str) -> None:
    run("nbdcopy", "--connections=4", "--flush", image, uri)


def qemu_img_convert(image: Path, uri: str) -> None:
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, uri)


def nbdsh(image: Path, uri: str) -> None:
    script = (
        "h.set_strict_mode(0)\n"  # libnbd itself would refuse what is below the advertised minimum
        f"h.connect_uri({uri!r})\n"
        f"data = open({str(image)!r}, 'rb').read()\n"
        "step = 1000000\n"  # nothing is aligned
        "for at in range(0, len(data), step):\n"
        "    h.pwrite(data[at:at + step], at)\n"
        "h.flush()\n"
    )
    run("/usr/bin/python3", "-m", "nbd", "-c", script)


@pytest.mark.parametrize("copy", [nbdcopy, qemu_img_convert, nbdsh])
def test_a_copied_image_reads_back_the_same(
    volume: Volume, image: Path, copy: Callable[[Path, str], None], tmp_path: Path
) -> None:
    copy(image, volume.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, volume.uri)
    assert content(volume.uri) == image.read_bytes()
    back = tmp_path / "back.raw"
    run("nbdcopy", "--connections=4", volume.uri, back)
    assert back.read_bytes() == image.read_bytes()
    volume.dolmen.verify(volume.name)


def test_qemu_io_does_every_kind_of_request(shared_volume: Volume) -> None:
    commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 4k 4k",  # FUA
        "write -z 64k 64k",
        "write -z -u 256k 64k",  # may unmap
        "discard 512k 64k",
        "write -P 0x33 1049088 512",
        "flush",
        "read -P 0x11 0 4k",
        "read -P 0x22 4k 4k",
        "read -P 0x00 64k 64k",
        "read -P 0x00 256k 64k",
        "read -P 0x33 1049088 512",
        "aio_write -P 0x44 2M 1M",
        "aio_read 0 1M",
        "aio_flush",
        "read -P 0x44 2M 1M",
    ]
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "raw", *words, shared_volume.uri)
    assert "failed" not in done.stdout.lower(), done.stdout


def test_qemu_nbd_serves_the_volume_on(shared_volume: Volume, tmp_path: Path) -> None:
    # QEMU's NBD client, with its reconnect logic, behind QEMU's own server.
    path = tmp_path / "again.sock"
    command = ["qemu-nbd", "-t", "-e", "4", "-f", "raw", "-k", str(path), shared_volume.uri]
    with running(command, log=tmp_path / "qemu-nbd.log", ready=lambda: accepts(path)):
        with ReconnectingClient(f"nbd+unix:///?socket={path}") as client:
            client.write(5 * MIB + 512, b"through two servers")
            client.flush()
    with ReconnectingClient(shared_volume.uri) as client:
        assert client.read(5 * MIB + 512, 19) == b"through two servers"


@pytest.mark.parametrize(
    "options",
    [
        ("--rw=randwrite", "--bs=4k", "--iodepth=32"),
        ("--rw=randrw", "--bs=512", "--iodepth=16"),
        ("--rw=write", "--bs=1M", "--iodepth=8"),
        ("--rw=randwrite", "--bsrange=512-64k", "--iodepth=8", "--fsync=16"),
        ("--rw=randtrim", "--bs=64k", "--iodepth=8"),
    ],
)
def test_fio_verifies_what_it_wrote(shared_volume: Volume, options: tuple[str, ...], tmp_path: Path) -> None:
    verify = () if "--rw=randtrim" in options else ("--verify=crc32c", "--verify_fatal=1")
    done = run(
        *("fio", "--name=job", "--ioengine=nbd", f"--uri={shared_volume.uri}", "--size=16M", "--io_size=8M"),
        *("--randseed=7", f"--directory={tmp_path}", "--output-format=json", *options, *verify),
        env={"TMPDIR": str(tmp_path)},
    )
    start = done.stdout.index("{")
    (job,) = json.loads(done.stdout[start:])["jobs"]
    assert job["error"] == 0


def test_the_volume_is_served_over_tcp_too(dolmen: Cluster, image: Path) -> None:
    dolmen.create("over-tcp", size=str(VOLUME_BYTES))
    uri = dolmen.attach_tcp("over-tcp")
    assert uri.startswith("nbd://127.0.0.1:")
    nbdcopy(image, uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)
    dolmen.remove("over-tcp")
