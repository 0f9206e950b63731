"""The whole process leaves the host's namespaces when this is imported: before there is any test to run."""

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


@pytest.fixture
def uplinked(node: nodes.Node) -> nodes.Node:
    """A node with an uplink to the client, ready for routed guests."""
    node.uplink()
    return node


@pytest.fixture(autouse=True)
def on_our_own() -> None:
    """No test runs where the run was started."""
    namespaces.guard()
