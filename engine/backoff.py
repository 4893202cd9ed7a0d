"""Delay before the next attempt: doubles to a cap, with jitter from a Random that is handed in."""

from __future__ import annotations

from random import Random


class Backoff:
    def __init__(self, random: Random, *, base_s: float, cap_s: float) -> None:
        assert 0 < base_s <= cap_s
        self._random = random
        self._base_s = base_s
        self._cap_s = cap_s
        self._ceiling_s = base_s

    def next_delay_s(self) -> float:
        ceiling_s = self._ceiling_s
        self._ceiling_s = min(self._cap_s, ceiling_s * 2)
        # Never less than half, so that many engines spread out but none hammers.
        return self._random.uniform(ceiling_s / 2, ceiling_s)

    def reset(self) -> None:
        """An attempt succeeded."""
        self._ceiling_s = self._base_s
