"""The ceiling program moves the right bytes: a bar that loses data would be no bar."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import processes
from bench.processes import ProcessFailed
from bench.systems import Ceiling, make_system
from bench.workloads import WORKLOADS, fio_args, run_fio

SIZE_BYTES = 16 * 2**20
CACHE = Path(__file__).parent.parent.parent / ".cache" / "bench"


@pytest.fixture
def ceiling(tmp_path: Path) -> Iterator[Ceiling]:
    system = make_system("ceiling", data=tmp_path, sockets=tmp_path, size_bytes=SIZE_BYTES, cache=CACHE)
    assert isinstance(system, Ceiling)
    try:
        system.start()
        yield system
    finally:
        system.stop()


def nbdcopy(source: str, target: str) -> None:
    subprocess.run(["nbdcopy", "--flush", source, target], check=True, timeout=60, capture_output=True)


def test_what_is_copied_in_is_in_all_three_files_and_comes_out_again(
    ceiling: Ceiling, tmp_path: Path
) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    back.write_bytes(bytes(SIZE_BYTES))
    nbdcopy(str(image), ceiling.uri)
    for file in ceiling.files:
        assert file.read_bytes() == image.read_bytes()
    # Reads take the replicas in turn, so this reads all of them.
    nbdcopy(ceiling.uri, str(back))
    assert back.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("bs", ["4k", "1m", "512-1m"])
def test_four_clients_read_back_what_they_wrote(ceiling: Ceiling, bs: str) -> None:
    verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=3", "--output-format=terse"]
    shape = [
        f"--bsrange={bs}" if "-" in bs else f"--bs={bs}",
        "--iodepth=16",
        "--numjobs=4",
        "--bs_unaligned=1",
    ]
    place = ["--size=4m", "--offset_increment=4m", "--rw=randwrite", "--thread", "--ioengine=nbd"]
    line = ["fio", "--name=verify", *place, *shape, *verify, f"--uri={ceiling.uri}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    contents = [file.read_bytes() for file in ceiling.files]
    assert contents[0] == contents[1] == contents[2]
    assert any(contents[0])


def test_flush_after_each_write_is_answered(ceiling: Ceiling) -> None:
    workload = WORKLOADS["randwrite-qd1-flush"]
    args = fio_args(workload, uri=ceiling.uri, size_bytes=SIZE_BYTES, seed=1, seconds=0.3)
    assert run_fio(args, workload, timeout_s=30.0).flush_us_p50


def test_a_client_that_asks_past_the_end_is_closed_and_others_are_served(ceiling: Ceiling) -> None:
    script = f"h.set_strict_mode(0); h.pread(4096, {SIZE_BYTES - 2048})"
    done = subprocess.run(
        ["nbdsh", "-u", ceiling.uri, "-c", script], capture_output=True, timeout=60, check=False
    )
    assert done.returncode != 0
    workload = WORKLOADS["randread-qd1"]
    args = fio_args(workload, uri=ceiling.uri, size_bytes=SIZE_BYTES, seed=1, seconds=0.3)
    assert run_fio(args, workload, timeout_s=30.0).samples > 0


def test_stop_leaves_no_process_and_no_file(ceiling: Ceiling) -> None:
    roles = ceiling.pids_by_role()
    pids = [pid for some in roles.values() for pid in some]
    assert [len(roles["engine"]), len(roles["replica"])] == [1, 3]
    ceiling.stop()
    assert not any(map(processes.is_alive, pids))
    assert not ceiling.directory.exists()
    assert not ceiling.socket.exists()


def test_a_program_that_cannot_start_says_why(tmp_path: Path) -> None:
    long_name = tmp_path / ("x" * 100)
    long_name.mkdir()
    system = make_system("ceiling", data=tmp_path, sockets=long_name, size_bytes=SIZE_BYTES, cache=CACHE)
    try:
        with pytest.raises(ProcessFailed, match="did not start"):
            system.start()
    finally:
        system.stop()
    assert not system.directory.exists()
