"""Replicas that fall behind, are filled anew, and are replaced on another node, with real processes.

Bytes copied are those the engine counts (``engine.stats``: resync_bytes), block for block.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from control.client import Client
from control.layout import Layout
from engine.client import EngineClient
from protocol.errors import StorageError
from tests.support.cluster import Cluster, cluster
from tests.support.processes import is_alive, kill, wait_until
from tests.system.raw_nbd import RawNbd

MIB = 1024 * 1024
BLOCK = 4096
READ, WRITE, FLUSH = 0, 1, 3  # NBD commands
EIO = 5
FILL_BYTES = 96 * MIB
SIZE = "128MiB"


@pytest.fixture(scope="module")
def four_nodes() -> Iterator[Cluster]:
    with cluster(nodes=4) as running:
        yield running


class Volume:
    """An attached volume of three replicas with ``FILL_BYTES`` of data that does not compress."""

    def __init__(self, dolmen: Cluster, name: str, *, fill_bytes: int = FILL_BYTES) -> None:
        self.dolmen, self.name = dolmen, name
        dolmen.create(name, size=SIZE)
        dolmen.attach(name)
        dolmen.wait_for_state(name, "healthy")
        self.layout = Layout(dolmen.dir)
        self.client = Client(dolmen.dir)
        self.content = Random(name).randbytes(MIB)
        with self.nbd() as nbd:
            for at in range(0, fill_bytes, MIB):
                assert nbd.request(WRITE, at, MIB, data=self.content).error == 0
            assert nbd.request(FLUSH, 0, 0).error == 0

    def nbd(self) -> RawNbd:
        return RawNbd(self.layout.nbd_socket(self.name))

    def engine(self, call: str) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            async with await EngineClient.connect(str(self.layout.engine_socket(self.name))) as engine:
                answer: dict[str, Any] = await engine.rpc.call(call)
                return answer

        return asyncio.run(ask())

    def resync_bytes(self) -> int:
        return int(self.engine("engine.stats")["resync_bytes"])

    def replica(self, replica: str) -> dict[str, Any]:
        return next(r for r in self.client.volume(self.name)["replicas"] if r["id"] == replica)

    def in_sync(self) -> list[str]:
        found: list[str] = self.client.volume(self.name)["membership"]["in_sync"]
        return found

    def lose_disk(self, replica: str) -> str:
        """The server is killed and its directory is gone: the node stays down. Returns the node."""
        node = str(self.replica(replica)["node"])
        self.client.stop_node(node, kill=True)
        shutil.rmtree(self.layout.disk_dir(node))
        return node

    def heal_and_check(self) -> None:
        self.dolmen.wait_for_state(self.name, "healthy")
        assert self.dolmen.verify(self.name)["result"]["verdict"] == "same"

    def remove(self) -> None:
        self.dolmen.remove(self.name)


@contextlib.contextmanager
def volume(dolmen: Cluster, name: str, **options: int) -> Iterator[Volume]:
    made = Volume(dolmen, name, **options)
    try:
        yield made
    except BaseException:
        print(dolmen.logs())
        raise
    finally:
        for node in made.client.nodes():
            with contextlib.suppress(StorageError):
                made.client.start_node(node["name"])
    made.remove()


def test_a_replica_that_missed_random_writes_gets_those_blocks_and_little_more(four_nodes: Cluster) -> None:
    with volume(four_nodes, "missed") as v:
        node = v.replica("missed-r2")["node"]
        v.client.stop_node(node, kill=True)
        wait_until(lambda: "missed-r2" not in v.in_sync(), what="the record without it")
        random = Random(1)
        missed = {random.randrange(FILL_BYTES // BLOCK) for _ in range(1000)}
        with v.nbd() as nbd:
            for block in sorted(missed):
                assert nbd.request(WRITE, block * BLOCK, BLOCK, data=random.randbytes(BLOCK)).error == 0
        before = v.resync_bytes()
        v.client.start_node(node)
        v.heal_and_check()
        copied = v.resync_bytes() - before
        assert len(missed) * BLOCK <= copied <= 1.2 * len(missed) * BLOCK, (
            f"{copied / len(missed) / BLOCK:.2f}"
        )


def start_rebuild(v: Volume, replica: str) -> str:
    """Make ``replica`` anew, empty, and have it filled. Returns its node."""
    node = str(v.replica(replica)["node"])
    v.client.stop_node(node, kill=True)
    wait_until(lambda: replica not in v.in_sync(), what="the record without it")
    shutil.rmtree(Path(v.replica(replica)["path"]))
    v.client.start_node(node)
    wait_until(lambda: v.replica(replica)["state"] != "offline", what="its server")
    v.client.rebuild_replica(v.name, replica, wait_s=0.0)
    return node


def wait_half_way(v: Volume) -> int:
    """Bytes copied when a good part of the rebuild is done."""
    seen = 0

    def half_way() -> bool:
        nonlocal seen
        with contextlib.suppress(StorageError):
            seen = v.resync_bytes()
        return seen > 0.35 * FILL_BYTES

    wait_until(half_way, what="a half-done rebuild")
    return seen


@pytest.mark.parametrize("victim", ["source", "target", "engine"])
def test_a_rebuild_goes_on_where_it_was_when_somebody_dies(four_nodes: Cluster, victim: str) -> None:
    with volume(four_nodes, f"dies-{victim}") as v, load(v):
        replica = f"{v.name}-r2"
        start_rebuild(v, replica)
        copied = wait_half_way(v)
        in_sync_before = v.in_sync()
        if victim == "engine":
            v.dolmen.kill_engine(v.name)
        else:
            v.dolmen.kill_replica(v.name, replica if victim == "target" else f"{v.name}-r1")
        was_under_way = replica not in in_sync_before
        wait_until(lambda: replica in v.in_sync(), what="the rebuilt replica", timeout_s=60.0)
        total = v.resync_bytes() + (copied if victim == "engine" else 0)
        assert was_under_way, "it was killed too late to prove anything"
        assert total <= 1.25 * FILL_BYTES, f"{total / FILL_BYTES:.2f} times what there is was copied"
    # ``load`` has ended: nothing is written while the replicas are compared.


@contextlib.contextmanager
def load(v: Volume) -> Iterator[None]:
    """A client that reads all the time: it makes the rebuild slow enough to be met half-way."""
    ending = threading.Event()

    def work() -> None:
        random = Random(2)
        while not ending.is_set():
            try:
                with v.nbd() as nbd:
                    while not ending.is_set():
                        nbd.request(READ, random.randrange(FILL_BYTES // BLOCK) * BLOCK, BLOCK)
            except (OSError, AssertionError, EOFError):
                continue  # the engine was killed: connect again

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def test_a_replica_whose_disk_is_gone_is_replaced_on_another_node() -> None:
    with cluster(nodes=4) as dolmen:
        v = Volume(dolmen, "moved", fill_bytes=32 * MIB)
        spare = {n["name"] for n in v.client.nodes()} - {
            r["node"] for r in v.client.volume("moved")["replicas"]
        }
        v.lose_disk("moved-r2")
        wait_until(lambda: "moved-r2" not in v.in_sync(), what="the record without it")
        said = v.dolmen.dolmen("replica", "replace", "moved", "moved-r2", "--dry-run").stdout
        assert "moved-r4" in said and spare.copy().pop() in said
        assert "moved-r2" in {r["id"] for r in v.client.volume("moved")["replicas"]}
        done = v.dolmen.dolmen("replica", "replace", "moved", "moved-r2").stdout
        assert "moved-r4" in done and "in sync" in done
        v.heal_and_check()
        places = {r["id"]: r["node"] for r in v.client.volume("moved")["replicas"]}
        assert places["moved-r4"] in spare and "moved-r2" not in places
        with v.nbd() as nbd:
            assert nbd.request(READ, 5 * MIB, MIB).data == v.content
        # The next engine knows it so.
        pid = v.dolmen.kill_engine("moved")
        v.dolmen.wait_for_engine("moved", other_than=pid)
        v.heal_and_check()


def test_a_replica_that_comes_back_after_it_was_replaced_is_deleted(four_nodes: Cluster) -> None:
    with volume(four_nodes, "late", fill_bytes=8 * MIB) as v:
        old = v.replica("late-r3")
        v.client.stop_node(old["node"], kill=True)
        wait_until(lambda: "late-r3" not in v.in_sync(), what="the record without it")
        v.dolmen.dolmen("replica", "replace", "late", "late-r3")
        assert Path(old["path"]).exists()
        v.client.start_node(old["node"])
        wait_until(lambda: not Path(old["path"]).exists(), what="the end of what was replaced")
        v.heal_and_check()


def spoil(v: Volume, replica: str, block: int) -> None:
    """A block of a replica's file is not what was written."""
    (data,) = Path(v.replica(replica)["path"]).glob("*/data")
    with data.open("r+b") as file:
        file.seek(block * BLOCK + 100)
        file.write(b"spoilt by a disk")


