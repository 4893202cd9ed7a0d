"""Which nodes get a new volume's replicas. Pure.

Rules, in this order: distinct nodes; only nodes that are up; most free space; fewest replicas;
name (so that the same cluster gives the same answer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import NotEnoughNodes

SPACE_STEP_BYTES = 1024 * 1024 * 1024
"""Free space counts in whole GiB: nodes that differ by less are equal, and the number of replicas
decides. Else a few KiB of log files would."""


@dataclass(frozen=True, slots=True)
class NodeSpace:
    node: str
    up: bool
    free_bytes: int
    replica_count: int


def place(nodes: Iterable[NodeSpace], replica_count: int) -> tuple[str, ...]:
    """Raises NotEnoughNodes."""
    usable = [node for node in nodes if node.up]
    if len(usable) < replica_count:
        raise NotEnoughNodes(wanted=replica_count, available=len(usable))

    def rank(node: NodeSpace) -> tuple[int, int, str]:
        return (-(node.free_bytes // SPACE_STEP_BYTES), node.replica_count, node.node)

    return tuple(node.node for node in sorted(usable, key=rank)[:replica_count])
