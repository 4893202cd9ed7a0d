"""Senders of bad bytes: random, truncated, oversized, mutated, slow to read. Bounded and repeatable.

::

    report = attack(lambda: connect_unix(path), Conversation(prefixes=[...]), seed=1, connections=200)

An attack says nothing by itself: the test asks afterwards whether the service still serves, with
bounded memory, and whether anybody else was disturbed. Only sockets of this machine are attacked.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BYTES_PER_CONNECTION_MAX = 256 * 1024
ANSWER_BYTES_MAX = 64 * 1024
"""What is read of the victim's answers, in case it floods back."""

ANSWER_TIMEOUT_S = 0.05
"""How long one connection waits for an answer. Most bad input has none until a deadline."""

CONNECTIONS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Conversation:
    """Sound beginnings of the victim's protocol. Bad bytes after a sound beginning reach deeper.

    ``boundaries``: 4- and 8-byte integers that sit at the edges of what a length or an offset may be
    are put over random places; ``big_endian`` says how this protocol writes them.
    """

    prefixes: Sequence[bytes] = (b"",)
    messages: Sequence[bytes] = ()
    big_endian: bool = True


@dataclass(slots=True)
class Report:
    connections: int = 0
    refused: int = 0
    closed_by_victim: int = 0
    bytes_sent: int = 0
    answers: list[bytes] = field(default_factory=list)


def connect_unix(path: Path | str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(5)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def connect_tcp(host: str, port: int) -> socket.socket:
    assert ipaddress.ip_address(host).is_loopback, "only this machine is ever attacked"
    return socket.create_connection((host, port), timeout=5)


INTERESTING = (
    0,
    1,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def bad_bytes(conversation: Conversation, chance: random.Random) -> bytes:
    """One connection's worth."""
    prefix = chance.choice(conversation.prefixes)
    messages = (
        [chance.choice(conversation.messages) for _ in range(chance.randrange(1, 4))]
        if (conversation.messages)
        else [chance.randbytes(chance.randrange(1, 200))]
    )
    body = bytearray(b"".join(messages))
    match chance.randrange(5):
        case 0:  # truncated
            del body[chance.randrange(len(body) + 1) :]
        case 1:  # some bytes changed
            for _ in range(chance.randrange(1, 8)):
                body[chance.randrange(len(body))] = chance.randrange(256)
        case 2:  # a length or an offset at the edge of what it may be
            width = chance.choice([2, 4, 8])
            value = chance.choice(INTERESTING) & (256**width - 1)
            at = chance.randrange(max(1, len(body) - width + 1))
            body[at : at + width] = value.to_bytes(width, "big" if conversation.big_endian else "little")
        case 3:  # nothing but noise
            body = bytearray(chance.randbytes(chance.randrange(1, 4096)))
        case _:  # more than was announced
            body += chance.randbytes(chance.randrange(1, 65536))
    return (prefix + bytes(body))[:BYTES_PER_CONNECTION_MAX]


def attack(
    connect: Callable[[], socket.socket], conversation: Conversation, *, seed: int, connections: int
) -> Report:
    """One after another. Returns what was seen; raises nothing that the victim caused."""
    assert connections <= CONNECTIONS_MAX
    chance = random.Random(seed)
    report = Report()
    for _ in range(connections):
        payload = bad_bytes(conversation, chance)
        try:
            sock = connect()
        except OSError:
            report.refused += 1
            continue
        with sock:
            report.connections += 1
            _send_and_listen(sock, payload, report, end=chance.random() < 0.5)
    return report


def _send_and_listen(sock: socket.socket, payload: bytes, report: Report, *, end: bool) -> None:
    sock.settimeout(ANSWER_TIMEOUT_S)
    answer = b""
    try:
        with contextlib.suppress(TimeoutError):
            sock.sendall(payload)
            report.bytes_sent += len(payload)
        if end:
            sock.shutdown(socket.SHUT_WR)
        while len(answer) < ANSWER_BYTES_MAX:
            part = sock.recv(65536)
            if not part:
                report.closed_by_victim += 1
                break
            answer += part
    except TimeoutError:
        pass  # it waits for more; leaving is this connection's last malice
    except OSError:
        report.closed_by_victim += 1
    report.answers.append(answer)


@contextlib.contextmanager
def crowd(connect: Callable[[], socket.socket], *, count: int):
    """``count`` connections that say nothing, held open while the block lasts; fewer if refused."""
    assert count <= CONNECTIONS_MAX
    with contextlib.ExitStack() as held:
        sockets = []
        for _ in range(count):
            try:
                sockets.append(held.enter_context(connect()))
            except OSError:
                break  # the victim protects itself
        yield sockets


# --- NBD: sound beginnings and messages, so that mutations reach every branch

NBD_PREFIX = b"\x00\x00\x00\x03"


def nbd_option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


def nbd_request(
    kind: int, *, offset: int = 0, length: int = 4096, flags: int = 0, data: bytes = b""
) -> bytes:
    head = b"\x25\x60\x95\x13" + flags.to_bytes(2, "big") + kind.to_bytes(2, "big")
    return head + bytes(8) + offset.to_bytes(8, "big") + length.to_bytes(4, "big") + data


_GO = nbd_option(7, bytes(4) + bytes(2))
_META = nbd_option(10, bytes(4) + (1).to_bytes(4, "big") + (15).to_bytes(4, "big") + b"base:allocation")

NBD_NEGOTIATION = Conversation(
    prefixes=[b"", NBD_PREFIX, NBD_PREFIX + nbd_option(8)],
    messages=[nbd_option(number) for number in range(12)] + [_GO, _META, nbd_option(6, bytes(6))],
)

NBD_TRANSMISSION = Conversation(
    prefixes=[NBD_PREFIX + _GO, NBD_PREFIX + nbd_option(8) + _META + _GO],
    messages=[
        *(nbd_request(kind) for kind in (0, 3, 4, 5, 6, 7)),
        nbd_request(1, data=bytes(4096)),
        nbd_request(1, flags=1, length=512, data=bytes(512)),
        nbd_request(0, offset=2**63),
        nbd_request(0, length=0xFFFFFFFF),
        nbd_request(6, flags=0x1F, length=0xFFFFFFFF),
        nbd_request(99),
    ],
)
"""Some of these are sound writes of zeroes and trims at the volume's beginning: what is there is lost."""
