"""ext4 on the kernel's NBD client, in a guest, while everything beneath it is killed, the guest last."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.guest.files import writing_files
from tests.system.conftest import VOLUME_BYTES, Volume

STEPS = ("one replica", "engine", "all replicas", "engine and all replicas", "daemon")
FILES_PER_STEP = 8


def strike(volume: Volume, what: str) -> None:
    dolmen, name = volume.dolmen, volume.name
    replicas = dolmen.replica_pids(name)
    if what == "daemon":
        dolmen.kill_daemon()
        return
    if what == "one replica":
        dolmen.kill_replica(name, sorted(replicas)[0])
        return
    pids = [dolmen.engine_pid(name)] if what.startswith("engine") else []
    pids += list(replicas.values()) if "replicas" in what else []
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.guest
def test_every_file_that_a_guest_synced_is_there_after_every_kill_beneath_it(
    volume: Volume, tmp_path: Path
) -> None:
    count = FILES_PER_STEP * (len(STEPS) + 1)
    with writing_files(
        uri=volume.uri,
        volume=volume.name,
        dolmen_dir=volume.dolmen.dir,
        size_bytes=VOLUME_BYTES,
        work=tmp_path,
        count=count,
        slots=count + 1,
    ) as writer:
        for step, what in enumerate(STEPS, 1):
            writer.guest.wait_for(f"synced {step * FILES_PER_STEP}.")
            strike(volume, what)
        volume.dolmen.up()  # the daemon was killed last
        writer.guest.wait_for("no errors")
        assert writer.kill() == count
        volume.dolmen.wait_for_state(volume.name, "healthy")
        volume.dolmen.verify(volume.name)
        writer.check(count)
