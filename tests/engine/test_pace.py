"""How fast a resync copies, under simulated clients. Virtual time: a step is a window of PACE_INTERVAL_S."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.pace import (
    PACE_INTERVAL_S,
    RATE_FLOOR_BYTES_S,
    Load,
    LoadMeter,
    Pace,
    PaceState,
    is_worth_telling,
    p99_us,
)

MIB = 1024 * 1024
DISK_BYTES_S = 400 * MIB


def buckets(latency_us: float, count: int) -> tuple[int, ...]:
    """``count`` operations around ``latency_us``, 2 % of them as slow as the p99 is to be."""
    counts = [0] * 24
    slow = max(1, count // 50)
    counts[max(1, round(latency_us / 4).bit_length())] += count - slow
    for k in range(slow):  # spread in the bucket, as real ones are
        counts[min(23, max(1, int(latency_us * (0.9 + 0.2 * k / slow)).bit_length()))] += 1
    return tuple(counts)


class Client:
    """A closed-loop client whose latency grows as the copying takes more of the disk."""

    def __init__(self, latency: Callable[[float], float], per_window: int = 400) -> None:
        self.latency, self.per_window = latency, per_window
        self.pace = Pace()
        self.rate = 0
        self.copying = True
        self.copied = 0.0
        self.seen: list[tuple[PaceState, float, float]] = []

    def run(self, seconds: float, *, idle: bool = False) -> None:
        for _ in range(int(seconds / PACE_INTERVAL_S)):
            real = min(self.rate or DISK_BYTES_S, DISK_BYTES_S) if self.copying else 0.0
            latency_us = self.latency(real)
            self.copied += real * PACE_INTERVAL_S
            count = 0 if idle else self.per_window
            load = Load(
                PACE_INTERVAL_S,
                {"write": buckets(latency_us, count) if count else (0,) * 24},
                {"write": int(latency_us * count * 0.3)},
                int(real * PACE_INTERVAL_S),
            )
            told = self.pace.step(load)
            self.rate = told.rate_bytes_s
            assert idle or self.pace.state is not PaceState.IDLE
            self.copying = told.calls_max > 0
            assert told.batch_regions >= 1
            assert self.copying or self.pace.state is PaceState.MEASURING
            self.seen.append((self.pace.state, real, latency_us))


def knee(capacity: float, base_us: float = 1000.0) -> Callable[[float], float]:
    """Flat until the disk has no more to give, then steep."""
    return lambda rate: base_us * (1.0 + (rate / capacity) ** 3)


def linear(capacity: float, base_us: float = 1000.0) -> Callable[[float], float]:
    return lambda rate: base_us * (1.0 + rate / capacity)


def test_without_a_client_nothing_is_held_back() -> None:
    client = Client(linear(50 * MIB))
    client.run(5, idle=True)
    assert client.rate == 0
    assert client.copied == pytest.approx(5 * DISK_BYTES_S)


@pytest.mark.parametrize("capacity", [20 * MIB, 60 * MIB, 200 * MIB])
@pytest.mark.parametrize("curve", [knee, linear])
def test_a_clients_p99_stays_below_twice_what_it_was_and_the_copying_goes_on(
    curve: Callable[[float], Callable[[float], float]], capacity: float
) -> None:
    client = Client(curve(capacity))
    client.run(60)
    settled = client.seen[len(client.seen) // 4 :]
    over = sum(latency > 2.05 * 1000 for _, _, latency in settled)
    assert over / len(settled) < 0.02, f"{over} of {len(settled)} windows"
    rates = [rate for _, rate, _ in settled if rate]
    assert min(rates) >= RATE_FLOOR_BYTES_S, "it must finish"
    # What a linear curve allows at 2 is its capacity; a good part of it is used.
    assert sum(rates) / len(settled) > 0.35 * capacity


def test_a_client_that_begins_is_noticed_within_two_windows() -> None:
    client = Client(linear(50 * MIB))
    client.run(5, idle=True)
    client.run(2 * PACE_INTERVAL_S)
    assert client.pace.state is PaceState.MEASURING and not client.copying


def test_a_client_that_goes_away_gives_everything_back() -> None:
    client = Client(linear(50 * MIB))
    client.run(20)
    assert client.rate
    client.run(2, idle=True)
    assert client.rate == 0


def test_work_that_becomes_slower_by_itself_does_not_starve_the_resync() -> None:
    slower = [1.0]
    client = Client(lambda rate: slower[0] * linear(60 * MIB)(rate))
    client.run(20)
    slower[0] = 5.0  # larger requests, say: five times as slow without any resync
    client.run(40)  # the baseline is measured anew
    before = client.copied
    client.run(30)
    assert (client.copied - before) / 30 > 10 * MIB


def test_a_baseline_of_a_lucky_moment_is_doubted_when_the_client_suffers_at_the_floor_too() -> None:
    luck = [1.0]
    client = Client(lambda rate: luck[0] * linear(200 * MIB)(rate))
    client.run(3)
    luck[0] = 4.0  # the machine is busy with something else
    client.run(20)
    before = client.copied
    client.run(20)
    assert (client.copied - before) / 20 > 30 * MIB


def test_the_copying_never_stops_for_long_whatever_the_client_suffers() -> None:
    client = Client(lambda rate: 100.0 if rate <= RATE_FLOOR_BYTES_S / 2 else 1e6)
    client.run(120)
    assert client.copied >= 0.75 * 120 * RATE_FLOOR_BYTES_S
    stopped = longest = 0
    for _, rate, _ in client.seen:
        stopped = stopped + 1 if rate == 0 else 0
        longest = max(longest, stopped)
    assert longest * PACE_INTERVAL_S <= 2.75


def test_few_operations_are_enough_to_decide_in_time() -> None:
    client = Client(linear(60 * MIB), per_window=3)
    client.run(120)
    settled = client.seen[len(client.seen) // 2 :]
    assert sum(rate for _, rate, _ in settled) / len(settled) > RATE_FLOOR_BYTES_S


def test_a_rate_low_enough_makes_calls_short_enough() -> None:
    client = Client(lambda rate: 100.0 if rate <= RATE_FLOOR_BYTES_S else 1e6)
    client.run(30)
    assert client.pace.state is PaceState.PROBING
    told = client.pace.step(Load(PACE_INTERVAL_S, {"write": buckets(1e6, 400)}, {"write": 10**8}))
    assert told.batch_regions * 4 * MIB / told.rate_of_one_bytes_s <= 1.0


def test_p99_is_found_within_a_bucket() -> None:
    assert p99_us((0, 0, 0, 0, 100)) == pytest.approx(8 + 8 * 0.99)
    assert p99_us((0, 99, 0, 0, 1)) == pytest.approx(2.0)
    assert p99_us((0, 98, 0, 0, 2)) == pytest.approx(12.0)


def test_the_meter_tells_what_was_added() -> None:
    meter = LoadMeter()
    assert meter.window({"latency_us_read": [1, 2]}, window_s=1, copied_bytes=5) is None
    load = meter.window({"latency_us_read": [1, 7], "reads": 9}, window_s=1, copied_bytes=25)
    assert load is not None and load.operations == 5 and load.copied_bytes == 20


def test_the_log_tells_the_large_steps_only() -> None:
    assert is_worth_telling(0, 5) and is_worth_telling(5, 0) and not is_worth_telling(0, 0)
    assert not is_worth_telling(100, 150) and is_worth_telling(100, 400) and is_worth_telling(400, 100)
