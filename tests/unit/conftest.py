"""The unit suite: `pytest tests/unit`.

`pytest tests/unit --regenerate-golden` writes tests/unit/golden/ anew and fails every test that it wrote a
file for, so that it cannot stay switched on: read `git diff tests/unit/golden`, then run without it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvmifup.agent.loop import Loop

from .samples import NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# No deadline and no look at the speed: how long an example takes says nothing on a loaded machine. The size
# of a generated node is no fault either, and Debian's Hypothesis has its doubts at times.
settings.register_profile(
    "unit",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("unit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/unit/golden anew, and fail")


@pytest.fixture(autouse=True, scope="module")
def no_pyroute2() -> Iterator[None]:
    """Importing pyroute2 fails, whether it is installed or not: nothing here may need it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyroute2", None)
        yield


@pytest.fixture(autouse=True, scope="module")
def in_one_namespace() -> Iterator[None]:
    """The network namespace of the samples, whichever one the kernel's tests have left this process in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvmifup.runs.namespaces.PLACE", NAMESPACE)
        yield


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, where a test is not about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def caught_signals() -> Iterator[None]:
    """`kvmifup.signals.catch` for the length of a test."""
    from kvmifup.core import signals

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signals.catch()
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    signals._arrived.clear()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop, and its end; signal handlers as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGIO, signal.SIGTERM)}
    one = Loop()
    yield one
    one.close()
    for number, handler in before.items():
        signal.signal(number, handler)
