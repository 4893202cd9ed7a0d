"""The control calls of a replica server: one row each in PROTOCOL.md, one handler each here.

Owns argument checks and the shape of answers. Does not own what happens (``replicas.py``) or the framing
(``protocol/rpc.py``). Whatever a peer sends, the answer is a result or a StorageError.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from protocol.errors import BadRequest, ProtocolViolation, StorageError
from protocol.hello import ID_CHARS_MAX
from protocol.limits import BLOCK_BYTES, NAME_CHARS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN
from protocol.membership import MembershipRecord, parse_record
from protocol.regions import REGIONS_MAX, pack_regions, unpack_regions
from replica.disk import is_volume_id
from replica.replicas import Replica, Replicas
from replica.scrubber import parse_action

log = logging.getLogger("dolmen.replica")

VERIFY_REGIONS_MAX = 1024
"""Of one replica.verify call: 4 GiB, so that a call ends while its caller still waits."""

RATE_BYTES_S_MAX = 2**40
"""No disk is as fast: past it a limit means nothing."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")


class Args:
    """The arguments of one call, taken out one by one. What is wrong, missing or left over is BadRequest."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self._left = dict(args)

    def _take(self, name: str) -> Any:
        if name not in self._left:
            raise BadRequest(reason=f"argument {name} is missing")
        return self._left.pop(name)

    def end(self) -> None:
        if self._left:
            raise BadRequest(reason=f"unknown argument {sorted(self._left)[0]!r:.80}")

    def integer(self, name: str, *, least: int, most: int, missing: int | None = None) -> int:
        """``missing``: what stands for an argument that may be left out."""
        if missing is not None and name not in self._left:
            return missing
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise BadRequest(reason=f"{name} is not a number from {least} to {most}")
        return value

    def identifier(self, name: str, *, missing: str | None = None) -> str:
        if missing is not None and name not in self._left:
            return missing
        value = self._take(name)
        if not isinstance(value, str) or not 0 < len(value) <= ID_CHARS_MAX or not value.isprintable():
            raise BadRequest(reason=f"{name} is not a text of 1 to {ID_CHARS_MAX} characters")
        return value

    def volume_id(self) -> str:
        value = self._take("volume_id")
        if not is_volume_id(value):
            raise BadRequest(reason="volume_id is not a volume's id")
        assert isinstance(value, str)
        return value

    def name(self) -> str:
        value = self._take("name")
        if not isinstance(value, str) or len(value) > NAME_CHARS_MAX or not _NAME.match(value):
            raise BadRequest(reason=f"name is not lower case letters, digits and -, at most {NAME_CHARS_MAX}")
        return value

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise BadRequest(reason=f"{name} is not a text")
        return value

    def epoch(self, *, least: int = 1) -> int:
        return self.integer("epoch", least=least, most=2**63 - 2)

    def size_bytes(self) -> int:
        size = self.integer("size_bytes", least=VOLUME_BYTES_MIN, most=VOLUME_BYTES_MAX)
        if size % BLOCK_BYTES:
            raise BadRequest(reason=f"size_bytes is not a multiple of {BLOCK_BYTES}")
        return size

    def record(self) -> MembershipRecord:
        try:
            return parse_record(self._take("record"))
        except ProtocolViolation as error:
            raise BadRequest(reason=str(error)) from error

    def flag(self, name: str) -> bool:
        """May be left out: false."""
        value = self._left.pop(name, False)
        if not isinstance(value, bool):
            raise BadRequest(reason=f"{name} is not true or false")
        return value

    def regions(self) -> list[int]:
        return unpack_regions(self._take("regions"))

    def source(self) -> tuple[str, int]:
        match self._take("source"):
            case [str(host), int(port)] if 0 < len(host) <= 255 and 0 < port < 65536:
                return host, port
            case _:
                raise BadRequest(reason="source is not [host, port]")


class Calls:
    """The handler that ``protocol.rpc.serve_calls`` gets for a control connection.

    A call that changes something is finished even if its connection is lost meanwhile: its half would be a
    thread writing a file that nobody waits for.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._running: set[asyncio.Task[Any]] = set()
        self._changing: Mapping[str, Callable[[Args], Awaitable[Any]]] = {
            "replica.create": self._create,
            "replica.delete": self._delete,
            "replica.claim": self._claim,
            "replica.persist_record": self._persist_record,
            "replica.begin_resync": self._begin_resync,
            "replica.end_resync": self._end_resync,
            "replica.complete_regions": self._complete_regions,
            "replica.detach_clean": self._detach_clean,
            "replica.resize": self._resize,
            # Read only, but they open a replica that is not open yet:
            "replica.inspect": self._inspect,
            "replica.dirty_regions": self._dirty_regions,
            "replica.changed_since": self._changed_since,
        }
        self._stoppable: Mapping[str, Callable[[Args], Awaitable[Any]]] = {
            "server.status": self._status,
            "replica.pull_regions": self._pull_regions,
            "replica.verify": self._verify,
            "replica.scrub": self._scrub,
            "replica.damaged": self._damaged,
            "replica.stats": self._stats,
        }

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._changing) | frozenset(self._stoppable)

    async def __call__(self, name: str, args: Mapping[str, Any]) -> Any:
        if (handler := self._stoppable.get(name)) is not None:
            return await handler(Args(args))
        if (handler := self._changing.get(name)) is None:
            raise BadRequest(reason=f"unknown call {name[:80]!r}")
        return await self.finish(handler(Args(args)), name)

    async def finish(self, work: Awaitable[Any], name: str) -> Any:
        """Await ``work``, which goes on to its end if we are cancelled."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Its caller may be gone; then nobody else asks for the exception.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, StorageError):
            log.error("%s failed by a bug", task.get_name(), exc_info=error)

    async def drain(self) -> None:
        """Wait for the calls under way: the server stops."""
        while self._running:
            await asyncio.wait(self._running)

    # -- one handler per call

    async def _status(self, args: Args) -> dict[str, Any]:
        args.end()
        return await self._replicas.status()

    async def _create(self, args: Args) -> dict[str, Any]:
        volume_id, replica_id = args.volume_id(), args.identifier("replica_id")
        name, size_bytes = args.name(), args.size_bytes()
        args.end()
        replica = await self._replicas.create(
            volume_id=volume_id, replica_id=replica_id, name=name, size_bytes=size_bytes
        )
        return await self._replicas.inspect(replica)

    async def _delete(self, args: Args) -> dict[str, Any]:
        volume_id = args.volume_id()
        args.end()
        await self._replicas.delete(volume_id)
        return {}

    async def _inspect(self, args: Args) -> dict[str, Any]:
        replica = self._only_replica(args)
        await replica.settle()  # an engine decides by the answer; "opening" would tell it nothing
        return await self._replicas.inspect(replica)

    async def _claim(self, args: Args) -> dict[str, Any]:
        epoch, engine_id = args.epoch(), args.identifier("engine_id")
        opens_known = args.integer("opens", least=0, most=2**63 - 2, missing=0)
        replica = self._only_replica(args)
        epoch_was = await replica.claim(epoch=epoch, engine_id=engine_id, opens_known=opens_known)
        return {**await self._replicas.inspect(replica), "epoch_was": epoch_was}

    async def _persist_record(self, args: Args) -> dict[str, Any]:
        epoch, record = args.epoch(), args.record()
        await self._only_replica(args).persist_record(epoch=epoch, record=record)
        return {}

    async def _dirty_regions(self, args: Args) -> dict[str, Any]:
        return {"regions": pack_regions(await self._only_replica(args).dirty_regions())}

    async def _changed_since(self, args: Args) -> dict[str, Any]:
        stamp = (args.epoch(least=0), args.integer("version", least=0, most=2**31 - 1))
        return {"regions": pack_regions(await self._only_replica(args).changed_since(stamp=stamp))}

    async def _begin_resync(self, args: Args) -> dict[str, Any]:
        epoch, regions = args.epoch(), args.regions()
        await self._only_replica(args).begin_resync(epoch=epoch, regions=regions)
        return {}

    async def _pull_regions(self, args: Args) -> dict[str, Any]:
        epoch, (host, port), regions = args.epoch(), args.source(), args.regions()
        rate_bytes_s = args.integer("rate_bytes_s", least=0, most=RATE_BYTES_S_MAX, missing=0)
        take_damaged = args.flag("take_damaged")
        source_process = args.identifier("source_process", missing="")
        replica = self._only_replica(args)
        pull_round = await self.finish(replica.prepare_pull(epoch=epoch, regions=regions), "prepare pull")
        return await replica.pull_regions(
            epoch=epoch,
            host=host,
            port=port,
            regions=regions,
            pull_round=pull_round,
            rate_bytes_s=rate_bytes_s,
            take_damaged=take_damaged,
            source_process=source_process,
        )

    async def _end_resync(self, args: Args) -> dict[str, Any]:
        epoch = args.epoch()
        await self._only_replica(args).end_resync(epoch=epoch)
        return {}

    async def _complete_regions(self, args: Args) -> dict[str, Any]:
        epoch, regions = args.epoch(), args.regions()
        await self._only_replica(args).complete_regions(epoch=epoch, regions=regions)
        return {}

    async def _detach_clean(self, args: Args) -> dict[str, Any]:
        epoch = args.epoch()
        await self._only_replica(args).detach_clean(epoch=epoch)
        return {}

    async def _resize(self, args: Args) -> dict[str, Any]:
        size_bytes = args.size_bytes()
        await self._only_replica(args).resize(size_bytes=size_bytes)
        return {}

    async def _verify(self, args: Args) -> dict[str, Any]:
        first_region = args.integer("first_region", least=0, most=REGIONS_MAX - 1)
        region_count = args.integer("region_count", least=1, most=VERIFY_REGIONS_MAX)
        replica = self._only_replica(args)
        await self.finish(replica.prepare_verify(), "prepare verify")
        return await replica.verify(first_region=first_region, region_count=region_count)

    async def _scrub(self, args: Args) -> dict[str, Any]:
        action = parse_action(args.text("action"))
        rate_bytes_s = args.integer("rate_bytes_s", least=0, most=RATE_BYTES_S_MAX, missing=0)
        replica = self._only_replica(args)
        scrubber = self._replicas.scrubber
        if action == "status":
            return await scrubber.status(replica)
        await self.finish(replica.prepare_verify(), "prepare scrub")
        if action == "stop":
            work = scrubber.stop(replica)
        else:
            work = scrubber.start(replica, rate_bytes_s=rate_bytes_s)
        status: dict[str, Any] = await self.finish(work, f"{action} scrub")
        return status

    async def _damaged(self, args: Args) -> dict[str, Any]:
        check = args.flag("check")
        replica = self._only_replica(args)
        if check:
            await self.finish(replica.prepare_verify(), "prepare check")
        return await self._replicas.scrubber.damaged(replica, check=check)

    async def _stats(self, args: Args) -> dict[str, int]:
        replica = self._only_replica(args)
        return {**await replica.stats(), **self._replicas.scrubber.stats(replica.volume_id)}

    def _only_replica(self, args: Args) -> Replica:
        """The replica of ``volume_id``, which is the last argument left. Raises ReplicaNotFound."""
        volume_id = args.volume_id()
        args.end()
        return self._replicas.get(volume_id)
