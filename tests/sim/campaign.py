"""Many runs: in one process or several, and what came of them.

Owns counting and the summary. The order of seeds is that of their numbers, whatever process ran them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice

from tests.sim.cluster import Result, run_seed

CHUNK = 50
"""Seeds between two looks at the clock."""


class Summary:
    def __init__(self) -> None:
        self.seeds = 0
        self.failures: list[Result] = []
        self.totals: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.virtual_s = 0.0

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.virtual_s += result.virtual_s
        self.faults.update(result.faults)
        self.totals.update(
            operations=result.operations,
            errors=result.errors,
            unanswered=result.unanswered,
            epochs=result.epochs,
            losses=result.losses,
            events=result.events,
        )
        if result.failure:
            self.failures.append(result)
            print(f"seed {result.seed} failed: make sim SEED={result.seed}\n{result.failure}\n", flush=True)

    def text(self, took_s: float) -> str:
        totals = self.totals
        faults = ", ".join(f"{kind} {number}" for kind, number in sorted(self.faults.items()))
        return (
            f"{self.seeds} seeds, {len(self.failures)} failed {[r.seed for r in self.failures[:20]]}; "
            f"{totals['operations']} operations on halves of blocks, {totals['errors']} errors, "
            f"{totals['unanswered']} unanswered, {totals['epochs']} epochs, {totals['losses']} losses, "
            f"{totals['events']} events, {self.virtual_s:.0f} s of virtual time in {took_s:.1f} s\n"
            f"{sum(self.faults.values())} faults: {faults}"
        )


def run_many(summary: Summary, seeds: Iterable[int], processes: int = 1) -> None:
    for result in _results(seeds, processes):
        summary.add(result)


def run_minutes(summary: Summary, first_seed: int, minutes: float, processes: int) -> None:
    ends = time.monotonic() + 60 * minutes
    numbers = count(first_seed)
    while time.monotonic() < ends:
        run_many(summary, list(islice(numbers, CHUNK * processes)), processes)


def _results(seeds: Iterable[int], processes: int) -> Iterator[Result]:
    if processes <= 1:
        yield from map(run_seed, seeds)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(run_seed, seeds, chunksize=4)
