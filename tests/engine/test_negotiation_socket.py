"""NBD negotiation over a socket: what is read, what is drained, how it ends. And real clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.negotiation import (
    OPTION_COUNT_MAX,
    OPTION_DATA_BYTES_MAX,
    OPTION_DRAIN_BYTES_MAX,
    Export,
    ExportTable,
    Negotiated,
    negotiate,
)
from tests.engine import nbd_messages as nbd
from tests.engine.memory_export import MemoryExport

SIZE = 8 * 1024 * 1024
TABLE = ExportTable([Export("main", SIZE, read_only=False, description="the volume")])
BEGUN = Negotiated(structured=False, meta_context=0, read_only=False, export="main")


async def _talk(sent: bytes, *, then_close: bool) -> tuple[Negotiated | None, bytes, bytes]:
    """Negotiate with a client that sends ``sent``. Returns the result, what the client received,
    and what the server left unread in the socket."""
    server, client = socket.socketpair()
    loop = asyncio.get_running_loop()
    received = bytearray()

    async def read_all() -> None:
        with contextlib.suppress(ConnectionError):
            while part := await loop.sock_recv(client, 65536):
                received.extend(part)

    async def write_all() -> None:
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(client, sent)
            if then_close:
                client.shutdown(socket.SHUT_WR)

    with server, client:
        server.setblocking(False)
        client.setblocking(False)
        reader = asyncio.create_task(read_all())
        writer = asyncio.create_task(write_all())
        result = await asyncio.wait_for(negotiate(server, TABLE), 10)
        unread = b""
        with contextlib.suppress(BlockingIOError):
            unread = server.recv(1 << 20)
        server.close()
        await asyncio.gather(reader, writer)
    return result, bytes(received), unread


def talk(sent: bytes, *, then_close: bool = False) -> tuple[Negotiated | None, bytes, bytes]:
    return asyncio.run(_talk(sent, then_close=then_close))


def test_the_first_byte_of_transmission_stays_in_the_socket() -> None:
    go = nbd.FIXED_NO_ZEROES + nbd.option(nbd.GO, nbd.info_data(b"main"))
    result, received, unread = talk(go + b"first request")
    assert result == BEGUN
    assert received.startswith(nbd.GREETING)
    assert unread == b"first request"


def test_export_name_leaves_the_first_byte_too() -> None:
    result, received, unread = talk(nbd.FIXED + nbd.option(nbd.EXPORT_NAME, b"main") + b"first request")
    assert result == BEGUN
    assert len(received) == len(nbd.GREETING) + 10 + 124
    assert unread == b"first request"


def test_a_client_that_ends_at_any_byte_is_no_error() -> None:
    whole = nbd.FIXED_NO_ZEROES + nbd.option(nbd.LIST) + nbd.option(nbd.GO, nbd.info_data(b"main", [1, 3]))
    for length in range(len(whole)):
        result, received, _ = talk(whole[:length], then_close=True)
        assert result is None
        assert received.startswith(nbd.GREETING)


def test_a_wrong_option_magic_ends_the_connection() -> None:
    result, received, _ = talk(nbd.FIXED_NO_ZEROES + b"IHAVEOPX" + bytes(8))
    assert (result, received) == (None, nbd.GREETING)


def test_an_oversized_option_is_drained_and_answered() -> None:
    data = bytes(OPTION_DATA_BYTES_MAX + 1)
    drained = bytes(OPTION_DRAIN_BYTES_MAX)
    sent = nbd.FIXED_NO_ZEROES + nbd.option(nbd.GO, data) + nbd.option(77, drained)
    result, received, unread = talk(sent + nbd.option(nbd.GO, nbd.info_data()) + b"next")
    replies = nbd.parse_replies(received[len(nbd.GREETING) :])
    assert [r.type for r in replies[:2]] == [nbd.ERR_TOO_BIG, nbd.ERR_UNSUP]
    assert (result, unread) == (BEGUN, b"next")


@pytest.mark.parametrize("length", [OPTION_DRAIN_BYTES_MAX + 1, 0xFFFFFFFF])
def test_an_absurd_length_ends_the_connection_unread(length: int) -> None:
    result, received, _ = talk(nbd.FIXED_NO_ZEROES + nbd.option(nbd.GO, b"", length=length))
    assert (result, received) == (None, nbd.GREETING)


def test_a_flood_of_options_ends_the_connection() -> None:
    result, received, _ = talk(nbd.FIXED_NO_ZEROES + nbd.option(99) * (OPTION_COUNT_MAX + 10))
    assert result is None
    assert len(nbd.parse_replies(received[len(nbd.GREETING) :])) == OPTION_COUNT_MAX


@pytest.mark.parametrize(
    "sent", [b"", nbd.FIXED_NO_ZEROES, nbd.FIXED_NO_ZEROES + nbd.option(nbd.GO, length=9)]
)
def test_a_client_that_stalls_is_left_at_the_deadline(sent: bytes) -> None:
    async def scenario() -> None:
        server, client = socket.socketpair()
        with server, client:
            server.setblocking(False)
            client.sendall(sent)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(negotiate(server, TABLE), 0.05)

    asyncio.run(scenario())


pieces = st.one_of(
    st.binary(max_size=60),
    st.builds(nbd.option, st.integers(0, 12), st.binary(max_size=60)),
    st.builds(nbd.option, st.integers(0, 12), st.just(nbd.info_data(b"main", [1, 2, 3]))),
    st.builds(nbd.option, st.integers(0, 12), st.just(nbd.meta_data(b"main", [b"base:allocation"]))),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    flags=st.sampled_from([nbd.FIXED_NO_ZEROES, nbd.FIXED, nbd.PLAIN]) | st.binary(max_size=4),
    stream=st.lists(pieces, max_size=8).map(b"".join),
)
def test_random_bytes_end_in_a_verdict(flags: bytes, stream: bytes) -> None:
    result, received, _ = talk(flags + stream, then_close=True)
    assert result is None or result.export == "main"
    assert received.startswith(nbd.GREETING)


NBDSH = ("/usr/bin/python3", "-m", "nbd")
"""nbdsh by the interpreter that has Debian's binding, whichever python3 comes first in PATH."""


