"""The soak itself: a short run of the real program, and that it sees what is wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.load import REGISTER_COUNT, SHADOW_BYTES, SHADOW_OFFSET, Registers, Shadow
from tests.support.linearizability import BLOCK_BYTES, Value, encode_tag
from tests.support.nbd_clients import ReconnectingClient
from tests.support.processes import accepts, running, wait_until

ROOT = Path(__file__).parents[2]
SIZE = "64M"


def test_a_short_soak_ends_with_nothing_wrong_and_says_what_it_did() -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.3", "--period", "4", "--seed", "3"]
    done = subprocess.run(
        [*command, "-o", "json"], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"], report["mismatches"]) == (0, [], 0), done.stderr
    assert report["fault_count"] == sum(fault["count"] for fault in report["faults"].values()) >= 2
    assert report["operations"] > 1000
    assert set(report["rss_growth_bytes_max"]) == {"daemon", "engine", "replica server"}


@pytest.fixture
def uri(tmp_path: Path):
    """A server that anybody may write to behind the soak's back."""
    path = tmp_path / "nbd.sock"
    with running(
        ["nbdkit", "-f", "-U", path, "memory", SIZE], log=tmp_path / "log", ready=lambda: accepts(path)
    ):
        yield f"nbd+unix:///?socket={path}"


def test_a_byte_that_nobody_wrote_is_a_mismatch(uri: str) -> None:
    shadow = Shadow(uri, seed=1)
    shadow.start()
    wait_until(lambda: sum(shadow.operations.values()) > 20, what="some requests")
    with ReconnectingClient(uri) as vandal:
        for at in range(0, SHADOW_BYTES, BLOCK_BYTES):
            vandal.write(SHADOW_OFFSET + at + 7, b"\xa5")
    shadow.stop()
    assert shadow.mismatches


def test_without_a_vandal_there_is_no_mismatch(uri: str) -> None:
    shadow = Shadow(uri, seed=1)
    shadow.start()
    wait_until(lambda: sum(shadow.operations.values()) > 100, what="a hundred requests")
    shadow.stop()
    assert shadow.mismatches == []


def test_an_older_value_in_the_next_window_is_a_violation(uri: str) -> None:
    registers = Registers(uri, random.Random(1))
    for _ in range(2):
        with registers.window() as workload:
            workload.wait_for_answers(500)
    assert registers.violations == []
    with ReconnectingClient(uri) as vandal:
        for block in range(REGISTER_COUNT):
            vandal.write(block * BLOCK_BYTES, encode_tag(block, Value(1, 0)))
    with registers.window() as workload:
        workload.wait_for_answers(500)
    assert registers.violations