def test_blocks_that_only_one_source_has_are_found_and_those_that_none_has_end_the_rebuild(
    four_nodes: Cluster,
) -> None:
    with volume(four_nodes, "spoilt", fill_bytes=8 * MIB) as v:
        with v.nbd() as nbd:
            assert nbd.request(FLUSH).error == 0
        spoil(v, "spoilt-r1", 100)  # spoilt-r3 has it
        spoil(v, "spoilt-r3", 200)  # spoilt-r1 has it
        for replica in ("spoilt-r1", "spoilt-r3"):
            spoil(v, replica, 1500)  # nobody has it
        start_rebuild(v, "spoilt-r2")
        wait_until(lambda: "spoilt-r2" in v.in_sync(), what="the end of the rebuild", timeout_s=60.0)
        with v.nbd() as nbd:
            for block in (100, 200):
                assert nbd.request(READ, block * BLOCK, BLOCK).data == v.content[block * BLOCK :][:BLOCK]
            assert nbd.request(READ, 1500 * BLOCK, BLOCK).error == EIO, "never wrong bytes"
            assert nbd.request(WRITE, 1500 * BLOCK, BLOCK, data=b"n" * BLOCK).error == 0
            assert nbd.request(READ, 1500 * BLOCK, BLOCK).data == b"n" * BLOCK
        # What a read did not meet is still spoilt where it was: a scrub finds and repairs it.
        v.dolmen.dolmen("volume", "scrub", "spoilt", "--wait")
        v.heal_and_check()


