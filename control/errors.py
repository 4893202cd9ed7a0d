"""Errors that only the control plane and its clients know. They travel as those of ``protocol.errors``."""

from __future__ import annotations

from protocol.errors import StorageError


class NodeNotFound(StorageError):
    """There is no node {node}. `dolmen node ls` lists what exists."""

    code = "node_not_found"


class NameNotFound(StorageError):
    """There is no node, volume or replica {name}. `dolmen status` lists what exists."""

    code = "name_not_found"


class JobNotFound(StorageError):
    """There is no job {job}; finished jobs are forgotten when the daemon restarts. Start it again."""

    code = "job_not_found"


class NoSuchRoute(StorageError):
    """There is no {method} {path}. /openapi.json lists what exists."""

    code = "no_such_route"


class RequestTooLarge(StorageError):
    """The request body is over {limit_bytes} bytes."""

    code = "request_too_large"


class ShuttingDown(StorageError):
    """The daemon is shutting down. `dolmen up` starts it again."""

    code = "shutting_down"
    retryable = True


class StateStoreGone(StorageError):
    """{path} is gone, and this directory has had one. Put it back, or
    `dolmen recover --from-disks --dir {dir}` makes it anew from what the disks say of themselves."""

    code = "state_store_gone"
