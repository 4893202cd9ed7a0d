"""Names, sizes, placement: what is accepted, and what an error says to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.model import check_name, new_volume
from control.placement import NodeSpace, place
from control.sizes import check_size, format_size, parse_size
from protocol.errors import BadRequest, NotEnoughNodes

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("500M", 500 * 1024**2),
        ("1.5T", 3 * 1024**4 // 2),
        ("4194304", 4194304),
        ("4194304B", 4194304),
        (" 64 TiB ", 64 * 1024**4),
        ("4096KB", 4096_000),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size_bytes: int) -> None:
    if size_bytes < 4 * 1024**2:
        with pytest.raises(BadRequest):
            parse_size(text)
    else:
        assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "for example 2GiB"),
        ("two", "for example 2GiB"),
        ("-1G", "for example 2GiB"),
        ("1e9", "for example 2GiB"),
        ("2GiBB", "for example 2GiB"),
        ("٣GiB", "for example 2GiB"),
        ("1.3B", "smaller unit"),
        ("3MiB", "4 MiB or more"),
        ("65TiB", "64 TiB or less"),
        ("4194305", "4198400"),
        ("9" * 20 + "T", "64 TiB or less"),
    ],
)
def test_a_wrong_size_is_refused_with_what_to_write_instead(text: str, advice: str) -> None:
    with pytest.raises(BadRequest, match=advice):
        parse_size(text)


@given(st.integers(min_value=1024, max_value=2**34))
def test_a_size_in_blocks_that_is_printed_and_read_again_is_near(blocks: int) -> None:
    size_bytes = check_size(blocks * 4096)
    shown = float(format_size(size_bytes).split()[0])
    unit = format_size(size_bytes).split()[1]
    exponent = ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert abs(shown * 1024**exponent - size_bytes) <= 0.06 * 1024**exponent


@pytest.mark.parametrize("name", ["a", "data-1", "0", "a" * 63, "1-2"])
def test_a_dns_label_is_a_name(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Data", "a" * 64, "-a", "a-", "a_b", "a.b", "../x", "a/b", "ä", "a\n", " a", "a\0b"]
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check_name(name)


def test_a_new_volume_says_that_every_replica_is_in_sync() -> None:
    document = new_volume("data", "id", GIB, ("node2", "node1"))
    assert [r["node"] for r in document.spec["replicas"]] == ["node2", "node1"]
    assert document.status["record"] == {"epoch": 0, "version": 0, "in_sync": ["data-r1", "data-r2"]}


def node(name: str, free_gib: float, replica_count: int = 0, *, up: bool = True) -> NodeSpace:
    return NodeSpace(name, up, int(free_gib * GIB), replica_count)


def test_replicas_go_to_distinct_nodes_with_the_most_space() -> None:
    nodes = [node("a", 10), node("b", 30), node("c", 20), node("d", 5)]
    assert place(nodes, 3) == ("b", "c", "a")


def test_of_nodes_with_about_the_same_space_the_emptiest_is_taken() -> None:
    assert place([node("a", 10.4, 2), node("b", 10.2, 1), node("c", 10.1, 0)], 2) == ("c", "b")


def test_a_node_that_is_down_gets_nothing() -> None:
    with pytest.raises(NotEnoughNodes) as caught:
        place([node("a", 10), node("b", 10), node("c", 99, up=False)], 3)
    assert caught.value.fields == {"wanted": 3, "available": 2}


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5), st.booleans()), max_size=8), st.integers(1, 5)
)
def test_placement_never_repeats_a_node_or_takes_a_worse_one(
    nodes: list[tuple[int, int, bool]], replica_count: int
) -> None:
    spaces = [node(f"n{i}", free, count, up=up) for i, (free, count, up) in enumerate(nodes)]
    by_name = {space.node: space for space in spaces}
    try:
        chosen = place(spaces, replica_count)
    except NotEnoughNodes:
        assert sum(space.up for space in spaces) < replica_count
        return
    assert len(set(chosen)) == replica_count
    worst = min(by_name[name].free_bytes for name in chosen)
    left = [space for space in spaces if space.up and space.node not in chosen]
    assert all(space.free_bytes <= worst for space in left)
