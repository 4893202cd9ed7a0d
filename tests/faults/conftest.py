"""One cluster for all incidents, and a volume for each. What a test broke is mended after it."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator

import pytest

from control.client import Client
from tests.faults.incident import Incident
from tests.support.cluster import Cluster, cluster
from tests.support.network import network_or_skip

SIZE_BYTES = 64 * 1024 * 1024
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def networked_cluster() -> Iterator[Cluster]:
    """In a network of its own, whose packets may be lost."""
    with network_or_skip() as network, cluster(network=network) as running:
        yield running


@pytest.fixture
def incident(shared_cluster: Cluster) -> Iterator[Incident]:
    """An attached volume of 64 MiB with three replicas, healthy and all zeroes."""
    yield from prepared(shared_cluster)


@pytest.fixture
def networked(networked_cluster: Cluster) -> Iterator[Incident]:
    """The same, where the network can be hurt."""
    yield from prepared(networked_cluster)


def prepared(dolmen: Cluster) -> Iterator[Incident]:
    name, client = f"fault-{next(_numbers)}", Client(dolmen.dir)
    client.create_volume(name, SIZE_BYTES, 3)
    incident = Incident(name, client.attach(name)["nbd_uri"], dolmen)
    dolmen.wait_for_state(name, "healthy")
    yield incident
    incident.mend()
    client.detach(name)
    client.delete_volume(name)
    assert name not in {volume["name"] for volume in client.volumes()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The logs of the processes, for whoever reads about the failure."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    incident = arguments.get("incident") or arguments.get("networked")
    if report.failed and report.when == "call" and incident is not None:
        report.sections.append(("logs of the cluster", incident.dolmen.logs()))
    return report
