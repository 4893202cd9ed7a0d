"""A stand-in for ``replica.main``: its arguments, its hello, its control calls, none of its bytes.

Keeps its volumes in ``fake.json`` in its directory, so that a restart finds them again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
from pathlib import Path
from typing import Any

from protocol.errors import BadRequest, ReplicaNotFound, VolumeInUse
from protocol.hello import Greeting, make_answer, parse_hello
from protocol.rpc import read_message, serve_calls, write_message


class Server:
    def __init__(self, directory: Path, node: str) -> None:
        self.dir, self.node = directory, node
        self.file = directory / "fake.json"
        self.volumes: dict[str, dict[str, Any]] = (
            json.loads(self.file.read_text()) if self.file.exists() else {}
        )
        self.disk_id = f"disk-of-{node}"

    def save(self) -> None:
        self.file.write_text(json.dumps(self.volumes))

    def inspect(self, volume_id: str) -> dict[str, Any]:
        if volume_id not in self.volumes:
            raise ReplicaNotFound(volume=volume_id)
        path = str(self.dir / "replicas" / volume_id)
        return {"volume_id": volume_id, "path": path, "state": "open", "reason": "", "dirty_count": 0,
                "record": None, "epoch": 0, "suspect": False, **self.volumes[volume_id]}  # fmt: skip

    async def answer(self, call: str, args: dict[str, Any]) -> Any:
        volume_id = args.get("volume_id", "")
        match call:
            case "server.status":
                return {
                    "node_id": self.node,
                    "disk_id": self.disk_id,
                    "space_total_bytes": 2**40,
                    "space_free_bytes": 2**39,
                    "volumes": [self.inspect(v) for v in self.volumes],
                }
            case "replica.inspect":
                return self.inspect(volume_id)
            case "replica.create":
                self.volumes.setdefault(volume_id, {k: args[k] for k in ("replica_id", "name", "size_bytes")})
                self.save()
                return self.inspect(volume_id)
            case "replica.delete":
                if (self.dir / "in_use").exists():
                    raise VolumeInUse(volume=volume_id)
                self.volumes.pop(volume_id, None)
                self.save()
                return {}
            case "replica.resize":
                self.inspect(volume_id)
                self.volumes[volume_id]["size_bytes"] = args["size_bytes"]
                self.save()
                return {}
            case "replica.verify":
                self.inspect(volume_id)
                odd = (self.dir / "odd").exists()
                return {"blocks_verified": 1, "blocks_zero": 2, "damaged": [], "damaged_count": 0,
                        "digest": 8 if odd else 7}  # fmt: skip
            case "replica.stats":
                self.inspect(volume_id)
                return {"reads": 1, "writes": 2, "checksum_errors": 0, "dirty_regions": 3}
            case _:
                raise BadRequest(reason=f"unknown call {call}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("--dir", "--node", "--port", "--key", "--ready-file", "--disk-id"):
        parser.add_argument(name)
    return parser.parse_args()


def say_ready(path: str, port: int, disk_id: str) -> None:
    Path(path + ".tmp").write_text(json.dumps({"pid": os.getpid(), "port": port, "disk_id": disk_id}))
    os.rename(path + ".tmp", path)


async def main(options: argparse.Namespace, key: bytes) -> None:
    server = Server(Path(options.dir), options.node)
    assert options.disk_id in (None, server.disk_id)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_bytes(32)
        await write_message(writer, Greeting(nonce, "boot", "process").to_wire())
        hello = parse_hello(await read_message(reader), key=key, nonce=nonce)
        await write_message(writer, make_answer(hello, key=key, nonce=nonce))
        await serve_calls(reader, writer, server.answer)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", int(options.port))
    say_ready(options.ready_file, listener.sockets[0].getsockname()[1], server.disk_id)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    os._exit(0)


OPTIONS = parse()
asyncio.run(main(OPTIONS, Path(OPTIONS.key).read_bytes()))
