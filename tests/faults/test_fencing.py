"""Two engines of one volume as real processes: the older one is stopped under load, a newer one takes over,
the older one goes on. Nothing that it does is applied or answered any more, also not through a replica that
the newer one cannot reach; its clients are closed, and it ends with exit code 3."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.limits import LEASE_WAIT_S
from protocol.limits import READ_LEASE_S
from tests.engine.rig import ANSWER_TIMEOUT_S, Rig, rig
from tests.faults.incident import Incident
from tests.support.linearizability import (
    BLOCK_BYTES,
    Kind,
    Operation,
    Value,
    assert_linearizable,
    decode_tag,
    encode_tag,
)
from tests.support.processes import wait_until
from tests.system.raw_nbd import READ, WRITE, RawNbd

BLOCKS = range(12)
"""Few, so that the two engines' clients meet in each."""

EXIT_FENCED = 3


class Client(threading.Thread):
    """Reads and writes, one at a time, until told to stop or the connection is closed."""

    def __init__(self, path: Path, *, writer: int) -> None:
        super().__init__(name=f"client {writer}", daemon=True)
        self.history: list[Operation] = []
        self.failure: BaseException | None = None
        self.was_closed = False
        self.stopping = False
        self._nbd = RawNbd(path)
        self._writer = writer
        self._chance = random.Random(writer)
        self.start()

    def run(self) -> None:
        try:
            with self._nbd:
                while not self.stopping:
                    self._one()
        except (EOFError, ConnectionError):
            self.was_closed = True
        except BaseException as error:  # noqa: BLE001 - handed to the thread that joins
            self.failure = error

    def _one(self) -> None:
        block, start = self._chance.choice(BLOCKS), time.monotonic()
        if self._chance.random() < 0.5:
            answer = self._nbd.request(READ, block * BLOCK_BYTES, BLOCK_BYTES)
            assert answer.error == 0
            value = decode_tag(block, answer.data)
            self.history.append(Operation(Kind.READ, block, value, start, time.monotonic()))
            return
        value = Value(self._writer, len(self.history))
        self.history.append(Operation(Kind.WRITE, block, value, start, None))
        answer = self._nbd.request(WRITE, block * BLOCK_BYTES, BLOCK_BYTES, data=encode_tag(block, value))
        assert answer.error == 0
        self.history[-1] = Operation(Kind.WRITE, block, value, start, time.monotonic())

    def end(self) -> list[Operation]:
        self.stopping = True
        self.join(ANSWER_TIMEOUT_S)
        assert not self.is_alive(), "it still waits for an answer"
        if self.failure is not None:
            raise self.failure
        return self.history

    def wait_for(self, count: int) -> None:
        goal = len(self.history) + count
        wait_until(lambda: len(self.history) >= goal or not self.is_alive(), what=f"{count} answers")
        assert len(self.history) >= goal, self.failure


@pytest.fixture
def older() -> Iterator[Rig]:
    # Not tmp_path: unix socket paths must be short.
    with tempfile.TemporaryDirectory(prefix="dolmen-fence-") as path, rig(Path(path)) as made:
        yield made


@contextlib.contextmanager
def another(first: Rig) -> Iterator[Rig]:
    """The same replicas and state store, for an engine with sockets of its own."""
    other = copy.copy(first)
    other.path = first.path / "other"
    other.path.mkdir()
    other.control, other.nbd = other.path / "engine", other.path / "nbd"
    with socket.socket(socket.AF_UNIX) as other.listener:
        other.listener.bind(str(other.nbd))
        other.listener.listen(256)
        yield other


