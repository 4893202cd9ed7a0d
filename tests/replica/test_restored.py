"""A directory that was put back from a copy is found out, and nothing else is taken for one."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import DiskError
from protocol.frames import Status
from protocol.membership import MembershipRecord
from protocol.regions import pack_regions
from replica import identity as identity_module
from replica.identity import FileIdentity, identify_path, is_another
from replica.metadata import FILE_NAME, TMP_NAME, read_meta, write_meta
from tests.replica.fakes import VOLUME
from tests.replica.process import Server, blocks
from tests.replica.rig import Play, Rig
from tests.replica.test_metadata import OLD
from tests.support.filesystems import FILESYSTEMS, filesystem

HERE = FileIdentity(0xEF53, 12, 1, b"generation", 77)


# -- when two files are two


@pytest.mark.parametrize(
    "found",
    [
        replace(HERE, inode=13),
        replace(HERE, handle=b"generatiom"),
        replace(HERE, birth_ns=78),
        replace(HERE, fs_type=0x6969, inode=0, handle=b"", handle_type=0, birth_ns=0),  # moved to NFS
    ],
)
def test_one_known_difference_is_enough(found: FileIdentity) -> None:
    assert is_another(HERE, found)
    assert is_another(found, HERE)


@pytest.mark.parametrize(
    "found",
    [
        HERE,
        None,
        replace(HERE, handle=b"", handle_type=0),  # a container that may not ask
        replace(HERE, birth_ns=0),
        replace(HERE, handle_type=0x81, handle=b"the same in another form"),
        FileIdentity(0xEF53),
    ],
)
def test_what_is_not_known_is_not_compared(found: FileIdentity | None) -> None:
    assert not is_another(HERE, found)
    assert not is_another(found, HERE)


def test_a_file_system_that_is_not_known_to_last_gives_its_type_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_LASTING", frozenset())
    (tmp_path / "a").touch()
    found = identify_path(str(tmp_path / "a"))
    assert found is not None and found == FileIdentity(found.fs_type)


def test_a_c_library_without_the_calls_knows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    monkeypatch.setattr(identity_module.ctypes, "CDLL", lambda *args, **kwargs: object())
    assert identify_path(str(tmp_path / "a")) is None
    monkeypatch.undo()
    assert identify_path(str(tmp_path / "a")) is not None


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_every_file_system_tells_a_copy_from_a_file_that_lived_on(kind: str, tmp_path: Path) -> None:
    with filesystem(kind, tmp_path) as (mount, remount):
        replica = mount / "replica"
        (replica / "layer-1").mkdir(parents=True)
        for name in ("regions", "layer-1/data", "layer-1/map"):
            (replica / name).touch()
        write_meta(str(replica), OLD)
        meta = read_meta(str(replica))  # now it knows its store's files
        assert not meta.restored and None not in meta.files
        write_meta(str(replica), meta)
        remount()
        assert read_meta(str(replica)) == meta
        write_meta(str(replica), meta)
        os.rename(replica, mount / "elsewhere")  # on the same file system: the same files
        remount()
        assert not read_meta(str(mount / "elsewhere")).restored
        copy = mount / "copy"
        subprocess.run(["cp", "-a", mount / "elsewhere", copy], check=True)
        assert read_meta(str(copy)).restored
        for name in ("regions", "layer-1/data", "layer-1/map"):
            write_meta(str(copy), read_meta(str(copy)))
            write_meta(str(copy), replace(read_meta(str(copy)), restored=False))
            assert not read_meta(str(copy)).restored
            shutil.copy2(copy / name, mount / "new")
            os.rename(mount / "new", copy / name)
            assert read_meta(str(copy)).restored, f"{name} was put back alone"


# -- the write order


def test_a_crash_at_any_step_of_the_first_write_leaves_it_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    write_meta(str(tmp_path / "a"), OLD)
    for cut in ("open", "write", "ftruncate", "fsync", "rename", "posix_fallocate", "none"):
        copy = tmp_path / f"copy-{cut}"
        shutil.copytree(tmp_path / "a", copy)
        meta = read_meta(str(copy))
        assert meta.restored
        with monkeypatch.context() as patch:
            if cut != "none":

                def fail(*args: Any, **kwargs: Any) -> Any:
                    raise OSError(5, "cut")

                patch.setattr(f"replica.metadata.os.{cut}", fail)
            try:
                write_meta(str(copy), meta)
            except OSError:
                assert cut != "none"
        assert read_meta(str(copy)).restored, f"after {cut}"


def test_an_open_that_cannot_be_written_down_is_found_again(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.restart()
        put_back_by_copy(Path(rig.disk.replica_path(VOLUME)))
        await rig.kill()
        await rig.start(open_all=False)
        rig.io.fail["write_meta"] = DiskError(path="/disk", reason="full")
        answer = await rig.call("inspect")
        assert (answer["state"], answer["restored"], answer["opens"]) == ("open", True, 3)
        await rig.restart()
        answer = await rig.call("inspect")
        assert (answer["restored"], answer["opens"]) == (True, 3)
        assert rig.on_disk.restored and rig.on_disk.opens == 3

    play_calls(scenario)


def put_back_by_copy(replica: Path) -> None:
    """The same directory, made of other files."""
    shutil.copytree(replica, replica.with_name("aside"))
    shutil.rmtree(replica)
    os.rename(replica.with_name("aside"), replica)


# -- the rule


def test_a_restored_replica_is_trusted_again_after_everything_it_held_was_made_equal(
    play_calls: Play,
) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        await rig.claim(1)
        await rig.persist(1, 1, "r1", "r2")
        put_back_by_copy(Path(rig.disk.replica_path(VOLUME)))
        await rig.restart()  # nothing is dirty; regions 1 and 5 were written once
        assert (await rig.call("inspect"))["restored"]
        await rig.claim(2, "B")
        await rig.persist(2, 1, "r1", "r2")
        assert (await rig.call("inspect"))["restored"]
        await rig.call("complete_regions", epoch=2, regions=pack_regions([1]))
        await rig.restart()
        assert (await rig.call("inspect"))["restored"]  # it begins again with all
        await rig.call("complete_regions", epoch=2, regions=pack_regions([5]))
        assert (await rig.call("inspect"))["restored"]
        await rig.call("complete_regions", epoch=2, regions=pack_regions([1]))
        assert not (await rig.call("inspect"))["restored"]
        assert not rig.on_disk.restored

    play_calls(scenario)


def test_a_claim_that_knows_of_more_opens_makes_it_restored(play_calls: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.create()
        answer = await rig.call("claim", epoch=1, engine_id="A", opens=1)
        assert (answer["restored"], answer["opens"]) == (False, 2)
        answer = await rig.call("claim", epoch=2, engine_id="A", opens=3)
        assert (answer["restored"], answer["opens"]) == (True, 3)
        assert rig.on_disk.restored
        await rig.persist(2, 1, "r1")
        assert (await rig.call("inspect"))["restored"]  # regions 1 and 5 are in doubt
        await rig.call("complete_regions", epoch=2, regions=pack_regions([1, 5]))
        assert not (await rig.call("inspect"))["restored"]

    play_calls(scenario)


# -- a real server


async def inspect(server: Server) -> dict[str, Any]:
    async with server.client() as client:
        return await client.inspect(VOLUME)


async def write(server: Server, seed: int) -> None:
    """One engine's turn: a claim, a record, a block, a flush."""
    async with server.client() as client:
        epoch = (await client.inspect(VOLUME))["epoch"] + 1
        await client.claim(VOLUME, epoch=epoch, engine_id="B")
        await client.persist_record(VOLUME, epoch=epoch, record=MembershipRecord(epoch, 1, frozenset({"r1"})))
    data = await server.session(epoch=epoch)
    assert await data.write(0, blocks(seed)) is Status.OK
    assert await data.flush() is Status.OK
    data.close()


