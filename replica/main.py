"""The replica server's process: ``python -m replica.main --dir DIR --node NODE --port PORT --key FILE``.

Owns arguments, signals, logging and the ready file. Exit code 0 after SIGTERM or SIGINT with everything
flushed; 1 with one line that says what to do when the disk or the arguments are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import uuid

from protocol.errors import BadRequest, StorageError
from protocol.hello import ID_CHARS_MAX, KEY_BYTES
from replica.disk import Disk, to_storage_error
from replica.io_path import IoPath
from replica.server import LISTEN_BACKLOG, ReplicaServer

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"

log = logging.getLogger("dolmen.replica")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replica.main", description="Serve the replicas of one disk.")
    parser.add_argument("--dir", required=True, help="the disk: a directory that is empty or ours")
    parser.add_argument("--node", required=True, help="the id of this machine")
    parser.add_argument("--port", type=int, required=True, help="TCP port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--key", required=True, help="file with the cluster's key")
    parser.add_argument("--ready-file", help="where to write pid, port and disk_id once the port answers")
    parser.add_argument("--disk-id", help="refuse any other disk, and an empty directory (a missing mount)")
    parser.add_argument("--boot-id", help="instead of the kernel's; for tests of power loss")
    return parser.parse_args(argv)


def read_key(path: str) -> bytes:
    with open(path, "rb") as file:
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise BadRequest(reason=f"{path} does not hold a key of {KEY_BYTES} bytes")
    return key


def read_boot_id(given: str | None) -> str:
    """Changes whenever this machine has lost its page cache."""
    if given is None:
        with open(BOOT_ID_FILE, encoding="ascii") as file:
            given = file.read().strip()
    if not 0 < len(given) <= ID_CHARS_MAX:
        raise BadRequest(reason="the boot id is empty or too long")
    return given


def listen(host: str, port: int) -> socket.socket:
    """Raises BadRequest, which names the address."""
    try:
        return _listen(host, port)
    except (OSError, OverflowError) as error:
        raise BadRequest(reason=f"cannot listen on {host}:{port}: {error}") from error


def _listen(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def write_ready_file(path: str, *, port: int, disk_id: str) -> None:
    """Appears complete: under another name first."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"pid": os.getpid(), "port": port, "disk_id": disk_id}, file)
    os.rename(temporary, path)


async def serve(arguments: argparse.Namespace, disk: Disk, key: bytes, boot_id: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = listen(arguments.host, arguments.port)
    port = listener.getsockname()[1]

    def ready() -> None:
        log.info("serving disk=%s node=%s port=%d", disk.identity.disk_id, disk.identity.node_id, port)
        if arguments.ready_file:
            write_ready_file(arguments.ready_file, port=port, disk_id=disk.identity.disk_id)

    server = ReplicaServer(disk, IoPath(disk.path), key=key, boot_id=boot_id, listener=listener)
    await server.run(ready=ready, stop=stop)
    log.info("stopped disk=%s", disk.identity.disk_id)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        key, boot_id = read_key(arguments.key), read_boot_id(arguments.boot_id)
        disk = Disk.open(
            arguments.dir,
            node_id=arguments.node,
            disk_id=arguments.disk_id,
            make_id=lambda: str(uuid.uuid4()),
        )
        try:
            asyncio.run(serve(arguments, disk, key, boot_id))
        finally:
            disk.close()
    except StorageError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        log.error("%s", to_storage_error(error, path=error.filename or arguments.dir))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
