"""A node for each test; the tools take the process out of the host's namespaces before there is any test to run."""

from __future__ import annotations

from harness import namespaces
from harness.fixtures import node, on_our_own  # noqa: F401 (fixtures of these tests)

namespaces.isolate()
