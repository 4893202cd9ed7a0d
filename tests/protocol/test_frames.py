"""Frame headers and checksums against the golden vectors that the Rust twin reads as well."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation
from protocol.frames import HEADER_BYTES, Header, decode_header, encode_header
from protocol.limits import FRAME_PAYLOAD_BYTES_MAX
from replica.checksum import block_checksum, fragment_checksum, xxh3_64
from tests.protocol.make_vectors import pattern

VECTORS = [
    line.split()
    for line in Path(__file__).with_name("vectors.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def rows(word: str) -> list[list[str]]:
    found = [row[1:] for row in VECTORS if row[0] == word]
    assert found
    return found


@pytest.mark.parametrize("row", rows("frame"), ids=lambda row: row[0])
def test_golden_frames_decode_and_encode(row: list[str]) -> None:
    name, *numbers, hexed = row
    header = decode_header(bytes.fromhex(hexed), xxh3_64)
    assert astuple(header) == tuple(map(int, numbers)), name
    assert encode_header(header, xxh3_64).hex() == hexed


@pytest.mark.parametrize("row", rows("refused"), ids=lambda row: row[0])
def test_golden_bad_headers_are_refused(row: list[str]) -> None:
    with pytest.raises(ProtocolViolation):
        decode_header(bytes.fromhex(row[1]), xxh3_64)


def test_golden_checksums_hold() -> None:
    for block_index, length, seed, checksum in (map(int, row) for row in rows("block")):
        assert block_checksum(block_index, pattern(length, seed)) == checksum
    for offset_bytes, length, seed, checksum in (map(int, row) for row in rows("fragment")):
        assert fragment_checksum(offset_bytes, pattern(length, seed)) == checksum


def test_a_block_does_not_verify_in_another_place() -> None:
    data = pattern(4096, 1)
    assert len({block_checksum(index, data) for index in range(100)}) == 100


def test_any_flipped_bit_of_a_header_is_refused() -> None:
    good = bytes.fromhex(rows("frame")[0][-1])
    for bit in range(HEADER_BYTES * 8):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ProtocolViolation):
            decode_header(bytes(damaged), xxh3_64)


u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
headers = st.builds(
    Header,
    kind=st.integers(0, 255),
    flags=st.integers(0, 2**16 - 1),
    request_id=u64,
    epoch=u64,
    offset_bytes=u64,
    length_bytes=u32,
    payload_bytes=st.integers(0, FRAME_PAYLOAD_BYTES_MAX),
    status=u32,
)


@given(headers)
def test_every_header_survives_the_round_trip(header: Header) -> None:
    assert decode_header(encode_header(header, xxh3_64), xxh3_64) == header


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_garbage_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_header(data, xxh3_64)
