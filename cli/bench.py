"""``dolmen bench``: measure beside other systems on this machine, and look at what was measured.

Owns options, the progress bar and the exit code. Does not own the measuring (``bench/runner.py``,
``bench/failover.py``) or the tables (``bench/report.py``). Everything heavy is imported when it is used.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.output import Exit, Output, OutputOption, fail, show_json, show_table, user_errors

if TYPE_CHECKING:
    from bench.record import Record
    from bench.runner import Plan, Progress

app = typer.Typer(
    help="Measure Dolmen beside other systems on this machine: interleaved rounds, table, picture.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

REPOSITORY = Path(__file__).parent.parent

ALL_SYSTEMS = "dolmen,ceiling,qemu-nbd,quorum"
ALL_WORKLOADS = (
    "randwrite-qd1,randwrite-qd32,randwrite-4xqd32,randread-qd1,randread-qd32,randread-4xqd32,"
    "write-1m-qd8,read-1m-qd8,randwrite-qd1-flush,randwrite-half-load"
)
ALL_FAULTS = "stall-replica-killed,stall-replica-stopped,stall-replica-vanished,stall-engine-killed"


def _in_checkout() -> bool:
    return (REPOSITORY / "pyproject.toml").exists()


def _default_out() -> Path:
    return REPOSITORY / "bench" / "out" if _in_checkout() else Path("dolmen-bench")


def _default_cache() -> Path:
    return REPOSITORY / ".cache" / "bench" if _in_checkout() else Path("~/.cache/dolmen-bench").expanduser()


Systems = Annotated[str, typer.Option(help="Which systems, separated by commas; also ceiling-sleep.")]
Workloads = Annotated[str, typer.Option(help="Which workloads, separated by commas.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each system meets each workload.")]
Seconds = Annotated[float, typer.Option(min=0.5, help="Length of one measurement.")]
Size = Annotated[str, typer.Option(help="Size of the volume, for every system: 512MiB, 1GiB.")]
Seed = Annotated[int, typer.Option(help="Where fio's random offsets begin; each round adds one.")]
Out = Annotated[Path | None, typer.Option(help="Where records and reports go. [default: bench/out]")]
Dir = Annotated[
    Path | None, typer.Option("--dir", help="Where data files lie meanwhile. [default: .cache/bench]")
]


@app.command()
@user_errors
def compare(
    rounds: Rounds = 5,
    seconds: Seconds = 4.0,
    size: Size = "1GiB",
    systems: Systems = ALL_SYSTEMS,
    workloads: Workloads = ALL_WORKLOADS,
    checksum_cost: Annotated[
        bool, typer.Option("--checksum-cost", help="Also sample, with perf, what checksums cost.")
    ] = False,
    seed: Seed = 1,
    out: Out = None,
    directory: Dir = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compare systems in interleaved rounds; writes records, a picture and a page.

    With the defaults this takes about half an hour and 10 GiB of disk, and wants a quiet machine.
    """
    from bench.checksum import measure_checksum_cost
    from bench.runner import compare as run_comparison

    plan = _plan(systems, workloads, rounds, seconds, size, seed, out, directory)
    extras = [measure_checksum_cost] if checksum_cost and "dolmen" in plan.systems else []
    with _measuring(plan.steps) as progress:
        file = run_comparison(plan, progress, *extras)
    _present(file, output)


