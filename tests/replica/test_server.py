"""The port: hellos, roles, caps, deadlines and hostile bytes, over real sockets with a fake data plane."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protocol.connect import connect_socket, recv_message, send_message
from protocol.errors import (
    BadRequest,
    NotAuthenticated,
    ProtocolViolation,
    ReplicaNotFound,
    StaleEpoch,
    StorageError,
    Unreachable,
    from_wire,
)
from protocol.hello import HELLO_BYTES_MAX, Role, check_answer, make_hello, parse_greeting
from protocol.membership import MembershipRecord
from protocol.rpc import LENGTH, pack
from replica import replicas as replicas_module
from replica import server as server_module
from replica.client import ReplicaClient
from replica.disk import Disk
from replica.main import listen
from replica.server import ReplicaServer
from tests.replica.fakes import KEY, SIZE_BYTES, VOLUME, FakeIo


class Rig:
    def __init__(self, server: ReplicaServer, io: FakeIo, port: int) -> None:
        self.server = server
        self.io = io
        self.port = port

    async def client(self) -> ReplicaClient:
        return await ReplicaClient.connect("127.0.0.1", self.port, KEY)

    async def open(
        self, role: Role, *, epoch: int = 1, volume_id: str = VOLUME, key: bytes = KEY
    ) -> socket.socket:
        sock, _ = await connect_socket(
            "127.0.0.1", self.port, key=key, role=role, volume_id=volume_id, epoch=epoch, engine_id="A"
        )
        return sock

    async def raw(self) -> socket.socket:
        """Connected, and nothing said."""
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return sock

    async def prepare(self) -> None:
        """A replica, claimed by epoch 1."""
        async with await self.client() as client:
            await client.create(VOLUME, replica_id="r1", name="data", size_bytes=SIZE_BYTES)
            await client.claim(VOLUME, epoch=1, engine_id="A")


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Rig]:
    io, stop, ready = FakeIo(), asyncio.Event(), asyncio.Event()
    disk = Disk.open(str(path / "disk0"), node_id="node1", make_id=lambda: "disk-1")
    listener = listen("127.0.0.1", 0)
    server = ReplicaServer(disk, io, key=KEY, boot_id="boot-1", listener=listener)  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(server.run(ready=ready.set, stop=stop))
        await ready.wait()
        try:
            yield Rig(server, io, listener.getsockname()[1])
        finally:
            stop.set()
            await asyncio.wait_for(asyncio.shield(running), 10)
            disk.close()


Play = Callable[[Callable[[Rig], Awaitable[None]]], None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    def run(scenario: Callable[[Rig], Awaitable[None]]) -> None:
        async def main() -> None:
            async with serving(tmp_path) as rig:
                await scenario(rig)

        asyncio.run(main())

    return run


async def closed_by_peer(sock: socket.socket) -> bool:
    """Waits for the other side's end; a reset is one."""
    try:
        while await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 10):
            pass
    except ConnectionError:
        pass
    return True


