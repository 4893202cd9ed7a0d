"""docs/testing.md: every promise and every row of the fault table names a test or says "not yet"."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "testing.md").read_text()
CONTRACT = (ROOT / "docs" / "contract.md").read_text()

TEST = re.compile(r"`(?:tests|dataplane/core/tests)/[\w/]+\.(?:py|rs)::\w+`")

COMPONENTS = {"engine", "replica", "network", "control", "VM", "backup", "csi", "resources", "hostile"}


def rows(heading: str) -> list[list[str]]:
    """Of the table under this heading."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


PROMISES, FAULTS = rows("Promises"), rows("Faults")


def test_every_promise_of_the_contract_has_one_row() -> None:
    promised = re.findall(r"^\*\*(C\d+)\.", CONTRACT, re.MULTILINE)
    assert [row[0] for row in PROMISES] == sorted(promised, key=lambda name: int(name[1:]))


def test_every_component_has_its_faults() -> None:
    assert {row[0] for row in FAULTS} == COMPONENTS


@pytest.mark.parametrize("row", [*PROMISES, *FAULTS], ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_names_a_test_or_says_not_yet(row: list[str]) -> None:
    assert len(row) == 3
    assert TEST.search(row[2]) or row[2].startswith("not yet")


def test_no_fault_is_listed_twice() -> None:
    listed = [(component, fault) for component, fault, _ in FAULTS]
    assert len(listed) == len(set(listed))
