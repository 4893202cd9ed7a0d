"""Jobs of the daemon, followed to their end: with a bar on a terminal.

Owns the asking. Does not own what a job does or how its result is told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from cli.output import Output
from control.client import Client

POLL_S = 0.1


def follow(client: Client, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The job's states until it is finished, the last one included."""
    while True:
        yield job
        if job["state"] != "running":
            return
        time.sleep(POLL_S)
        job = client.job(job["id"])


def wait_for(client: Client, started: dict[str, Any], *, doing: str, output: Output) -> dict[str, Any]:
    """The finished job. Someone who looks at a terminal sees how far it is."""
    if not sys.stderr.isatty() or output is not Output.TABLE:
        *_, job = follow(client, started)
        return job
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None)
        for job in follow(client, started):
            progress.update(task, completed=job["done"], total=job["total"] or None)
    return job
