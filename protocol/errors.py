"""Every error that crosses a process border. ``code`` never changes; messages may.

An error travels as ``{"code", "message", "fields"}``; ``from_wire`` makes the class again.
A class's message is the first paragraph of its docstring, filled with the error's fields; what
follows the first empty line is for whoever reads the code.
"""

from __future__ import annotations

from typing import Any, ClassVar

MESSAGE_CHARS_MAX = 2000
"""Of a message from a peer: enough for a path and a reason, too little to fill a log."""


class _Fields(dict[str, Any]):
    """A message about a failure must not fail itself: a field nobody gave shows its name."""

    def __missing__(self, name: str) -> str:
        return "{" + name + "}"


class StorageError(Exception):
    """Root of every error raised on purpose.

    ``code`` crosses process borders (wire, REST, logs) and never changes. ``retryable`` says
    whether the same request may succeed later without anybody acting.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    _classes: ClassVar[dict[str, type[StorageError]]] = {}

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message or self.template().format_map(_Fields(fields)))
        self.fields = fields

    @classmethod
    def template(cls) -> str:
        first, *_ = (cls.__doc__ or cls.code).split("\n\n", 1)
        return " ".join(first.split())

    def __init_subclass__(cls) -> None:
        assert cls.code not in StorageError._classes, f"two errors with code {cls.code}"
        StorageError._classes[cls.code] = cls

    def to_wire(self) -> dict[str, Any]:
        fields = {name: _plain(value) for name, value in self.fields.items()}
        return {"code": self.code, "message": _plain(str(self)), "fields": fields}


def _plain(value: Any) -> Any:
    """A value that travels: what is not a number, text or a list of them becomes its text."""
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    if value is None or isinstance(value, bytes | int | float):
        return value
    return str(value).encode(errors="replace").decode()  # a path's bytes may be no text


def from_wire(wire: Any) -> StorageError:
    """Make an error of what a peer sent. An unknown code stays readable (``fields["code"]``) and is
    not retried."""
    if not isinstance(wire, dict):
        return ProtocolViolation(expected="an error", got=type(wire).__name__)
    fields = wire.get("fields")
    kept = {str(k): v for k, v in fields.items()} if isinstance(fields, dict) else {}
    code = str(wire.get("code"))[:100]
    cls = StorageError._classes.get(code, StorageError)
    if cls is StorageError:
        kept.setdefault("code", code)
    error = cls.__new__(cls)
    Exception.__init__(error, str(wire.get("message") or code)[:MESSAGE_CHARS_MAX])
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
    """The replica at {path} cannot be opened: {reason}. Its files are left as they are, and the volume's
    other replicas serve; `dolmen replica rebuild` throws it away and fills it from them."""

    code = "replica_damaged"


class NoSpace(StorageError):
    """The disk under {path} is full. Free space there; the replica resumes by itself."""

    code = "no_space"
    retryable = True


class DiskError(StorageError):
    """The disk under {path} failed: {reason}"""

    code = "disk_error"


class DiskRefused(StorageError):
    """{path} is not served: {reason}

    Nothing was written to it. What is there may be somebody's data (C22).
    """

    code = "disk_refused"


class SourceFailed(StorageError):
    """Volume {volume}: the source of a resync failed: {reason}"""

    code = "source_failed"
    retryable = True


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
    """No daemon answers for the cluster in {dir}. `dolmen up --dir {dir} --detach` starts it,
    `dolmen why --dir {dir}` says what is in its way."""

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
