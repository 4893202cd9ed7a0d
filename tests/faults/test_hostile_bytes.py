"""Bad bytes at every port at once: nobody else is disturbed, memory stays bounded, crowds are capped."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from control.api import CONNECTIONS_MAX as REST_CONNECTIONS_MAX
from engine import limits as engine_limits
from protocol.hello import NONCE_BYTES
from protocol.rpc import pack
from replica.server import HANDSHAKES_MAX
from tests.faults.incident import Incident
from tests.support import hostile
from tests.support.hostile import Conversation, Report

MIB = 1024 * 1024
GROWTH_BYTES_MAX = 96 * MIB
"""What an attack and a crowd may add to one process, at most."""

CONNECTIONS = 60
OWN_MAX = 64
"""Descriptors that a process has without any stranger: a few dozen."""

CROWD = 400
"""More than any of our caps on connections that have proved nothing."""

assert max(REST_CONNECTIONS_MAX, HANDSHAKES_MAX) < CROWD

HELLO = {
    "role": "data",
    "volume_id": "v",
    "epoch": 1,
    "engine_id": "e",
    "nonce": bytes(NONCE_BYTES),
    "proof": bytes(32),
}

REPLICA_PORT = Conversation(
    prefixes=[b"", pack(HELLO)],
    messages=[
        pack(HELLO),
        pack({**HELLO, "role": "control"}),
        pack({"id": 1, "call": "server.status", "args": {}}),
        pack({"id": 1, "call": "replica.delete", "args": {"volume_id": "v"}}),
        (0xFFFFFFFF).to_bytes(4, "little"),
        b"DLMN\x01\x01" + bytes(42),
    ],
    big_endian=False,
)

_HEAD = b"Host: localhost\r\n"
REST = Conversation(
    prefixes=[b"", b"GET /healthz HTTP/1.1\r\n" + _HEAD + b"\r\n"],
    messages=[
        b"GET /v1/status HTTP/1.1\r\n" + _HEAD + b"\r\n",
        b"POST /v1/volumes HTTP/1.1\r\n" + _HEAD + b"Content-Length: 99999999999\r\n\r\n{",
        b"POST /v1/volumes HTTP/1.1\r\n" + _HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n",
        b"DELETE /v1/volumes/../../etc HTTP/1.1\r\n" + _HEAD + b"Authorization: Bearer x\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + _HEAD + b"\r\n",
        b"POST /v1/shutdown HTTP/1.1\r\n" + _HEAD + b"Content-Length: 20\r\n\r\n" + b'{"everything": true}',
    ],
)


def test_bad_bytes_and_crowds_at_every_port_disturb_nobody(incident: Incident) -> None:
    victim = incident.client.volume(_second_volume(incident))
    ports = _ports(incident, victim)
    pids = _pids(incident, victim)
    before = {pid: incident.dolmen.memory_bytes(pid) for pid in pids}
    with incident.load(seed=71):
        _attack_all(ports)
        with contextlib.ExitStack() as crowds:
            for port in ports:
                crowds.enter_context(
                    hostile.crowd(lambda port=port: hostile.connect_tcp("127.0.0.1", port), count=CROWD)
                )
            incident.client.volume(victim["name"])  # the unix socket answers
            grown = {pid: incident.dolmen.memory_bytes(pid) - before[pid] for pid in pids}
            descriptors = {pid: incident.dolmen.descriptor_count(pid) for pid in pids}
    assert _pids(incident, incident.client.volume(victim["name"])) == pids, "nothing was restarted"
    print(
        "grown, MiB:", {pid: round(size / MIB, 1) for pid, size in grown.items()}, "descriptors:", descriptors
    )
    assert max(grown.values()) < GROWTH_BYTES_MAX
    daemon, engine, server = (descriptors[pids[at]] for at in (0, 2, 3))
    assert daemon < REST_CONNECTIONS_MAX + OWN_MAX
    assert engine < engine_limits.HANDSHAKES_MAX + OWN_MAX
    assert server < HANDSHAKES_MAX + OWN_MAX
    incident.check_healthy_and_equal()
    incident.client.detach(victim["name"])
    incident.client.delete_volume(victim["name"])


def _second_volume(incident: Incident) -> str:
    """The one that is attacked: some of the attack's messages are sound writes."""
    name = f"{incident.name}-attacked"
    incident.client.create_volume(name, 64 * MIB, 3)
    incident.client.attach(name, tcp=True)
    return name


def _ports(incident: Incident, victim: dict[str, str]) -> dict[int, list[Conversation]]:
    nbd = urlsplit(victim["nbd_tcp_uri"]).port
    rest = incident.client.status()["daemon"]["tcp_address"].rpartition(":")[2]
    replica = incident.client.nodes()[0]["address"].rpartition(":")[2]
    assert nbd is not None
    return {
        nbd: [hostile.NBD_NEGOTIATION, hostile.NBD_TRANSMISSION],
        int(replica): [REPLICA_PORT],
        int(rest): [REST],
    }


def _pids(incident: Incident, victim: dict[str, object]) -> list[int]:
    replicas = incident.dolmen.replica_pids(incident.name).values()
    engines = [incident.dolmen.engine_pid(name) for name in (incident.name, str(victim["name"]))]
    return [incident.dolmen.daemon_pid(), *engines, *replicas]


def _attack_all(ports: dict[int, list[Conversation]]) -> None:
    reports: list[Report] = []

    def attacker(port: int, conversation: Conversation, seed: int) -> Callable[[], None]:
        def run() -> None:
            reports.append(
                hostile.attack(
                    lambda: hostile.connect_tcp("127.0.0.1", port),
                    conversation,
                    seed=seed,
                    connections=CONNECTIONS,
                )
            )

        return run

    threads = [
        threading.Thread(target=attacker(port, conversation, seed))
        for seed, (port, conversation) in enumerate((p, c) for p, many in ports.items() for c in many)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.connections for report in reports] == [CONNECTIONS] * len(threads)


def test_a_stranger_at_the_rest_port_changes_nothing(incident: Incident) -> None:
    address = incident.client.status()["daemon"]["tcp_address"].rpartition(":")[2]
    before = incident.client.volumes()
    body = json.dumps({"everything": True}).encode()
    for path in (b"/v1/shutdown", b"/v1/volumes/" + incident.name.encode() + b"/detach"):
        with hostile.connect_tcp("127.0.0.1", int(address)) as sock:
            sock.sendall(
                b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            answer = b"".join(iter(lambda: sock.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 401"), answer[:100]
        assert b"not_authenticated" in answer
    assert incident.client.volumes() == before
