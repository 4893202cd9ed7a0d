"""replica.meta: its bytes, and what a crash or a power loss after each step of a write leaves."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ReplicaDamaged
from protocol.membership import MembershipRecord
from replica import metadata
from replica.checksum import xxh3_64
from replica.identity import FileIdentity, identify_path
from replica.metadata import (
    FILE_NAME,
    FORMAT_VERSION,
    HEADER,
    LAYERS_MAX,
    MAGIC,
    TMP_NAME,
    TRAILER,
    ReplicaMeta,
    decode_meta,
    encode_meta,
    read_meta,
    write_meta,
)

OLD = ReplicaMeta(
    volume_id="0b7c1f",
    replica_id="data-1",
    name="data",
    size_bytes=64 * 2**20,
    chain=("layer-1",),
    epoch=3,
    claimed_by="node1/3",
    record=MembershipRecord(3, 2, frozenset({"data-1", "data-2"})),
    synced_at=(3, 2),
    last_boot_id="boot",
    clean=False,
    suspect=False,
    opens=7,
    files=(None, None, None),
)
NEW = replace(OLD, epoch=4, claimed_by="node2/4")


def decode(data: bytes) -> ReplicaMeta:
    return decode_meta(data, path="/d")[0]


def encode(meta: ReplicaMeta) -> bytes:
    return encode_meta(meta, identity=FileIdentity(0xEF53, 12, 1, b"handle", 5))


# -- bytes


def test_metadata_survives_the_round_trip(tmp_path: Path) -> None:
    write_meta(str(tmp_path), OLD)
    assert read_meta(str(tmp_path)) == OLD
    write_meta(str(tmp_path), NEW)
    assert read_meta(str(tmp_path)) == NEW


def test_the_byte_table_is_true() -> None:
    data = encode(OLD)
    assert data[:8] == b"DLMNMETA"
    assert int.from_bytes(data[8:10], "little") == 2
    assert data[10:12] == b"\0\0"
    body_bytes = int.from_bytes(data[12:16], "little")
    assert len(data) == 16 + body_bytes + 8
    assert set(msgpack.unpackb(data[16:-8])) == {*ReplicaMeta.__dataclass_fields__, "identity"}
    assert int.from_bytes(data[-8:], "little") == xxh3_64(data[:-8])


def test_the_longest_chain_still_fits() -> None:
    names = tuple(f"layer-{number:074d}" for number in range(LAYERS_MAX))
    long = replace(OLD, chain=names)
    assert decode(encode(long)) == long


def test_any_flipped_bit_and_any_cut_is_found() -> None:
    data = encode(OLD)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ReplicaDamaged):
            decode(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(ReplicaDamaged):
            decode(data[:length])
    with pytest.raises(ReplicaDamaged):
        decode(data + b"\0")


@given(st.binary(max_size=200))
def test_garbage_is_damage(data: bytes) -> None:
    with pytest.raises(ReplicaDamaged):
        decode(data)


def sealed(body: Any, *, version: int = FORMAT_VERSION) -> bytes:
    packed = msgpack.packb(body)
    data = HEADER.pack(MAGIC, version, 0, len(packed)) + packed
    return data + TRAILER.pack(xxh3_64(data))


GOOD = msgpack.unpackb(encode(OLD)[16:-8])


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        GOOD | {"from_the_future": 1},
        {key: value for key, value in GOOD.items() if key != "epoch"},
        GOOD | {"size_bytes": 4097},
        GOOD | {"size_bytes": -4096},
        GOOD | {"chain": []},
        GOOD | {"chain": ["../../etc"]},
        GOOD | {"chain": [""]},
        GOOD | {"chain": ["a/b"]},
        GOOD | {"chain": [".."]},
        GOOD | {"epoch": 2},  # older than its own record
        GOOD | {"epoch": -1},
        GOOD | {"record": {}},
        GOOD | {"synced_at": [9, 9]},
        GOOD | {"synced_at": 1},
        GOOD | {"clean": 1},
        GOOD | {"name": "x" * 64},
        GOOD | {"volume_id": "x" * 201},
        GOOD | {"opens": -1},
        GOOD | {"restored": 0},
        GOOD | {"identity": [1]},
        GOOD | {"identity": [1, 2, 3, b"x" * 129, 5]},
        GOOD | {"files": [[]]},
        GOOD | {"files": [[], [], ["x"]]},
    ],
)
def test_a_sealed_body_that_makes_no_sense_is_damage(body: Any) -> None:
    with pytest.raises(ReplicaDamaged):
        decode(sealed(body))


def test_a_newer_format_is_refused_by_its_number() -> None:
    with pytest.raises(ReplicaDamaged, match="has format 3, this is 2"):
        decode(sealed(GOOD, version=3))


VERSION_1 = {key: GOOD[key] for key in GOOD.keys() - {"identity", "files", "opens", "restored"}}


def test_version_1_is_read_as_knowing_nothing_of_its_files(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(sealed(VERSION_1, version=1))
    found = read_meta(str(tmp_path))
    assert found == replace(OLD, opens=0)
    write_meta(str(tmp_path), found)
    assert (tmp_path / FILE_NAME).read_bytes()[8:10] == b"\2\0"
    assert read_meta(str(tmp_path)) == found


@pytest.mark.parametrize("body", [VERSION_1, GOOD])
def test_each_version_has_its_own_fields(body: Any) -> None:
    with pytest.raises(ReplicaDamaged):
        decode(sealed(body, version=2 if body is VERSION_1 else 1))


def test_a_missing_file_is_damage_and_a_failing_disk_is_not(tmp_path: Path) -> None:
    with pytest.raises(ReplicaDamaged, match="is missing"):
        read_meta(str(tmp_path))
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(OSError):
        read_meta(str(tmp_path))


# -- the order of writes


class Disk:
    """``os`` as metadata.py sees it: does everything for real, and keeps a record of what it did."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str, bytes]] = []
        self.fail_at: int | None = None
        self.error = errno.EIO
        self.skip: frozenset[str] = frozenset()
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _step(self, name: str, path: str, data: bytes = b"") -> None:
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            raise OSError(self.error, os.strerror(self.error))
        if name not in self.skip:
            self.steps.append((name, os.path.basename(path), data))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self._step("open", path)
        fd = os.open(path, flags, mode)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: bytes) -> int:
        half = data[: max(1, len(data) // 2)]  # short writes are legal
        self._step("write", self._paths[fd], half)
        return os.write(fd, half)

    def ftruncate(self, fd: int, length: int) -> None:
        self._step("truncate", self._paths[fd], length.to_bytes(8, "little"))
        os.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        self._step("fsync", self._paths[fd])
        os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        self._step("rename", source)
        os.rename(source, target)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._step("allocate", self._paths[fd], length.to_bytes(8, "little"))
        os.posix_fallocate(fd, offset, length)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(metadata, "os", disk)
    return disk


def steps_of_a_write(disk: Disk, path: Path) -> int:
    """How many steps one write takes, after OLD stands there."""
    write_meta(str(path), OLD)
    disk.steps.clear()
    write_meta(str(path), NEW)
    return len(disk.steps)


def test_the_steps_are_those_of_the_table(disk: Disk, tmp_path: Path) -> None:
    steps_of_a_write(disk, tmp_path)
    names = [name for name, _ in itertools.groupby(name for name, *_ in disk.steps)]
    directory = ["open", "fsync"]
    assert names == ["open", "write", "truncate", "fsync", "rename", *directory, "open", "allocate"]


def test_an_error_or_a_kill_at_any_step_leaves_the_old_or_the_new(disk: Disk, tmp_path: Path) -> None:
    count = steps_of_a_write(disk, tmp_path)
    for fail_at in range(count):
        disk.fail_at = None
        write_meta(str(tmp_path), OLD)
        disk.steps.clear()
        disk.fail_at = fail_at
        try:
            write_meta(str(tmp_path), NEW)
        except OSError:
            legal = {OLD, NEW} if "rename" in [name for name, *_ in disk.steps] else {OLD}
        else:
            legal = {NEW}
        assert read_meta(str(tmp_path)) in legal, f"step {fail_at}"
    disk.fail_at = None
    write_meta(str(tmp_path), NEW)
    assert read_meta(str(tmp_path)) == NEW
    assert set(os.listdir(tmp_path)) == {FILE_NAME, TMP_NAME}


def after_power_loss(steps: list[tuple[str, str, bytes]], old: bytes) -> Iterator[bytes]:
    """Every content ``replica.meta`` may have when the power goes after ``steps``: an unsynced file may be
    anything it has been, torn anywhere; an unsynced rename may have happened or not."""
    content, torn = b"", {b""}
    finals = {old}
    for name, path, data in steps:
        if name == "write" and path == TMP_NAME:
            content += data
            torn |= {content, content[: len(content) // 3], content + b"\0" * 16}
        elif name == "truncate":
            content = content[: int.from_bytes(data, "little")]
            torn.add(content)
        elif name == "fsync" and path == TMP_NAME:
            torn = {content}
        elif name == "rename":
            finals = finals | torn
            content, torn = b"", {b""}
        elif name == "fsync":
            finals = finals - {old} if len(finals) > 1 else finals
    yield from finals


def check_power_loss(disk: Disk, path: Path) -> None:
    write_meta(str(path), OLD)
    old = (path / FILE_NAME).read_bytes()
    count = steps_of_a_write(disk, path)
    for cut in range(count + 1):
        for content in after_power_loss(disk.steps[:cut], old):
            found = decode(content)
            assert found in (OLD, NEW), f"after step {cut}"
            if cut == count:
                assert found == NEW, "answered, and lost"


def test_power_loss_after_any_step_leaves_the_old_or_the_new(disk: Disk, tmp_path: Path) -> None:
    check_power_loss(disk, tmp_path)


def test_the_power_loss_test_notices_a_missing_fsync(disk: Disk, tmp_path: Path) -> None:
    disk.skip = frozenset({"fsync"})
    with pytest.raises((ReplicaDamaged, AssertionError)):
        check_power_loss(disk, tmp_path)


def test_a_write_on_a_full_disk_needs_no_new_block(disk: Disk, tmp_path: Path) -> None:
    write_meta(str(tmp_path), OLD)
    spare = tmp_path / TMP_NAME
    assert spare.stat().st_blocks * 512 >= len(encode(NEW))
    inode = spare.stat().st_ino
    write_meta(str(tmp_path), NEW)
    assert (tmp_path / FILE_NAME).stat().st_ino == inode


def test_a_full_disk_at_the_preallocation_is_no_error(disk: Disk, tmp_path: Path) -> None:
    count = steps_of_a_write(disk, tmp_path)
    write_meta(str(tmp_path), OLD)
    disk.steps.clear()
    disk.fail_at, disk.error = count - 1, errno.ENOSPC
    write_meta(str(tmp_path), NEW)
    assert read_meta(str(tmp_path)) == NEW


def test_junk_in_the_tmp_file_never_shows(tmp_path: Path) -> None:
    (tmp_path / TMP_NAME).write_bytes(b"junk" * 10_000)
    write_meta(str(tmp_path), NEW)
    data = (tmp_path / FILE_NAME).read_bytes()
    assert data == encode_meta(NEW, identity=identify_path(str(tmp_path / FILE_NAME)))


def test_a_link_in_the_place_of_the_tmp_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / TMP_NAME).symlink_to(victim)
    with pytest.raises(OSError):
        write_meta(str(tmp_path), NEW)
    assert victim.read_text() == "mine"
