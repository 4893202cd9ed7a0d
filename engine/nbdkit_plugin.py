"""The same volume behind nbdkit: ``nbdkit -U - python engine/nbdkit_plugin.py volume=NAME [dir=DIR]``.

For those who want nbdkit's filters and transports. nbdkit loads this file by its path into its own
interpreter (Debian's), so it imports the standard library, nbdkit's module and libnbd's binding
(``import nbd``, Debian's python3-libnbd), and nothing of ours.

Owns the translation of nbdkit's callbacks into NBD requests to the engine's unix socket, and the
patience to outlive an engine that restarts. Does not own the engine, nor any byte of the volume:
there is no cache here. FLUSH, FUA, TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS are passed through.

Promises: a request is answered when the engine has answered it. An engine that goes away is waited
for (``reconnect_timeout``), and requests without an answer are sent again: to the client it is a
pause, and one request that lasted longer. As with every NBD client that reconnects, a write that is
sent again may be applied twice, before and after a concurrent write of somebody else to the same
bytes: NBD has no name for a request that would outlive its connection.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import nbdkit

try:
    import nbd
except ImportError:
    # nbdkit's interpreter takes its search path from whichever python3 comes first in PATH.
    sys.path.append("/usr/lib/python3/dist-packages")
    import nbd

API_VERSION = 2

HANDLES_PER_CONNECTION_MAX = 4
"""Connections to the engine behind one client connection. libnbd's synchronous calls hold a handle
for the whole request, so this is how many requests of one client are under way at once. More gain
nothing: the interpreter runs one thread at a time."""

RECONNECT_TIMEOUT_S_DEFAULT = 60.0
"""How long a request waits for an engine that is gone. The daemon restarts one within 2 s; a machine
that is busy, or an upgrade, may take longer. Past it the client gets an error."""

CONNECT_TIMEOUT_S = 10.0
"""One attempt, from connect to the end of negotiation. A restarting engine's socket accepts
connections before there is an engine to answer them."""

RECONNECT_PAUSE_S_MIN = 0.05
RECONNECT_PAUSE_S_MAX = 1.0
"""Between attempts; doubles from one to the other."""

ENGINE_GONE_ERRNOS = frozenset({errno.ENOENT, errno.ECONNREFUSED})
"""What connecting to the socket of a volume that is not attached says."""

SOCKET_PATH_BYTES_MAX = 107
TEMPORARY_SUFFIX = ".new"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

Result = TypeVar("Result")

# What the command line said. Set by config(), fixed before the first connection.
_config: dict[str, str] = {}


class RequestFailed(Exception):
    """What nbdkit logs; the errno for the client has been set beforehand."""


def fail(error_number: int, message: str) -> RequestFailed:
    nbdkit.set_error(error_number)
    return RequestFailed(message)


# --- the command line


CONFIG_KEYS = ("volume", "dir", "reconnect_timeout")

config_help = """volume=NAME             (required) the volume; it must be attached
dir=DIR                 the cluster's directory (default: $DOLMEN_DIR, else ~/.dolmen)
reconnect_timeout=SECS  how long a request waits for an engine that restarts (default: 60)"""


def config(key: str, value: str) -> None:
    if key not in CONFIG_KEYS:
        raise RequestFailed(f"unknown parameter {key}=; this plugin knows {', '.join(CONFIG_KEYS)}")
    _config[key] = value


def config_complete() -> None:
    if "volume" not in _config:
        raise RequestFailed("which volume? Say volume=NAME; `dolmen volume ls` lists what exists.")
    if not NAME.fullmatch(_config["volume"]):
        raise RequestFailed(f"{_config['volume']!r} is not a volume's name; `dolmen volume ls` lists them.")
    try:
        patience_s = float(_config.get("reconnect_timeout", RECONNECT_TIMEOUT_S_DEFAULT))
    except ValueError:
        patience_s = -1.0
    if not 0 <= patience_s < 1e9:
        raise RequestFailed("reconnect_timeout= takes seconds, 0 or more")
    _config["reconnect_timeout"] = str(patience_s)
    # nbdkit changes its working directory when it goes to the background.
    _config["dir"] = os.path.abspath(cluster_dir())


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    """Say at the start, on the terminal, that nothing serves the volume. Later it is a pause."""
    path = socket_path()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            raise RequestFailed(unreachable(path, error.errno, str(error))) from None


def cluster_dir() -> Path:
    named = _config.get("dir") or os.environ.get("DOLMEN_DIR")
    return Path(named) if named else Path.home() / ".dolmen"


def socket_path() -> Path:
    """Where the engine listens: in the volume's directory, or, when that path is too long for a
    socket's, in a short private one. The rule is the daemon's (``control/layout.py``); a test
    compares the two."""
    volume = _config["volume"]
    directory = os.path.abspath(cluster_dir())
    path = Path(directory) / "volumes" / volume / "nbd.sock"
    if len(os.fsencode(path)) + len(TEMPORARY_SUFFIX) <= SOCKET_PATH_BYTES_MAX:
        return path
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    runtime = Path(f"/tmp/dolmen-{os.getuid()}-{digest}")
    if runtime.exists() and not private(runtime):
        raise fail(errno.EPERM, f"{runtime} is not a private directory of ours; nothing in it is trusted")
    return runtime / f"{hashlib.sha256(volume.encode()).hexdigest()[:16]}.nbd.sock"


def private(directory: Path) -> bool:
    """A socket in a directory that others may write to may be theirs."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def unreachable(path: Path, error_number: int | None, reason: str) -> str:
    volume = _config["volume"]
    if error_number in ENGINE_GONE_ERRNOS:
        return (
            f"volume {volume} is not attached: nothing listens at {path}. "
            f"`dolmen volume attach {volume} --dir {cluster_dir()}` first."
        )
    return (
        f"the engine of volume {volume} does not answer at {path}: {reason}. `dolmen volume show {volume}`."
    )


