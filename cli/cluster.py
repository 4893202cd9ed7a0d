"""``dolmen up``, ``down`` and ``status``: the local cluster's processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cli.output import DirOption, Exit, Output, OutputOption, fail, note, show_json, user_errors
from control.client import Client, default_dir
from protocol.errors import BadRequest, DaemonUnreachable, StorageError

READY_TIMEOUT_S = 60.0
"""Replica servers recover what an unclean stop left before they serve."""

DOWN_TIMEOUT_S = 90.0
"""Engines detach (20 s at most), then replica servers flush (20 s at most)."""

NODES_DEFAULT = 3
REPLACE_AFTER_DEFAULT = "10m"
"""As ``control.reconcile.REPLACE_AFTER_S``, which takes long to import."""

NODES_MAX = 16
"""As ``control.model.NODES_MAX``, which takes long to import."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

POLL_S = 0.02
STOP_POLL_S = 0.2
EXIT_ALREADY_RUNNING = 5


@user_errors
def up(
    directory: DirOption = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=NODES_MAX, help="Local nodes; never fewer than there were. [default: 3]"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when all is ready.")] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="TCP port of the REST API on 127.0.0.1; 0: a free one.")
    ] = 0,
    replace_after: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long a replica's server or disk may be gone until another node gets a new one, "
            "as 90s, 10m or 2h; 0: never.",
        ),
    ] = REPLACE_AFTER_DEFAULT,
    output: OutputOption = Output.TABLE,
) -> None:
    """Run a local cluster: the daemon and its replica servers. Repeating it is harmless.

    Without --detach it runs until Ctrl-C, which stops everything.
    """
    replace_after_s = parse_duration_s(replace_after)
    client = Client(directory or default_dir())
    came: list[int] = []
    if not detach:
        # A daemon that starts at that moment must be known before it can be stopped.
        handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in STOP_SIGNALS}
    daemon = start_daemon(client, nodes or NODES_DEFAULT, port, replace_after_s)
    if daemon is not None and not detach:
        _run_in_foreground(client, daemon, output, came)
        return
    if not detach:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt
    wait_ready(client, daemon)
    _show_up(client, output, already=daemon is None)
    _say_ignored(client, nodes, port, already=daemon is None)
    if daemon is None and replace_after != REPLACE_AFTER_DEFAULT:
        note(f"--replace-after {replace_after} is ignored, a daemon runs already: `dolmen down` first")


def _say_ignored(client: Client, nodes: int | None, port: int, *, already: bool) -> None:
    """What was asked for and is not so."""
    status = client.status()
    count = len(status["nodes"])
    if already and nodes is not None and count < nodes:
        note(f"for {nodes} nodes: `dolmen down`, then `dolmen up --nodes {nodes}`")
    address = status["daemon"]["tcp_address"]
    if already and port and not address.endswith(f":{port}"):
        note(f"--port {port} is ignored, it runs on {address}: `dolmen down`, then `dolmen up --port {port}`")
    if nodes is not None and count > nodes:
        note(f"--nodes {nodes} is ignored: there are {count} nodes, and they never get fewer")


def parse_duration_s(text: str) -> float:
    """Raises BadRequest."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None:
        raise BadRequest(reason=f"{text[:40]!r} is not a time; write 90s, 10m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def start_daemon(
    client: Client, nodes: int, port: int = 0, replace_after_s: float | None = None
) -> subprocess.Popen[bytes] | None:
    """None if one runs already. Raises BadRequest for a directory that is not ours."""
    from control.leftovers import DAEMON_ARGUMENTS, is_daemon_running
    from control.processes import rotate

    if is_daemon_running(client.layout):
        return None
    client.layout.prepare()
    rotate(client.layout.daemon_log)
    with open(client.layout.daemon_log, "ab", opener=_private) as log:
        return subprocess.Popen(
            [
                *(sys.executable, *DAEMON_ARGUMENTS, "--dir", os.fspath(client.layout.dir)),
                *("--nodes", str(nodes), "--port", str(port)),
                *(() if replace_after_s is None else ("--replace-after-s", str(replace_after_s))),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=client.layout.dir,
            start_new_session=True,
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def wait_ready(client: Client, daemon: subprocess.Popen[bytes] | None) -> None:
    """Until every node serves and every attached volume is served."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    waits_for: list[str] = ["the daemon"]
    while time.monotonic() < deadline_s:
        try:
            health = client.health()
        except DaemonUnreachable:
            if daemon is not None and daemon.poll() not in (None, EXIT_ALREADY_RUNNING):
                fail(*_why_it_ended(client.layout.daemon_log))
        else:
            if health["ready"]:
                return
            waits_for = health["waits_for"]
        time.sleep(POLL_S)
    fail(
        f"the cluster is not ready after {READY_TIMEOUT_S:.0f} s: waits for {', '.join(waits_for)}",
        "`dolmen why` says why; what is up is served. The logs are under " + os.fspath(client.layout.dir),
        Exit.UNFINISHED,
    )


