"""An NBD client that does one thing at a time and notes when it was done.

Owns the client's side of fixed newstyle and simple replies, as far as a stall measurement needs it: fio
cannot reconnect, and averages hide a single gap. Does not own what breaks meanwhile (``failover.py``).

Promises: a write that the server answered with an error raises; a lost connection is made again and the
same write is sent again, as QEMU's reconnect-delay does, until the deadline.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")

REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9

OPT_GO = 7
REP_ACK = 1
REP_INFO = 3
REP_ERROR_BIT = 1 << 31
CMD_WRITE = 1
CMD_DISC = 2

RECONNECT_INTERVAL_S = 0.005
"""Between tries to connect: small beside the 50 ms we want to see."""

ANSWER_TIMEOUT_S = 30.0
"""A request that takes longer is reported as a failure: far above every goal, so no stall is cut short."""

OPTION_REPLY_BYTES_MAX = 4096


class ServerFailed(Exception):
    """The server answered with an error, broke the protocol, or stayed away for too long."""


def socket_and_export(uri: str) -> tuple[Path, str]:
    """Of ``nbd+unix:///export?socket=path``."""
    parts = urlsplit(uri)
    paths = parse_qs(parts.query).get("socket")
    if parts.scheme != "nbd+unix" or not paths:
        raise ServerFailed(f"not an NBD address on a unix socket: {uri}")
    return Path(paths[0]), unquote(parts.path.lstrip("/"))


@dataclass(slots=True)
class Client:
    """One connection. ``write`` returns when the server has answered."""

    path: Path
    export: str
    reconnects: int = 0
    _socket: socket.socket | None = None
    _cookie: int = field(default=0)

    def connect(self, deadline_s: float) -> None:
        """Until ``deadline_s`` on the monotonic clock. Raises ServerFailed."""
        while True:
            try:
                self._socket = self._handshake()
                return
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"no connection to {self.path}: {error}") from error
                time.sleep(RECONNECT_INTERVAL_S)

    def close(self) -> None:
        if self._socket is not None:
            try:
                self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
            except OSError:
                pass  # it is closed either way
            self._socket.close()
            self._socket = None

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Returns once acknowledged, over as many connections as it takes."""
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            if self._socket is None:
                self.connect(deadline_s)
            try:
                self._write_once(offset_bytes, data)
                return
            except OSError as error:
                assert self._socket is not None
                self._socket.close()
                self._socket = None
                self.reconnects += 1
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"a write took longer than {ANSWER_TIMEOUT_S:.0f} s") from error

    def _write_once(self, offset_bytes: int, data: bytes) -> None:
        assert self._socket is not None
        self._cookie += 1
        head = REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, self._cookie, offset_bytes, len(data))
        self._socket.sendall(head + data)
        magic, error, cookie = REPLY.unpack(_receive(self._socket, REPLY.size))
        if magic != REPLY_MAGIC or cookie != self._cookie:
            raise ServerFailed("the reply is not for our request")
        if error:
            raise ServerFailed(f"a write was answered with error {error}")

    def _handshake(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(str(self.path))
            if _receive(connection, 18)[:16] != b"NBDMAGICIHAVEOPT":
                raise ServerFailed("not a newstyle NBD server")
            name = self.export.encode()
            go = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
            # Client flags: fixed newstyle, no zeroes.
            connection.sendall(struct.pack(">I", 3) + OPTION.pack(OPTION_MAGIC, OPT_GO, len(go)) + go)
            while True:
                magic, _, kind, length = OPTION_REPLY.unpack(_receive(connection, OPTION_REPLY.size))
                if magic != OPTION_REPLY_MAGIC or length > OPTION_REPLY_BYTES_MAX:
                    raise ServerFailed("the option reply is not one")
                text = _receive(connection, length)
                if kind & REP_ERROR_BIT:
                    raise ServerFailed(f"the server refused the export: {text.decode(errors='replace')}")
                if kind == REP_ACK:
                    return connection
        except BaseException:
            connection.close()
            raise


def _receive(connection: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises ConnectionError when the server closes first."""
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise ConnectionResetError("the server closed the connection")
        parts += part
    return bytes(parts)
