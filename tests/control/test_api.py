"""REST: the document is complete, errors are mapped, and bad input gets a clear answer."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import control.errors
from control import api
from control.http_input import BODY_BYTES_MAX, JSON_DEPTH_MAX, parse_body, parse_query
from control.http_status import HTTP_STATUS
from control.openapi import openapi
from control.routes import PLAIN_ROUTES, ROUTES
from control.views import Empty, VolumeCreate
from protocol.errors import BadRequest, StorageError, all_error_classes
from tests.control.daemons import FakeCluster, fake_cluster

assert control.errors  # registers its classes


def test_every_error_has_an_http_status() -> None:
    codes = set(all_error_classes()) | {StorageError.code}
    ours = {code for code in codes if not code.startswith("test_")}
    assert ours - HTTP_STATUS.keys() == set(), "decide what REST should say for these"
    assert HTTP_STATUS.keys() - codes == set(), "these errors do not exist any more"
    assert all(400 <= status < 600 for status in HTTP_STATUS.values())


def test_openapi_has_every_route_and_every_model() -> None:
    document = openapi()
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert listed == {(r.method, r.path) for r in ROUTES} | {("GET", path) for path in PLAIN_ROUTES}
    schemas = document["components"]["schemas"]
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in schemas
    for route in ROUTES:
        assert route.answer.__name__ in schemas
        assert route.body is None or route.body.__name__ in schemas
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["summary"] and operation["operationId"]
        assert {p["name"] for p in operation["parameters"]} == set(re.findall(r"{(\w+)}", route.path)) | set(
            route.query
        )
    assert len(
        {m["operationId"] for p in document["paths"].values() for m in p.values() if "operationId" in m}
    ) == len(ROUTES)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"name": NaN}', "NaN"),
        (b'{"a":' * 20 + b"1" + b"}" * 20, "deeper"),
        (b"[" * 60000, "deeper"),
        (b" " * (BODY_BYTES_MAX + 1), "over"),
        (b'{"name": "a", "size_bytes": 1e999}', "size_bytes"),
        (b'{"name": "a", "size_bytes": 4194304.5}', "size_bytes"),
        (b'{"name": "a", "size_bytes": true}', "size_bytes"),
        (b'{"name": "a", "size_bytes": 99999999999999999999999}', "largest"),
        (b'{"name": "a", "size_bytes": -4096}', "smallest"),
        (b'{"name": "../../etc", "size_bytes": 4194304}', "cannot be a name"),
        (b'{"name": "a", "size_bytes": 4194304, "__proto__": 1}', "__proto__"),
        (b'{"name": ["a"], "size_bytes": 4194304}', "name"),
    ],
)
def test_a_bad_body_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        parse_body(body, VolumeCreate)


def test_brackets_inside_strings_are_not_depth() -> None:
    text = json.dumps({"name": "a", "size_bytes": "[{" * 50 + '\\"['}).encode()
    with pytest.raises(BadRequest, match="size_bytes"):
        parse_body(text, VolumeCreate)
    deep = b'{"x":' * JSON_DEPTH_MAX + b"1" + b"}" * JSON_DEPTH_MAX
    with pytest.raises(BadRequest, match="x"):
        parse_body(deep, Empty)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_understood(body: bytes) -> None:
    try:
        parse_body(body, VolumeCreate)
    except BadRequest as error:
        assert len(str(error)) < 1500


def test_query_parameters_nobody_knows_are_refused() -> None:
    assert parse_query({"wait_s": "2.5"}, ("wait_s",))["wait_s"] == 2.5
    for query in ({"wait": "1"}, {"wait_s": "-1"}, {"wait_s": "x"}, {"wait_s": "1e9"}, {"wait_s": "nan"}):
        with pytest.raises(BadRequest):
            parse_query(query, ("wait_s",))


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster(node_count=1) as made:
        yield made


def tcp(cluster: FakeCluster) -> tuple[str, int]:
    host, port = json.loads(cluster.layout.daemon_json.read_text())["tcp_address"].split(":")
    return host, int(port)


def ask(cluster: FakeCluster, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*tcp(cluster), timeout=10)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text.startswith(b"{") else text
    finally:
        connection.close()


def test_over_tcp_a_token_is_needed_but_for_health_metrics_and_the_document(cluster: FakeCluster) -> None:
    token = cluster.layout.token.read_text()
    assert os.stat(cluster.layout.token).st_mode & 0o777 == 0o600
    for path in ("/v1/volumes", "/v1/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}):
            status, answer = ask(cluster, "GET", path, **headers)
            assert status == 401 and answer["code"] == "not_authenticated"
    assert ask(cluster, "GET", "/v1/volumes", Authorization=f"Bearer {token}") == (200, {"volumes": []})
    for path in ("/healthz", "/metrics", "/openapi.json"):
        assert ask(cluster, "GET", path)[0] == 200
    assert ask(cluster, "POST", "/v1/shutdown")[0] == 401


def test_the_unix_socket_is_private_and_needs_no_token(cluster: FakeCluster) -> None:
    for path in (cluster.layout.daemon_socket, cluster.layout.engine_rpc_socket):
        assert os.stat(path).st_mode & 0o777 == 0o600
    assert cluster.client.volumes() == []


def test_unknown_paths_and_methods_are_said(cluster: FakeCluster) -> None:
    bearer = f"Bearer {cluster.layout.token.read_text()}"
    assert ask(cluster, "GET", "/v2", Authorization=bearer)[1]["code"] == "no_such_route"
    status, answer = ask(cluster, "PUT", "/v1/volumes", Authorization=bearer)
    assert status == 405 and answer["code"] == "no_such_route"
    status, answer = ask(cluster, "POST", "/v1/volumes", b"x" * (BODY_BYTES_MAX + 1), Authorization=bearer)
    assert status == 413 and answer["code"] == "request_too_large"
    for path in ("/v1/volumes/%2e%2e%2f", "/v1/volumes/a%00b", "/v1/volumes/" + "a" * 3000):
        assert ask(cluster, "GET", path, Authorization=bearer)[0] == 404


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/volumes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        bytes(range(256)) * 20,
    ],
)
def test_what_is_not_http_is_answered_or_closed_and_the_daemon_goes_on(
    cluster: FakeCluster, data: bytes
) -> None:
    with socket.create_connection(tcp(cluster), timeout=10) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
        except OSError:
            pass  # closed on us
    assert cluster.client.health()["ready"]


def test_connections_past_the_cap_are_closed_and_old_ones_stay(cluster: FakeCluster) -> None:
    first = http.client.HTTPConnection(*tcp(cluster), timeout=10)
    first.request("GET", "/healthz")
    first.getresponse().read()
    held = []
    try:
        for _ in range(api.CONNECTIONS_MAX + 10):
            held.append(socket.create_connection(tcp(cluster), timeout=10))
        assert held[-1].recv(1) == b""  # refused: closed without a word
        assert cluster.client.status()["daemon"]  # the unix socket has room of its own
        first.request("GET", "/healthz")
        assert first.getresponse().status == 200
    finally:
        for client in held:
            client.close()
        first.close()
