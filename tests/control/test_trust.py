"""What a grant says about the past: kept until the record that makes it pointless, and no longer."""

from __future__ import annotations

from control.model import Grant, Override, Record, Volume, VolumeStatus, dump, new_volume
from control.trust import distrusted, grant_keys, overridden, with_record, withdrawn

IDS = ("data-r1", "data-r2", "data-r3")
NOW, LATER = "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:09+00:00"


def status(epoch: int = 5) -> VolumeStatus:
    return VolumeStatus(
        size_bytes=2**30,
        replica_size_bytes=dict.fromkeys(IDS, 2**30),
        grant=Grant(epoch=epoch, engine_id="e", node="node1"),
        record=Record(epoch=epoch, version=1, in_sync=IDS),
    )


def granted(before: VolumeStatus, epoch: int) -> VolumeStatus:
    return before.model_copy(update={"grant": Grant(epoch=epoch, engine_id="f", node="node1")})


def volume(made: VolumeStatus) -> Volume:
    document = new_volume("data", "id", 2**30, ("node1", "node2", "node3"))
    return Volume(document.with_status(**dump(made)))


def record(epoch: int, version: int, in_sync: tuple[str, ...] = IDS) -> Record:
    return Record(epoch=epoch, version=version, in_sync=in_sync)


def test_an_untroubled_volume_s_grant_says_nothing() -> None:
    assert grant_keys(volume(status()), predecessor_ended=False) == {}
    assert grant_keys(volume(status()), predecessor_ended=True) == {"predecessor_ended": True}


def test_a_distrust_ends_with_the_first_record_of_a_newer_epoch_and_not_with_one_of_the_same() -> None:
    doubtful = distrusted(status(5), "because", NOW)
    keys = grant_keys(volume(doubtful), predecessor_ended=False)
    assert keys == {"distrust_store": True, "forked": list(IDS)}  # an override may be forgotten
    same = with_record(doubtful, record(5, 2), {}, LATER)
    assert same.distrust is not None and same.distrust.since == NOW
    assert with_record(granted(same, 6), record(6, 1), {}, LATER).distrust is None


def test_a_distrust_renewed_under_a_newer_grant_waits_for_a_record_after_that_grant() -> None:
    doubtful = distrusted(granted(distrusted(status(5), "first", NOW), 7), "second", LATER)
    assert doubtful.distrust is not None
    assert (doubtful.distrust.reason, doubtful.distrust.epoch) == ("first", 7)
    assert with_record(doubtful, record(7, 1), {}, LATER).distrust is not None


def test_an_override_is_granted_at_once_with_the_others_as_forked() -> None:
    keys = grant_keys(volume(overridden(status(5), IDS[:1], (5, 1), NOW)), predecessor_ended=False)
    assert keys == {
        "override": {"members": ["data-r1"], "newest": [5, 1]},
        "forked": ["data-r2", "data-r3"],
    }


def test_an_override_is_spent_by_the_record_of_the_new_epoch_which_makes_the_others_forked() -> None:
    ordered = overridden(status(5), IDS[:2], (5, 1), NOW)
    assert with_record(ordered, record(5, 2), {}, LATER).override is not None  # the engine of before
    opened = with_record(granted(ordered, 7), record(7, 1, IDS[:1]), {}, LATER)
    assert opened.override is None
    assert opened.forked == ("data-r2", "data-r3")  # also one that was to open it and did not


def test_an_order_and_its_withdrawal_fence_the_engine_before_in_the_same_write() -> None:
    ordered = overridden(status(5), IDS[:1], (5, 1), NOW)
    assert ordered.epoch == 6 and ordered.override is not None and ordered.override.epoch == 6
    # A record of the engine before is refused now (``EngineCalls``): its epoch is not the newest. And the
    # next engine's is newer than the order.
    assert with_record(granted(ordered, 7), record(7, 1, IDS[:1]), {}, LATER).override is None
    back = withdrawn(granted(ordered, 7))
    assert back.override is None and back.epoch == 8


def test_a_fork_ends_with_the_record_that_names_the_replica() -> None:
    forked = status(6).model_copy(update={"forked": IDS[1:]})
    assert with_record(forked, record(6, 2, IDS[:2]), {}, LATER).forked == ("data-r3",)
    assert with_record(forked, record(6, 2, IDS), {}, LATER).forked == ()


def test_a_replica_s_opens_and_since_when_it_is_left_out_are_kept_with_the_record() -> None:
    left = with_record(status(5), record(5, 2, IDS[:2]), {"data-r1": 4, "data-r2": 1, "other": 9}, NOW)
    assert left.opens == {"data-r1": 4, "data-r2": 1} and left.left_at == {"data-r3": NOW}
    later = with_record(left, record(5, 3, IDS[:1]), {"data-r1": 5}, LATER)
    assert later.opens == {"data-r1": 5, "data-r2": 1}
    assert later.left_at == {"data-r2": LATER, "data-r3": NOW}
    assert with_record(later, record(5, 4), {}, LATER).left_at == {}
    assert grant_keys(volume(later), predecessor_ended=False)["opens"] == {"data-r1": 5, "data-r2": 1}


def test_what_is_kept_survives_the_state_store() -> None:
    made = distrusted(overridden(status(), IDS[:1], (5, 1), NOW), "because", NOW)
    read = VolumeStatus.model_validate(dump(made))
    assert read == made
    assert read.override == Override(members=IDS[:1], newest=(5, 1), epoch=6, since=NOW)
