"""The disk that loses power loses what was not flushed, and that only."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.power import power_disk, skip_without_power_disks
from tests.support.processes import run

MIB = 1024 * 1024


def test_after_a_power_loss_what_was_synced_is_there_and_what_was_not_is_gone(tmp_path: Path) -> None:
    skip_without_power_disks()
    mount_point = tmp_path / "a" / "b" / "disk"
    with power_disk(mount_point, size_bytes=32 * MIB) as disk:
        for name in ("synced", "not synced"):
            with open(mount_point / name, "wb") as file:
                file.write(b"x" * MIB)
                if name == "synced":
                    file.flush()
                    os.fsync(file.fileno())
        disk.lose_power()
        assert not list(mount_point.iterdir())
        disk.plug_in()
        assert (mount_point / "synced").read_bytes() == b"x" * MIB
        left = mount_point / "not synced"
        assert not left.exists() or left.stat().st_size == 0
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert str(tmp_path) not in run("losetup", "-a").stdout
