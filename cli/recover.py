"""``dolmen volume recover``: what is left of a volume, and the order to go on with it.

Owns the arguments, the table and the words of the command. Does not own what can be decided
(``control/recovery.py``): that is the daemon's, reached through ``control.client``.

Promises: without ``--from`` and ``--lose`` nothing is changed, and with both only if the words of ``--lose``
are those that were shown, and nothing has changed since.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

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
from cli.volume import SERVING, NameArgument
from control.client import Client, default_dir


@user_errors
def recover_volume(
    name: NameArgument,
    members: Annotated[
        str,
        typer.Option("--from", help="Replicas to open with, joined by commas: one of the choices shown."),
    ] = "",
    lose: Annotated[
        str, typer.Option("--lose", help="What is given up, word for word as it is shown for that choice.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check --from and --lose, and change nothing.")
    ] = False,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Take back a decision that was not carried out yet.")
    ] = False,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what is left of a volume that waits for replicas that never come back; then open it with that.

    Without options it shows every copy, what could be chosen, and what each choice would lose. With --from
    and --lose that choice is carried out: what the other replicas hold beyond it is given up for good, and
    overwritten when they come back.
    """
    client = Client(directory or default_dir())
    if withdraw and (members or lose or dry_run):
        fail("--withdraw stands alone", f"`dolmen volume recover {name} --withdraw`", Exit.USAGE)
    if withdraw:
        view = client.withdraw_recovery(name)
        _show(view, output, f"volume {name}: the decision is taken back")
    elif not members and not lose:
        _show_recovery(client.recovery(name), output)
    elif not members or not lose:
        fail("--from and --lose belong together", f"`dolmen volume recover {name}` shows both", Exit.USAGE)
    else:
        chosen = [part for part in members.split(",") if part]
        view = client.recover(name, chosen, lose, dry_run=dry_run)
        if dry_run:
            _show(
                view, output, f"volume {name} would be opened with {', '.join(chosen)}; nothing was changed"
            )
        elif view["state"] not in SERVING or view["state"] == "waiting":
            fail_unfinished(f"volume {name} is {view['state']}", view, f"`dolmen why {name}`")
        else:
            _show(view, output, f"volume {name} is {view['state']}, opened with {', '.join(chosen)}")


def _show(view: dict[str, Any], output: Output, text: str) -> None:
    if output is Output.JSON:
        show_json(view)
    else:
        print(text)


def _show_recovery(found: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        show_json(found)
    else:
        for line in recovery_lines(found):
            print(line)
        print()
        show_table(
            ("REPLICA", "NODE", "STATE", "EPOCH", "RECORD", "SYNCED AT", "DIRTY", "REMARK"),
            map(_row, found["copies"]),
        )
        for line in choice_lines(found):
            print(line)
    if found["refused"]:
        what, _, next_step = found["refused"].partition(". ")
        fail(what, next_step)
    if not found["choices"] and output is Output.TABLE:
        note("there is no copy that could be opened; the disks of the missing ones are the only way")


def recovery_lines(found: dict[str, Any]) -> list[str]:
    newest = found["newest"]
    return [
        f"newest record known: {newest['epoch']}.{newest['version']}, "
        f"held in sync by {', '.join(newest['in_sync'])}",
        f"missing of these: {', '.join(found['missing']) or 'none'}",
    ]


def _row(copy: dict[str, Any]) -> tuple[object, ...]:
    remarks = [word for word in ("suspect", "restored") if copy[word]] + [copy["reason"]]
    if not copy["reachable"]:
        return (copy["id"], copy["node"], "unreachable", "-", "-", "-", "-", copy["reason"])
    record, (epoch, version) = copy["record"], copy["synced_at"]
    return (
        copy["id"],
        copy["node"],
        copy["state"],
        copy["epoch"],
        f"{record['epoch']}.{record['version']}" if record else "-",
        f"{epoch}.{version}",
        copy["dirty_count"],
        "; ".join(part for part in remarks if part),
    )


def choice_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for choice in found["choices"]:
        lines += ["", f"to open with {', '.join(choice['members'])} would lose:"]
        lines += [f"  - {loss}" for loss in choice["loses"] or ["nothing that can be known of"]]
        order = ["dolmen", "volume", "recover", found["volume"]]
        order += ["--from", ",".join(choice["members"]), "--lose", choice["confirm"]]
        lines.append(f"  order it: {shlex.join(order)}")
    return lines
