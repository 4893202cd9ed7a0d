"""Talks to a replica server over a control connection: the daemon's and the command line's side.

Owns the typed form of the calls in PROTOCOL.md. Does not own reconnecting: a client whose connection is
lost stays lost, and its owner makes another. Every method raises the server's StorageError, Unreachable
or Timeout; every one may be repeated.
"""

from __future__ import annotations

import asyncio
from typing import Any

from protocol.connect import connect
from protocol.limits import RPC_TIMEOUT_S
from protocol.membership import MembershipRecord
from protocol.regions import pack_regions, unpack_regions
from protocol.rpc import RpcClient

VERIFY_TIMEOUT_S = 120.0
"""One slice of a verification: 4 GiB from a disk that gives 40 MiB/s."""

LONG_TIMEOUT_S = 600.0
"""Calls that flush or pull: as long as a busy disk may take to write back what it holds."""


class ReplicaClient:
    """One control connection. ``async with await ReplicaClient.connect(...) as client:``"""

    def __init__(self, rpc: RpcClient) -> None:
        self.rpc = rpc

    @classmethod
    async def connect(
        cls, host: str, port: int, key: bytes, *, client_id: str = "daemon", timeout_s: float = RPC_TIMEOUT_S
    ) -> ReplicaClient:
        """Raises Unreachable, NotAuthenticated or ProtocolViolation."""
        reader, writer = await connect(host, port, key=key, engine_id=client_id, timeout_s=timeout_s)
        return cls(RpcClient(reader, writer, peer=f"{host}:{port}"))

    async def __aenter__(self) -> ReplicaClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.rpc.close()

    @property
    def lost(self) -> asyncio.Event:
        return self.rpc.lost

    async def status(self) -> dict[str, Any]:
        return await self._call("server.status")

    async def create(
        self, volume_id: str, *, replica_id: str, name: str, size_bytes: int, timeout_s: float = RPC_TIMEOUT_S
    ) -> dict[str, Any]:
        return await self._call(
            "replica.create",
            timeout_s=timeout_s,
            volume_id=volume_id,
            replica_id=replica_id,
            name=name,
            size_bytes=size_bytes,
        )

    async def delete(self, volume_id: str) -> None:
        await self._call("replica.delete", volume_id=volume_id)

    async def inspect(self, volume_id: str) -> dict[str, Any]:
        return await self._call("replica.inspect", volume_id=volume_id)

    async def claim(self, volume_id: str, *, epoch: int, engine_id: str, opens: int = 0) -> dict[str, Any]:
        return await self._call(
            "replica.claim", volume_id=volume_id, epoch=epoch, engine_id=engine_id, opens=opens
        )

    async def persist_record(self, volume_id: str, *, epoch: int, record: MembershipRecord) -> None:
        await self._call("replica.persist_record", volume_id=volume_id, epoch=epoch, record=record.to_wire())

    async def dirty_regions(self, volume_id: str) -> list[int]:
        answer = await self._call("replica.dirty_regions", volume_id=volume_id)
        return unpack_regions(answer.get("regions"))

    async def changed_since(self, volume_id: str, *, stamp: tuple[int, int]) -> list[int]:
        epoch, version = stamp
        answer = await self._call("replica.changed_since", volume_id=volume_id, epoch=epoch, version=version)
        return unpack_regions(answer.get("regions"))

    async def begin_resync(self, volume_id: str, *, epoch: int, regions: list[int]) -> None:
        packed = pack_regions(regions)
        await self._call("replica.begin_resync", volume_id=volume_id, epoch=epoch, regions=packed)

    async def pull_regions(
        self,
        volume_id: str,
        *,
        epoch: int,
        source: tuple[str, int],
        regions: list[int],
        **options: int | bool,
    ) -> dict[str, Any]:
        """``options``: rate_bytes_s, take_damaged."""
        return await self._call(
            "replica.pull_regions",
            timeout_s=LONG_TIMEOUT_S,
            volume_id=volume_id,
            epoch=epoch,
            source=list(source),
            regions=pack_regions(regions),
            **options,
        )

    async def end_resync(self, volume_id: str, *, epoch: int) -> None:
        await self._call("replica.end_resync", timeout_s=LONG_TIMEOUT_S, volume_id=volume_id, epoch=epoch)

    async def complete_regions(self, volume_id: str, *, epoch: int, regions: list[int]) -> None:
        packed = pack_regions(regions)
        await self._call("replica.complete_regions", volume_id=volume_id, epoch=epoch, regions=packed)

    async def detach_clean(self, volume_id: str, *, epoch: int) -> None:
        await self._call("replica.detach_clean", timeout_s=LONG_TIMEOUT_S, volume_id=volume_id, epoch=epoch)

    async def resize(self, volume_id: str, *, size_bytes: int) -> None:
        await self._call("replica.resize", volume_id=volume_id, size_bytes=size_bytes)

    async def verify(self, volume_id: str, *, first_region: int, region_count: int) -> dict[str, Any]:
        return await self._call(
            "replica.verify",
            timeout_s=VERIFY_TIMEOUT_S,
            volume_id=volume_id,
            first_region=first_region,
            region_count=region_count,
        )

    async def scrub(self, volume_id: str, action: str, *, rate_bytes_s: int = 0) -> dict[str, Any]:
        return await self._call(
            "replica.scrub", volume_id=volume_id, action=action, rate_bytes_s=rate_bytes_s
        )

    async def damaged(self, volume_id: str, *, check: bool = False) -> dict[str, Any]:
        return await self._call(
            "replica.damaged", timeout_s=VERIFY_TIMEOUT_S, volume_id=volume_id, check=check
        )

    async def stats(self, volume_id: str) -> dict[str, Any]:
        return await self._call("replica.stats", volume_id=volume_id)

    async def _call(self, call: str, /, *, timeout_s: float = RPC_TIMEOUT_S, **args: Any) -> dict[str, Any]:
        answer: dict[str, Any] = await self.rpc.call(call, timeout_s=timeout_s, **args)
        return answer
