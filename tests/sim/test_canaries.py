"""The simulator is tested by bugs: a few that are found quickly, each time; all of them by ``make
sim-canaries``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.sim.canaries import BY_NAME, CANARIES, SEEDS_MAX, hunt
from tests.sim.cluster import run_seed

TABLE = Path(__file__).parents[2] / "docs" / "testing-canaries.md"

QUICK = ("suspect_ignored", "resend_nothing", "changes_forgotten", "cleaned_early", "barrier_at_once")
"""Caught within a few seeds: seconds."""


def rows() -> dict[str, str]:
    """Canary -> seeds needed, from the document."""
    found = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("name", QUICK)
def test_a_switched_on_bug_is_caught(name: str) -> None:
    caught = hunt(name, seeds_max=60)
    assert caught.seed, f"{name}: {BY_NAME[name].bug}"


def test_a_bug_is_off_again_after_its_run() -> None:
    before = run_seed(4)
    with BY_NAME["resend_nothing"].alive():
        run_seed(4)
    assert run_seed(4) == before
    assert not before.failure


def test_the_table_names_every_canary_and_each_was_caught() -> None:
    assert list(rows()) == [canary.name for canary in CANARIES]
    assert len(CANARIES) >= 20
    for name, seeds in rows().items():
        assert seeds.isdigit() and 1 <= int(seeds) <= SEEDS_MAX, f"{name} was not caught"
