"""Stop on a signal, but only between two operations, so that what was begun can be put back."""

from __future__ import annotations

import signal

from kvmifup.errors import InterruptedRun

_arrived: list[int] = []


def catch() -> None:
    """From now on SIGTERM, SIGINT and SIGHUP only take note; `checkpoint` acts on it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: _arrived.append(number))


def checkpoint() -> None:
    """Raise InterruptedRun if a signal has arrived."""
    if _arrived:
        raise InterruptedRun(f"interrupted by {signal.Signals(_arrived[0]).name}", hint="run it again")
