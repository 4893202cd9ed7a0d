"""One soak run: a cluster, a volume, clients, a fault every period, and what was seen.

Owns the order of things and the report. Does not own what a fault does (``faults.py``) or what a right
answer is (``load.py``).

Promises: the same seed gives the same faults in the same order, held as long (the operating system still
decides what they hit). Whatever happens, nothing that was started is left, and the report says everything
that was wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.network import NetworkUnavailable, PrivateNetwork, private_network
from tests.faults.conftest import prepared
from tests.faults.incident import Incident
from tests.guest.files import writing_files
from tests.soak.faults import FAULTS, Fault, Stage
from tests.soak.load import Registers, Shadow
from tests.support.cluster import Cluster, cluster

ROOT = Path(__file__).parents[2]
SMALL_DISK_NODE = "node3"
SMALL_DISK_BYTES = 192 * 1024 * 1024

PERIOD_S_DEFAULT = 20.0
CALM_S_MIN = 1.0
"""Load before each fault strikes: a fault meets clients at work, not clients that start."""

HEALTHY_TIMEOUT_S = 60.0
"""After a fault was mended. Much more than it takes: then something is stuck."""

STALL_S_MAX = 30.0
"""A request that waited longer than this over any fault of the list is wrong; goals for single faults are
measured elsewhere, on a quiet machine."""

VERIFY_EVERY = 5
"""Windows between comparisons of all replicas byte for byte."""

GUEST_VOLUME = "guest"
GUEST_BYTES = 64 * 1024 * 1024
GUEST_SLOTS = 100
GUEST_FILES_MAX = 1_000_000
"""Never reached: the guest writes until its end."""

RSS_GROWTH_BYTES_MAX = 48 * 1024 * 1024
DESCRIPTOR_GROWTH_MAX = 32
"""Of one process over its life, from the first look on. A leak of one descriptor per fault passes this
within half an hour."""


@dataclass(slots=True)
class FaultReport:
    count: int = 0
    stall_s_max: float = 0.0
    healthy_s_max: float = 0.0  # from mended to healthy


@dataclass(slots=True)
class Usage:
    """Of one process while it lives."""

    role: str
    pid: int
    rss_bytes_first: int
    rss_bytes_last: int
    descriptors_first: int
    descriptors_last: int


@dataclass(slots=True)
class Report:
    seed: int
    commit: str
    period_s: float
    wall_s: float = 0.0
    faults: dict[str, FaultReport] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    operations: int = 0
    shadow_operations: dict[str, int] = field(default_factory=dict)
    reconnects: int = 0
    verifications: int = 0
    mismatches: int = 0
    guest_files: int | None = None  # synced by a guest and there after its end; None: no guest ran
    rss_growth_bytes_max: dict[str, int] = field(default_factory=dict)
    descriptor_growth_max: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def fault_count(self) -> int:
        return sum(fault.count for fault in self.faults.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fault_count": self.fault_count, "ok": not self.problems}


class Watch:
    """Memory and descriptors of every process of the volume, looked at once per window."""

    def __init__(self, incident: Incident) -> None:
        self._incident = incident
        self._usages: dict[int, Usage] = {}

    def look(self) -> None:
        dolmen, shown = self._incident.dolmen, self._incident.show()
        roles = {dolmen.daemon_pid(): "daemon", int(shown["engine"]["pid"]): "engine"}
        roles |= {int(replica["pid"]): "replica server" for replica in shown["replicas"] if replica["pid"]}
        for pid, role in roles.items():
            with contextlib.suppress(OSError):  # it ended meanwhile
                rss, descriptors = dolmen.memory_bytes(pid), dolmen.descriptor_count(pid)
                usage = self._usages.setdefault(pid, Usage(role, pid, rss, rss, descriptors, descriptors))
                usage.rss_bytes_last, usage.descriptors_last = rss, descriptors

    def judge(self, report: Report) -> None:
        for usage in self._usages.values():
            rss = usage.rss_bytes_last - usage.rss_bytes_first
            descriptors = usage.descriptors_last - usage.descriptors_first
            growths = (report.rss_growth_bytes_max, rss), (report.descriptor_growth_max, descriptors)
            for worst, growth in growths:
                worst[usage.role] = max(worst.get(usage.role, 0), growth)
            if rss > RSS_GROWTH_BYTES_MAX or descriptors > DESCRIPTOR_GROWTH_MAX:
                report.problems.append(
                    f"{usage.role} {usage.pid} grew: {rss} bytes, {descriptors} descriptors"
                )


@contextlib.contextmanager
def _stage(chance: random.Random) -> Iterator[tuple[Stage, PrivateNetwork | None]]:
    root = os.getuid() == 0
    with contextlib.ExitStack() as stack:
        network = None
        with contextlib.suppress(NetworkUnavailable):
            network = stack.enter_context(private_network())
        small = {SMALL_DISK_NODE: SMALL_DISK_BYTES} if root else None
        dolmen: Cluster = stack.enter_context(cluster(network=network, disk_bytes=small))
        incident = stack.enter_context(contextlib.contextmanager(prepared)(dolmen))
        disk = dolmen.dir / "nodes" / SMALL_DISK_NODE / "disk0" if small else None
        yield Stage(incident, chance, disk), network


@contextlib.contextmanager
def _guest(stage: Stage, report: Report) -> Iterator[None]:
    """A guest that syncs files on a volume of its own for as long as the block lasts, then dies."""
    dolmen, client = stage.incident.dolmen, stage.incident.client
    client.create_volume(GUEST_VOLUME, GUEST_BYTES, 3)
    uri = str(client.attach(GUEST_VOLUME)["nbd_uri"])
    dolmen.wait_for_state(GUEST_VOLUME, "healthy")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="dolmen-soak-") as work,
            writing_files(
                uri=uri,
                volume=GUEST_VOLUME,
                dolmen_dir=dolmen.dir,
                size_bytes=GUEST_BYTES,
                work=Path(work),
                count=GUEST_FILES_MAX,
                slots=GUEST_SLOTS,
            ) as writer,
        ):
            writer.guest.wait_for("synced 1.")
            yield
            report.guest_files = writer.kill()
            dolmen.wait_for_state(GUEST_VOLUME, "healthy")
            writer.check(report.guest_files)
    except (AssertionError, TimeoutError) as error:
        report.problems.append(f"guest: {error}")
    client.detach(GUEST_VOLUME)
    client.delete_volume(GUEST_VOLUME)


def soak(
    *,
    seed: int,
    duration_s: float,
    period_s: float = PERIOD_S_DEFAULT,
    guest: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Runs whole windows until ``duration_s`` is over, or something is wrong."""
    chance = random.Random(seed)
    report = Report(seed, _commit(), period_s)
    began = time.monotonic()
    with _stage(chance) as (stage, network):
        possible = []
        for fault in FAULTS:
            missing = (fault.needs_network and network is None) or (
                fault.needs_small_disk and stage.small_disk is None
            )
            (report.left_out.append(fault.name) if missing else possible.append(fault))
        soaking = _Soak(stage, report, say)
        soaking.start()
        deck: list[Fault] = []
        with _guest(stage, report) if guest else contextlib.nullcontext():
            while time.monotonic() - began < duration_s and not report.problems:
                if not deck:
                    deck = chance.sample(possible, len(possible))  # every kind once, then again
                soaking.window(deck.pop(), period_s)
            stage.incident.mend()
        soaking.end()
    report.wall_s = round(time.monotonic() - began, 1)
    return report


