"""What is written to a run's file is read back equal; what is not a record is refused with its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import record as records
from bench.record import BadRecord, Record
from tests.bench.synthetic import gauge, record

MEASURED = record("dolmen", "randwrite-qd1", 1234.5)
ALL: list[Record] = [
    MEASURED,
    record("dolmen", "randwrite-qd1", None, failure="fio saw error 5"),
    record("dolmen", "idle", None),
    gauge("stall-replica-killed", 12.5, 13.0),
    gauge("checksum-cost", failure="perf is missing"),
]


def test_records_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    records.append(file, ALL[:2])
    records.append(file, ALL[2:])
    assert records.load(file) == ALL


def test_a_line_is_one_line_and_carries_what_is_needed_to_doubt_it() -> None:
    line = records.to_line(ALL[0])
    assert "\n" not in line
    fields = json.loads(line)
    assert {
        "commit",
        "machine",
        "seed",
        "started_at",
        "size_bytes",
        "round_index",
        "order_index",
    } <= fields.keys()
    assert {"cpu", "cores", "kernel", "file_system", "fio", "qemu"} <= fields["machine"].keys()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "not json",
        "{}",
        '{"version": 1}',
        '{"version": 1, "kind": "run"}',
        '{"version": 1, "kind": "else"}',
        records.to_line(ALL[0]).replace('"version":1', '"version":2'),
        records.to_line(ALL[0]).replace('"round_index":0', '"round_index":"first"'),
    ],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(records.to_line(ALL[0]) + "\n" + line + "\n")
    with pytest.raises(BadRecord, match=r"run\.jsonl, line 2"):
        records.load(file)


def test_efficiency_is_the_fraction_of_the_ceiling_of_that_minute() -> None:
    assert MEASURED.efficiency is None
    assert replace(MEASURED, ceiling_iops=2469.0).efficiency == pytest.approx(0.5)


def test_this_machine_describes_itself(tmp_path: Path) -> None:
    machine = records.describe_machine(tmp_path)
    assert machine.cores >= 1
    assert machine.memory_bytes > 0
    assert "unknown" not in (machine.cpu, machine.kernel, machine.file_system, machine.fio)


def test_outside_a_checkout_the_commit_is_unknown(tmp_path: Path) -> None:
    assert records.describe_commit(tmp_path) == "unknown"
