"""Each parser for a moment, from fixed seeds. Hours of it: ``make fuzz``."""

from __future__ import annotations

import pytest

from tests.fuzz.parsers import TARGETS, run_once

SEEDS = 400


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_mutated_input_is_parsed_or_refused_and_nothing_else(name: str) -> None:
    for seed in range(SEEDS):
        run_once(name, seed)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_inputs_that_mutations_begin_with_are_valid(name: str) -> None:
    target = TARGETS[name]
    for value in target.inputs:
        target.parse(value)
