"""``dolmen recover --from-disks`` on real processes: the state store is lost, disks say what there was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster, cluster
from tests.support.nbd_clients import ReconnectingClient
from tests.support.processes import kill, wait_until

MIB = 2**20
ONE, TWO, LATER = (bytes([byte]) * 65536 for byte in (0x11, 0x22, 0x33))


@pytest.fixture
def lost() -> Iterator[Cluster]:
    """Two volumes with data; node3 missed the last writes of ``data``; everything was killed."""
    with cluster() as dolmen:
        for name, content in (("data", ONE), ("logs", TWO)):
            uri = dolmen.create_and_attach(name, size="64MiB")
            with ReconnectingClient(uri) as client:
                client.write(4 * MIB, content)
                client.flush()
        with ReconnectingClient(dolmen.show("data")["nbd_uri"]) as client:
            dolmen.dolmen("node", "stop", "node3", "--kill")
            client.write(8 * MIB, LATER)
        dolmen.detach("logs")
        yield dolmen


def kill_everything(dolmen: Cluster) -> None:
    for pid in dolmen.pids():
        kill(pid)
    wait_until(lambda: not dolmen.pids(), what="the end of everything")


def lose_state(dolmen: Cluster, *more: str) -> None:
    for name in ("state.db", "state.db-wal", "state.db-shm", *more):
        (dolmen.dir / name).unlink(missing_ok=True)


def read(uri: str, offset: int) -> bytes:
    with ReconnectingClient(uri) as client:
        return bytes(client.read(offset, 65536))


@pytest.mark.parametrize("also", [(), ("state.stamp", "api.token", "cluster.key", "daemon.json")])
def test_a_cluster_is_what_it_was_though_only_its_disks_are_left(
    lost: Cluster, also: tuple[str, ...]
) -> None:
    epochs = {name: lost.show(name)["epoch"] for name in ("data", "logs")}
    kill_everything(lost)
    lose_state(lost, *also)
    if not also:
        refused = lost.dolmen("up", "--detach", check=False)
        assert refused.returncode == 1 and "--from-disks" in refused.stdout
    before = sorted(path.name for path in lost.dir.iterdir())
    planned = lost.json("recover", "--from-disks", "--dry-run")
    assert sorted(path.name for path in lost.dir.iterdir() if path.name != "daemon.lock") == [
        name for name in before if name != "daemon.lock"
    ]
    assert [v["name"] for v in planned["volumes"]] == ["data", "logs"] and not planned["left_out"]
    assert planned["volumes"][0]["record"]["in_sync"] == ["data-r1", "data-r2"]
    assert {v["name"]: v["epoch"] for v in planned["volumes"]} == epochs

    assert lost.json("recover", "--from-disks")["written"]
    again = lost.dolmen("recover", "--from-disks", check=False)
    assert again.returncode == 1 and "can be used" in again.stdout
    lost.up()
    why = lost.dolmen("why", "data", check=False)
    assert why.returncode == 6 and "rebuilt from the disks" in why.stdout
    for name, content in (("data", ONE), ("logs", TWO)):
        uri = lost.attach(name)
        assert read(uri, 4 * MIB) == content
        assert lost.show(name)["epoch"] > epochs[name]
    assert read(lost.show("data")["nbd_uri"], 8 * MIB) == LATER
    for name in ("data", "logs"):
        lost.wait_for_state(name, "healthy")
        assert lost.verify(name)["result"]["verdict"] == "same"
    assert lost.dolmen("why").stdout == "everything: healthy\n"


def test_what_runs_without_its_daemon_runs_on_and_stays_attached(lost: Cluster) -> None:
    uri = lost.show("data")["nbd_uri"]
    engine = lost.engine_pid("data")
    with ReconnectingClient(uri) as client:
        lost.kill_daemon()
        lose_state(lost)
        report = lost.json("recover", "--from-disks")
        assert any("serves it" in note for note in report["volumes"][0]["notes"])
        lost.up()
        assert lost.engine_pid("data") == engine
        client.write(12 * MIB, TWO)
        assert bytes(client.read(8 * MIB, 65536)) == LATER
        assert client.reconnect_count == 0
    lost.dolmen("node", "start", "node3", check=False)
    lost.wait_for_state("data", "healthy")
    lost.detach("data")
    assert read(lost.attach("data"), 12 * MIB) == TWO


def test_a_member_that_is_lost_too_is_waited_for_until_an_operator_decides(lost: Cluster) -> None:
    kill_everything(lost)
    lose_state(lost)
    disk = lost.dir / "nodes" / "node2" / "disk0"
    disk.rename(lost.dir / "nodes" / "node2" / "broken")
    done = lost.dolmen("recover", "--from-disks", check=False)
    assert done.returncode == 5 and "disk.json" in done.stdout
    assert "replica data-r2 was not found; it is waited for on node2" in done.stdout
    lost.up()
    unfinished = lost.dolmen("volume", "attach", "data", check=False, timeout_s=90)
    assert unfinished.returncode in (0, 5)
    found = lost.wait_for_state("data", "waiting")
    assert any(w.get("replica") == "data-r2" for w in found["engine"]["waiting_for"])
    shown = lost.json("volume", "recover", "data")
    assert shown["missing"] == ["data-r2"]
    disk.with_name("broken").rename(disk)  # the disk is found again
    lost.dolmen("node", "start", "node2")
    lost.wait_for_state("data", "healthy")
    assert read(lost.show("data")["nbd_uri"], 8 * MIB) == LATER


def test_a_damaged_state_store_is_moved_aside_and_a_good_one_is_not_touched(lost: Cluster) -> None:
    lost.dolmen("down")
    state = lost.dir / "state.db"
    good = state.read_bytes()
    refused = lost.dolmen("recover", "--from-disks", check=False)
    assert refused.returncode == 1 and "can be used" in refused.stdout
    assert state.read_bytes() == good
    state.write_bytes(good[:4096] + b"\xff" * 4096 + good[8192:])
    (aside,) = lost.json("recover", "--from-disks")["moved_aside"]
    assert aside.startswith(f"{state}.aside-")
    with sqlite3.connect(state) as connection:
        kinds = dict(connection.execute("SELECT kind, count(*) FROM documents GROUP BY kind"))
    assert kinds == {"node": 3, "disk": 3, "volume": 2}
    lost.up()
    assert read(lost.attach("logs"), 4 * MIB) == TWO
    assert json.loads((lost.dir / "daemon.json").read_text())["pid"]
