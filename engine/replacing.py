"""When a slot may pass from a replica that is gone to a new one. Pure.

Owns the rule: never a replica that any record names which may be durable somewhere, and never one whose
answers are counted. Who is in no such record is needed by nobody: no open depends on it, no acknowledged
write is held by it alone. The new one should be blank, and is filled by a resync. It is compared as a whole,
which costs a blank one nothing: a state store that was put back may give out an id a second time, and then
somebody with a history of its own answers to it.

Does not own who decides that a replica is gone, nor the new one's directory: that is the daemon's, which
keeps this order (``control/replacing.py``): the wish is written, the new replica is made, the engine is told,
and then the volume's document names the new one. A daemon or engine that dies in between finds it so and
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.events import Action, Log, ReplaceAsked, Reply, Retarget
from engine.membership import Ledger
from engine.replica_entry import REQUIRED_RESYNC_STATES, ReplicaEntry
from protocol.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Change:
    old: ReplicaEntry  # whose session ends
    entries: tuple[ReplicaEntry, ...]  # by slot, from now on


def decide(
    entries: Sequence[ReplicaEntry],
    ledger: Ledger | None,
    event: ReplaceAsked,
    act: Callable[[Action], None],
) -> Change | None:
    """Answer the request. None: it was refused, or an earlier one did it."""
    ids = {entry.id for entry in entries}
    if event.new_id in ids and event.old not in ids:
        act(Reply(event.request, None))
        return None
    try:
        old = _find_replaceable(entries, ledger, event)
    except BadRequest as refused:
        act(Reply(event.request, refused))
        return None
    new = _successor(old, event.new_id)
    act(Log("replica replaced", {"old": old.id, "new": new.id, "node": event.new_node}))
    act(Retarget(new.slot, new.id, event.new_node, event.host, event.port))
    act(Reply(event.request, None))
    return Change(old, tuple(new if entry is old else entry for entry in entries))


def _find_replaceable(
    entries: Sequence[ReplicaEntry], ledger: Ledger | None, event: ReplaceAsked
) -> ReplicaEntry:
    """Raises BadRequest, which says why not."""
    entry = next((entry for entry in entries if entry.id == event.old), None)
    if entry is None:
        raise BadRequest(reason=f"this engine has no replica {event.old[:80]!r}")
    if any(other.id == event.new_id for other in entries):
        raise BadRequest(reason=f"replica {event.new_id[:80]!r} has a place already")
    if ledger is None or not ledger.opened:
        raise BadRequest(reason="the volume is still being opened")
    if entry.id in ledger.exposed or entry.in_sync or entry.state in REQUIRED_RESYNC_STATES:
        raise BadRequest(reason=f"replica {entry.id} is named in sync, or is about to be")
    return entry


def _successor(entry: ReplicaEntry, new_id: str) -> ReplicaEntry:
    """A blank entry in the same slot. Numbers go on, so that nothing late of the old one is taken for its."""
    new = ReplicaEntry(entry.slot, new_id)
    new.session = entry.session
    new.stable_number = entry.stable_number
    new.forked = True
    new.reason = f"it takes the place of {entry.id}"
    return new