def _why_it_ended(log: Path) -> tuple[str, str]:
    """What went wrong and what to do, from the daemon's last words."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.strip(" |+-^~")]
    last = said[-1].lstrip(" |+-") if said else "it wrote nothing"
    reason = re.search(r'reason="((?:[^"\\]|\\.)*)"', last)
    # A record with a traceback is one line, its line breaks written as \n: only the exception is for people.
    trace = re.split(r"\\n", reason[1] if reason else last)
    words = [part for part in (line.strip(' |+-^~"') for line in trace) if part]
    why = words[-1] if words else last
    why = re.sub(r"^(?:\w+\.)+\w+: ", "", why).removeprefix("The request is not valid: ")
    return f"the daemon ended: {why}", f"its log has more: {log}"


def _show_up(client: Client, output: Output, *, already: bool) -> None:
    status = client.status()
    if output is Output.JSON:
        show_json(status)
        return
    daemon = status["daemon"]
    count = len(status["nodes"])
    print(f"cluster {'was up already' if already else 'is up'}: {count} nodes in {daemon['dir']}")
    print(
        f"REST API: {daemon['socket']} and http://{daemon['tcp_address']} (token: {daemon['dir']}/api.token)"
    )
    export = f"export DOLMEN_DIR={daemon['dir']}; " if Path(daemon["dir"]) != default_dir() else ""
    note(f"next: {export}dolmen {'why' if status['volumes'] else 'volume create data --size 2GiB'}")


def _run_in_foreground(
    client: Client, daemon: subprocess.Popen[bytes], output: Output, came: list[int]
) -> None:
    """Until Ctrl-C or SIGTERM, which stop everything, also while it starts. ``came``: signals before."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        for number in STOP_SIGNALS:
            signal.signal(number, interrupted)
        if came:
            raise KeyboardInterrupt
        wait_ready(client, daemon)
        _show_up(client, output, already=False)
        note("running in the foreground; Ctrl-C stops everything")
        code = daemon.wait()
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        note("stopping everything")
        stop_started(client, daemon)
        return
    if code != 0:
        fail(f"the daemon ended with exit code {code}", f"its log: {client.layout.daemon_log}")


def stop_started(client: Client, daemon: subprocess.Popen[bytes] | None) -> None:
    """Stop a daemon that this process started, whatever it was doing, and everything it started."""
    deadline_s = time.monotonic() + DOWN_TIMEOUT_S
    while daemon is not None and daemon.poll() is None:
        if time.monotonic() > deadline_s:
            daemon.kill()
        with contextlib.suppress(StorageError):  # it may not answer yet, or not any more
            client.shutdown(everything=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(STOP_POLL_S)
    stop_everything(client)


@user_errors
def down(directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """Detach every volume cleanly and stop every process. Repeating it is harmless."""
    client = Client(directory or default_dir())
    was_up = stop_everything(client)
    if output is Output.JSON:
        show_json({"dir": str(client.layout.dir), "was_up": was_up})
    else:
        print(f"cluster in {client.layout.dir}: {'stopped' if was_up else 'was not up'}")


def stop_everything(client: Client) -> bool:
    """True if there was anything to stop."""
    from control.leftovers import DaemonWatch, end_leftovers, is_daemon_running, remove_runtime_dir

    layout = client.layout
    was_up = is_daemon_running(layout)
    if was_up:
        watch = DaemonWatch(layout)
        _ask_to_stop(client)
        if not watch.gone(timeout_s=DOWN_TIMEOUT_S):
            fail(f"the daemon has not ended after {DOWN_TIMEOUT_S:.0f} s", f"its log: {layout.daemon_log}")
    # A daemon that was killed leaves its processes running.
    left = end_leftovers(layout)
    remove_runtime_dir(layout)
    return was_up or left > 0


def _ask_to_stop(client: Client) -> None:
    """A daemon that holds its lock but does not answer is just starting or ending: ask again."""
    from control.leftovers import is_daemon_running

    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            client.shutdown(everything=True)
            return
        except DaemonUnreachable:
            if not is_daemon_running(client.layout):
                return
            if time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_S)


@user_errors
def status(directory: DirOption = None, output: OutputOption = Output.TABLE) -> None:
    """The cluster at a glance."""
    from cli.node import show_nodes
    from cli.output import show_conditions, show_table
    from cli.volume import row

    view = Client(directory or default_dir()).status()
    if output is Output.JSON:
        show_json(view)
        return
    daemon = view["daemon"]
    print(
        f"daemon {daemon['version']}, pid {daemon['pid']}, up {daemon['uptime_s']:.0f} s, {daemon['dir']}\n"
    )
    show_nodes(view["nodes"])
    print()
    show_table(("VOLUME", "SIZE", "STATE", "IN SYNC", "EPOCH", "NBD URI"), map(row, view["volumes"]))
    if not view["volumes"]:
        note("no volumes yet; next: dolmen volume create NAME --size 2GiB")
    for volume in view["volumes"]:
        show_conditions(volume["conditions"], indent=f"{volume['name']}: ")
