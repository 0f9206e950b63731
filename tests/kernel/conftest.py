"""The whole process leaves the host's namespaces when this is imported: before there is any test to run."""

from __future__ import annotations

import sys
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


@pytest.fixture(autouse=True)
def only_what_is_marked_loads_pyroute2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mark it cannot be imported in this process: the run with the other pyroute2 would miss the test."""
    if request.node.get_closest_marker("pyroute2") is None:
        for name in ("pyroute2", *[name for name in sys.modules if name.startswith("pyroute2.")]):
            monkeypatch.setitem(sys.modules, name, None)
