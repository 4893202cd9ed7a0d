"""Ends what a cluster left running after its daemon died: for ``down`` and ``demo``. Synchronous.

Owns finding every process of one directory by its exact arguments. Ends processes by pidfd, so that
a pid that is used again is never hit. Does not own the orderly way (``Cluster.stop_everything``).
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import time
from collections.abc import Iterable

from control.layout import Layout
from control.processes import Programs, find, matches

DAEMON_ARGUMENTS = ("-P", "-m", "control.daemon")
"""After the interpreter. -P: a folder named "control" in a working directory is not imported."""

GRACE_S = 20.0
"""A replica server flushes its replicas. Past this it is killed, which loses nothing acknowledged."""


def end_leftovers(layout: Layout, programs: Programs | None = None, *, grace_s: float = GRACE_S) -> int:
    """End engines, then replica servers. Returns how many there were."""
    programs = programs or Programs()
    engines = [
        [*programs.engine[1:], "--config", os.fspath(layout.engine_config(path.name))]
        for path in _children(layout.dir / "volumes")
    ]
    servers = [
        [*programs.replica_server[1:], "--dir", os.fspath(layout.disk_dir(path.name))]
        for path in _children(layout.dir / "nodes")
    ]
    return _end(engines, grace_s) + _end(servers, grace_s)


def remove_runtime_dir(layout: Layout) -> None:
    """The short directory for sockets, if there is one and it is ours."""
    try:
        if layout.runtime.lstat().st_uid == os.getuid():
            shutil.rmtree(layout.runtime, ignore_errors=True)
    except FileNotFoundError:
        pass


def is_daemon_running(layout: Layout) -> bool:
    """Whether somebody holds the directory's lock."""
    try:
        fd = os.open(layout.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False  # there is no such directory, or it is not ours: then no daemon of ours runs in it
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class DaemonWatch:
    """Made while a daemon runs; ``gone`` waits until its process has ended, not only its work."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pidfds = _pin([*DAEMON_ARGUMENTS, "--dir", os.fspath(layout.dir)])

    def gone(self, *, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        try:
            while is_daemon_running(self._layout):
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(0.02)  # a lock held by somebody else cannot be waited for with a deadline
            return _all_ended(self._pidfds, max(0.0, deadline_s - time.monotonic()))
        finally:
            for pidfd in self._pidfds:
                os.close(pidfd)


def _children(path: os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(path) if entry.is_dir()]
    except FileNotFoundError:
        return []


def _end(arguments: Iterable[list[str]], grace_s: float) -> int:
    pidfds = [pidfd for wanted in arguments for pidfd in _pin(wanted)]
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        _signal(pidfds, number)
        if _all_ended(pidfds, wait_s):
            break
    for pidfd in pidfds:
        os.close(pidfd)
    return len(pidfds)


def _pin(arguments: list[str]) -> list[int]:
    """Pidfds of our processes with these arguments: what they name cannot change any more."""
    pidfds = []
    for pid in find(arguments):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue  # it ended this moment
        if matches(pid, arguments):  # looked at again, now that the pid cannot be used again
            pidfds.append(pidfd)
        else:
            os.close(pidfd)
    return pidfds


def _signal(pidfds: Iterable[int], number: signal.Signals) -> None:
    for pidfd in pidfds:
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            pass


def _all_ended(pidfds: Iterable[int], wait_s: float) -> bool:
    deadline_s = time.monotonic() + wait_s
    for pidfd in pidfds:
        ended, _, _ = select.select([pidfd], [], [], max(0.0, deadline_s - time.monotonic()))
        if not ended:
            return False
    return True
