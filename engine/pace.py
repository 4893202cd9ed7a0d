"""How fast a resync may copy, from what the client gets meanwhile. Pure: no clock, no socket.

Owns the decision alone. The shell (``server.py``) takes a sample of the data plane's counters every
PACE_INTERVAL_S, only while regions are pulled, and hands it to ``Pace.step``; the volume's machine gives the
answer to each pull that begins after it. Regions that a client's request waits for are not held back.

The aim is that the client's p99 while a resync runs is at most twice what it was without. What it would be
without can only be measured without, so:

* IDLE: no client: as fast as disk and link go.
* MEASURING: client work appears, or the last measurement is old: no pull begins for as long as it takes to
  see enough operations, 2.5 s of 30 at most. What they take then is the baseline.
* PROBING: upward by a factor while latency stays below the aim; down when it does not (twice in a row, or
  once by far: one bad window may be the machine's), and then upward more slowly.

Two figures are compared, and the worse one decides: the p99, which the data plane's buckets tell no better
than to a factor of two, and the mean, which is exact.

While it copies the rate never falls below a floor: a resync must finish, whatever the client does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from protocol.limits import REGION_BYTES

PACE_INTERVAL_S = 0.25
"""Between two samples. A burst of a client is answered after two of them at most."""

RATE_FLOOR_BYTES_S = 4 * 1024 * 1024
"""One region a second: 1 TiB in three days under a client that never rests. Little for any disk."""

SETTLING_WINDOWS = 2
"""After a change: what was begun before it still runs. A call takes about CALL_AIM_S."""

RATE_FIRST_BYTES_S = 16 * 1024 * 1024
"""Where probing begins after a measurement when nothing better is known."""

RATE_CEILING_BYTES_S = 4 * 1024**3
"""Beyond it a limit means nothing."""

LATENCY_AIM = 1.5
"""Times the baseline. Below the promised 2: windows are coarse, and a rate takes a moment to work."""

LATENCY_BACK_OFF = 1.8
"""Above this twice in a row the rate is lowered; between this and the aim it stays."""

LATENCY_ALARM = 3.0
"""Above this it is lowered at once."""

P99_DOUBT = 1.35
"""A p99 next to the border of a bucket looks so much higher or lower than it is. The mean has no doubt."""

PROBE_FACTOR = 1.3
PROBE_FACTOR_AFTER_BACK_OFF = 1.1
"""Per window. Slowly near a rate that was too much a moment ago, so that it is not crossed every second."""

BACK_OFF_FACTOR = 0.6

FORGET_CEILING_WINDOWS = 40
"""After so many quiet windows (10 s) a rate that was once too much may be tried again at full speed."""

BASELINE_FOR_WINDOWS = 120
"""30 s: then what the client gets without a resync is measured anew, because its work may have changed."""

BASELINE_DOUBTED_WINDOWS = 40
"""10 s: the same, when the client suffers though next to nothing is copied. Then it is not our doing."""

OPERATIONS_MIN = 200
"""A p99 of fewer says nothing; windows are added up until there are as many, WINDOWS_POOLED_MAX at most."""

BASELINE_WINDOWS_MIN = 4
"""A baseline is measured for 1 s at least: all that follows is compared with it."""

WINDOWS_POOLED_MAX = 8

IDLE_OPERATIONS = 2
"""Operations in a window that do not count as a client: a probe, a table that is read again."""

IDLE_WINDOWS = 4
"""Of no work (1 s) until a client counts as gone."""

LATENCY_NOISE_US = 200.0
"""Below this nobody notices a factor: a memory-fast baseline is taken as this."""

CALL_AIM_S = 0.5
"""What one pull call should take, so that a new rate works soon."""

BATCH_REGIONS_MAX = 16
"""64 MiB: at 1 MB/s a call is still well within its timeout."""

BATCH_REGIONS_FIRST = 8
CALLS_UNLIMITED = 3
"""Background calls at once when nothing holds back: the others hide the round trips of each."""


@dataclass(frozen=True, slots=True)
class PullPace:
    """What the next pulls get. ``rate_bytes_s`` is for all calls together; 0: no limit. ``calls_max``: of the
    background; 0: none begins for now."""

    rate_bytes_s: int = 0
    batch_regions: int = BATCH_REGIONS_FIRST
    calls_max: int = CALLS_UNLIMITED

    @property
    def rate_of_one_bytes_s(self) -> int:
        return self.rate_bytes_s // max(1, self.calls_max)


STARTING = PullPace(RATE_FIRST_BYTES_S, 4, 1)
"""Until the first sample: there may be a client, and nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What happened in one window. ``latency_us``: of each kind of operation, how many took up to 2**i us;
    ``latency_sum_us``: all of them together."""

    window_s: float
    latency_us: Mapping[str, tuple[int, ...]]
    latency_sum_us: Mapping[str, int]
    copied_bytes: int = 0

    @property
    def operations(self) -> int:
        return sum(sum(buckets) for buckets in self.latency_us.values())


class PaceState(Enum):
    """::

    IDLE -> MEASURING <-> PROBING; IDLE after a while without a client, from any state.
    """

    IDLE = "idle"
    MEASURING = "measuring"
    PROBING = "probing"


class Pace:
    """One resync's pace. ``step`` per window; what it returns holds until the next."""

    def __init__(self) -> None:
        self.state = PaceState.IDLE
        self.rate_bytes_s = 0
        self.baseline_us: dict[str, tuple[float, float]] = {}  # by kind: p99, mean
        self._pool: dict[str, list[int]] = {}
        self._sums: dict[str, int] = {}
        self._pooled = 0
        self._quiet = 0  # windows without a client
        self._age = 0  # windows since the baseline was measured
        self._since_back_off = FORGET_CEILING_WINDOWS
        self._too_much = False  # in the window before
        self._settling = 0  # windows in which pulls under way still have the rate before
        self._last_good_bytes_s = RATE_FIRST_BYTES_S
        self._throughput_bytes_s = 0.0

    def step(self, load: Load) -> PullPace:
        if load.copied_bytes and load.window_s > 0:
            seen = load.copied_bytes / load.window_s
            self._throughput_bytes_s = 0.5 * (self._throughput_bytes_s or seen) + 0.5 * seen
        if load.operations <= IDLE_OPERATIONS:
            self._quiet += 1
            if self._quiet >= IDLE_WINDOWS or self.state is PaceState.IDLE:
                self._rest()
        else:
            self._quiet = 0
            self._work(load)
        return self._pace()

    def told(self) -> dict[str, object]:
        """For the log."""
        return {
            "state": self.state.value,
            "rate_bytes_s": self.rate_bytes_s,
            "baseline_p99_us": {kind: round(p99) for kind, (p99, _) in self.baseline_us.items()},
        }

    def _rest(self) -> None:
        self.state, self.rate_bytes_s = PaceState.IDLE, 0
        self._clear()

    def _work(self, load: Load) -> None:
        if self.state is PaceState.IDLE:
            self._measure()
            return
        if self._settling:
            self._settling -= 1
            return
        self._add(load)
        self._age += 1
        self._since_back_off += 1
        windows_min = BASELINE_WINDOWS_MIN if self.state is PaceState.MEASURING else 1
        enough = self._count() >= OPERATIONS_MIN and self._pooled >= windows_min
        if not enough and self._pooled < WINDOWS_POOLED_MAX:
            return
        found = {
            kind: (max(LATENCY_NOISE_US, p99_us(tuple(buckets))), max(1.0, self._sums[kind] / sum(buckets)))
            for kind, buckets in self._pool.items()
            if sum(buckets)
        }
        self._clear()
        if self.state is PaceState.MEASURING:
            self.baseline_us = found
            self._age = 0
            self.state, self.rate_bytes_s = PaceState.PROBING, self._last_good_bytes_s
            self._settling = SETTLING_WINDOWS
            return
        self._probe(found)

    def _measure(self) -> None:
        if self.state is PaceState.PROBING:
            self._last_good_bytes_s = max(RATE_FLOOR_BYTES_S, self.rate_bytes_s)
        self.state, self.rate_bytes_s = PaceState.MEASURING, RATE_FLOOR_BYTES_S
        self._settling = SETTLING_WINDOWS
        self._clear()

    def _probe(self, found: Mapping[str, tuple[float, float]]) -> None:
        known = [
            _worse(now, self.baseline_us[kind]) for kind, now in found.items() if kind in self.baseline_us
        ]
        worst = max(known, default=0.0)
        doubted = self.rate_bytes_s <= RATE_FLOOR_BYTES_S and worst > LATENCY_BACK_OFF
        if not known or self._age >= (BASELINE_DOUBTED_WINDOWS if doubted else BASELINE_FOR_WINDOWS):
            self._measure()  # another kind of work, or too long ago
            if doubted:  # what was too much by it may have been little
                self._since_back_off = FORGET_CEILING_WINDOWS
                self._last_good_bytes_s = RATE_FIRST_BYTES_S
            return
        too_much_before, self._too_much = self._too_much, worst > LATENCY_BACK_OFF
        if worst > LATENCY_ALARM or (self._too_much and too_much_before):
            self._too_much = False
            self.rate_bytes_s = max(RATE_FLOOR_BYTES_S, int(self.rate_bytes_s * BACK_OFF_FACTOR))
            self._since_back_off = 0
            self._settling = SETTLING_WINDOWS
        elif worst <= LATENCY_AIM:
            near = self._since_back_off < FORGET_CEILING_WINDOWS
            factor = PROBE_FACTOR_AFTER_BACK_OFF if near else PROBE_FACTOR
            # No further than twice what is really copied: a rate that is not reached says nothing.
            reached = max(2 * self._throughput_bytes_s, RATE_FIRST_BYTES_S)
            wanted = min(self.rate_bytes_s * factor, reached, RATE_CEILING_BYTES_S)
            self.rate_bytes_s = max(self.rate_bytes_s, int(wanted))
            self._settling = SETTLING_WINDOWS - 1

    def _add(self, load: Load) -> None:
        self._pooled += 1
        for kind, buckets in load.latency_us.items():
            pool = self._pool.setdefault(kind, [0] * len(buckets))
            for index, count in enumerate(buckets):
                pool[index] += count
            self._sums[kind] = self._sums.get(kind, 0) + load.latency_sum_us.get(kind, 0)

    def _count(self) -> int:
        return sum(map(sum, self._pool.values()))

    def _clear(self) -> None:
        self._pool, self._sums, self._pooled = {}, {}, 0

    def _pace(self) -> PullPace:
        if self.state is PaceState.MEASURING:
            return PullPace(RATE_FLOOR_BYTES_S, 1, 0)
        speed = self.rate_bytes_s or self._throughput_bytes_s
        calls = CALLS_UNLIMITED if not self.rate_bytes_s else 1
        if not speed:
            return PullPace(0, BATCH_REGIONS_FIRST, calls)
        batch = int(speed / calls * CALL_AIM_S / REGION_BYTES)
        return PullPace(self.rate_bytes_s, min(BATCH_REGIONS_MAX, max(1, batch)), calls)