class _Soak:
    def __init__(self, stage: Stage, report: Report, say: Callable[[str], None]) -> None:
        self._stage = stage
        self._incident = stage.incident
        self._report = report
        self._say = say
        self._registers = Registers(self._incident.uri, random.Random(stage.chance.random()))
        self._shadow = Shadow(self._incident.uri, stage.chance.randrange(2**32))
        self._watch = Watch(self._incident)

    def start(self) -> None:
        self._shadow.start()

    def window(self, fault: Fault, period_s: float) -> None:
        """One fault under load, mended, healthy again, everything checked."""
        seen = self._report.faults.setdefault(fault.name, FaultReport())
        seen.count += 1
        try:
            healthy_s = self._strike(fault, period_s)
            stall_s = max(self._registers.stall_max_s, self._shadow.take_stall_max_s())
            seen.healthy_s_max = round(max(seen.healthy_s_max, healthy_s), 2)
            seen.stall_s_max = round(max(seen.stall_s_max, stall_s), 2)
            self._check(fault, stall_s)
            self._say(
                f"{self._report.fault_count:4d} {fault.name}: stall {stall_s:.2f} s, healthy after "
                f"{healthy_s:.1f} s, {self._registers.operation_count} operations"
            )
        except Exception as error:  # noqa: BLE001 - whatever went wrong is what a soak is for
            self._wrong(f"{fault.name}: {type(error).__name__}: {error}")

    def _strike(self, fault: Fault, period_s: float) -> float:
        ends = time.monotonic() + period_s
        self._shadow.take_stall_max_s()
        with self._registers.window() as workload:
            workload.wait_for_answers(100)
            self._stage.hold(CALM_S_MIN, max(CALM_S_MIN, period_s / 4))
            fault.act(self._stage)
            mended = time.monotonic()
            workload.wait_for_answers(100)
            self._incident.dolmen.wait_for_state(self._incident.name, "healthy", timeout_s=HEALTHY_TIMEOUT_S)
            healthy_s = time.monotonic() - mended
            time.sleep(max(0.0, ends - time.monotonic()))  # the rest of the period is load without a fault
        return healthy_s

    def _check(self, fault: Fault, stall_s: float) -> None:
        registers, shadow = self._registers, self._shadow
        if shadow.failure is not None:
            self._wrong(f"{fault.name}: the shadow client failed: {shadow.failure!r}")
        for text in (*registers.violations, *registers.errors, *shadow.mismatches):
            self._wrong(f"{fault.name}: {text}")
        self._report.mismatches = len(registers.violations) + len(shadow.mismatches)
        if stall_s > STALL_S_MAX:
            self._wrong(f"{fault.name}: a request waited {stall_s:.1f} s")
        if self._report.fault_count % VERIFY_EVERY == 0:
            self._verify()
        self._watch.look()

    def _verify(self) -> None:
        """Under the shadow's load: a region it writes at every look may stay busy, nothing may differ."""
        result = self._incident.verify()
        self._report.verifications += 1
        if result["verdict"] == "different":
            self._wrong(f"replicas differ: {result}")

    def _wrong(self, text: str) -> None:
        self._say(f"WRONG: {text}")
        self._report.problems.append(text)

    def end(self) -> None:
        report = self._report
        try:
            self._incident.mend()
            self._shadow.stop()
            self._incident.check_healthy_and_equal()
            report.verifications += 1
        except Exception as error:  # noqa: BLE001 - it belongs into the report
            self._wrong(f"at the end: {type(error).__name__}: {error}")
        for text in self._shadow.mismatches:
            if not any(text in problem for problem in report.problems):
                self._wrong(text)
        report.mismatches = len(self._registers.violations) + len(self._shadow.mismatches)
        self._watch.judge(report)
        report.operations = self._registers.operation_count + sum(self._shadow.operations.values())
        report.shadow_operations = dict(sorted(self._shadow.operations.items()))
        report.reconnects = self._registers.reconnect_count + self._shadow.reconnect_count
        if report.problems:
            self._say(self._incident.dolmen.logs())


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
