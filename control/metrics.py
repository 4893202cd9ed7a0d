"""``/metrics``: what the processes count, as Prometheus reads it.

Owns the collection: every process is asked at once, with a short deadline; who does not answer has no
samples, which is what an alert on absence wants. Does not own the counting (the data
plane does) or the names (``control/metrics_table.py``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import control
from control.cluster import Cluster
from control.links import ASK_TIMEOUT_S
from control.metrics_table import METRICS, Spec
from control.reconcile import NodeState
from control.views import VolumeState
from protocol.errors import StorageError

CALLS_AT_ONCE_MAX = 32
"""Questions under way during one scrape: a node with a thousand replicas is asked in turns."""

US_PER_S = 1_000_000


BY_NAME: Mapping[str, Spec] = {spec.name: spec for spec in METRICS}

ENGINE_REQUESTS = {
    "read": "reads",
    "write": "writes",
    "flush": "flushes",
    "trim": "trims",
    "zeroes": "zeroes",
}
ENGINE_GAUGES = ("clients", "in_flight", "in_flight_bytes", "waiting")
LATENCIES = ("read", "write", "flush")
REPLICA_COUNTERS = (
    "reads",
    "writes",
    "flushes",
    "read_bytes",
    "write_bytes",
    "checksum_errors",
    "repairs",
    "scrub_blocks_verified",
    "scrub_damaged_found",
)
REPLICA_GAUGES = (
    "dirty_regions",
    "blocks_present",
    "allocated_bytes",
    "sessions",
    "damaged_blocks",
    "scrub_running",
    "scrub_position_regions",
    "scrub_last_done_seconds",
)


@dataclass(slots=True)
class Snapshot:
    """Samples of one scrape. A value of None is left out: nobody answered."""

    samples: dict[str, list[tuple[tuple[str, ...], Any]]] = field(default_factory=dict)

    def add(self, name: str, labels: Iterable[object], value: Any) -> None:
        assert name in BY_NAME, name
        if value is not None:
            self.samples.setdefault(name, []).append((tuple(str(label) for label in labels), value))


class Snapshots(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for spec in METRICS:
            samples = self._snapshot.samples.get(spec.name, [])
            if spec.kind == "histogram":
                yield _histogram(spec, samples)
                continue
            kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
            family = kind(spec.name, spec.help, labels=spec.labels)
            for labels, value in samples:
                family.add_metric(labels, float(value))
            yield family


def _histogram(spec: Spec, samples: list[tuple[tuple[str, ...], Any]]) -> Metric:
    family = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
    for labels, (buckets, sum_s) in samples:
        family.add_metric(labels, buckets, sum_s)
    return family


def histogram(counts: list[int], sum_us: float) -> tuple[list[tuple[str, float]], float]:
    """The data plane's buckets (bucket i: up to 2**i microseconds; the last one also what is above)
    as Prometheus' cumulative ones."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for index, count in enumerate(counts):
        total += count
        last = index == len(counts) - 1
        buckets.append(("+Inf" if last else repr(2**index / US_PER_S), total))
    return buckets or [("+Inf", 0)], sum_us / US_PER_S


async def render(cluster: Cluster) -> bytes:
    snapshot = Snapshot()
    await _collect(cluster, snapshot)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshots(snapshot))
    return generate_latest(registry)


async def _collect(cluster: Cluster, snapshot: Snapshot) -> None:
    snapshot.add("dolmen_daemon_info", (control.version(),), 1)
    _process(snapshot, "daemon", "", os.getpid())
    for name, supervisor in cluster.supervisors.items():
        snapshot.add("dolmen_node_up", (name,), int(supervisor.state is NodeState.UP))
        _process(snapshot, "replica_server", name, supervisor.pid)
    for name, slot in cluster.slots.items():
        _process(snapshot, "engine", name, slot.pid)
    volumes = await cluster.volumes()
    for node in await cluster.nodes():
        snapshot.add("dolmen_node_space_total_bytes", (node.name,), node.space_total_bytes)
        snapshot.add("dolmen_node_space_free_bytes", (node.name,), node.space_free_bytes)
    limit = asyncio.Semaphore(CALLS_AT_ONCE_MAX)
    questions = []
    for volume in volumes:
        for state in VolumeState:
            snapshot.add("dolmen_volume_state", (volume.name, state.value), int(state is volume.state))
        snapshot.add("dolmen_volume_size_bytes", (volume.name,), volume.size_bytes)
        snapshot.add("dolmen_volume_epoch", (volume.name,), volume.epoch)
        snapshot.add("dolmen_volume_replicas", (volume.name,), volume.replica_count)
        in_sync = sum(replica.id in volume.membership.in_sync for replica in volume.replicas)
        snapshot.add("dolmen_volume_replicas_in_sync", (volume.name,), in_sync)
        for reason in {condition.reason for condition in volume.conditions}:
            snapshot.add("dolmen_volume_condition", (volume.name, reason), 1)
        ids = [replica.id for replica in volume.replicas]
        questions.append(_engine(cluster, snapshot, volume.name, ids, limit))
        for replica in volume.replicas:
            labels = (volume.name, replica.id, replica.node)
            questions.append(_replica(cluster, snapshot, labels, volume.volume_id, limit))
    await asyncio.gather(*questions)