# --- connections to the engine


def connect(path: Path) -> nbd.NBD:
    """One attempt. Raises nbd.Error, also when CONNECT_TIMEOUT_S is over."""
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    # Alignment and size are the engine's business; it accepts more than libnbd would let pass.
    handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
    handle.aio_connect_unix(str(path))
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not handle.aio_is_ready():
        remaining_ms = int((deadline - time.monotonic()) * 1000)
        if remaining_ms <= 0 or handle.poll(remaining_ms) == 0:
            raise nbd.Error("the engine does not answer", errno.ETIMEDOUT)
    return handle


def is_answer(handle: nbd.NBD, error: nbd.Error) -> bool:
    """Whether an error is the engine's word on the request, or the loss of the connection."""
    alive = not handle.aio_is_dead() and not handle.aio_is_closed()
    return alive and error.errnum != errno.ESHUTDOWN


class Connection:
    """What stands behind one client connection: a pool of handles on the engine.

    The first handle tells what the engine can do. Others are opened only when it says that a
    FLUSH on one connection covers all (CAN_MULTI_CONN).
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._idle: list[nbd.NBD] = []
        self._handle_count = 0
        self._handle_count_max = 1
        first = self._open_first()
        self._handle_count_max = HANDLES_PER_CONNECTION_MAX if first.can_multi_conn() else 1
        self._idle.append(first)
        self.size_bytes: int = first.get_size()
        self.payload_bytes_max: int = first.get_block_size(nbd.SIZE_MAXIMUM) or 32 * 1024 * 1024

    def _open_first(self) -> nbd.NBD:
        path = socket_path()
        try:
            handle = self._connect_patiently(self._deadline_s(), gone_is_final=True)
        except nbd.Error as error:
            raise fail(errno.ESHUTDOWN, unreachable(path, error.errnum, str(error))) from None
        self._handle_count = 1
        return handle

    @staticmethod
    def _deadline_s() -> float:
        return time.monotonic() + float(_config["reconnect_timeout"])

    @staticmethod
    def _connect_patiently(deadline_s: float, *, gone_is_final: bool = False) -> nbd.NBD:
        """Raises the last attempt's nbd.Error when the deadline is over."""
        pause_s = RECONNECT_PAUSE_S_MIN
        while True:
            try:
                return connect(socket_path())
            except nbd.Error as error:
                if time.monotonic() + pause_s > deadline_s:
                    raise
                if gone_is_final and error.errnum in ENGINE_GONE_ERRNOS:
                    raise
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, RECONNECT_PAUSE_S_MAX)

    def call(self, request: Callable[[nbd.NBD], Result]) -> Result:
        """Run one request on a handle of its own; again on a new one if the engine goes away."""
        deadline_s: float | None = None  # set when the engine is first found gone
        while True:
            try:
                handle = self._take(deadline_s)
            except nbd.Error as error:
                message = f"the engine of volume {_config['volume']} did not return: {error}"
                raise fail(errno.ESHUTDOWN, message) from None
            try:
                result = request(handle)
            except nbd.Error as error:
                if is_answer(handle, error):
                    self._give_back(handle)
                    raise fail(error.errnum or errno.EIO, str(error)) from None
                self._forget(handle)
                nbdkit.debug(f"the engine went away, reconnecting: {error}")
                deadline_s = deadline_s or self._deadline_s()
            else:
                self._give_back(handle)
                return result

    def _take(self, deadline_s: float | None) -> nbd.NBD:
        with self._lock:
            while not self._idle and self._handle_count >= self._handle_count_max:
                self._lock.wait()
            if self._idle:
                return self._idle.pop()
            self._handle_count += 1
        try:
            return self._connect_patiently(deadline_s or self._deadline_s())
        except BaseException:
            with self._lock:
                self._handle_count -= 1
                self._lock.notify()
            raise

    def _give_back(self, handle: nbd.NBD) -> None:
        with self._lock:
            self._idle.append(handle)
            self._lock.notify()

    def _forget(self, handle: nbd.NBD) -> None:
        del handle  # libnbd closes it with its last reference
        with self._lock:
            self._handle_count -= 1
            self._lock.notify()

    def ask(self, question: Callable[[nbd.NBD], Result]) -> Result:
        """What the engine said in negotiation. Needs no request and no connection that still lives."""
        return self.call(question)

    def close(self) -> None:
        """nbdkit calls it when no request is under way."""
        with self._lock:
            handles, self._idle = self._idle, []
        for handle in handles:
            try:
                handle.shutdown()
            except nbd.Error:
                continue  # gone already; what was acknowledged is the engine's


