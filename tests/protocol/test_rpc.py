"""Control messages: concurrency, limits, errors, garbage, and lost connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import (
    BadRequest,
    ProtocolViolation,
    StorageError,
    Timeout,
    Unreachable,
    all_error_classes,
)
from protocol.limits import RPC_BYTES_MAX
from protocol.rpc import (
    CALLS_IN_FLIGHT_MAX,
    LENGTH,
    LIST_ITEMS_MAX,
    Handler,
    RpcClient,
    pack,
    read_message,
    serve_calls,
    unpack,
)


async def with_client(handler: Handler, client: Callable[[RpcClient], Awaitable[None]]) -> None:
    """Run ``client`` against ``serve_calls(handler)`` over a real connection."""
    served: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.append(task)
        await serve_calls(reader, writer, handler)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        rpc = RpcClient(reader, writer, peer="server")
        try:
            await client(rpc)
        finally:
            await rpc.close()
            await asyncio.wait_for(asyncio.gather(*served), 10)


async def echo(name: str, args: dict[str, Any]) -> Any:
    return {"name": name, "args": args}


def test_a_call_is_answered() -> None:
    async def client(rpc: RpcClient) -> None:
        assert await rpc.call("a.b", x=1, y=b"z") == {"name": "a.b", "args": {"x": 1, "y": b"z"}}

    asyncio.run(with_client(echo, client))


def test_calls_on_one_connection_overtake_each_other() -> None:
    gate = asyncio.Event()

    async def handler(name: str, args: dict[str, Any]) -> Any:
        if name == "slow":
            await gate.wait()
        else:
            gate.set()
        return name

    async def client(rpc: RpcClient) -> None:
        slow = asyncio.ensure_future(rpc.call("slow"))
        assert await rpc.call("quick") == "quick"
        assert await slow == "slow"

    asyncio.run(with_client(handler, client))


def test_many_concurrent_calls_with_large_bodies_are_all_matched() -> None:
    async def client(rpc: RpcClient) -> None:
        bodies = [bytes([i % 256]) * (1000 * i) for i in range(200)]
        answers = await asyncio.gather(*(rpc.call("x", body=body) for body in bodies))
        assert [answer["args"]["body"] for answer in answers] == bodies

    asyncio.run(with_client(echo, client))


def test_no_more_calls_run_than_the_limit_and_none_is_lost() -> None:
    running = most = 0

    async def handler(name: str, args: dict[str, Any]) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10):
            await asyncio.sleep(0)
        running -= 1
        return args["i"]

    async def client(rpc: RpcClient) -> None:
        count = 3 * CALLS_IN_FLIGHT_MAX
        assert await asyncio.gather(*(rpc.call("x", i=i) for i in range(count))) == list(range(count))

    asyncio.run(with_client(handler, client))
    assert 1 < most <= CALLS_IN_FLIGHT_MAX


@pytest.mark.parametrize("cls", [StorageError, *all_error_classes().values()], ids=lambda cls: cls.code)
def test_every_error_is_raised_at_the_caller_as_itself(cls: type[StorageError]) -> None:
    async def handler(name: str, args: dict[str, Any]) -> Any:
        raise cls("sorry", volume="v", path="\udcff", cause=ValueError("x"))

    async def client(rpc: RpcClient) -> None:
        with pytest.raises(cls, match="sorry") as raised:
            await rpc.call("x")
        assert type(raised.value) is cls
        assert raised.value.fields["volume"] == "v"
        with pytest.raises(cls):  # the connection is still good
            await rpc.call("x")

    asyncio.run(with_client(handler, client))


@pytest.mark.parametrize("wrong", [KeyError("bug"), "not packable", "too long"])
def test_a_bug_in_one_call_is_logged_and_disturbs_no_other(
    wrong: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(name: str, args: dict[str, Any]) -> Any:
        if name == "good":
            return 1
        if isinstance(wrong, Exception):
            raise wrong
        return object() if wrong == "not packable" else b"x" * (RPC_BYTES_MAX + 1)

    async def client(rpc: RpcClient) -> None:
        with pytest.raises(StorageError, match="internal error in bad") as raised:
            await rpc.call("bad")
        assert raised.value.code == "internal"
        assert await rpc.call("good") == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(with_client(handler, client))
    assert "call bad failed by a bug" in caplog.text


def test_calls_under_way_are_cancelled_when_the_peer_goes() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(name: str, args: dict[str, Any]) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def client(rpc: RpcClient) -> None:
        call = asyncio.ensure_future(rpc.call("x"))
        await started.wait()
        await rpc.close()
        with pytest.raises(Unreachable, match="closed here"):
            await call
        await asyncio.wait_for(cancelled.wait(), 10)
        with pytest.raises(Unreachable):
            await rpc.call("y")

    asyncio.run(with_client(handler, client))


def test_a_call_past_its_deadline_times_out_and_its_late_answer_is_dropped() -> None:
    gate = asyncio.Event()

    async def handler(name: str, args: dict[str, Any]) -> Any:
        if name == "slow":
            await gate.wait()
        return name

    async def client(rpc: RpcClient) -> None:
        with pytest.raises(Timeout, match="slow at server"):
            await rpc.call("slow", timeout_s=0.01)
        gate.set()
        assert await rpc.call("quick") == "quick"

    asyncio.run(with_client(handler, client))


def test_a_lost_connection_fails_every_waiting_call() -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(2):
                await read_message(reader)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            rpc = RpcClient(reader, writer, peer="server")
            found = await asyncio.gather(rpc.call("a"), rpc.call("b"), return_exceptions=True)
            assert [type(error) for error in found] == [Unreachable, Unreachable]
            assert rpc.lost.is_set()
            await rpc.close()

    asyncio.run(main())


GARBAGE = [
    LENGTH.pack(0),
    LENGTH.pack(RPC_BYTES_MAX + 1),
    LENGTH.pack(2**32 - 1),
    LENGTH.pack(3) + b"\xc1\xc1\xc1",
    LENGTH.pack(5) + b"\xdd\xff\xff\xff\xff",
    LENGTH.pack(100_000) + b"\x91" * 100_000,
    pack([1]),
    pack({"id": "1", "call": "x", "args": {}}),
    pack({"id": 1, "call": "x", "args": []}),
    pack({"id": 1, "call": "x"}),
    LENGTH.pack(100) + b"cut short",
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_closes_that_connection_and_cancels_its_calls(data: bytes) -> None:
    async def main() -> None:
        handled = []

        async def handler(name: str, args: dict[str, Any]) -> Any:
            handled.append(name)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await serve_calls(reader, writer, handler)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            writer.write(data)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        assert handled == []

    asyncio.run(main())


@given(st.binary(max_size=400))
def test_any_bytes_unpack_or_are_refused(body: bytes) -> None:
    try:
        unpack(body)
    except ProtocolViolation:
        pass


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_any_plain_value_survives_the_round_trip(value: object) -> None:
    assert unpack(pack(value)[LENGTH.size :]) == value


@given(st.binary(max_size=300), st.integers(1, 40))
def test_a_stream_of_any_bytes_ends_without_a_bug(data: bytes, cut: int) -> None:
    async def main() -> None:
        reader = asyncio.StreamReader()
        for at in range(0, len(data), cut):
            reader.feed_data(data[at : at + cut])
        reader.feed_eof()
        with pytest.raises((ProtocolViolation, asyncio.IncompleteReadError)):
            while True:
                await read_message(reader)

    asyncio.run(main())


def test_a_list_with_a_false_length_costs_nothing() -> None:
    body = b"\xdd" + (LIST_ITEMS_MAX + 1).to_bytes(4, "big")
    with pytest.raises(ProtocolViolation):
        unpack(body + b"\xc0" * 100)
    assert len(unpack(msgpack.packb([None] * LIST_ITEMS_MAX))) == LIST_ITEMS_MAX


def test_a_callers_bad_request_reaches_nobody_else() -> None:
    async def handler(name: str, args: dict[str, Any]) -> Any:
        if name == "bad":
            raise BadRequest(reason="no")
        return name

    async def client(rpc: RpcClient) -> None:
        found = await asyncio.gather(*(rpc.call(n) for n in ("bad", "good", "bad")), return_exceptions=True)
        assert [type(f) for f in found] == [BadRequest, str, BadRequest]

    asyncio.run(with_client(handler, client))
