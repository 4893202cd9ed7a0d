"""``dolmen why``: what is not as desired, what it waits for, who must act. Root causes first.

Owns the words around findings and their order on the screen. Does not own any finding: those are the daemon's
(``control/why.py``), and, when no daemon answers, that one.

Promises: the first line of an answer is a root cause; exits 0 only when all that was asked about is healthy.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli import node, volume
from cli.output import DirOption, Exit, Output, OutputOption, show_json, user_errors
from control.client import Client, default_dir
from protocol.errors import DaemonUnreachable, Timeout


def names(incomplete: str) -> list[str]:
    return [*volume.names(incomplete), *node.names(incomplete)]


@user_errors
def why(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A volume, a replica or a node. Default: everything.",
            autocompletion=names,
            show_default=False,
        ),
    ] = None,
    directory: DirOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Why something is not as desired: the root cause first, who must act, and the command to run.

    Exits 0 when everything is as desired, 6 when not, 3 when no daemon answers.
    """
    client = Client(directory or default_dir())
    code = Exit.UNHEALTHY
    try:
        answer = client.why(name or "")
    except (DaemonUnreachable, Timeout):
        answer = {"healthy": False, "findings": [client.why_no_daemon()]}
        code = Exit.NO_DAEMON
    if output is Output.JSON:
        show_json(answer)
    elif answer["healthy"]:
        print(f"{name or 'everything'}: healthy")
    else:
        for line in lines_of(answer["findings"]):
            print(line)
    raise typer.Exit(int(Exit.OK if answer["healthy"] else code))


def lines_of(findings: list[dict[str, Any]]) -> list[str]:
    """Each root with what follows from it. A root that does not concern what was asked about is not among
    them; what follows from it then stands alone."""
    roots = [finding for finding in findings if not finding["because"]]
    abouts = {finding["about"] for finding in roots}
    lines = []
    for root in roots:
        lines += _lines(root, "")
        of_it = [f for f in findings if f["because"] == root["about"]]
        if of_it and root is next(r for r in roots if r["about"] == root["about"]):
            lines += [line for finding in of_it for line in _lines(finding, "  -> ")]
    for finding in findings:
        if finding["because"] and finding["because"] not in abouts:
            lines += _lines(finding, "")
    return lines


def _lines(finding: dict[str, Any], indent: str) -> list[str]:
    text = "; ".join(part for part in (finding["text"], finding["then"]) if part)
    since = f" (since {finding['since']})" if finding["since"] else ""
    lines = [f"{indent}{text}{since}"]
    if finding["command"]:
        lines.append(f"{' ' * len(indent)}next: {finding['command']}")
    return lines
