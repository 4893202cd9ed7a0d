"""The engine's door to the native data plane. No byte of a request is touched in this file.

Here:  the machine's commands as native calls, native events as the machine's events.
There: dataplane/binding/src/engine.rs (the binding), dataplane/core/src/engine/ (the loop: NBD transmission,
       fan-out, acknowledgements, regions that wait).

Every call hands a command to the loop's thread and returns; only ``stop`` waits, for the thread to end.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Protocol

import _dataplane

from engine.events import (
    Barrier,
    DetachLink,
    Drained,
    Event,
    LinkDown,
    LinkMode,
    LoopCommand,
    PartialDone,
    Pause,
    RegionDiverged,
    RegionsEqual,
    RegionWanted,
    SetLease,
    SetMembers,
    SetPartialWait,
    SetReaders,
    SetSize,
    SetUnequal,
)
from engine.regions import numbers_of
from protocol.errors import BadRequest, DiskError, StorageError, Unreachable
from protocol.frames import Status
from protocol.limits import LINK_STALL_TIMEOUT_S

Notice = tuple[object, ...]


class IoPath(Protocol):
    """What the shell needs of the data plane. Tests hand in their own."""

    def on_events(self, deliver: Callable[[Event], None], notice: Callable[[Notice], None]) -> None: ...
    def do(self, command: LoopCommand) -> None: ...
    def attach_link(self, slot: int, sock: socket.socket, mode: LinkMode) -> int: ...
    def add_client(
        self, sock: socket.socket, *, structured: bool, meta_context: int, read_only: bool
    ) -> int: ...
    def repair_block(self, slot: int, block_index: int) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def stop(self) -> None: ...


class NativeIoPath:
    """One ``EngineLoop``."""

    def __init__(self, *, size_bytes: int, epoch: int, slot_count: int) -> None:
        self._native = _dataplane.EngineLoop(size_bytes, epoch, slot_count)
        self._watched = False
        self._diverged_seen = 0

    def on_events(self, deliver: Callable[[Event], None], notice: Callable[[Notice], None]) -> None:
        """Call ``deliver`` on the event loop for what the machine decides about, ``notice`` for the rest:
        ("client_closed", id, reason), ("block_repaired", slot, block), ("block_unreadable", block)."""

        def drain() -> None:
            for native in self._native.poll_events():
                event = translate_event(native)
                if isinstance(event, RegionDiverged):
                    self._diverged_seen += 1
                if event is not None:
                    deliver(event)
                else:
                    notice(native)

        self._watched = True
        asyncio.get_running_loop().add_reader(self._native.event_fd(), drain)

    def do(self, command: LoopCommand) -> None:
        native = self._native
        try:
            match command:
                case SetMembers(slots):
                    native.set_members(list(slots))
                case SetReaders(slots):
                    native.set_readers(list(slots))
                case SetLease(quorums):
                    native.set_lease([(list(slots), need) for slots, need in quorums])
                case DetachLink(slot, generation):
                    native.detach_link(slot, generation)
                case SetUnequal(regions):
                    native.set_unequal(numbers_of(regions))
                case SetPartialWait(regions):
                    native.set_partial_wait(numbers_of(regions))
                case RegionsEqual(regions):
                    native.regions_equal(numbers_of(regions), self._diverged_seen)
                case PartialDone(regions):
                    native.partial_done(numbers_of(regions))
                case Barrier(token):
                    native.barrier(token)
                case Pause(paused):
                    native.pause(paused)
                case SetSize(size_bytes):
                    native.set_size(size_bytes)
        except _dataplane.NativeError as error:
            raise translate_error(error) from error

    def attach_link(self, slot: int, sock: socket.socket, mode: LinkMode) -> int:
        """The generation. The caller closes ``sock``. Raises StorageError."""
        try:
            return self._native.attach_link(slot, sock.fileno(), mode.value)
        except _dataplane.NativeError as error:
            raise translate_error(error) from error

    def add_client(self, sock: socket.socket, *, structured: bool, meta_context: int, read_only: bool) -> int:
        """The client's id. The caller closes ``sock``. Raises StorageError."""
        try:
            return self._native.add_client(sock.fileno(), structured, meta_context, read_only)
        except _dataplane.NativeError as error:
            raise translate_error(error) from error

    def repair_block(self, slot: int, block_index: int) -> None:
        """Read a block elsewhere and give it to ``slot``. A notice tells the end: ("block_repaired", slot,
        block) or ("block_unreadable", block). Raises StorageError."""
        try:
            self._native.repair_block(slot, block_index)
        except _dataplane.NativeError as error:
            raise translate_error(error) from error

    def stats(self) -> dict[str, Any]:
        try:
            return self._native.stats()
        except _dataplane.NativeError as error:
            raise translate_error(error) from error

    def stop(self) -> None:
        """Answer what is done, close clients and links, join the thread. Blocking, short."""
        if self._watched:
            asyncio.get_running_loop().remove_reader(self._native.event_fd())
        self._native.stop()


def translate_event(native: Notice) -> Event | None:
    """None for what changes nothing in the machine."""
    match native:
        case ("link_lost", int(slot), int(generation), str(reason)):
            return LinkDown(slot, generation, reason)
        case ("link_failed", int(slot), int(generation), int(status)):
            return LinkDown(slot, generation, failed_reason(status), status)
        case ("link_stalled", int(slot), int(generation)):
            return LinkDown(slot, generation, f"no answer for {LINK_STALL_TIMEOUT_S:g} s")
        case ("region_wanted", int(region)):
            return RegionWanted(region)
        case ("region_diverged", int(region)):
            return RegionDiverged(region)
        case ("drained", int(token)):
            return Drained(token)
        case _:
            return None


def failed_reason(status: int) -> str:
    match status:
        case Status.NO_SPACE:
            return "no space"
        case Status.IO_ERROR:
            return "disk error"
        case _:
            known = status in Status._value2member_map_
            return Status(status).name.lower().replace("_", " ") if known else f"status {status}"


def translate_error(error: Exception) -> StorageError:
    """A NativeError as the error its kind stands for. An unknown kind is a bug of ours: ``internal``."""
    kind, message = (*error.args, "", "")[:2]
    match kind:
        case "bad_request":
            return BadRequest(reason=message)
        case "io_error":
            return DiskError(path="the engine's sockets", reason=message)
        case "closed":
            return Unreachable(peer="the engine's data plane", reason=str(message))
        case _:
            return StorageError(f"the data plane failed: {kind}: {message}")
