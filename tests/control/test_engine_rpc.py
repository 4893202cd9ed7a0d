"""``store.record``: what enters the state store, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from control.documents import Document
from control.engine_rpc import EngineCalls, serve_engines
from control.model import new_volume
from control.sqlite_store import SqliteStore
from control.stamp import StateStamp
from protocol.errors import BadRequest, Conflict, ProtocolViolation, StaleEpoch, VolumeNotFound
from protocol.rpc import RpcClient

IDS = ["data-r1", "data-r2", "data-r3"]


def granted(epoch: int) -> Document:
    document = new_volume("data", "id", 2**30, ("node1", "node2", "node3"))
    return document.with_status(
        grant={"epoch": epoch, "engine_id": "e", "node": "node1"},
        replica_size_bytes=dict.fromkeys(IDS, 2**30),
    )


def record(epoch: int, version: int, in_sync: list[str] = IDS) -> dict[str, Any]:
    return {"epoch": epoch, "version": version, "in_sync": in_sync}


def with_calls(tmp_path: Path, work: Callable[[SqliteStore, EngineCalls], Awaitable[None]]) -> None:
    async def run() -> None:
        store = await SqliteStore.open(tmp_path / "state.db")
        try:
            await store.put(granted(5))
            await work(store, EngineCalls(store, StateStamp.read(tmp_path / "state.stamp")))
        finally:
            await store.close()

    asyncio.run(run())


async def stored(store: SqliteStore) -> dict[str, Any]:
    document = await store.get("volume", "data")
    assert document is not None
    found: dict[str, Any] = document.status["record"]
    return found


async def tell(calls: EngineCalls, epoch: int, wire: Any, volume_id: str = "id") -> None:
    await calls.answer("store.record", {"volume_id": volume_id, "epoch": epoch, "record": wire})


def test_records_of_the_newest_epoch_enter_and_only_grow(tmp_path: Path) -> None:
    async def work(store: SqliteStore, calls: EngineCalls) -> None:
        await tell(calls, 5, record(5, 1))
        await tell(calls, 5, record(5, 1))  # repeated: the answer was lost
        await tell(calls, 5, record(5, 2, IDS[:2]))
        assert await stored(store) == record(5, 2, IDS[:2])
        for old in (record(5, 1), record(5, 2, IDS[1:])):
            with pytest.raises(Conflict):
                await tell(calls, 5, old)
        assert await stored(store) == record(5, 2, IDS[:2])

    with_calls(tmp_path, work)


def test_an_engine_that_lost_its_epoch_is_told_so(tmp_path: Path) -> None:
    async def work(store: SqliteStore, calls: EngineCalls) -> None:
        before = await stored(store)
        for epoch, wire in ((4, record(4, 9)), (5, record(4, 9)), (6, record(6, 1))):
            with pytest.raises(StaleEpoch):
                await tell(calls, epoch, wire)
        assert await stored(store) == before

    with_calls(tmp_path, work)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    async def work(store: SqliteStore, calls: EngineCalls) -> None:
        before = await stored(store)
        for error, wire in (
            (BadRequest, record(5, 1, [])),
            (BadRequest, record(5, 1, ["stranger"])),
            (ProtocolViolation, {"epoch": 5}),
            (ProtocolViolation, record(5, -1)),
            (ProtocolViolation, None),
        ):
            with pytest.raises(error):
                await tell(calls, 5, wire)
        with pytest.raises(VolumeNotFound):
            await tell(calls, 5, record(5, 1), volume_id="other")
        for call, args in (("store.record", {}), ("store.drop", {"volume_id": "id"})):
            with pytest.raises(BadRequest):
                await calls.answer(call, args)
        assert await stored(store) == before

    with_calls(tmp_path, work)


def test_a_volume_made_again_under_the_name_is_another_volume(tmp_path: Path) -> None:
    async def work(store: SqliteStore, calls: EngineCalls) -> None:
        await tell(calls, 5, record(5, 1))
        await store.delete("volume", "data")
        again = granted(5).with_spec(volume_id="id2")
        await store.put(again)
        with pytest.raises(VolumeNotFound):
            await tell(calls, 5, record(5, 2))
        await tell(calls, 5, record(5, 3), volume_id="id2")

    with_calls(tmp_path, work)


def test_the_socket_answers_and_survives_garbage(tmp_path: Path) -> None:
    async def work(store: SqliteStore, calls: EngineCalls) -> None:
        path = tmp_path / "rpc.sock"
        async with serve_engines(path, calls):
            assert path.stat().st_mode & 0o777 == 0o600
            for garbage in (b"\xff" * 64, b"\x05\0\0\0\x93\x01\x02\x03\x04", b"\0\0\0\0", b"\x10\0\0\0short"):
                reader, writer = await asyncio.open_unix_connection(str(path))
                writer.write(garbage)
                writer.write_eof()
                await reader.read()  # closed by the other side
                writer.close()
            client = await RpcClient.connect_unix(str(path))
            await client.call("store.record", volume_id="id", epoch=5, record=record(5, 1))
            with pytest.raises(StaleEpoch):
                await client.call("store.record", volume_id="id", epoch=1, record=record(1, 1))
            await client.close()
        assert not path.exists()

    with_calls(tmp_path, work)