@app.command()
@user_errors
def run(
    system: Annotated[str, typer.Argument(help="One system.")],
    workload: Annotated[str, typer.Argument(help="One workload.")],
    rounds: Rounds = 1,
    seconds: Seconds = 4.0,
    size: Size = "1GiB",
    seed: Seed = 1,
    out: Out = None,
    directory: Dir = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure one system under one workload."""
    from bench.runner import compare as run_comparison

    plan = _plan(system, workload, rounds, seconds, size, seed, out, directory, idle_s=0.0)
    with _measuring(plan.steps) as progress:
        file = run_comparison(plan, progress)
    _present(file, output)


@app.command()
@user_errors
def failover(
    repeats: Annotated[int, typer.Option(min=1, help="How often each fault strikes.")] = 5,
    faults: Annotated[str, typer.Option(help="Which faults, separated by commas.")] = ALL_FAULTS,
    size: Size = "512MiB",
    seed: Seed = 1,
    out: Out = None,
    directory: Dir = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Kill parts of a Dolmen volume under one writer; shows the longest time without a completion."""
    from bench.failover import FAULTS
    from bench.failover import failover as run_failover

    chosen = _chosen(faults, FAULTS, "fault")
    plan = _plan("dolmen", "randwrite-qd1", 1, 1.0, size, seed, out, directory)
    with _measuring(1 + repeats * len(chosen)) as progress:
        file = run_failover(plan, chosen, repeats, progress)
    _present(file, output)


@app.command()
@user_errors
def rebuild(
    repeats: Annotated[
        int, typer.Option(min=1, help="How often a replica is lost and filled, twice each.")
    ] = 3,
    size: Size = "1GiB",
    seed: Seed = 1,
    out: Out = None,
    directory: Dir = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Fill a lost replica again: its rate beside a plain copy, and what a writer notices of it."""
    from bench.rebuild import STEPS_PER_REPEAT
    from bench.rebuild import rebuild as run_rebuild

    plan = _plan("dolmen", "randwrite-qd1", 1, 1.0, size, seed, out, directory)
    with _measuring(1 + STEPS_PER_REPEAT * repeats) as progress:
        file = run_rebuild(plan, repeats, progress)
    _present(file, output)


@app.command("ls")
@user_errors
def list_runs(out: Out = None, output: OutputOption = Output.TABLE) -> None:
    """List the runs that were recorded, newest first."""
    from bench import record

    rows = [_run_row(file) for file in record.runs_in(out or _default_out())]
    if output is Output.JSON:
        show_json(rows)
        return
    if not rows:
        fail("there is no run yet", "`dolmen bench compare` makes one")
    show_table(
        list(rows[0]), ([", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows)
    )


@app.command()
@user_errors
def show(
    run_name: Annotated[str, typer.Argument(metavar="[RUN]", help="A run's name.")] = "newest",
    out: Out = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a run again: tables and goals; makes its picture and page anew."""
    from bench import record

    directory = out or _default_out()
    if run_name == "newest":
        file = next(record.runs_in(directory), None)
        if file is None:
            fail("there is no run yet", "`dolmen bench compare` makes one")
    else:
        file = directory / f"{Path(run_name).name.removesuffix('.jsonl')}.jsonl"
        if not file.exists():
            fail(f"there is no run {run_name} in {directory}", "`dolmen bench ls` lists them")
    _present(file, output)


# ---- what the commands share ----


def _plan(
    systems: str,
    workloads: str,
    rounds: int,
    seconds: float,
    size: str,
    seed: int,
    out: Path | None,
    directory: Path | None,
    *,
    idle_s: float = 10.0,
) -> Plan:
    from bench.runner import Plan
    from bench.systems import SYSTEMS
    from bench.workloads import WORKLOADS

    return Plan(
        systems=tuple(_chosen(systems, SYSTEMS, "system")),
        workloads=tuple(_chosen(workloads, WORKLOADS, "workload")),
        rounds=rounds,
        seconds=seconds,
        warmup_s=min(1.0, seconds / 2),
        idle_s=idle_s,
        size_bytes=_size_bytes(size),
        seed=seed,
        out=out or _default_out(),
        cache=(directory or _default_cache()).resolve(),
        repository=REPOSITORY,
    )


def _chosen(text: str, known: Any, what: str) -> list[str]:
    """Names of a comma-separated list, each once, in its order."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in known]:
        fail(f"no {what} is called {', '.join(unknown)}", f"choose of: {', '.join(known)}", Exit.USAGE)
    if not names:
        fail(f"no {what} is chosen", f"choose of: {', '.join(known)}", Exit.USAGE)
    return names


TABLE_WIDTH_PIPED = 200
"""Into a file or a pipe nothing needs to be wrapped."""

SIZE_BYTES_MIN = 16 * 2**20
"""Below this every block is overwritten many times a second, which measures nothing real."""


def _size_bytes(text: str) -> int:
    from control.sizes import parse_size

    size_bytes = parse_size(text)
    if size_bytes < SIZE_BYTES_MIN or size_bytes % 2**20:
        wanted = f"write whole MiB, at least {SIZE_BYTES_MIN >> 20}"
        fail(f"{text} is not a size to measure with", wanted, Exit.USAGE)
    return size_bytes


@contextmanager
def _measuring(steps: int) -> Iterator[Progress]:
    """A progress bar on stderr; SIGTERM ends like Ctrl-C, with everything cleaned up."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bench.runner import NotPossible

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    was = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("preparing", total=steps)
            said = [""]

            def progress(text: str, done: int) -> None:
                bar.update(task, description=text, completed=done)
                if not console.is_terminal and text != said[0]:
                    said[0] = text
                    print(f"[{done}/{steps}] {text}", file=sys.stderr, flush=True)

            yield progress
    except NotPossible as error:
        fail(str(error), error.next_step)
    except KeyboardInterrupt:
        typer.echo("dolmen bench: stopped; what was measured is kept, the rest is cleaned up", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, was)


def _load(file: Path) -> Sequence[Record]:
    from bench import record

    try:
        return record.load(file)
    except (record.BadRecord, OSError) as error:
        fail(str(error), "it was made by another version, or cut short: remove it")


def _present(file: Path, output: Output) -> None:
    """Tables on stdout, or JSON; the picture and the page beside the records."""
    from bench import report

    records = _load(file)
    files = report.write(file, records)
    if output is Output.JSON:
        show_json(report.as_json(file, records))
        return
    from rich.console import Console

    console = Console()
    report.print_tables(records, console if console.is_terminal else Console(width=TABLE_WIDTH_PIPED))
    typer.echo("records, picture, page: " + "  ".join(str(path) for path in (file, *files)))


def _run_row(file: Path) -> dict[str, Any]:
    from bench import record
    from bench.record import BadRecord, RunRecord

    try:
        records = record.load(file)
    except BadRecord as error:
        runs, records, commit = [], [], f"unreadable: {error}"
    else:
        runs = [r for r in records if isinstance(r, RunRecord)]
        commit = records[0].commit if records else ""
    return {
        "run": file.stem,
        "commit": commit,
        "systems": sorted({r.system for r in records}),
        "workloads": list(dict.fromkeys(r.workload for r in runs))
        + [r.name for r in records if not isinstance(r, RunRecord)],
        "rounds": 1 + max((r.round_index for r in runs), default=0),
        "failed": sum(r.failure is not None for r in records),
    }
