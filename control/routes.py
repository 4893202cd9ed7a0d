"""The REST API's table: every route, what it takes, what it answers, what it does.

Owns the mapping from requests to ``control.cluster``'s operations. Does not own HTTP itself
(``control/api.py``). ``/openapi.json`` is generated from ``ROUTES``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

import control
from control.cluster import Cluster
from control.jobs import Jobs
from control.model import NodeWanted
from control.recovering import recover, show_recovery, withdraw
from control.recovery import Recovery, RecoveryOrder
from control.views import (
    DaemonView,
    Empty,
    FindingView,
    Health,
    JobList,
    JobView,
    NodeList,
    NodeStop,
    NodeView,
    ReplacementView,
    ReplicaList,
    ReplicaReplace,
    Shutdown,
    StatusView,
    VolumeAttach,
    VolumeCreate,
    VolumeDeleted,
    VolumeDetach,
    VolumeList,
    VolumeResize,
    VolumeView,
    WhyView,
)


@dataclass(slots=True)
class System:
    """What the routes act on."""

    cluster: Cluster
    jobs: Jobs
    shut_down: Callable[[bool], None]  # True: everything
    tcp_address: str = ""
    started_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any  # an instance of the route's request model


Handler = Callable[[System, Request], Awaitable[BaseModel]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    summary: str
    handler: Handler
    answer: type[BaseModel]
    body: type[BaseModel] | None = None
    query: tuple[str, ...] = ()
    public: bool = False  # without a token on loopback


QUERY_MEANING = {
    "wait_s": "seconds to wait until the goal is reached; the answer then says how far it is",
    "volume": "only this volume",
    "name": "only what concerns this node, volume or replica",
}


async def _health(system: System, request: Request) -> Health:
    waits_for = await system.cluster.waits_for()
    return Health(ready=not waits_for, waits_for=waits_for)


async def _status(system: System, request: Request) -> StatusView:
    layout = system.cluster.layout
    daemon = DaemonView(
        version=control.version(),
        pid=os.getpid(),
        dir=str(layout.dir),
        socket=str(layout.daemon_socket),
        tcp_address=system.tcp_address,
        uptime_s=round(time.monotonic() - system.started_at_s, 1),
    )
    nodes = await system.cluster.nodes()
    return StatusView(daemon=daemon, nodes=nodes, volumes=await system.cluster.volumes())


async def _why(system: System, request: Request) -> WhyView:
    findings = await system.cluster.why(request.query.get("name", ""))
    views = [FindingView.model_validate(finding.model_dump()) for finding in findings]
    return WhyView(healthy=not findings, findings=views)


async def _volume_list(system: System, request: Request) -> VolumeList:
    return VolumeList(volumes=await system.cluster.volumes())


async def _volume_create(system: System, request: Request) -> VolumeView:
    return await system.cluster.create_volume(request.body, wait_s=request.query["wait_s"])


async def _volume_show(system: System, request: Request) -> VolumeView:
    return await system.cluster.volume(request.path["name"])


async def _volume_delete(system: System, request: Request) -> VolumeDeleted:
    left = await system.cluster.delete_volume(request.path["name"], wait_s=request.query["wait_s"])
    return VolumeDeleted(gone=left is None, volume=left)


async def _volume_attach(system: System, request: Request) -> VolumeView:
    view = await system.cluster.attach_volume(
        request.path["name"], tcp=request.body.tcp, wait_s=request.query["wait_s"]
    )
    system.jobs.attached()
    return view


async def _volume_detach(system: System, request: Request) -> VolumeView:
    return await system.cluster.detach_volume(
        request.path["name"], force=request.body.force, wait_s=request.query["wait_s"]
    )


async def _volume_resize(system: System, request: Request) -> VolumeView:
    return await system.cluster.resize_volume(
        request.path["name"], request.body.size_bytes, wait_s=request.query["wait_s"]
    )


async def _volume_verify(system: System, request: Request) -> JobView:
    return await system.jobs.verify(request.path["name"])


async def _volume_scrub(system: System, request: Request) -> JobView:
    return await system.jobs.scrub(request.path["name"])


async def _recovery_show(system: System, request: Request) -> Recovery:
    return await show_recovery(system.cluster, request.path["name"])


async def _recovery_order(system: System, request: Request) -> VolumeView:
    return await recover(system.cluster, request.path["name"], request.body, wait_s=request.query["wait_s"])


async def _recovery_withdraw(system: System, request: Request) -> VolumeView:
    return await withdraw(system.cluster, request.path["name"])


async def _replica_list(system: System, request: Request) -> ReplicaList:
    name = request.query.get("volume")
    volumes = [await system.cluster.volume(name)] if name else await system.cluster.volumes()
    return ReplicaList(replicas=[replica for volume in volumes for replica in volume.replicas])


async def _replica_rebuild(system: System, request: Request) -> VolumeView:
    return await system.cluster.rebuild_replica(
        request.path["name"], request.path["replica"], wait_s=request.query["wait_s"]
    )


async def _replica_replace(system: System, request: Request) -> ReplacementView:
    return await system.cluster.replace_replica(
        request.path["name"], request.path["replica"], request.body, wait_s=request.query["wait_s"]
    )


async def _node_list(system: System, request: Request) -> NodeList:
    return NodeList(nodes=await system.cluster.nodes())


async def _node_stop(system: System, request: Request) -> NodeView:
    return await system.cluster.set_node(
        request.path["name"],
        NodeWanted.STOPPED,
        kill=request.body.kill,
        wait_s=request.query["wait_s"],
    )


async def _node_start(system: System, request: Request) -> NodeView:
    return await system.cluster.set_node(
        request.path["name"], NodeWanted.RUNNING, kill=False, wait_s=request.query["wait_s"]
    )


async def _job_list(system: System, request: Request) -> JobList:
    return JobList(jobs=system.jobs.views())


async def _job_show(system: System, request: Request) -> JobView:
    return system.jobs.view(request.path["id"])


async def _shutdown(system: System, request: Request) -> Empty:
    system.shut_down(request.body.everything)
    return Empty()


WAIT = ("wait_s",)

ROUTES: tuple[Route, ...] = (
    Route("GET", "/healthz", "Is everything as wanted?", _health, Health, public=True),
    Route("GET", "/v1/status", "The cluster at a glance", _status, StatusView),
    Route("GET", "/v1/why", "What is not as desired, root causes first", _why, WhyView, query=("name",)),
    Route("GET", "/v1/volumes", "All volumes", _volume_list, VolumeList),
    Route("POST", "/v1/volumes", "Create a volume", _volume_create, VolumeView, VolumeCreate, WAIT),
    Route("GET", "/v1/volumes/{name}", "One volume", _volume_show, VolumeView),
    Route("DELETE", "/v1/volumes/{name}", "Delete a volume", _volume_delete, VolumeDeleted, query=WAIT),
    Route("POST", "/v1/volumes/{name}/attach", "Attach", _volume_attach, VolumeView, VolumeAttach, WAIT),
    Route("POST", "/v1/volumes/{name}/detach", "Detach", _volume_detach, VolumeView, VolumeDetach, WAIT),
    Route("POST", "/v1/volumes/{name}/resize", "Grow", _volume_resize, VolumeView, VolumeResize, WAIT),
    Route(
        "POST", "/v1/volumes/{name}/verify", "Start to compare all replicas", _volume_verify, JobView, Empty
    ),
    Route("POST", "/v1/volumes/{name}/scrub", "Start to read and repair", _volume_scrub, JobView, Empty),
    Route("GET", "/v1/volumes/{name}/recovery", "What is left of a volume", _recovery_show, Recovery),
    Route(
        "POST",
        "/v1/volumes/{name}/recovery",
        "Open with what is left, and give up the rest",
        _recovery_order,
        VolumeView,
        RecoveryOrder,
        WAIT,
    ),
    Route(
        "DELETE", "/v1/volumes/{name}/recovery", "Take back what was not done", _recovery_withdraw, VolumeView
    ),
    Route("GET", "/v1/replicas", "All replicas", _replica_list, ReplicaList, query=("volume",)),
    Route(
        "POST",
        "/v1/volumes/{name}/replicas/{replica}/rebuild",
        "Make a damaged replica anew",
        _replica_rebuild,
        VolumeView,
        Empty,
        WAIT,
    ),
    Route(
        "POST",
        "/v1/volumes/{name}/replicas/{replica}/replace",
        "Put a new replica on another node in the place of one that is gone",
        _replica_replace,
        ReplacementView,
        ReplicaReplace,
        WAIT,
    ),
    Route("GET", "/v1/nodes", "All nodes", _node_list, NodeList),
    Route("POST", "/v1/nodes/{name}/stop", "Keep a node down", _node_stop, NodeView, NodeStop, WAIT),
    Route("POST", "/v1/nodes/{name}/start", "Start a node again", _node_start, NodeView, Empty, WAIT),
    Route("GET", "/v1/jobs", "Jobs of this daemon's life", _job_list, JobList),
    Route("GET", "/v1/jobs/{id}", "One job", _job_show, JobView),
    Route("POST", "/v1/shutdown", "End the daemon", _shutdown, Empty, Shutdown),
)

PLAIN_ROUTES = {
    "/openapi.json": "This document",
    "/metrics": "Prometheus metrics",
}
"""Answered by ``control/api.py`` itself: not JSON models."""
