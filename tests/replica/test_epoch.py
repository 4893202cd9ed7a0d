"""Who may write: the pure transitions of a replica's metadata."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest, StaleEpoch, StorageError
from protocol.membership import MembershipRecord
from replica import epoch as epochs
from replica.metadata import ReplicaMeta

FRESH = ReplicaMeta(
    volume_id="v",
    replica_id="r1",
    name="data",
    size_bytes=64 * 2**20,
    chain=("layer-1",),
    epoch=0,
    claimed_by="",
    record=MembershipRecord(0, 0, frozenset()),
    synced_at=(0, 0),
    last_boot_id="boot-1",
    clean=True,
    suspect=False,
)


def record(epoch: int, version: int, *members: str) -> MembershipRecord:
    return MembershipRecord(epoch, version, frozenset(members))


def claimed(
    meta: ReplicaMeta = FRESH, *, epoch: int = 1, engine_id: str = "A", boot_id: str = "boot-1"
) -> ReplicaMeta:
    return epochs.claim(meta, epoch=epoch, engine_id=engine_id, boot_id=boot_id)


def in_sync(epoch: int = 1) -> ReplicaMeta:
    return epochs.persist_record(claimed(epoch=epoch), epoch=epoch, record=record(epoch, 1, "r1", "r2"))


def test_a_newer_claim_wins_and_an_older_one_is_stale() -> None:
    meta = claimed(epoch=5)
    assert (meta.epoch, meta.claimed_by, meta.clean) == (5, "A", False)
    assert claimed(meta, epoch=6, engine_id="B").claimed_by == "B"
    with pytest.raises(StaleEpoch) as raised:
        claimed(meta, epoch=4)
    assert raised.value.fields == {"volume": "v", "offered": 4, "current": 5}


def test_a_claim_may_be_repeated_by_its_engine_and_by_no_other() -> None:
    meta = claimed(epoch=5)
    assert claimed(meta, epoch=5) == replace(meta, opens=meta.opens + 1)
    with pytest.raises(StaleEpoch):
        claimed(meta, epoch=5, engine_id="B")


def test_only_the_current_open_epoch_passes() -> None:
    meta = in_sync(epoch=3)
    epochs.check_epoch(meta, 3)
    with pytest.raises(StaleEpoch):
        epochs.check_epoch(meta, 2)
    with pytest.raises(StaleEpoch):
        epochs.check_epoch(epochs.detached(meta, epoch=3), 3)


def test_an_epoch_never_claimed_here_is_not_called_stale() -> None:
    # The engine would take "stale" for "fenced" and give its volume up.
    with pytest.raises(BadRequest, match="epoch 4 is not claimed here; current is 3"):
        epochs.check_epoch(in_sync(epoch=3), 4)


def test_a_record_that_names_the_replica_moves_synced_at() -> None:
    meta = in_sync()
    assert (meta.record, meta.synced_at) == (record(1, 1, "r1", "r2"), (1, 1))


def test_a_record_without_the_replica_is_kept_and_synced_at_stays() -> None:
    meta = epochs.persist_record(in_sync(), epoch=1, record=record(1, 2, "r2"))
    assert (meta.record.stamp, meta.synced_at) == ((1, 2), (1, 1))


@pytest.mark.parametrize(
    "wrong", [record(1, 1, "r1"), record(1, 0, "r1", "r2"), record(2, 1, "r1"), record(0, 9, "r1")]
)
def test_records_go_forward_only_and_only_in_their_epoch(wrong: MembershipRecord) -> None:
    with pytest.raises(BadRequest):
        epochs.persist_record(in_sync(), epoch=1, record=wrong)


def test_the_same_record_again_changes_nothing() -> None:
    meta = in_sync()
    assert epochs.persist_record(meta, epoch=1, record=meta.record) == meta


@pytest.mark.parametrize(
    ("boot_id", "clean", "dirty_count", "suspect"),
    [
        ("boot-2", False, 1, True),  # the page cache is gone, and there were unflushed regions
        ("boot-2", False, 0, False),  # what is unflushed is marked: nothing was
        ("boot-2", True, 1, False),  # closed with everything flushed
        ("boot-1", False, 1, False),  # only the process died: the page cache lived
    ],
)
def test_suspect_is_who_may_have_lost_acknowledged_writes(
    boot_id: str, clean: bool, dirty_count: int, suspect: bool
) -> None:
    meta = replace(in_sync(), clean=clean)
    assert epochs.opened(meta, boot_id=boot_id, dirty_count=dirty_count).suspect is suspect


def test_a_store_that_remembers_a_failed_sync_makes_its_replica_suspect() -> None:
    assert not epochs.opened(in_sync(), boot_id="boot-1", dirty_count=3).suspect
    assert epochs.opened(in_sync(), boot_id="boot-1", dirty_count=0, sync_failed=True).suspect


def test_suspicion_survives_another_restart_and_a_claim() -> None:
    meta = epochs.opened(in_sync(), boot_id="boot-2", dirty_count=3)
    meta = claimed(meta, epoch=2, boot_id="boot-2")
    assert meta.suspect and meta.last_boot_id == "boot-2"
    assert epochs.opened(meta, boot_id="boot-2", dirty_count=3).suspect


def test_the_record_of_an_open_does_not_clear_suspicion_before_its_reconcile() -> None:
    meta = claimed(epochs.opened(in_sync(), boot_id="boot-2", dirty_count=3), epoch=2, boot_id="boot-2")
    meta = epochs.persist_record(meta, epoch=2, record=record(2, 1, "r1", "r2"))
    assert meta.suspect
    assert epochs.regions_completed(meta, epoch=2, doubtful_count=1).suspect
    assert not epochs.regions_completed(meta, epoch=2, doubtful_count=0).suspect


def test_completed_regions_without_a_record_that_names_it_do_not_clear_suspicion() -> None:
    meta = claimed(epochs.opened(in_sync(), boot_id="boot-2", dirty_count=3), epoch=2, boot_id="boot-2")
    assert epochs.regions_completed(meta, epoch=2, doubtful_count=0).suspect  # its record is of epoch 1
    without = epochs.persist_record(meta, epoch=2, record=record(2, 1, "r2"))
    assert epochs.regions_completed(without, epoch=2, doubtful_count=0).suspect


def test_a_failed_sync_makes_suspect() -> None:
    assert epochs.store_failed(in_sync()).suspect


def test_every_open_counts() -> None:
    meta = FRESH
    for boot_id in ("boot-1", "boot-1", "boot-2"):
        meta = epochs.opened(meta, boot_id=boot_id, dirty_count=0)
    assert meta.opens == 3


def test_every_claim_counts_so_that_what_an_engine_saw_is_more_than_any_older_state_opens_with() -> None:
    yesterday = claimed(epochs.opened(FRESH, boot_id="boot-1", dirty_count=0), epoch=1)
    seen = claimed(epochs.opened(yesterday, boot_id="boot-1", dirty_count=0), epoch=1).opens
    put_back = epochs.opened(yesterday, boot_id="boot-2", dirty_count=0)
    assert put_back.opens < seen
    lived_on = claimed(put_back, epoch=2, engine_id="B")
    assert lived_on.opens >= seen  # which is why the claim itself must say what was known
    assert not lived_on.restored
    told = epochs.claim(put_back, epoch=2, engine_id="B", boot_id="boot-2", opens_known=seen)
    assert told.restored
    right = epochs.claim(put_back, epoch=2, engine_id="B", boot_id="boot-2", opens_known=put_back.opens)
    assert not right.restored


def test_a_restored_replica_is_trusted_again_under_the_rule_of_a_suspect_one() -> None:
    meta = claimed(replace(in_sync(), restored=True), epoch=2, engine_id="B")
    assert epochs.regions_completed(meta, epoch=2, doubtful_count=0).restored  # its record is of epoch 1
    meta = epochs.persist_record(meta, epoch=2, record=record(2, 1, "r1", "r2"))
    assert epochs.opened(meta, boot_id="boot-1", dirty_count=0).restored
    assert epochs.regions_completed(meta, epoch=2, doubtful_count=1).restored
    assert not epochs.regions_completed(meta, epoch=2, doubtful_count=0).restored
    assert not epochs.detached(meta, epoch=2).restored


def test_a_detach_closes_the_epoch_and_may_be_repeated() -> None:
    meta = epochs.detached(in_sync(), epoch=1)
    assert (meta.clean, meta.claimed_by, meta.epoch) == (True, "", 1)
    assert epochs.detached(meta, epoch=1) == meta
    with pytest.raises(StaleEpoch):
        claimed(meta, epoch=1)
    assert claimed(meta, epoch=2).epoch == 2


def test_a_detach_of_another_epoch_is_refused() -> None:
    with pytest.raises(StaleEpoch):
        epochs.detached(claimed(in_sync(), epoch=2), epoch=1)


def test_a_stopped_server_leaves_its_epoch_open() -> None:
    meta = epochs.closed(in_sync())
    assert meta.clean and meta.claimed_by == "A"
    epochs.check_epoch(meta, 1)


events = st.lists(
    st.tuples(
        st.sampled_from(["claim", "record", "complete", "detach", "open", "close", "fail"]),
        st.integers(1, 4),
        st.integers(1, 3),
        st.sampled_from("AB"),
        st.booleans(),
    ),
    max_size=30,
)


@given(events)
def test_whatever_happens_epochs_and_stamps_never_go_back(
    history: list[tuple[str, int, int, str, bool]],
) -> None:
    meta = FRESH
    owners: dict[int, str] = {}
    for kind, epoch, number, engine, named in history:
        before = meta
        try:
            match kind:
                case "claim":
                    meta = epochs.claim(meta, epoch=epoch, engine_id=engine, boot_id=f"boot-{number}")
                    assert owners.setdefault(epoch, engine) == engine, "an epoch had two owners"
                case "record":
                    meta = epochs.persist_record(
                        meta, epoch=epoch, record=record(epoch, number, "r1" if named else "r2")
                    )
                case "complete":
                    meta = epochs.regions_completed(meta, epoch=epoch, doubtful_count=number - 1)
                case "detach":
                    meta = epochs.detached(meta, epoch=epoch)
                case "open":
                    meta = epochs.opened(meta, boot_id=f"boot-{number}", dirty_count=epoch - 1)
                case "close":
                    meta = epochs.closed(meta)
                case "fail":
                    meta = epochs.store_failed(meta)
        except StorageError:
            assert meta is before
        assert (meta.epoch, meta.record.stamp, meta.synced_at) >= (
            before.epoch,
            before.record.stamp,
            before.synced_at,
        )
        assert meta.opens == before.opens + (kind == "open" or (kind == "claim" and meta is not before))
        if before.suspect and not meta.suspect:
            assert kind in ("complete", "detach") and "r1" in meta.record.in_sync
