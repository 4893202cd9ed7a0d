"""The engine's process: ``python -m engine.main --config FILE``.

Owns arguments, signals, logging and the exit code: 0 detached, 3 fenced by a newer epoch, 4 to be opened anew
in a new epoch, 143 after SIGTERM, 2 a config that is refused, 1 a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from random import Random

from engine.config import EngineConfig, read_config, read_key
from engine.io_path import NativeIoPath
from engine.server import EXIT_TERMINATED, EngineServer
from protocol.errors import StorageError
from protocol.jsonlog import setup_logging

EXIT_REFUSED = 2


async def serve(config: EngineConfig, key: bytes) -> int:
    io = NativeIoPath(size_bytes=config.size_bytes, epoch=config.epoch, slot_count=len(config.replicas))
    # The only chance in the process: spreads the reconnects of many engines.
    random = Random(os.urandom(8))
    server = EngineServer(config, key=key, io=io, random=random)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop, EXIT_TERMINATED)
    gc.collect()
    gc.freeze()  # what the start left behind is never looked at again
    return await server.run()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="engine.main", description="Serve one attached volume.")
    parser.add_argument("--config", required=True, help="the JSON file the daemon wrote")
    arguments = parser.parse_args(argv)
    try:
        config = read_config(arguments.config)
        key = read_key(config.key_file)
    except (StorageError, OSError) as error:
        print(f"engine: {error}", file=sys.stderr)
        return EXIT_REFUSED
    setup_logging(volume=config.name, epoch=config.epoch)
    return asyncio.run(serve(config, key))


if __name__ == "__main__":
    sys.exit(main())
