"""What an operator may choose, what each choice is said to lose, and which words order it. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from control.recovery import Recovery, RecoveryOrder, check_order, copy_of, judge
from control.views import EngineView, MembershipView, VolumeState, VolumeView
from protocol.errors import BadRequest
from protocol.membership import MembershipRecord

IDS = ("data-r1", "data-r2", "data-r3")


def record(epoch: int, version: int, *indexes: int) -> MembershipRecord:
    return MembershipRecord(epoch, version, frozenset(IDS[index - 1] for index in indexes))


def said(newest: MembershipRecord, synced_at: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {
        "state": "open",
        "reason": "",
        "epoch": newest.epoch,
        "record": newest.to_wire(),
        "synced_at": list(synced_at),
        "suspect": False,
        "restored": False,
        "dirty_count": 3,
        **more,
    }


def view(state: VolumeState = VolumeState.WAITING, waits: str = "replica") -> VolumeView:
    waiting = [{waits: "data-r1", "reason": "gone"}] if waits else []
    return VolumeView(
        name="data", volume_id="id", size_bytes=2**30, wanted_size_bytes=2**30, replica_count=3,
        state=state,
        nbd_uri=None, nbd_tcp_uri=None, epoch=7, membership=MembershipView(epoch=7, version=1, in_sync=[]),
        engine=EngineView(node="node1", pid=1, answering=True, waiting_for=waiting),
        replicas=[], conditions=[],
    )  # fmt: skip


def found(
    stored: MembershipRecord, *copies: dict[str, Any] | None, seen: VolumeView | None = None
) -> Recovery:
    made = [copy_of(IDS[index], f"node{index + 1}", said) for index, said in enumerate(copies)]
    return judge(seen or view(), stored, made)


def members(recovery: Recovery) -> list[list[str]]:
    return [choice.members for choice in recovery.choices]


ALL, PAIR, ALONE = record(7, 1, 1, 2, 3), record(7, 2, 1, 2), record(7, 3, 1)


def test_a_copy_that_was_left_behind_loses_what_only_the_later_members_hold() -> None:
    recovery = found(ALONE, None, None, said(ALL, (7, 1)))
    assert (recovery.newest.epoch, recovery.newest.version) == (7, 3) and recovery.missing == ["data-r1"]
    (choice,) = recovery.choices
    assert choice.members == ["data-r3"]
    assert choice.loses[0].startswith("every write acknowledged after record 7.1")
    assert "only data-r1 held those" in choice.loses[0]
    assert "after record 7.3, if there were any" in choice.loses[1]


def test_a_copy_at_the_newest_record_loses_only_what_may_have_followed_it() -> None:
    recovery = found(PAIR, None, said(PAIR, (7, 2)), None)
    (choice,) = recovery.choices
    (loss,) = choice.loses
    assert "after record 7.2, if there were any" in loss and "data-r1" in loss


def test_the_newest_record_is_that_of_a_reachable_copy_if_the_state_store_lags() -> None:
    recovery = found(ALL, None, said(PAIR, (7, 2)), None)
    assert recovery.newest.version == 2 and recovery.missing == ["data-r1"]


def test_copies_are_opened_together_only_if_they_stand_at_the_same_record() -> None:
    together = found(ALL, said(ALL, (7, 1)), said(ALL, (7, 1)), None)
    assert members(together) == [["data-r1", "data-r2"], ["data-r1"], ["data-r2"]]
    apart = found(PAIR, None, said(PAIR, (7, 2)), said(ALL, (7, 1)))
    assert members(apart) == [["data-r2"], ["data-r3"]]
    doubtful = found(ALL, said(ALL, (7, 1)), said(ALL, (7, 1), suspect=True), None)
    assert members(doubtful) == [["data-r1"], ["data-r2"]]


def test_doubts_about_a_copy_are_said_as_losses() -> None:
    recovery = found(ALL, said(ALL, (7, 1), suspect=True), said(ALL, (7, 1), restored=True), None)
    by_member = {choice.members[0]: " ".join(choice.loses) for choice in recovery.choices}
    assert "within 3 regions (12 MiB)" in by_member["data-r1"]
    assert "the copy of data-r2 that was put back" in by_member["data-r2"]
    assert recovery.missing == ["data-r2", "data-r3"]


@pytest.mark.parametrize(
    "useless",
    [None, {"state": "missing"}, {"state": "damaged", "reason": "x"}, said(record(0, 0), (0, 0), epoch=0)],
)
def test_what_cannot_be_opened_or_never_held_anything_is_no_choice(useless: dict[str, Any] | None) -> None:
    assert found(ALL, useless, None, None).choices == []


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (view(VolumeState.HEALTHY, ""), "served"),
        (view(VolumeState.DEGRADED, ""), "served"),
        (view(VolumeState.DETACHED, ""), "dolmen volume attach data"),
        (view(VolumeState.ATTACHING, ""), "being opened"),
        (view(VolumeState.DETACHING), "detaching"),
        (view(VolumeState.WAITING, "store"), "state store"),
    ],
)
def test_nothing_can_be_decided_while_it_may_open_by_itself(seen: VolumeView, words: str) -> None:
    recovery = found(ALONE, None, None, said(ALL, (7, 1)), seen=seen)
    assert words in recovery.refused and recovery.choices == []
    with pytest.raises(BadRequest, match=words):
        check_order(recovery, RecoveryOrder(members=("data-r3",), lose="data 7.3 00000000"))


def test_only_the_words_shown_order_a_choice() -> None:
    recovery = found(ALL, said(ALL, (7, 1)), said(ALL, (7, 1)), None)
    both, one, _ = recovery.choices
    assert both.confirm != one.confirm
    assert check_order(recovery, RecoveryOrder(members=("data-r2", "data-r1"), lose=both.confirm)) == both
    for lose in ("", "yes", "all", "data 7.1", one.confirm, both.confirm.upper()):
        with pytest.raises(BadRequest, match="spelled out"):
            check_order(recovery, RecoveryOrder(members=("data-r1", "data-r2"), lose=lose))
    with pytest.raises(BadRequest, match="no choice"):
        check_order(recovery, RecoveryOrder(members=("data-r3",), lose=both.confirm))


@pytest.mark.parametrize(
    "now",
    [
        (said(ALL, (7, 1)), said(ALL, (7, 1)), said(ALL, (7, 1))),  # another one came back
        (said(ALL, (7, 1), suspect=True), said(ALL, (7, 1)), None),
        (said(ALL, (7, 1)), None, None),
        (said(PAIR, (7, 2)), said(ALL, (7, 1)), None),  # a newer record came to light
        (said(ALL, (7, 1), dirty_count=4), said(ALL, (7, 1)), None),
    ],
)
def test_words_that_were_shown_before_something_changed_order_nothing(now: Any) -> None:
    shown = found(ALL, said(ALL, (7, 1)), said(ALL, (7, 1)), None)
    choice = next(c for c in shown.choices if c.members == ["data-r1"])
    with pytest.raises(BadRequest):
        check_order(found(ALL, *now), RecoveryOrder(members=("data-r1",), lose=choice.confirm))


def test_an_engine_that_was_started_anew_changes_no_words() -> None:
    before = found(ALL, said(ALL, (7, 1)), None, None).choices[0]
    assert found(ALL, said(ALL, (7, 1), epoch=9), None, None).choices[0] == before
