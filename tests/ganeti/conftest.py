"""Ganeti's own code against our packages: `pytest tests/ganeti`, as root, on the Python that the lab needs.

$KVM_IFUP_DEBS names a directory with built packages to test; without it, they are made from the checkout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import guest
from lab.nodes import Mode
from tests.ganeti import cluster


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """kvm-ifup and kvm-ifup-ganeti."""
    return cluster.our_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def image() -> guest.Image:
    """A guest that boots and answers."""
    return guest.build(print)


@pytest.fixture(params=["bridged", "routed"])
def mode(request: pytest.FixtureRequest) -> Mode:
    """How the guest's NICs are wired."""
    found: Mode = request.param
    return found


@pytest.fixture
def version() -> str:
    """Which Ganeti."""
    return "3.0"


@pytest.fixture
def two_nodes(mode: Mode, packages: list[Path], version: str) -> Iterator[cluster.Cluster]:
    """Nodes a and b, with Ganeti and our packages."""
    with cluster.cluster(mode, packages, version) as found:
        yield found


@pytest.fixture
def bare(mode: Mode) -> Iterator[cluster.Node]:
    """A node with Ganeti alone."""
    with cluster.cluster(mode, []) as found:
        yield found.a
