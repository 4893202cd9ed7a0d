"""Control connections from the daemon to replica servers and engines, opened when first needed.

Owns reconnecting: a call over a connection that was lost opens a new one, once. Does not own what
the calls mean (PROTOCOL.md) or retrying a call that failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from protocol.connect import connect
from protocol.errors import Unreachable
from protocol.limits import RPC_TIMEOUT_S
from protocol.rpc import RpcClient

CONNECT_TIMEOUT_S = 3.0
"""On one machine a server that lives answers in milliseconds."""

ASK_TIMEOUT_S = 1.0
"""A question for a table that a person waits for: who does not answer is shown as not answering."""

DAEMON_ID = "daemon"


class Link:
    """Calls to one peer. Safe for concurrent use."""

    def __init__(self, peer: str, connect_once: Callable[[], Awaitable[RpcClient]]) -> None:
        self.peer = peer
        self._connect_once = connect_once
        self._client: RpcClient | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def call(self, name: str, /, *, timeout_s: float = RPC_TIMEOUT_S, **args: Any) -> Any:
        """Raises the peer's error, Unreachable or Timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                client = await self._connected()
        except TimeoutError as error:
            raise Unreachable(peer=self.peer, reason=f"no connection within {timeout_s} s") from error
        return await client.call(name, timeout_s=timeout_s, **args)

    async def _connected(self) -> RpcClient:
        async with self._connecting:
            if self._closed:
                raise Unreachable(peer=self.peer, reason="closed here")
            if self._client is None or self._client.lost.is_set():
                await self._drop()
                self._client = await self._connect_once()
            return self._client

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def close(self) -> None:
        self._closed = True
        async with self._connecting:
            await self._drop()


def replica_server_link(host: str, port: int, *, key: bytes, node: str) -> Link:
    async def connect_once() -> RpcClient:
        streams = await connect(host, port, key=key, engine_id=DAEMON_ID, timeout_s=CONNECT_TIMEOUT_S)
        return RpcClient(*streams, peer=f"replica server of {node}")

    return Link(f"replica server of {node}", connect_once)


def engine_link(path: str, *, volume: str) -> Link:
    async def connect_once() -> RpcClient:
        return await RpcClient.connect_unix(path, timeout_s=CONNECT_TIMEOUT_S)

    return Link(f"engine of {volume}", connect_once)
