"""Every error that crosses a process border. ``code`` never changes; messages may.

An error travels as ``{"code", "message", "fields"}``; ``from_wire`` makes the class again.
"""

from __future__ import annotations

from typing import Any, ClassVar


class StorageError(Exception):
    """Root of every error raised on purpose.

    ``code`` crosses process borders (wire, REST, logs) and never changes. ``retryable`` says
    whether the same request may succeed later without anybody acting.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    _classes: ClassVar[dict[str, type[StorageError]]] = {}

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message or self.template().format_map(fields))
        self.fields = fields

    @classmethod
    def template(cls) -> str:
        return (cls.__doc__ or cls.code).split("\n", 1)[0]

    def __init_subclass__(cls) -> None:
        assert cls.code not in StorageError._classes, f"two errors with code {cls.code}"
        StorageError._classes[cls.code] = cls

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": str(self), "fields": self.fields}


def from_wire(wire: Any) -> StorageError:
    """Make an error of what a peer sent. An unknown code stays readable and is not retried."""
    if not isinstance(wire, dict):
        return ProtocolViolation(expected="an error", got=type(wire).__name__)
    fields = wire.get("fields")
    kept = {str(k): v for k, v in fields.items()} if isinstance(fields, dict) else {}
    cls = StorageError._classes.get(str(wire.get("code")), StorageError)
    error = cls.__new__(cls)
    Exception.__init__(error, str(wire.get("message", ""))[:2000])
    error.fields = kept
    return error


def all_error_classes() -> dict[str, type[StorageError]]:
    return dict(StorageError._classes)


class ProtocolViolation(StorageError):
    """The peer broke the protocol: expected {expected}, got {got}."""

    code = "protocol_violation"


class NotAuthenticated(StorageError):
    """The peer did not prove that it belongs to this cluster."""

    code = "not_authenticated"


class StaleEpoch(StorageError):
    """volume {volume}: epoch {offered} is older than {current}

    The writer has been fenced: another engine owns the volume. Retrying cannot help.
    """

    code = "stale_epoch"


class BadRequest(StorageError):
    """The request is not valid: {reason}"""

    code = "bad_request"


class VolumeNotFound(StorageError):
    """There is no volume {volume}. `dolmen volume ls` lists what exists."""

    code = "volume_not_found"


class VolumeExistsWithOtherSpec(StorageError):
    """Volume {volume} exists with another {difference}. `dolmen volume show {volume}` prints it."""

    code = "volume_exists_with_other_spec"


class VolumeInUse(StorageError):
    """Volume {volume} is attached. `dolmen volume detach {volume}` first."""

    code = "volume_in_use"


class VolumeNotAttached(StorageError):
    """Volume {volume} is not attached. `dolmen volume attach {volume}` first."""

    code = "volume_not_attached"


class ShrinkRefused(StorageError):
    """Volume {volume} has {current} bytes; shrinking to {wanted} would lose data and is refused."""

    code = "shrink_refused"


class ReplicaNotFound(StorageError):
    """This disk has no replica of volume {volume}."""

    code = "replica_not_found"


class ReplicaDamaged(StorageError):
    """The replica at {path} cannot be opened: {reason}. It will be rebuilt from the others;
    `dolmen replica verify` tells the state."""

    code = "replica_damaged"


class NoSpace(StorageError):
    """The disk under {path} is full. Free space there; the replica resumes by itself."""

    code = "no_space"
    retryable = True


class DiskError(StorageError):
    """The disk under {path} failed: {reason}"""

    code = "disk_error"


class NotEnoughNodes(StorageError):
    """{wanted} replicas need {wanted} nodes that are up; there are {available}."""

    code = "not_enough_nodes"
    retryable = True


class NotEnoughReplicas(StorageError):
    """Volume {volume} waits for replicas {missing}: one of them may hold newer data."""

    code = "not_enough_replicas"
    retryable = True


class Conflict(StorageError):
    """{kind} {name} changed meanwhile (revision {revision}). Read it again and retry."""

    code = "conflict"
    retryable = True


class DaemonUnreachable(StorageError):
    """No daemon answers for the cluster in {dir}. `dolmen up --dir {dir}` starts it."""

    code = "daemon_unreachable"
    retryable = True


class Unreachable(StorageError):
    """{peer} does not answer: {reason}"""

    code = "unreachable"
    retryable = True


class Timeout(StorageError):
    """{what} took longer than {timeout_s} s."""

    code = "timeout"
    retryable = True
