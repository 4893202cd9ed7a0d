"""What engines may ask of the daemon: to hold a membership record durably.

Owns the socket ``engine-rpc.sock`` and the rule by which a record enters the state store: only from
the holder of the newest epoch, and only newer than what is there. Does not own when a record is
committed (that is the engine's, with the store as one voter).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from control.documents import Store
from control.executor import change_volume_status
from control.listeners import listen_unix
from control.model import KIND_VOLUME, VolumeSpec, VolumeStatus, record_from_wire, record_of
from control.stamp import StateStamp
from control.trust import with_record
from protocol.errors import BadRequest, Conflict, StaleEpoch, VolumeNotFound
from protocol.limits import REPLICAS_MAX
from protocol.rpc import serve_calls

CONNECTIONS_MAX = 1024
"""One per engine; engines of one machine are far fewer."""

OPENS_MAX = 2**62
"""Of one replica. Its server counts; past this it is no count."""


class EngineCalls:
    """Answers calls. Pure but for the store."""

    def __init__(self, store: Store, stamp: StateStamp) -> None:
        self._store = store
        self._stamp = stamp
        self._names: dict[str, str] = {}  # by volume id; ids are never used again

    async def answer(self, call: str, args: dict[str, Any]) -> Any:
        match call, args:
            case "store.record", {"volume_id": str(volume_id), "epoch": int(epoch), "record": record}:
                await self._record(volume_id, epoch, record, _opens(args.get("opens", {})))
                return {}
            case "store.record", _:
                raise BadRequest(reason="store.record takes volume_id, epoch, record and opens")
            case _:
                raise BadRequest(reason=f"there is no call {call[:100]}")

    async def _record(self, volume_id: str, epoch: int, wire: Any, opens: dict[str, int]) -> None:
        """Durable when it returns, the state's stamp too. Repeating the same record is harmless."""
        name = await self._name_of(volume_id)
        record = record_from_wire(wire)

        def change(status: VolumeStatus) -> VolumeStatus:
            if epoch != status.epoch or record.epoch != epoch:
                raise StaleEpoch(volume=name, offered=min(epoch, record.epoch), current=status.epoch)
            if record == status.record:
                return status
            if (record.epoch, record.version) <= record_of(status).stamp:
                raise Conflict(kind="record of volume", name=name, revision=status.record.version)
            unknown = set(record.in_sync) - status.replica_size_bytes.keys()
            if unknown or not record.in_sync:
                raise BadRequest(reason=f"in_sync is empty or names replicas nobody knows: {sorted(unknown)}")
            now = datetime.now(UTC).isoformat(timespec="seconds")
            return with_record(status, record, opens, now)

        stored = await change_volume_status(self._store, name, change)
        # Also for a repeated one: the stamp may be what failed the time before.
        await self._stamp.advance(stored.revision)

    async def _name_of(self, volume_id: str) -> str:
        if volume_id not in self._names:
            for document in await self._store.list(KIND_VOLUME):
                self._names[VolumeSpec.model_validate(document.spec).volume_id] = document.name
        name = self._names.get(volume_id)
        found = await self._store.get(KIND_VOLUME, name) if name else None
        if name is None or found is None or found.spec["volume_id"] != volume_id:
            raise VolumeNotFound(volume=volume_id[:100])
        return name


def _opens(wire: Any) -> dict[str, int]:
    """Raises BadRequest."""
    if not isinstance(wire, dict) or len(wire) > REPLICAS_MAX:
        raise BadRequest(reason="opens is not a map of replicas")
    for replica, count in wire.items():
        if not isinstance(replica, str) or type(count) is not int or not 0 <= count <= OPENS_MAX:
            raise BadRequest(reason="opens is not a map of replica ids to counts")
    return dict(wire)


@asynccontextmanager
async def serve_engines(path: Path, calls: EngineCalls) -> AsyncIterator[None]:
    """Listen until the block ends; then every connection is closed. The socket's mode is 0600: who
    may connect is who may read our files anyway."""
    connections: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            if len(connections) <= CONNECTIONS_MAX:
                await serve_calls(reader, writer, calls.answer)
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_unix_server(serve, sock=listen_unix(path))
    try:
        yield
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
