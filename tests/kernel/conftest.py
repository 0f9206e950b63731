"""The whole process leaves the host's namespaces when this is imported: before there is any test to run."""

from __future__ import annotations

import sys

import pytest

from harness import namespaces
from harness.fixtures import node, on_our_own, uplinked  # noqa: F401 (fixtures of these tests)

namespaces.isolate()


@pytest.fixture(autouse=True)
def only_what_is_marked_loads_pyroute2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mark it cannot be imported in this process: the run with the other pyroute2 would miss the test."""
    if request.node.get_closest_marker("pyroute2") is None:
        for name in ("pyroute2", *[name for name in sys.modules if name.startswith("pyroute2.")]):
            monkeypatch.setitem(sys.modules, name, None)