@contextlib.contextmanager
def without(first: Rig, slot: int) -> Iterator[dict[str, Any]]:
    """The engine's config with one replica at an address where nobody answers."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        ports = [server.port for server in first.servers]
        ports[slot] = nobody.getsockname()[1]
        yield {
            "replicas": [
                {"id": first.ids[at], "node": first.servers[at].node, "host": "127.0.0.1", "port": port}
                for at, port in enumerate(ports)
            ]
        }


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def ask(nbd: RawNbd, kind: int, block: int) -> float:
    """Send a request and do not wait. When it was sent."""
    started = time.monotonic()
    data = encode_tag(block, Value(99, block)) if kind == WRITE else b""
    nbd.send_request(kind, block * BLOCK_BYTES, BLOCK_BYTES, data=data)
    return started


def test_an_engine_that_was_stopped_while_another_took_over_gets_nothing_through(older: Rig) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(older.attached())
        older.wait_for("healthy")
        clients = [Client(older.nbd, writer=number) for number in range(4)]
        readers = [stack.enter_context(older.client()) for _ in range(6)]
        writers = [stack.enter_context(older.client()) for _ in range(3)]
        clients[0].wait_for(100)
        stop(first.pid)

        newer = stack.enter_context(another(older))
        changes = stack.enter_context(without(older, 2))
        started = time.monotonic()
        stack.enter_context(newer.attached(**changes))
        # r2 is alive and still belongs to the older engine.
        newer.wait_for("degraded")
        assert time.monotonic() - started >= LEASE_WAIT_S > READ_LEASE_S
        later = [Client(newer.nbd, writer=10 + number) for number in range(3)]
        for client in later:
            client.wait_for(100)  # every block has been written since

        for number, nbd in enumerate(readers):
            ask(nbd, READ, number)
        for number, nbd in enumerate(writers):
            ask(nbd, WRITE, number)
        os.kill(first.pid, signal.SIGCONT)
        # What waited in its sockets when it woke up is neither read through r2 nor written.
        for nbd in (*readers, *writers):
            assert nbd.is_closed(), "an engine that was taken over answered a request"
        assert older.end() == EXIT_FENCED
        for client in later:
            client.wait_for(50)
        history = [op for client in (*clients, *later) for op in client.end()]
        assert all(client.was_closed for client in clients)
        assert not any(client.was_closed for client in later)

    # A third one reaches all: r2 is brought up to date, and what the first left there is gone.
    history += [Operation(Kind.WRITE, n, Value(99, n), 0.0, None) for n in range(len(writers))]
    with older.attached():
        older.wait_for("healthy")
        with older.client() as nbd:
            for block in BLOCKS:
                start = time.monotonic()
                raw = nbd.request(READ, block * BLOCK_BYTES, BLOCK_BYTES).data
                value = decode_tag(block, raw)
                history.append(Operation(Kind.READ, block, value, start, time.monotonic()))
    assert len(older.digests()) == 1
    assert sum(op.kind is Kind.READ for op in history) > 100
    assert_linearizable(history)


@pytest.mark.parametrize("ahead_s", [0.0, 0.1, 0.25])
def test_of_two_engines_that_claim_at_once_the_newer_wins_and_the_other_ends(
    older: Rig, ahead_s: float
) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(older.attached())
        early = stack.enter_context(socket.socket(socket.AF_UNIX))
        early.settimeout(ANSWER_TIMEOUT_S)
        early.connect(str(older.nbd))
        assert early.recv(18)  # it was let in, and waits for the volume to open
        threading.Event().wait(ahead_s)  # the stories differ by how far the older one has come
        newer = stack.enter_context(another(older))
        stack.enter_context(newer.attached())
        assert older.end() == EXIT_FENCED
        said = newer.wait_for("healthy")
        assert said["epoch"] == 2 == newer.store.record["epoch"]
        with newer.client() as nbd:
            assert nbd.request(WRITE, 0, BLOCK_BYTES, data=bytes(BLOCK_BYTES)).error == 0
        # The other's client hears nothing but the end.
        with contextlib.suppress(ConnectionError):
            while early.recv(4096):
                pass


def test_a_stopped_engine_is_ended_by_a_forced_detach_and_the_next_has_every_write(
    incident: Incident,
) -> None:
    client = incident.client
    before = incident.show()
    with incident.load(seed=41, reconnects=True) as workload:
        frozen = before["engine"]["pid"]
        stop(frozen)
        client.detach(incident.name, force=True)
        uri = client.attach(incident.name)["nbd_uri"]
        assert uri == before["nbd_uri"]
        workload.wait_for_answers(500)
        after = incident.show()
        assert after["epoch"] > before["epoch"] and after["engine"]["pid"] != frozen
    incident.check_healthy_and_equal()
