"""The file an engine is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import parse_config, read_config
from engine.membership import Hints, Override
from protocol.errors import BadRequest


def good() -> dict[str, Any]:
    return {
        "volume_id": "0b7c",
        "name": "data",
        "size_bytes": 2147483648,
        "epoch": 7,
        "engine_id": "node1/7/5f0e",
        "node": "node1",
        "replicas": [{"id": "data-1", "node": "node1", "host": "127.0.0.1", "port": 20001}],
        "record": {"epoch": 6, "version": 2, "in_sync": ["data-1"]},
        "key_file": "/k",
        "daemon_socket": "/d",
        "control_socket": "/c",
        "listeners": [{"fd": 7, "kind": "unix"}, {"fd": 8, "kind": "tcp"}],
    }


def test_the_documented_config_is_read() -> None:
    config = parse_config(good())
    assert config.replicas[0].port == 20001
    assert [listener.kind for listener in config.listeners] == ["unix", "tcp"]
    assert config.spec().stored.stamp == (6, 2)


def test_a_grant_that_says_nothing_of_the_past_is_the_careful_one() -> None:
    grant = parse_config(good()).spec().grant
    assert not grant.predecessor_ended  # it waits for the lease of an older engine
    assert grant.hints == Hints() and grant.forked == frozenset()


def test_what_a_grant_says_of_the_past_reaches_the_volume() -> None:
    said = {
        "predecessor_ended": True,
        "opens": {"data-1": 4},
        "distrust_store": True,
        "forked": ["data-2"],
        "override": {"members": ["data-1"], "newest": [6, 2]},
    }
    grant = parse_config(good() | said).spec().grant
    assert grant.predecessor_ended and grant.forked == {"data-2"}
    assert grant.hints == Hints({"data-1": 4}, True, Override(frozenset({"data-1"}), (6, 2)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size_bytes", 100),
        ("size_bytes", 2147483649),
        ("size_bytes", "1"),
        ("epoch", 0),
        ("epoch", True),
        ("epoch", 6),  # the record's
        ("replicas", []),
        ("replicas", [{"id": "a", "node": "n", "host": "h", "port": 0}]),
        ("replicas", [{"id": "a", "node": "n", "host": "h", "port": 1}] * 2),
        ("replicas", [{"id": f"a{i}", "node": "n", "host": "h", "port": 1} for i in range(6)]),
        ("record", {}),
        ("listeners", [{"fd": -1, "kind": "unix"}]),
        ("listeners", [{"fd": 1, "kind": "vsock"}]),
        ("name", ""),
        ("surprise", 1),
        ("straggler_wait_s", "soon"),
        ("predecessor_ended", 1),
        ("distrust_store", None),
        ("opens", []),
        ("opens", {"data-1": -1}),
        ("opens", {"data-1": True}),
        ("forked", "data-1"),
        ("forked", [""]),
        ("override", {}),
        ("override", {"members": ["data-1"], "newest": [6, 2]}),  # while an older engine may serve the others
        ("override", {"members": [], "newest": [6, 2]}),
        ("override", {"members": ["data-1"], "newest": [6]}),
    ],
)
def test_a_wrong_value_is_refused_and_named(key: str, value: object) -> None:
    with pytest.raises(BadRequest):
        parse_config(good() | {key: value})


def test_each_key_is_needed() -> None:
    for key in good():
        with pytest.raises(BadRequest, match=key):
            parse_config({k: v for k, v in good().items() if k != key})


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_what_is_not_a_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(BadRequest):
        read_config(str(path))
