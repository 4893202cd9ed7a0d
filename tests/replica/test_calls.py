"""The control calls against a disk with real metadata files and a fake data plane."""

# ruff: noqa: ASYNC240 - small files of the test itself
from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import (
    BadRequest,
    DiskError,
    DiskRefused,
    NoSpace,
    ReplicaDamaged,
    ReplicaNotFound,
    ShrinkRefused,
    StaleEpoch,
    VolumeExistsWithOtherSpec,
    VolumeInUse,
)
from protocol.hello import Role
from protocol.regions import pack_regions, unpack_regions
from replica import replicas as replicas_module
from replica.metadata import FILE_NAME, read_meta
from tests.replica.fakes import SIZE_BYTES, VOLUME, FakeIo
from tests.replica.rig import Play, Rig


def test_a_created_replica_says_what_the_contract_says(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        answer = await rig.create()
        assert answer == {
            "volume_id": VOLUME,
            "replica_id": "r1",
            "name": "data",
            "size_bytes": SIZE_BYTES,
            "path": rig.disk.replica_path(VOLUME),
            "epoch": 0,
            "claimed_by": "",
            "record": {"epoch": 0, "version": 0, "in_sync": []},
            "synced_at": [0, 0],
            "chain": ["layer-1"],
            "boot_id": "boot-1",
            "process_id": "process-1",
            "suspect": False,
            "restored": False,
            "opens": 1,
            "damaged_count": 0,
            "dirty_count": 0,
            "data_sessions": 0,
            "state": "open",
            "reason": "",
        }
        assert await rig.call("inspect") == answer
        assert await rig.create() == answer  # repeatable
        status = await rig.calls("server.status", {})
        assert status["volumes"] == [answer]
        assert (status["node_id"], status["disk_id"]) == ("node1", "disk-1")
        assert status["space_total_bytes"] >= status["space_free_bytes"] > 0

    play_calls(scenario)


@pytest.mark.parametrize("changed", [{"replica_id": "r2"}, {"size_bytes": 2 * SIZE_BYTES}, {"name": "other"}])
def test_a_create_over_another_replica_is_refused(play_calls: Play, changed: dict[str, Any]) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        with pytest.raises(VolumeExistsWithOtherSpec):
            await rig.create(**changed)

    play_calls(scenario)


@pytest.mark.parametrize("step", ["begin_replica", "create_store", "write_meta", "finish_replica"])
def test_a_full_disk_while_creating_leaves_nothing_half(play_calls: Play, step: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.io.fail[step] = NoSpace(path="/disk")
        with pytest.raises(NoSpace):
            await rig.create()
        assert os.listdir(rig.disk.replicas_path) == []
        with pytest.raises(ReplicaNotFound):
            await rig.call("inspect")
        await rig.create()

    play_calls(scenario)


def test_a_kill_while_creating_leaves_a_leftover_that_is_swept(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        temporary = rig.disk.begin_replica(VOLUME)
        Path(temporary, "regions").touch()
        await rig.restart()
        await rig.settle()
        assert os.listdir(rig.disk.replicas_path) == []

    play_calls(scenario)


def test_a_damaged_replica_is_listed_and_disturbs_no_other(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.create(volume_id="other")
        meta = Path(rig.disk.replica_path(VOLUME), FILE_NAME)
        meta.write_bytes(meta.read_bytes()[:-1])
        await rig.restart()
        states = {v["volume_id"]: v["state"] for v in (await rig.calls("server.status", {}))["volumes"]}
        assert states == {VOLUME: "damaged", "other": "open"}
        assert "bytes" in (await rig.call("inspect"))["reason"]
        with pytest.raises(ReplicaDamaged):
            await rig.claim(1)

    play_calls(scenario)


def test_a_create_over_a_damaged_replica_is_refused_until_it_is_deleted(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        Path(rig.disk.replica_path(VOLUME), "regions").unlink()
        await rig.restart()
        with pytest.raises(ReplicaDamaged):
            await rig.create()
        await rig.call("delete")
        await rig.create()

    play_calls(scenario)


def test_a_directory_that_says_it_is_another_volume_is_damaged(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        os.rename(rig.disk.replica_path(VOLUME), rig.disk.replica_path("other"))
        await rig.restart()
        answer = await rig.call("inspect", volume_id="other")
        assert answer["state"] == "damaged"
        assert VOLUME in answer["reason"]

    play_calls(scenario)


def test_an_empty_directory_with_a_volumes_name_is_damaged_not_new(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        os.mkdir(rig.disk.replica_path(VOLUME))
        await rig.restart()
        assert (await rig.call("inspect"))["state"] == "damaged"
        with pytest.raises(ReplicaDamaged):
            await rig.create()

    play_calls(scenario)


# -- claims and records


def test_a_claim_is_durable_before_the_data_plane_lets_it_through(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        rig.io.log.clear()
        answer = await rig.claim(5)
        assert (answer["epoch"], answer["claimed_by"]) == (5, "A")
        assert rig.io.names() == ["write_meta", "set_epoch"]
        assert rig.on_disk.epoch == 5

    play_calls(scenario)


def test_claims_survive_a_kill(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(5)
        await rig.restart()
        assert rig.io.stores[VOLUME]["epoch"] == 5
        with pytest.raises(StaleEpoch):
            await rig.claim(4)
        with pytest.raises(StaleEpoch):
            await rig.claim(5, "B")
        await rig.claim(5, "A")

    play_calls(scenario)


def test_a_claim_that_could_not_be_made_durable_changes_nothing(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.fail["write_meta"] = NoSpace(path="/disk")
        with pytest.raises(NoSpace):
            await rig.claim(2, "B")
        assert (await rig.call("inspect"))["epoch"] == 1
        assert rig.io.stores[VOLUME]["epoch"] == 1
        await rig.attach(1)
        await rig.claim(2, "B")

    play_calls(scenario)


def test_a_claim_that_failed_at_the_fence_is_finished_when_repeated(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        rig.io.fail["set_epoch"] = DiskError(path="/disk", reason="x")
        with pytest.raises(DiskError):
            await rig.claim(2)
        await rig.claim(2)
        assert rig.io.stores[VOLUME]["epoch"] == 2

    play_calls(scenario)


def test_two_claims_at_once_have_one_winner(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        found = await asyncio.gather(rig.claim(1, "A"), rig.claim(1, "B"), return_exceptions=True)
        assert [type(f) for f in found] == [dict, StaleEpoch]
        assert rig.on_disk.claimed_by == "A"

    play_calls(scenario)


def test_records_are_stamped_and_durable_before_the_answer(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(3)
        rig.io.log.clear()
        await rig.persist(3, 1, "r1", "r2")
        assert rig.io.names() == ["set_stamp", "write_meta"]
        assert rig.io.stores[VOLUME]["stamp"] == (3, 1)
        await rig.persist(3, 2, "r2")
        answer = await rig.call("inspect")
        assert answer["record"] == {"epoch": 3, "version": 2, "in_sync": ["r2"]}
        assert answer["synced_at"] == [3, 1]
        await rig.restart()
        assert rig.io.stores[VOLUME]["stamp"] == (3, 2)
        assert (await rig.call("inspect"))["synced_at"] == [3, 1]

    play_calls(scenario)


def test_a_record_whose_stamp_failed_is_not_persisted(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.fail["set_stamp"] = DiskError(path="/disk", reason="x")
        with pytest.raises(DiskError):
            await rig.persist(1, 1, "r1")
        assert rig.on_disk.record.stamp == (0, 0)

    play_calls(scenario)


def test_every_call_of_an_old_epoch_is_refused(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(2)
        rig.io.log.clear()
        record = {"epoch": 1, "version": 9, "in_sync": ["r1"]}
        for name, args in (
            ("persist_record", {"record": record}),
            ("begin_resync", {"regions": pack_regions([1])}),
            ("pull_regions", {"regions": pack_regions([1]), "source": ["127.0.0.1", 1]}),
            ("end_resync", {}),
            ("complete_regions", {"regions": b""}),
            ("detach_clean", {}),
        ):
            with pytest.raises(StaleEpoch):
                await rig.call(name, epoch=1, **args)
            with pytest.raises(BadRequest):
                await rig.call(
                    name, epoch=3, **args | ({"record": record | {"epoch": 3}} if "record" in args else {})
                )
        for role in (Role.DATA, Role.PEER):
            with pytest.raises(StaleEpoch):
                await rig.attach(1, role)
        assert rig.io.log == []

    play_calls(scenario)


# -- sessions, detach, delete


def test_a_data_session_is_preceded_by_the_mark_that_it_was_open(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        await rig.replicas.get(VOLUME).close()
        assert rig.on_disk.clean
        await rig.restart(boot_id="boot-2")
        await rig.attach(1, Role.PEER)
        assert rig.on_disk.clean
        rig.io.log.clear()
        await rig.attach(1)
        assert rig.io.names() == ["write_meta", "attach_session"]
        assert (rig.on_disk.clean, rig.on_disk.last_boot_id) == (False, "boot-2")

    play_calls(scenario)


def test_a_delete_is_refused_while_a_data_session_lives(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        session = await rig.attach(1)
        with pytest.raises(VolumeInUse):
            await rig.call("delete")
        rig.io.end_session(VOLUME, session)
        assert await rig.call("delete") == {}
        assert await rig.call("delete") == {}
        await rig.settle()
        assert os.listdir(rig.disk.replicas_path) == []
        assert VOLUME not in rig.io.stores

    play_calls(scenario)


def test_a_session_that_ends_before_it_is_known_is_not_counted_for_ever(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.deliver(("session_closed", VOLUME, 1, "at once"))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await rig.replicas.get(VOLUME).attach(ours.fileno(), role=Role.DATA, epoch=1)
        await rig.call("delete")

    play_calls(scenario)


def test_a_kill_while_deleting_leaves_a_leftover_that_is_swept(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        rig.io.fail["sweep"] = DiskError(path="/disk", reason="x")
        await rig.call("delete")
        await rig.settle()
        assert len(os.listdir(rig.disk.replicas_path)) == 1
        await rig.restart()
        await rig.settle()
        assert os.listdir(rig.disk.replicas_path) == []

    play_calls(scenario)


def test_a_detach_fences_then_cleans_then_says_so(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        await rig.persist(1, 1, "r1")
        rig.io.log.clear()
        assert await rig.call("detach_clean", epoch=1) == {}
        assert rig.io.names() == ["set_epoch", "clean_all", "write_meta"]
        assert rig.on_disk.clean
        assert await rig.call("detach_clean", epoch=1) == {}
        with pytest.raises(StaleEpoch):
            await rig.attach(1)
        await rig.restart()
        assert rig.io.stores[VOLUME]["epoch"] == 2  # epoch 1 stays closed
        await rig.claim(2, "B")
        await rig.attach(2)

    play_calls(scenario)


def test_a_stopped_server_marks_clean_only_what_closed_well(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.create(volume_id="other")
        for volume_id in (VOLUME, "other"):
            await rig.call("claim", volume_id=volume_id, epoch=1, engine_id="A")
        rig.io.fail["close_store"] = DiskError(path="/disk", reason="x")  # the first one
        await rig.replicas.close_all()
        clean = [read_meta(rig.disk.replica_path(volume_id)).clean for volume_id in (VOLUME, "other")]
        assert sorted(clean) == [False, True]
        assert rig.io.names()[-1] == "shutdown"

    play_calls(scenario)


# -- suspicion


def test_a_replica_that_lost_its_page_cache_is_suspect_until_reconciled(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        await rig.persist(1, 1, "r1", "r2")
        await rig.attach(1)
        rig.io.dirty[VOLUME] = {3, 4}
        await rig.restart(boot_id="boot-2")
        assert (await rig.call("inspect"))["suspect"]
        await rig.restart(boot_id="boot-2")
        await rig.claim(2, "B")
        await rig.persist(2, 1, "r1", "r2")
        await rig.call("complete_regions", epoch=2, regions=pack_regions([3]))
        assert (await rig.call("inspect"))["suspect"]
        await rig.restart(boot_id="boot-2")
        assert (await rig.call("inspect"))["suspect"]  # whatever the engine that died had done
        await rig.claim(3, "C")
        await rig.persist(3, 1, "r1", "r2")
        await rig.call("complete_regions", epoch=3, regions=pack_regions([3, 4, 5]))
        assert not (await rig.call("inspect"))["suspect"]
        assert not rig.on_disk.suspect

    play_calls(scenario)


def test_a_resynced_replica_is_trusted_again_when_the_record_names_it(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.dirty[VOLUME] = {3}
        await rig.restart(boot_id="boot-2")
        await rig.claim(2, "B")
        await rig.persist(2, 1, "r2")
        await rig.call("complete_regions", epoch=2, regions=pack_regions([3]))
        assert (await rig.call("inspect"))["suspect"]
        await rig.persist(2, 2, "r1", "r2")
        assert not rig.on_disk.suspect

    play_calls(scenario)


def test_a_killed_server_on_the_same_boot_makes_no_suspect(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.dirty[VOLUME] = {3}
        await rig.restart()
        assert not (await rig.call("inspect"))["suspect"]

    play_calls(scenario)


def test_a_failed_store_is_suspect_and_opened_again_when_wanted(
    play_calls: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "REOPEN_INTERVAL_S", 0.0)

    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        await rig.persist(1, 1, "r1", "r2")
        rig.io.dirty[VOLUME] = {3}
        rig.io.deliver(("store_failed", VOLUME, "fdatasync: I/O error"))
        await rig.settle()
        answer = await rig.status()
        assert (answer["state"], answer["suspect"]) == ("failed", True)
        assert "fdatasync" in answer["reason"]
        assert rig.on_disk.suspect
        rig.io.log.clear()
        assert unpack_regions((await rig.call("dirty_regions"))["regions"]) == [3]
        assert rig.io.names()[:3] == ["close_store", "read_meta", "_drop_cache"]
        answer = await rig.call("inspect")
        assert (answer["state"], answer["suspect"], answer["epoch"]) == ("open", True, 1)

    play_calls(scenario)


def test_who_claimed_before_the_store_failed_has_to_claim_again(
    play_calls: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a record would be committed by a replica that has lost what it had acknowledged."""
    monkeypatch.setattr(replicas_module, "REOPEN_INTERVAL_S", 0.0)

    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        await rig.persist(1, 1, "r1", "r2")
        rig.io.deliver(("store_failed", VOLUME, "fdatasync"))
        await rig.settle()
        for call, args in (
            ("persist_record", {"record": {"epoch": 1, "version": 2, "in_sync": ["r1"]}}),
            ("begin_resync", {"regions": b""}),
            ("end_resync", {}),
            ("complete_regions", {"regions": b""}),
            ("detach_clean", {}),
        ):
            with pytest.raises(DiskError, match="since it was claimed"):
                await rig.call(call, epoch=1, **args)
        assert rig.on_disk.record.stamp == (1, 1)
        await rig.claim(1)
        await rig.persist(1, 2, "r1")
        assert rig.on_disk.record.stamp == (1, 2)

    play_calls(scenario)


def test_suspicion_that_could_not_be_written_is_not_forgotten(
    play_calls: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "REOPEN_INTERVAL_S", 0.0)

    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.dirty[VOLUME] = {3}
        rig.io.fail["write_meta"] = DiskError(path="/disk", reason="x")
        rig.io.deliver(("store_failed", VOLUME, "fdatasync"))
        await rig.settle()
        assert not rig.on_disk.suspect
        await rig.claim(1)
        assert rig.on_disk.suspect

    play_calls(scenario)


def test_files_that_are_deleted_under_a_running_server_are_noticed(
    play_calls: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        shutil.rmtree(rig.path / "replicas" / VOLUME)
        await rig.status()
        await rig.settle()
        answer = await rig.status()
        assert answer["state"] == "damaged"
        assert "replica.meta" in answer["reason"]
        assert "close_store" in rig.io.names(), "its sessions ended"

    play_calls(scenario)


def test_a_disk_that_refuses_at_open_is_failed_not_damaged_and_tried_again(
    play_calls: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.kill()
        original = FakeIo.open_store

        async def refuse(self: FakeIo, *args: Any, **kwargs: Any) -> dict[str, int]:
            raise DiskError(path="/disk", reason="I/O error")

        monkeypatch.setattr(FakeIo, "open_store", refuse)
        await rig.start()
        assert (await rig.status())["state"] == "failed"
        assert (await rig.call("inspect"))["state"] == "failed"
        with pytest.raises(DiskError):
            await rig.claim(1)
        monkeypatch.setattr(FakeIo, "open_store", original)
        monkeypatch.setattr(replicas_module, "REOPEN_INTERVAL_S", 0.0)
        rig.replicas.get(VOLUME)._reopen_after_s = 0.0
        await rig.claim(1)

    play_calls(scenario)


def test_a_failed_store_is_not_opened_again_in_a_tight_loop(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        rig.io.deliver(("store_failed", VOLUME, "x"))
        await rig.settle()
        rig.io.fail["open_store"] = DiskError(path="/disk", reason="x")
        for _ in range(5):
            with pytest.raises(DiskError):
                await rig.claim(1)
        assert rig.io.names().count("open_store") == 2  # at create, and once more

    play_calls(scenario)


# -- resync and the rest


def test_resync_calls_reach_the_data_plane(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        rig.io.dirty[VOLUME] = {7, 2}
        assert unpack_regions((await rig.call("dirty_regions"))["regions"]) == [2, 7]
        assert unpack_regions((await rig.call("changed_since", epoch=0, version=0))["regions"]) == [1, 5]
        rig.io.log.clear()
        await rig.call("begin_resync", epoch=1, regions=pack_regions([2, 7]))
        await rig.call("end_resync", epoch=1)
        await rig.call("complete_regions", epoch=1, regions=pack_regions([2, 7]))
        assert rig.io.log == [
            ("begin_resync", VOLUME, [2, 7]),
            ("end_resync", VOLUME),
            ("complete_regions", VOLUME, [2, 7]),
        ]
        with pytest.raises(BadRequest, match="region 16 is past the end"):
            await rig.call("begin_resync", epoch=1, regions=pack_regions([16]))

    play_calls(scenario)


def test_a_volume_grows_and_never_shrinks(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.call("resize", size_bytes=2 * SIZE_BYTES)
        await rig.call("resize", size_bytes=2 * SIZE_BYTES)
        with pytest.raises(ShrinkRefused):
            await rig.call("resize", size_bytes=SIZE_BYTES)
        await rig.restart()
        assert (await rig.call("inspect"))["size_bytes"] == 2 * SIZE_BYTES

    play_calls(scenario)


def test_a_change_is_finished_when_its_caller_is_gone(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        reached, gate = asyncio.Event(), asyncio.Event()
        original = rig.io.set_epoch

        async def slow(volume_id: str, epoch: int) -> None:
            reached.set()
            await gate.wait()
            await original(volume_id, epoch)

        rig.io.set_epoch = slow  # type: ignore[method-assign]
        claim = asyncio.ensure_future(rig.claim(1))
        await reached.wait()
        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        other = asyncio.ensure_future(rig.claim(2, "B"))
        await asyncio.sleep(0)
        assert rig.on_disk.epoch == 1  # still waiting for its turn
        gate.set()
        await other
        assert rig.io.stores[VOLUME]["epoch"] == 2
        await rig.calls.drain()

    play_calls(scenario)


def test_a_name_that_appeared_under_replicas_is_not_overwritten(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        stranger = Path(rig.disk.replica_path(VOLUME))
        stranger.mkdir()
        (stranger / "photo").write_text("mine")
        with pytest.raises(DiskRefused):
            await rig.create()
        assert (stranger / "photo").read_text() == "mine"

    play_calls(scenario)


def test_a_call_about_a_replica_that_is_opening_waits_and_status_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        rig = Rig(tmp_path / "disk0")
        await rig.start()
        await rig.create()
        await rig.kill()
        gate, original = asyncio.Event(), FakeIo.open_store

        async def slow(self: FakeIo, *args: Any, **kwargs: Any) -> dict[str, int]:
            await gate.wait()
            return await original(self, *args, **kwargs)

        monkeypatch.setattr(FakeIo, "open_store", slow)
        await rig.start(open_all=False)
        opening = asyncio.ensure_future(rig.replicas.open_all())
        inspecting, claiming = asyncio.ensure_future(rig.call("inspect")), asyncio.ensure_future(rig.claim(1))
        assert (await rig.status())["state"] == "opening"
        assert not inspecting.done() and not claiming.done()
        gate.set()
        await opening
        assert (await inspecting)["state"] == "open"
        assert (await claiming)["epoch"] == 1
        await rig.kill()

    asyncio.run(main())


def test_a_replica_whose_opening_has_not_begun_can_be_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path / "disk0")
        await rig.start()
        await rig.create()
        await rig.kill()
        await rig.start(open_all=False)
        await rig.call("delete")
        await rig.replicas.open_all()
        await rig.settle()
        assert os.listdir(rig.disk.replicas_path) == []
        await rig.kill()

    asyncio.run(main())
