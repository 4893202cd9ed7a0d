"""How a connection to a replica server begins, before it carries frames or control calls.

::

    server -> client   Greeting   {dolmen, nonce, boot_id, process_id}
    client -> server   Hello      {role, volume_id, epoch, engine_id, nonce, proof}
    server -> client   {"ok": {}, "proof"} or {"error": {...}, "proof"}

A proof is HMAC-SHA256 with the cluster's key over both nonces and the hello's fields, and over
which side speaks, so that neither side's proof passes for the other's: an address proves nothing,
and neither does being able to connect or to listen. A server proves nothing to a client that has
not: a refusal of the hello itself carries no proof, and its client acts on no other refusal
without one. The messages are the control messages of ``protocol.rpc``: u32 length, msgpack map.

Does not own: protection from somebody between the two who passes both proofs on.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from protocol.errors import NotAuthenticated, ProtocolViolation, StorageError, from_wire

PROTOCOL_VERSION = 1
NONCE_BYTES = 32
KEY_BYTES = 32

ID_CHARS_MAX = 200
"""Of a volume id or an engine id: ours are uuids with a word before them."""

HELLO_BYTES_MAX = 16 * 1024
"""Largest message of a hello. Bounds what a peer that has proved nothing can make us hold; an
error with its longest message fits."""


class Role(Enum):
    CONTROL = "control"  # control calls, until the connection closes
    DATA = "data"  # the engine's frames; the socket goes to the data plane
    PEER = "peer"  # another replica that reads to resync; the socket goes to the data plane


@dataclass(frozen=True, slots=True)
class Greeting:
    nonce: bytes
    boot_id: str  # changes when the machine lost its page cache
    process_id: str  # random per server process

    def to_wire(self) -> dict[str, Any]:
        return {
            "dolmen": PROTOCOL_VERSION,
            "nonce": self.nonce,
            "boot_id": self.boot_id,
            "process_id": self.process_id,
        }


@dataclass(frozen=True, slots=True)
class Hello:
    role: Role
    volume_id: str  # "" for a control connection that is about the whole server
    epoch: int  # 0 for control
    engine_id: str  # who speaks: for logs
    nonce: bytes  # the client's
    proof: bytes

    def to_wire(self) -> dict[str, Any]:
        return {
            "role": self.role.value,
            "volume_id": self.volume_id,
            "epoch": self.epoch,
            "engine_id": self.engine_id,
            "nonce": self.nonce,
            "proof": self.proof,
        }


class _Side(Enum):
    """Who proves. What stands before everything else under a proof; neither begins with the other."""

    CLIENT = b"dolmen hello client\0"
    SERVER = b"dolmen hello server\0"


def _prove(side: _Side, key: bytes, server_nonce: bytes, hello: Hello) -> bytes:
    assert len(key) == KEY_BYTES
    assert len(server_nonce) == len(hello.nonce) == NONCE_BYTES
    text = "\0".join((hello.role.value, hello.volume_id, str(hello.epoch), hello.engine_id))
    return hmac.digest(key, side.value + server_nonce + hello.nonce + text.encode(), "sha256")


def parse_greeting(wire: Any) -> Greeting:
    """Raises ProtocolViolation."""
    match wire:
        case {"dolmen": 1, "nonce": bytes(nonce), "boot_id": str(boot), "process_id": str(process)} if (
            len(nonce) == NONCE_BYTES
        ):
            return Greeting(nonce=nonce, boot_id=boot, process_id=process)
        case {"dolmen": version} if version != PROTOCOL_VERSION:
            raise ProtocolViolation(expected=f"protocol version {PROTOCOL_VERSION}", got=str(version)[:20])
        case _:
            raise ProtocolViolation(expected="a greeting", got=type(wire).__name__)


def make_hello(
    greeting: Greeting, *, key: bytes, role: Role, volume_id: str = "", epoch: int = 0, engine_id: str
) -> Hello:
    unproved = Hello(role, volume_id, epoch, engine_id, nonce=secrets.token_bytes(NONCE_BYTES), proof=b"")
    return replace(unproved, proof=_prove(_Side.CLIENT, key, greeting.nonce, unproved))


def parse_hello(wire: Any, *, key: bytes, nonce: bytes) -> Hello:
    """Check what a client sent. Raises ProtocolViolation or NotAuthenticated."""
    match wire:
        case {
            "role": str(role),
            "volume_id": str(volume_id),
            "epoch": int(epoch),
            "engine_id": str(engine_id),
            "nonce": bytes(client_nonce),
            "proof": bytes(proof),
        } if (
            role in {r.value for r in Role}
            and 0 <= epoch < 2**63
            and len(volume_id) <= ID_CHARS_MAX
            and len(engine_id) <= ID_CHARS_MAX
            and len(client_nonce) == NONCE_BYTES
            and "\0" not in volume_id + engine_id  # it separates the fields under the proof
        ):
            hello = Hello(Role(role), volume_id, epoch, engine_id, client_nonce, proof)
            if not hmac.compare_digest(_prove(_Side.CLIENT, key, nonce, hello), proof):
                raise NotAuthenticated()
            return hello
        case _:
            raise ProtocolViolation(expected="a hello", got=type(wire).__name__)


def make_answer(
    hello: Hello, error: StorageError | None = None, *, key: bytes, nonce: bytes
) -> dict[str, Any]:
    """The server's last message to a client that has proved itself. ``nonce``: of its greeting."""
    answer: dict[str, Any] = {"ok": {}} if error is None else {"error": error.to_wire()}
    return answer | {"proof": _prove(_Side.SERVER, key, nonce, hello)}


def make_refusal(error: StorageError) -> dict[str, Any]:
    """The server's last message to a client that has not: it proves nothing to strangers."""
    return {"error": error.to_wire()}


def check_answer(wire: Any, *, key: bytes, greeting: Greeting, hello: Hello) -> None:
    """Returns when the server is one of ours and said ok.

    Raises ProtocolViolation, the server's refusal, or NotAuthenticated: for a server that does not
    hold the key, whatever it says (a made-up ``stale_epoch`` would end an engine), and for a server
    that does when we do not.
    """
    match wire:
        case {"ok": _, "proof": bytes(proof)} | {"error": _, "proof": bytes(proof)}:
            if not hmac.compare_digest(_prove(_Side.SERVER, key, greeting.nonce, hello), proof):
                raise NotAuthenticated()
        case {"ok": _}:
            raise NotAuthenticated()
        case {"error": error}:
            refusal = from_wire(error)
            raise refusal if isinstance(refusal, ProtocolViolation) else NotAuthenticated()
        case _:
            raise ProtocolViolation(expected="ok or an error", got=type(wire).__name__)
    if "error" in wire:
        raise from_wire(wire["error"])
