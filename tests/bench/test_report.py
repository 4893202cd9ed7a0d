"""Tables, picture and page show every measurement, failed ones as failed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench import report
from bench.record import Record
from tests.bench.synthetic import COMMIT, gauge, record, use


@pytest.fixture(scope="module")
def invented() -> list[Record]:
    """Two rounds of invented figures; their commit is ``synthetic`` so that no reader takes them for real."""
    found: list[Record] = []
    for index in range(2):
        for workload in ("randwrite-qd1", "randwrite-qd32"):
            for system, iops in (("dolmen", 900.0), ("ceiling", 1000.0), ("qemu-nbd", 700.0)):
                found.append(record(system, workload, iops + index, round_index=index))
    found.append(record("quorum", "randwrite-qd32", None, failure="did not start: <no port>"))
    found.append(record("dolmen", "idle", None))
    found.append(gauge("stall-replica-killed", 12.0, 40.0))
    return found


def test_tables_show_failures_as_failed_and_absences_as_absent(invented: list[Record]) -> None:
    text = io.StringIO()
    report.print_tables(invented, Console(file=text, width=250))
    shown = text.getvalue()
    assert COMMIT in shown
    assert "did not start: <no port>" in shown
    speed = report.grids(report.runs_of(invented))[0]
    assert speed.columns == ["", "ceiling", "dolmen", "qemu-nbd", "quorum"]
    by_label = {row[0]: row[1:] for row in speed.rows}
    assert by_label["randwrite-qd32, IOPS"] == [
        "1000 (1000 – 1001)",
        "900 (900 – 901)",
        "700 (700 – 701)",
        "failed",
    ]
    assert by_label["randwrite-qd1, IOPS"][3] == report.ABSENT


def test_the_picture_is_a_png(invented: list[Record]) -> None:
    assert report.draw(invented).startswith(b"\x89PNG\r\n\x1a\n")


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(
    invented: list[Record], tmp_path: Path
) -> None:
    files = report.write(tmp_path / "run.jsonl", invented)
    assert [file.suffix for file in files] == [".png", ".html"]
    page = files[1].read_text(encoding="utf-8")
    assert COMMIT in page
    assert "did not start: &lt;no port&gt;" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.split("base64,")[1].split('"')[1]


def test_a_run_without_the_ceiling_or_without_anything_can_still_be_drawn() -> None:
    assert report.draw([record("dolmen", "randwrite-qd1", 5.0)])
    assert report.draw([record("dolmen", "randwrite-qd1", None, failure="no")])
    assert report.draw([])


def test_json_has_cells_goals_and_gauges(invented: list[Record], tmp_path: Path) -> None:
    import json

    found = json.loads(json.dumps(report.as_json(tmp_path / "run.jsonl", invented)))
    assert found["commit"] == COMMIT
    cell = next(c for c in found["cells"] if (c["workload"], c["system"]) == ("randwrite-qd32", "dolmen"))
    assert cell["iops"] == {"median": 900.5, "low": 900.0, "high": 901.0, "count": 2}
    failed = next(c for c in found["cells"] if c["system"] == "quorum")
    assert failed["failures"]
    assert {goal["verdict"] for goal in found["goals"]} >= {"reached", "not measured"}
    assert found["gauges"][0]["name"] == "stall-replica-killed"


def test_a_run_on_a_busy_machine_says_so_first(invented: list[Record]) -> None:
    assert report.warning(report.runs_of(invented)) == ""
    busy = record("dolmen", "randwrite-qd1", 5.0, used=use(other_cpu_s=1.5))
    assert "others used 1.5 of 2 processors" in report.warning([busy])


def test_a_run_of_gauges_alone_shows_only_their_goals() -> None:
    gauges: list[Record] = [
        gauge("stall-replica-killed", 12.0, 300.0),
        gauge("stall-engine-killed", failure="x"),
    ]
    text = io.StringIO()
    report.print_tables(gauges, Console(file=text, width=250))
    assert "client stall, replica killed, worst" in text.getvalue()
    assert "random writes" not in text.getvalue()
    assert report.draw(gauges)
