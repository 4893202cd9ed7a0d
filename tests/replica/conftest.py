"""Fixtures of the replica's tests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.replica.rig import Play, Rig, Scenario


@pytest.fixture
def play_calls(tmp_path: Path) -> Play:
    """Run a scenario on a fresh disk."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            rig = Rig(tmp_path / "disk0")
            await rig.start()
            await scenario(rig)
            await rig.settle()
            await rig.replicas.close_all()
            rig.disk.close()

        asyncio.run(main())

    return run
