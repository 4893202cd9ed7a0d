"""Power is lost under real disks with real file systems: what was flushed is there; nobody has to help."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.conftest import prepared
from tests.faults.incident import Incident
from tests.support.cluster import cluster
from tests.support.linearizability import BLOCK_BYTES, Value, decode_tag, encode_tag
from tests.support.nbd_clients import ReconnectingClient, connect_patiently
from tests.support.nbd_library import nbd
from tests.support.power import BootId, PowerDisk, power_disk, shared_mounts, skip_without_power_disks
from tests.support.processes import wait_until

MIB = 1024 * 1024
DISK_BYTES = 192 * MIB
FUA_FRACTION = 0.1
NODES = ("node1", "node2", "node3")


@dataclass(slots=True)
class PoweredIncident:
    incident: Incident
    disks: dict[str, PowerDisk]
    boot_id: BootId

    def lose_power(self, *nodes: str) -> None:
        """Their servers die, then their disks forget; the nodes stay off."""
        with contextlib.ExitStack() as stops:
            for node in nodes:
                thread = threading.Thread(
                    target=self.incident.client.stop_node, args=[node], kwargs={"kill": True}
                )
                thread.start()
                stops.callback(thread.join)
        for node in nodes:
            self.disks[node].lose_power()

    def boot(self, *nodes: str) -> None:
        self.boot_id.change()
        for node in nodes:
            self.disks[node].plug_in()
            self.incident.client.start_node(node)


@pytest.fixture
def powered() -> Iterator[PoweredIncident]:
    skip_without_power_disks()
    disks: dict[str, PowerDisk] = {}

    @contextlib.contextmanager
    def plugged_in(directory: Path) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(shared_mounts(directory))
            for node in NODES:
                disk = power_disk(directory / "nodes" / node / "disk0", size_bytes=DISK_BYTES)
                disks[node] = stack.enter_context(disk)
            yield

    with tempfile.NamedTemporaryFile(prefix="dolmen-boot-id-") as file:
        boot_id = BootId(Path(file.name))
        with cluster(prefix=boot_id.prefix, prepare=plugged_in) as dolmen:
            for incident in prepared(dolmen):
                yield PoweredIncident(incident, disks, boot_id)


@dataclass(slots=True)
class Writer:
    """Writes tagged blocks, some with FUA, and flushes now and then, until the connection is lost."""

    uri: str
    blocks: range
    chance: random.Random
    sequence: int = 0
    flush_count: int = 0
    attempted: dict[int, int] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    flushed: dict[int, int] = field(default_factory=dict)  # block to what it held when a flush began
    errors: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="writer")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _run(self) -> None:
        handle = connect_patiently(self.uri)
        try:
            while True:
                for _ in range(self.chance.randrange(1, 40)):
                    self._write(handle)
                before = dict(self.answered)
                handle.flush()
                self.flushed, self.flush_count = before, self.flush_count + 1
        except nbd.Error as error:
            if not (handle.aio_is_dead() or handle.aio_is_closed()):
                self.errors.append(str(error))

    def _write(self, handle: nbd.NBD) -> None:
        block = self.chance.choice(self.blocks)
        self.sequence += 1
        self.attempted[block] = self.sequence
        fua = self.chance.random() < FUA_FRACTION
        flags = nbd.CMD_FLAG_FUA if fua else 0
        handle.pwrite(encode_tag(block, Value(1, self.sequence)), block * BLOCK_BYTES, flags)
        self.answered[block] = self.sequence
        if fua:
            self.flushed[block] = self.sequence

    def check(self) -> int:
        """No block is older than the last flush that succeeded, or anything that was never written. How
        many hold less than was answered: they were lost, as they may be."""
        lost_count = 0
        with ReconnectingClient(self.uri) as client:
            for block in self.blocks:
                value = decode_tag(block, client.read(block * BLOCK_BYTES, BLOCK_BYTES))
                found = 0 if value is None else value.sequence
                assert self.flushed.get(block, 0) <= found <= self.attempted.get(block, 0), (
                    f"block {block} holds {found}; flushed {self.flushed.get(block)}, "
                    f"answered {self.answered.get(block)}, attempted {self.attempted.get(block)}"
                )
                lost_count += found < self.answered.get(block, 0)
        return lost_count


def test_a_replica_whose_disk_lost_power_is_resynced_before_it_serves(powered: PoweredIncident) -> None:
    incident = powered.incident
    victim = incident.replica_ids[1]
    node = incident.node_of(victim)
    with incident.load(seed=71) as workload, ReconnectingClient(incident.uri) as client:
        client.write(40 * MIB, b"flushed" * 1000)
        client.flush()
        powered.lose_power(node)
        workload.wait_for_answers(300)
        assert victim not in incident.in_sync()
        powered.boot(node)
        incident.dolmen.wait_for_state(incident.name, "healthy")
        for _ in range(20):
            assert client.read(40 * MIB, 7000) == b"flushed" * 1000
    incident.check_healthy_and_equal()


def test_a_flush_covers_what_an_engine_that_died_had_answered_over_a_power_loss_too(
    powered: PoweredIncident,
) -> None:
    incident = powered.incident
    with ReconnectingClient(incident.uri) as client:
        for block in range(32):
            client.write(block * MIB, encode_tag(block * 256, Value(1, block)))
    incident.kill(incident.dolmen.engine_pid(incident.name))
    with ReconnectingClient(incident.uri) as client:
        client.flush()
    powered.lose_power(*NODES)
    powered.boot(*NODES)
    incident.dolmen.wait_for_state(incident.name, "healthy")
    with ReconnectingClient(incident.uri) as client:
        for block in range(32):
            found = client.read(block * MIB, BLOCK_BYTES)
            assert decode_tag(block * 256, found) == Value(1, block)
    incident.check_healthy_and_equal()


def test_after_a_power_loss_of_the_whole_cluster_every_flushed_write_is_there(
    powered: PoweredIncident,
) -> None:
    incident = powered.incident
    writer = Writer(incident.uri, range(64), random.Random(72))
    for _ in range(2):
        flushes = writer.flush_count
        with writer.writing():
            wait_until(lambda: writer.flush_count > flushes + 10, what="ten flushes")  # noqa: B023
            engine = incident.dolmen.engine_pid(incident.name)
            incident.kill(engine, *incident.dolmen.replica_pids(incident.name).values())
            powered.lose_power(*NODES)
        assert writer.errors == []
        powered.boot(*NODES)
        incident.dolmen.wait_for_state(incident.name, "healthy")
        lost_count = writer.check()
        print(f"{writer.sequence} writes, {writer.flush_count} flushes, {lost_count} blocks set back")
        incident.check_healthy_and_equal()