def test_with_three_nodes_and_three_copies_there_is_nowhere_to_go(shared_cluster: Cluster) -> None:
    with volume(shared_cluster, "stuck", fill_bytes=MIB) as v:
        node = v.replica("stuck-r1")["node"]
        v.client.stop_node(node, kill=True)
        wait_until(lambda: "stuck-r1" not in v.in_sync(), what="the record without it")
        done = v.dolmen.dolmen("replica", "replace", "stuck", "stuck-r1", check=False)
        assert done.returncode == 1 and "nowhere to go" in done.stdout and "--nodes 4" in done.stdout
        v.client.start_node(node)
        v.heal_and_check()


def test_a_replica_is_replaced_by_itself_when_its_disk_stays_away() -> None:
    with cluster(nodes=3) as dolmen:
        dolmen.dolmen("down")
        dolmen.dolmen("up", "--nodes", "4", "--replace-after", "1s", "--detach")
        with volume(dolmen, "self", fill_bytes=8 * MIB) as v:
            node = str(v.replica("self-r2")["node"])
            pid = v.replica("self-r2")["pid"]
            path = v.layout.disk_dir(node)
            shutil.move(path, path.with_name("away"))
            kill(pid)
            wait_until(lambda: not is_alive(pid), what="its death")
            wait_until(lambda: "self-r4" in v.in_sync(), what="the replacement", timeout_s=60.0)
            v.heal_and_check()
            shutil.rmtree(path, ignore_errors=True)
            shutil.move(path.with_name("away"), path)
            old = path / "replicas" / v.client.volume("self")["volume_id"]
            wait_until(lambda: not old.exists(), what="the end of what was replaced", timeout_s=60.0)