# --- real clients, over a unix socket, with a transmission phase in memory behind negotiation


def with_server(
    tmp_path: Path,
    clients: Callable[[str], Awaitable[None]],
    *,
    read_only: bool = False,
) -> tuple[MemoryExport, list[Negotiated | None]]:
    """Run ``clients`` against a server. Returns the export and each connection's negotiation."""
    export = MemoryExport(SIZE)
    table = ExportTable([Export("main", SIZE, read_only=read_only, description="the volume")])
    results: list[Negotiated | None] = []

    async def serve_one(sock: socket.socket) -> None:
        with sock:
            result = await asyncio.wait_for(negotiate(sock, table), 10)
            results.append(result)
            if result is not None:
                await export.serve(sock, structured=result.structured, meta_context=result.meta_context)

    async def scenario() -> None:
        path = str(tmp_path / "nbd.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.TaskGroup() as tasks:

                async def accept() -> None:
                    while True:
                        sock, _ = await loop.sock_accept(listener)
                        sock.setblocking(False)
                        tasks.create_task(serve_one(sock))

                accepting = tasks.create_task(accept())
                try:
                    await clients(f"nbd+unix:///main?socket={path}")
                finally:
                    accepting.cancel()

    asyncio.run(scenario())
    return export, results


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, f"{command}: {output.decode()}"
    return output.decode()


def test_nbdinfo_sees_the_export(tmp_path: Path) -> None:
    outputs: list[str] = []

    async def clients(uri: str) -> None:
        outputs.append(await run("nbdinfo", uri))
        outputs.append(await run("nbdinfo", "--list", uri))
        outputs.append(await run("nbdinfo", "--map", uri))

    _, results = with_server(tmp_path, clients)
    for line in (
        f"export-size: {SIZE} (8M)",
        "description: the volume",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ):
        assert line in outputs[0]
    assert 'export="main"' in outputs[1]
    assert "data" in outputs[2]
    assert Negotiated(structured=True, meta_context=1, read_only=False, export="main") in results


def test_nbdinfo_sees_a_read_only_export(tmp_path: Path) -> None:
    async def clients(uri: str) -> None:
        output = await run("nbdinfo", uri)
        assert "is_read_only: true" in output
        assert "can_trim: false" in output

    with_server(tmp_path, clients, read_only=True)


def test_qemu_img_copies_an_image_in_and_out(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(range(256)) * (SIZE // 256))

    async def clients(uri: str) -> None:
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), uri)
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri)

    export, results = with_server(tmp_path, clients)
    assert bytes(export.data) == image.read_bytes()
    assert all(result is not None and result.structured for result in results)


