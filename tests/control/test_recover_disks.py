"""The state store from disks: what follows from what was found, and what a kill leaves."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import control.recover_disks
from control.client import Client
from control.documents import Document
from control.from_disks import LivingEngine, NodeDisk, Rebuilt, rebuild
from control.layout import Layout, write_private
from control.model import KIND_ATTACHMENT, KIND_NODE, KIND_VOLUME, Node, NodeWanted, Volume
from control.recover_disks import recover_from_disks, refuse_good_store
from control.stamp import read_number, write_number
from control.state import open_state
from protocol.errors import BadRequest, StorageError
from protocol.membership import MembershipRecord
from replica.metadata import ReplicaMeta, write_meta
from replica.survey import SurveyedDisk, SurveyedReplica

NOW = "2026-01-01T00:00:00+00:00"
GIB = 2**30
ID = "aaaabbbbcccc"


def record(epoch: int, version: int, *ids: str) -> MembershipRecord:
    return MembershipRecord(epoch, version, frozenset(ids))


THREE = record(4, 1, "data-r1", "data-r2", "data-r3")
TWO = record(4, 2, "data-r1", "data-r2")


def copy(index: int, newest: MembershipRecord = THREE, *, id_: str = ID, **more: Any) -> SurveyedReplica:
    made = SurveyedReplica(
        volume_id=id_, path=f"/d/node{index}/replicas/{id_}", replica_id=f"data-r{index}", name="data",
        size_bytes=GIB, epoch=newest.epoch, record=newest, chain=("layer-1",), opens=index,
    )  # fmt: skip
    return replace(made, **more)


def disk(node: int, *replicas: SurveyedReplica, **more: Any) -> NodeDisk:
    made = SurveyedDisk(f"/d/node{node}", "", f"disk-{node}", f"node{node}", replicas)
    return NodeDisk(f"node{node}", replace(made, **more), 20000 + node)


def rebuilt(*disks: NodeDisk, engines: tuple[LivingEngine, ...] = (), accept_blank: bool = False) -> Rebuilt:
    return rebuild(disks, engines, accept_blank=accept_blank, now=NOW)


def volumes(made: Rebuilt) -> dict[str, Volume]:
    return {d.name: Volume(d) for d in made.documents if d.kind == KIND_VOLUME}


def kinds(made: Rebuilt, kind: str) -> list[Document]:
    return [document for document in made.documents if document.kind == kind]


def test_the_newest_record_and_the_highest_epoch_are_taken_and_nothing_is_trusted() -> None:
    made = rebuilt(disk(1, copy(1, TWO)), disk(2, copy(2, TWO, epoch=6)), disk(3, copy(3)))
    volume = volumes(made)["data"]
    assert volume.membership == TWO and volume.status.epoch == 6
    assert {place.id: place.node for place in volume.spec.replicas} == {
        f"data-r{index}": f"node{index}" for index in (1, 2, 3)
    }
    assert volume.status.distrust is not None and volume.status.distrust.epoch == 6
    assert volume.status.forked == ("data-r1", "data-r2", "data-r3")
    assert volume.status.opens == {"data-r1": 1, "data-r2": 2, "data-r3": 3}
    assert [Node(d).status.port for d in kinds(made, KIND_NODE)] == [20001, 20002, 20003]
    assert made.left_out == [] and kinds(made, KIND_ATTACHMENT) == []


def test_a_growth_that_was_under_way_goes_on() -> None:
    made = rebuilt(
        disk(1, copy(1, size_bytes=2 * GIB)), disk(2, copy(2, size_bytes=2 * GIB)), disk(3, copy(3))
    )
    volume = volumes(made)["data"]
    assert volume.status.size_bytes == GIB and volume.spec.size_bytes == 2 * GIB
    assert volume.status.replica_size_bytes == {"data-r1": 2 * GIB, "data-r2": 2 * GIB, "data-r3": GIB}


def test_a_replica_that_a_record_names_keeps_a_place_and_is_not_made_anew() -> None:
    made = rebuilt(disk(1, copy(1)), disk(2), disk(3, copy(3)))
    volume = volumes(made)["data"]
    assert volume.node_of("data-r2") == "node2" and made.volumes[0].missing == ["data-r2"]
    assert "data-r2" in volume.status.replica_size_bytes  # the plan would make it otherwise
    nowhere = rebuilt(disk(1, copy(1)), disk(3, copy(3)))
    assert volumes(nowhere)["data"].node_of("data-r2") == "node2"
    damaged = SurveyedReplica(ID, "/d/node7/replicas/x", "replica.meta is short")
    beside = rebuilt(disk(1, copy(1)), disk(2), disk(3, copy(3)), disk(7, damaged))
    assert volumes(beside)["data"].node_of("data-r2") == "node7"
    assert "cannot be read" in beside.volumes[0].notes[0]


def test_a_volume_that_is_served_stays_attached_under_its_engine_s_epoch() -> None:
    engine = LivingEngine(ID, "data", 4, "node1/4/x", "node1", True)
    made = rebuilt(disk(1, copy(1)), disk(2, copy(2)), disk(3, copy(3)), engines=(engine,))
    grant = volumes(made)["data"].status.grant
    assert grant is not None and (grant.epoch, grant.engine_id) == (4, "node1/4/x")
    assert kinds(made, KIND_ATTACHMENT)[0].spec["tcp"] is True
    fenced = replace(engine, epoch=3)
    assert not kinds(rebuilt(disk(1, copy(1)), disk(2, copy(2)), engines=(fenced,)), KIND_ATTACHMENT)


def test_volumes_of_one_name_are_told_apart_by_their_ids() -> None:
    other = copy(2, record(9, 1, "data-r2"), id_="ddddeeeeffff")
    made = rebuilt(disk(1, copy(1)), disk(2, other))
    assert sorted(volumes(made)) == ["data-aaaabbbb", "data-ddddeeee"]
    assert all("named data too" in volume.notes[0] for volume in made.volumes)


BLANK = MembershipRecord(0, 0, frozenset())

CONTRADICTIONS: dict[str, tuple[tuple[NodeDisk, ...], str, str]] = {
    "another node's disk": ((disk(1, copy(1), node_id="node5"),), "/d/node1", "belongs to node node5"),
    "a disk twice": ((disk(1, copy(1)), disk(2, disk_id="disk-1")), "/d/node2", "is there twice"),
    "a disk that cannot be read": ((disk(1, trouble="Input/output error"),), "/d/node1", "Input/output"),
    "a replica twice": ((disk(1, copy(1)), disk(2, copy(1))), "/d/node1", "replica of its volume is there"),
    "two names": ((disk(1, copy(1)), disk(2, copy(2, name="logs"))), "/d/node2", "different names"),
    "no name": ((disk(1, copy(1, name="../x")),), "/d/node1", "is not one"),
    "too many": (
        (disk(1, copy(1, record(4, 1, "a", "b", "c", "d", "e"))),), "/d/node1", "more than 5 replicas"),
    "only damaged": ((disk(1, SurveyedReplica(ID, "/d/node1/x", "bad magic")),), "/d/node1", "bad magic"),
    "only blank": ((disk(1, copy(1, BLANK)),), "/d/node1", "--accept-blank"),
    "a strange name": ((disk(1, strange=("lost+found",)),), "/d/node1", "not a name"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_contradicts_itself_is_left_out_with_the_reason(what: str) -> None:
    disks, path, words = CONTRADICTIONS[what]
    made = rebuilt(*disks)
    assert volumes(made) == {}
    assert any(left.what.startswith(path) and words in left.reason for left in made.left_out)


def test_a_node_whose_disk_is_in_doubt_stays_stopped() -> None:
    made = rebuilt(disk(1, copy(1)), disk(2, trouble="it has no disk.json"))
    wanted = {d.name: Node(d).spec.wanted for d in kinds(made, KIND_NODE)}
    assert wanted == {"node1": NodeWanted.RUNNING, "node2": NodeWanted.STOPPED}


def test_blank_copies_are_an_empty_volume_only_on_an_operator_s_word() -> None:
    disks = (disk(1, copy(1, BLANK)), disk(2, copy(2, BLANK)))
    volume = volumes(rebuilt(*disks, accept_blank=True))["data"]
    assert volume.membership == record(0, 0, "data-r1", "data-r2") and volume.status.grant is None


# On a file system


def make_disks(layout: Layout) -> None:
    layout.key.write_bytes(b"k" * 32)
    for index in (1, 2, 3):
        path = layout.disk_dir(f"node{index}")
        replica = path / "replicas" / ID
        replica.mkdir(parents=True)
        identity = {"format": "dolmen-disk", "version": 1, "disk_id": f"d{index}", "node_id": f"node{index}"}
        (path / "disk.json").write_text(json.dumps(identity))
        meta = ReplicaMeta(
            volume_id=ID, replica_id=f"data-r{index}", name="data", size_bytes=GIB, chain=("layer-1",),
            epoch=4, claimed_by="", record=THREE, synced_at=(4, 1), last_boot_id="b", clean=True,
            suspect=False, opens=2,
        )  # fmt: skip
        write_meta(str(replica), meta)


def found(layout: Layout) -> dict[str, Volume]:
    async def read() -> dict[str, Volume]:
        store, _ = await open_state(layout)
        try:
            return {d.name: Volume(d) for d in await store.list(KIND_VOLUME)}
        finally:
            await store.close()

    return asyncio.run(read())


def test_what_a_dry_run_shows_is_what_is_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    make_disks(layout)
    write_number(layout.stamp, 500)
    planned = recover_from_disks(tmp_path, dry_run=True)
    assert not planned.written and not layout.state.exists()
    written = recover_from_disks(tmp_path)
    assert written.volumes == planned.volumes and written.written
    volume = found(layout)["data"]
    assert volume.membership == THREE and volume.status.distrust is not None
    assert "rebuilt" in volume.status.distrust.reason  # the stamp is no obstacle: numbers go on above it


@pytest.mark.parametrize("content", [b"", b"not a database at all", None])
def test_a_state_store_that_cannot_be_used_is_moved_aside(content: bytes | None, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    make_disks(layout)
    if content is not None:
        layout.state.write_bytes(content)
        Path(f"{layout.state}-wal").write_bytes(b"of the old one")
    report = recover_from_disks(tmp_path)
    aside = [Path(path) for path in report.moved_aside]
    assert [path.read_bytes() for path in aside] == ([] if content is None else [content, b"of the old one"])
    assert list(found(layout)) == ["data"]


def test_a_good_state_store_is_refused_and_not_even_opened(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    make_disks(layout)
    recover_from_disks(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("state*")}
    with pytest.raises(BadRequest, match="can be used"):
        recover_from_disks(tmp_path)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("state*")} == before


def test_a_lost_state_store_is_the_reason_why_no_daemon_answers(tmp_path: Path) -> None:
    client, layout = Client(tmp_path), Layout(tmp_path)
    assert client.why_no_daemon()["text"] == f"there is no cluster in {tmp_path}"
    layout.prepare()
    write_private(layout.key, b"k" * 32)
    assert client.why_no_daemon()["reason"] == "daemon_down"  # a first start that was killed: nothing is lost
    make_disks(layout)
    for content, words in ((None, "is gone"), (b"not a database, whatever it says", "cannot be read")):
        if content is not None:
            layout.state.write_bytes(content)
        said = client.why_no_daemon()
        assert said["reason"] == "store_failed" and words in said["text"] and "state.db" in said["text"]
        assert said["command"].startswith(f"`dolmen recover --from-disks --dir {tmp_path}`, then `dolmen up")
        assert content is None or layout.state.read_bytes() == content
    layout.state.unlink()
    recover_from_disks(tmp_path)
    assert client.why_no_daemon()["reason"] == "daemon_down"


def test_a_directory_without_disks_is_not_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="--dir"):
        recover_from_disks(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """The process ends here."""


STEPS = ("_fill", "_seal", "rename 1", "rename 2", "rename 3", "fsync_dir")


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_a_state_that_the_next_run_finishes(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    make_disks(layout)
    layout.state.write_bytes(b"damaged")
    Path(f"{layout.state}-wal").write_bytes(b"of the old one")
    renames = iter(range(1, 10))
    real = Path.rename

    def die(*_: object) -> None:
        raise Killed

    def die_at_rename(path: Path, target: Any) -> Path:
        if f"rename {next(renames)}" == step:
            raise Killed
        return real(path, target)

    with monkeypatch.context() as patched:
        if step.startswith("rename"):
            patched.setattr(Path, "rename", die_at_rename)
        else:
            patched.setattr(control.recover_disks, step, die)
        with pytest.raises(Killed):
            recover_from_disks(tmp_path)
    if layout.state.exists():
        refuse_good_store(layout)  # it is the damaged one: not refused
    else:
        with pytest.raises(StorageError, match="from-disks"):
            found(layout)
    recover_from_disks(tmp_path)
    assert list(found(layout)) == ["data"]
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("state.db*.aside-*"))]
    assert b"damaged" in kept and b"of the old one" in kept
    assert read_number(layout.stamp) == 0 and os.listdir(layout.disk_dir("node1")) == os.listdir(
        layout.disk_dir("node2")
    )
