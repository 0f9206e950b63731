"""Stop a run on a signal, but only between two operations, so that it can put back what it has done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmifup.core.errors import InterruptedRun

_arrived: list[int] = []
_callers = threading.local()


def catch() -> None:
    """From now on SIGTERM, SIGINT and SIGHUP are only noted, and `checkpoint` acts on them.

    One that our caller has us ignore stays ignored: nohup(1) does that, and a shell in the background.
    """
    hear_of_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: _arrived.append(number))


def hear_of_children() -> None:
    """From now on it is known how a child has ended.

    A caller that ignores SIGCHLD hands that on. Then the kernel tells nobody, and `subprocess` takes it for success.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def while_wanted(gone: Callable[[], bool]) -> Iterator[None]:
    """In this context, `checkpoint` also stops the calling thread, as soon as *gone* says that its caller has gone.

    A hook that is killed puts back what it has done. A hook that the agent runs must do the same.
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
