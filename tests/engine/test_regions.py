"""Region bitmaps against plain sets, their wire form against protocol/regions.py, and their memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.regions import RegionSet, numbers_of
from protocol.errors import BadRequest
from protocol.regions import REGIONS_MAX, pack_regions, unpack_regions

regions = st.one_of(st.integers(0, 300), st.integers(0, REGIONS_MAX - 1))

MEMORY_OF_4_TIB = """
import resource, sys
from array import array
from engine.regions import RegionSet
from engine.resync import PullPlan
from protocol.regions import pack_regions

def used_kib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4

wire = b"\\xff\\xff\\xff\\xff" + b"\\xff" * (1024 * 1024 // 8)  # every region of 4 TiB
before = used_kib()
changed = RegionSet.from_packed(wire)
everything = changed.copy()
everything.update(RegionSet.from_packed(wire))
plan = PullPlan(everything)
for _ in range(1000):
    plan.on_done(plan.next_call(), 1)
left = plan.remaining()
assert left.packed() and left.count < 1024 * 1024 == everything.count
numbers = left.numbers()
print(used_kib() - before)
"""


@given(st.lists(st.tuples(st.booleans(), regions)), st.sets(regions))
def test_a_region_set_is_a_set(steps: list[tuple[bool, int]], other: set[int]) -> None:
    ours, plain = RegionSet(), set[int]()
    for add, region in steps:
        changed = ours.add(region) if add else ours.discard(region)
        assert changed == (region not in plain if add else region in plain)
        plain = plain | {region} if add else plain - {region}
        assert ours.count == len(ours) == len(plain)
    assert list(ours) == sorted(plain) and ours == plain and ours == tuple(sorted(plain))
    assert ours.take_from(100, 5) == [r for r in sorted(plain) if r >= 100][:5]
    union, rest = ours.copy(), ours.copy()
    union.update(RegionSet(other))
    rest.difference_update(RegionSet(other))
    assert list(union) == sorted(plain | other) and union.count == len(plain | other)
    assert list(rest) == sorted(plain - other) and rest.count == len(plain - other)
    assert list(ours) == sorted(plain), "the copies are copies"


@given(st.sets(regions))
def test_it_travels_as_the_protocol_says(wanted: set[int]) -> None:
    assert RegionSet(wanted).packed() == pack_regions(wanted)
    found = RegionSet.from_packed(pack_regions(wanted))
    assert list(found) == sorted(wanted) == unpack_regions(RegionSet(wanted).packed())
    assert list(numbers_of(found)) == list(numbers_of(tuple(sorted(wanted))))


@pytest.mark.parametrize(
    "data", ["no bytes", b"abc", b"\xff\xff\xff\xfe", b"\xff\xff\xff\xff" + b"\x01" * (REGIONS_MAX // 8 + 1)]
)
def test_what_is_not_a_set_of_regions_is_refused(data: object) -> None:
    with pytest.raises(BadRequest):
        RegionSet.from_packed(data)


def test_the_lists_of_a_rebuild_of_4_tib_take_a_few_mebibytes() -> None:
    # As tuples of ints they took 40 MiB each.
    run = subprocess.run([sys.executable, "-c", MEMORY_OF_4_TIB], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 12 * 1024, f"{run.stdout} KiB"
