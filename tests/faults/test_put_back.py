"""A directory is put back from a copy of the very same epoch: nothing old is served, and it is resynced."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.incident import Incident
from tests.support.linearizability import BLOCK_BYTES, Value, encode_tag
from tests.support.nbd_clients import ReconnectingClient

BLOCKS = (5, 2000, 12000)


def write(incident: Incident, generation: int) -> None:
    with ReconnectingClient(incident.uri) as client:
        for block in BLOCKS:
            client.write(block * BLOCK_BYTES, encode_tag(block, Value(9, generation)))
        client.flush()


def check(incident: Incident, generation: int) -> None:
    with ReconnectingClient(incident.uri) as client:
        for _ in range(10):  # any replica may answer
            for block in BLOCKS:
                wanted = encode_tag(block, Value(9, generation))
                assert client.read(block * BLOCK_BYTES, BLOCK_BYTES) == wanted


def copied(incident: Incident, victim: str) -> Path:
    """Its directory as it is now, its server stopped meanwhile."""
    incident.stop_cleanly(victim)
    incident.wait_until_left_out(victim)
    backup = incident.directory_of(victim).parents[1] / "yesterday"
    subprocess.run(["cp", "-a", incident.directory_of(victim), backup], check=True)
    incident.start(victim)
    incident.check_healthy_soon()
    return backup


def put_back(incident: Incident, victim: str, backup: Path, *, over: bool) -> None:
    directory = incident.directory_of(victim)
    if over:
        subprocess.run(["cp", "-a", f"{backup}/.", directory], check=True)
    else:
        shutil.rmtree(directory)
        subprocess.run(["cp", "-a", backup, directory], check=True)
    shutil.rmtree(backup)


@pytest.mark.parametrize("over", [True, False])
def test_put_back_while_the_engine_lives(incident: Incident, over: bool) -> None:
    victim = incident.replica_ids[0]
    write(incident, 1)
    backup = copied(incident, victim)
    write(incident, 2)
    epoch = incident.show()["epoch"]
    incident.kill_and_keep_down(victim)
    incident.wait_until_left_out(victim)
    put_back(incident, victim, backup, over=over)
    incident.start(victim)
    check(incident, 2)
    incident.check_healthy_soon()
    assert incident.show()["epoch"] == epoch
    check(incident, 2)


@pytest.mark.parametrize("over", [True, False])
def test_put_back_while_nobody_looked(incident: Incident, over: bool) -> None:
    victim = incident.replica_ids[0]
    write(incident, 1)
    backup = copied(incident, victim)
    write(incident, 2)
    incident.client.detach(incident.name)
    incident.stop_cleanly(victim)
    put_back(incident, victim, backup, over=over)
    incident.start(victim)
    incident.client.attach(incident.name)
    check(incident, 2)
    incident.check_healthy_soon()
    check(incident, 2)
