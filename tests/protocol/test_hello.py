"""The hello: who is let in, who is not, and that neither side reads ahead."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.connect import connect, connect_socket, recv_message, send_message
from protocol.errors import NotAuthenticated, ProtocolViolation, StaleEpoch, StorageError, Unreachable
from protocol.hello import (
    HELLO_BYTES_MAX,
    KEY_BYTES,
    NONCE_BYTES,
    Greeting,
    Hello,
    Role,
    check_answer,
    make_answer,
    make_hello,
    make_refusal,
    parse_greeting,
    parse_hello,
)
from protocol.rpc import LENGTH, pack

KEY = bytes(range(KEY_BYTES))
NONCE = bytes(NONCE_BYTES)
GREETING = Greeting(nonce=NONCE, boot_id="boot", process_id="process")


def hello(**changed: Any) -> Hello:
    fields = {"role": Role.DATA, "volume_id": "v", "epoch": 3, "engine_id": "e"} | changed
    return make_hello(GREETING, key=KEY, **fields)


def test_a_hello_with_the_clusters_key_is_accepted() -> None:
    for role in Role:
        made = hello(role=role)
        assert parse_hello(made.to_wire(), key=KEY, nonce=NONCE) == made


def test_another_key_is_refused() -> None:
    with pytest.raises(NotAuthenticated):
        parse_hello(hello().to_wire(), key=os.urandom(KEY_BYTES), nonce=NONCE)


def test_a_proof_replayed_under_another_nonce_is_refused() -> None:
    with pytest.raises(NotAuthenticated):
        parse_hello(hello().to_wire(), key=KEY, nonce=os.urandom(NONCE_BYTES))


@pytest.mark.parametrize(
    "changed",
    [
        {"role": Role.CONTROL},
        {"volume_id": "w"},
        {"epoch": 4},
        {"engine_id": "f"},
        {"nonce": b"x" * NONCE_BYTES},
        {"proof": b""},
    ],
)
def test_a_proof_covers_every_field(changed: dict[str, Any]) -> None:
    with pytest.raises(NotAuthenticated):
        parse_hello(replace(hello(), **changed).to_wire(), key=KEY, nonce=NONCE)


def test_fields_cannot_be_shifted_under_one_proof() -> None:
    shifted = hello(volume_id="v\x003\x00x", engine_id="e")
    with pytest.raises(ProtocolViolation):
        parse_hello(shifted.to_wire(), key=KEY, nonce=NONCE)


@pytest.mark.parametrize(
    "changed",
    [
        {"role": "root"},
        {"role": 1},
        {"epoch": -1},
        {"epoch": 2**63},
        {"epoch": "3"},
        {"volume_id": None},
        {"volume_id": "x" * 201},
        {"engine_id": "x" * 201},
        {"proof": "text"},
        {"nonce": b"short"},
        {"nonce": None},
    ],
)
def test_a_malformed_hello_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        parse_hello(hello().to_wire() | changed, key=KEY, nonce=NONCE)


@pytest.mark.parametrize(
    "wire",
    [
        None,
        {},
        GREETING.to_wire() | {"dolmen": 2},
        GREETING.to_wire() | {"dolmen": "1"},
        GREETING.to_wire() | {"nonce": b"short"},
        GREETING.to_wire() | {"nonce": "x" * NONCE_BYTES},
        GREETING.to_wire() | {"boot_id": 1},
    ],
)
def test_a_malformed_greeting_or_another_version_is_refused(wire: object) -> None:
    with pytest.raises(ProtocolViolation):
        parse_greeting(wire)


def test_another_version_is_named() -> None:
    with pytest.raises(ProtocolViolation, match="expected protocol version 1, got 2"):
        parse_greeting({"dolmen": 2})


def check(answer: Any, made: Hello, *, key: bytes = KEY) -> None:
    check_answer(answer, key=key, greeting=GREETING, hello=made)


REFUSAL = StaleEpoch(volume="v", offered=1, current=4)


def test_a_server_with_the_clusters_key_is_believed() -> None:
    made = hello()
    check(make_answer(made, key=KEY, nonce=NONCE), made)
    with pytest.raises(StaleEpoch, match="older than 4"):
        check(make_answer(made, REFUSAL, key=KEY, nonce=NONCE), made)


@pytest.mark.parametrize("error", [None, REFUSAL])
def test_a_server_with_another_key_is_not_believed(error: StorageError | None) -> None:
    made = hello()
    with pytest.raises(NotAuthenticated):
        check(make_answer(made, error, key=os.urandom(KEY_BYTES), nonce=NONCE), made)


def test_a_clients_proof_does_not_pass_for_a_servers_nor_the_other_way_round() -> None:
    made = hello()
    with pytest.raises(NotAuthenticated):
        check({"ok": {}, "proof": made.proof}, made)
    answer = make_answer(made, key=KEY, nonce=NONCE)
    with pytest.raises(NotAuthenticated):
        parse_hello(made.to_wire() | {"proof": answer["proof"]}, key=KEY, nonce=NONCE)


def test_an_answer_to_one_hello_does_not_answer_another() -> None:
    # Every hello has a nonce of its own, so that not even the same hello is answered by a recording.
    recorded = make_answer(hello(), key=KEY, nonce=NONCE)
    for other in (hello(), hello(role=Role.PEER), hello(volume_id="w"), hello(epoch=4)):
        with pytest.raises(NotAuthenticated):
            check(recorded, other)
    assert hello().nonce != hello().nonce


@pytest.mark.parametrize("answer", [{"ok": {}}, {"error": REFUSAL.to_wire()}, {"ok": {}, "proof": "text"}])
def test_an_answer_without_a_proof_is_not_believed(answer: Any) -> None:
    with pytest.raises(NotAuthenticated):
        check(answer, hello())


def test_a_refused_hello_is_told_so_without_a_proof() -> None:
    with pytest.raises(NotAuthenticated):
        check(make_refusal(NotAuthenticated()), hello())
    with pytest.raises(ProtocolViolation, match="expected a hello"):
        check(make_refusal(ProtocolViolation(expected="a hello", got="int")), hello())


wires = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(wires)
def test_whatever_stands_for_a_hello_is_refused(wire: object) -> None:
    with pytest.raises((ProtocolViolation, NotAuthenticated)):
        parse_hello(wire, key=KEY, nonce=NONCE)
    with pytest.raises(ProtocolViolation):
        parse_greeting(wire)
    with pytest.raises((ProtocolViolation, NotAuthenticated)):
        check(wire, hello())


# -- on real sockets

Script = Callable[[socket.socket], Awaitable[None]]


async def with_server(script: Script, client: Callable[[int], Awaitable[None]]) -> None:
    """Run ``client(port)`` against a server that treats its one connection by ``script``."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def serve() -> None:
            sock, _ = await loop.sock_accept(listener)
            with sock:
                sock.setblocking(False)
                await script(sock)

        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(serve())
            await client(listener.getsockname()[1])
            serving.cancel()