async def _engine(
    cluster: Cluster, snapshot: Snapshot, volume: str, replica_ids: list[str], limit: asyncio.Semaphore
) -> None:
    try:
        async with limit:
            stats = await cluster.engine_call(volume, "engine.stats", timeout_s=ASK_TIMEOUT_S)
    except StorageError:
        return
    if isinstance(stats, dict):
        add_engine(snapshot, volume, replica_ids, stats)


def add_engine(snapshot: Snapshot, volume: str, replica_ids: list[str], stats: Mapping[str, Any]) -> None:
    for kind, key in ENGINE_REQUESTS.items():
        snapshot.add("dolmen_engine_requests_total", (volume, kind), stats.get(key))
    for kind in ("read", "write"):
        snapshot.add("dolmen_engine_bytes_total", (volume, kind), stats.get(f"{kind}_bytes"))
    snapshot.add("dolmen_engine_errors_total", (volume,), stats.get("errors"))
    for key in ("repairs", "hedged_reads", "hedge_wins", "lease_waits", "order_waits"):
        snapshot.add(f"dolmen_engine_{key}_total", (volume,), stats.get(key))
    snapshot.add("dolmen_engine_resync_bytes_total", (volume,), stats.get("resync_bytes"))
    snapshot.add("dolmen_engine_resync_limit_bytes", (volume,), stats.get("resync_rate_bytes_s"))
    for key in ENGINE_GAUGES:
        snapshot.add(f"dolmen_engine_{key}", (volume,), stats.get(key))
    for kind in LATENCIES:
        counts, sum_us = stats.get(f"latency_us_{kind}"), stats.get(f"latency_us_{kind}_sum")
        if isinstance(counts, list):
            snapshot.add("dolmen_engine_latency_seconds", (volume, kind), histogram(counts, sum_us or 0))
    slots = stats.get("slots")
    for replica, slot in zip(replica_ids, slots if isinstance(slots, list) else (), strict=False):
        labels = (volume, replica)
        snapshot.add("dolmen_engine_replica_connected", labels, int(bool(slot.get("connected"))))
        if "slow" in slot:
            snapshot.add("dolmen_engine_replica_slow", labels, int(bool(slot["slow"])))
        snapshot.add("dolmen_engine_replica_in_flight", labels, slot.get("in_flight"))
        snapshot.add("dolmen_engine_replica_requests_total", labels, slot.get("requests"))
        snapshot.add("dolmen_engine_replica_bytes_total", labels, slot.get("bytes"))
        sum_us = slot.get("latency_us_sum")
        if sum_us is not None:
            snapshot.add("dolmen_engine_replica_latency_seconds_total", labels, sum_us / US_PER_S)


async def _replica(
    cluster: Cluster,
    snapshot: Snapshot,
    labels: tuple[str, str, str],
    volume_id: str,
    limit: asyncio.Semaphore,
) -> None:
    node = labels[2]
    try:
        async with limit:
            stats = await cluster.link(node).call(
                "replica.stats", timeout_s=ASK_TIMEOUT_S, volume_id=volume_id
            )
    except StorageError:
        return
    if isinstance(stats, dict):
        for key in REPLICA_COUNTERS:
            snapshot.add(f"dolmen_replica_{key}_total", labels, stats.get(key))
        for key in REPLICA_GAUGES:
            snapshot.add(f"dolmen_replica_{key}", labels, stats.get(key))


def _process(snapshot: Snapshot, piece: str, name: str, pid: int | None) -> None:
    if pid is None:
        return
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except OSError:
        return  # it ended this moment
    ticks = int(fields[11]) + int(fields[12])  # user and system time
    resident_pages = int(fields[21])
    snapshot.add("dolmen_process_cpu_seconds_total", (piece, name), ticks / os.sysconf("SC_CLK_TCK"))
    snapshot.add(
        "dolmen_process_resident_memory_bytes", (piece, name), resident_pages * os.sysconf("SC_PAGE_SIZE")
    )
