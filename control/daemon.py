"""``python -m control.daemon --dir DIR --nodes N``: one daemon, its parts, their order.

Owns the life of the process: one daemon per directory (a lock), parts started and ended in order.
Does not own what the parts do.

Promises: killed at any moment, it harms nothing: engines and replica servers go on, and the next
daemon adopts them. SIGTERM and SIGINT end the daemon alone; ``POST /v1/shutdown`` with
``everything`` ends engines (cleanly), replica servers, then the daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import structlog

import control
from control.api import make_app, serve_api
from control.cluster import Cluster
from control.engine_rpc import EngineCalls, serve_engines
from control.jobs import Jobs
from control.layout import Layout, make_secret, prepare_runtime_dir, read_daemon_json, write_private
from control.listeners import choose_port, is_free
from control.model import NODES_MAX
from control.processes import Programs
from control.reconcile import REPLACE_AFTER_S
from control.routes import System
from control.state import open_state
from protocol.errors import BadRequest, StorageError
from protocol.hello import KEY_BYTES

EXIT_REFUSED = 1
EXIT_ALREADY_RUNNING = 5

log = structlog.get_logger()


class Daemon:
    """``run`` is its whole life."""

    def __init__(
        self,
        layout: Layout,
        *,
        node_count: int,
        port: int,
        programs: Programs,
        replace_after_s: float = REPLACE_AFTER_S,
    ) -> None:
        self.layout = layout
        self._node_count = node_count
        self._port = port
        self._replace_after_s = replace_after_s
        self._programs = programs
        self._stop = asyncio.Event()
        self._everything = False

    def shut_down(self, everything: bool) -> None:
        self._everything = self._everything or everything
        self._stop.set()

    async def run(self) -> None:
        """Until ``shut_down``. Raises StorageError when it cannot start."""
        layout = self.layout
        make_secret(layout.key, secrets.token_bytes(KEY_BYTES))
        make_secret(layout.token, secrets.token_urlsafe(32).encode())
        key, token = layout.key.read_bytes(), layout.token.read_text()
        if layout.daemon_socket.parent == layout.runtime:
            prepare_runtime_dir(layout.runtime)
        async with AsyncExitStack() as undo:
            store, stamp = await open_state(layout)
            undo.push_async_callback(store.close)
            calls = EngineCalls(store, stamp)
            await undo.enter_async_context(serve_engines(layout.engine_rpc_socket, calls))
            async with asyncio.TaskGroup() as tasks:
                cluster = Cluster(
                    layout,
                    store,
                    stamp,
                    self._programs,
                    key=key,
                    tasks=tasks,
                    replace_after_s=self._replace_after_s,
                )
                jobs = Jobs(cluster, tasks)
                system = System(cluster, jobs, self.shut_down, started_at_s=time.monotonic())
                await cluster.start(self._node_count)
                jobs.keep_repairing()
                app = make_app(system, token=token)
                port = self._port or _last_port(layout)
                port = port or choose_port(str(layout.dir), await cluster.taken_ports())
                async with serve_api(app, socket_path=layout.daemon_socket, port=port) as address:
                    system.tcp_address = address
                    self._announce(address)
                    await self._stop.wait()
                    await jobs.cancel_all()
                    await self._end(cluster)

    def _announce(self, address: str) -> None:
        about = {
            "pid": os.getpid(),
            "version": control.version(),
            "socket": os.fspath(self.layout.daemon_socket),
            "tcp_address": address,
        }
        write_private(self.layout.daemon_json, json.dumps(about, indent=1).encode())
        log.info("daemon serves", **about)

    async def _end(self, cluster: Cluster) -> None:
        if self._everything:
            log.info("everything is stopped")
            await cluster.stop_everything()
            self.layout.daemon_json.unlink(missing_ok=True)
        else:
            log.info("daemon ends, engines and replica servers go on")
            await cluster.forget()


def _last_port(layout: Layout) -> int:
    """The TCP port of the daemon before, if it can be had: bookmarks and Prometheus targets stay true."""
    try:
        port = int(str(read_daemon_json(layout).get("tcp_address", "")).rsplit(":", 1)[1])
    except (IndexError, ValueError):
        return 0
    return port if is_free(port) else 0


@contextmanager
def only_one(layout: Layout) -> Iterator[None]:
    """Hold the directory's lock. Raises BlockingIOError if another daemon does."""
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def configure_log() -> None:
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event"], bool_as_flag=False
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="timestamp=%(asctime)s level=%(levelname)s event=%(message)r",
    )


async def serve(
    layout: Layout, *, node_count: int, port: int, programs: Programs, replace_after_s: float
) -> None:
    daemon = Daemon(
        layout, node_count=node_count, port=port, programs=programs, replace_after_s=replace_after_s
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.shut_down, False)
    await daemon.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="control.daemon", description="The daemon of a local cluster.")
    parser.add_argument("--dir", type=Path, required=True, help="the cluster's directory")
    parser.add_argument("--nodes", type=int, default=3, help=f"local nodes, 1 to {NODES_MAX}")
    parser.add_argument("--port", type=int, default=0, help="TCP port of the REST API on 127.0.0.1")
    parser.add_argument(
        "--replace-after-s",
        type=float,
        default=REPLACE_AFTER_S,
        help="how long a replica may be gone until another node gets a new one; 0: never",
    )
    return run(parser.parse_args(), Programs())


def run(options: argparse.Namespace, programs: Programs) -> int:
    configure_log()
    layout = Layout(options.dir)
    try:
        if not 1 <= options.nodes <= NODES_MAX:
            raise BadRequest(reason=f"--nodes is 1 to {NODES_MAX}")
        if not 0 <= options.replace_after_s < float("inf"):
            raise BadRequest(reason="--replace-after-s is a number of seconds, 0 for never")
        layout.prepare()
        with only_one(layout):
            asyncio.run(
                serve(
                    layout,
                    node_count=options.nodes,
                    port=options.port,
                    programs=programs,
                    replace_after_s=options.replace_after_s,
                )
            )
    except BlockingIOError:
        log.error("another daemon runs here", dir=str(layout.dir))
        return EXIT_ALREADY_RUNNING
    except StorageError as error:
        log.error("daemon cannot start", reason=str(error))
        return EXIT_REFUSED
    except ExceptionGroup as group:
        log.exception("daemon failed", exc_info=group)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
