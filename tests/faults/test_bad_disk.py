"""A replica's files are damaged behind its back: no wrong byte is served, and the damage is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.errors import BadRequest, Unreachable
from tests.faults.incident import Incident
from tests.support.linearizability import BLOCK_BYTES, Value, encode_tag
from tests.support.nbd_clients import ReconnectingClient

BLOCK = 1000
TEXT = encode_tag(BLOCK, Value(9, 9))
OFFSET = BLOCK * BLOCK_BYTES


def flip_a_bit(directory: Path) -> None:
    """In the middle of BLOCK, in the head's data file; what the page cache holds changes too."""
    (data,) = directory.glob("*/data")
    with open(data, "r+b") as file:
        file.seek(OFFSET + 2000)
        (byte,) = file.read(1)
        file.seek(OFFSET + 2000)
        file.write(bytes([byte ^ 0x10]))
        file.flush()
        os.fsync(file.fileno())


def read_until_found(incident: Incident) -> None:
    """Any replica may answer a read: the volume is read until the bad copy was met and replaced. No
    read returns anything but what was written."""
    with ReconnectingClient(incident.uri) as client:

        def found() -> bool:
            assert client.read(OFFSET, BLOCK_BYTES) == TEXT
            return incident.metric("dolmen_engine_repairs_total") >= 1

        incident.wait_for("the repair", found)
        assert client.reconnect_count == 0


def test_a_bit_that_flips_under_a_running_server_is_found_at_read_and_repaired(incident: Incident) -> None:
    victim = incident.replica_ids[1]
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, TEXT)
        client.flush()
    flip_a_bit(incident.directory_of(victim))
    found = incident.verify()
    assert found["verdict"] == "different"
    (bad,) = [replica for replica in found["replicas"] if replica["damaged_count"]]
    assert (bad["id"], bad["damaged_blocks"]) == (victim, [BLOCK])
    read_until_found(incident)
    assert incident.metric("dolmen_replica_checksum_errors_total", replica=victim) >= 1
    assert incident.metric("dolmen_replica_repairs_total", replica=victim) == 1
    assert incident.in_sync() == set(incident.replica_ids), "one bad block is no reason to lose a replica"
    incident.check_healthy_and_equal()


def test_a_bit_that_flipped_while_the_server_was_down_is_found_at_read_and_repaired(
    incident: Incident,
) -> None:
    victim = incident.replica_ids[2]
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, TEXT)
    incident.client.detach(incident.name)  # its write-intent log is clean: nothing will be recovered
    assert incident.replica(victim)["dirty_count"] == 0
    incident.stop_cleanly(victim)
    flip_a_bit(incident.directory_of(victim))
    incident.start(victim)
    incident.client.attach(incident.name)
    incident.dolmen.wait_for_state(incident.name, "healthy")
    read_until_found(incident)
    assert incident.metric("dolmen_replica_repairs_total", replica=victim) == 1
    incident.check_healthy_and_equal()


def test_a_bit_that_flipped_in_a_region_under_writes_does_not_survive_the_resync(incident: Incident) -> None:
    # Recovery cannot tell it from an overwrite that was cut off, so it believes the data. The replica missed
    # writes meanwhile, and its dirty regions are compared before it serves a read.
    victim = incident.replica_ids[0]
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, TEXT)
        incident.kill_and_keep_down(victim)
        flip_a_bit(incident.directory_of(victim))
        incident.wait_until_left_out(victim)
        incident.start(victim)
        incident.dolmen.wait_for_state(incident.name, "healthy")
        for _ in range(20):
            assert client.read(OFFSET, BLOCK_BYTES) == TEXT
    incident.check_healthy_and_equal()


