"""A disk that is full or refuses to sync, under a real replica server."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from protocol.errors import NoSpace, StorageError
from protocol.frames import Status
from protocol.limits import BLOCK_BYTES
from protocol.membership import MembershipRecord
from replica.metadata import read_meta
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.process import Server, blocks
from tests.support.processes import running
from tests.support.tmpfs import free_bytes, tmpfs

DISK_BYTES = 16 * 2**20


def fill(directory: Path) -> Path:
    """Take all the space that is left."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        size = 2**20
        while size >= 512:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    assert free_bytes(directory) == 0
    return filler


def test_on_a_full_disk_claims_go_on_writes_are_refused_and_resume_with_space(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")
    mount = tmp_path / "mount"
    mount.mkdir()

    async def scenario() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1)) is Status.OK
        data.close()
        filler = fill(mount)
        async with server.client() as client:
            for epoch in (2, 3, 4):
                await client.claim(VOLUME, epoch=epoch, engine_id="B")
                record = MembershipRecord(epoch, 1, frozenset({"r1"}))
                await client.persist_record(VOLUME, epoch=epoch, record=record)
            data = await server.session(epoch=4)
            assert await data.write(SIZE_BYTES // 2, blocks(2)) is Status.NO_SPACE
            assert await data.read(0, BLOCK_BYTES) == blocks(1)
            with pytest.raises(NoSpace):
                await client.create("other", replica_id="o1", name="other", size_bytes=SIZE_BYTES)
            assert [v["volume_id"] for v in (await client.status())["volumes"]] == [VOLUME]
            assert (await client.inspect(VOLUME))["state"] == "open"
        assert os.listdir(server.directory / "replicas") == [VOLUME]
        filler.unlink()
        assert await data.write(SIZE_BYTES // 2, blocks(2)) is Status.OK
        assert await data.flush() is Status.OK
        data.close()

    async def after() -> None:
        data = await server.session(epoch=4)
        assert await data.read(0, BLOCK_BYTES) == blocks(1)
        assert await data.read(SIZE_BYTES // 2, BLOCK_BYTES) == blocks(2)
        data.close()

    with tmpfs(mount, size_bytes=DISK_BYTES):
        server.directory = mount / "disk0"
        with server.up():
            asyncio.run(scenario())
            server.kill()
        with server.up():
            asyncio.run(after())
            assert server.stop() == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("killed", ["at once", "later"])
def test_a_failed_sync_makes_the_replica_suspect_for_good(tmp_path: Path, killed: str) -> None:
    server = Server(tmp_path / "a")

    async def write() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1)) is Status.OK
        data.close()

    async def fail() -> None:
        data = await server.session()
        assert await data.write(0, blocks(2)) is Status.OK
        assert server.process is not None
        with running(
            [
                "strace",
                "-f",
                "-p",
                str(server.process.pid),
                "-e",
                "trace=fdatasync",
                "-e",
                "inject=fdatasync:error=EIO",
            ],
            log=tmp_path / "strace",
            ready=lambda: "attached" in (tmp_path / "strace").read_text(),
        ):
            with pytest.raises((EOFError, ConnectionError)):  # no answer at all: whoever waits goes elsewhere
                await data.flush()
            if killed == "at once":
                # Nothing but the store's own note knows of it.
                server.kill()
                return
            async with server.client() as client:
                while (found := (await client.status())["volumes"][0])["state"] == "open":
                    pass  # each look is a call; the event is on its way
                assert found["state"] == "failed"
                assert "sync" in found["reason"] or "error" in found["reason"].lower()
                assert found["suspect"]
            while not read_meta(str(server.replica_path)).suspect:
                pass  # it is told before it is durable, and must be durable before the kill
        data.close()

    async def after() -> None:
        async with server.client() as client:
            await client.claim(VOLUME, epoch=2, engine_id="B")  # opens it again
            found = await client.inspect(VOLUME)
            assert (found["state"], found["suspect"]) == ("open", True)
            record = MembershipRecord(2, 1, frozenset({"r1"}))
            await client.persist_record(VOLUME, epoch=2, record=record)
            assert (await client.inspect(VOLUME))["suspect"]
            dirty = await client.dirty_regions(VOLUME)
            assert 0 in dirty
            await client.complete_regions(VOLUME, epoch=2, regions=dirty)
            assert not (await client.inspect(VOLUME))["suspect"]
        data = await server.session(epoch=2)
        assert await data.read(0, BLOCK_BYTES) in (blocks(1), blocks(2))
        data.close()

    with server.up():
        asyncio.run(write())
        asyncio.run(fail())
        if killed == "later":
            server.kill()
    with server.up():
        asyncio.run(after())
        assert server.stop() == 0


def test_two_full_stops_and_starts_change_no_byte_of_the_metadata_that_matters(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")

    async def inspect() -> dict[str, object]:
        async with server.client() as client:
            found = await client.inspect(VOLUME)
            return {key: value for key, value in found.items() if key not in ("process_id", "opens")}

    with server.up():
        asyncio.run(server.prepare())
        before = asyncio.run(inspect())
        assert server.stop() == 0
    for _ in range(2):
        with server.up():
            assert asyncio.run(inspect()) == before
            assert server.stop() == 0


def test_a_server_without_descriptors_keeps_what_it_has_and_refuses_the_new(tmp_path: Path) -> None:
    server = Server(tmp_path / "a")
    original = server.command

    def command(**options: object) -> list[str]:
        return ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *original(**options)]  # type: ignore[arg-type]

    server.command = command  # type: ignore[method-assign]

    async def scenario() -> None:
        await server.prepare()
        async with server.client() as client:
            data = await server.session()
            held = []
            for _ in range(60):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                held.append(writer)
            assert await data.write(0, blocks(1)) is Status.OK
            assert (await client.inspect(VOLUME))["state"] == "open"
            try:
                await client.claim(
                    VOLUME, epoch=1, engine_id="A"
                )  # may need a descriptor: either answer is one
            except StorageError as error:
                assert error.code == "disk_error"
            for writer in held:
                writer.close()
            while True:
                try:
                    await client.claim(VOLUME, epoch=2, engine_id="A")
                    break
                except StorageError as error:
                    assert error.code == "disk_error"
            data.close()
        async with server.client() as client:
            assert (await client.inspect(VOLUME))["epoch"] == 2

    with server.up():
        asyncio.run(scenario())
        assert server.stop() == 0
