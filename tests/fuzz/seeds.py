"""Valid inputs that the mutations of ``parsers.py`` begin with. Values only."""

from __future__ import annotations

import json
import struct

from tests.engine import nbd_messages as nbd
from tests.engine.test_config import good as engine_config

ENGINE_CONFIG = engine_config()

DISK_JSON = json.dumps({"format": "dolmen-disk", "version": 1, "disk_id": "d", "node_id": "n"}).encode()

REST_BODY = json.dumps({"name": "v1", "size_bytes": 1 << 30, "replica_count": 3}).encode()


def _option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">IH", number, len(data)) + data


NEGOTIATIONS = tuple(
    nbd.FIXED_NO_ZEROES + b"".join(options)
    for options in (
        [_option(nbd.STRUCTURED_REPLY), _option(nbd.GO, nbd.info_data(b"main", [3]))],
        [_option(nbd.LIST), _option(nbd.INFO, nbd.info_data(b"", [0, 1, 2, 3]))],
        [
            _option(nbd.STRUCTURED_REPLY),
            _option(nbd.SET_META_CONTEXT, nbd.meta_data(b"main", [b"base:allocation"])),
            _option(nbd.GO, nbd.info_data(b"main")),
        ],
        [_option(nbd.LIST_META_CONTEXT, nbd.meta_data(b"main", [b"base:", b"x"])), _option(nbd.EXPORT_NAME)],
    )
)
