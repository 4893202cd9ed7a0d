"""The order of rounds, records of failures, and nothing left behind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench import processes, record, runner, systems
from bench.processes import ProcessFailed
from bench.record import RunRecord
from bench.runner import NotPossible, Plan, compare
from bench.systems import System

REPOSITORY = Path(__file__).parent.parent.parent


def plan(tmp_path: Path, *names: str, rounds: int = 1, size_bytes: int = 16 * 2**20) -> Plan:
    return Plan(
        systems=names,
        workloads=("randwrite-qd1", "randwrite-half-load"),
        rounds=rounds,
        seconds=0.3,
        warmup_s=0.0,
        idle_s=0.1,
        size_bytes=size_bytes,
        seed=1,
        out=tmp_path / "out",
        cache=tmp_path / "cache",
        repository=REPOSITORY,
    )


def quiet(_text: str, _done: int) -> None:
    pass


class Broken(System):
    name = "broken"
    copies = 1

    def start(self) -> None:
        raise ProcessFailed("no such thing")

    def stop(self) -> None:
        pass

    def pids_by_role(self) -> dict[str, list[int]]:
        raise AssertionError("it never started")


def test_each_system_is_first_and_last_equally_often() -> None:
    names = ["a", "b", "c"]
    orders = [runner.rotated(names, by) for by in range(6)]
    for place in range(3):
        assert Counter(order[place] for order in orders) == {"a": 2, "b": 2, "c": 2}


def test_a_system_that_does_not_start_is_a_failed_record_of_every_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "SYSTEMS", {**systems.SYSTEMS, "broken": Broken})
    monkeypatch.setattr(runner, "SYSTEMS", {**systems.SYSTEMS, "broken": Broken})
    file = compare(plan(tmp_path, "broken", "ceiling", rounds=2), quiet)
    found = [r for r in record.load(file) if isinstance(r, RunRecord)]
    # Two systems, two workloads in two rounds, and idle.
    assert len(found) == 2 * (2 * 2 + 1)
    broken = [r for r in found if r.system == "broken"]
    assert {r.failure for r in broken} == {"did not start: no such thing"}
    ceiling = {r.workload: r for r in found if r.system == "ceiling"}
    assert ceiling["randwrite-qd1"].failure is None
    assert ceiling["randwrite-qd1"].ceiling_iops == ceiling["randwrite-qd1"].result.iops  # type: ignore[union-attr]
    assert ceiling["randwrite-half-load"].failure == "no result of randwrite-qd32 to take half of"
    assert ceiling["idle"].use is not None


@pytest.mark.parametrize("interrupt_at", ["start", "round", "idle"])
def test_ctrl_c_leaves_no_process_and_no_file_and_keeps_what_was_measured(
    tmp_path: Path, interrupt_at: str
) -> None:
    asked = plan(tmp_path, "ceiling", "qemu-nbd")
    pids: list[int] = []

    def interrupt(text: str, _done: int) -> None:
        pids.extend(pid for some in processes.with_descendants({"": [own_pid()]}).values() for pid in some)
        if text.startswith(interrupt_at) and "qemu-nbd" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(asked, interrupt)
    servers = set(pids) - {own_pid()}
    assert servers
    assert not any(map(processes.is_alive, servers))
    assert not list(asked.cache.glob("data-*"))
    if interrupt_at == "idle":
        (file,) = asked.out.glob("*.jsonl")
        assert len(record.load(file)) == 5


def own_pid() -> int:
    import os

    return os.getpid()


def test_files_of_a_comparison_that_was_killed_are_swept_and_those_of_a_living_one_are_not(
    tmp_path: Path,
) -> None:
    dead = tmp_path / f"{runner.DATA_PREFIX}{2**22 + 1}"  # above every process id
    living = tmp_path / f"{runner.DATA_PREFIX}{own_pid()}"
    for directory in (dead, living):
        (directory / "qemu-nbd").mkdir(parents=True)
        (directory / "qemu-nbd" / "disk").write_bytes(b"x")
    runner.sweep(tmp_path)
    assert not dead.exists()
    assert living.exists()


def test_too_little_space_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    asked = plan(tmp_path, "ceiling", size_bytes=2**60)
    with pytest.raises(NotPossible, match="GiB must be free") as refused:
        compare(asked, quiet)
    assert "--size" in refused.value.next_step
    assert not list(asked.cache.glob("data-*"))