async def honest(sock: socket.socket, error: StorageError | None = None) -> dict[str, Any]:
    """The answer of a server that holds the key."""
    await send_message(sock, GREETING.to_wire())
    return make_answer(
        parse_hello(await recv_message(sock), key=KEY, nonce=NONCE), error, key=KEY, nonce=NONCE
    )


def test_nothing_past_the_servers_ok_is_read_ahead() -> None:
    async def script(sock: socket.socket) -> None:
        answer = pack(await honest(sock))
        await asyncio.get_running_loop().sock_sendall(sock, answer + b"FRAME")

    async def client(port: int) -> None:
        sock, greeting = await connect_socket(
            "localhost", port, key=KEY, role=Role.DATA, volume_id="v", epoch=3, engine_id="e"
        )
        with sock:
            assert greeting == GREETING
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"FRAME"

    asyncio.run(with_server(script, client))


def test_a_control_connection_continues_as_streams() -> None:
    async def script(sock: socket.socket) -> None:
        answer = pack(await honest(sock))
        await asyncio.get_running_loop().sock_sendall(sock, answer + b"MESSAGE")

    async def client(port: int) -> None:
        reader, writer = await connect("127.0.0.1", port, key=KEY, engine_id="e")
        assert await reader.read() == b"MESSAGE"
        writer.close()

    asyncio.run(with_server(script, client))


def expect(
    error: type[StorageError], script: Script, *, match: str | None = None, timeout_s: float = 5.0
) -> None:
    async def client(port: int) -> None:
        with pytest.raises(error, match=match):
            await connect_socket(
                "127.0.0.1",
                port,
                key=KEY,
                role=Role.DATA,
                volume_id="v",
                epoch=1,
                engine_id="e",
                timeout_s=timeout_s,
            )

    asyncio.run(with_server(script, client))


def test_the_servers_refusal_is_raised_as_itself() -> None:
    async def script(sock: socket.socket) -> None:
        await send_message(sock, await honest(sock, REFUSAL))

    expect(StaleEpoch, script, match="epoch 1 is older than 4")


def test_a_server_that_holds_no_key_is_not_obeyed() -> None:
    for answer in ({"ok": {}}, {"error": REFUSAL.to_wire()}):

        async def script(sock: socket.socket, answer: Any = answer) -> None:
            await send_message(sock, GREETING.to_wire())
            await recv_message(sock)
            await send_message(sock, answer)

        expect(NotAuthenticated, script)


def test_a_server_that_closes_is_unreachable() -> None:
    async def script(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, b"\x10\0\0\0ab")

    expect(Unreachable, script, match="closed during the hello")


def test_a_server_that_says_nothing_is_unreachable_after_the_deadline() -> None:
    async def script(sock: socket.socket) -> None:
        await asyncio.Event().wait()

    expect(Unreachable, script, match="no answer", timeout_s=0.05)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        LENGTH.pack(HELLO_BYTES_MAX + 1),
        LENGTH.pack(0),
        LENGTH.pack(3) + b"\xc1\xc1\xc1",
        pack({"dolmen": 7}),
        pack([1, 2, 3]),
    ],
)
def test_a_server_that_is_not_ours_is_refused(data: bytes) -> None:
    async def script(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, data)
        await asyncio.Event().wait()

    expect(ProtocolViolation, script)


def test_nobody_listening_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def client() -> None:
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
            await connect("127.0.0.1", port, key=KEY, engine_id="e")

    asyncio.run(client())
