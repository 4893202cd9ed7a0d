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
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def wait_daemon_gone(layout: Layout, *, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while is_daemon_running(layout):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)  # a lock held by somebody else cannot be waited for with a deadline
    return True


def _children(path: os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(path) if entry.is_dir()]
    except FileNotFoundError:
        return []


def _end(arguments: Iterable[list[str]], grace_s: float) -> int:
    pidfds = []
    for wanted in arguments:
        for pid in find(wanted):
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                continue
            if matches(pid, wanted):  # looked at again once the pid cannot be reused
                pidfds.append(pidfd)
            else:
                os.close(pidfd)
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        _signal(pidfds, number)
        if _all_ended(pidfds, wait_s):
            break
    for pidfd in pidfds:
        os.close(pidfd)
    return len(pidfds)


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
