"""The file an engine is started with: PROTOCOL.md, "What the daemon hands to a process it starts".

Owns its parsing. By the time an ``EngineConfig`` exists it is right; what is wrong is BadRequest and names
the key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engine.limits import STRAGGLER_WAIT_S
from engine.membership import Hints, Override
from engine.opening import NOTHING_SAID, Grant, VolumeSpec
from protocol.errors import BadRequest, ProtocolViolation
from protocol.hello import ID_CHARS_MAX, KEY_BYTES
from protocol.limits import BLOCK_BYTES, REPLICAS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN
from protocol.membership import MembershipRecord, parse_record

CONFIG_BYTES_MAX = 1024 * 1024
"""A real one is below 4 KiB."""

REQUIRED_KEYS = frozenset(
    {
        "volume_id",
        "name",
        "size_bytes",
        "epoch",
        "engine_id",
        "node",
        "replicas",
        "record",
        "key_file",
        "daemon_socket",
        "control_socket",
        "listeners",
    }
)
GRANT_KEYS = frozenset({"predecessor_ended", "opens", "distrust_store", "forked", "override"})
"""What the grant says beyond the record. Absent: the defaults of PROTOCOL.md."""

OPTIONAL_KEYS = frozenset({"straggler_wait_s", "read_only"}) | GRANT_KEYS


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    id: str
    node: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Listener:
    """An inherited socket that already listens."""

    fd: int
    kind: str  # "unix" or "tcp"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    volume_id: str
    name: str
    size_bytes: int
    epoch: int
    engine_id: str
    node: str
    replicas: tuple[ReplicaAddress, ...]  # the index is the slot
    record: MembershipRecord  # the state store's, as of the grant of the epoch
    key_file: str
    daemon_socket: str
    control_socket: str
    listeners: tuple[Listener, ...]
    straggler_wait_s: float = STRAGGLER_WAIT_S
    read_only: bool = False
    grant: Grant = NOTHING_SAID

    def spec(self) -> VolumeSpec:
        return VolumeSpec(
            volume_id=self.volume_id,
            name=self.name,
            size_bytes=self.size_bytes,
            epoch=self.epoch,
            stored=self.record,
            replica_ids=tuple(replica.id for replica in self.replicas),
            straggler_wait_s=self.straggler_wait_s,
            grant=self.grant,
        )


def read_config(path: str) -> EngineConfig:
    """Raises BadRequest, OSError."""
    with open(path, "rb") as file:
        data = file.read(CONFIG_BYTES_MAX + 1)
    if len(data) > CONFIG_BYTES_MAX:
        raise BadRequest(reason=f"{path} is larger than {CONFIG_BYTES_MAX} bytes")
    try:
        wire = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(reason=f"{path} is not JSON: {error}") from error
    return parse_config(wire)


def parse_config(wire: Any) -> EngineConfig:
    """Raises BadRequest."""
    if not isinstance(wire, dict):
        raise BadRequest(reason="the engine's config is not an object")
    if missing := REQUIRED_KEYS - wire.keys():
        raise BadRequest(reason=f"the engine's config lacks {sorted(missing)[0]}")
    if unknown := wire.keys() - REQUIRED_KEYS - OPTIONAL_KEYS:
        raise BadRequest(reason=f"the engine's config has an unknown key {sorted(unknown)[0]!r:.80}")
    texts = {
        key: _text(wire, key)
        for key in ("volume_id", "name", "engine_id", "node", "key_file", "daemon_socket", "control_socket")
    }
    size_bytes = _integer(wire, "size_bytes", VOLUME_BYTES_MIN, VOLUME_BYTES_MAX)
    if size_bytes % BLOCK_BYTES:
        raise BadRequest(reason=f"size_bytes is not a multiple of {BLOCK_BYTES}")
    epoch = _integer(wire, "epoch", 1, 2**63 - 1)
    record = _record(wire["record"])
    if record.epoch >= epoch:
        raise BadRequest(reason=f"the record's epoch {record.epoch} is not before epoch {epoch}")
    wait_s = wire.get("straggler_wait_s", STRAGGLER_WAIT_S)
    if not isinstance(wait_s, int | float) or not 0 <= wait_s <= 3600:
        raise BadRequest(reason="straggler_wait_s is not a number of seconds")
    return EngineConfig(
        **texts,
        size_bytes=size_bytes,
        epoch=epoch,
        replicas=_replicas(wire["replicas"]),
        record=record,
        listeners=_listeners(wire["listeners"]),
        straggler_wait_s=float(wait_s),
        read_only=_flag(wire, "read_only"),
        grant=_grant(wire),
    )


def _grant(wire: dict[str, Any]) -> Grant:
    forked = wire.get("forked", [])
    if not _is_ids(forked):
        raise BadRequest(reason="forked is not a list of replica ids")
    opens = wire.get("opens", {})
    counts = isinstance(opens, dict) and len(opens) <= REPLICAS_MAX
    if not counts or any(type(count) is not int or count < 0 for count in opens.values()):
        raise BadRequest(reason="opens is not a map of replica ids to counts")
    predecessor_ended, override = _flag(wire, "predecessor_ended"), _override(wire.get("override"))
    if override is not None and not predecessor_ended:
        # It may leave a majority to the other side: no lease would keep an older engine there from serving.
        raise BadRequest(reason="override needs predecessor_ended")
    return Grant(
        predecessor_ended=predecessor_ended,
        hints=Hints(opens, _flag(wire, "distrust_store"), override),
        forked=frozenset(forked),
    )


def _override(wire: Any) -> Override | None:
    match wire:
        case None:
            return None
        case {"members": members, "newest": [int(epoch), int(version)]} if members and _is_ids(members):
            return Override(frozenset(members), (epoch, version))
        case _:
            raise BadRequest(reason="override is not {members, newest}")


def _is_ids(wire: Any) -> bool:
    return (
        isinstance(wire, list) and len(wire) <= REPLICAS_MAX and all(isinstance(i, str) and i for i in wire)
    )


def _flag(wire: dict[str, Any], key: str) -> bool:
    value = wire.get(key, False)
    if not isinstance(value, bool):
        raise BadRequest(reason=f"{key} is not true or false")
    return value


def _text(wire: dict[str, Any], key: str) -> str:
    value = wire[key]
    if not isinstance(value, str) or not value:
        raise BadRequest(reason=f"{key} is not a text")
    return value


def _integer(wire: dict[str, Any], key: str, low: int, high: int) -> int:
    value = wire[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadRequest(reason=f"{key} is not a number from {low} to {high}")
    return value


def _record(wire: Any) -> MembershipRecord:
    try:
        return parse_record(wire)
    except ProtocolViolation as error:
        raise BadRequest(reason="record is not a membership record") from error


def _replicas(wire: Any) -> tuple[ReplicaAddress, ...]:
    if not isinstance(wire, list) or not 0 < len(wire) <= REPLICAS_MAX:
        raise BadRequest(reason=f"replicas is not a list of 1 to {REPLICAS_MAX}")
    replicas = [parse_address(item) for item in wire]
    if len({replica.id for replica in replicas}) != len(replicas):
        raise BadRequest(reason="two replicas have one id")
    return tuple(replicas)


def parse_address(wire: Any) -> ReplicaAddress:
    """Raises BadRequest."""
    match wire:
        case {"id": str(id_), "node": str(node), "host": str(host), "port": int(port)} if (
            0 < len(id_) <= ID_CHARS_MAX and host and 0 < port < 65536
        ):
            return ReplicaAddress(id=id_, node=node, host=host, port=port)
        case _:
            raise BadRequest(reason="a replica is not {id, node, host, port}")


def _listeners(wire: Any) -> tuple[Listener, ...]:
    if not isinstance(wire, list):
        raise BadRequest(reason="listeners is not a list")
    listeners = []
    for item in wire:
        match item:
            case {"fd": int(fd), "kind": "unix" | "tcp" as kind} if fd >= 0:
                listeners.append(Listener(fd=fd, kind=kind))
            case _:
                raise BadRequest(reason="a listener is not {fd, kind}")
    return tuple(listeners)


def read_key(path: str) -> bytes:
    """The cluster's key. Raises BadRequest, OSError."""
    with open(path, "rb") as file:
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise BadRequest(reason=f"{path} does not hold a key of {KEY_BYTES} bytes")
    return key
