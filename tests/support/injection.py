"""The N-th system call of a running process fails, or is the last thing that it does (strace).

::

    with injected(pid, "pwrite64:error=EIO:when=3", log=path) as trace:
        ...

``when`` counts per thread. Owns the tracer. Promises: when the block ends it is gone, and the process runs
on untraced if it lives.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Started, is_alive, running, wait_until


@contextlib.contextmanager
def injected(pid: int, rule: str, *, log: Path) -> Iterator[Started]:
    """``rule`` as strace's inject takes it; the calls that were made to fail end with (INJECTED) in the
    log."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    call = rule.partition(":")[0]
    command = ["strace", "-f", "-qq", "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={rule}"]
    # -qq hides "attached" too; a thread that is traced says so in /proc. It may meet its end at once.
    with running(command, log=log) as tracer:
        wait_until(lambda: is_traced(pid) or tracer.process.poll() is not None, what=f"strace at {pid}")
        assert tracer.process.poll() is None or not is_alive(pid), tracer.output
        yield tracer


def is_traced(pid: int) -> bool:
    """Every thread of it. False when it is gone."""
    try:
        statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    except OSError:
        return False
    return bool(statuses) and not any("TracerPid:\t0\n" in text for text in statuses)
