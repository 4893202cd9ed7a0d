"""Pulls of one replica: none may write after the next resync has begun."""

from __future__ import annotations

import asyncio
import socket

import pytest

from replica import peer
from replica.peer import Pulls


class SlowIo:
    """A native pull: it returns some time after it has seen the end of its source."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.may_return = asyncio.Event()
        self.returned = False

    async def pull_regions(
        self, volume_id: str, fd: int, *, epoch: int, regions: list[int], **options: int | bool
    ) -> dict[str, int]:
        self.started.set()
        await self.may_return.wait()
        self.returned = True
        return {"regions": len(regions)}


def test_settle_waits_for_a_pull_whose_caller_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(host: str, port: int, **_: object) -> tuple[socket.socket, None]:
        return socket.socketpair()[0], None

    monkeypatch.setattr(peer, "connect_socket", connect)

    async def story() -> None:
        io = SlowIo()
        pulls = Pulls(io, key=b"", server_id="s")
        pull = asyncio.create_task(pulls.pull("v", epoch=1, host="h", port=1, regions=[1], pull_round=0))
        await io.started.wait()
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        settling = asyncio.create_task(pulls.settle())
        await asyncio.sleep(0)
        assert not settling.done() and not io.returned
        io.may_return.set()
        await settling
        assert io.returned
        await pulls.settle()  # nothing runs any more

    asyncio.run(story())
