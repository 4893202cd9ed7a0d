"""The engine's line to the state store, which is the daemon's socket.

Owns keeping a connection up, and storing the newest wanted record: a record that was replaced before it was
stored is not sent any more. Does not own which records are made or when they count (``volume.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from engine.backoff import Backoff
from engine.events import Event, Fenced, RecordStored, StoreDown, StoreRecord, StoreUp
from engine.limits import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, RECONNECT_BASE_S, RECONNECT_CAP_S
from protocol.errors import StaleEpoch, StorageError
from protocol.rpc import RpcClient


class StoreLink:
    def __init__(
        self, path: str, *, volume_id: str, epoch: int, random: Random, post: Callable[[Event], None]
    ) -> None:
        self._path = path
        self._volume_id = volume_id
        self._epoch = epoch
        self._backoff = Backoff(random, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S)
        self._post = post
        self._wanted: StoreRecord | None = None
        self._changed = asyncio.Event()

    def store(self, wanted: StoreRecord) -> None:
        """Until it is stored, or another takes its place."""
        self._wanted = wanted
        self._changed.set()

    async def run(self) -> None:
        """Keep trying until cancelled."""
        while True:
            try:
                client = await RpcClient.connect_unix(self._path, timeout_s=CONNECT_TIMEOUT_S)
            except StorageError as error:
                self._post(StoreDown(str(error)))
            else:
                try:
                    self._post(StoreUp())
                    await self._serve(client)
                finally:
                    await client.close()
            await asyncio.sleep(self._backoff.next_delay_s())

    async def _serve(self, client: RpcClient) -> None:
        """Until the connection is lost or the store refuses."""
        lost = asyncio.ensure_future(client.lost.wait())
        try:
            while not lost.done():
                if self._wanted is not None and not await self._store_one(client, self._wanted):
                    return
                if self._wanted is None:
                    self._changed.clear()
                    changed = asyncio.ensure_future(self._changed.wait())
                    try:
                        await asyncio.wait({lost, changed}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        changed.cancel()
            self._post(StoreDown("connection lost"))
        finally:
            lost.cancel()

    async def _store_one(self, client: RpcClient, wanted: StoreRecord) -> bool:
        try:
            await client.call(
                "store.record",
                timeout_s=CALL_TIMEOUT_S,
                volume_id=self._volume_id,
                epoch=self._epoch,
                record=wanted.record.to_wire(),
                opens=dict(wanted.opens),
            )
        except StaleEpoch:
            self._post(Fenced("the state store"))
            self._wanted = None
            return False
        except StorageError as error:
            self._post(StoreDown(str(error)))
            return False
        self._backoff.reset()
        if self._wanted == wanted:
            self._wanted = None
        self._post(RecordStored(wanted.record.stamp))
        return True
