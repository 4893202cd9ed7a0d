"""Talks to an engine's control socket: the daemon's side of PROTOCOL.md's engine calls, typed.

Owns one connection and the deadline of each call. Does not own what the calls do (``engine/rpc_api.py``), or
when an engine is asked (``control/engines.py``).

Promises: every call ends, with the engine's answer, its error, Unreachable or Timeout; none is repeated here.
"""

from __future__ import annotations

from typing import Any

from protocol.limits import RPC_TIMEOUT_S
from protocol.rpc import RpcClient

DETACH_TIMEOUT_S = 60.0
REPAIR_CALL_TIMEOUT_S = 120.0
"""A detach flushes all replicas: seconds on a slow disk."""


class EngineClient:
    """``async with await EngineClient.connect(path) as engine:``. Raises Unreachable, Timeout, or the
    engine's error."""

    def __init__(self, rpc: RpcClient) -> None:
        self.rpc = rpc

    @classmethod
    async def connect(cls, path: str, *, timeout_s: float = RPC_TIMEOUT_S) -> EngineClient:
        return cls(await RpcClient.connect_unix(path, timeout_s=timeout_s))

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.rpc.close()

    async def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = await self.rpc.call("engine.status")
        return answer

    async def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = await self.rpc.call("engine.stats")
        return answer

    async def resize(self, size_bytes: int) -> None:
        """Safe to repeat. Raises ShrinkRefused."""
        await self.rpc.call("engine.resize", timeout_s=DETACH_TIMEOUT_S, size_bytes=size_bytes)

    async def repair(self, replica: str, blocks: list[int]) -> dict[str, Any]:
        """What became of each: repaired, unreadable, left, and why some are left."""
        answer: dict[str, Any] = await self.rpc.call(
            "engine.repair", timeout_s=REPAIR_CALL_TIMEOUT_S, replica=replica, blocks=blocks
        )
        return answer

    async def detach(self) -> None:
        """The engine ends after its answer."""
        await self.rpc.call("engine.detach", timeout_s=DETACH_TIMEOUT_S)
