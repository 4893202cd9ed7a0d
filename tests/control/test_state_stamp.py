"""state.stamp: an older copy of the state store is noticed, and nothing else is taken for one."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import control.stamp
from control.engine_rpc import EngineCalls
from control.errors import StateStoreGone
from control.layout import Layout
from control.model import Volume, VolumeStatus
from control.sqlite_store import SqliteStore
from control.stamp import StateStamp, read_number, write_number
from control.state import open_state
from protocol.errors import DiskError
from tests.control.test_engine_rpc import granted, record

STEPS = ("open", "write", "fsync", "rename", "fsync_dir")
"""What ``write_number`` does, in the order of FORMAT.md."""


class Killed(BaseException):
    """The process ends here."""


def die_before(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    if step == "fsync_dir":
        monkeypatch.setattr(control.stamp, "fsync_dir", die)
        return
    fakes = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "close")}
    fake_os = type("os", (), {**{n: staticmethod(f) for n, f in fakes.items()}, step: staticmethod(die)})
    for constant in (name for name in dir(os) if name.startswith("O_")):
        setattr(fake_os, constant, getattr(os, constant))
    monkeypatch.setattr(control.stamp, "os", fake_os)


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_the_old_number_or_the_new(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.stamp"
    write_number(path, 7)
    with monkeypatch.context() as patched:
        die_before(step, patched)
        with pytest.raises(Killed):
            write_number(path, 8)
    assert read_number(path) == (8 if step == "fsync_dir" else 7)
    write_number(path, 9)  # what was left behind is no obstacle
    assert read_number(path) == 9


def test_the_number_never_goes_back(tmp_path: Path) -> None:
    async def work() -> None:
        stamp = StateStamp.read(tmp_path / "state.stamp")
        await asyncio.gather(stamp.advance(3), stamp.advance(9), stamp.advance(5))
        assert stamp.number == 9 == read_number(stamp.path)

    asyncio.run(work())


@pytest.mark.parametrize("content", [b"", b"seven\n", b"-1\n", b"9" * 100])
def test_a_stamp_that_makes_no_sense_ends_the_start(content: bytes, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.stamp.write_bytes(content)
    with pytest.raises(DiskError, match=r"state\.stamp"):
        asyncio.run(open_state(layout))
    assert not layout.state.exists()


def in_state(
    layout: Layout, work: Callable[[SqliteStore, StateStamp], Coroutine[Any, Any, VolumeStatus | None]]
) -> VolumeStatus | None:
    async def run() -> VolumeStatus | None:
        store, stamp = await open_state(layout)
        try:
            return await work(store, stamp)
        finally:
            await store.close()

    return asyncio.run(run())


async def status_of(store: SqliteStore, stamp: StateStamp) -> VolumeStatus:
    document = await store.get("volume", "data")
    assert document is not None
    return Volume(document).status


async def make(store: SqliteStore, stamp: StateStamp) -> None:
    await store.put(granted(5))
    await EngineCalls(store, stamp).answer(
        "store.record", {"volume_id": "id", "epoch": 5, "record": record(5, 1)}
    )


async def lose_one(store: SqliteStore, stamp: StateStamp) -> None:
    wire = record(5, 2, ["data-r1", "data-r2"])
    await EngineCalls(store, stamp).answer(
        "store.record", {"volume_id": "id", "epoch": 5, "record": wire, "opens": {"data-r1": 3}}
    )


def test_an_older_copy_makes_every_volume_distrusted_for_good(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    in_state(layout, make)
    shutil.copy(layout.state, tmp_path / "yesterday")
    in_state(layout, lose_one)
    shutil.copy(tmp_path / "yesterday", layout.state)
    found = in_state(layout, status_of)
    assert found is not None and found.distrust is not None and "older copy" in found.distrust.reason
    assert found.record.version == 1
    again = in_state(layout, status_of)  # the numbers agree now; the volume still says so
    assert again is not None and again.distrust == found.distrust


def test_a_kill_while_volumes_are_marked_leaves_none_marked_and_the_next_start_marks_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    in_state(layout, make)
    write_number(layout.stamp, 1000)
    real = SqliteStore._expect

    def die(self: SqliteStore, kind: str, name: str, revision: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "_expect", die)
        with pytest.raises(Killed):
            asyncio.run(open_state(layout))
    assert SqliteStore._expect is real
    connection = sqlite3.connect(layout.state)
    assert connection.execute("SELECT revision FROM counter").fetchone()[0] < 1000
    connection.close()
    found = in_state(layout, status_of)
    assert found is not None and found.distrust is not None


def test_a_kill_between_the_state_store_and_its_stamp_is_no_older_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    in_state(layout, make)

    async def die(self: StateStamp, number: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StateStamp, "advance", die)
        with pytest.raises(Killed):
            in_state(layout, lose_one)
    found = in_state(layout, status_of)
    assert found is not None and found.record.version == 2 and found.distrust is None
    before = read_number(layout.stamp)
    in_state(layout, lose_one)  # the engine asks again: it was not answered
    assert read_number(layout.stamp) > before


def test_a_record_is_not_answered_while_the_stamp_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    in_state(layout, make)

    def full(path: Path, number: int) -> None:
        raise OSError(28, "No space left on device")

    async def refused(store: SqliteStore, stamp: StateStamp) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(control.stamp, "write_number", full)
            for _ in range(2):
                with pytest.raises(DiskError, match="No space"):
                    await lose_one(store, stamp)
        await lose_one(store, stamp)
        assert read_number(layout.stamp) == await store.revision()

    in_state(layout, refused)


@pytest.mark.parametrize("left", ["stamp", "disk"])
def test_a_state_store_that_is_gone_is_not_made_anew(left: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    if left == "stamp":
        write_number(layout.stamp, 4)
    else:
        layout.disk_dir("node1").mkdir(parents=True)
        (layout.disk_dir("node1") / "disk.json").write_text("{}")
    with pytest.raises(StateStoreGone, match="from-disks"):
        asyncio.run(open_state(layout))
    assert not layout.state.exists()


def test_a_damaged_state_store_ends_the_start_and_is_left_as_it_is(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    in_state(layout, make)
    content = bytearray(layout.state.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    layout.state.write_bytes(content)
    with pytest.raises(DiskError, match=r"state\.db"):
        asyncio.run(open_state(layout))
    assert layout.state.read_bytes() == bytes(content)
