"""Names and sizes that cannot be, at the command: one clear line, an exit code, and nothing is made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.incident import Incident
from tests.support.cluster import Cluster

CREATE = ("volume", "create")
REFUSED, USAGE = 1, 2

BAD = [
    ((*CREATE, "Upper", "--size", "64MiB"), REFUSED, "name"),
    ((*CREATE, "../escape", "--size", "64MiB"), REFUSED, "name"),
    ((*CREATE, "a" * 64, "--size", "64MiB"), REFUSED, "name"),
    ((*CREATE, "tiny", "--size", "1"), REFUSED, "4 MiB"),
    ((*CREATE, "odd", "--size", "8388609"), REFUSED, "8392704"),
    ((*CREATE, "word", "--size", "many"), REFUSED, "is not a size"),
    ((*CREATE, "none", "--size", "64MiB", "--replicas", "0"), USAGE, "replica"),
    ((*CREATE, "more", "--size", "64MiB", "--replicas", "4"), REFUSED, "nodes"),
    (("volume", "resize", "{volume}", "32MiB"), REFUSED, "shrink"),
    (("volume", "rm", "{volume}"), REFUSED, "attached"),
    ((*CREATE, "{volume}", "--size", "128MiB"), REFUSED, "exists"),
]


def test_what_cannot_be_is_refused_with_a_reason_and_nothing_is_made(incident: Incident) -> None:
    dolmen = incident.dolmen
    before = _everything(dolmen)

    def attempt(case: tuple[tuple[str, ...], int, str]) -> str:
        words, code, expected = case
        done = dolmen.dolmen(*(word.format(volume=incident.name) for word in words), check=False)
        if done.returncode != code or expected.lower() not in done.stdout.lower():
            return f"{words} exited {done.returncode}: {done.stdout}"
        if "Traceback" in done.stdout:
            return done.stdout
        return ""

    with ThreadPoolExecutor(4) as pool:
        wrong = [text for text in pool.map(attempt, BAD) if text]
    assert not wrong, "\n".join(wrong)
    assert _everything(dolmen) == before


def _everything(dolmen: Cluster) -> list[str]:
    """Volumes, and what lies where their files would be."""
    listed = [volume["name"] for volume in dolmen.json("volume", "ls")]
    kept = ("nodes/*/disk0/replicas/*", "volumes/*")
    return listed + sorted(str(path) for pattern in kept for path in dolmen.dir.glob(pattern))


@pytest.mark.parametrize("words", [("nonsense",), ("volume", "create")])
def test_a_command_line_that_is_not_understood_says_how_it_should_look(
    shared_cluster: Cluster, words: tuple[str, ...]
) -> None:
    done = shared_cluster.dolmen(*words, check=False)
    assert done.returncode == USAGE
    assert "Usage" in done.stdout
