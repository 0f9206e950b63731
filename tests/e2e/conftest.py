"""Fixtures for the tests of the scripts; a test that asks for `node` takes the process out of the host's namespaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import netns


@pytest.fixture
def node() -> Iterator[netns.Node]:
    """A node with nothing on it but lo."""
    with netns.fresh_node() as fresh:
        yield fresh
