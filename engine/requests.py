"""What is asked of an attached volume from outside: to grow, and to be detached. Pure.

Owns the order of both, and that each request is answered exactly once. Does not own who is a member or what
a phase allows (``volume.py``, which is handed in as ``Host``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine import events as ev
from engine.limits import DETACH_DRAIN_WAIT_S
from engine.phase import VolumePhase
from engine.replica_entry import RESYNC_STATES, ReplicaEntry
from protocol.errors import BadRequest, ShrinkRefused, StorageError


class Host(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def phase(self) -> VolumePhase: ...
    @property
    def entries(self) -> Sequence[ReplicaEntry]: ...
    @property
    def size_bytes(self) -> int: ...

    def act(self, action: ev.Action) -> None: ...
    def next_token(self) -> int: ...
    def members_up(self) -> list[ReplicaEntry]: ...
    def requires(self, entry: ReplicaEntry) -> bool: ...
    def grown(self, size_bytes: int) -> None: ...


class Growth:
    """At most one request to grow at a time. Replicas grow first, then the volume: a write past a replica's
    end can't happen."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._asked: ev.ResizeAsked | None = None

    def ask(self, event: ev.ResizeAsked) -> None:
        host = self._host
        error: StorageError | None = None
        if host.phase is not VolumePhase.SERVING:
            error = BadRequest(reason=f"volume {host.name} is {host.phase.value}")
        elif self._asked is not None:
            error = BadRequest(reason=f"volume {host.name} is being resized already")
        elif event.size_bytes < host.size_bytes:
            error = ShrinkRefused(volume=host.name, current=host.size_bytes, wanted=event.size_bytes)
        elif event.size_bytes > host.size_bytes:
            self._asked = event
            return
        host.act(ev.Reply(event.request, error))

    @property
    def under_way(self) -> bool:
        return self._asked is not None

    def advance(self) -> None:
        """Also without a request: a replica that was away while the volume grew follows."""
        host = self._host
        wanted_bytes = self._asked.size_bytes if self._asked is not None else host.size_bytes
        for entry in host.entries:
            if entry.claimed and entry.size_bytes < wanted_bytes and not entry.resizing:
                entry.resizing = True
                host.act(ev.ResizeReplica(entry.slot, entry.session, wanted_bytes))
        if self._asked is None or host.phase is not VolumePhase.SERVING:
            return
        needed = [e for e in host.entries if host.requires(e) or e.state in RESYNC_STATES]
        if all(entry.claimed and entry.size_bytes >= wanted_bytes for entry in needed):
            host.grown(wanted_bytes)
            self.answer(None)

    def answer(self, error: StorageError | None) -> None:
        if self._asked is not None:
            self._host.act(ev.Reply(self._asked.request, error))
            self._asked = None


class Detach:
    """From the first request to the end of the engine. Later requests are answered with the first."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._requests: list[int] = []
        self._token = 0
        self._cleaning: set[int] = set()  # slots
        self.drained = False  # every request that was accepted is answered

    def ask(self, request: int) -> None:
        self._requests.append(request)

    def begin(self) -> None:
        """No new requests from clients; those under way are finished, for a while."""
        self._token = self._host.next_token()
        self._host.act(ev.Pause(True))
        self._host.act(ev.Barrier(self._token))
        self._host.act(ev.StartTimer(ev.Timer(ev.TimerKind.DETACH), DETACH_DRAIN_WAIT_S))

    def on_drained(self, token: int) -> None:
        if token == self._token != 0:
            self.drained = True

    def clean(self) -> None:
        """All members are equal: their marks can go."""
        members = self._host.members_up()
        self._cleaning = {entry.slot for entry in members}
        for entry in members:
            self._host.act(ev.CleanReplica(entry.slot, entry.session))

    def on_cleaned(self, slot: int) -> None:
        """Or it never will be: the next open compares what it has marked."""
        self._cleaning.discard(slot)

    @property
    def cleaned(self) -> bool:
        return not self._cleaning

    def answer(self, error: StorageError | None) -> None:
        for request in self._requests:
            self._host.act(ev.Reply(request, error))
        self._requests.clear()
