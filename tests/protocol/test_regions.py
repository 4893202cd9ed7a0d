"""Packed sets of regions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest
from protocol.limits import RPC_BYTES_MAX
from protocol.regions import BITMAP_MARK, REGIONS_MAX, pack_regions, unpack_regions

numbers = st.integers(0, REGIONS_MAX - 1)


@given(st.lists(numbers | st.integers(0, 300)))
def test_a_set_survives_the_round_trip(regions: list[int]) -> None:
    assert unpack_regions(pack_regions(regions)) == sorted(set(regions))


def test_few_regions_travel_as_u32_list_and_many_as_bitmap() -> None:
    assert pack_regions([]) == b""
    assert pack_regions([258, 1]) == b"\x01\0\0\0\x02\x01\0\0"
    assert pack_regions(range(64)) == BITMAP_MARK + b"\xff" * 8
    assert len(pack_regions([REGIONS_MAX - 1])) == 4


def test_all_regions_of_the_largest_volume_fit_in_a_message() -> None:
    many = range(REGIONS_MAX - 1, 0, -16)  # too many for a list; a bitmap is as long for all of them
    packed = pack_regions(many)
    assert packed.startswith(BITMAP_MARK)
    assert len(packed) == len(BITMAP_MARK) + REGIONS_MAX // 8 < RPC_BYTES_MAX


@pytest.mark.parametrize("data", [None, [1, 2], "ab", b"abc", b"\0\0\0\0\xfe\xff\xff\xff", b"\0\0\0\1"])
def test_what_is_not_a_packed_set_is_refused(data: object) -> None:
    with pytest.raises(BadRequest):
        unpack_regions(data)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_set_or_refused(data: bytes) -> None:
    try:
        regions = unpack_regions(data)
    except BadRequest:
        return
    assert regions == sorted(set(regions))
    assert all(0 <= region < REGIONS_MAX for region in regions)
