"""The daemon's watch over one engine: one that answered before and falls silent is found, and ended.

A stand-in engine on a real socket, a clock that the test turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from control import engines, observe
from control.engines import EngineConfig, EngineSlot
from control.layout import Layout
from control.observe import ask_engine
from control.processes import Programs
from control.reconcile import ENGINE_SILENT_MAX_S, EngineSeen
from tests.support.processes import is_alive, kill

STAND_IN = """
import asyncio, json, os, sys
from protocol.rpc import serve_calls

config = json.load(open(sys.argv[2]))

async def answer(call, args):
    return {"epoch": config["epoch"], "state": "healthy", "size_bytes": config["size_bytes"]}

async def serve(reader, writer):
    await serve_calls(reader, writer, answer)
    writer.close()

async def main():
    server = await asyncio.start_unix_server(serve, config["control_socket"] + ".new")
    os.rename(config["control_socket"] + ".new", config["control_socket"])
    await server.serve_forever()

asyncio.run(main())
"""

ENGINE = EngineConfig(
    volume_id="0" * 32,
    name="data",
    size_bytes=1 << 30,
    epoch=1,
    engine_id="e",
    node="n",
    replicas=[],
    record={},
)


class Watched:
    """A slot with a living engine, and the clock it goes by."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.now_s = 1000.0
        self._changed = asyncio.Event()
        self.slot = EngineSlot(
            "data",
            Layout(directory),
            Programs(engine=(sys.executable, "-c", STAND_IN)),
            tasks=tasks,
            changed=self._changed.set,
            now=lambda: self.now_s,
        )
        self.slot.unused_epoch = 1

    @property
    def seen(self) -> EngineSeen:
        found = self.slot.seen()
        assert found is not None
        return found

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20.0):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def watched(directory: Path) -> AsyncIterator[Watched]:
    async with asyncio.TaskGroup() as tasks:
        found = Watched(directory, tasks)
        found.slot.start(ENGINE, tcp_port=0)
        pid = found.slot.pid
        assert pid is not None
        try:
            await found.until(lambda: found.seen.answering)
            yield found
        finally:
            kill(pid)
            await found.until(lambda: found.slot.pid is None)


def run(directory: Path, story: Callable[[Watched], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with watched(directory) as found:
            await story(found)

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def _short_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "ASK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(engines, "PING_TIMEOUT_S", 0.05)


def test_an_engine_that_answered_and_fell_silent_is_silent_long_enough_to_be_ended(tmp_path: Path) -> None:
    async def story(watched: Watched) -> None:
        pid = watched.slot.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        watched.now_s += 3600.0  # nobody asked for an hour: that is not silence
        assert await ask_engine(watched.slot) is None
        assert watched.seen == EngineSeen(1, 1 << 30, answering=True, silent_s=0.0)
        watched.now_s += engines.SILENT_AFTER_S
        await watched.until(lambda: not watched.seen.answering)
        assert watched.seen.silent_s == engines.SILENT_AFTER_S
        assert not watched.slot.process_facts(answers=False).starting  # it is silent, and not new
        watched.now_s += ENGINE_SILENT_MAX_S
        assert watched.seen.silent_s >= ENGINE_SILENT_MAX_S  # what the reconciler ends it at
        async with asyncio.timeout(engines.STOP_GRACE_S / 2):  # a stopped process is not waited for
            await watched.slot.end()
        assert not is_alive(pid)

    run(tmp_path, story)


def test_an_engine_that_was_late_once_is_as_before(tmp_path: Path) -> None:
    async def story(watched: Watched) -> None:
        pid = watched.slot.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        assert await ask_engine(watched.slot) is None
        watched.now_s += engines.SILENT_AFTER_S
        await watched.until(lambda: not watched.seen.answering)
        os.kill(pid, signal.SIGCONT)
        await watched.until(lambda: watched.seen.answering)
        assert watched.seen.silent_s == 0.0
        assert await ask_engine(watched.slot) is not None

    run(tmp_path, story)
