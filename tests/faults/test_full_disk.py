"""Disks run full, on file systems of their own in memory: first under one replica, then under all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import prepared
from tests.faults.incident import Incident
from tests.support.cluster import cluster
from tests.support.nbd_clients import ReconnectingClient
from tests.support.nbd_library import nbd
from tests.support.tmpfs import free_bytes

MIB = 1024 * 1024
DISK_BYTES = 96 * MIB
NODES = ("node1", "node2", "node3")

LEFT_BYTES = 4 * MIB
"""What a full disk has left: its replica meets the end in the middle of what the test writes."""

BALLAST = "ballast"


@pytest.fixture
def incident() -> Iterator[Incident]:
    with cluster(disk_bytes=dict.fromkeys(NODES, DISK_BYTES)) as dolmen:
        yield from prepared(dolmen)


def fill(disk: Path) -> None:
    with open(disk / BALLAST, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(disk) - LEFT_BYTES)


def make_room(disk: Path) -> None:
    (disk / BALLAST).unlink()


def disk_of(incident: Incident, replica: str) -> Path:
    return incident.directory_of(replica).parents[1]


def pattern(block: int) -> bytes:
    return bytes([block % 255 + 1]) * MIB


def test_full_disks_cost_a_replica_or_an_error_but_never_what_was_written(incident: Incident) -> None:
    victim = incident.replica_ids[1]
    disks = [disk_of(incident, replica) for replica in incident.replica_ids]
    with ReconnectingClient(incident.uri) as client:
        _full_under_one(incident, client, victim)
        _full_under_all(incident, client, disks)
        assert client.reconnect_count == 0
        for block in range(32):
            assert client.read(block * MIB, MIB) == pattern(block)
    incident.check_healthy_and_equal()


def _full_under_one(incident: Incident, client: ReconnectingClient, victim: str) -> None:
    disk = disk_of(incident, victim)
    fill(disk)
    for block in range(16):
        client.write(block * MIB, pattern(block))
    client.flush()
    incident.wait_until_left_out(victim)
    incident.wait_for("the reason", lambda: "space" in incident.replica(victim)["reason"].lower())
    said = incident.show()
    assert said["state"] == "degraded"
    assert incident.replica(victim)["state"] in ("stale", "resyncing")  # it is tried again every second or so
    for block in range(16):
        assert client.read(block * MIB, MIB) == pattern(block)
    make_room(disk)
    incident.check_healthy_and_equal()  # by itself


def _full_under_all(incident: Incident, client: ReconnectingClient, disks: list[Path]) -> None:
    for disk in disks:
        fill(disk)
    refused = []
    for block in range(16, 32):
        try:
            client.write(block * MIB, pattern(block))
        except nbd.Error as error:
            assert error.errnum == errno.ENOSPC, error
            refused.append(block)
    assert refused, "16 MiB do not fit into what is left"
    assert incident.in_sync() == set(incident.replica_ids), "all have refused the same: nobody is behind"
    # What needs no space goes on.
    for block in range(16):
        assert client.read(block * MIB, MIB) == pattern(block)
    client.write(0, pattern(0))
    for disk in disks:
        make_room(disk)
    for block in refused:
        client.write(block * MIB, pattern(block))
    client.flush()
