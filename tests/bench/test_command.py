"""``dolmen bench`` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record as records
from tests.bench.synthetic import RUN, record

REPOSITORY = Path(__file__).parent.parent.parent


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "cli.main", "bench", *args]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=90, check=False)


def test_a_run_measures_writes_records_and_is_listed_and_shown(tmp_path: Path) -> None:
    where = ["--out", str(tmp_path / "out")]
    small = ["--seconds", "0.5", "--size", "16MiB", "--dir", str(tmp_path / "cache")]
    done = bench("run", "ceiling", "randwrite-qd32", *small, *where, "-o", "json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["cells"][0]["iops"]["median"] > 0
    assert "round 1/1" in done.stderr
    assert not list((tmp_path / "cache").glob("data-*"))
    listed = json.loads(bench("ls", *where, "-o", "json").stdout)
    assert [row["run"] for row in listed] == [measured["run"]]
    shown = bench("show", *where)
    assert "randwrite-qd32" in shown.stdout
    assert (tmp_path / "out" / f"{measured['run']}.html").exists()


def test_a_recorded_run_is_shown_without_measuring(tmp_path: Path) -> None:
    records.append(tmp_path / f"{RUN}.jsonl", [record("dolmen", "randwrite-qd1", 5.0)])
    assert "synthetic" in bench("show", RUN, "--out", str(tmp_path)).stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "longhorn", "randwrite-qd1"], "choose of: dolmen, ceiling"),
        (["run", "ceiling", "seqwrite"], "choose of: randwrite-qd1"),
        (["run", "ceiling", "randwrite-qd1", "--size", "big"], "is not a size"),
        (["run", "ceiling", "randwrite-qd1", "--size", "4MiB"], "at least 16"),
        (["compare", "--systems", ","], "choose of"),
        (["failover", "--faults", "rain"], "stall-replica-killed"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_would_be_right(args: list[str], said: str) -> None:
    done = bench(*args)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_recorded_yet_names_the_next_step(tmp_path: Path) -> None:
    for args in (["ls"], ["show"]):
        done = bench(*args, "--out", str(tmp_path))
        assert done.returncode != 0
        assert "dolmen bench compare" in done.stderr
