"""``dolmen demo``: a replicated volume loses a replica while a file system is copied to it.

Owns the story, a temporary directory and everything below it. Uses the product only as any user
would: the daemon's REST API, the volume's NBD socket, and QEMU's and e2fsprogs' standard tools.

Promises: whatever happens (success, failure, Ctrl-C), no process, mount or file is left behind, and
the exit code is 0 only if every claim that was printed was checked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.cluster import start_daemon, stop_started, wait_ready
from cli.demo_tree import MIB, TREE_BYTES_MIN, copy_tree, make_image
from cli.jobs import follow
from cli.output import Exit
from cli.replica import verdict_text
from control.client import Client
from control.sizes import format_size
from protocol.errors import StorageError

VOLUME = "demo"
NODE_COUNT = 3
VICTIM = "node2"
KILL_AT_PERCENT = 50.0

SPACE_NEEDED_BYTES = 6 * TREE_BYTES_MIN
"""The files, the image, three replicas, and what is read back."""

RESYNC_TIMEOUT_S = 120.0
POLL_S = 0.05

TOOLS = {"qemu-img": "qemu-utils", "mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs"}
"""Program -> Debian package."""

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where e2fsprogs lives, and what an ordinary user's PATH often lacks."""


class DemoFailed(Exception):
    """A claim did not hold, or a tool failed."""


