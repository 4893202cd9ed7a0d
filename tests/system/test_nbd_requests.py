"""The NBD protocol document, request by request, against the real engine."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from tests.support.nbd_clients import ReconnectingClient, connect
from tests.support.nbd_library import nbd
from tests.system import raw_nbd
from tests.system.conftest import VOLUME_BYTES, Volume
from tests.system.raw_nbd import RawNbd

EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW = 1, 5, 22, 28, 75
KIB, MIB = 1024, 1024 * 1024
END = VOLUME_BYTES


@pytest.fixture
def raw(shared_volume: Volume) -> Iterator[RawNbd]:
    with RawNbd(shared_volume.socket) as client:
        yield client


@pytest.fixture
def client(shared_volume: Volume) -> Iterator[ReconnectingClient]:
    with ReconnectingClient(shared_volume.uri) as found:
        yield found


# kind, offset, length, flags, payload, error
REFUSED = [
    ("an unknown command", 99, 0, 0, 0, b"", EINVAL),
    ("an unknown flag", raw_nbd.READ, 0, 512, 0x8000, b"", EINVAL),
    ("a flag that is not this command's", raw_nbd.WRITE, 0, 512, raw_nbd.NO_HOLE, b"x" * 512, EINVAL),
    ("a read past the end", raw_nbd.READ, END - 512, 1024, 0, b"", EINVAL),
    ("a read whose end overflows", raw_nbd.READ, 2**64 - 512, 1024, 0, b"", EINVAL),
    ("a write past the end", raw_nbd.WRITE, END - 512, 1024, 0, b"x" * 1024, ENOSPC),
    ("a write whose end overflows", raw_nbd.WRITE, 2**64 - 512, 1024, 0, b"x" * 1024, ENOSPC),
    ("zeroes past the end", raw_nbd.WRITE_ZEROES, END - 512, 1024, 0, b"", ENOSPC),
    ("a trim past the end", raw_nbd.TRIM, END - 512, 1024, 0, b"", EINVAL),
    ("a cache past the end", raw_nbd.CACHE, END, 512, 0, b"", EINVAL),
    ("a block status past the end", raw_nbd.BLOCK_STATUS, END - 512, 1024, 0, b"", EINVAL),
    ("a read over the maximum", raw_nbd.READ, 0, 32 * MIB + 512, 0, b"", EINVAL),
    ("a read of 4 GiB", raw_nbd.READ, 0, 2**32 - 1, 0, b"", EINVAL),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
@pytest.mark.parametrize("structured", [True, False])
def test_a_refused_request_gets_its_error_and_keeps_the_connection(
    shared_volume: Volume, case: tuple[str, int, int, int, int, bytes, int], structured: bool
) -> None:
    _, kind, offset, length, flags, payload, error = case
    with RawNbd(shared_volume.socket, structured=structured) as client:
        assert client.request(kind, offset, length, flags=flags, data=payload).error == error
        assert client.request(raw_nbd.WRITE, 8192, 512, data=b"y" * 512).error == 0
        assert client.request(raw_nbd.READ, 8192, 512).data == b"y" * 512


def test_an_oversized_write_is_swallowed_and_refused(raw: RawNbd) -> None:
    length = 32 * MIB + 512
    assert raw.request(raw_nbd.WRITE, 0, length, data=bytes(length)).error == EINVAL
    assert raw.request(raw_nbd.READ, 0, 512).error == 0


def test_block_status_without_its_context_is_refused(shared_volume: Volume) -> None:
    with RawNbd(shared_volume.socket, meta=False) as client:
        assert client.request(raw_nbd.BLOCK_STATUS, 0, 4096).error == EINVAL
        assert client.request(raw_nbd.READ, 0, 512).error == 0


def test_a_wrong_magic_ends_the_connection(raw: RawNbd) -> None:
    raw.send(b"\xde\xad\xbe\xef" + bytes(24))
    assert raw.is_closed()


def test_disconnect_ends_the_connection(raw: RawNbd) -> None:
    raw.send(struct.pack(">IHHQQI", raw_nbd.REQUEST_MAGIC, 0, raw_nbd.DISC, 0, 0, 0))
    assert raw.is_closed()


@pytest.mark.parametrize("length", [1, 512, 65536, 4 * MIB])
def test_a_read_that_must_not_be_cut_comes_in_one_chunk(raw: RawNbd, length: int) -> None:
    raw.request(raw_nbd.WRITE_ZEROES, 0, 8 * MIB)
    raw.request(raw_nbd.WRITE, 4096, 4096, data=b"z" * 4096)
    answer = raw.request(raw_nbd.READ, 100, length, flags=raw_nbd.DF)
    assert answer.error == 0
    assert [chunk for chunk, _ in answer.chunks if chunk != raw_nbd.NONE] == [raw_nbd.OFFSET_DATA]
    expected = (bytes(4096) + b"z" * 4096 + bytes(8 * MIB))[100 : 100 + length]
    assert answer.data == expected


@pytest.mark.parametrize(
    "kind", [raw_nbd.FLUSH, raw_nbd.TRIM, raw_nbd.CACHE, raw_nbd.WRITE_ZEROES, raw_nbd.READ]
)
def test_fua_is_accepted_on_every_command(raw: RawNbd, kind: int) -> None:
    length = 0 if kind == raw_nbd.FLUSH else 4096
    assert raw.request(kind, 0, length, flags=raw_nbd.FUA).error == 0


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 4095, 4096, 1048575])
@pytest.mark.parametrize("length", [1, 511, 512, 4095, 4096, 4097, 8192, 1048577])
def test_a_write_at_any_alignment_changes_its_bytes_and_no_others(
    client: ReconnectingClient, offset: int, length: int
) -> None:
    start = 16 * MIB
    around = 8192
    client.write(start, b"." * (offset + length + around))
    client.write(start + offset, b"W" * length)
    expected = b"." * offset + b"W" * length + b"." * around
    assert client.read(start, offset + length + around) == expected


@pytest.mark.parametrize("offset", [0, 1, 512, 4095, 4096])
@pytest.mark.parametrize("length", [1, 512, 4096, 4097, 65536, 5 * MIB])
@pytest.mark.parametrize(
    "flags",
    [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA],
    ids=["", "no-hole", "fast", "fua"],
)
def test_zeroes_at_any_alignment_are_zeroes_and_nothing_else_changes(
    client: ReconnectingClient, offset: int, length: int, flags: int
) -> None:
    start, around = 16 * MIB, 8192
    client.write(start, b"." * (offset + length + around))
    try:
        client.zero(start + offset, length, flags)
    except nbd.Error as error:
        assert flags == nbd.CMD_FLAG_FAST_ZERO and error.errno in ("ENOTSUP", "EOPNOTSUPP")
        return
    assert client.read(start, offset + length + around) == b"." * offset + bytes(length) + b"." * around


@pytest.mark.parametrize("offset", [0, 1, 512, 4095, 4096])
@pytest.mark.parametrize("length", [1, 512, 4096, 12289, 5 * MIB])
def test_a_trim_leaves_its_neighbours_alone_and_its_range_stable(
    client: ReconnectingClient, offset: int, length: int
) -> None:
    start, around = 16 * MIB, 8192
    client.write(start, b"." * (offset + length + around))
    client.trim(start + offset, length)
    first = client.read(start, offset + length + around)
    assert first[:offset] == b"." * offset
    assert first[offset + length :] == b"." * around
    assert all(client.read(start, len(first)) == first for _ in range(4)), "replicas differ after a trim"


def test_cache_is_accepted_and_changes_nothing(client: ReconnectingClient) -> None:
    client.write(20 * MIB, b"cached")
    client.call(lambda h: h.cache(MIB, 20 * MIB))
    assert client.read(20 * MIB, 6) == b"cached"


def test_the_largest_request_works(client: ReconnectingClient) -> None:
    payload = random.Random(3).randbytes(32 * MIB)
    client.write(4096, payload)
    assert client.read(4096, 32 * MIB) == payload
    client.zero(0, END)
    assert client.read(0, 32 * MIB) == bytes(32 * MIB)


def test_block_status_tells_data_from_zeroes(volume: Volume) -> None:
    with ReconnectingClient(volume.uri) as client:
        assert client.extents(0, END) == [(END, 3)]
        client.write(1 * MIB, b"x" * MIB)
        client.write(8 * MIB, b"x" * 4096)
        runs = client.extents(0, END)
        assert runs == [
            (1 * MIB, 3),
            (1 * MIB, 0),
            (6 * MIB, 3),
            (4096, 0),
            (END - 8 * MIB - 4096, 3),
        ]
        client.zero(1 * MIB, MIB)
        assert client.extents(0, 8 * MIB)[0][1] & 2, "what was zeroed reads as zeroes"
        inside = client.extents(8 * MIB + 100, 200)
        assert inside == [(200, 0)], "a query need not be aligned"


def test_req_one_gives_one_run(volume: Volume) -> None:
    with RawNbd(volume.socket) as client:
        client.request(raw_nbd.WRITE, MIB, 4096, data=b"x" * 4096)
        answer = client.request(raw_nbd.BLOCK_STATUS, 0, 2 * MIB, flags=raw_nbd.REQ_ONE)
        (payload,) = [payload for chunk, payload in answer.chunks if chunk == raw_nbd.STATUS_CHUNK]
        _, length, state = struct.unpack(">III", payload)
        assert (length, state) == (MIB, 3)


def test_an_acknowledged_write_is_seen_by_every_other_connection_at_once(shared_volume: Volume) -> None:
    with ReconnectingClient(shared_volume.uri) as one, ReconnectingClient(shared_volume.uri) as two:
        for number in range(200):
            text = b"number %04d" % number
            (one, two)[number % 2].write(24 * MIB + number, text)
            assert (two, one)[number % 2].read(24 * MIB + number, len(text)) == text
        two.flush()


def test_many_requests_under_way_at_once_are_all_answered(shared_volume: Volume) -> None:
    handle = connect(shared_volume.uri)
    answers: list[int] = []

    def note(error: object) -> int:
        answers.append(error.value)  # type: ignore[attr-defined]
        return 1

    for number in range(3000):
        offset = 32 * MIB + (number * 7919 % 4096) * 512
        buffer = nbd.Buffer.from_bytearray(bytes([number % 256]) * 512)
        if number % 3:
            handle.aio_pwrite(buffer, offset, note)
        else:
            handle.aio_pread(nbd.Buffer(4096), offset, note)
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.shutdown()
    assert answers == [0] * 3000


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_requests_agrees_with_an_array_of_bytes(volume: Volume, seed: int) -> None:
    chance = random.Random(seed)
    span = 4 * MIB
    base = chance.choice([0, 4 * MIB - 4096, END - span])
    model = bytearray(span)
    with ReconnectingClient(volume.uri) as first, ReconnectingClient(volume.uri) as second:
        for _ in range(400):
            client = chance.choice((first, second))
            length = chance.choice([1, 512, 4096, chance.randrange(1, 20000), chance.randrange(1, 300000)])
            offset = chance.randrange(0, span - length)
            if chance.random() < 0.4:
                offset = offset // 4096 * 4096
            match chance.randrange(5):
                case 0 | 1:
                    data = chance.randbytes(length)
                    client.write(base + offset, data, fua=chance.random() < 0.1)
                    model[offset : offset + length] = data
                case 2:
                    client.zero(base + offset, length, chance.choice([0, nbd.CMD_FLAG_NO_HOLE]))
                    model[offset : offset + length] = bytes(length)
                case 3:
                    client.trim(base + offset, length)
                    # Any content is legal, but it is fixed by the first read.
                    model[offset : offset + length] = client.read(base + offset, length)
                case _:
                    assert client.read(base + offset, length) == model[offset : offset + length]
        assert first.read(base, span) == model
    volume.dolmen.verify(volume.name)
