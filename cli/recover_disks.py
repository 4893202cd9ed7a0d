"""``dolmen recover``: a cluster whose state store is lost, made anew from its disks.

Owns the arguments and the words of the command. Does not own what is made of what
(``control/recover_disks.py``), which it calls itself: there is no daemon without a state store.

Promises: exits 0 only if everything that was found is used; 5 if something was left out, and says what.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.output import DirOption, Exit, Output, OutputOption, fail, note, show_json, show_table, user_errors
from control.client import default_dir
from control.sizes import format_size


@user_errors
def recover(
    from_disks: Annotated[
        bool, typer.Option("--from-disks", help="From the replica directories under nodes/ alone.")
    ] = False,
    accept_blank: Annotated[
        bool,
        typer.Option("--accept-blank", help="Also volumes of which every copy found was never in use."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be made; write nothing.")
    ] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a lost or damaged state store anew. One that can be used is never touched.

    Every volume is then distrusted: it opens only while all its replicas that are known can be asked, until
    its first record is stored anew.
    """
    if not from_disks:
        next_step = "`dolmen recover --from-disks --dry-run` shows what would be made"
        fail("say what to recover from", next_step, Exit.USAGE)
    # It takes long to import, and only this command needs it.
    from control.recover_disks import recover_from_disks

    report = recover_from_disks(directory or default_dir(), accept_blank=accept_blank, dry_run=dry_run)
    found = report.model_dump(mode="json")
    if output is Output.JSON:
        show_json(found)
    else:
        show_report(found)
    if found["left_out"]:
        raise typer.Exit(int(Exit.UNFINISHED))


def show_report(found: dict[str, Any]) -> None:
    show_table(
        ("VOLUME", "SIZE", "EPOCH", "RECORD", "IN SYNC", "REPLICAS", "MISSING"),
        (
            (
                volume["name"],
                format_size(volume["size_bytes"]),
                volume["epoch"],
                f"{volume['record']['epoch']}.{volume['record']['version']}",
                ", ".join(volume["record"]["in_sync"]),
                ", ".join(volume["replicas"]),
                ", ".join(volume["missing"]) or "-",
            )
            for volume in found["volumes"]
        ),
    )
    for volume in found["volumes"]:
        for text in volume["notes"]:
            print(f"{volume['name']}: {text}")
    for left in found["left_out"]:
        print(f"left out: {left['what']}: {left['reason']}")
    for path in found["moved_aside"]:
        print(f"moved aside: {path}")
    if found["written"]:
        nodes, volumes = len(found["nodes"]), len(found["volumes"])
        counts = f"{nodes} node{'s' * (nodes != 1)}, {volumes} volume{'s' * (volumes != 1)}"
        print(f"the state store is made anew: {counts}")
        note("next: dolmen up --detach, then dolmen why")
    else:
        print("nothing was written")
