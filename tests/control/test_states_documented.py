"""docs/states.md lists the words the code has, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.cluster import NODES_MAX as NODES_MAX_OF_COMMAND
from cli.main import EXIT_INTERRUPTED
from cli.output import Exit
from control.model import NODES_MAX, Condition, Who
from control.reconcile import NodeState
from control.views import FindingView, JobState, ReplicaState, Verdict, VolumeState
from control.why import REASONS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "states.md"


def documented(section: str) -> list[str]:
    """The first column of the section's tables."""
    (text,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| `(\w+)` \| (?!meaning)", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("Volume", [state.value for state in VolumeState]),
        ("Replica", [state.value for state in ReplicaState]),
        ("Node", [state.value for state in NodeState]),
        ("Conditions", [*Condition.model_fields, *(who.value for who in Who)]),
        (
            "Findings",
            [*FindingView.model_fields, *REASONS, "daemon_down", "daemon_frozen", "daemon_silent"],
        ),
        ("Verification", [verdict.value for verdict in Verdict]),
        ("Job", [state.value for state in JobState]),
        ("Exit codes of `dolmen`", [str(int(code)) for code in Exit]),
    ],
)
def test_every_word_is_documented_and_no_other(section: str, words: list[str]) -> None:
    assert sorted(documented(section)) == sorted(words)


def test_numbers_that_are_written_twice_agree() -> None:
    assert EXIT_INTERRUPTED == Exit.INTERRUPTED and NODES_MAX_OF_COMMAND == NODES_MAX
