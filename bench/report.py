"""A run as a table for the terminal, a picture and a page.

Owns presentation only: every number comes from ``summary.py`` and ``goals.py``. A failed measurement is
shown as failed wherever its number would stand.

Promises: the page is one file that needs nothing else, and names commit, machine, rounds and seed.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import goals, summary
from bench.goals import Judgement, Verdict
from bench.record import GaugeRecord, Record, RunRecord
from bench.summary import IDLE, Metric, Spread
from bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from rich.console import Console

FAILED = "failed"
ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: one row per workload, one column per system."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def runs_of(records: Sequence[Record]) -> list[RunRecord]:
    return [record for record in records if isinstance(record, RunRecord)]


def gauges_of(records: Sequence[Record]) -> list[GaugeRecord]:
    return [record for record in records if isinstance(record, GaugeRecord)]


def systems_in(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(run.system for run in sorted(runs, key=lambda r: (r.round_index, r.system))))


def workloads_in(runs: Sequence[RunRecord]) -> list[str]:
    """In the order in which they are defined."""
    present = {run.workload for run in runs}
    return [name for name in WORKLOADS if name in present]


DISTURBED_CORES = 0.25
"""More than this used by others in the median measurement, and the reader is warned."""


def headline(records: Sequence[Record]) -> str:
    """What is needed to doubt the numbers, in one line."""
    if not records:
        return "no measurement"
    m = records[0].machine
    where = (
        f"commit {records[0].commit} · {m.cpu}, {m.cores} cores, {m.memory_bytes / 2**30:.0f} GiB · "
        f"Linux {m.kernel} · {m.file_system} · {m.fio} · {m.qemu}"
    )
    runs = runs_of(records)
    if not runs:
        return where
    first = runs[0]
    rounds = 1 + max(run.round_index for run in runs)
    return (
        f"{where} · {rounds} rounds · {first.size_bytes / 2**30:g} GiB · "
        f"seed {first.seed - first.round_index} · {first.started_at}"
    )


def warning(runs: Sequence[RunRecord]) -> str:
    """Empty when the machine was quiet."""
    disturbed = summary.over_rounds(runs, summary.other_cores)
    if disturbed is None or disturbed.median <= DISTURBED_CORES:
        return ""
    return (
        f"Disturbed: others used {disturbed.median:.1f} of {runs[0].machine.cores} processors in the median "
        f"measurement. Trust ratios little and absolute figures not at all."
    )


# ---- tables ----


def _number(value: float) -> str:
    if value >= 100_000:
        return f"{value / 1000:.0f} k"
    if value >= 10_000:
        return f"{value / 1000:.1f} k"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(records: Sequence[RunRecord], metric: Metric) -> str:
    """Median, and lowest to highest round."""
    if not records:
        return ABSENT
    found = summary.over_rounds(records, metric)
    failed = len(summary.failures(records))
    if found is None:
        return FAILED if failed else ABSENT
    text = _number(found.median)
    if found.count > 1:
        text += f" ({_number(found.low)} – {_number(found.high)})"
    return f"{text}, {failed} {FAILED}" if failed else text


def _grid(title: str, runs: Sequence[RunRecord], rows: Sequence[tuple[str, str, Metric]]) -> Grid:
    """``rows``: label, workload, metric."""
    systems = systems_in(runs)
    return Grid(
        title,
        ["", *systems],
        [
            [label, *(_cell(summary.select(runs, system=s, workload=w), metric) for s in systems)]
            for label, w, metric in rows
        ],
    )


def grids(runs: Sequence[RunRecord]) -> list[Grid]:
    names = workloads_in(runs)
    speed = [
        (f"{name}, MiB/s", name, summary.mib_per_s)
        if WORKLOADS[name].block_bytes > 4096
        else (f"{name}, IOPS", name, summary.iops)
        for name in names
    ]
    tables = [
        _grid("Speed: median of the rounds (lowest – highest)", runs, speed),
        _grid("Latency, median, µs", runs, [(name, name, summary.latency_us_p50) for name in names]),
        _grid("Latency, 99th percentile, µs", runs, [(name, name, summary.latency_us_p99) for name in names]),
        _grid(
            "Processor time of all processes of the system per request, µs",
            runs,
            [(name, name, summary.cpu_us_per_op) for name in names],
        ),
        _grid(
            "Disturbance: processors used by neither the system nor fio",
            runs,
            [(name, name, summary.other_cores) for name in names],
        ),
    ]
    if any(run.workload == IDLE for run in runs):
        roles = sorted({role for run in runs if run.use for role in run.use.rss_bytes_by_role})
        idle: list[tuple[str, str, Metric]] = [("processor time, % of a core", IDLE, summary.core_percent)]
        idle += [(f"memory of {role}, MiB", IDLE, summary.rss_mib(role)) for role in roles]
        tables.append(_grid("Idle, after the load", runs, idle))
    return tables


def _found(judgement: Judgement) -> str:
    found = judgement.found
    if found is None:
        return ABSENT
    text = f"{found.median:.2f}"
    if found.count > 1:
        text += f" ({found.low:.2f} – {found.high:.2f})"
    return f"{text} {judgement.unit}"


def goals_grid(judgements: Sequence[Judgement]) -> Grid:
    return Grid(
        "Goals",
        ["goal", "wanted", "found: median (lowest – highest)", "verdict", "note"],
        [[j.text, j.wanted, _found(j), j.verdict.value, j.reason] for j in judgements],
    )


def gauges_grid(gauges: Sequence[GaugeRecord]) -> Grid:
    rows = []
    for gauge in gauges:
        found = summary.spread(gauge.values)
        value = f"{found.median:.1f} ({found.low:.1f} – {found.high:.1f})" if found else FAILED
        rows.append([gauge.name, gauge.system, value, gauge.unit, str(len(gauge.values)), gauge.method])
        if gauge.failure:
            rows[-1][5] += f"; {FAILED}: {gauge.failure}"
    return Grid(
        "Single gauges",
        ["gauge", "system", "median (lowest – highest)", "unit", "values", "method"],
        rows,
    )


def failures_grid(runs: Sequence[RunRecord]) -> Grid:
    rows = [[r.system, r.workload, str(r.round_index + 1), r.failure or ""] for r in runs if r.failure]
    return Grid("Failed measurements", ["system", "workload", "round", "reason"], rows)


def all_grids(records: Sequence[Record]) -> list[Grid]:
    runs, gauges = runs_of(records), gauges_of(records)
    judgements = goals.judge(records)
    if not runs:
        # Only gauges were asked for: the goals of other runs would drown them.
        judgements = [j for j in judgements if j.verdict is not Verdict.NOT_MEASURED]
    tables = [*(grids(runs) if runs else []), goals_grid(judgements)]
    if gauges:
        tables.append(gauges_grid(gauges))
    if any(run.failure for run in runs):
        tables.append(failures_grid(runs))
    return tables


_STYLES = {
    Verdict.REACHED.value: "green",
    Verdict.MISSED.value: "yellow",
    Verdict.FAILED.value: "red",
    Verdict.NOT_MEASURED.value: "dim",
}


def print_tables(records: Sequence[Record], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(headline(records)), style="dim")
    if text := warning(runs_of(records)):
        console.print(Text(text), style="bold red")
    for grid in all_grids(records):
        table = Table(title=grid.title, title_justify="left", title_style="bold")
        for index, column in enumerate(grid.columns):
            table.add_column(column, justify="left" if index == 0 or grid.title == "Goals" else "right")
        for row in grid.rows:
            style = next((_STYLES[cell] for cell in row if cell in _STYLES), None)
            table.add_row(*(Text(cell) for cell in row), style=style)
        console.print(table)


# ---- picture ----

_COLOURS = {
    "dolmen": "#c2410c",
    "ceiling": "#57534e",
    "ceiling-sleep": "#a8a29e",
    "qemu-nbd": "#0e7490",
    "quorum": "#7dd3fc",
}
_PANELS: Sequence[tuple[str, Metric, bool]] = (
    ("Speed, as a multiple of {reference}'s (higher is better)", summary.iops, True),
    ("Median latency, µs (lower is better)", summary.latency_us_p50, False),
    ("Processor time per request, µs (lower is better)", summary.cpu_us_per_op, False),
)


def draw(records: Sequence[Record]) -> bytes:
    """A PNG: three panels of bars, with lines from the lowest to the highest round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    runs = runs_of(records)
    if not runs:
        return _draw_gauges(Figure(figsize=(13, 4), dpi=110, layout="constrained"), records)
    figure = Figure(figsize=(13, 13), dpi=110, layout="constrained")
    panels: Any = figure.subplots(len(_PANELS), 1)
    names = workloads_in(runs)
    systems = systems_in(runs)
    reference = "ceiling" if "ceiling" in systems else next(iter(systems), "")
    for axes, (title, metric, relative) in zip(panels, _PANELS, strict=True):
        _draw_panel(axes, runs, names, metric, reference if relative else None)
        axes.set_title(title.format(reference=reference), loc="left", fontsize=11)
        axes.set_xticks(range(len(names)), names, rotation=12, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if not relative and any(metric(run) for run in runs):
            axes.set_yscale("log")
    if systems:
        panels[0].legend(ncols=5, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 1.2))
    return _png(figure, records)


