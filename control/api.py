"""The daemon's HTTP face: a unix socket for this user, loopback TCP for whoever holds the token.

Owns sockets, authentication, caps and the shape of errors. Does not own what a route does
(``control/routes.py``).

Promises: who proved nothing costs one connection and one header for HEADER_DEADLINE_S; past
CONNECTIONS_MAX new connections are closed and the old ones stay; a bad request changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from control.errors import NoSuchRoute, RequestTooLarge
from control.http_input import BODY_BYTES_MAX, parse_body, parse_query
from control.http_status import http_status
from control.listeners import LOOPBACK, listen_tcp, listen_unix
from control.metrics import render
from control.openapi import openapi
from control.routes import PLAIN_ROUTES, ROUTES, Request, Route, System
from protocol.errors import BadRequest, NotAuthenticated, StorageError

CONNECTIONS_MAX = 256
"""Of each listener: people, scripts, one Prometheus. Each costs tens of KiB. Counted apart: anybody on this
machine can crowd the TCP port, and that must not shut out whoever may use the unix socket."""

HEADER_DEADLINE_S = 10.0
"""From accept to the end of the first request's header."""

BODY_DEADLINE_S = 10.0
KEEPALIVE_S = 15.0
SHUTDOWN_GRACE_S = 2.0

SYSTEM = web.AppKey("system", System)
TOKEN = web.AppKey("token", str)
SILENT = web.AppKey("silent", set[asyncio.BaseProtocol])

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(system: System, *, token: str) -> web.Application:
    app = web.Application(middlewares=[_errors, _authentication], client_max_size=BODY_BYTES_MAX)
    app[SYSTEM], app[TOKEN], app[SILENT] = system, token, set()
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _answer(route))
    app.router.add_get("/openapi.json", _openapi)
    app.router.add_get("/metrics", _metrics)
    return app


def _answer(route: Route) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        body = None
        if route.body is not None:
            body = parse_body(await _read(request), route.body)
        query = parse_query(request.query, route.query)
        result = await route.handler(request.app[SYSTEM], Request(request.match_info, query, body))
        return web.Response(text=result.model_dump_json(), content_type="application/json")

    return answer


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            return await request.read()
    except TimeoutError as error:
        raise BadRequest(reason=f"the body did not arrive within {BODY_DEADLINE_S:.0f} s") from error


async def _openapi(request: web.Request) -> web.Response:
    return web.json_response(openapi())


async def _metrics(request: web.Request) -> web.Response:
    text = await render(request.app[SYSTEM].cluster)
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


@web.middleware
async def _errors(request: web.Request, handler: Answer) -> web.StreamResponse:
    try:
        return await handler(request)
    except StorageError as error:
        return _error(error)
    except web.HTTPNotFound:
        return _error(NoSuchRoute(method=request.method, path=request.path[:100]))
    except web.HTTPMethodNotAllowed as error:
        response = _error(NoSuchRoute(method=request.method, path=request.path[:100]))
        response.set_status(405)
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    except web.HTTPRequestEntityTooLarge:
        return _error(RequestTooLarge(limit_bytes=BODY_BYTES_MAX))
    except Exception:  # noqa: BLE001 - a bug of ours: logged, and the client gets a clear answer
        structlog.get_logger().exception("request failed by a bug", method=request.method, path=request.path)
        return _error(StorageError("internal error; the daemon's log has it"))


def _error(error: StorageError) -> web.Response:
    return web.json_response(error.to_wire(), status=http_status(error), dumps=_dumps)


def _dumps(wire: Any) -> str:
    return json.dumps(wire, default=str)  # an error's fields may be of any kind


_PUBLIC = {route.path for route in ROUTES if route.public} | PLAIN_ROUTES.keys()


@web.middleware
async def _authentication(request: web.Request, handler: Answer) -> web.StreamResponse:
    request.app[SILENT].discard(request.protocol)
    resource = request.match_info.route.resource
    if resource is not None and resource.canonical in _PUBLIC:
        return await handler(request)
    if not _is_unix(request.transport):  # the socket's mode is the proof there
        offered = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(offered, f"Bearer {request.app[TOKEN]}".encode()):
            raise NotAuthenticated("A token is needed: Authorization: Bearer, with what api.token holds.")
    return await handler(request)


@asynccontextmanager
async def serve_api(app: web.Application, *, socket_path: Path, port: int) -> AsyncIterator[str]:
    """Listen until the block ends. Gives the TCP address."""
    runner = web.AppRunner(
        app, access_log=None, keepalive_timeout=KEEPALIVE_S, shutdown_timeout=SHUTDOWN_GRACE_S
    )
    await runner.setup()
    loop = asyncio.get_running_loop()

    accepted: dict[bool, set[web.RequestHandler]] = {True: set(), False: set()}
    """Not yet among the server's connections: a whole backlog is accepted before the first of it is."""

    def accept(*, unix: bool) -> asyncio.BaseProtocol:
        assert runner.server is not None
        held = sum(_is_unix(other.transport) == unix for other in runner.server.connections)
        if held + len(accepted[unix]) >= CONNECTIONS_MAX:
            return _Refusal()
        protocol: web.RequestHandler = runner.server()
        accepted[unix].add(protocol)
        loop.call_soon(accepted[unix].discard, protocol)  # just before its connection_made
        app[SILENT].add(protocol)
        loop.call_later(HEADER_DEADLINE_S, _close_silent, app, protocol)
        return protocol

    listener = listen_tcp(port)
    address = f"{LOOPBACK}:{listener.getsockname()[1]}"
    servers = [
        await loop.create_unix_server(partial(accept, unix=True), sock=listen_unix(socket_path)),
        await loop.create_server(partial(accept, unix=False), sock=listener),
    ]
    try:
        yield address
    finally:
        for server in servers:
            server.close()
        await runner.cleanup()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path)


def _is_unix(transport: asyncio.BaseTransport | None) -> bool:
    """Also False for a connection that is gone: nothing is known of it."""
    return transport is not None and isinstance(transport.get_extra_info("sockname"), str)


def _close_silent(app: web.Application, protocol: web.RequestHandler) -> None:
    if protocol in app[SILENT]:
        app[SILENT].discard(protocol)
        if protocol.transport is not None:
            protocol.transport.close()


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
