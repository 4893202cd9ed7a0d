"""Out of descriptors, of memory, of processes: what is new is refused or waits, what is old is kept."""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Iterator

from tests.faults.incident import Incident
from tests.support import hostile
from tests.support.cgroup import cgroup
from tests.support.linearizability import BLOCK_BYTES
from tests.support.nbd_clients import ReconnectingClient
from tests.system.conftest import Volume

MIB = 1024 * 1024
DESCRIPTORS = 32
CROWD = 60

ENGINE_GROWTH_BYTES_MAX = 360 * MIB
"""The engine holds 256 MiB of requests at most (ENGINE_BYTES_MAX of the data plane); the rest is for the
allocator."""

WRITERS = 16
WRITE_BYTES = 32 * MIB


@contextlib.contextmanager
def few_descriptors(*pids: int) -> Iterator[None]:
    before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_with_32_descriptors_the_new_wait_and_the_old_are_served(incident: Incident) -> None:
    shown = incident.show()
    socket = Volume(incident.name, incident.uri, incident.dolmen).socket
    pids = [incident.dolmen.daemon_pid(), shown["engine"]["pid"]]
    pids += [replica["pid"] for replica in shown["replicas"]]
    ports = [incident.port_of(replica) for replica in incident.replica_ids]
    with incident.load(seed=91) as workload:
        with few_descriptors(*pids), contextlib.ExitStack() as crowds:
            crowds.enter_context(hostile.crowd(lambda: hostile.connect_unix(socket), count=CROWD))
            for port in ports:
                crowds.enter_context(
                    hostile.crowd(lambda port=port: hostile.connect_tcp("127.0.0.1", port), count=CROWD)
                )
            workload.wait_for_answers(1000)
            assert all(incident.dolmen.descriptor_count(pid) <= DESCRIPTORS for pid in pids)
        with ReconnectingClient(incident.uri) as late:  # the crowd has left, and there is room again
            assert late.size() == incident.show()["size_bytes"]
    after = incident.show()
    assert [after["engine"]["pid"], *(replica["pid"] for replica in after["replicas"])] == pids[1:]
    incident.check_healthy_and_equal()


def test_requests_that_wait_hold_bounded_memory(incident: Incident) -> None:
    engine = incident.dolmen.engine_pid(incident.name)
    daemon = incident.dolmen.daemon_pid()
    servers = incident.dolmen.replica_pids(incident.name).values()
    before = incident.dolmen.memory_bytes(engine)
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with ReconnectingClient(incident.uri) as client:
                client.write(number % 2 * WRITE_BYTES, bytes([number + 1]) * WRITE_BYTES)
                assert client.reconnect_count == 0
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    with cgroup("memory") as group:
        group.set("memory.limit_in_bytes", before + ENGINE_GROWTH_BYTES_MAX)
        group.add(engine)
        incident.freeze(daemon)  # it would start them again at once
        incident.kill(*servers)
        threads = [threading.Thread(target=write, args=[number]) for number in range(WRITERS)]
        for thread in threads:
            thread.start()
        incident.wait_for(
            "the engine holding all it may",
            lambda: incident.engine("engine.stats")["in_flight_bytes"] >= 6 * WRITE_BYTES,
        )
        assert incident.dolmen.memory_bytes(engine) < before + ENGINE_GROWTH_BYTES_MAX
        incident.thaw(daemon)
        for thread in threads:
            thread.join()
        assert failures == []
        assert incident.dolmen.engine_pid(incident.name) == engine, "nobody was killed for want of memory"
    with ReconnectingClient(incident.uri) as client:
        for half in range(2):
            found = client.read(half * WRITE_BYTES, WRITE_BYTES)
            for at in range(0, WRITE_BYTES, BLOCK_BYTES):  # several wrote here at once: each block is of one
                block = found[at : at + BLOCK_BYTES]
                assert block == block[:1] * BLOCK_BYTES and block[0] % 2 == (half + 1) % 2
    incident.check_healthy_and_equal()


def test_without_room_for_a_process_what_runs_goes_on_and_the_next_engine_waits(incident: Incident) -> None:
    shown = incident.show()
    daemon = incident.dolmen.daemon_pid()
    with cgroup("pids") as group, ReconnectingClient(incident.uri) as client:
        client.write(60 * MIB, b"before")
        group.add(daemon, shown["engine"]["pid"], *(replica["pid"] for replica in shown["replicas"]))
        with incident.load(seed=92, reconnects=True) as workload:
            group.set("pids.max", 1)  # fewer than there are: none can be added
            workload.wait_for_answers(300)
            incident.kill(shown["engine"]["pid"])
            incident.wait_for("the reason", lambda: incident.show()["state"] != "healthy")
            assert {replica["pid"] for replica in incident.show()["replicas"]} == {
                replica["pid"] for replica in shown["replicas"]
            }
            group.set("pids.max", "max")
            workload.wait_for_answers(300)
        assert client.read(60 * MIB, 6) == b"before"
        assert incident.dolmen.daemon_pid() == daemon
    incident.check_healthy_and_equal()
