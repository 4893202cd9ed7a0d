"""Every metric: name, kind, unit, labels, meaning. ``docs/metrics.md`` lists the same; a test compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spec:
    name: str
    kind: str  # counter, gauge, histogram
    unit: str
    labels: tuple[str, ...]
    help: str


_VOLUME = ("volume",)
_VOLUME_KIND = ("volume", "kind")
_VOLUME_REPLICA = ("volume", "replica")
_REPLICA = ("volume", "replica", "node")
_PROCESS = ("piece", "name")

METRICS: tuple[Spec, ...] = (
    Spec("dolmen_daemon_info", "gauge", "1", ("version",), "1; the version is in the label"),
    Spec(
        "dolmen_process_cpu_seconds_total",
        "counter",
        "s",
        _PROCESS,
        "CPU time of daemon, engines and replica servers",
    ),
    Spec("dolmen_process_resident_memory_bytes", "gauge", "bytes", _PROCESS, "Resident memory of the same"),
    Spec("dolmen_node_up", "gauge", "0 or 1", ("node",), "1 while its replica server serves"),
    Spec(
        "dolmen_node_space_total_bytes", "gauge", "bytes", ("node",), "Size of the file system under its disk"
    ),
    Spec("dolmen_node_space_free_bytes", "gauge", "bytes", ("node",), "Free space there"),
    Spec("dolmen_volume_state", "gauge", "0 or 1", ("volume", "state"), "1 for the state the volume is in"),
    Spec("dolmen_volume_size_bytes", "gauge", "bytes", _VOLUME, "Size that clients see"),
    Spec(
        "dolmen_volume_epoch",
        "gauge",
        "1",
        _VOLUME,
        "Newest epoch granted; it grows with every attach and engine restart",
    ),
    Spec("dolmen_volume_replicas", "gauge", "1", _VOLUME, "Replicas it should have in sync"),
    Spec(
        "dolmen_volume_replicas_in_sync", "gauge", "1", _VOLUME, "Replicas that hold every acknowledged write"
    ),
    Spec(
        "dolmen_volume_condition",
        "gauge",
        "1",
        ("volume", "reason"),
        "1 for each reason why it is not as desired",
    ),
    Spec(
        "dolmen_engine_requests_total",
        "counter",
        "requests",
        _VOLUME_KIND,
        "Requests answered: read, write, flush, trim, zeroes",
    ),
    Spec("dolmen_engine_bytes_total", "counter", "bytes", _VOLUME_KIND, "Bytes of reads and writes answered"),
    Spec("dolmen_engine_errors_total", "counter", "requests", _VOLUME, "Requests answered with an error"),
    Spec(
        "dolmen_engine_repairs_total",
        "counter",
        "blocks",
        _VOLUME,
        "Bad copies found by a read and written again",
    ),
    Spec(
        "dolmen_engine_resync_bytes_total",
        "counter",
        "bytes",
        _VOLUME,
        "Bytes that replicas copied from others to be up to date",
    ),
    Spec(
        "dolmen_engine_resync_limit_bytes",
        "gauge",
        "bytes per second",
        _VOLUME,
        "What a resync may copy beside the client's work; 0: no limit, or none runs",
    ),
    Spec(
        "dolmen_engine_hedged_reads_total",
        "counter",
        "requests",
        _VOLUME,
        "Reads asked of a second replica because the first was late",
    ),
    Spec(
        "dolmen_engine_hedge_wins_total", "counter", "requests", _VOLUME, "Of these, those it answered first"
    ),
    Spec(
        "dolmen_engine_lease_waits_total",
        "counter",
        "requests",
        _VOLUME,
        "Answers to reads held until the read lease held again",
    ),
    Spec(
        "dolmen_engine_order_waits_total",
        "counter",
        "requests",
        _VOLUME,
        "Answers to reads held until a write they may show was done on all replicas",
    ),
    Spec("dolmen_engine_clients", "gauge", "1", _VOLUME, "NBD connections"),
    Spec(
        "dolmen_engine_in_flight",
        "gauge",
        "requests",
        _VOLUME,
        "Queue depth: requests taken and not yet answered",
    ),
    Spec("dolmen_engine_in_flight_bytes", "gauge", "bytes", _VOLUME, "Memory they hold"),
    Spec(
        "dolmen_engine_waiting",
        "gauge",
        "requests",
        _VOLUME,
        "Of these, those that wait for replicas or for a region",
    ),
    Spec(
        "dolmen_engine_latency_seconds",
        "histogram",
        "s",
        _VOLUME_KIND,
        "From request to reply: read, write, flush",
    ),
    Spec(
        "dolmen_engine_replica_connected",
        "gauge",
        "0 or 1",
        _VOLUME_REPLICA,
        "1 while the engine has a link to the replica",
    ),
    Spec(
        "dolmen_engine_replica_slow",
        "gauge",
        "0 or 1",
        _VOLUME_REPLICA,
        "1 while reads go to other replicas because they answer clearly faster",
    ),
    Spec(
        "dolmen_engine_replica_in_flight",
        "gauge",
        "requests",
        _VOLUME_REPLICA,
        "Requests sent to it and not yet answered",
    ),
    Spec(
        "dolmen_engine_replica_requests_total", "counter", "requests", _VOLUME_REPLICA, "Requests it answered"
    ),
    Spec(
        "dolmen_engine_replica_bytes_total", "counter", "bytes", _VOLUME_REPLICA, "Bytes moved to and from it"
    ),
    Spec(
        "dolmen_engine_replica_latency_seconds_total",
        "counter",
        "s",
        _VOLUME_REPLICA,
        "Sum of its answer times",
    ),
    Spec("dolmen_replica_reads_total", "counter", "requests", _REPLICA, "Reads applied since it was opened"),
    Spec(
        "dolmen_replica_writes_total", "counter", "requests", _REPLICA, "Writes applied since it was opened"
    ),
    Spec("dolmen_replica_flushes_total", "counter", "requests", _REPLICA, "Flushes done since it was opened"),
    Spec("dolmen_replica_read_bytes_total", "counter", "bytes", _REPLICA, "Bytes read"),
    Spec("dolmen_replica_write_bytes_total", "counter", "bytes", _REPLICA, "Bytes written"),
    Spec(
        "dolmen_replica_checksum_errors_total",
        "counter",
        "blocks",
        _REPLICA,
        "Blocks that did not match their checksum",
    ),
    Spec(
        "dolmen_replica_repairs_total", "counter", "blocks", _REPLICA, "Blocks written again from a good copy"
    ),
    Spec(
        "dolmen_replica_dirty_regions", "gauge", "regions", _REPLICA, "Regions marked in the write-intent log"
    ),
    Spec("dolmen_replica_blocks_present", "gauge", "blocks", _REPLICA, "Blocks that hold data"),
    Spec("dolmen_replica_allocated_bytes", "gauge", "bytes", _REPLICA, "Space used on disk"),
    Spec("dolmen_replica_sessions", "gauge", "1", _REPLICA, "Engines and peers connected to it"),
    Spec(
        "dolmen_replica_damaged_blocks",
        "gauge",
        "blocks",
        _REPLICA,
        "Blocks known as damaged and not repaired",
    ),
    Spec(
        "dolmen_replica_scrub_running",
        "gauge",
        "0 or 1",
        _REPLICA,
        "1 while a pass of its scrub is under way",
    ),
    Spec("dolmen_replica_scrub_position_regions", "gauge", "regions", _REPLICA, "Where that pass is"),
    Spec(
        "dolmen_replica_scrub_last_done_seconds",
        "gauge",
        "s",
        _REPLICA,
        "When a pass last came to the end, in seconds since 1970; 0: never",
    ),
    Spec(
        "dolmen_replica_scrub_blocks_verified_total",
        "counter",
        "blocks",
        _REPLICA,
        "Blocks verified by scrubs since its server started",
    ),
    Spec("dolmen_replica_scrub_damaged_found_total", "counter", "blocks", _REPLICA, "Of these, damaged ones"),
)