class Demo:
    """One run. ``play`` tells the story; ``clean_up`` is called whatever happened."""

    def __init__(self, console: Console, directory: Path, tools: dict[str, str]) -> None:
        self.console = console
        self.dir = directory
        self.tools = tools
        self.client = Client(directory / "cluster")
        self.image = directory / "image.ext4"
        self.uri = ""
        self._children: list[subprocess.Popen[str]] = []
        self._daemon: subprocess.Popen[bytes] | None = None
        self._step = 0

    def play(self) -> None:
        self._make_image()
        self._start_cluster()
        self._create_volume()
        self._copy_and_kill()
        self._compare()
        self._check_file_system()
        self._show_degraded()
        self._resync()
        self._verify()

    def clean_up(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        stop_started(self.client, self._daemon)
        shutil.rmtree(self.dir)

    @contextmanager
    def _step_of(self, title: str) -> Iterator[None]:
        self._step += 1
        self.console.print(f"\n[bold cyan]{self._step}. {title}[/]")
        began_s = time.monotonic()
        yield
        self.console.print(f"   [dim]took {time.monotonic() - began_s:.1f} s[/]")

    def _say(self, text: str) -> None:
        self.console.print(f"   {text}", highlight=False, soft_wrap=True)

    def _make_image(self) -> None:
        with self._step_of("An ext4 image of real files of this machine"):
            tree = copy_tree(self.dir / "tree")
            size_bytes = make_image(tree, self.image, self.tools["mke2fs"])
            shutil.rmtree(tree.path)
            self._say(
                f"{tree.file_count} files, {format_size(tree.bytes)}, from {', '.join(tree.sources)}; "
                f"the image has {format_size(size_bytes)} (mke2fs -d)"
            )

    def _start_cluster(self) -> None:
        with self._step_of(f"A cluster of {NODE_COUNT} nodes on this machine"):
            self._daemon = start_daemon(self.client, NODE_COUNT)
            wait_ready(self.client, self._daemon)
            self._say(
                "one daemon decides; each node is a process of its own with its own directory and TCP port:"
            )
            for node in self.client.nodes():
                self._say(
                    f"{node['name']}: replica server, pid {node['pid']}, {node['address']}, {node['path']}"
                )

    def _create_volume(self) -> None:
        with self._step_of("A volume with three replicas, attached"):
            size_bytes = self.image.stat().st_size
            self.client.create_volume(VOLUME, size_bytes, NODE_COUNT)
            view = self._expect(self.client.attach(VOLUME), "healthy")
            self.uri = view["nbd_uri"]
            nodes = ", ".join(replica["node"] for replica in view["replicas"])
            self._say(f"{format_size(size_bytes)}, every write goes to {nodes}")
            self._say(f"its engine (pid {view['engine']['pid']}) serves it to any NBD client at {self.uri}")

    def _copy_and_kill(self) -> None:
        title = "QEMU copies the image to the volume; half-way a replica server is killed"
        with self._step_of(title):
            killed: list[float] = []
            began_s = time.monotonic()

            def kill_once(percent: float) -> None:
                if percent >= KILL_AT_PERCENT and not killed:
                    pid = self._node(VICTIM)["pid"]
                    self.client.stop_node(VICTIM, kill=True)
                    killed.append(time.monotonic() - began_s)
                    what = f"{VICTIM}'s replica server (pid {pid}) got SIGKILL at {percent:.0f} %"
                    self.console.print(f"   [bold red]{what}[/]")

            self._qemu_img(
                ["convert", "-p", "-n", "-f", "raw", "-O", "raw", str(self.image), self.uri],
                "copying",
                kill_once,
            )
            if not killed:
                raise DemoFailed("the copy was over before the replica server could be killed")
            elapsed_s = time.monotonic() - began_s
            rate = self.image.stat().st_size / elapsed_s / MIB
            self._say(f"the copy went on and finished without an error: {rate:.0f} MiB/s to the client")
            self._say(
                f"(normally the daemon starts a dead replica server again at once; for this demo it was told "
                f"to leave {VICTIM} down, as `dolmen node stop {VICTIM} --kill` does)"
            )

    def _compare(self) -> None:
        with self._step_of("Is every byte there? (qemu-img compare)"):
            self._qemu_img(
                ["compare", "-p", "-f", "raw", "-F", "raw", str(self.image), self.uri], "comparing"
            )
            self._say("identical: what was acknowledged is there, served by the two remaining replicas")

    def _check_file_system(self) -> None:
        with self._step_of("Is the file system whole? (read back, e2fsck -fn)"):
            copy = self.dir / "read-back.ext4"
            self._qemu_img(["convert", "-p", "-f", "raw", "-O", "raw", self.uri, str(copy)], "reading")
            checked = self._run([self.tools["e2fsck"], "-fn", str(copy)])
            if checked.returncode != 0:
                raise DemoFailed(f"e2fsck found errors: {checked.stdout.strip()[-500:]}")
            copy.unlink()
            self._say(f"e2fsck: clean. {checked.stdout.strip().splitlines()[-1]}")

    def _show_degraded(self) -> None:
        with self._step_of("The volume is degraded, and says so (dolmen volume show)"):
            view = self._expect(self.client.volume(VOLUME), "degraded")
            self._show_replicas(view)
            record = view["membership"]
            self._say(
                f"membership record: epoch {record['epoch']}, version {record['version']}, in sync: "
                f"{', '.join(record['in_sync'])}"
            )
            self._say("it was stored by the remaining replicas before the next write was acknowledged")

    def _resync(self) -> None:
        with self._step_of(f"{VICTIM} comes back; what it missed is copied from its peers"):
            self.client.start_node(VICTIM)
            copied = self._watch_resync()
            view = self._expect(self.client.volume(VOLUME), "healthy")
            if copied:
                self._say(f"{format_size(copied)} were copied: only regions that were written meanwhile")
            self._show_replicas(view)

    def _watch_resync(self) -> int:
        """Until the volume is healthy. Returns the bytes copied, as last seen."""
        copied = 0
        deadline_s = time.monotonic() + RESYNC_TIMEOUT_S
        with self._progress() as progress:
            task = progress.add_task("resyncing", total=None)
            while True:
                view = self.client.volume(VOLUME)
                resync = next((r["resync"] for r in view["replicas"] if r["node"] == VICTIM), None)
                if resync:
                    copied = max(copied, resync["bytes_copied"])
                    progress.update(task, completed=resync["regions_done"], total=resync["regions_total"])
                if view["state"] == "healthy":
                    total = progress.tasks[0].total or 1
                    progress.update(task, completed=total, total=total)
                    return copied
                if time.monotonic() > deadline_s:
                    raise DemoFailed(f"not in sync again after {RESYNC_TIMEOUT_S:.0f} s: {view['replicas']}")
                time.sleep(POLL_S)

    def _verify(self) -> None:
        with self._step_of("Do all three replicas hold the same bytes? (dolmen replica verify)"):
            with self._progress() as progress:
                task = progress.add_task("verifying", total=None)
                for job in follow(self.client, self.client.verify(VOLUME)):
                    progress.update(task, completed=job["done"], total=job["total"] or None)
            result = job["result"]
            if job["state"] != "done" or result["verdict"] != "same":
                raise DemoFailed(job["error"] or verdict_text(result))
            for replica in result["replicas"]:
                self._say(
                    f"{replica['id']} on {replica['node']}: {replica['blocks_verified']} blocks read, every "
                    f"checksum right, digest {replica['digest']}"
                )
            self._say(f"[bold green]{verdict_text(result)}[/]")

    # Small tools

    def _node(self, name: str) -> dict[str, Any]:
        return next(node for node in self.client.nodes() if node["name"] == name)

    def _expect(self, view: dict[str, Any], state: str) -> dict[str, Any]:
        if view["state"] != state:
            raise DemoFailed(f"the volume should be {state}, it is {view['state']}: {view['conditions']}")
        return view

    def _show_replicas(self, view: dict[str, Any]) -> None:
        colours = {"in_sync": "green", "resyncing": "yellow", "stale": "yellow", "offline": "red"}
        table = Table("volume", "state", "replica", "node", "replica state", box=None, padding=(0, 3))
        for index, replica in enumerate(view["replicas"]):
            state = f"[{colours[replica['state']]}]{replica['state']}[/]"
            first = (view["name"], view["state"]) if index == 0 else ("", "")
            table.add_row(*first, replica["id"], replica["node"], state)
        self.console.print(table)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("   {task.description}"),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )

    def _qemu_img(
        self, arguments: list[str], doing: str, on_percent: Callable[[float], None] | None = None
    ) -> None:
        """Run with a progress bar. Raises DemoFailed with what it said."""
        with tempfile.TemporaryFile("w+", dir=self.dir) as errors, self._progress() as progress:
            task = progress.add_task(doing, total=100)
            child = subprocess.Popen(
                [self.tools["qemu-img"], *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
            )
            self._children.append(child)
            for percent in _percents(child):
                progress.update(task, completed=percent)
                if on_percent is not None:
                    on_percent(percent)
            code = child.wait()
            errors.seek(0)
            if code != 0:
                raise DemoFailed(f"qemu-img {arguments[0]} ended with {code}: {errors.read().strip()[:500]}")

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False)