def _png(figure: Any, records: Sequence[Record]) -> bytes:
    figure.supxlabel(headline(records), fontsize=7, color="#78716c")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_gauges(figure: Any, records: Sequence[Record]) -> bytes:
    """One row per gauge, one point per value."""
    axes = figure.subplots(1, 1)
    gauges = gauges_of(records)
    for row, gauge in enumerate(gauges):
        axes.plot(gauge.values, [row] * len(gauge.values), "o", color=_COLOURS["dolmen"], alpha=0.6)
        if gauge.failure:
            axes.text(0.02, row, FAILED, transform=axes.get_yaxis_transform(), fontsize=9)
    axes.set_yticks(range(len(gauges)), [f"{gauge.name}, {gauge.unit}" for gauge in gauges])
    axes.set_ylim(-0.5, max(0.5, len(gauges) - 0.5))
    if any(gauge.values for gauge in gauges):
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure, records)


def _draw_panel(
    axes: Any, runs: Sequence[RunRecord], names: Sequence[str], metric: Metric, reference: str | None
) -> None:
    systems = systems_in(runs)
    width = 0.8 / max(1, len(systems))
    for position, system in enumerate(systems):
        for index, name in enumerate(names):
            found = _bar(runs, name, system, metric, reference)
            x = index + (position - (len(systems) - 1) / 2) * width
            # The label stands once, for the legend; an empty bar carries it when nothing was measured.
            label = _legend(runs, system) if index == 0 else None
            if found is None:
                axes.bar(x, 0, width, color=_COLOURS.get(system, "#000"), label=label)
                if summary.select(runs, system=system, workload=name):
                    axes.text(x, 0.02, FAILED, transform=axes.get_xaxis_transform(), rotation=90, fontsize=7)
                continue
            error = [[found.median - found.low], [found.high - found.median]]
            axes.bar(
                x,
                found.median,
                width * 0.92,
                yerr=error,
                color=_COLOURS.get(system, "#000"),
                label=label,
                error_kw={"elinewidth": 0.8, "ecolor": "#1c1917"},
            )
    if reference is not None:
        axes.axhline(1.0, color="#1c1917", linewidth=0.8, linestyle=":")


