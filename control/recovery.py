"""What an operator may decide when a volume waits for replicas that never come back. Pure.

Owns what is shown of each copy, which choices there are, what each of them would lose as exactly as can be
known, and the words that confirm one. Does not own observing or carrying it out (``control/recovering.py``),
or opening (``engine/membership.py``).

Promises: no choice is preferred, guessed or made by age or size. Copies are opened together only if they
stand at the same record; whatever the others hold beyond it is given up, and is compared and overwritten,
never merged. The words that confirm a choice change with everything it was judged by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from control.model import Model
from control.views import MembershipView, VolumeState, VolumeView
from protocol.errors import BadRequest, ProtocolViolation
from protocol.limits import REGION_BYTES
from protocol.membership import MembershipRecord, parse_record

DIGEST_CHARS = 8
"""Of the words that confirm: 32 bits, against accidents and not against attackers."""


class Copy(Model):
    """One replica, as far as it can be seen now."""

    id: str
    node: str
    reachable: bool
    state: str = Field(description="as its server says: open, damaged, failed, missing; empty: no answer")
    reason: str = ""
    epoch: int = 0
    record: MembershipView | None = Field(default=None, description="the newest that it holds")
    synced_at: tuple[int, int] = Field(default=(0, 0), description="the newest record that names it")
    suspect: bool = False
    restored: bool = False
    dirty_count: int = 0

    @property
    def usable(self) -> bool:
        return self.reachable and self.state == "open" and self.synced_at != (0, 0)


class Choice(Model):
    members: list[str]
    loses: list[str] = Field(description="everything that would or may be lost, a sentence each")
    confirm: str = Field(description="the words that order it; they change when anything here does")


class Recovery(Model):
    volume: str
    refused: str = Field(description="why nothing can be decided now; empty: it can")
    newest: MembershipView = Field(description="the newest record known, of all copies and the state store")
    missing: list[str] = Field(description="members of it that cannot be used")
    copies: list[Copy]
    choices: list[Choice]


class RecoveryOrder(Model):
    members: tuple[str, ...] = Field(min_length=1, max_length=5)
    lose: str = Field(max_length=200, description="the choice's `confirm`, word for word")
    dry_run: bool = False


def copy_of(replica_id: str, node: str, said: Mapping[str, Any] | None) -> Copy:
    """``said``: replica.inspect; None: nobody answered."""
    if said is None:
        return Copy(id=replica_id, node=node, reachable=False, state="", reason="its server does not answer")
    try:
        record: MembershipRecord | None = parse_record(said.get("record"))
    except ProtocolViolation:
        record = None
    return Copy(
        id=replica_id,
        node=node,
        reachable=True,
        state=str(said.get("state")),
        reason=str(said.get("reason") or ""),
        epoch=_int(said.get("epoch")),
        record=_view(record) if record is not None else None,
        synced_at=_stamp(said.get("synced_at")),
        suspect=bool(said.get("suspect")),
        restored=bool(said.get("restored")),
        dirty_count=_int(said.get("dirty_count")),
    )


def judge(view: VolumeView, stored: MembershipRecord, copies: Sequence[Copy]) -> Recovery:
    """``stored``: the state store's record."""
    known = [MembershipView(epoch=stored.epoch, version=stored.version, in_sync=sorted(stored.in_sync))]
    known += [copy.record for copy in copies if copy.reachable and copy.record is not None]
    newest = max(known, key=_at)  # the first of equal ones: the store's rules, as when it is opened
    missing = [copy.id for copy in copies if copy.id in newest.in_sync and not _holds(copy, newest)]
    refused = refusal(view)
    groups = [] if refused else _groups(copies)
    return Recovery(
        volume=view.name,
        refused=refused,
        newest=newest,
        missing=missing,
        copies=list(copies),
        choices=[_choice(view.name, newest, missing, group, copies) for group in groups],
    )


def refusal(view: VolumeView) -> str:
    """Why an operator has nothing to decide; "" when the volume waits for replicas."""
    name, state = view.name, view.state
    waits = view.engine.waiting_for if view.engine is not None else []
    if state in (VolumeState.HEALTHY, VolumeState.DEGRADED):
        return (
            f"volume {name} is served, nothing has to be given up. `dolmen why {name}` says what is missing"
        )
    if state is VolumeState.DETACHED:
        return f"volume {name} is detached; it may open by itself. `dolmen volume attach {name}` first"
    if state not in (VolumeState.WAITING, VolumeState.ATTACHING):
        return f"volume {name} is {state.value}. `dolmen why {name}` says what it waits for"
    if any("store" in wait for wait in waits):
        return f"volume {name} waits for the state store. `dolmen why {name}` says more"
    if not any("replica" in wait for wait in waits):
        return f"volume {name} is being opened. `dolmen why {name}` says how far it is; try again in a moment"
    return ""


