"""One cluster for the tests that only use it; tests that kill things make their own volumes in it."""

from __future__ import annotations

import itertools
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, cluster

TIMEOUT_S = 300
"""Per test. On a machine that does nothing else, the slowest takes a tenth of it."""

VOLUME_BYTES = 64 * 1024 * 1024
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Volume:
    """An attached volume of VOLUME_BYTES with three replicas."""

    name: str
    uri: str
    dolmen: Cluster

    @property
    def socket(self) -> Path:
        (path,) = urllib.parse.parse_qs(urllib.parse.urlsplit(self.uri).query)["socket"]
        return Path(path)


@pytest.fixture(scope="session")
def dolmen() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


def _attached(dolmen: Cluster) -> Iterator[Volume]:
    name = f"volume-{next(_numbers)}"
    uri = dolmen.create_and_attach(name, size=str(VOLUME_BYTES))
    yield Volume(name, uri, dolmen)
    dolmen.remove(name)


@pytest.fixture(scope="module")
def shared_volume(dolmen: Cluster) -> Iterator[Volume]:
    """For tests that leave it as usable as they found it. Its content is whatever."""
    yield from _attached(dolmen)


@pytest.fixture
def volume(dolmen: Cluster) -> Iterator[Volume]:
    """All zeroes, and the test's own."""
    yield from _attached(dolmen)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