def _legend(runs: Sequence[RunRecord], system: str) -> str:
    copies = next(run.copies for run in runs if run.system == system)
    return f"{system}, {copies} {'copy' if copies == 1 else 'copies'}"


def _bar(
    runs: Sequence[RunRecord], workload: str, system: str, metric: Metric, reference: str | None
) -> Spread | None:
    if reference is not None:
        return summary.ratio(runs, metric, workload=workload, system=system, reference=reference)
    return summary.over_rounds(summary.select(runs, system=system, workload=workload), metric)


# ---- page ----

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Dolmen: {run}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1c1917 }}
body {{ margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.05rem; margin-top: 2rem }}
p.from {{ color: #78716c; font-size: .85rem }}
p.warning {{ color: #b91c1c; font-weight: 600 }}
div.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }}
th, td {{ text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e7e5e4; white-space: nowrap }}
td:last-child {{ white-space: normal }}
tr.reached td {{ background: #f0fdf4 }}
tr.missed td {{ background: #fefce8 }}
tr.failed td {{ background: #fef2f2 }}
img {{ max-width: 100% }}
</style></head><body>
<h1>Benchmark {run}</h1>
<p class="from">{headline}</p>
<p class="warning">{warning}</p>
<p>Every figure is the median of interleaved rounds on one machine; ratios are formed inside each round.
Absolute figures drift from hour to hour: compare columns, not days.</p>
<img alt="bars: speed, latency, processor time" src="data:image/png;base64,{picture}">
{tables}
</body></html>
"""


def page(records: Sequence[Record], *, run: str, picture: bytes) -> str:
    tables = "".join(_html_table(grid) for grid in all_grids(records))
    return _PAGE.format(
        run=html.escape(run),
        headline=html.escape(headline(records)),
        warning=html.escape(warning(runs_of(records))),
        picture=base64.b64encode(picture).decode("ascii"),
        tables=tables,
    )


_COLOURED = {Verdict.REACHED.value, Verdict.MISSED.value, Verdict.FAILED.value}


def _html_table(grid: Grid) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        verdict = next(
            (cell for cell in cells if cell in _STYLES and cell in ("reached", "missed", "failed")), ""
        )
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f'<tr class="{verdict}">{inside}</tr>' if verdict else f"<tr>{inside}</tr>"

    body = "".join(row("td", cells) for cells in grid.rows)
    head = row("th", grid.columns)
    return f'<h2>{html.escape(grid.title)}</h2><div class="wide"><table>{head}{body}</table></div>\n'


def write(file: Path, records: Sequence[Record]) -> list[Path]:
    """``<run>.png`` and ``<run>.html`` beside the run's file."""
    picture_file, page_file = file.with_suffix(".png"), file.with_suffix(".html")
    picture = draw(records)
    picture_file.write_bytes(picture)
    page_file.write_text(page(records, run=file.stem, picture=picture), encoding="utf-8")
    return [picture_file, page_file]


def as_json(file: Path, records: Sequence[Record]) -> dict[str, Any]:
    """The run for programs: where it was measured, medians, goals, gauges and failures."""
    runs = runs_of(records)
    metrics: dict[str, Metric] = {
        "iops": summary.iops,
        "mib_per_s": summary.mib_per_s,
        "latency_us_p50": summary.latency_us_p50,
        "latency_us_p99": summary.latency_us_p99,
        "cpu_us_per_op": summary.cpu_us_per_op,
        "other_cores": summary.other_cores,
        "core_percent": summary.core_percent,
    }
    cells = []
    for name in dict.fromkeys(run.workload for run in runs):
        for system in systems_in(runs):
            chosen = summary.select(runs, system=system, workload=name)
            if not chosen:
                continue
            found = {key: summary.over_rounds(chosen, metric) for key, metric in metrics.items()}
            cells.append(
                {
                    "workload": name,
                    "system": system,
                    **{key: asdict(value) if value else None for key, value in found.items()},
                    "failures": summary.failures(chosen),
                }
            )
    return {
        "run": file.stem,
        "records": str(file),
        "commit": runs[0].commit if runs else None,
        "machine": asdict(runs[0].machine) if runs else None,
        "cells": cells,
        "goals": [{**asdict(j), "verdict": j.verdict.value} for j in goals.judge(records)],
        "gauges": [asdict(gauge) for gauge in gauges_of(records)],
    }
