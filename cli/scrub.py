"""``dolmen volume scrub``: every replica reads itself, and what is damaged is repaired.

Owns the arguments and the words. Does not own the work (``control/scrub.py``).

Promises: exit code 0 with --wait only when every replica was read and no damage is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cli.jobs import wait_for
from cli.output import Exit, Output, fail, note, show_json, show_table
from control.client import Client, default_dir

SHOWN_MAX = 20
"""Blocks listed per replica. `-o json` has more."""

CODES = {
    "clean": Exit.OK,
    "repaired": Exit.OK,
    "damaged": Exit.DIFFERENT,
    "incomplete": Exit.UNFINISHED,
}


def scrub(name: str, wait: bool, directory: Path | None, output: Output) -> None:
    """Read every block of every replica, and repair what is damaged. Works attached and detached.

    What is damaged on a detached volume is repaired when it is attached. Replicas scrub themselves once a
    week; this asks for it now.
    """
    client = Client(directory or default_dir())
    job = client.scrub(name)
    if not wait:
        if output is Output.JSON:
            show_json(job)
        else:
            print(f"{name}: being scrubbed")
            note(f"`dolmen volume scrub {name} --wait` waits for the result")
        return
    job = wait_for(client, job, doing="scrubbing", output=output)
    if output is Output.JSON:
        show_json(job)
    if job["state"] == "failed":
        fail(f"the scrub of {name} could not finish: {job['error']}", "`dolmen status`, then try again")
    if output is Output.TABLE:
        show_result(name, job["result"])
    raise typer.Exit(int(CODES[job["result"]["verdict"]]))


def show_result(name: str, result: dict[str, Any]) -> None:
    show_table(
        ("REPLICA", "NODE", "BLOCKS VERIFIED", "FOUND", "LEFT", "REMARK"),
        (
            (
                replica["id"],
                replica["node"],
                replica["blocks_verified"],
                replica["found_count"],
                replica["left_count"],
                replica["reason"] or "-",
            )
            for replica in result["replicas"]
        ),
    )
    for replica in result["replicas"]:
        for finding in replica["findings"][:SHOWN_MAX]:
            print(f"{replica['id']}: block at {finding['offset_bytes']}: {_became(finding)}")
        more = replica["found_count"] - SHOWN_MAX
        if more > 0:
            print(f"{replica['id']}: and {more} more; `-o json` lists them")
    print(f"{name}: {verdict_text(result)}")


def _became(finding: dict[str, Any]) -> str:
    if finding["repaired"]:
        return "repaired"
    return "NO REPLICA HAS A GOOD COPY" if finding["unreadable"] else "damaged"


def verdict_text(result: dict[str, Any]) -> str:
    replicas = result["replicas"]
    found = sum(replica["found_count"] for replica in replicas)
    left = sum(replica["left_count"] for replica in replicas)
    match result["verdict"]:
        case "clean":
            return f"clean: every checksum of {len(replicas)} replica{'s' * (len(replicas) != 1)} verifies"
        case "repaired":
            return f"repaired: {found} damaged block{'s' * (found != 1)} found, none left"
        case "damaged":
            when = "" if result["attached"] else "; they are repaired when the volume is attached"
            return f"DAMAGED: {left} of {found} damaged block{'s' * (found != 1)} left{when}"
        case _:
            unread = sum(not replica["scrubbed"] for replica in replicas)
            return f"incomplete: {unread} of {len(replicas)} replicas could not be read to the end"
