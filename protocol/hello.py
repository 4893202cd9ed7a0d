"""How a connection to a replica server begins, before it carries frames or control calls.

::

    server -> client   Greeting   {dolmen, nonce, boot_id, process_id}
    client -> server   Hello      {role, volume_id, epoch, engine_id, proof}
    server -> client   {"ok": {}} or {"error": {...}}

``proof`` is HMAC-SHA256 with the cluster's key over the nonce and the hello's fields: an
address proves nothing, and neither does being able to connect. The messages are the control
messages of ``protocol.rpc``: u32 length, msgpack map.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from enum import Enum
from typing import Any

from protocol.errors import NotAuthenticated, ProtocolViolation

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
    proof: bytes

    def to_wire(self) -> dict[str, Any]:
        return {
            "role": self.role.value,
            "volume_id": self.volume_id,
            "epoch": self.epoch,
            "engine_id": self.engine_id,
            "proof": self.proof,
        }


def prove(key: bytes, nonce: bytes, role: Role, volume_id: str, epoch: int, engine_id: str) -> bytes:
    assert len(key) == KEY_BYTES
    text = "\0".join((role.value, volume_id, str(epoch), engine_id))
    return hmac.digest(key, nonce + text.encode(), "sha256")


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
    proof = prove(key, greeting.nonce, role, volume_id, epoch, engine_id)
    return Hello(role=role, volume_id=volume_id, epoch=epoch, engine_id=engine_id, proof=proof)


def parse_hello(wire: Any, *, key: bytes, nonce: bytes) -> Hello:
    """Check what a client sent. Raises ProtocolViolation or NotAuthenticated."""
    match wire:
        case {
            "role": str(role),
            "volume_id": str(volume_id),
            "epoch": int(epoch),
            "engine_id": str(engine_id),
            "proof": bytes(proof),
        } if (
            role in {r.value for r in Role}
            and 0 <= epoch < 2**63
            and len(volume_id) <= ID_CHARS_MAX
            and len(engine_id) <= ID_CHARS_MAX
            and "\0" not in volume_id + engine_id  # it separates the fields under the proof
        ):
            expected = prove(key, nonce, Role(role), volume_id, epoch, engine_id)
            if not hmac.compare_digest(expected, proof):
                raise NotAuthenticated()
            return Hello(Role(role), volume_id, epoch, engine_id, proof)
        case _:
            raise ProtocolViolation(expected="a hello", got=type(wire).__name__)
