"""The REST API from the command line's side: synchronous, standard library only, so that it starts fast.

Owns the HTTP over the unix socket and turning errors back into ``StorageError``. Does not own what
is printed. This is the door through which ``cli`` and ``bench`` reach the system.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import control.errors as _registered  # from_wire must know these classes too
from control.layout import Layout, read_daemon_json
from protocol.errors import BadRequest, DaemonUnreachable, ProtocolViolation, Timeout, from_wire

REQUEST_TIMEOUT_S = 15.0
"""On top of the time a request was asked to wait."""

WAIT_DEFAULT_S = 30.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024

assert _registered


def default_dir() -> Path:
    """$DOLMEN_DIR, else ~/.dolmen."""
    return Path(os.environ.get("DOLMEN_DIR") or "~/.dolmen").expanduser()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, *, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class Client:
    """Calls to the daemon of one directory. Every call opens its own connection.

    Raises what the daemon answers as its ``StorageError``, DaemonUnreachable, or Timeout.
    """

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory)

    def call(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = REQUEST_TIMEOUT_S, **query: Any
    ) -> dict[str, Any]:
        status, answer = self._exchange(method, path, body, timeout_s, query)
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise ProtocolViolation(expected="JSON from the daemon", got=repr(answer[:40])) from error
        if status >= 400:
            raise from_wire(found)
        if not isinstance(found, dict):
            raise ProtocolViolation(expected="an object from the daemon", got=type(found).__name__)
        return found

    def text(self, path: str) -> str:
        return self._exchange("GET", path, None, REQUEST_TIMEOUT_S, {})[1].decode()

    def _exchange(
        self, method: str, path: str, body: Any, timeout_s: float, query: dict[str, Any]
    ) -> tuple[int, bytes]:
        target = path + ("?" + urlencode(query) if query else "")
        connection = _UnixConnection(self.layout.daemon_socket, timeout_s=timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, target, body=content, headers={"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(ANSWER_BYTES_MAX)
        except TimeoutError as error:
            raise Timeout(what=f"{method} {path}", timeout_s=timeout_s) from error
        except (OSError, http.client.HTTPException) as error:
            raise DaemonUnreachable(dir=str(self.layout.dir)) from error
        finally:
            connection.close()

    # The daemon

    def health(self) -> dict[str, Any]:
        return self.call("GET", "/healthz", timeout_s=5.0)

    def status(self) -> dict[str, Any]:
        return self.call("GET", "/v1/status")

    def why(self, name: str = "") -> dict[str, Any]:
        query: dict[str, Any] = {"name": name} if name else {}
        return self.call("GET", "/v1/why", **query)

    def why_no_daemon(self) -> dict[str, Any]:
        """The finding about a daemon that does not answer, in the shape of the others."""
        # Not at the top: only this rare path needs them, and the command starts faster without.
        from control.leftovers import is_daemon_running
        from control.processes import is_standing
        from control.recover_disks import store_fault

        pid = int(read_daemon_json(self.layout).get("pid") or 0)
        reason, command, then = "daemon_down", f"`dolmen up --dir {self.layout.dir} --detach`", ""
        text = f"the daemon of {self.layout.dir} is not running"
        if is_daemon_running(self.layout):
            reason, text = "daemon_silent", f"the daemon (pid {pid}) runs and does not answer"
            command, then = f"`dolmen down --dir {self.layout.dir}`, then up again", "it may just be starting"
            if pid and is_standing(pid):
                reason, text = "daemon_frozen", f"the daemon (pid {pid}) is stopped by a signal (SIGSTOP)"
                command, then = f"`kill -CONT {pid}`", ""
        elif not self.layout.key.exists():
            text = f"there is no cluster in {self.layout.dir}"
        elif fault := store_fault(self.layout):
            reason, text = "store_failed", f"{self.layout.state} {fault}, so the daemon cannot start"
            then = "put it back, or make it anew from the disks"
            command = f"`dolmen recover --from-disks --dir {self.layout.dir}`, then {command}"
        served = "volumes whose engines run are served as they were"
        then = "; ".join(part for part in (then, served) if part)
        return {
            "about": "the state store" if reason == "store_failed" else "the daemon",
            "reason": reason,
            "text": text,
            "then": then if self.layout.key.exists() else "",
            "command": command,
            "who": "operator",
            "since": "",
            "because": "",
            "concerns": [],
        }

    def shutdown(self, *, everything: bool) -> None:
        self.call("POST", "/v1/shutdown", {"everything": everything})

    # Volumes

    def volumes(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.call("GET", "/v1/volumes")["volumes"]
        return listed

    def volume(self, name: str) -> dict[str, Any]:
        return self.call("GET", _volume(name))

    def create_volume(self, name: str, size_bytes: int, replica_count: int) -> dict[str, Any]:
        wanted = {"name": name, "size_bytes": size_bytes, "replica_count": replica_count}
        return self._waiting("POST", "/v1/volumes", wanted, WAIT_DEFAULT_S)

    def attach(self, name: str, *, tcp: bool = False, wait_s: float = WAIT_DEFAULT_S) -> dict[str, Any]:
        return self._waiting("POST", _volume(name, "attach"), {"tcp": tcp}, wait_s)

    def detach(self, name: str, *, force: bool = False, wait_s: float = WAIT_DEFAULT_S) -> dict[str, Any]:
        return self._waiting("POST", _volume(name, "detach"), {"force": force}, wait_s)

    def resize(self, name: str, size_bytes: int, *, wait_s: float = WAIT_DEFAULT_S) -> dict[str, Any]:
        return self._waiting("POST", _volume(name, "resize"), {"size_bytes": size_bytes}, wait_s)

    def delete_volume(self, name: str, *, wait_s: float = WAIT_DEFAULT_S) -> dict[str, Any]:
        return self._waiting("DELETE", _volume(name), None, wait_s)

    def recovery(self, name: str) -> dict[str, Any]:
        return self.call("GET", _volume(name, "recovery"))

    def recover(
        self, name: str, members: list[str], lose: str, *, dry_run: bool, wait_s: float = WAIT_DEFAULT_S
    ) -> dict[str, Any]:
        order = {"members": members, "lose": lose, "dry_run": dry_run}
        return self._waiting("POST", _volume(name, "recovery"), order, wait_s)

    def withdraw_recovery(self, name: str) -> dict[str, Any]:
        return self.call("DELETE", _volume(name, "recovery"))

    # Replicas, jobs, nodes

    def replicas(self, volume: str | None = None) -> list[dict[str, Any]]:
        query: dict[str, Any] = {"volume": volume} if volume else {}
        listed: list[dict[str, Any]] = self.call("GET", "/v1/replicas", **query)["replicas"]
        return listed

    def rebuild_replica(self, volume: str, replica: str, *, wait_s: float = WAIT_DEFAULT_S) -> dict[str, Any]:
        return self._waiting("POST", _volume(volume, f"replicas/{_segment(replica)}/rebuild"), {}, wait_s)

    def replace_replica(
        self,
        volume: str,
        replica: str,
        *,
        to: str | None = None,
        dry_run: bool = False,
        wait_s: float = WAIT_DEFAULT_S,
    ) -> dict[str, Any]:
        path = _volume(volume, f"replicas/{_segment(replica)}/replace")
        return self._waiting("POST", path, {"to": to, "dry_run": dry_run}, wait_s)

    def verify(self, volume: str) -> dict[str, Any]:
        """Starts a job; ``job`` asks about it."""
        return self.call("POST", _volume(volume, "verify"), {})

    def scrub(self, volume: str) -> dict[str, Any]:
        """Starts a job; ``job`` asks about it."""
        return self.call("POST", _volume(volume, "scrub"), {})

    def job(self, job_id: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/jobs/{quote(job_id, safe='')}")

    def nodes(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.call("GET", "/v1/nodes")["nodes"]
        return listed

    def stop_node(self, node: str, *, kill: bool = False) -> dict[str, Any]:
        return self._waiting("POST", _node(node, "stop"), {"kill": kill}, WAIT_DEFAULT_S)

    def start_node(self, node: str) -> dict[str, Any]:
        return self._waiting("POST", _node(node, "start"), {}, WAIT_DEFAULT_S)

    def _waiting(self, method: str, path: str, body: Any, wait_s: float) -> dict[str, Any]:
        return self.call(method, path, body, timeout_s=wait_s + REQUEST_TIMEOUT_S, wait_s=wait_s)


def _volume(name: str, operation: str = "") -> str:
    return f"/v1/volumes/{_segment(name)}" + (f"/{operation}" if operation else "")


def _node(name: str, operation: str) -> str:
    return f"/v1/nodes/{_segment(name)}/{operation}"


def _segment(name: str) -> str:
    if not name or name in (".", ".."):
        raise BadRequest(reason=f"{name!r} is not a name")
    return quote(name, safe="")
