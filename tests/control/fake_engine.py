"""A stand-in for ``engine.main``: its config, its control socket, its use of the listening sockets.

It commits record (epoch, 1) in the daemon's store when it starts, answers each NBD client with one
line ``epoch N`` and keeps it. Files in the volume's directory change what it does:
``gone`` holds ids of replicas that are not in sync (a replacement is, at once),
``crash`` ends it at once, ``fenced`` once as if it met a newer epoch,
``state`` holds the state it tells (in ``waiting`` no replica is reached, and
``waits`` names one that it then waits for, unless an override was granted); ``mute`` makes it answer no call.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from protocol.errors import BadRequest, StaleEpoch, StorageError
from protocol.rpc import RpcClient, serve_calls

EXIT_FENCED = 3


class Engine:
    def __init__(self, path: Path) -> None:
        self.dir = path.parent
        self.config = json.loads(path.read_bytes())
        self.size_bytes = self.config["size_bytes"]
        self.clients = 0
        self.ended = asyncio.Event()
        gone = self.dir / "gone"
        self.gone = set(gone.read_text().split()) if gone.exists() else set()
        members = [replica["id"] for replica in self.config["replicas"] if replica["id"] not in self.gone]
        self.record = {"epoch": self.config["epoch"], "version": 1, "in_sync": members}

    async def answer(self, call: str, args: dict[str, Any]) -> Any:
        if (self.dir / "mute").exists():
            await asyncio.Event().wait()
        match call:
            case "engine.status":
                file = self.dir / "state"
                waits = file.exists() and not self.config.get("override")
                state = file.read_text() if waits else "healthy"
                return {
                    "volume_id": self.config["volume_id"],
                    "name": self.config["name"],
                    "epoch": self.config["epoch"],
                    "state": state,
                    "size_bytes": self.size_bytes,
                    "membership": self.record,
                    "replicas": [
                        {
                            "id": replica["id"],
                            "slot": slot,
                            "state": "offline"
                            if state == "waiting" or replica["id"] not in self.record["in_sync"]
                            else "in_sync",
                            "reason": "",
                        }
                        for slot, replica in enumerate(self.config["replicas"])
                    ],
                    "waiting_for": self.waiting_for(state),
                    "clients": self.clients,
                }
            case "engine.stats":
                return {
                    "reads": 5,
                    "writes": 6,
                    "read_bytes": 7,
                    "clients": self.clients,
                    "latency_us_read": [0, 1, 2],
                    "latency_us_read_sum": 9,
                    "hedged_reads": 4,
                    "slots": [{"connected": True, "slow": True, "requests": 3, "latency_us_sum": 2_000_000}],
                }
            case "engine.resize":
                self.size_bytes = args["size_bytes"]
                return {}
            case "engine.replace_replica":
                await self.replace(args["old"], args["new"])
                return {}
            case "engine.detach":
                asyncio.get_running_loop().call_later(0.01, self.ended.set)
                return {}
            case _:
                raise BadRequest(reason=f"unknown call {call}")

    async def replace(self, old: str, new: dict[str, Any]) -> None:
        replicas = self.config["replicas"]
        ids = [replica["id"] for replica in replicas]
        if new["id"] in ids:
            return
        if old in self.record["in_sync"]:
            raise BadRequest(reason=f"replica {old} is named in sync")
        replicas[ids.index(old)] = new
        record = {**self.record, "version": 2, "in_sync": [*self.record["in_sync"], new["id"]]}
        self.filling = asyncio.create_task(self.fill(record))

    async def fill(self, record: dict[str, Any]) -> None:
        """Until a daemon takes the record."""
        while True:
            try:
                daemon = await RpcClient.connect_unix(self.config["daemon_socket"])
                await daemon.call(
                    "store.record",
                    volume_id=self.config["volume_id"],
                    epoch=self.config["epoch"],
                    record=record,
                )
            except StorageError:
                await asyncio.sleep(0.05)
                continue
            self.record = record
            return

    def waiting_for(self, state: str) -> list[dict[str, str]]:
        """As an engine that is told of an override stops waiting."""
        if state != "waiting" or not (self.dir / "waits").exists():
            return []
        return [{"replica": (self.dir / "waits").read_text(), "reason": "it is gone"}]

    async def serve_clients(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        kept = []
        while True:
            client, _ = await loop.sock_accept(listener)
            kept.append(client)
            self.clients += 1
            await loop.sock_sendall(client, f"epoch {self.config['epoch']}\n".encode())


async def main() -> int:
    engine = Engine(Path(sys.argv[2]))
    if (engine.dir / "crash").exists():
        return 9
    if (engine.dir / "fenced").exists():
        (engine.dir / "fenced").unlink()
        return EXIT_FENCED
    config = engine.config
    daemon = await RpcClient.connect_unix(config["daemon_socket"])
    try:
        await daemon.call(
            "store.record", volume_id=config["volume_id"], epoch=config["epoch"], record=engine.record
        )
    except StaleEpoch:
        return EXIT_FENCED

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve_calls(reader, writer, engine.answer)
        writer.close()

    temporary = config["control_socket"] + f".{os.getpid()}"
    server = await asyncio.start_unix_server(serve, temporary)
    os.rename(temporary, config["control_socket"])
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, engine.ended.set)
    for listener in config["listeners"]:
        task = asyncio.create_task(engine.serve_clients(socket.socket(fileno=listener["fd"])))
        task.add_done_callback(lambda _: None)
    await engine.ended.wait()
    server.close()
    return 0


os._exit(asyncio.run(main()) if "--config" in sys.argv else 2)
