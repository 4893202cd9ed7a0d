"""``dolmen node ...``: nodes, and their replica servers started, stopped and killed.

Owns the arguments, the tables and the words of these commands. Does not own what a node is or does: that is
the daemon's, reached through ``control.client`` alone.

Promises: ``-o json`` prints what the REST interface answered; a refusal is one line that names the next step.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from cli.output import (
    DirOption,
    Exit,
    Output,
    OutputOption,
    fail,
    show_conditions,
    show_json,
    show_table,
    user_errors,
)
from control.client import Client, default_dir
from control.sizes import format_size
from protocol.errors import StorageError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The nodes and their replica servers.")


def names(incomplete: str) -> list[str]:
    with contextlib.suppress(StorageError):
        found = [node["name"] for node in Client(default_dir()).nodes()]
        return [name for name in found if name.startswith(incomplete)]
    return []


NodeArgument = Annotated[str, typer.Argument(help="The node's name.", autocompletion=names)]


@app.command("ls")
@user_errors
def ls(directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """List nodes."""
    views = Client(directory or default_dir()).nodes()
    if output is Output.JSON:
        show_json(views)
    else:
        show_nodes(views)


def show_nodes(views: list[dict[str, Any]]) -> None:
    show_table(
        ("NODE", "STATE", "PID", "ADDRESS", "REPLICAS", "FREE", "PATH"),
        (
            (
                view["name"],
                view["state"],
                view["pid"] or "-",
                view["address"] or "-",
                "-" if view["replica_count"] is None else view["replica_count"],
                "-" if view["space_free_bytes"] is None else format_size(view["space_free_bytes"]),
                view["path"],
            )
            for view in views
        ),
    )
    for view in views:
        show_conditions(view["conditions"], indent=f"{view['name']} is {view['state']}: ")


@app.command("stop")
@user_errors
def stop(
    node: NodeArgument,
    kill: Annotated[
        bool, typer.Option("--kill", help="SIGKILL, as a crash would, instead of a clean stop.")
    ] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Stop a node's replica server and keep it down until `dolmen node start`."""
    _finish(Client(directory or default_dir()).stop_node(node, kill=kill), "stopped", output)


@app.command("start")
@user_errors
def start(node: NodeArgument, directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """Start a node's replica server again. Its replicas resync by themselves."""
    _finish(Client(directory or default_dir()).start_node(node), "up", output)


def _finish(view: dict[str, Any], goal: str, output: Output) -> None:
    if view["state"] != goal:
        reasons = "; ".join(condition["waits_for"] for condition in view["conditions"])
        what = f"node {view['name']} is {view['state']}: waits for {reasons or 'its replica server'}"
        fail(what, "`dolmen node ls` shows how far it is", Exit.UNFINISHED)
    if output is Output.JSON:
        show_json(view)
    else:
        print(f"node {view['name']}: {view['state']}")
