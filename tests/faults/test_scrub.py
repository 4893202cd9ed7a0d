"""Damage that nobody reads: ``dolmen volume scrub`` finds it, and the engine repairs it from another copy."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from typing import Any

import nbd
import pytest

from cli.output import Exit
from tests.faults.incident import Incident
from tests.support.linearizability import BLOCK_BYTES, Value, encode_tag
from tests.support.nbd_clients import ReconnectingClient

COLD = (1500, 4000, 9000, 15000)
"""Blocks in four regions that no client reads. The workload's are the first ones."""


def text(block: int) -> bytes:
    return encode_tag(block, Value(9, 9))


def write(incident: Incident, blocks: Iterable[int] = COLD) -> None:
    with ReconnectingClient(incident.uri) as client:
        for block in blocks:
            client.write(block * BLOCK_BYTES, text(block))
        client.flush()


def read(incident: Incident, blocks: Iterable[int] = COLD) -> None:
    with ReconnectingClient(incident.uri) as client:
        for block in blocks:
            assert client.read(block * BLOCK_BYTES, BLOCK_BYTES) == text(block)


def flip(incident: Incident, replica: str, *blocks: int) -> None:
    """One bit of each block, behind the server's back; what the page cache holds changes too."""
    (data,) = incident.directory_of(replica).glob("*/data")
    with open(data, "r+b") as file:
        for block in blocks:
            file.seek(block * BLOCK_BYTES + 2000)
            (byte,) = file.read(1)
            file.seek(block * BLOCK_BYTES + 2000)
            file.write(bytes([byte ^ 0x10]))
        file.flush()
        os.fsync(file.fileno())


def scrub(incident: Incident, *, code: Exit) -> dict[str, Any]:
    done = incident.dolmen.dolmen("volume", "scrub", incident.name, "--wait", "-o", "json", check=False)
    assert done.returncode == code, done.stdout + done.stderr
    job = json.loads(done.stdout)
    assert (job["kind"], job["state"]) == ("scrub", "done")
    result: dict[str, Any] = job["result"]
    return result


def findings(result: dict[str, Any]) -> dict[str, list[tuple[int, bool]]]:
    """By replica, of those that had any: (offset, repaired)."""
    return {
        replica["id"]: [(finding["offset_bytes"], finding["repaired"]) for finding in replica["findings"]]
        for replica in result["replicas"]
        if replica["found_count"]
    }


def test_damage_in_cold_blocks_of_one_replica_is_found_and_repaired(incident: Incident) -> None:
    victim = incident.replica_ids[1]
    write(incident)
    assert scrub(incident, code=Exit.OK)["verdict"] == "clean"
    flip(incident, victim, *COLD[:3])
    result = scrub(incident, code=Exit.OK)
    assert result["verdict"] == "repaired"
    assert findings(result) == {victim: [(block * BLOCK_BYTES, True) for block in COLD[:3]]}
    assert all(replica["scrubbed"] for replica in result["replicas"])
    assert incident.metric("dolmen_replica_repairs_total", replica=victim) == 3
    assert incident.metric("dolmen_replica_scrub_damaged_found_total", replica=victim) == 3
    assert incident.metric("dolmen_replica_damaged_blocks") == 0
    assert incident.in_sync() == set(incident.replica_ids)
    read(incident)
    assert scrub(incident, code=Exit.OK)["verdict"] == "clean"
    incident.check_healthy_and_equal()


def test_two_bad_copies_of_three_are_repaired_from_the_third(incident: Incident) -> None:
    good, *bad = incident.replica_ids
    write(incident)
    for victim in bad:
        flip(incident, victim, *COLD)
    result = scrub(incident, code=Exit.OK)
    assert findings(result) == {victim: [(block * BLOCK_BYTES, True) for block in COLD] for victim in bad}
    incident.kill_and_keep_down(good)
    incident.wait_until_left_out(good)
    read(incident)  # of those that were bad
    incident.start(good)
    incident.check_healthy_soon()


def test_a_block_that_is_bad_everywhere_is_named_and_fails_alone(incident: Incident) -> None:
    lost, *rest = COLD
    write(incident)
    for victim in incident.replica_ids:
        flip(incident, victim, lost)
    result = scrub(incident, code=Exit.DIFFERENT)
    assert result["verdict"] == "damaged"
    assert findings(result) == {victim: [(lost * BLOCK_BYTES, False)] for victim in incident.replica_ids}
    assert all(finding["unreadable"] for replica in result["replicas"] for finding in replica["findings"])
    told = incident.dolmen.dolmen("volume", "scrub", incident.name, "--wait", check=False)
    assert told.returncode == Exit.DIFFERENT
    assert f"block at {lost * BLOCK_BYTES}: NO REPLICA HAS A GOOD COPY" in told.stdout
    with ReconnectingClient(incident.uri) as client:
        with pytest.raises(nbd.Error) as raised:
            client.read(lost * BLOCK_BYTES, BLOCK_BYTES)
        assert raised.value.errnum == errno.EIO
        client.write(lost * BLOCK_BYTES, text(lost))  # who has the data somewhere can bring it back
    read(incident)
    assert rest
    assert scrub(incident, code=Exit.OK)["verdict"] in ("clean", "repaired")
    incident.check_healthy_and_equal()


def test_damage_found_on_a_detached_volume_is_listed_and_repaired_at_the_next_attach(
    incident: Incident,
) -> None:
    victim = incident.replica_ids[2]
    write(incident)
    incident.client.detach(incident.name)
    flip(incident, victim, *COLD)
    result = scrub(incident, code=Exit.DIFFERENT)
    assert not result["attached"]
    assert findings(result) == {victim: [(block * BLOCK_BYTES, False) for block in COLD]}
    (condition,) = [c for c in incident.show()["conditions"] if c["reason"] == "scrub_findings"]
    assert victim in condition["waits_for"]
    incident.client.attach(incident.name)
    incident.wait_for(
        "the repair, which nobody asked for", lambda: incident.metric("dolmen_replica_damaged_blocks") == 0
    )
    assert incident.metric("dolmen_replica_repairs_total", replica=victim) == len(COLD)
    assert scrub(incident, code=Exit.OK)["verdict"] == "clean"
    read(incident)


def test_a_scrub_survives_the_kill_of_a_replica_server(incident: Incident) -> None:
    victim = incident.replica_ids[0]
    write(incident)
    flip(incident, incident.replica_ids[1], COLD[3])
    job = incident.client.scrub(incident.name)
    dead = incident.pid_of(victim)
    incident.kill(dead)
    assert incident.client.scrub(incident.name)["id"] == job["id"], "it is asked for once"
    incident.wait_for_another_server(victim, dead)
    result = scrub(incident, code=Exit.OK)
    assert all(replica["scrubbed"] for replica in result["replicas"])
    incident.check_healthy_soon()
    read(incident)


def test_a_scrub_under_load_disturbs_no_client(incident: Incident) -> None:
    victim = incident.replica_ids[1]
    write(incident)
    with incident.load(seed=77):
        flip(incident, victim, *COLD)
        result = scrub(incident, code=Exit.OK)
    assert findings(result) == {victim: [(block * BLOCK_BYTES, True) for block in COLD]}
    read(incident)
    incident.check_healthy_and_equal()
