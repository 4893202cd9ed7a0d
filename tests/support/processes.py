"""Start a program for a test, know when it is ready, and end it by its pid whatever happens.

Promises: when a ``running`` block ends, the program and everything it started in its process
group is gone and reaped; if the block failed, the program's output is printed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.01
"""Between looks at a condition that no file descriptor announces."""

READY_TIMEOUT_S = 30.0
"""For a program to come up on a machine that is busy with other tests."""

EXIT_TIMEOUT_S = 10.0


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float = READY_TIMEOUT_S, what: str = "a condition"
) -> None:
    """Returns as soon as ``condition()`` is true. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {timeout_s} s")
        time.sleep(POLL_S)  # a look every 10 ms, not a guess how long it takes


def accepts(path: Path | str) -> bool:
    """Whether something listens at this unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def is_alive(pid: int) -> bool:
    """False for a zombie: it runs nothing and holds nothing."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal one process; one that is gone already is no error."""
    assert pid > 1
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass(slots=True)
class Started:
    """A program that a ``running`` block started."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        kill(self.pid)
        self.process.wait(EXIT_TIMEOUT_S)


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    *,
    log: Path,
    ready: Callable[[], bool] | None = None,
    timeout_s: float = READY_TIMEOUT_S,
    env: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Run ``command`` in a process group of its own while the block lasts.

    ``ready`` is asked until it is true; a program that exits before that fails the test at once.
    """
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env=None if env is None else {**os.environ, **env},
        )
    started = Started(process, log)
    try:
        if ready is not None:

            def ready_or_gone() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} exited {process.returncode}: {started.output}")
                return ready()

            wait_until(ready_or_gone, timeout_s=timeout_s, what=f"{command[0]} being ready")
        yield started
    except BaseException:
        print(f"--- output of {command[0]} (pid {process.pid}):\n{started.output[-8000:]}", file=sys.stderr)
        raise
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, for a process that leads its own group, and what is left of the group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(EXIT_TIMEOUT_S)


def run(
    *command: str | Path, timeout_s: float = 60.0, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output captured; a failure shows it."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=None if env is None else {**os.environ, **env},
        check=False,
    )
    assert not check or done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done
