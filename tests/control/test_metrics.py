"""Metrics: the document lists them all, and the numbers come out as Prometheus reads them."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from control.metrics import Snapshot, Snapshots, add_engine, histogram
from control.metrics_table import METRICS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_document_lists_every_metric_as_it_is() -> None:
    rows = [
        tuple(cell.strip() for cell in line.strip("|\n").split("|"))
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| dolmen_")
    ]
    assert rows == [(s.name, s.kind, s.unit, ", ".join(s.labels), s.help) for s in METRICS]


def test_names_say_kind_and_unit() -> None:
    for spec in METRICS:
        assert spec.name.endswith("_total") == (spec.kind == "counter"), spec.name
        if spec.unit == "bytes":
            assert "_bytes" in spec.name


def test_log2_microsecond_buckets_become_cumulative_seconds() -> None:
    buckets, sum_s = histogram([1, 0, 2, 4], 1_500_000)
    assert buckets == [("1e-06", 1), ("2e-06", 1), ("4e-06", 3), ("+Inf", 7)]
    assert sum_s == 1.5


def test_what_an_engine_counts_is_parsed_back_by_prometheus() -> None:
    stats = {
        "reads": 10,
        "writes": 20,
        "read_bytes": 4096,
        "errors": 1,
        "in_flight": 3,
        "latency_us_write": [0] * 10 + [5] + [0] * 13,
        "latency_us_write_sum": 4000,
        "slots": [{"connected": True, "in_flight": 2, "requests": 7, "bytes": 8, "latency_us_sum": 500_000}],
    }
    snapshot = Snapshot()
    add_engine(snapshot, "data", ["data-r1", "data-r2"], stats)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshots(snapshot))
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    write = (("kind", "write"), ("volume", "data"))
    assert samples["dolmen_engine_requests_total", write] == 20
    assert samples["dolmen_engine_latency_seconds_count", write] == 5
    assert samples["dolmen_engine_latency_seconds_sum", write] == 0.004
    bucket = (("kind", "write"), ("le", "0.001024"), ("volume", "data"))
    assert samples["dolmen_engine_latency_seconds_bucket", bucket] == 5
    replica = (("replica", "data-r1"), ("volume", "data"))
    assert samples["dolmen_engine_replica_latency_seconds_total", replica] == 0.5
    assert ("dolmen_engine_replica_connected", (("replica", "data-r2"), ("volume", "data"))) not in samples
