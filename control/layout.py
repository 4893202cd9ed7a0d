"""Where a local cluster keeps its files, and how long a socket's path may be.

Owns every path below the cluster's directory. A unix socket's path must fit in 107 bytes; when the
directory is too deep for that, sockets go to a short private directory of the same user, whose
place is recorded in ``daemon.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from protocol.errors import BadRequest

SOCKET_PATH_BYTES_MAX = 107
"""sizeof(sockaddr_un.sun_path) less the final zero."""

TEMPORARY_SUFFIX = ".new"
"""Sockets and files are made under this suffix and renamed into place."""


_OURS = frozenset({"nodes", "volumes", "daemon.lock", "daemon.log", "cluster.key.new"})
"""What a first start may have left behind before it made the cluster's key."""


class Layout:
    """``Layout(dir)``; ``prepare()`` makes what must exist."""

    def __init__(self, directory: Path) -> None:
        # Without links: processes are found again by their arguments, however it was written this time.
        self.dir = Path(os.path.realpath(directory))
        self.key = self.dir / "cluster.key"
        self.token = self.dir / "api.token"
        self.state = self.dir / "state.db"
        self.stamp = self.dir / "state.stamp"
        self.lock = self.dir / "daemon.lock"
        self.daemon_json = self.dir / "daemon.json"
        self.daemon_log = self.dir / "daemon.log"
        digest = hashlib.sha256(os.fsencode(self.dir)).hexdigest()[:16]
        self.runtime = Path(f"/tmp/dolmen-{os.getuid()}-{digest}")

    @property
    def daemon_socket(self) -> Path:
        return self._socket(self.dir / "daemon.sock", "daemon.sock")

    @property
    def engine_rpc_socket(self) -> Path:
        return self._socket(self.dir / "engine-rpc.sock", "engine-rpc.sock")

    def volume_dir(self, name: str) -> Path:
        return self.dir / "volumes" / name

    def nbd_socket(self, name: str) -> Path:
        return self._socket(self.volume_dir(name) / "nbd.sock", f"{_short(name)}.nbd.sock")

    def engine_socket(self, name: str) -> Path:
        return self._socket(self.volume_dir(name) / "engine.sock", f"{_short(name)}.engine.sock")

    def engine_config(self, name: str) -> Path:
        return self.volume_dir(name) / "engine.json"

    def engine_log(self, name: str) -> Path:
        return self.volume_dir(name) / "engine.log"

    def node_dir(self, node: str) -> Path:
        return self.dir / "nodes" / node

    def disk_dir(self, node: str) -> Path:
        return self.node_dir(node) / "disk0"

    def ready_file(self, node: str) -> Path:
        return self.node_dir(node) / "replica.ready"

    def replica_log(self, node: str) -> Path:
        return self.node_dir(node) / "replica.log"

    def prepare(self) -> None:
        """Raises BadRequest when the directory cannot be, or is not, one of ours."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            foreign = {entry.name for entry in self.dir.iterdir()} - _OURS
            if foreign and not self.key.exists():
                raise BadRequest(
                    reason=f"{self.dir} is not empty and holds no cluster (for example {min(foreign)!r}). "
                    "Choose an empty or new directory with --dir."
                )
            self.dir.chmod(self.dir.stat().st_mode & ~0o077)
            (self.dir / "volumes").mkdir(exist_ok=True)
            (self.dir / "nodes").mkdir(exist_ok=True)
        except OSError as error:
            raise BadRequest(
                reason=f"{self.dir} cannot hold a cluster: {error.strerror}. Choose another with --dir."
            ) from error

    def _socket(self, path: Path, short_name: str) -> Path:
        if len(os.fsencode(path)) + len(TEMPORARY_SUFFIX) <= SOCKET_PATH_BYTES_MAX:
            return path
        return self.runtime / short_name


def prepare_runtime_dir(path: Path) -> None:
    """A directory that only we can write to. Raises BadRequest if somebody else made it: /tmp is
    everybody's, and a socket in another user's directory is another user's socket."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BadRequest(reason=f"{path}: {error.strerror}") from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadRequest(
            reason=f"{path} exists and is not a private directory of ours. Remove it, or use a shorter --dir."
        )


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def write_private(path: Path, content: bytes) -> None:
    """Whole or not at all, mode 0600: write beside it, then rename. Durable enough for what can be
    written again; the state store is not written this way."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    temporary.rename(path)


def make_secret(path: Path, content: bytes) -> None:
    """Write a secret once: a second call, or a crash between, never replaces one that is there."""
    if path.exists():
        return
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
    temporary.rename(path)
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_daemon_json(layout: Layout) -> dict[str, Any]:
    """What the daemon wrote about itself; {} when there is nothing readable."""
    try:
        found = json.loads(layout.daemon_json.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
