"""The longest gap between two completions, and a client that connects again."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.checksum import share_percent
from bench.failover import longest_gap_s
from bench.nbdclient import Client, ServerFailed, socket_and_export
from bench.processes import ProcessFailed

SIZE_BYTES = 2**20


def test_a_gap_counts_from_the_last_completion_before_the_fault() -> None:
    assert longest_gap_s([0.9, 1.4, 1.5], 1.0, 2.0) == pytest.approx(0.5)


def test_a_gap_that_is_still_open_at_the_end_counts_up_to_there() -> None:
    assert longest_gap_s([0.9, 1.1], 1.0, 3.0) == pytest.approx(1.9)
    assert longest_gap_s([0.9, 1.1, 9.0], 1.0, 3.0) == pytest.approx(1.9)


def test_without_any_completion_the_whole_time_is_the_gap() -> None:
    assert longest_gap_s([], 1.0, 3.0) == pytest.approx(2.0)


@given(st.lists(st.floats(0, 10), max_size=20).map(sorted), st.floats(0.1, 5), st.floats(0.1, 5))
def test_a_gap_is_never_shorter_than_an_even_spread_would_make_it(
    times: list[float], from_s: float, length_s: float
) -> None:
    until_s = from_s + length_s
    inside = sum(from_s <= at_s < until_s for at_s in times)
    gap_s = longest_gap_s(times, from_s, until_s)
    assert gap_s >= length_s / (inside + 1) - 1e-9
    assert gap_s <= until_s


def test_an_address_names_socket_and_export() -> None:
    assert socket_and_export("nbd+unix:///my%20disk?socket=/run/x.sock") == (Path("/run/x.sock"), "my disk")
    with pytest.raises(ServerFailed):
        socket_and_export("nbd://host/x")


def serve(path: Path, disk: Path) -> subprocess.Popen[bytes]:
    path.unlink(missing_ok=True)
    return subprocess.Popen(["nbdkit", "-f", "-U", str(path), "file", str(disk)])


def test_a_write_is_sent_again_when_the_server_was_killed_and_is_back(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", tmp_path / "s"
    disk.write_bytes(bytes(SIZE_BYTES))
    server = serve(path, disk)
    client = Client(path, "")
    try:
        client.connect(time.monotonic() + 10)
        client.write(0, b"a" * 4096)
        server.kill()
        server.wait()
        server = serve(path, disk)
        client.write(4096, b"b" * 4096)
        assert client.reconnects == 1
    finally:
        client.close()
        server.kill()
        server.wait()
    assert disk.read_bytes()[:8192] == b"a" * 4096 + b"b" * 4096


def test_a_write_that_the_server_refuses_is_an_error_and_is_not_tried_again(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", tmp_path / "s"
    disk.write_bytes(bytes(SIZE_BYTES))
    server = serve(path, disk)
    client = Client(path, "")
    try:
        client.connect(time.monotonic() + 10)
        with pytest.raises(ServerFailed, match="answered with error"):
            client.write(SIZE_BYTES, b"a" * 4096)
    finally:
        client.close()
        server.kill()
        server.wait()


def test_a_server_that_is_not_there_fails_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="no connection"):
        Client(tmp_path / "nobody", "").connect(time.monotonic())


PERF = """
    50.10%  [k] _raw_spin_unlock_irqrestore
     4.00%  [.] twox_hash::xxh3_64::oneshot
     1.50%  [.] XXH3_64bits
     0.02%  [.] engine_main
"""


def test_the_share_of_checksums_is_the_sum_of_their_symbols() -> None:
    assert share_percent(PERF) == pytest.approx(5.5)


def test_a_build_without_symbols_is_a_failure_and_not_a_cost_of_zero() -> None:
    with pytest.raises(ProcessFailed, match="no xxh3 symbol"):
        share_percent("    50.10%  [k] _raw_spin_unlock_irqrestore\n")
