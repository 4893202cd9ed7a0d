"""A private network for a test, or a skipped test where none can be made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from bench.network import NetworkUnavailable, PrivateNetwork, private_network


@contextlib.contextmanager
def network_or_skip() -> Iterator[PrivateNetwork]:
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(private_network())
        except NetworkUnavailable as error:
            pytest.skip(str(error))
        yield network