def by_cp_over_it(backup: Path, replica: Path) -> None:
    """Into the files that are there: their inodes stay."""
    subprocess.run(["cp", "-a", f"{backup}/.", replica], check=True)


def by_cp_anew(backup: Path, replica: Path) -> None:
    shutil.rmtree(replica)
    subprocess.run(["cp", "-a", backup, replica], check=True)


def by_renaming_each_file(backup: Path, replica: Path) -> None:
    """As rsync does: what has its size and time is left alone, the rest is written beside and renamed."""
    for source in backup.rglob("*"):
        target = replica / source.relative_to(backup)
        if source.is_dir() or source.name == TMP_NAME:
            continue
        if (source.stat().st_size, source.stat().st_mtime) != (target.stat().st_size, target.stat().st_mtime):
            shutil.copy2(source, target.with_name(".incoming"))
            os.rename(target.with_name(".incoming"), target)


def by_tar(backup: Path, replica: Path) -> None:
    archive = backup.with_suffix(".tar")
    subprocess.run(["tar", "-C", backup, "--sparse", "-cf", archive, "."], check=True)
    subprocess.run(["tar", "-C", replica, "-xf", archive], check=True)


def by_moving_the_copy(backup: Path, replica: Path) -> None:
    shutil.rmtree(replica)
    os.rename(backup, replica)


@pytest.mark.parametrize(
    "put_back", [by_cp_over_it, by_cp_anew, by_renaming_each_file, by_tar, by_moving_the_copy]
)
@pytest.mark.parametrize("end", [Server.kill, Server.stop])
def test_yesterdays_directory_is_restored_however_it_came_back(
    tmp_path: Path, put_back: Callable[[Path, Path], None], end: Callable[[Server], object]
) -> None:
    server = Server(tmp_path / "a")
    with server.up():
        asyncio.run(server.prepare())
        server.stop()
    backup = tmp_path / "backup"
    subprocess.run(["cp", "-a", server.replica_path, backup], check=True)
    with server.up():
        asyncio.run(write(server, 1))
        assert asyncio.run(inspect(server))["opens"] == 4  # created, claimed, opened, claimed
        end(server)
    put_back(backup, server.replica_path)
    for opens in (3, 4):  # fewer than was known; and it does not wear off
        with server.up():
            answer = asyncio.run(inspect(server))
            assert (answer["state"], answer["restored"], answer["opens"]) == ("open", True, opens)
            server.stop()


def test_a_server_that_ends_and_starts_again_is_never_taken_for_restored(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")
    boots = ["boot-1", "boot-1", "boot-2", "boot-3"]
    for count, (boot_id, end) in enumerate(zip(boots, (Server.kill, Server.stop) * 2, strict=True)):
        with server.up(boot_id=boot_id):
            if count == 0:
                asyncio.run(server.prepare())
            asyncio.run(write(server, count))
            answer = asyncio.run(inspect(server))
            assert (answer["restored"], answer["opens"]) == (False, 2 * count + 3)
            end(server)
    assert not read_meta(str(server.replica_path)).restored
    assert (server.replica_path / FILE_NAME).exists()
