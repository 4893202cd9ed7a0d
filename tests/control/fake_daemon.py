"""The real daemon with stand-ins for the processes it starts. Run as a program by tests.

``--die-at N``: it kills itself with SIGKILL at the N-th step it finished: a write to the state store,
an answer of a process, or the start of one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import control.engines
import control.supervisor
from control.daemon import run
from control.links import Link
from control.processes import Programs
from control.sqlite_store import SqliteStore

FAKES = Programs(
    replica_server=(sys.executable, "-P", "-m", "tests.control.fake_replica_server"),
    engine=(sys.executable, "-P", "-m", "tests.control.fake_engine"),
)

HARMLESS_CALLS = frozenset(
    {"server.status", "engine.status", "replica.inspect", "replica.stats", "engine.stats"}
)


def die_at(wanted: int) -> None:
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(work)
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return await work(*args, **kwargs)
            finally:
                if not HARMLESS_CALLS.intersection(a for a in args if isinstance(a, str)):
                    step()

        return wrapped

    def counted_spawn(*args: Any, **kwargs: Any) -> Any:
        process = control.processes.spawn(*args, **kwargs)
        step()
        return process

    SqliteStore._put = counted(SqliteStore._put)  # type: ignore[method-assign]
    SqliteStore._delete = counted(SqliteStore._delete)  # type: ignore[method-assign]
    Link.call = counted(Link.call)  # type: ignore[method-assign]
    control.engines.spawn = counted_spawn  # type: ignore[attr-defined]
    control.supervisor.spawn = counted_spawn  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--replace-after-s", type=float, default=0.0)
    options = parser.parse_args()
    if options.die_at:
        die_at(options.die_at)
    sys.exit(run(options, FAKES))
