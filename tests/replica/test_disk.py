"""A disk's directory: whose it is, and how replicas appear in it and leave it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from protocol.errors import DiskError, DiskRefused, NoSpace
from replica.disk import (
    DISK_FILE,
    LOCK_FILE,
    REPLICAS_DIR,
    Disk,
    Listing,
    Verdict,
    is_volume_id,
    judge_directory,
    judge_replicas,
    to_storage_error,
)


def open_disk(path: Path, *, node_id: str = "node1", disk_id: str | None = None) -> Disk:
    return Disk.open(str(path), node_id=node_id, disk_id=disk_id, make_id=lambda: "disk-1")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("names", [[], ["lost+found"], [LOCK_FILE, "disk.json.tmp"]])
def test_an_empty_directory_may_become_ours(names: list[str]) -> None:
    assert judge_directory(names, path="/d") is Verdict.EMPTY


@pytest.mark.parametrize(
    "names", [["photo.jpg"], [REPLICAS_DIR], ["lost+found", ".hidden"], ["disk.json.old"]]
)
def test_a_directory_with_anything_else_is_refused(names: list[str]) -> None:
    with pytest.raises(DiskRefused, match="is not empty"):
        judge_directory(names, path="/d")


def test_a_new_disk_keeps_its_identity(tmp_path: Path) -> None:
    disk = open_disk(tmp_path / "a" / "disk0")
    assert (disk.identity.disk_id, disk.identity.node_id) == ("disk-1", "node1")
    disk.close()
    again = Disk.open(str(tmp_path / "a" / "disk0"), node_id="node1", make_id=lambda: "disk-2")
    assert again.identity.disk_id == "disk-1"
    again.close()


def test_a_foreign_directory_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DiskRefused, match=r"photo\.jpg"):
        open_disk(tmp_path)
    assert contents(tmp_path) == {"photo.jpg": b"mine"}


def test_replicas_without_an_identity_are_not_formatted_over(tmp_path: Path) -> None:
    open_disk(tmp_path).close()
    (tmp_path / DISK_FILE).unlink()
    with pytest.raises(DiskRefused, match="is not empty"):
        open_disk(tmp_path)
    assert not (tmp_path / DISK_FILE).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        '{"format": "other", "version": 1, "disk_id": "d", "node_id": "node1"}',
        '{"format": "dolmen-disk", "version": 2, "disk_id": "d", "node_id": "node1"}',
        '{"format": "dolmen-disk", "version": 1, "disk_id": 7, "node_id": "node1"}',
        '{"format": "dolmen-disk", "version": 1}',
        "[" * 5000,
    ],
)
def test_a_damaged_identity_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / DISK_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(DiskRefused):
        open_disk(tmp_path)
    assert (tmp_path / DISK_FILE).read_text(encoding="latin-1") == text


def test_the_disk_of_another_node_is_refused(tmp_path: Path) -> None:
    open_disk(tmp_path).close()
    with pytest.raises(DiskRefused, match="belongs to node node1, this is node2"):
        open_disk(tmp_path, node_id="node2")


def test_a_missing_mount_is_not_taken_for_an_empty_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskRefused, match="it is empty, expected disk disk-9"):
        open_disk(tmp_path, disk_id="disk-9")
    with pytest.raises(DiskRefused):
        open_disk(tmp_path / "absent", disk_id="disk-9")
    assert not (tmp_path / "absent").exists()
    assert not (tmp_path / DISK_FILE).exists()


def test_another_disk_than_the_expected_is_refused(tmp_path: Path) -> None:
    open_disk(tmp_path).close()
    with pytest.raises(DiskRefused, match="it is disk disk-1, expected disk-9"):
        open_disk(tmp_path, disk_id="disk-9")


def test_a_disk_is_served_once(tmp_path: Path) -> None:
    first = open_disk(tmp_path)
    with pytest.raises(DiskRefused, match="another replica server serves it"):
        open_disk(tmp_path)
    first.close()
    open_disk(tmp_path).close()


@pytest.mark.parametrize("node_id", ["", "../x", "a b", "a\n", ".hidden"])
def test_a_node_id_that_cannot_be_one_is_refused(tmp_path: Path, node_id: str) -> None:
    with pytest.raises(DiskRefused):
        open_disk(tmp_path / "disk", node_id=node_id)
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("text", ["a", "0b7c", "A-b_c", "x" * 128])
def test_volume_ids(text: str) -> None:
    assert is_volume_id(text)


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a/b", "/a", "a.b", "-a", "_a", "a\n", "a\0", "x" * 129, "ä", None, 7, b"a"]
)
def test_a_volume_id_points_nowhere_else(text: object) -> None:
    assert not is_volume_id(text)


def test_names_under_replicas_are_sorted_by_what_to_do_with_them() -> None:
    names = ["v2", "v1", ".new-v3-1", ".del-v4-1", "lost+found", ".hidden", "a b"]
    assert judge_replicas(names) == Listing(
        volume_ids=("v1", "v2"),
        leftovers=(".del-v4-1", ".new-v3-1"),
        strange=(".hidden", "a b", "lost+found"),
    )


def test_a_replica_appears_complete_and_disappears_whole(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    temporary = disk.begin_replica("v1")
    Path(temporary, "file").write_text("x")
    assert disk.list_replicas().volume_ids == ()
    assert disk.finish_replica(temporary, "v1") == disk.replica_path("v1")
    assert disk.list_replicas() == Listing(("v1",), (), ())
    grave = disk.bury_replica("v1")
    assert disk.list_replicas().volume_ids == ()
    assert disk.list_replicas().leftovers == (os.path.basename(grave),)
    disk.sweep(grave)
    assert disk.list_replicas() == Listing((), (), ())
    disk.close()


def test_a_replica_never_takes_a_name_that_is_taken(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    temporary = disk.begin_replica("v1")
    Path(disk.replica_path("v1")).mkdir()  # rename() would replace an empty directory silently
    with pytest.raises(DiskRefused):
        disk.finish_replica(temporary, "v1")
    disk.close()


def test_leftovers_of_one_volume_do_not_collide(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    Path(disk.replicas_path, ".new-v1-1").mkdir()
    assert disk.begin_replica("v1") != disk.begin_replica("v1")
    disk.close()


def test_the_identity_is_readable_by_people(tmp_path: Path) -> None:
    open_disk(tmp_path).close()
    assert json.loads((tmp_path / DISK_FILE).read_text()) == {
        "format": "dolmen-disk",
        "version": 1,
        "disk_id": "disk-1",
        "node_id": "node1",
    }


def test_operating_system_errors_become_what_they_mean() -> None:
    for number, expected in ((errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, DiskError)):
        error = to_storage_error(OSError(number, os.strerror(number)), path="/d")
        assert type(error) is expected
        assert "/d" in str(error)
