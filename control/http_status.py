"""Error code -> HTTP status. The only place that knows both vocabularies; tested to be complete."""

from __future__ import annotations

from collections.abc import Mapping

from protocol.errors import StorageError

HTTP_STATUS: Mapping[str, int] = {
    "bad_request": 400,
    "conflict": 409,
    "daemon_unreachable": 503,
    "disk_error": 500,
    "disk_refused": 500,
    "internal": 500,
    "job_not_found": 404,
    "name_not_found": 404,
    "no_space": 507,
    "no_such_route": 404,
    "node_not_found": 404,
    "not_authenticated": 401,
    "not_enough_nodes": 503,
    "not_enough_replicas": 503,
    "protocol_violation": 502,
    "replica_damaged": 500,
    "replica_not_found": 404,
    "request_too_large": 413,
    "shrink_refused": 409,
    "shutting_down": 503,
    "source_failed": 502,
    "stale_epoch": 409,
    "state_store_gone": 500,
    "timeout": 504,
    "unreachable": 502,
    "volume_exists_with_other_spec": 409,
    "volume_in_use": 409,
    "volume_not_attached": 409,
    "volume_not_found": 404,
}


def http_status(error: StorageError) -> int:
    return HTTP_STATUS.get(error.code, 500)
