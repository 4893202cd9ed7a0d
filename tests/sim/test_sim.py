"""Whole clusters on virtual time: seeds that found something once, and a few hundred that have not yet.

A failure prints the command that replays it. ``make sim-long`` runs new seeds for as long as one likes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.cluster import run_seed

ROOT = Path(__file__).parents[2]

REGRESSIONS = {
    3: "a flush that failed at all members, and who was equal then",
    95: "a read showed a write that not all members had, and the engine died",
    160: "a block that rotted on the only replica in sync",
    1279: "an engine that waited while an older one opened the volume",
    1349: "a flush beside a slow sync",
    1373: "a replica whose sync failed was named alone by a record",
    1508: "an engine inspected, another claimed and recorded, then the first claimed",
    1520: "a detaching engine claimed what it had cleaned",
    2271: "a replica that must not be claimed counted as one that may still come",
    2291: "an old directory in the moment when the other replica was lost",
    2325: "the same, and a replica that was looked at before the newest record was made",
    2411: "power lost between the record that names a replica and the end of its doubts",
    2419: "a reopened replica keeps what it had not synced",
    3250: "a pull that is cancelled while it waits",
    5162: "a reconcile that pulled from a source that had lost power and was back",
    179537333973: "a store that failed while its engine was stopped",
    179537339523: "a source whose sync failed during a reconcile",
    179537340094: "a detach that made a replica clean whose store had failed",
}
"""Always run. What each was about when it failed; the story of a seed changes with the code."""

THEMED = {
    ("deaths", 9356): "a repair with a copy that is older than a write sent since",
    ("alone", 710315): "an older state store, and a replica that no engine had ever reached",
    ("takeover", 179537332223): "an engine died while it sent again what was under an acknowledged write",
    ("mixed", 720141): "an operator decides while an engine before the last still runs",
}
"""The same, of runs with a theme."""

SEEDS = range(1, 201)
CHUNKS = 20


def run(seed: int, theme: str = "") -> None:
    result = run_seed(seed, theme)
    assert not result.failure, f"replay with: make sim SEED={seed}\n{result.failure}"
    assert result.operations, f"seed {seed} did nothing"


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_a_seed_that_found_a_bug_once(seed: int) -> None:
    run(seed, "mixed")


@pytest.mark.parametrize(("theme", "seed"), THEMED)
def test_a_seed_of_a_theme_that_found_a_bug_once(theme: str, seed: int) -> None:
    run(seed, theme)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_clusters_keep_the_contract_under_faults_and_become_healthy_after_them(chunk: int) -> None:
    for seed in SEEDS[chunk::CHUNKS]:
        run(seed)


def trace_of(seed: int, hash_seed: str) -> tuple[int, str]:
    """How many lines, and their digest, of a run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--trace"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        check=True,
    )
    lines = done.stdout.splitlines()[:-2]  # the summary says how long it took
    return len(lines), hashlib.sha256(b"\n".join(lines)).hexdigest()


@pytest.mark.parametrize("seed", [7, 1279])
def test_one_seed_is_one_run_to_the_byte_whatever_the_order_of_sets(seed: int) -> None:
    first, second = trace_of(seed, "1"), trace_of(seed, "2")
    assert first == second
    assert first[0] > 100