def pieces(offset: int, count: int, piece_bytes_max: int) -> Iterator[tuple[int, int]]:
    """Cut a transfer into (offset within it, length) that the engine accepts as one request."""
    for start in range(0, count, piece_bytes_max):
        yield start, min(piece_bytes_max, count - start)


# --- nbdkit's callbacks, in the order of its manual


def open(readonly: bool) -> Connection:
    del readonly  # nbdkit itself refuses the writes of a read-only client
    return Connection()


def close(connection: Connection) -> None:
    connection.close()


def export_description(connection: Connection) -> str:
    return f"Dolmen volume {_config['volume']}"


def get_size(connection: Connection) -> int:
    return connection.size_bytes


def block_size(connection: Connection) -> tuple[int, int, int]:
    minimum, preferred, maximum = connection.ask(
        lambda h: tuple(
            h.get_block_size(size) for size in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
        )
    )
    return minimum, preferred, maximum


def can_write(connection: Connection) -> bool:
    return not connection.ask(lambda h: h.is_read_only())


def can_flush(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.can_flush()))


def is_rotational(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.is_rotational()))


def can_trim(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.can_trim()))


def can_zero(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.can_zero()))


def can_fast_zero(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.can_fast_zero()))


def can_extents(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)))


def can_fua(connection: Connection) -> int:
    return int(nbdkit.FUA_NATIVE if connection.ask(lambda h: h.can_fua()) else nbdkit.FUA_NONE)


def can_cache(connection: Connection) -> int:
    return int(nbdkit.CACHE_NATIVE if connection.ask(lambda h: h.can_cache()) else nbdkit.CACHE_NONE)


def can_multi_conn(connection: Connection) -> bool:
    return bool(connection.ask(lambda h: h.can_multi_conn()))


def pread(connection: Connection, buf: Any, offset: int, flags: int) -> None:
    view = memoryview(buf)
    for start, length in pieces(offset, len(view), connection.payload_bytes_max):
        view[start : start + length] = connection.call(lambda h: h.pread(length, offset + start))  # noqa: B023


def pwrite(connection: Connection, buf: Any, offset: int, flags: int) -> None:
    view = memoryview(buf)
    nbd_flags = nbd.CMD_FLAG_FUA if flags & nbdkit.FLAG_FUA else 0
    for start, length in pieces(offset, len(view), connection.payload_bytes_max):
        part = view[start : start + length]
        connection.call(lambda h: h.pwrite(part, offset + start, nbd_flags))  # noqa: B023


def flush(connection: Connection, flags: int) -> None:
    connection.call(lambda h: h.flush())


def trim(connection: Connection, count: int, offset: int, flags: int) -> None:
    nbd_flags = nbd.CMD_FLAG_FUA if flags & nbdkit.FLAG_FUA else 0
    connection.call(lambda h: h.trim(count, offset, nbd_flags))


def zero(connection: Connection, count: int, offset: int, flags: int) -> None:
    nbd_flags = 0 if flags & nbdkit.FLAG_MAY_TRIM else nbd.CMD_FLAG_NO_HOLE
    if flags & nbdkit.FLAG_FUA:
        nbd_flags |= nbd.CMD_FLAG_FUA
    if flags & nbdkit.FLAG_FAST_ZERO:
        nbd_flags |= nbd.CMD_FLAG_FAST_ZERO
    connection.call(lambda h: h.zero(count, offset, nbd_flags))


def extents(connection: Connection, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    nbd_flags = nbd.CMD_FLAG_REQ_ONE if flags & nbdkit.FLAG_REQ_ONE else 0

    def request(handle: nbd.NBD) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []

        def extent(context: str, start: int, entries: list[int], error: Any) -> None:
            if context != nbd.CONTEXT_BASE_ALLOCATION:
                return
            for length, state in zip(entries[::2], entries[1::2], strict=True):
                # The bits of base:allocation are nbdkit's EXTENT_HOLE and EXTENT_ZERO.
                found.append((start, length, state & (nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO)))
                start += length

        handle.block_status(count, offset, extent, nbd_flags)
        return found

    return connection.call(request)


def cache(connection: Connection, count: int, offset: int, flags: int) -> None:
    connection.call(lambda h: h.cache(count, offset))
