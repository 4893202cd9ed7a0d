"""``dolmen demo``: the whole story, and that nothing is left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli import demo_tree
from protocol.errors import BadRequest
from tests.support.processes import kill, wait_until

DOLMEN = Path(sys.executable).parent / "dolmen"

STEPS = (
    "An ext4 image of real files",
    "A cluster of 3 nodes",
    "attached",
    "got SIGKILL at",
    "finished without an error",
    "identical",
    "e2fsck: clean",
    "degraded",
    "MiB were copied",
    "same: 3 replicas hold the same bytes",
    "Everything was removed again",
)


class Run:
    """A demo whose temporary directory is ``place``: everything of it names that on its command line."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.log = place.parent / "demo.log"
        with open(self.log, "wb") as log:
            self.program = subprocess.Popen(
                [DOLMEN, "demo"], stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(place)}
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.fsencode(self.place) in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    pass  # it ended meanwhile
        return found

    def check_nothing_is_left(self) -> None:
        assert self.pids() == []
        assert list(self.place.iterdir()) == []
        mounts = Path("/proc/self/mounts").read_text()
        assert str(self.place) not in mounts


@pytest.fixture()
def run(tmp_path: Path) -> Iterator[Callable[[], Run]]:
    made: list[Run] = []

    def start() -> Run:
        place = tmp_path / "place"
        place.mkdir()
        made.append(Run(place))
        return made[0]

    yield start
    for each in made:
        kill(each.program.pid)
        each.program.wait()
        for pid in each.pids():
            kill(pid)


@pytest.mark.timeout(300)
def test_the_demo_tells_its_story_and_leaves_nothing(run: Callable[[], Run]) -> None:
    demo = run()
    code = demo.program.wait(timeout=280)
    assert code == 0, demo.output()
    at = 0
    for step in STEPS:
        found = demo.output().find(step, at)
        assert found >= 0, f"{step!r} is missing or out of order:\n{demo.output()}"
        at = found
    demo.check_nothing_is_left()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("moment", "number"),
    [("1. An ext4", signal.SIGTERM), ("3. A volume", signal.SIGINT), ("got SIGKILL", signal.SIGINT)],
)
def test_an_interrupted_demo_leaves_nothing(
    run: Callable[[], Run], moment: str, number: signal.Signals
) -> None:
    demo = run()
    wait_until(lambda: moment in demo.output(), timeout_s=120, what=f"the demo at {moment!r}")
    demo.program.send_signal(number)
    code = demo.program.wait(timeout=100)
    assert code == 130, demo.output()
    assert "interrupted" in demo.output() and "Traceback" not in demo.output()
    demo.check_nothing_is_left()


def test_a_machine_without_enough_files_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "file").write_bytes(b"x" * 1000)
    monkeypatch.setattr(demo_tree, "roots", lambda: [tmp_path / "few", tmp_path / "missing"])
    with pytest.raises(BadRequest, match="has only 0 MiB"):
        demo_tree.copy_tree(tmp_path / "tree")


def test_the_choice_of_files_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    for name, size_bytes in (("b/2", 3000), ("a/1", 5000), ("c", 4000)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x" * size_bytes)
    (source / "link").symlink_to("c")
    monkeypatch.setattr(demo_tree, "roots", lambda: [source])
    monkeypatch.setattr(demo_tree, "TREE_BYTES_MIN", 6000)
    chosen = []
    for run_index in range(2):
        target = tmp_path / f"target{run_index}"
        tree = demo_tree.copy_tree(target)
        assert tree.bytes >= 6000
        chosen.append(sorted(str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()))
    assert chosen[0] == chosen[1]