def truncated_map(directory: Path) -> None:
    (file,) = directory.glob("*/map")
    os.truncate(file, file.stat().st_size // 2)


def truncated_regions(directory: Path) -> None:
    os.truncate(directory / "regions", 4096 + 100)


def garbage_metadata(directory: Path) -> None:
    (directory / "replica.meta").write_bytes(b"\xa5" * 700)


def missing_data(directory: Path) -> None:
    (file,) = directory.glob("*/data")
    file.unlink()


def missing_directory(directory: Path) -> None:
    directory.rename(directory.parents[1] / "moved-away")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncated_map, "/map: it has"),
        (truncated_regions, "/regions: it has"),
        (garbage_metadata, "replica.meta"),
        (missing_data, "/data: it is missing"),
        (missing_directory, "does not hold it"),
    ],
    ids=["truncated map", "truncated regions", "garbage metadata", "missing data", "missing directory"],
)
def test_a_damaged_replica_is_named_with_its_reason_and_the_others_serve(
    incident: Incident, damage: Callable[[Path], None], word: str
) -> None:
    victim = incident.replica_ids[1]
    with incident.load(seed=31) as workload:
        incident.stop_cleanly(victim)
        damage(incident.directory_of(victim))
        incident.start(victim)
        incident.wait_for("the reason", lambda: word in incident.replica(victim)["reason"])
        workload.wait_for_answers(300)
    said = incident.show()
    assert said["state"] == "degraded"
    assert victim not in said["membership"]["in_sync"]
    assert incident.replica(victim)["state"] == "stale"
    result = incident.verify()
    assert result["verdict"] == "incomplete", "two replicas are equal, the third cannot be compared"
    assert [replica["compared"] for replica in result["replicas"]] == [True, False, True]
    with incident.load(seed=33):
        rebuilt = incident.client.rebuild_replica(incident.name, victim)
        assert victim in rebuilt["membership"]["in_sync"]
    incident.check_healthy_and_equal()


def test_only_a_replica_that_cannot_be_opened_is_thrown_away(incident: Incident) -> None:
    victim, other, _ = incident.replica_ids
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, TEXT)
    rebuild = incident.client.rebuild_replica
    with pytest.raises(BadRequest, match="is open, only one that is damaged"):
        rebuild(incident.name, victim)
    with pytest.raises(BadRequest, match="has no replica"):
        rebuild(incident.name, "nobody")
    incident.kill_and_keep_down(other)
    with pytest.raises(Unreachable, match="is stopped"):
        rebuild(incident.name, other)
    truncated_map(incident.directory_of(other))
    incident.client.detach(incident.name)
    incident.start(other)
    incident.wait_for("the damage to be seen", lambda: "/map: it has" in incident.replica(other)["reason"])
    with pytest.raises(BadRequest, match=r"is detached.*volume attach"):
        rebuild(incident.name, other)
    incident.client.attach(incident.name)
    incident.wait_until_left_out(other)
    assert "in sync" in incident.dolmen.dolmen("replica", "rebuild", incident.name, other).stdout
    with ReconnectingClient(incident.uri) as client:
        assert client.read(OFFSET, BLOCK_BYTES) == TEXT
    incident.check_healthy_and_equal()


def test_a_replica_damaged_while_the_volume_was_detached_is_left_out_at_the_next_attach(
    incident: Incident,
) -> None:
    victim = incident.replica_ids[0]  # where reads and reconciles would begin
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, TEXT)
    incident.client.detach(incident.name)
    incident.stop_cleanly(victim)
    truncated_map(incident.directory_of(victim))
    incident.start(victim)
    assert victim in incident.in_sync(), "the record does not know yet"
    incident.client.attach(incident.name)
    incident.wait_until_left_out(victim)
    assert incident.show()["state"] == "degraded"
    with incident.load(seed=32), ReconnectingClient(incident.uri) as client:
        assert client.read(OFFSET, BLOCK_BYTES) == TEXT


def test_a_disk_that_was_put_back_to_yesterday_serves_nothing_old(incident: Incident) -> None:
    # The whole replica directory, map and metadata included, is consistent: only epochs and records tell.
    victim = incident.replica_ids[0]
    old = encode_tag(BLOCK, Value(1, 1))
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, old)
    incident.client.detach(incident.name)
    directory = incident.directory_of(victim)
    incident.stop_cleanly(victim)
    shutil.copytree(directory, directory.parents[1] / "yesterday")
    incident.start(victim)
    incident.client.attach(incident.name)
    incident.dolmen.wait_for_state(incident.name, "healthy")
    with ReconnectingClient(incident.uri) as client:
        client.write(OFFSET, TEXT)
    incident.client.detach(incident.name)
    incident.stop_cleanly(victim)
    shutil.rmtree(directory)
    (directory.parents[1] / "yesterday").rename(directory)
    incident.start(victim)
    incident.client.attach(incident.name)
    with ReconnectingClient(incident.uri) as client:
        for _ in range(20):
            assert client.read(OFFSET, BLOCK_BYTES) == TEXT
        incident.check_healthy_and_equal()
        for _ in range(20):
            assert client.read(OFFSET, BLOCK_BYTES) == TEXT
