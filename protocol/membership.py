"""The membership record: which replicas hold every acknowledged write. A value, ordered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protocol.errors import ProtocolViolation
from protocol.hello import ID_CHARS_MAX
from protocol.limits import REPLICAS_MAX


@dataclass(frozen=True, slots=True)
class MembershipRecord:
    """``in_sync`` as of (``epoch``, ``version``). Records compare by (epoch, version)."""

    epoch: int
    version: int
    in_sync: frozenset[str]

    @property
    def stamp(self) -> tuple[int, int]:
        return (self.epoch, self.version)

    def to_wire(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "version": self.version, "in_sync": sorted(self.in_sync)}


def parse_record(wire: Any) -> MembershipRecord:
    """Raises ProtocolViolation."""
    match wire:
        case {"epoch": int(epoch), "version": int(version), "in_sync": list(members)} if (
            0 <= epoch < 2**63
            and 0 <= version < 2**31
            and len(members) <= REPLICAS_MAX
            and len(set(map(str, members))) == len(members)
            and all(isinstance(m, str) and 0 < len(m) <= ID_CHARS_MAX for m in members)
        ):
            return MembershipRecord(epoch, version, frozenset(members))
        case _:
            raise ProtocolViolation(expected="a membership record", got=type(wire).__name__)


def majority(replica_count: int) -> int:
    """How many replicas a record needs to be committed without the state store."""
    assert 1 <= replica_count <= REPLICAS_MAX
    # Written out: rounding rules are easy to get wrong.
    return {1: 1, 2: 2, 3: 2, 4: 3, 5: 3}[replica_count]