def test_every_call_through_the_typed_client(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        async with await rig.client() as client:
            assert (await client.status())["disk_id"] == "disk-1"
            assert (await client.inspect(VOLUME))["claimed_by"] == "A"
            record = MembershipRecord(1, 1, frozenset({"r1"}))
            await client.persist_record(VOLUME, epoch=1, record=record)
            assert await client.changed_since(VOLUME, stamp=(0, 0)) == [1, 5]
            assert await client.dirty_regions(VOLUME) == []
            await client.begin_resync(VOLUME, epoch=1, regions=[1, 5])
            await client.end_resync(VOLUME, epoch=1)
            await client.complete_regions(VOLUME, epoch=1, regions=[1, 5])
            assert (await client.verify(VOLUME, first_region=0, region_count=16))["damaged"] == []
            assert (await client.stats(VOLUME))["reads"] == 0
            await client.resize(VOLUME, size_bytes=2 * SIZE_BYTES)
            await client.detach_clean(VOLUME, epoch=1)
            await client.delete(VOLUME)
            with pytest.raises(ReplicaNotFound):
                await client.inspect(VOLUME)
            with pytest.raises(BadRequest):
                await client.rpc.call("replica.format_everything")

    play(scenario)


def test_a_data_socket_goes_to_the_data_plane_with_nothing_read_ahead(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        loop = asyncio.get_running_loop()
        with await rig.raw() as sock:
            greeting = parse_greeting(await recv_message(sock))
            hello = make_hello(greeting, key=KEY, role=Role.DATA, volume_id=VOLUME, epoch=1, engine_id="A")
            # An impatient client: its first frame is in the same segment as its hello.
            await loop.sock_sendall(sock, pack(hello.to_wire()) + b"FRAME")
            check_answer(await recv_message(sock), key=KEY, greeting=greeting, hello=hello)
            (descriptor,) = rig.io.descriptors.values()
            with socket.socket(fileno=os.dup(descriptor)) as native:
                assert await loop.sock_recv(native, 100) == b"FRAME"
                await loop.sock_sendall(native, b"REPLY")
                assert await loop.sock_recv(sock, 100) == b"REPLY"
                assert native.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    play(scenario)


def test_data_and_peer_sessions_need_the_current_epoch(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        async with await rig.client() as client:
            await client.claim(VOLUME, epoch=2, engine_id="B")
        for role in (Role.DATA, Role.PEER):
            with pytest.raises(StaleEpoch):
                await rig.open(role, epoch=1)
            with pytest.raises(BadRequest):
                await rig.open(role, epoch=3)
            with pytest.raises(ReplicaNotFound):
                await rig.open(role, epoch=2, volume_id="other")
            (await rig.open(role, epoch=2)).close()
        assert [entry[-1] for entry in rig.io.log if entry[0] == "attach_session"] == ["data", "peer"]

    play(scenario)


def test_a_peer_pulls_from_another_server(play: Play, tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        async with serving(tmp_path / "second") as source:
            await source.prepare()
            async with await rig.client() as client:
                answer = await client.pull_regions(
                    VOLUME, epoch=1, source=("127.0.0.1", source.port), regions=[1, 2]
                )
                assert answer["regions"] == 2
                assert ("attach_session", VOLUME, 1, "peer") in source.io.log
                with pytest.raises(Unreachable):
                    await client.pull_regions(VOLUME, epoch=1, source=("127.0.0.1", 1), regions=[1])

    play(scenario)


def test_a_newer_claim_stops_a_pull_whose_source_is_stuck(play: Play, tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        pulling = asyncio.Event()

        async def stuck(
            volume_id: str, fd: int, *, epoch: int, regions: list[int], **options: int | bool
        ) -> dict[str, int]:
            with socket.socket(fileno=os.dup(fd)) as sock:
                pulling.set()
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""  # the end, not an answer
            raise StaleEpoch(volume=volume_id, offered=epoch, current=2)

        rig.io.pull_regions = stuck  # type: ignore[method-assign]
        async with serving(tmp_path / "second") as source:
            await source.prepare()
            async with await rig.client() as client, await rig.client() as other:
                pull = asyncio.ensure_future(
                    client.pull_regions(VOLUME, epoch=1, source=("127.0.0.1", source.port), regions=[1])
                )
                await pulling.wait()
                await other.claim(VOLUME, epoch=2, engine_id="B")
                with pytest.raises(StaleEpoch):
                    await pull

    play(scenario)


@pytest.mark.parametrize("how", ["claimed again", "closed"])
def test_a_replica_waits_for_its_pulls_to_end(play: Play, tmp_path: Path, how: str) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        pulling, ended = asyncio.Event(), asyncio.Event()

        async def slow_to_end(
            volume_id: str, fd: int, *, epoch: int, regions: list[int], **options: int | bool
        ) -> dict[str, int]:
            with socket.socket(fileno=os.dup(fd)) as sock:
                pulling.set()
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
            for _ in range(100):
                await asyncio.sleep(0)  # the native thread still has a block in its hands
            ended.set()
            raise Unreachable(peer="the source", reason="shut down")

        rig.io.pull_regions = slow_to_end  # type: ignore[method-assign]
        async with serving(tmp_path / "second") as source:
            await source.prepare()
            async with await rig.client() as client:
                pull = asyncio.ensure_future(
                    client.pull_regions(VOLUME, epoch=1, source=("127.0.0.1", source.port), regions=[1])
                )
                await pulling.wait()
                replica = rig.server.replicas.get(VOLUME)
                if how == "closed":
                    await replica.close()
                else:
                    await replica.claim(epoch=1, engine_id="A")
                    assert rig.io.log[-1] == ("set_epoch", VOLUME, 1)
                assert ended.is_set()
                # Nothing is wrong with the source: it was this replica that ended the pull.
                with pytest.raises(Unreachable, match=f"the replica of volume {VOLUME}"):
                    await pull

    play(scenario)


def test_a_pull_that_was_decided_before_a_repeated_claim_never_begins(play: Play, tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        replica = rig.server.replicas.get(VOLUME)
        async with serving(tmp_path / "second") as source:
            await source.prepare()
            pull_round = await replica.prepare_pull(epoch=1, regions=[1])
            await replica.claim(epoch=1, engine_id="A")
            with pytest.raises(Unreachable):
                await replica.pull_regions(
                    epoch=1, host="127.0.0.1", port=source.port, regions=[1], pull_round=pull_round
                )
            assert "pull_regions" not in rig.io.names()

    play(scenario)


def test_a_lost_control_connection_stops_its_pulls(play: Play, tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        pulling, ended = asyncio.Event(), asyncio.Event()

        async def stuck(
            volume_id: str, fd: int, *, epoch: int, regions: list[int], **options: int | bool
        ) -> dict[str, int]:
            with socket.socket(fileno=os.dup(fd)) as sock:
                pulling.set()
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
            ended.set()
            return {}

        rig.io.pull_regions = stuck  # type: ignore[method-assign]
        async with serving(tmp_path / "second") as source:
            await source.prepare()
            client = await rig.client()
            pull = asyncio.ensure_future(
                client.pull_regions(VOLUME, epoch=1, source=("127.0.0.1", source.port), regions=[1])
            )
            await pulling.wait()
            await client.close()
            await asyncio.wait_for(ended.wait(), 10)
            with pytest.raises(Unreachable):
                await pull

    play(scenario)


# -- hostile


def test_another_key_is_refused_with_a_reason(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        for role in Role:
            with pytest.raises(NotAuthenticated):
                await rig.open(role, key=bytes(32))

    play(scenario)


def test_a_recorded_hello_opens_nothing(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        with await rig.raw() as first, await rig.raw() as second:
            recorded = make_hello(
                parse_greeting(await recv_message(first)), key=KEY, role=Role.CONTROL, engine_id="A"
            )
            await recv_message(second)
            await send_message(second, recorded.to_wire())
            match await recv_message(second):
                case {"error": error}:
                    assert isinstance(from_wire(error), NotAuthenticated)
                case other:
                    raise AssertionError(other)
            assert await closed_by_peer(second)

    play(scenario)


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"NBDMAGICIHAVEOPT",
    LENGTH.pack(0),
    LENGTH.pack(HELLO_BYTES_MAX + 1) + b"x" * 100,
    LENGTH.pack(2**32 - 1),
    LENGTH.pack(4) + b"\xdd\xff\xff\xff",
    LENGTH.pack(10_000) + b"\x91" * 10_000,
    pack({}),
    pack({"role": "data"}),
    b"DLMN" + bytes(44),
]


def test_garbage_at_the_port_closes_that_connection_and_disturbs_no_other(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        chance = random.Random(1)
        async with await rig.client() as client:
            for data in [*GARBAGE, *(chance.randbytes(chance.randrange(1, 300)) for _ in range(100))]:
                with await rig.raw() as sock:
                    await asyncio.get_running_loop().sock_sendall(sock, data)
                    sock.shutdown(socket.SHUT_WR)
                    assert await closed_by_peer(sock)
            assert (await client.inspect(VOLUME))["state"] == "open"
        assert rig.server._handshakes == 0

    play(scenario)


def test_garbage_after_a_control_hello_closes_that_connection(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        async with await rig.client() as client:
            for data in GARBAGE:
                with await rig.open(Role.CONTROL, epoch=0, volume_id="") as sock:
                    await asyncio.get_running_loop().sock_sendall(sock, data)
                    sock.shutdown(socket.SHUT_WR)
                    assert await closed_by_peer(sock)
            assert (await client.inspect(VOLUME))["state"] == "open"

    play(scenario)


def test_a_silent_peer_is_closed_at_the_deadline(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def scenario(rig: Rig) -> None:
        with await rig.raw() as silent, await rig.raw() as slow:
            await asyncio.get_running_loop().sock_sendall(slow, LENGTH.pack(100) + b"x")
            assert await closed_by_peer(silent)
            assert await closed_by_peer(slow)
        assert rig.server._handshakes == 0

    play(scenario)


def test_past_the_cap_of_handshakes_the_new_are_refused_and_the_old_kept(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKES_MAX", 4)

    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        client = await rig.client()
        held = [await rig.raw() for _ in range(4)]
        greetings = [parse_greeting(await recv_message(sock)) for sock in held]
        with await rig.raw() as refused:
            assert await closed_by_peer(refused)
        assert (await client.inspect(VOLUME))["state"] == "open"
        hello = make_hello(greetings[0], key=KEY, role=Role.CONTROL, engine_id="A")
        await send_message(held[0], hello.to_wire())
        check_answer(await recv_message(held[0]), key=KEY, greeting=greetings[0], hello=hello)
        async with await rig.client():  # a slot is free again
            pass
        for sock in held:
            sock.close()
        await client.close()

    play(scenario)


def test_past_the_cap_of_control_connections_a_new_one_is_told(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CONTROL_CONNECTIONS_MAX", 2)

    async def scenario(rig: Rig) -> None:
        async with await rig.client() as first, await rig.client() as second:
            await first.status()
            await second.status()
            with pytest.raises(Unreachable, match="2 connections are open"):
                await rig.client()

    play(scenario)


def test_past_the_cap_of_sessions_a_new_one_is_told(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "SESSIONS_PER_REPLICA_MAX", 2)

    async def scenario(rig: Rig) -> None:
        await rig.prepare()
        sockets = [await rig.open(Role.PEER) for _ in range(2)]
        with pytest.raises(BadRequest, match="has 2 sessions"):
            await rig.open(Role.PEER)
        rig.io.end_session(VOLUME, 1)
        sockets.append(await rig.open(Role.DATA))
        for sock in sockets:
            sock.close()

    play(scenario)


def test_no_descriptors_left_is_waited_out(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE_S", 0.001)

    async def scenario(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        original, failures = loop.sock_accept, iter([OSError(24, "Too many open files")] * 3)

        async def accept(sock: socket.socket) -> object:
            for failure in failures:
                raise failure
            return await original(sock)

        async with await rig.client() as client:  # the next accept is the original one already
            monkeypatch.setattr(loop, "sock_accept", accept)
            async with await rig.client(), await rig.client():
                await client.status()

    play(scenario)


def test_a_bug_in_one_connection_does_not_end_the_server(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.prepare()

        async def bug(*args: object, **kwargs: object) -> None:
            raise RuntimeError("bug")

        with monkeypatch.context() as patch:
            patch.setattr(rig.server, "_hello", bug)
            with await rig.raw() as sock:
                assert await closed_by_peer(sock)
        async with await rig.client() as client:
            assert (await client.inspect(VOLUME))["state"] == "open"

    play(scenario)


def test_stopping_closes_connections_finishes_calls_and_closes_stores(tmp_path: Path) -> None:
    async def main() -> None:
        started, gate = asyncio.Event(), asyncio.Event()
        async with serving(tmp_path) as rig:
            await rig.prepare()
            client = await rig.client()
            original = rig.io.set_epoch

            async def slow(volume_id: str, epoch: int) -> None:
                started.set()
                await gate.wait()
                await original(volume_id, epoch)

            rig.io.set_epoch = slow  # type: ignore[method-assign]
            claim = asyncio.ensure_future(client.claim(VOLUME, epoch=2, engine_id="B"))
            await started.wait()
            asyncio.get_running_loop().call_later(0.01, gate.set)
        with pytest.raises(StorageError):
            await claim
        assert rig.io.names()[-4:] == ["set_epoch", "close_store", "write_meta", "shutdown"]
        with pytest.raises(Unreachable):
            await rig.client()

    asyncio.run(main())


def test_the_greeting_of_another_version_is_refused_by_the_client(play: Play) -> None:
    async def scenario(rig: Rig) -> None:
        with await rig.raw() as sock:
            greeting = await recv_message(sock)
            with pytest.raises(ProtocolViolation):
                parse_greeting(greeting | {"dolmen": 2})

    play(scenario)
