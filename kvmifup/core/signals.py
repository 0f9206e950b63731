"""Stop on a signal, but only between two operations, so that what was begun can be put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmifup.core.errors import InterruptedRun

_arrived: list[int] = []
_callers = threading.local()


def catch() -> None:
    """From now on SIGTERM, SIGINT and SIGHUP only take note; `checkpoint` acts on it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: _arrived.append(number))


@contextmanager
def while_wanted(gone: Callable[[], bool]) -> Iterator[None]:
    """In here, `checkpoint` also stops this thread once *gone* says that its caller has gone.

    A hook that is killed puts back what it has done; one that the agent runs must do the same.
    """
    _callers.gone = gone
    try:
        yield
    finally:
        del _callers.gone


def checkpoint() -> None:
    """Raise InterruptedRun if a signal has arrived, or nobody waits for the outcome any more."""
    if _arrived:
        raise InterruptedRun(f"interrupted by {signal.Signals(_arrived[0]).name}", hint="run it again")
    still_wanted()


def still_wanted() -> None:
    """Raise InterruptedRun if nobody waits for the outcome any more."""
    gone = getattr(_callers, "gone", None)
    if gone and gone():
        raise InterruptedRun("the caller has gone", hint="run it again")