def check_order(recovery: Recovery, order: RecoveryOrder) -> Choice:
    """The choice that is ordered. Raises BadRequest, which says why not and what to do."""
    again = f"`dolmen volume recover {recovery.volume}` shows what can be chosen"
    if recovery.refused:
        raise BadRequest(reason=recovery.refused)
    wanted = sorted(set(order.members))
    choice = next((c for c in recovery.choices if sorted(c.members) == wanted), None)
    if choice is None:
        raise BadRequest(reason=f"{', '.join(wanted)[:200]} is no choice there is now. {again}")
    if order.lose != choice.confirm:
        raise BadRequest(
            reason="what is to be lost is not spelled out as it is shown now; something may have changed. "
            + again
        )
    return choice


def _groups(copies: Iterable[Copy]) -> list[list[Copy]]:
    """Each usable copy alone, and all that stand at one record together. Newest first."""
    usable = [copy for copy in copies if copy.usable]
    alike: dict[tuple[tuple[int, int], bool], list[Copy]] = {}
    for copy in usable:
        if not copy.restored:
            alike.setdefault((copy.synced_at, copy.suspect), []).append(copy)
    groups = [group for group in alike.values() if len(group) > 1] + [[copy] for copy in usable]
    return sorted(
        groups,
        key=lambda g: (g[0].restored, -g[0].synced_at[0], -g[0].synced_at[1], g[0].suspect, -len(g), g[0].id),
    )


def _choice(
    name: str, newest: MembershipView, missing: Sequence[str], group: Sequence[Copy], copies: Sequence[Copy]
) -> Choice:
    members = [copy.id for copy in group]
    return Choice(
        members=members,
        loses=list(_losses(newest, missing, group)),
        confirm=f"{name} {newest.epoch}.{newest.version} {_digest(name, newest, members, copies)}",
    )


def _losses(newest: MembershipView, missing: Sequence[str], group: Sequence[Copy]) -> Iterable[str]:
    members = {copy.id for copy in group}
    epoch, version = group[0].synced_at
    at, now = f"{epoch}.{version}", f"{newest.epoch}.{newest.version}"
    others = [replica for replica in newest.in_sync if replica not in members]
    if (epoch, version) < _at(newest):
        holders = ", ".join(others) or "nobody here"
        yield f"every write acknowledged after record {at}: record {now} says that only {holders} held those"
    if gone := [replica for replica in missing if replica not in members]:
        yield (
            f"every write acknowledged after record {now}, if there were any: that {', '.join(gone)} went on "
            f"without {', '.join(sorted(members))} cannot be ruled out without seeing them"
        )
    for copy in group:
        if copy.suspect:
            mib = copy.dirty_count * REGION_BYTES // 2**20
            yield (
                f"what replica {copy.id}'s machine had not brought to its disk when it failed: "
                f"within {copy.dirty_count} regions ({mib} MiB)"
            )
        if copy.restored:
            yield f"every write after the copy of {copy.id} that was put back was made, whenever that was"


def _holds(copy: Copy, newest: MembershipView) -> bool:
    """Whether it still is what the newest record says of it."""
    return copy.usable and not copy.restored and copy.epoch >= newest.epoch


def _digest(name: str, newest: MembershipView, members: Sequence[str], copies: Iterable[Copy]) -> str:
    """Of all that the choice was judged by, but for what changes while nobody does anything: an engine that
    is started anew claims a newer epoch."""
    judged = [copy.model_dump(mode="json", exclude={"epoch", "reason"}) for copy in copies]
    text = json.dumps([name, newest.model_dump(mode="json"), sorted(members), judged], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def _at(view: MembershipView) -> tuple[int, int]:
    return view.epoch, view.version


def _view(record: MembershipRecord) -> MembershipView:
    return MembershipView(epoch=record.epoch, version=record.version, in_sync=sorted(record.in_sync))


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _stamp(value: Any) -> tuple[int, int]:
    match value:
        case [int(epoch), int(version)]:
            return epoch, version
        case _:
            return 0, 0