def _worse(now: tuple[float, float], baseline: tuple[float, float]) -> float:
    """How many times the baseline, by p99 or by mean. A mean that nobody would notice does not count."""
    mean = now[1] / max(baseline[1], LATENCY_NOISE_US / 4)
    return max(now[0] / baseline[0] / P99_DOUBT, mean)


def p99_us(buckets: tuple[int, ...]) -> float:
    """From counts of operations that took up to 2**i us, evenly spread within a bucket."""
    total = sum(buckets)
    assert total > 0
    wanted, below = 0.99 * total, 0
    for index, count in enumerate(buckets):
        if below + count >= wanted:
            low = 0.0 if index == 0 else 2.0 ** (index - 1)
            return low + (2.0**index - low) * (wanted - below) / count
        below += count
    raise AssertionError("the buckets do not add up")


def is_worth_telling(said_bytes_s: int, now_bytes_s: int) -> bool:
    """Not every small step of a rebuild that takes hours: that it is held back, that it no longer is, and
    each factor of four."""
    if not said_bytes_s or not now_bytes_s:
        return said_bytes_s != now_bytes_s
    return not 1 / 4 < now_bytes_s / said_bytes_s < 4


class LoadMeter:
    """Turns the data plane's counters, which only grow, into windows."""

    KINDS = ("read", "write", "flush")

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, ...]] | None = None
        self._sums_before: dict[str, int] = {}
        self._copied_before = 0

    def window(self, stats: Mapping[str, object], *, window_s: float, copied_bytes: int) -> Load | None:
        """None the first time: there is nothing to compare with."""
        now = {kind: _buckets(stats.get(f"latency_us_{kind}")) for kind in self.KINDS}
        before, self._before = self._before, now
        sums = {kind: _count(stats.get(f"latency_us_{kind}_sum")) for kind in self.KINDS}
        sums_before, self._sums_before = self._sums_before, sums
        copied, self._copied_before = max(0, copied_bytes - self._copied_before), copied_bytes
        if before is None:
            return None
        grown = {
            kind: tuple(max(0, a - b) for a, b in zip(now[kind], before[kind], strict=False)) for kind in now
        }
        spent = {kind: max(0, sums[kind] - sums_before.get(kind, 0)) for kind in sums}
        return Load(window_s, grown, spent, copied)


def _buckets(value: object) -> tuple[int, ...]:
    return tuple(int(count) for count in value) if isinstance(value, list | tuple) else ()


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
