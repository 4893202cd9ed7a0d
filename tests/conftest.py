"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline per example measures how busy the machine is. Examples come in the same order every time, so that
# a red run can be repeated; a long hunt sets --hypothesis-profile=hunt.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("hunt", deadline=None, max_examples=5_000)
settings.load_profile("steady")