def _percents(child: subprocess.Popen[str]) -> Iterator[float]:
    """What ``qemu-img -p`` prints: ``    (12.34/100%)``, one after the other with carriage returns."""
    assert child.stdout is not None
    text = ""
    while character := child.stdout.read(1):
        text += character
        if character in "\r)\n":
            match = re.search(r"\((\d+\.\d+)/100%\)", text)
            if match:
                yield float(match[1])
                text = ""


def find_tools() -> dict[str, str]:
    """Raises DemoFailed and names the packages that are missing."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    found = {tool: shutil.which(tool, path=path) for tool in TOOLS}
    missing = sorted({TOOLS[tool] for tool, place in found.items() if place is None})
    if missing:
        raise DemoFailed(f"missing programs. Install them: apt-get install {' '.join(missing)}")
    return {tool: place for tool, place in found.items() if place is not None}


def make_directory() -> Path:
    """In the first place that has the space: on disk rather than in memory."""
    places = [os.environ.get("TMPDIR"), "/var/tmp", "/tmp"]
    for place in filter(None, places):
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free >= SPACE_NEEDED_BYTES:
            return Path(tempfile.mkdtemp(prefix="dolmen-demo-", dir=place))
    raise DemoFailed(f"no {format_size(SPACE_NEEDED_BYTES)} free in {places}. Set TMPDIR to a larger place.")


def run() -> int:
    """The whole demo. Returns the exit code."""
    console = Console()
    began_s = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        demo = Demo(console, make_directory(), find_tools())
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return int(Exit.FAILED)
    code = Exit.FAILED
    try:
        demo.play()
        code = Exit.OK
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
        console.print("\n[yellow]interrupted[/]")
    except typer.Exit:  # the cluster did not get ready: that was said already
        _show_logs(console, demo.client)
    except (DemoFailed, StorageError, OSError) as error:
        console.print(f"\n[bold red]the demo failed:[/] {error}")
        _show_logs(console, demo.client)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # cleaning up is not interrupted
        demo.clean_up()
    console.print(f"\nEverything was removed again. {time.monotonic() - began_s:.1f} s in all.")
    return int(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show_logs(console: Console, client: Client) -> None:
    """The end of every log, because the directory is about to go."""
    for log in sorted(client.layout.dir.glob("**/*.log")):
        lines = log.read_text(errors="replace").splitlines()[-15:]
        if lines:
            console.print(f"[dim]--- {log.relative_to(client.layout.dir)}[/]")
            for line in lines:
                console.print(line, markup=False, highlight=False)
