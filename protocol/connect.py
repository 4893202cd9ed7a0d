"""Opens a connection to a replica server: connect, read the greeting, send the hello, check the answer.

Owns the client half of ``protocol.hello`` on a real socket, and the exact reads both halves need:
after the last message of a hello not one byte has been read ahead, so that the socket's fd can go
to the data plane. Does not own what follows, reconnecting, or which server to ask.

Promises: every call ends within ``timeout_s``; a failure or a cancellation leaves no socket open.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from protocol.errors import ProtocolViolation, Unreachable
from protocol.hello import HELLO_BYTES_MAX, Greeting, Role, check_answer, make_hello, parse_greeting
from protocol.limits import HANDSHAKE_TIMEOUT_S
from protocol.rpc import LENGTH, pack, reason_of, unpack

KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3
"""An idle connection whose other machine vanished is noticed after about a minute. It only frees
the memory of the dead: a data link with requests in flight notices after LINK_STALL_TIMEOUT_S."""


async def connect(
    host: str,
    port: int,
    *,
    key: bytes,
    role: Role = Role.CONTROL,
    volume_id: str = "",
    epoch: int = 0,
    engine_id: str,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection past its hello as asyncio streams: what ``RpcClient`` takes.

    Raises what connect_socket raises.
    """
    sock, _ = await connect_socket(
        host,
        port,
        key=key,
        role=role,
        volume_id=volume_id,
        epoch=epoch,
        engine_id=engine_id,
        timeout_s=timeout_s,
    )
    try:
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


async def connect_socket(
    host: str,
    port: int,
    *,
    key: bytes,
    role: Role,
    volume_id: str = "",
    epoch: int = 0,
    engine_id: str,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
) -> tuple[socket.socket, Greeting]:
    """A connected socket past its hello, and what the server said of itself.

    The socket is non-blocking, has TCP_NODELAY, and nothing past the server's ok has been read.
    The caller owns it. Raises Unreachable, ProtocolViolation, NotAuthenticated when either side does
    not hold the other's key, or the server's refusal (StaleEpoch, ReplicaNotFound, ...).
    """
    peer = f"{host}:{port}"
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            sock = await _open_socket(host, port)
            greeting = parse_greeting(await recv_message(sock))
            hello = make_hello(
                greeting, key=key, role=role, volume_id=volume_id, epoch=epoch, engine_id=engine_id
            )
            await send_message(sock, hello.to_wire())
            check_answer(await recv_message(sock), key=key, greeting=greeting, hello=hello)
            return sock, greeting
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, TimeoutError):
            raise Unreachable(peer=peer, reason=f"no answer within {timeout_s} s") from error
        if isinstance(error, OSError | EOFError):
            raise Unreachable(peer=peer, reason=reason_of(error)) from error
        raise


async def _open_socket(host: str, port: int) -> socket.socket:
    """Connect to the first address of ``host`` that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for family, kind, proto, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            tune_socket(sock)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure or OSError(f"{host} has no address")


def tune_socket(sock: socket.socket) -> None:
    """What every TCP connection of ours has, at both ends. The data plane keeps these settings."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


async def recv_message(sock: socket.socket, *, bytes_max: int = HELLO_BYTES_MAX) -> Any:
    """One message of a hello, and not one byte more.

    Raises ProtocolViolation for a length or a body that is not ours, EOFError when the peer closes
    in the middle, OSError when the connection breaks.
    """
    (length,) = LENGTH.unpack(await _recv_exactly(sock, LENGTH.size))
    if not 0 < length <= bytes_max:
        raise ProtocolViolation(expected=f"a message of at most {bytes_max} bytes", got=str(length))
    return unpack(await _recv_exactly(sock, length))


async def send_message(sock: socket.socket, message: Any) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, pack(message))


async def _recv_exactly(sock: socket.socket, length_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < length_bytes:
        part = await loop.sock_recv(sock, length_bytes - len(data))
        if not part:
            raise EOFError("closed during the hello")
        data += part
    return data
