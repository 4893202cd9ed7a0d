"""``dolmen volume ...``: volumes made, attached, shown, grown, detached and removed.

Owns the arguments, the tables and the words of these commands. Does not own any decision about a volume: that
is the daemon's, reached through ``control.client`` alone.

Promises: every command may be repeated; what is accepted but not finished exits 5 and says what it waits for.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from cli import scrub as scrubs
from cli.output import (
    DirOption,
    Exit,
    Output,
    OutputOption,
    fail,
    fail_unfinished,
    note,
    show_conditions,
    show_json,
    show_table,
    user_errors,
    waiting_texts,
)
from control.client import Client, default_dir
from control.names import check_name
from control.sizes import format_size, parse_size
from protocol.errors import StorageError, VolumeNotFound
from protocol.limits import REPLICAS_MAX

SERVING = ("healthy", "degraded", "waiting")

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Create, attach, grow and remove volumes."
)


def names(incomplete: str) -> list[str]:
    """Volume names, for the shell's completion."""
    with contextlib.suppress(StorageError):
        found = [volume["name"] for volume in Client(default_dir()).volumes()]
        return [name for name in found if name.startswith(incomplete)]
    return []


NameArgument = Annotated[str, typer.Argument(help="The volume's name.", autocompletion=names)]


@app.command("create")
@user_errors
def create(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and '-', at most 63.")],
    size: Annotated[
        str, typer.Option(help="For example 2GiB, 500M or a number of bytes; from 4 MiB to 64 TiB.")
    ],
    replicas: Annotated[int, typer.Option(min=1, max=REPLICAS_MAX, help="Copies, each on another node.")] = 3,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a volume. Repeating it is harmless."""
    check_name(name)
    view = Client(directory or default_dir()).create_volume(name, parse_size(size), replicas)
    if view["state"] == "creating":
        fail_unfinished(f"volume {name} is being created", view)
    if output is Output.JSON:
        show_json(view)
        return
    nodes = ", ".join(replica["node"] for replica in view["replicas"])
    print(f"volume {name}: {format_size(view['size_bytes'])}, replicas on {nodes}")
    note(f"next: dolmen volume attach {name}")


@app.command("ls")
@user_errors
def ls(directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """List volumes."""
    views = Client(directory or default_dir()).volumes()
    if output is Output.JSON:
        show_json(views)
        return
    show_table(("NAME", "SIZE", "STATE", "IN SYNC", "EPOCH", "NBD URI"), map(row, views))
    if not views:
        note("no volumes yet; next: dolmen volume create NAME --size 2GiB")


def row(view: dict[str, Any]) -> tuple[object, ...]:
    in_sync = sum(replica["state"] == "in_sync" for replica in view["replicas"])
    return (
        view["name"],
        format_size(view["size_bytes"]),
        view["state"],
        f"{in_sync} of {view['replica_count']}",
        view["epoch"],
        view["nbd_uri"] or "-",
    )


@app.command("show")
@user_errors
def show(name: NameArgument, directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show one volume: its state, its replicas, and what it waits for."""
    view = Client(directory or default_dir()).volume(name)
    if output is Output.JSON:
        show_json(view)
    else:
        show_volume(view)


def show_volume(view: dict[str, Any]) -> None:
    engine, membership = view["engine"], view["membership"]
    facts = {
        "name": view["name"],
        "size": f"{format_size(view['size_bytes'])} ({view['size_bytes']} bytes)",
        "state": view["state"],
        "nbd uri": view["nbd_uri"] or "- (not attached)",
        "nbd tcp uri": view["nbd_tcp_uri"],
        "engine": f"pid {engine['pid']} on {engine['node']}" if engine else "-",
        "epoch": view["epoch"],
        "membership": f"version {membership['version']} of epoch {membership['epoch']}, "
        f"in sync: {', '.join(membership['in_sync'])}",
    }
    for key, value in facts.items():
        if value is not None:
            print(f"{key + ':':<14}{value}")
    print()
    show_replicas(view["replicas"])
    show_conditions(view["conditions"])
    for text in waiting_texts(view):
        print(f"I/O waits for {text}")


def show_replicas(replicas: list[dict[str, Any]]) -> None:
    show_table(
        ("REPLICA", "NODE", "PID", "STATE", "RESYNC", "PATH", "REASON"),
        (
            (
                replica["id"],
                replica["node"],
                replica["pid"] or "-",
                replica["state"],
                resync_text(replica["resync"]),
                replica["path"],
                replica["reason"],
            )
            for replica in replicas
        ),
    )


def resync_text(resync: dict[str, int] | None) -> str:
    if not resync:
        return "-"
    return f"{resync['regions_done']}/{resync['regions_total']} regions"


@app.command("attach")
@user_errors
def attach(
    name: NameArgument,
    tcp: Annotated[bool, typer.Option("--tcp", help="Also listen on a TCP port of 127.0.0.1.")] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Attach a volume and print its NBD URI. Repeating it is harmless."""
    view = Client(directory or default_dir()).attach(name, tcp=tcp)
    if view["state"] not in SERVING:
        fail_unfinished(f"volume {name} is {view['state']}", view)
    if output is Output.JSON:
        show_json(view)
        return
    print(view["nbd_tcp_uri"] if tcp else view["nbd_uri"])
    if view["state"] != "healthy":
        note(f"volume {name} is {view['state']}; `dolmen volume show {name}` says why")


@app.command("detach")
@user_errors
def detach(
    name: NameArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait for replicas; what was not acknowledged is dropped.")
    ] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Flush and detach a volume. Repeating it is harmless.

    While I/O waits for replicas nothing can be flushed: then it exits 5, and is finished by itself when they
    are back. With --force it is detached at once: what was not acknowledged is dropped, and the next attach
    makes the replicas equal again.
    """
    client = Client(directory or default_dir())
    was_attached = client.volume(name)["state"] not in ("detached", "creating", "deleting")
    view = client.detach(name, force=force)
    if view["state"] in (*SERVING, "detaching", "attaching"):
        waits = [c["waits_for"] for c in view["conditions"] if c["reason"] == "detach_waiting"]
        if waits:
            who, _, next_step = waits[0].partition(". ")
            fail(f"volume {name} is not detached yet: it waits for {who}", next_step, Exit.UNFINISHED)
        fail_unfinished(f"volume {name} is {view['state']}", view)
    if output is Output.JSON:
        show_json(view)
        return
    print(f"volume {name}: {view['state']}")
    if force and was_attached:
        note("what was not acknowledged is dropped; the next attach makes the replicas equal again")


@app.command("resize")
@user_errors
def resize(
    name: NameArgument,
    size: Annotated[
        str, typer.Argument(help="The new size, for example 4GiB, at most 64 TiB. Never smaller.")
    ],
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Grow a volume, attached or not."""
    wanted_bytes = parse_size(size)
    view = Client(directory or default_dir()).resize(name, wanted_bytes)
    if view["size_bytes"] < wanted_bytes:
        fail_unfinished(f"volume {name} is growing", view)
    if output is Output.JSON:
        show_json(view)
    else:
        print(f"volume {name}: {format_size(view['size_bytes'])}")


@app.command("scrub", help=scrubs.scrub.__doc__)
@user_errors
def scrub(
    name: NameArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is done; then say what was found.")] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    scrubs.scrub(name, wait, directory, output)


@app.command("rm")
@user_errors
def rm(
    name: NameArgument,
    missing_ok: Annotated[
        bool, typer.Option("--missing-ok", help="A volume that is gone is no error.")
    ] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Remove a detached volume and its data."""
    try:
        answer = Client(directory or default_dir()).delete_volume(name)
    except VolumeNotFound:
        if not missing_ok:
            raise
        answer = {"gone": True, "volume": None}
    if not answer["gone"]:
        again = f"it goes on by itself; `dolmen volume rm {name} --missing-ok` waits for its end"
        fail_unfinished(f"volume {name} is being removed", answer["volume"], again)
    if output is Output.JSON:
        show_json(answer)
    else:
        print(f"volume {name}: removed")
