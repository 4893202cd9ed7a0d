"""Settings of all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# A deadline per example measures how busy the machine is. Examples come in the same order every time, so that
# a red run can be repeated; a long hunt sets --hypothesis-profile=hunt.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("hunt", deadline=None, max_examples=5_000)
settings.load_profile("steady")


_MAIN_PID = os.getpid()


def pytest_configure() -> None:
    """Ended by SIGTERM, as by a timeout around the whole run, fixtures still clean up what they started."""
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    if os.getpid() != _MAIN_PID:
        os._exit(128 + number)  # a forked worker: it has nothing of ours to clean up
    pytest.exit("ended by SIGTERM", returncode=128 + number)
