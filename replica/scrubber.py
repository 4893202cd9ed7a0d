"""Scrubs the replicas of one disk, one slice after the other: the doing of what ``scrub.py`` decides.

Owns each replica's ScrubState in memory, its file, and the task that walks. Does not own the decisions, the
reading (the data plane's verify), or repair.

Promises: one slice at a time on a disk; nothing is read while nobody is due; a killed server goes on where
the file says. No failure here disturbs a replica: a pass that meets one is given up and tried again later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from protocol.errors import BadRequest, StorageError
from protocol.limits import REGION_BLOCKS, REGION_BYTES
from replica import scrub
from replica.io_path import IoPath
from replica.scrub import Pass, ScrubState
from replica.scrub_file import drop_cached, read_scrub, write_scrub

if TYPE_CHECKING:
    from replica.replicas import Replica

log = logging.getLogger("dolmen.replica")

SAVE_REGIONS = 64
SAVE_INTERVAL_S = 10.0
"""The position is written down after so much, whichever comes first: what a kill costs is read again."""

CHECKED_REGIONS_MAX = 64
"""Regions that one replica.damaged call reads again: 256 MiB, so that it ends while its caller waits."""


@dataclass(slots=True)
class _Entry:
    replica: Replica
    state: ScrubState
    saved: ScrubState | None = None
    saved_at_s: float = 0.0
    stride: int = 1
    rate_bytes_s: int = 0
    pass_number: int = 0  # a slice of an earlier pass changes nothing
    counted_blocks: int = 0  # verified since the server started, over all passes
    counted_damaged: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # of the file


class Scrubber:
    def __init__(
        self,
        io: IoPath,
        replicas: Callable[[], Iterable[Replica]],
        *,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._io = io
        self._replicas = replicas
        self._wall_s = wall_s
        self._entries: dict[str, _Entry] = {}
        self._wake = asyncio.Event()
        self._client_ops: dict[str, int] = {}
        self._client_ops_at_s = 0.0

    # -- the walk

    def wake(self) -> None:
        """Somebody was opened, or asks: look who is next."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            entries = await self._known()
            now_s = int(self._wall_s())
            for entry in entries.values():
                begun = scrub.begun_if_due(entry.state, now_s=now_s)
                if begun is not entry.state:
                    await self._begin(entry, begun)
            states = {volume_id: entry.state for volume_id, entry in entries.items()}
            chosen = scrub.choose(states)
            if chosen is not None:
                await self._slice(entries[chosen])
                continue
            await self._wait(scrub.seconds_to_look(states, now_s=now_s))

    async def _known(self) -> dict[str, _Entry]:
        """The replicas that are open, each with what its file says."""
        alive = {replica.volume_id: replica for replica in self._replicas()}
        for volume_id in self._entries.keys() - alive.keys():
            del self._entries[volume_id]
        return {v: await self._entry(replica) for v, replica in alive.items() if replica.is_open}

    async def _entry(self, replica: Replica) -> _Entry:
        known = self._entries.get(replica.volume_id)
        if known is not None and known.replica is replica:
            return known
        state = await self._io.run_short(read_scrub, replica.path)
        known = self._entries.get(replica.volume_id)
        if known is not None and known.replica is replica:
            return known  # somebody else asked meanwhile
        first = scrub.first_state(replica_id=replica.replica_id, now_s=int(self._wall_s()))
        entry = _Entry(replica, state or first, saved=state, saved_at_s=self._now_s())
        self._entries[replica.volume_id] = entry
        await self._save(entry)
        return entry

    async def _begin(self, entry: _Entry, state: ScrubState) -> None:
        entry.state, entry.stride = state, 1
        entry.pass_number += 1
        await self._save(entry)
        log.info("scrub begun volume=%s kind=%s", entry.replica.volume_id, state.running.value)

    async def _slice(self, entry: _Entry) -> None:
        number, first = entry.pass_number, entry.state.position
        total = self._total(entry)
        if first >= total:
            entry.state = scrub.finished(entry.state, now_s=int(self._wall_s()))
            await self._save(entry)
            log.info("scrub done volume=%s blocks_verified=%d found=%d", entry.replica.volume_id,
                     entry.state.blocks_verified, entry.state.found_count)  # fmt: skip
            return
        count = min(entry.stride, total - first)
        began_s = self._now_s()
        try:
            found = await self._verify(entry, first, count)
        except StorageError as error:
            if entry.pass_number == number:
                entry.state = scrub.stopped(entry.state, due_s=int(self._wall_s()) + scrub.RETRY_S)
                await self._save(entry)
            log.warning("scrub given up volume=%s region=%d error=%s", entry.replica.volume_id, first, error)
            return
        entry.counted_blocks += found["blocks_verified"]
        if entry.pass_number != number or entry.state.running is Pass.NONE:
            return  # stopped, or begun anew, meanwhile
        before = entry.state
        entry.counted_damaged += found["damaged_count"]
        entry.state = scrub.verified(
            before,
            first_region=first,
            region_count=count,
            blocks_verified=found["blocks_verified"],
            damaged=found["damaged"],
            damaged_count=found["damaged_count"],
        )
        entry.stride = scrub.next_stride(entry.stride, blocks_verified=found["blocks_verified"])
        await self._save_if_due(entry)
        await self._rest(entry, found["blocks_verified"], self._now_s() - began_s)

    async def _verify(self, entry: _Entry, first: int, count: int) -> dict[str, Any]:
        replica = entry.replica
        for layer in replica.chain:
            data = os.path.join(replica.path, layer, "data")
            await self._io.run_long(
                drop_cached, data, offset_bytes=first * REGION_BYTES, length_bytes=count * REGION_BYTES
            )
        return await replica.verify(first_region=first, region_count=count)

    async def _rest(self, entry: _Entry, blocks_verified: int, took_s: float) -> None:
        """Until the next slice may begin, or until somebody wants something: it may be more urgent."""
        if not blocks_verified:
            return
        delay_s = scrub.pause_s(
            running=entry.state.running,
            blocks_verified=blocks_verified,
            took_s=took_s,
            busy=await self._busy(),
            rate_bytes_s=entry.rate_bytes_s,
        )
        await self._wait(delay_s)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _busy(self) -> bool:
        """Whether clients kept this disk at work since the last look."""
        now_s, ops = self._now_s(), {}
        for replica in self._replicas():
            if replica.is_open and replica.data_sessions:
                try:
                    stats = await replica.stats()
                except StorageError:
                    continue
                ops[replica.volume_id] = stats.get("reads", 0) + stats.get("writes", 0)
        done = sum(max(0, count - self._client_ops.get(volume_id, count)) for volume_id, count in ops.items())
        window_s = now_s - self._client_ops_at_s
        self._client_ops, self._client_ops_at_s = ops, now_s
        return scrub.is_busy(client_ops=done, window_s=window_s)

    # -- the file

    async def _save_if_due(self, entry: _Entry) -> None:
        saved, state = entry.saved, entry.state
        if (
            saved is None
            or state.damaged != saved.damaged
            or state.position - saved.position >= SAVE_REGIONS
            or self._now_s() - entry.saved_at_s >= SAVE_INTERVAL_S
        ):
            await self._save(entry)

    async def _save(self, entry: _Entry) -> None:
        async with entry.lock:
            state = entry.state
            if state == entry.saved or not entry.replica.is_open:
                return
            entry.saved_at_s = self._now_s()
            try:
                await self._io.run_short(write_scrub, entry.replica.path, state)
                entry.saved = state
            except StorageError as error:
                log.info("scrub not written down volume=%s error=%s", entry.replica.volume_id, error)

    async def save_all(self) -> None:
        """The server stops."""
        for entry in list(self._entries.values()):
            await self._save(entry)

    # -- what others ask

    async def start(self, replica: Replica, *, rate_bytes_s: int) -> dict[str, Any]:
        entry = await self._entry(replica)
        started = scrub.started(entry.state)
        entry.rate_bytes_s = rate_bytes_s
        if started is not entry.state:
            await self._begin(entry, started)
        self.wake()
        return self._status(entry)

    async def stop(self, replica: Replica) -> dict[str, Any]:
        entry = await self._entry(replica)
        due_s = int(self._wall_s()) + scrub.SCRUB_PERIOD_S
        entry.state = scrub.stopped(entry.state, due_s=due_s)
        await self._save(entry)
        return self._status(entry)

    async def status(self, replica: Replica) -> dict[str, Any]:
        return self._status(await self._entry(replica))

    def _status(self, entry: _Entry) -> dict[str, Any]:
        state = entry.state
        return {
            "state": state.running.value,
            "position": state.position,
            "total": self._total(entry),
            "blocks_verified": state.blocks_verified,
            "found": state.found_count,
            "damaged_count": len(state.damaged),
            "last_done": state.last_done_s,
            "passes": state.passes_count,
            "due": state.due_s,
        }

    async def damaged(self, replica: Replica, *, check: bool) -> dict[str, Any]:
        """With ``check`` the regions of the known ones are read again first, so that what was repaired or
        overwritten is not among them."""
        entry = await self._entry(replica)
        regions = sorted({block // REGION_BLOCKS for block in entry.state.damaged})
        total = self._total(entry)
        checked = [region for region in regions if region < total][:CHECKED_REGIONS_MAX] if check else []
        for region in checked:
            found = await self._verify(entry, region, 1)
            entry.state = scrub.checked(
                entry.state, first_region=region, region_count=1, damaged=found["damaged"]
            )
        await self._save(entry)
        return {
            "blocks": list(entry.state.damaged),
            "all_checked": check and len(checked) == len(regions),
        }

    def note_damaged(self, volume_id: str, block_index: int) -> None:
        """A read met it. Written down with the next slice, or when somebody asks."""
        entry = self._entries.get(volume_id)
        if entry is not None:
            entry.state = scrub.noted(entry.state, block_index)

    def damaged_count(self, volume_id: str) -> int:
        entry = self._entries.get(volume_id)
        return len(entry.state.damaged) if entry is not None else 0

    def stats(self, volume_id: str) -> dict[str, int]:
        entry = self._entries.get(volume_id)
        if entry is None:
            return {}
        running = entry.state.running is not Pass.NONE
        return {
            "scrub_running": int(running),
            "scrub_position_regions": entry.state.position,
            "scrub_regions": self._total(entry),
            "scrub_blocks_verified": entry.counted_blocks,
            "scrub_damaged_found": entry.counted_damaged,
            "scrub_last_done_seconds": entry.state.last_done_s,
            "damaged_blocks": len(entry.state.damaged),
        }

    def _total(self, entry: _Entry) -> int:
        return -(-entry.replica.size_bytes // REGION_BYTES)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def parse_action(action: object) -> str:
    """Raises BadRequest."""
    if action not in ("start", "stop", "status"):
        raise BadRequest(reason="action is start, stop or status")
    assert isinstance(action, str)
    return action
