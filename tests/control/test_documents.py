"""The document store: compare-and-swap, watch, and what a kill leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from control.documents import Document, update
from control.sqlite_store import SqliteStore
from protocol.errors import Conflict, DiskError

ROOT = Path(__file__).resolve().parents[2]


def with_store(tmp_path: Path, work: Callable[[SqliteStore], Awaitable[None]]) -> None:
    async def run() -> None:
        store = await SqliteStore.open(tmp_path / "state.db")
        try:
            await work(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_what_was_put_is_got_with_a_revision_that_grows(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        first = await store.put(Document("volume", "a", {"size": 1}))
        second = await store.put(first.with_status(epoch=7))
        assert first.revision < second.revision
        assert await store.get("volume", "a") == second
        assert second.spec == {"size": 1} and second.status == {"epoch": 7}
        assert await store.get("volume", "b") is None and await store.get("node", "a") is None

    with_store(tmp_path, work)


def test_of_two_writers_of_one_revision_one_gets_conflict(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        base = await store.put(Document("volume", "a", {}))
        results = await asyncio.gather(
            *(store.put(base.with_spec(by=n)) for n in range(8)), return_exceptions=True
        )
        assert sum(isinstance(result, Conflict) for result in results) == 7
        with pytest.raises(Conflict):
            await store.put(Document("volume", "a", {}))  # revision 0: must not exist
        with pytest.raises(Conflict):
            await store.delete("volume", "a", revision=base.revision)

    with_store(tmp_path, work)


def test_update_tries_again_until_nobody_was_faster(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        await store.put(Document("counter", "a", {"n": 0}))

        async def add() -> None:
            await update(store, "counter", "a", lambda d: d.with_spec(n=d.spec["n"] + 1))

        await asyncio.gather(*(add() for _ in range(10)))
        found = await store.get("counter", "a")
        assert found is not None and found.spec == {"n": 10}
        assert await update(store, "counter", "nobody", lambda d: d) is None

    with_store(tmp_path, work)


def test_a_list_is_sorted_and_of_one_kind(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        for kind, name in (("volume", "b"), ("node", "x"), ("volume", "a")):
            await store.put(Document(kind, name, {}))
        assert [document.name for document in await store.list("volume")] == ["a", "b"]

    with_store(tmp_path, work)


def test_a_watch_begins_with_what_is_there_and_goes_on_with_changes(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        await store.put(Document("volume", "a", {"n": 1}))
        watch = store.watch("volume")
        first = await anext(watch)
        assert first.document is not None and first.document.spec == {"n": 1}
        await store.put(Document("node", "ignored", {}))
        await store.put(Document("volume", "b", {"n": 2}))
        await store.delete("volume", "a")
        second, third = await anext(watch), await anext(watch)
        assert (second.name, third.name) == ("b", "a") and second.revision < third.revision
        assert third.document is None

    with_store(tmp_path, work)


def test_a_slow_watcher_sees_the_last_state_of_each_document(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        watch = store.watch("volume")
        await store.put(Document("volume", "first", {"n": 0}))
        assert (await anext(watch)).name == "first"
        document = await store.put(Document("volume", "a", {"n": 0}))
        for n in range(1, 100):
            document = await store.put(document.with_spec(n=n))
        await store.put(Document("volume", "b", {"n": 5}))
        assert [
            (c.name, c.document.spec["n"]) for c in [await anext(watch), await anext(watch)] if c.document
        ] == [
            ("a", 99),
            ("b", 5),
        ]

    with_store(tmp_path, work)


def test_a_cancelled_put_is_still_announced_to_watchers(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        watch = store.watch("volume")
        await store.put(Document("volume", "first", {}))
        await anext(watch)
        putting = asyncio.create_task(store.put(Document("volume", "a", {})))
        await asyncio.sleep(0)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        if await store.get("volume", "a") is not None:
            assert (await anext(watch)).name == "a"

    with_store(tmp_path, work)


WRITER = """
import asyncio, sys
from pathlib import Path
from control.documents import Document
from control.sqlite_store import SqliteStore
async def run():
    store = await SqliteStore.open(Path(sys.argv[1]))
    document = await store.get("volume", "a") or Document("volume", "a", {"n": 0})
    while True:
        document = await store.put(document.with_spec(n=document.spec["n"] + 1))
        print(document.spec["n"], flush=True)
asyncio.run(run())
"""


def test_every_write_that_returned_survives_a_kill(tmp_path: Path) -> None:
    path, told = tmp_path / "state.db", 0
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        for _ in range(20):
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        told = int(rest[-1]) if rest else told
        writer.wait()

        async def check(store: SqliteStore, least: int = told) -> None:
            found = await store.get("volume", "a")
            assert found is not None and least <= found.spec["n"] <= least + 1

        with_store(tmp_path, check)


def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"something else entirely, certainly not a database" * 100)
    before = path.read_bytes()
    with pytest.raises(DiskError):
        asyncio.run(SqliteStore.open(path))
    assert path.read_bytes() == before
