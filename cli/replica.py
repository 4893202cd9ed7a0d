"""``dolmen replica ...``: the copies of a volume, listed, verified, made anew and replaced.

Owns the arguments, the tables and the words of these commands. Does not own the comparison
(``control/verify.py``) or the reading (``replica/verify.py``): both are reached through ``control.client``.

Promises: ``verify`` exits 0 only when everything was compared and is the same.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from cli.jobs import wait_for
from cli.output import (
    DirOption,
    Exit,
    Output,
    OutputOption,
    fail,
    fail_unfinished,
    note,
    show_json,
    show_table,
    user_errors,
)
from cli.volume import NameArgument, names, resync_text
from control.client import Client, default_dir
from control.sizes import format_size

POLL_S = 0.1

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at replicas and verify them.")


@app.command("ls")
@user_errors
def ls(
    volume: Annotated[
        str | None, typer.Argument(help="Only of this volume.", autocompletion=names, show_default=False)
    ] = None,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List replicas."""
    views = Client(directory or default_dir()).replicas(volume)
    if output is Output.JSON:
        show_json(views)
        return
    if not views:
        note("no replicas yet; next: dolmen volume create NAME --size 2GiB")
    show_table(
        ("VOLUME", "REPLICA", "NODE", "PID", "STATE", "RESYNC", "PATH", "REASON"),
        (
            (
                view["volume"],
                view["id"],
                view["node"],
                view["pid"] or "-",
                view["state"],
                resync_text(view["resync"]),
                view["path"],
                view["reason"],
            )
            for view in views
        ),
    )


@app.command("rebuild")
@user_errors
def rebuild(
    volume: NameArgument,
    replica: Annotated[str, typer.Argument(help="The replica's id.")],
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Throw away a replica that is damaged or missing, and fill it anew from the others."""
    view = Client(directory or default_dir()).rebuild_replica(volume, replica)
    if replica not in view["membership"]["in_sync"]:
        fail_unfinished(f"replica {replica} is being filled", view)
    if output is Output.JSON:
        show_json(view)
    else:
        print(f"replica {replica}: in sync")


@app.command("replace")
@user_errors
def replace(
    volume: NameArgument,
    replica: Annotated[str, typer.Argument(help="The id of the replica that is gone.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="NODE", help="The node for the new one. [default: the best]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until the new one is in sync.")] = True,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Put a new replica on another node in the place of one that is gone, and fill it from the others.

    What is left of the old one is deleted when all replicas are in sync and its node answers.
    """
    client = Client(directory or default_dir())
    made = client.replace_replica(volume, replica, to=to, dry_run=dry_run, wait_s=0.0)
    new, node = made["new"], made["node"]
    if dry_run:
        if output is Output.JSON:
            show_json(made)
        else:
            size = format_size(made["size_bytes"])
            print(f"would put {new} on {node} in the place of {replica} and fill it (volume of {size})")
        return
    if wait:
        made["volume"] = _watch_filling(client, volume, new, bar=sys.stderr.isatty())
    if output is Output.JSON:
        show_json(made)
    if new not in made["volume"]["membership"]["in_sync"]:
        fail_unfinished(f"replica {new} on {node} takes the place of {replica}", made["volume"])
    if output is Output.TABLE:
        print(f"replica {new} on {node} is in sync; {replica} is gone")


def _watch_filling(client: Client, volume: str, replica: str, *, bar: bool) -> dict[str, Any]:
    """The volume's view as soon as ``replica`` is in sync, or nothing more happens by itself."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not bar) as progress:
        task = progress.add_task(f"filling {replica}", total=None)
        while True:
            view = client.volume(volume)
            resync = next((r["resync"] for r in view["replicas"] if r["id"] == replica), None)
            if resync:
                progress.update(task, completed=resync["regions_done"], total=resync["regions_total"] or None)
            if replica in view["membership"]["in_sync"] or _is_stuck(view, replica):
                return view
            time.sleep(POLL_S)


def _is_stuck(view: dict[str, Any], replica: str) -> bool:
    """Nobody but an operator gets it further."""
    placed = any(shown["id"] == replica for shown in view["replicas"])
    asked = any(c["who"] == "operator" and replica in c["waits_for"] for c in view["conditions"])
    return asked or (placed and view["state"] == "detached")


@app.command("verify")
@user_errors
def verify(volume: NameArgument, directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """Read every replica: same bytes everywhere, every checksum right. Works attached and detached."""
    client = Client(directory or default_dir())
    job = wait_for(client, client.verify(volume), doing="verifying", output=output)
    if output is Output.JSON:
        show_json(job)
    if job["state"] == "failed":
        fail(
            f"the verification of {volume} could not finish: {job['error']}",
            "`dolmen status`, then try again",
        )
    if output is Output.TABLE:
        show_result(volume, job["result"])
    code = {"same": Exit.OK, "different": Exit.DIFFERENT, "incomplete": Exit.UNFINISHED}
    raise typer.Exit(int(code[job["result"]["verdict"]]))


def show_result(volume: str, result: dict[str, Any]) -> None:
    show_table(
        ("REPLICA", "NODE", "BLOCKS VERIFIED", "DAMAGED", "DIGEST", "REMARK"),
        (
            (
                replica["id"],
                replica["node"],
                replica["blocks_verified"],
                replica["damaged_count"],
                replica["digest"] or "-",
                replica["reason"] or ("-" if replica["compared"] else "not compared"),
            )
            for replica in result["replicas"]
        ),
    )
    print(f"{volume}: {verdict_text(result)}")


def verdict_text(result: dict[str, Any]) -> str:
    compared = sum(replica["compared"] for replica in result["replicas"])
    regions = f"{result['regions_equal']} of {result['regions_total']} regions equal"
    damaged = sum(replica["damaged_count"] for replica in result["replicas"])
    match result["verdict"]:
        case "same":
            return f"same: {compared} replicas hold the same bytes, every checksum verifies ({regions})"
        case "different":
            listed = ", ".join(map(str, result["regions_different"][:5]))
            where = f"; regions that differ: {listed}" if listed else ""
            count = result["regions_different_count"]
            return f"DIFFERENT: {damaged} damaged blocks, {count} regions differ{where}"
        case _ if compared < 2:
            return f"incomplete: {compared} replica{'s' * (compared != 1)} read, nothing to compare with"
        case _:
            busy = result["regions_busy_count"]
            why = f"; {busy} regions were written at every look" if busy else ""
            return f"incomplete: nothing bad was found, {compared} replicas compared ({regions}){why}"
