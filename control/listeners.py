"""The sockets NBD clients connect to, and ports that stay ours.

Owns creating listening sockets. The daemon keeps them open and hands them to every engine of the
volume, so a client that connects while an engine restarts waits in the backlog instead of failing.
After a restart of the daemon the living engine has the only copy; when it ends, a new socket takes
the same path by rename (or the same port).
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

from control.layout import TEMPORARY_SUFFIX
from protocol.errors import BadRequest

BACKLOG_CONNECTIONS = 256
"""Clients that may wait while an engine restarts. The kernel allows 4096."""

LOOPBACK = "127.0.0.1"

PORT_MIN = 20000
PORT_MAX = 32767
"""Below the kernel's range for outgoing connections (from 32768 on). A port inside it can be taken
by any client while its server is down; a client that retries to connect to it may even connect to
itself."""


def listen_unix(path: Path) -> socket.socket:
    """A listening unix socket at ``path``, mode 0600, replacing whatever socket was there."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before bind: the file never exists with another mode
        sock.bind(os.fspath(temporary))
        sock.listen(BACKLOG_CONNECTIONS)
        sock.setblocking(False)
        temporary.rename(path)
    except BaseException:
        sock.close()
        temporary.unlink(missing_ok=True)
        raise
    return sock


def listen_tcp(port: int) -> socket.socket:
    """A listening TCP socket on loopback. Raises BadRequest if the port is taken."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))
        sock.listen(BACKLOG_CONNECTIONS)
        sock.setblocking(False)
    except (OSError, OverflowError) as error:
        sock.close()
        why = error.strerror if isinstance(error, OSError) else "ports are 0 to 65535"
        raise BadRequest(reason=f"{LOOPBACK}:{port} cannot be used: {why}") from error
    return sock


def choose_port(seed: str, taken: frozenset[int] = frozenset()) -> int:
    """A port that nobody listens on now. ``seed`` spreads clusters over the range, so that two of
    them on one machine rarely look at the same port. Raises BadRequest if there is none."""
    span = PORT_MAX - PORT_MIN + 1
    first = hash_of(seed) % span
    for step in range(span):
        port = PORT_MIN + (first + step) % span
        if port not in taken and is_free(port):
            return port
    raise BadRequest(reason=f"no free TCP port from {PORT_MIN} to {PORT_MAX}")


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOOPBACK, port))
        except (OSError, OverflowError):
            return False
        return True


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
