"""A private network loses packets as it is told, and nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.network import Direction, PrivateNetwork
from tests.support.network import network_or_skip
from tests.support.processes import EXIT_TIMEOUT_S

SERVER = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(b"hello")
        connection.close()
"""
CLIENT = """
import socket, sys
try:
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=0.3)
    print(connection.recv(5).decode())
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def network() -> Iterator[PrivateNetwork]:
    with network_or_skip() as made:
        yield made


@pytest.fixture
def port(network: PrivateNetwork) -> Iterator[int]:
    server = subprocess.Popen(
        [*network.prefix, sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate(timeout=EXIT_TIMEOUT_S)


def ask(network: PrivateNetwork, port: int) -> str:
    return network.run(sys.executable, "-c", CLIENT, str(port)).strip()


def test_a_server_is_there_then_silent_then_refuses_then_there_again(
    network: PrivateNetwork, port: int
) -> None:
    assert ask(network, port) == "hello"
    for direction in Direction:
        network.drop(port, direction)
        assert ask(network, port) == "TimeoutError"
    network.reset(port)
    assert ask(network, port) == "ConnectionRefusedError"
    network.heal(port)
    assert ask(network, port) == "hello"


def test_nothing_of_the_machines_own_network_is_in_it(network: PrivateNetwork) -> None:
    assert [line.split()[0] for line in network.run("ip", "-br", "link").splitlines()] == ["lo"]


def test_when_the_block_ends_its_process_and_namespace_are_gone() -> None:
    with network_or_skip() as network:
        assert network.namespace.exists()
    assert not network.namespace.exists()
