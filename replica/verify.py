"""Verifies a replica's directory while no server runs: ``python -m replica.verify DIRECTORY``.

Owns the walk over the regions and the report. Does not own reading and checking blocks (the data plane).
Opening recovers the replica, as its server would at the next start, and takes the same lock: while a
server runs this is refused, and ``replica.verify`` at the server is the way.

Exit code 0: every block verifies. 1: some do not, named in the report. 2: the replica cannot be opened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from protocol.errors import StorageError
from protocol.limits import REGION_BYTES
from replica.checksum import xxh3_64
from replica.io_path import IoPath
from replica.metadata import ReplicaMeta, read_meta

SLICE_REGIONS = 64
"""Regions of one call: 256 MiB, so that progress shows and an interrupt is heard. The digest of the whole
depends on it, so it is the same everywhere."""

DAMAGED_LISTED_MAX = 1000
"""Block numbers kept in a report; beyond it only the count goes on."""

VerifySlice = Callable[[int, int], Awaitable[dict[str, Any]]]
"""(first_region, region_count) -> the answer of replica.verify."""


@dataclass(slots=True)
class VerifyReport:
    """What verifying found. Equal ``digest``s of equal sizes mean equal bytes."""

    volume_id: str
    replica_id: str
    size_bytes: int
    blocks_verified: int = 0
    blocks_zero: int = 0
    damaged_count: int = 0
    damaged: list[int] = field(default_factory=list)
    digest: str = ""


async def verify_regions(report: VerifyReport, verify: VerifySlice) -> None:
    """Fill ``report`` slice by slice. Also for a replica behind a server: hand in its call."""
    digests = bytearray()
    region_count = -(-report.size_bytes // REGION_BYTES)
    for first in range(0, region_count, SLICE_REGIONS):
        found = await verify(first, min(SLICE_REGIONS, region_count - first))
        report.blocks_verified += found["blocks_verified"]
        report.blocks_zero += found["blocks_zero"]
        report.damaged_count += found["damaged_count"]
        report.damaged += found["damaged"][: DAMAGED_LISTED_MAX - len(report.damaged)]
        digests += found["digest"].to_bytes(8, "little")
    report.digest = f"{xxh3_64(bytes(digests)):016x}"


async def verify_directory(path: str) -> VerifyReport:
    """Open, verify and close the replica in ``path``. Raises StorageError."""
    path = os.path.abspath(path)  # noqa: ASYNC240 - looks at the working directory only
    io = IoPath(path)
    try:
        meta = await io.run_long(read_meta, path)
        await _open(io, path, meta)
        report = VerifyReport(meta.volume_id, meta.replica_id, meta.size_bytes)

        async def verify(first_region: int, region_count: int) -> dict[str, Any]:
            return await io.verify(meta.volume_id, first_region=first_region, region_count=region_count)

        await verify_regions(report, verify)
        await io.close_store(meta.volume_id)
        return report
    finally:
        await io.shutdown()


async def _open(io: IoPath, path: str, meta: ReplicaMeta) -> None:
    await io.open_store(
        meta.volume_id,
        path,
        chain=meta.chain,
        size_bytes=meta.size_bytes,
        epoch=meta.epoch,
        stamp=meta.record.stamp,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replica.verify", description="Verify a replica while no server runs."
    )
    parser.add_argument("directory", help="…/replicas/VOLUME_ID")
    directory = parser.parse_args(argv).directory
    try:
        report = asyncio.run(verify_directory(directory))
    except StorageError as error:
        print(json.dumps({"error": error.code, "message": str(error)}))
        return 2
    print(json.dumps(asdict(report)))
    return 0 if report.damaged_count == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
