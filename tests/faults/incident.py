"""What the incidents' tests do to a running volume, and how they look at it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from bench.network import PrivateNetwork
from control.client import Client
from control.layout import Layout
from engine.client import EngineClient
from tests.support.cluster import Cluster
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.linearizability import assert_linearizable
from tests.support.nbd_clients import Workload
from tests.support.processes import is_alive, kill, wait_until

NOTICED_TIMEOUT_S = 20.0
"""For something that takes about a second on a quiet machine."""

VERIFY_TIMEOUT_S = 60.0

HEALTHY_AGAIN_S_MAX = 10.0
"""After the network is whole again."""

LOAD_BLOCKS = 48
"""Few, so that conflicts are frequent."""


@dataclass(slots=True)
class Incident:
    """An attached volume, and the ways to hurt what carries it."""

    name: str
    uri: str
    dolmen: Cluster
    stopped: set[int] = field(default_factory=set)
    load_count: int = 0

    # --- looking

    @property
    def client(self) -> Client:
        return Client(self.dolmen.dir)

    def show(self) -> dict[str, Any]:
        return self.dolmen.show(self.name)

    def replica(self, replica: str) -> dict[str, Any]:
        (found,) = [entry for entry in self.show()["replicas"] if entry["id"] == replica]
        return dict(found)

    @property
    def replica_ids(self) -> list[str]:
        return sorted(self.dolmen.replica_pids(self.name))

    def node_of(self, replica: str) -> str:
        return str(self.replica(replica)["node"])

    def pid_of(self, replica: str) -> int:
        return self.dolmen.replica_pids(self.name)[replica]

    def directory_of(self, replica: str) -> Path:
        return Path(self.replica(replica)["path"])

    def port_of(self, replica: str) -> int:
        """Where its server listens; all replicas of one server share it."""
        config = json.loads(Layout(self.dolmen.dir).engine_config(self.name).read_text())
        (port,) = [int(entry["port"]) for entry in config["replicas"] if entry["id"] == replica]
        return port

    @property
    def network(self) -> PrivateNetwork:
        assert self.dolmen.network is not None, "the cluster of this test is in the machine's own network"
        return self.dolmen.network

    def in_sync(self) -> set[str]:
        return set(self.show()["membership"]["in_sync"])

    def engine(self, call: str) -> dict[str, Any]:
        """Asked at the engine itself: it answers without the daemon."""

        async def ask() -> dict[str, Any]:
            path = str(Layout(self.dolmen.dir).engine_socket(self.name))
            async with await EngineClient.connect(path) as engine:
                answer: dict[str, Any] = await engine.rpc.call(call)
                return answer

        return asyncio.run(ask())

    def engine_state(self) -> str:
        return str(self.engine("engine.status")["state"])

    def stored_record(self) -> dict[str, Any]:
        """The membership record as it stands in the state store's file."""
        with contextlib.closing(sqlite3.connect(f"file:{self.dolmen.dir}/state.db?mode=ro", uri=True)) as db:
            (status,) = db.execute(
                "SELECT status FROM documents WHERE name = ? AND kind = 'volume'", [self.name]
            )
        return dict(json.loads(status[0])["record"])

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the samples that have these labels, of this volume."""
        wanted = {"volume": self.name, **labels}.items()
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.client.text("/metrics"))
            for sample in family.samples
            if sample.name == name and wanted <= sample.labels.items()
        )

    # --- hurting

    def kill_and_keep_down(self, replica: str) -> None:
        """SIGKILL; the daemon does not start it again until start()."""
        self.client.stop_node(self.node_of(replica), kill=True)

    def stop_cleanly(self, replica: str) -> None:
        self.client.stop_node(self.node_of(replica))

    def start(self, replica: str) -> None:
        self.client.start_node(self.node_of(replica))

    def freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.stopped.add(pid)

    def thaw(self, pid: int) -> None:
        self.stopped.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def kill(self, *pids: int) -> None:
        for pid in pids:
            kill(pid)
        for pid in pids:
            wait_until(lambda pid=pid: not is_alive(pid), what=f"the death of {pid}")  # type: ignore[misc]

    def mend(self) -> None:
        for pid in list(self.stopped):
            self.thaw(pid)
        if not is_alive(self.dolmen.daemon_pid()):
            self.dolmen.up()
        if self.dolmen.network is not None:
            self.dolmen.network.heal()
        for node in self.client.nodes():
            if node["state"] == "stopped":
                self.client.start_node(node["name"])

    @contextlib.contextmanager
    def proxied(self, replica: str) -> Iterator[FaultProxy]:
        """Everything between its server and all others passes through a proxy; healthy at the start, and
        soon after the last fault."""
        with fault_proxy(self.network, self.port_of(replica)) as proxy:
            self.wait_for("the engine behind the proxy", lambda: proxy.data_connections > 0)
            self.dolmen.wait_for_state(self.name, "healthy")
            yield proxy
            proxy.behave()
            self.check_healthy_soon()

    # --- load, waiting, the end

    @contextlib.contextmanager
    def load(self, *, seed: int, reconnects: bool = False) -> Iterator[Workload]:
        """Reads and writes of few blocks by two clients. Afterwards: no error, every block a linearizable
        register, and (unless ``reconnects``) no connection was lost."""
        first = LOAD_BLOCKS * self.load_count  # nobody has written there: the checker knows what to expect
        self.load_count += 1
        with Workload(self.uri, blocks=range(first, first + LOAD_BLOCKS), seed=seed) as workload:
            workload.wait_for_answers(300)
            yield workload
            workload.wait_for_answers(300)
        assert workload.errors == []
        assert reconnects == (workload.reconnect_count > 0)
        assert_linearizable(workload.history)

    def wait_for(self, what: str, condition: Any, *, timeout_s: float = NOTICED_TIMEOUT_S) -> None:
        try:
            wait_until(condition, timeout_s=timeout_s, what=what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; volume: {json.dumps(self.show(), indent=1)}") from None

    def wait_until_left_out(self, replica: str) -> dict[str, Any]:
        self.wait_for(f"{replica} out of the record", lambda: replica not in self.in_sync())
        return self.show()

    def wait_for_another_server(self, replica: str, dead: int) -> None:
        """The daemon starts one by itself."""

        def started() -> bool:
            return self.dolmen.replica_pids(self.name).get(replica, dead) != dead

        self.wait_for(f"another server of {replica}", started)

    def wait_for_waiting(self, workload: Workload) -> None:
        """Requests wait, and none is answered."""
        self.wait_for("the engine waiting", lambda: self.engine_state() == "waiting")
        before = -1
        # What was answered before it began to wait may still be on its way to us.
        while before != workload.answer_count:
            before = workload.answer_count
            assert self.engine_state() == "waiting"

    def check_healthy_and_equal(self) -> None:
        self.dolmen.wait_for_state(self.name, "healthy")
        result = self.verify()
        assert result["verdict"] == "same", result
        assert len([replica for replica in result["replicas"] if replica["compared"]]) == 3, result

    def check_healthy_soon(self) -> None:
        """Called when the fault is over."""
        started = time.monotonic()
        self.dolmen.wait_for_state(self.name, "healthy", timeout_s=2 * HEALTHY_AGAIN_S_MAX)
        took_s = time.monotonic() - started
        print(f"healthy {took_s:.1f} s after the end of the fault")
        assert took_s < HEALTHY_AGAIN_S_MAX
        self.check_healthy_and_equal()

    def verify(self) -> dict[str, Any]:
        """What ``dolmen replica verify -o json`` shows, without starting a program."""
        job = self.client.verify(self.name)

        def finished() -> bool:
            job.update(self.client.job(job["id"]))
            return bool(job["state"] != "running")

        wait_until(finished, timeout_s=VERIFY_TIMEOUT_S, what="the verification")
        assert job["state"] == "done", job
        return dict(job["result"])
