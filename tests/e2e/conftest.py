"""The lab, for the tests that migrate a real guest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import guest, hooks
from lab.hooks import Hooks

from .moves import Moved, staged

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def image() -> guest.Image:
    return guest.build(print)


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Hooks:
    python = Path(os.environ.get("KVM_IFUP_PYTHON", "/usr/bin/python3"))
    return hooks.hooks(REPOSITORY / "scripts", python, tmp_path_factory.mktemp("scripts"))


@pytest.fixture
def bridged(scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    yield from staged("bridged", scripts, image)


@pytest.fixture
def routed(scripts: Hooks, image: guest.Image) -> Iterator[Moved]:
    yield from staged("routed", scripts, image)
