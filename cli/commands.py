"""The ``dolmen`` command: which commands there are, and what the first page of help says.

Does not own what a command does: that is in the modules beside it.

Promises: starts fast: what only one command needs (demo, bench, rich, asyncio) is imported when it runs.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from cli import cluster, node, recover, recover_disks, replica, volume, why
from cli.output import EXIT_CODES, Output, OutputOption, show_json, user_errors


class LazyBench(TyperGroup):
    """``dolmen bench`` imports its tools only when it is used."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "bench":
            from cli.bench import app as bench_app

            command = typer.main.get_command(bench_app)
        return name, command, rest


app = typer.Typer(
    name="dolmen",
    cls=LazyBench,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Dolmen: replicated block storage. One volume, carried by its replicas.",
    epilog=EXIT_CODES
    + " First steps: `dolmen demo`; or `dolmen up --detach`, `dolmen volume create data --size 2GiB`, "
    "`dolmen volume attach data`.",
)
app.command("up")(cluster.up)
app.command("down")(cluster.down)
app.command("status")(cluster.status)
app.command("why")(why.why)
app.command("recover")(recover_disks.recover)
volume.app.command("recover")(recover.recover_volume)
app.add_typer(volume.app, name="volume")
app.add_typer(replica.app, name="replica")
app.add_typer(node.app, name="node")


@app.command("demo")
@user_errors
def demo() -> None:
    """Show the main job: a replicated volume loses a replica and nobody notices. Leaves nothing behind."""
    from cli.demo import run

    raise typer.Exit(run())


@app.command("bench", help="Measure beside other systems.", context_settings={"ignore_unknown_options": True})
def bench() -> None:
    raise AssertionError("answered by LazyBench")


@app.command("version")
@user_errors
def show_version(output: OutputOption = Output.TABLE) -> None:
    """Print the version."""
    from control import version

    if output is Output.JSON:
        show_json({"version": version()})
    else:
        print(version())
