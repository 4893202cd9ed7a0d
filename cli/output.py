"""How the command speaks: tables, JSON, errors with a next step, exit codes.

Owns every word between the system's answers and the terminal. Answers go to standard output, what
happens meanwhile and errors to standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, IntEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from protocol.errors import DaemonUnreachable, StorageError

P = ParamSpec("P")


class Exit(IntEnum):
    """Exit codes. ``dolmen --help`` lists them."""

    OK = 0
    FAILED = 1  # refused, or it went wrong; the message says what to do
    USAGE = 2  # the command line is not understood
    NO_DAEMON = 3  # no daemon answers
    DIFFERENT = 4  # a verification found damage or a difference
    UNFINISHED = 5  # accepted and still being worked on, or not everything could be checked
    UNHEALTHY = 6  # `dolmen why`: something is not as desired
    INTERRUPTED = 130  # by Ctrl-C; not of `dolmen up`, which Ctrl-C ends as it should: 0


EXIT_CODES = (
    "Exit codes: 0 done; 1 refused or failed; 2 usage; 3 no daemon answers; "
    "4 verification found a difference; 5 accepted but not finished; 6 not healthy (why); "
    "130 interrupted by Ctrl-C (but 0 from `dolmen up`, which it stops)."
)


class Output(Enum):
    TABLE = "table"
    JSON = "json"


DirOption = Annotated[
    Path | None,
    typer.Option(
        "--dir", help="The cluster's directory. Default: $DOLMEN_DIR, else ~/.dolmen.", show_default=False
    ),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print.")]


def fail(message: str, next_step: str = "", code: Exit = Exit.FAILED) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if next_step:
        print(f"next:  {next_step}", file=sys.stderr)
    raise typer.Exit(int(code))


def user_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A StorageError becomes one line of what and one of what next, never a traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except StorageError as error:
            what, next_step = split_advice(error)
            code = Exit.NO_DAEMON if isinstance(error, DaemonUnreachable) else Exit.FAILED
            fail(what, next_step, code)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(int(Exit.INTERRUPTED)) from None
        except BrokenPipeError:
            sys.stderr.close()  # `dolmen volume ls | head`: nobody reads on
            raise typer.Exit(int(Exit.OK)) from None

    return wrapped


ADVICE = {
    "no_space": "free space on that disk; the replica resumes by itself",
    "not_enough_nodes": "`dolmen node ls` shows which are down; start them, or ask for fewer --replicas",
    "timeout": "`dolmen why` says what it waits for; repeating the command is harmless",
    "unreachable": "`dolmen why` says which process does not answer, and why",
    "conflict": "try again",
    "shrink_refused": "`dolmen volume ls` shows sizes; for a smaller volume, create another and copy to it",
    "internal": "look into daemon.log in the cluster's directory",
}
"""For errors whose message has no next step of its own."""


def split_advice(error: StorageError) -> tuple[str, str]:
    """Messages are written as sentences, with the next step, if any, after the first."""
    text = " ".join(str(error).split()).removeprefix("The request is not valid: ")
    what, dot, rest = text.partition(". ")
    return what + dot.strip(), rest or ADVICE.get(
        error.code, "`dolmen status` shows what there is, `dolmen why` what is wrong"
    )


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def show_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as needed, nothing cut: it may be piped."""
    lines = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def note(text: str) -> None:
    print(text, file=sys.stderr)


def show_conditions(conditions: Iterable[dict[str, Any]], *, indent: str = "") -> None:
    for condition in conditions:
        act = condition["who"] == "operator" and "`" not in condition["waits_for"]
        who = " (an operator must act)" if act else ""
        since = f", since {condition['since']}" if condition["since"] else ""
        print(f"{indent}waits for {condition['waits_for']}{since}{who}")


def waiting_texts(view: dict[str, Any]) -> list[str]:
    """What the engine of a volume says it waits for."""
    waiting = (view.get("engine") or {}).get("waiting_for") or []
    return [" ".join(f"{key} {value}" for key, value in item.items()) for item in waiting]


def fail_unfinished(what: str, view: dict[str, Any], next_step: str = "") -> NoReturn:
    """The goal is written down and being worked on, but not reached yet."""
    reasons = [condition["waits_for"] for condition in view["conditions"]] + waiting_texts(view)
    show = f"`dolmen volume show {view['name']}` shows how far it is; repeating the command is harmless"
    fail(f"{what}: waits for {'; '.join(reasons) or 'its engine'}", next_step or show, Exit.UNFINISHED)
