"""Membership records: a value, ordered by (epoch, version), parsed with suspicion."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import ProtocolViolation
from protocol.limits import REPLICAS_MAX
from protocol.membership import MembershipRecord, majority, parse_record


def test_a_record_survives_the_round_trip() -> None:
    record = MembershipRecord(3, 2, frozenset({"b", "a"}))
    assert record.to_wire() == {"epoch": 3, "version": 2, "in_sync": ["a", "b"]}
    assert parse_record(record.to_wire()) == record


def test_records_are_ordered_by_epoch_then_version() -> None:
    stamps = [MembershipRecord(*stamp, frozenset()).stamp for stamp in ((1, 9), (2, 0), (2, 1), (10, 0))]
    assert stamps == sorted(stamps)


GOOD: dict[str, Any] = {"epoch": 1, "version": 1, "in_sync": ["a"]}


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        {},
        *({key: value for key, value in GOOD.items() if key != gone} for gone in GOOD),
        GOOD | {"epoch": -1},
        GOOD | {"epoch": 2**63},
        GOOD | {"epoch": "1"},
        GOOD | {"version": -1},
        GOOD | {"version": 2**31},
        GOOD | {"version": 1.0},
        GOOD | {"in_sync": "a"},
        GOOD | {"in_sync": [1]},
        GOOD | {"in_sync": ["a", "a"]},
        GOOD | {"in_sync": [""]},
        GOOD | {"in_sync": ["x" * 201]},
        GOOD | {"in_sync": [str(i) for i in range(REPLICAS_MAX + 1)]},
    ],
)
def test_what_is_not_a_record_is_refused(wire: object) -> None:
    with pytest.raises(ProtocolViolation):
        parse_record(wire)


@pytest.mark.parametrize("count", range(1, REPLICAS_MAX + 1))
def test_two_majorities_always_share_a_replica(count: int) -> None:
    assert 2 * majority(count) > count
    assert 2 * (majority(count) - 1) <= count  # and it is the smallest such number
