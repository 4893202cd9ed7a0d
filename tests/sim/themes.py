"""What a run is about: most faults need company to do harm, so some runs have few kinds of them, often.

Owns the themes and their rates. A seed draws its theme from a stream of its own, so that "mixed" runs are
what they were before there were themes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Theme:
    """None, or an empty mapping: as the run draws it."""

    name: str
    every_s: Mapping[str, float] = field(default_factory=dict)  # kinds of faults, mean time between two
    replica_counts: tuple[int, ...] = ()
    block_count_max: int = 0
    region_count: int = 0
    think_s: float = 0.0
    read_share: float | None = None
    partial_share: float | None = None
    flush_share: float | None = None
    patience_s: tuple[float, ...] = ()
    delay_s: float = 0.0
    away_s: tuple[float, ...] = ()  # how long a killed replica stays away, mean
    straggler_waits_s: tuple[float, ...] = ()  # engines' setting
    readers_count: int = 0  # clients that only read, and stay with their engine


MIXED = Theme("mixed")

THEMES = (
    MIXED,
    MIXED,
    Theme(
        "takeover",  # two engines, each with some of the replicas
        {"engine superseded": 1.2, "servers killed": 4.0, "engine stopped": 5.0},
        replica_counts=(2, 3, 3),
        region_count=8,
        think_s=0.01,
        read_share=0.5,
        patience_s=(0.05, 0.2, 2.0),
        straggler_waits_s=(0.05, 0.3, 1.0),
        readers_count=2,
    ),
    Theme(
        "return",  # replicas that come back under writes
        {"reset": 0.7, "replica killed": 2.0, "one-way cut": 4.0, "slow": 3.0, "write failed": 3.0},
        replica_counts=(2, 3, 3),
        block_count_max=3,
        think_s=0.006,
        read_share=0.3,
        partial_share=0.4,
        delay_s=0.003,
    ),
    Theme(
        "alone",  # records that the state store does not know
        {
            "state store away": 2.0,
            "replica killed": 0.8,
            "replica stopped": 3.0,
            "engine killed": 2.5,
            "partition": 4.0,
            "everything killed": 3.0,
            "old state store": 6.0,
        },
        away_s=(0.5, 2.0, 4.0),
        replica_counts=(3,),
        block_count_max=3,
        think_s=0.02,
    ),
    Theme(
        "dark",  # disks that lose and lie
        {
            "power lost everywhere": 2.0,
            "power lost": 2.5,
            "sync failed": 1.5,
            "slow disk": 1.5,
            "old directory": 4.0,
            "rot": 2.0,
            "replica killed": 4.0,
        },
        replica_counts=(2, 3),
        block_count_max=4,
        think_s=0.01,
        flush_share=0.3,
    ),
    Theme(
        "deaths",  # everything at once, with writes under way
        {"everything killed": 1.0, "slow": 1.0, "old directory": 3.0, "slow disk": 3.0, "rot": 4.0},
        replica_counts=(2, 3, 3),
        block_count_max=2,
        think_s=0.004,
        read_share=0.5,
        delay_s=0.002,
    ),
)

BY_NAME = {theme.name: theme for theme in THEMES}


def theme_of(seed: int) -> Theme:
    return Random(f"theme of {seed}").choice(THEMES)
