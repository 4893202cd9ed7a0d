"""A network of one's own on this machine, in which packets get lost on purpose.

::

    with private_network() as network:
        Popen([*network.prefix, "dolmen", "up", ...])   # everything it starts lives in that network
        network.drop(port)                              # silence: nobody is told
        network.heal()

Owns one network namespace with a loopback device, held open by one child process, and the packet rules in
it. Nothing of the machine's own network is touched. Does not own what runs in it. Unix sockets with a path
reach in and out.

Promises: the child ends with us, however we end; with the last process in it the namespace and every
rule are gone.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

COMMAND_TIMEOUT_S = 10.0
TABLE = "dolmen_faults"
MARK = 0xD0
"""Packets of a socket with this mark (SO_MARK) are not led to a proxy: it is the proxy that sends them."""

PROGRAMS = ("unshare", "nsenter", "ip", "nft", "ss")


class NetworkUnavailable(Exception):
    """No network namespace can be made here; the text says what is missing."""


class Direction(Enum):
    BOTH = "both"
    TO_SERVER = "to server"
    FROM_SERVER = "from server"


def _matches(port: int, direction: Direction) -> list[str]:
    to_server, from_server = f"tcp dport {port}", f"tcp sport {port}"
    match direction:
        case Direction.TO_SERVER:
            return [to_server]
        case Direction.FROM_SERVER:
            return [from_server]
        case Direction.BOTH:
            return [to_server, from_server]


@dataclass(slots=True)
class PrivateNetwork:
    """Rules are by the server's port; each call replaces what held for that port."""

    pid: int
    _filters: dict[int, list[str]] = field(default_factory=dict)
    _redirects: dict[int, int] = field(default_factory=dict)

    @property
    def namespace(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")

    @property
    def prefix(self) -> list[str]:
        """Put before a command, it runs in here."""
        return ["nsenter", f"--net={self.namespace}", "--"]

    def drop(self, port: int, direction: Direction = Direction.BOTH) -> None:
        """Packets vanish, and nobody is told."""
        self._filter(port, [f"{match} drop" for match in _matches(port, direction)])

    def lose(self, port: int, *, percent: int) -> None:
        """Of the packets both ways, at random."""
        matches = _matches(port, Direction.BOTH)
        self._filter(port, [f"{match} numgen random mod 100 < {percent} drop" for match in matches])

    def reset(self, port: int) -> None:
        """Every packet to the server is answered with a reset, new connections too."""
        self._filter(port, [f"tcp dport {port} reject with tcp reset"])
        self.cut(port)

    def redirect(self, port: int, to_port: int) -> None:
        """New connections to ``port`` arrive at ``to_port`` instead, save those of sockets with MARK."""
        self._redirects[port] = to_port
        self._apply()

    def cut(self, port: int) -> None:
        """Every connection to the server that lives now is reset at both ends."""
        self.run("ss", "-K", "-t", "-H", f"( dport = :{port} or sport = :{port} )")

    def heal(self, port: int | None = None) -> None:
        """The rules of one port, or of all; connections stay as they are."""
        if port is None:
            self._filters.clear()
            self._redirects.clear()
        else:
            self._filters.pop(port, None)
            self._redirects.pop(port, None)
        self._apply()

    def _filter(self, port: int, rules: list[str]) -> None:
        self._filters[port] = rules
        self._apply()

    def _apply(self) -> None:
        """All rules at once: one transaction of nft."""
        filters = "\n".join(f"  {rule}" for rules in self._filters.values() for rule in rules)
        redirects = "\n".join(
            f"  meta mark != {MARK} tcp dport {port} redirect to :{to_port}"
            for port, to_port in self._redirects.items()
        )
        self.run(
            "nft",
            "-f",
            "-",
            text=f"""
table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
 chain arriving {{
  type filter hook input priority 0
{filters}
 }}
 chain leaving {{
  type nat hook output priority -100
{redirects}
 }}
}}
""",
        )

    def run(self, *command: str, text: str = "") -> str:
        """Raises NetworkUnavailable."""
        done = subprocess.run(
            [*self.prefix, *command],
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise NetworkUnavailable(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[:300]}")
        return done.stdout


@contextmanager
def private_network() -> Iterator[PrivateNetwork]:
    """Raises NetworkUnavailable."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise NetworkUnavailable(
            f"not installed: {', '.join(missing)} (Debian: iproute2, nftables, util-linux)"
        )
    # It reads what we never write, so it ends when our end of the pipe is closed, by us or by our death.
    script = "ip link set lo up && echo ready && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            reason = holder.stderr.read().decode(errors="replace").strip()
            raise NetworkUnavailable(f"cannot make a network namespace (root may): {reason}")
        yield PrivateNetwork(holder.pid)
    finally:
        holder.kill()
        holder.communicate(timeout=COMMAND_TIMEOUT_S)
