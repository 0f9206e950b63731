"""A node for the tests of the scripts, and the lab for those that migrate a real guest.

A test that asks for `node` takes the process out of the host's namespaces. The lab does not mind: its own are below.
It needs more than Debian has, so it is loaded by whoever asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import nodes

if TYPE_CHECKING:
    from lab import guest
    from lab.hooks import Hooks

    from .moves import Moved

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def node() -> Iterator[nodes.Node]:
    """A node with nothing on it but lo."""
    with nodes.fresh_node() as fresh:
        yield fresh


@pytest.fixture(scope="session")
def image() -> guest.Image:
    """The guest that migrates."""
    from lab import guest

    return guest.build(print)


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Hooks:
    """The scripts under the interpreter that is to be tested."""
    from lab import hooks

    python = Path(os.environ.get("KVM_IFUP_PYTHON", "/usr/bin/python3"))
    return hooks.hooks(REPOSITORY / "scripts", python, tmp_path_factory.mktemp("scripts"))


@pytest.fixture
def bridged(scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    """A bridged guest on node a."""
    from .moves import staged

    yield from staged("bridged", scripts, image)


@pytest.fixture
def routed(scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    """A routed guest on node a."""
    from .moves import staged

    yield from staged("routed", scripts, image)
