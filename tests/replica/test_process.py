"""The replica server as a process: kills, restarts, full disks, foreign directories, and the real store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import BadRequest, ReplicaDamaged, StaleEpoch, StorageError, VolumeInUse
from protocol.frames import Flag, Kind, Status
from protocol.hello import Role
from protocol.limits import BLOCK_BYTES, REGION_BLOCKS, REGION_BYTES
from protocol.membership import MembershipRecord
from replica.disk import DISK_FILE
from tests.replica.fakes import SIZE_BYTES, VOLUME
from tests.replica.frame_client import write_payload
from tests.replica.process import Server, blocks
from tests.support.processes import run

RSS_BYTES_MAX = 30 * 2**20
RSS_PER_REPLICA_BYTES_MAX = 8 * 2**20


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "a")


def test_the_ready_file_says_where_and_sigterm_ends_it_cleanly(server: Server) -> None:
    with server.up():
        ready = json.loads(server.ready_file.read_text())
        disk = json.loads((server.directory / DISK_FILE).read_text())
        assert ready["disk_id"] == disk["disk_id"]
        assert server.stop() == 0
    with server.up():
        assert json.loads(server.ready_file.read_text())["disk_id"] == disk["disk_id"]
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_what_was_answered_survives_a_kill_and_a_restart(server: Server) -> None:
    async def before() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1, 4)) is Status.OK
        assert await data.write(REGION_BYTES + 512, b"x" * 100) is Status.OK
        assert await data.zero(2 * BLOCK_BYTES, BLOCK_BYTES) is Status.OK
        assert await data.write(SIZE_BYTES - BLOCK_BYTES, blocks(2)) is Status.OK
        async with server.client() as client:
            with pytest.raises(VolumeInUse):
                await client.delete(VOLUME)
        server.kill()
        with pytest.raises((EOFError, ConnectionError)):
            await data.write(0, blocks(9))
        data.close()

    async def after() -> None:
        async with server.client() as client:
            inspected = await client.inspect(VOLUME)
            assert (inspected["epoch"], inspected["claimed_by"], inspected["suspect"]) == (1, "A", False)
            assert inspected["record"] == {"epoch": 1, "version": 1, "in_sync": ["r1"]}
            assert inspected["dirty_count"] >= 3  # and marks ahead of the writers
            with pytest.raises(StaleEpoch):
                await client.claim(VOLUME, epoch=1, engine_id="B")
        data = await server.session()
        expected = bytearray(blocks(1, 4))
        expected[2 * BLOCK_BYTES : 3 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
        assert await data.read(0, 4 * BLOCK_BYTES) == expected
        block = await data.read(REGION_BYTES, BLOCK_BYTES)
        assert block == bytes(512) + b"x" * 100 + bytes(BLOCK_BYTES - 612)
        assert await data.read(SIZE_BYTES - BLOCK_BYTES, BLOCK_BYTES) == blocks(2)
        assert await data.flush() is Status.OK
        data.close()

    with server.up():
        asyncio.run(before())
    with server.up():
        asyncio.run(after())
        assert server.stop() == 0
    with server.up():  # and a clean stop
        asyncio.run(after())


def test_every_answered_claim_and_record_survives_kills_at_any_moment(server: Server) -> None:
    answered: list[tuple[int, int]] = [(0, 0)]

    async def drive(first_epoch: int, kill_after: int) -> int:
        """Claims and records in quick succession; the kill comes in the middle of one of them."""
        epoch = first_epoch
        async with server.client() as client:
            for count in range(kill_after):
                if count % 3 == 0:
                    epoch += 1
                    await client.claim(VOLUME, epoch=epoch, engine_id="A")
                version = count % 3 + 1
                record = MembershipRecord(epoch, version, frozenset({"r1"}))
                await client.persist_record(VOLUME, epoch=epoch, record=record)
                answered.append(record.stamp)
            pending = asyncio.ensure_future(client.claim(VOLUME, epoch=epoch + 1, engine_id="A"))
            await asyncio.sleep(0)
            server.kill()
            with contextlib.suppress(StorageError):  # a fast server may have answered before it died
                await pending
        return epoch + 1

    async def check() -> None:
        async with server.client() as client:
            found = await client.inspect(VOLUME)
            assert found["state"] == "open"
            assert (found["record"]["epoch"], found["record"]["version"]) == answered[-1]
            assert found["synced_at"] == list(answered[-1])
            assert found["epoch"] >= answered[-1][0]

    with server.up():
        asyncio.run(server.prepare(members=()))
        server.kill()
    epoch = 1
    for kill_after in range(1, 8):
        with server.up():
            epoch = asyncio.run(drive(epoch, kill_after))
        with server.up():
            asyncio.run(check())


def test_a_second_server_on_the_same_disk_is_refused(server: Server) -> None:
    with server.up():
        second = subprocess.run(server.command(), capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert "another replica server serves it" in second.stderr
        assert "Traceback" not in second.stderr
        assert server.stop() == 0


@pytest.mark.parametrize("what", ["foreign", "other node", "damaged", "missing mount", "port", "key"])
def test_a_start_that_cannot_be_right_is_refused_in_one_line(server: Server, what: str) -> None:
    extra: list[str] = []
    expected = ""
    match what:
        case "foreign":
            server.directory.mkdir()
            (server.directory / "photo.jpg").write_text("mine")
            expected = "photo.jpg"
        case "other node":
            with server.up():
                assert server.stop() == 0
            server.node, expected = "node2", "it belongs to node node1, this is node2"
        case "damaged":
            server.directory.mkdir()
            (server.directory / DISK_FILE).write_text("{")
            expected = "disk.json is damaged"
        case "missing mount":
            server.directory.mkdir()
            extra, expected = ["--disk-id", "d"], "it is empty, expected disk d"
        case "port":
            extra, expected = ["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"
        case "key":
            server.key_file.write_bytes(b"short")
            expected = "does not hold a key"
    done = subprocess.run(
        [*server.command(), *extra], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if what == "foreign":
        assert [path.name for path in server.directory.iterdir()] == ["photo.jpg"]


def test_a_lost_page_cache_makes_suspect_only_what_was_dirty(server: Server) -> None:
    async def write() -> None:
        await server.prepare()
        async with server.client() as client:
            await client.create("idle", replica_id="i1", name="idle", size_bytes=SIZE_BYTES)
            await client.claim("idle", epoch=1, engine_id="A")
        data = await server.session()
        assert await data.write(0, blocks(1)) is Status.OK
        data.close()
        server.kill()

    async def suspects() -> dict[str, bool]:
        async with server.client() as client:
            return {v["volume_id"]: v["suspect"] for v in (await client.status())["volumes"]}

    with server.up(boot_id="boot-1"):
        asyncio.run(write())
    with server.up(boot_id="boot-1"):
        assert asyncio.run(suspects()) == {VOLUME: False, "idle": False}
        server.kill()
    with server.up(boot_id="boot-2"):
        assert asyncio.run(suspects()) == {VOLUME: True, "idle": False}
        server.kill()
    with server.up(boot_id="boot-2"):
        assert asyncio.run(suspects()) == {VOLUME: True, "idle": False}


def test_a_server_that_stopped_in_good_order_makes_no_suspect(server: Server) -> None:
    async def write() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1)) is Status.OK
        data.close()

    async def inspect() -> dict[str, object]:
        async with server.client() as client:
            return await client.inspect(VOLUME)

    with server.up(boot_id="boot-1"):
        asyncio.run(write())
        assert server.stop() == 0
    with server.up(boot_id="boot-2"):
        assert asyncio.run(inspect())["suspect"] is False


# -- epochs on the data path


def test_a_newer_claim_ends_older_sessions_and_none_of_their_frames_is_applied(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        old = await server.session(epoch=1)
        assert await old.write(0, blocks(1)) is Status.OK
        async with server.client() as client:
            await client.claim(VOLUME, epoch=2, engine_id="B")
        with pytest.raises((EOFError, ConnectionError)):
            await old.write(0, blocks(6))
            await old.receive()
        with pytest.raises(StaleEpoch):
            await server.session(epoch=1)
        with pytest.raises(BadRequest):
            await server.session(epoch=3)
        new = await server.session(epoch=2)
        assert await new.read(0, BLOCK_BYTES) == blocks(1)
        new.epoch = 1  # a frame of the old epoch on a session of the new one
        assert await new.write(0, blocks(6)) is Status.STALE_EPOCH
        new.epoch = 2
        assert await new.read(0, BLOCK_BYTES) == blocks(1)
        old.close()
        new.close()

    with server.up():
        asyncio.run(scenario())


def test_a_second_data_session_of_the_engine_ends_the_first(server: Server) -> None:
    # What waits unread on the old link would otherwise be applied after what the engine sent again on the
    # new one, over newer acknowledged writes (C12).
    async def scenario() -> None:
        await server.prepare()
        first = await server.session()
        assert await first.write(0, blocks(1)) is Status.OK
        second = await server.session()
        assert await second.write(0, blocks(2)) is Status.OK
        with pytest.raises((EOFError, ConnectionError)):
            await first.write(0, blocks(3))
        assert await second.read(0, BLOCK_BYTES) == blocks(2)
        peer = await server.session(role=Role.PEER)
        assert await second.read(0, BLOCK_BYTES) == blocks(2)
        for session in (first, second, peer):
            session.close()

    with server.up():
        asyncio.run(scenario())


def test_after_a_clean_detach_nothing_is_dirty_and_the_epoch_is_closed(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1, 8)) is Status.OK
        async with server.client() as client:
            assert 0 in await client.dirty_regions(VOLUME)
            await client.detach_clean(VOLUME, epoch=1)
            assert await client.dirty_regions(VOLUME) == []
            with pytest.raises((EOFError, ConnectionError)):
                await data.write(0, blocks(2))
            with pytest.raises(StaleEpoch):
                await server.session(epoch=1)
            await client.detach_clean(VOLUME, epoch=1)
            await client.claim(VOLUME, epoch=2, engine_id="B")
        again = await server.session(epoch=2)
        assert await again.read(0, 8 * BLOCK_BYTES) == blocks(1, 8)
        data.close()
        again.close()

    with server.up():
        asyncio.run(scenario())


def test_a_peer_session_may_only_read(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        peer = await server.session(role=Role.PEER)
        assert await peer.write(0, blocks(1)) is Status.BAD_REQUEST
        assert await peer.zero(0, BLOCK_BYTES) is Status.BAD_REQUEST
        assert await peer.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert await peer.summary(0, SIZE_BYTES) == [0] * REGION_BLOCKS
        peer.close()

    with server.up():
        asyncio.run(scenario())


def test_a_damaged_payload_is_not_applied(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1)) is Status.OK
        payload = bytearray(write_payload(0, blocks(2)))
        payload[100] ^= 1
        reply = await data.ask(Kind.WRITE, 0, BLOCK_BYTES, bytes(payload))
        assert reply.status is Status.BAD_CHECKSUM
        misdirected = write_payload(BLOCK_BYTES, blocks(2))  # checksums of another place
        assert (await data.ask(Kind.WRITE, 0, BLOCK_BYTES, misdirected)).status is Status.BAD_CHECKSUM
        assert await data.read(0, BLOCK_BYTES) == blocks(1)
        assert await data.write(SIZE_BYTES, blocks(1)) is Status.OUT_OF_RANGE
        data.close()

    with server.up():
        asyncio.run(scenario())


def test_hostile_bytes_on_a_data_session_end_it_and_nothing_else(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        for garbage in (b"\0" * 48, os.urandom(4096), b"DLMN" + os.urandom(60)):
            hostile = await server.session()
            await hostile.send(garbage)
            with pytest.raises((EOFError, ConnectionError)):
                await hostile.receive()
            hostile.close()
        data = await server.session()
        assert await data.write(0, blocks(1), flags=Flag.FUA) is Status.OK
        data.close()

    with server.up():
        asyncio.run(scenario())


# -- resync between two servers


async def digests(*servers: Server) -> list[int]:
    found = []
    for server in servers:
        async with server.client() as client:
            report = await client.verify(VOLUME, first_region=0, region_count=SIZE_BYTES // REGION_BYTES)
            assert report["damaged_count"] == 0
            found.append(report["digest"])
    return found


def test_a_stale_replica_is_made_equal_by_pulling_what_it_missed(server: Server, tmp_path: Path) -> None:
    other = Server(tmp_path / "b", node="node2")

    async def scenario() -> None:
        await server.prepare(members=("r1", "r2"))
        await other.prepare(replica_id="r2", members=("r1", "r2"))
        links = [await server.session(), await other.session()]
        for link in links:
            assert await link.write(0, blocks(1, 16)) is Status.OK
            assert await link.write(3 * REGION_BYTES, blocks(2, 4)) is Status.OK
        assert len(set(await digests(server, other))) == 1
        links[1].close()
        async with server.client() as source, other.client() as target:
            record = MembershipRecord(1, 2, frozenset({"r1"}))
            await source.persist_record(VOLUME, epoch=1, record=record)
            assert await links[0].write(BLOCK_BYTES, blocks(3)) is Status.OK
            assert await links[0].zero(3 * REGION_BYTES, BLOCK_BYTES) is Status.OK
            assert await links[0].write(7 * REGION_BYTES, blocks(4)) is Status.OK
            assert len(set(await digests(server, other))) == 2
            synced_at = tuple((await target.inspect(VOLUME))["synced_at"])
            assert synced_at == (1, 1)
            missed = await source.changed_since(VOLUME, stamp=synced_at)
            assert set(missed) >= {0, 3, 7}
            regions = sorted({*missed, *await target.dirty_regions(VOLUME)})
            await target.persist_record(VOLUME, epoch=1, record=record)
            await target.begin_resync(VOLUME, epoch=1, regions=regions)
            pulled = await target.pull_regions(
                VOLUME, epoch=1, source=("127.0.0.1", server.port), regions=regions
            )
            assert pulled["blocks_copied"] <= 3 + 4  # what differs and nothing else
            await target.end_resync(VOLUME, epoch=1)
            assert len(set(await digests(server, other))) == 1
            for client in (source, target):
                named = MembershipRecord(1, 3, frozenset({"r1", "r2"}))
                await client.persist_record(VOLUME, epoch=1, record=named)
                await client.complete_regions(VOLUME, epoch=1, regions=regions)
            assert (await target.inspect(VOLUME))["synced_at"] == [1, 3]
        links[0].close()

    with server.up(), other.up():
        asyncio.run(scenario())


def test_a_pull_from_a_dead_source_says_so(server: Server, tmp_path: Path) -> None:
    other = Server(tmp_path / "b", node="node2")

    async def scenario() -> None:
        await server.prepare()
        await other.prepare(replica_id="r2")
        server.kill()
        async with other.client() as target:
            await target.begin_resync(VOLUME, epoch=1, regions=[0])
            with pytest.raises(StorageError) as raised:
                await target.pull_regions(VOLUME, epoch=1, source=("127.0.0.1", server.port), regions=[0])
            assert raised.value.code in ("unreachable", "source_failed")

    with server.up(), other.up():
        asyncio.run(scenario())


# -- the rest


def test_a_volume_grows_while_it_is_written(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(SIZE_BYTES, blocks(1)) is Status.OUT_OF_RANGE
        async with server.client() as client:
            await client.resize(VOLUME, size_bytes=2 * SIZE_BYTES)
        assert await data.write(SIZE_BYTES, blocks(1)) is Status.OK
        server.kill()
        data.close()

    async def after() -> None:
        data = await server.session()
        assert await data.read(SIZE_BYTES, BLOCK_BYTES) == blocks(1)
        data.close()

    with server.up():
        asyncio.run(scenario())
    with server.up():
        asyncio.run(after())


def test_a_deleted_replica_is_gone_and_may_be_made_anew(server: Server) -> None:
    async def scenario() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1)) is Status.OK
        data.close()
        async with server.client() as client:
            while True:
                try:
                    await client.delete(VOLUME)
                    break
                except VolumeInUse:  # the server has not seen yet that the session is closed
                    await client.inspect(VOLUME)
        await server.prepare()
        data = await server.session()
        assert await data.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        data.close()

    with server.up():
        asyncio.run(scenario())
        assert server.stop() == 0
    assert [path.name for path in (server.directory / "replicas").iterdir()] == [VOLUME]


def test_a_damaged_store_is_listed_and_refused_until_deleted(server: Server) -> None:
    async def scenario() -> None:
        async with server.client() as client:
            inspected = await client.inspect(VOLUME)
            assert inspected["state"] == "damaged"
            with pytest.raises(ReplicaDamaged):
                await client.claim(VOLUME, epoch=2, engine_id="B")
            with pytest.raises(ReplicaDamaged):
                await client.create(VOLUME, replica_id="r1", name="data", size_bytes=SIZE_BYTES)
            await client.delete(VOLUME)
        await server.prepare()

    with server.up():
        asyncio.run(server.prepare())
        assert server.stop() == 0
    regions = server.replica_path / "regions"
    regions.write_bytes(b"\xff" * 512 + regions.read_bytes()[512:])
    with server.up():
        asyncio.run(scenario())


def test_offline_verification_is_refused_while_served_and_finds_flipped_bits(server: Server) -> None:
    command = [sys.executable, "-m", "replica.verify", str(server.replica_path)]

    def verify(code: int) -> dict[str, object]:
        done = run(*command, check=False)
        assert done.returncode == code, done.stdout
        found: dict[str, object] = json.loads(done.stdout)
        return found

    async def write() -> None:
        await server.prepare()
        data = await server.session()
        assert await data.write(0, blocks(1, 100)) is Status.OK
        async with server.client() as client:
            await client.detach_clean(VOLUME, epoch=1)
        data.close()

    with server.up():
        asyncio.run(write())
        verify(2)
        assert server.stop() == 0
    good = verify(0)
    assert (good["blocks_verified"], good["damaged_count"]) == (100, 0)
    with (server.replica_path / "layer-1" / "data").open("r+b") as file:
        file.seek(7 * BLOCK_BYTES + 5)
        file.write(b"!")
    bad = verify(1)
    assert (bad["damaged"], bad["damaged_count"]) == ([7], 1)
    assert verify(1)["replica_id"] == "r1"
    (server.replica_path / "replica.meta").unlink()
    assert verify(2)["error"] == "replica_damaged"


def test_memory_stays_within_the_goal(server: Server) -> None:
    async def load() -> None:
        await server.prepare()
        data = await server.session()
        for at in range(0, SIZE_BYTES, 2**20):
            assert await data.write(at, blocks(at, 256)) is Status.OK
        for at in range(0, SIZE_BYTES, 2**20):
            await data.read(at, 2**20)
        assert await data.flush() is Status.OK
        data.close()

    def rss_bytes() -> int:
        assert server.process is not None
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    with server.up():
        assert rss_bytes() <= RSS_BYTES_MAX
        asyncio.run(load())
        assert rss_bytes() <= RSS_BYTES_MAX + RSS_PER_REPLICA_BYTES_MAX