def test_a_client_that_speaks_only_export_name_works(tmp_path: Path) -> None:
    script = (
        "h.set_handshake_flags(0)\n"
        "h.set_request_structured_replies(False)\n"
        "h.connect_uri({uri!r})\n"
        "h.pwrite(b'hello', 4096)\n"
        "assert h.pread(5, 4096) == b'hello'\n"
        "assert not h.get_structured_replies_negotiated()\n"
    )

    async def clients(uri: str) -> None:
        await run(*NBDSH, "-c", script.format(uri=uri))

    export, results = with_server(tmp_path, clients)
    assert export.data[4096:4101] == b"hello"
    assert results == [BEGUN]


def test_a_client_in_option_mode_may_ask_for_everything_in_turn(tmp_path: Path) -> None:
    script = (
        "h.set_opt_mode(True)\n"
        "h.set_full_info(True)\n"
        "h.connect_unix({path!r})\n"
        "names = []\n"
        "h.opt_list(lambda name, description: names.append((name, description)))\n"
        "assert names == [('main', 'the volume')], names\n"
        "h.set_export_name('other')\n"
        "try:\n"
        "    h.opt_info()\n"
        "    raise SystemExit('an unknown export was found')\n"
        "except nbd.Error:\n"
        "    pass\n"
        "h.set_export_name('')\n"
        "h.add_meta_context('base:allocation')\n"
        "contexts = []\n"
        "h.opt_list_meta_context(contexts.append)\n"
        "assert contexts == ['base:allocation'], contexts\n"
        "h.opt_info()\n"
        "assert h.get_canonical_export_name() == 'main'\n"
        "assert h.get_export_description() == 'the volume'\n"
        "h.opt_go()\n"
        "assert h.can_meta_context('base:allocation')\n"
        "h.shutdown()\n"
    )

    async def clients(uri: str) -> None:
        await run(*NBDSH, "-c", script.format(path=uri.partition("socket=")[2]))

    _, results = with_server(tmp_path, clients)
    assert results == [Negotiated(structured=True, meta_context=1, read_only=False, export="main")]


def test_an_aborting_client_is_no_error(tmp_path: Path) -> None:
    async def clients(uri: str) -> None:
        path = uri.partition("socket=")[2]
        await run(*NBDSH, "-c", f"h.set_opt_mode(True)\nh.connect_unix({path!r})\nh.opt_abort()\n")

    _, results = with_server(tmp_path, clients)
    assert results == [None]


def test_the_reply_to_go_has_no_padding() -> None:
    # NO_ZEROES not negotiated: the zeroes belong to EXPORT_NAME alone.
    _, received, _ = talk(nbd.FIXED + nbd.option(nbd.GO, nbd.info_data()))
    *_, last = nbd.parse_replies(received[len(nbd.GREETING) :])
    assert (last.type, last.data) == (nbd.ACK, b"")
    assert struct.unpack(">Q", received[:8])[0] == 0x4E42444D41474943
