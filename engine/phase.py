"""The phases of an attached volume. ``volume.py`` moves through them; nothing else assigns one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class VolumePhase(Enum):
    """::

    INSPECTING <-> CLAIMING -> RECORDING -> SERVING -> DETACHING -> CLEANING -> ENDED

    ENDED may follow each: detached, fenced, or to be opened anew.
    """

    INSPECTING = "inspecting"  # replicas are found; may the volume be opened?
    CLAIMING = "claiming"  # those found are locking out older engines
    RECORDING = "recording"  # the first record of this epoch is being committed
    SERVING = "serving"
    DETACHING = "detaching"  # no new requests; those under way are finished
    CLEANING = "cleaning"  # replicas flush and clear their marks
    ENDED = "ended"


_P = VolumePhase

NEXT_PHASES: Mapping[VolumePhase, frozenset[VolumePhase]] = {
    _P.INSPECTING: frozenset({_P.CLAIMING, _P.ENDED}),
    _P.CLAIMING: frozenset({_P.INSPECTING, _P.RECORDING, _P.ENDED}),
    _P.RECORDING: frozenset({_P.SERVING, _P.ENDED}),
    _P.SERVING: frozenset({_P.DETACHING, _P.ENDED}),
    _P.DETACHING: frozenset({_P.CLEANING, _P.ENDED}),
    _P.CLEANING: frozenset({_P.ENDED}),
    _P.ENDED: frozenset(),
}
assert NEXT_PHASES.keys() == set(VolumePhase)
