"""Fixtures of tests that run in namespaces of their own; a conftest.py that imports them offers them to its tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import namespaces, nodes


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
