"""A node for each test; the tools take the process out of the host's namespaces before there is any test to run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import namespaces, nodes

namespaces.isolate()


@pytest.fixture
def node() -> Iterator[nodes.Node]:
    """A node with nothing on it but lo."""
    with nodes.fresh_node() as fresh:
        yield fresh


@pytest.fixture(autouse=True)
def on_our_own() -> None:
    """No test runs where the run was started."""
    namespaces.guard()
