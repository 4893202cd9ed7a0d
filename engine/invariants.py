"""What holds of a volume's machine after each step, whatever happened. Changes nothing.

A violation is a bug of ours: the engine ends, and the next one starts from what the replicas say. The names
C8 and C13 are those of docs/contract.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.phase import VolumePhase
from engine.replica_entry import RESYNC_STATES, ReplicaState

if TYPE_CHECKING:
    from engine.volume import Volume


def check(volume: Volume) -> None:
    if volume.ended:
        return
    if volume.ledger is not None:
        volume.ledger.check_invariants()
        committed = volume.ledger.committed.in_sync
        for entry in volume.entries:
            assert not entry.in_sync or entry.id in committed, entry.id
            assert not entry.in_sync or entry.generation is not None, entry.id
            assert entry.state is not ReplicaState.OFFLINE or entry.generation is None, entry.id
    if volume.phase in (VolumePhase.SERVING, VolumePhase.DETACHING):
        assert volume.ledger is not None and volume.ledger.opened
        ids = {volume.entries[slot].id for slot in volume.members}
        assert ids >= volume.ledger.exposed  # C13
        assert {volume.entries[slot].id for slot in volume.readers} <= volume.ledger.committed.in_sync  # C8
        assert all(volume.entries[slot].in_sync for slot in volume.readers)
    elif volume.phase is not VolumePhase.CLEANING:
        assert volume.members == () and volume.readers == ()
    resyncing = [entry for entry in volume.entries if entry.state in RESYNC_STATES]
    assert resyncing == ([volume.joining.target] if volume.joining is not None else [])
    assert volume.joining is None or volume.reconcile is None
    for part in (volume.joining, volume.reconcile):
        if part is not None:
            part.check_invariants()
