"""Bad bytes, floods and stalls at the NBD socket: bounded memory, and nobody else is disturbed."""

from __future__ import annotations

import time

from tests.support import hostile
from tests.support.linearizability import assert_linearizable
from tests.support.nbd_clients import ReconnectingClient, Workload
from tests.system import raw_nbd
from tests.system.conftest import Volume
from tests.system.raw_nbd import RawNbd

MIB = 1024 * 1024
GROWTH_BYTES_MAX = 96 * MIB
"""What a crowd and a thousand bad connections may add to an engine's memory, at most."""

HANDSHAKE_DEADLINE_S = 10.0

# The attack's sound messages zero and trim the volume's beginning: others work elsewhere.
BLOCKS = range(8192, 8192 + 32)


def test_bad_bytes_disturb_nobody(volume: Volume) -> None:
    pid = volume.dolmen.engine_pid(volume.name)
    before = volume.dolmen.memory_bytes(pid)
    with Workload(volume.uri, blocks=BLOCKS, seed=41, worker_count=1) as workload:
        for seed, conversation in enumerate((hostile.NBD_NEGOTIATION, hostile.NBD_TRANSMISSION)):
            report = hostile.attack(
                lambda: hostile.connect_unix(volume.socket), conversation, seed=seed, connections=300
            )
            assert report.connections == 300
        workload.wait_for_answers(300)
    assert workload.errors == []
    assert workload.reconnect_count == 0
    assert_linearizable(workload.history)
    assert volume.dolmen.engine_pid(volume.name) == pid, "the engine was never restarted"
    assert volume.dolmen.memory_bytes(pid) - before < GROWTH_BYTES_MAX
    volume.dolmen.verify(volume.name)


def test_a_crowd_that_says_nothing_keeps_nobody_out(volume: Volume) -> None:
    pid = volume.dolmen.engine_pid(volume.name)
    before = volume.dolmen.memory_bytes(pid)
    with ReconnectingClient(volume.uri) as client:
        with hostile.crowd(lambda: hostile.connect_unix(volume.socket), count=600):
            client.write(0, b"not disturbed")
            assert client.read(0, 13) == b"not disturbed"
            assert volume.dolmen.memory_bytes(pid) - before < GROWTH_BYTES_MAX
        with ReconnectingClient(volume.uri) as late:
            assert late.read(0, 13) == b"not disturbed"
        assert client.reconnect_count == 0
    assert volume.dolmen.engine_pid(volume.name) == pid


def test_a_client_that_does_not_finish_its_handshake_is_sent_away(volume: Volume) -> None:
    with hostile.connect_unix(volume.socket) as sock:
        sock.settimeout(HANDSHAKE_DEADLINE_S * 2)
        started = time.monotonic()
        sock.sendall(b"\0\0\0\3IHAVEOPT")  # and then nothing
        while sock.recv(4096):
            pass
        waited_s = time.monotonic() - started
    assert HANDSHAKE_DEADLINE_S * 0.8 < waited_s < HANDSHAKE_DEADLINE_S * 1.5


def test_a_client_that_never_reads_its_answers_holds_bounded_memory(volume: Volume) -> None:
    pid = volume.dolmen.engine_pid(volume.name)
    before = volume.dolmen.memory_bytes(pid)
    with RawNbd(volume.socket) as greedy, ReconnectingClient(volume.uri) as client:
        greedy._socket.settimeout(0.5)
        request = hostile.nbd_request(raw_nbd.READ, length=4 * MIB)
        try:
            for _ in range(10_000):  # 40 GB of answers, if anybody sent them
                greedy.send(request)
        except TimeoutError:
            pass  # the engine stopped listening to it: that is the point
        client.write(40 * MIB, b"still served")
        assert client.read(40 * MIB, 12) == b"still served"
        assert volume.dolmen.memory_bytes(pid) - before < GROWTH_BYTES_MAX
    assert volume.dolmen.engine_pid(volume.name) == pid


def test_a_client_that_vanishes_in_the_middle_of_a_write_changes_nothing_else(volume: Volume) -> None:
    with ReconnectingClient(volume.uri) as client:
        client.write(0, b"." * MIB)
        for sent in (0, 1, 4096, 65536 - 1):
            with RawNbd(volume.socket) as leaver:
                head = hostile.nbd_request(raw_nbd.WRITE, offset=MIB, length=65536)
                leaver.send(head + b"x" * sent)
        assert client.read(0, MIB) == b"." * MIB
        assert client.read(MIB, 65536) == bytes(65536), "a write that never arrived whole"
    volume.dolmen.verify(volume.name)
