"""One run at a time per tap, and one at a time on what several taps share."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvmifup.core.errors import LockTimeoutError
from kvmifup.core.signals import checkpoint
from kvmifup.inputs import places

UPLINK = "uplink"  # no clash with a tap of that name: its lock is "tap.uplink"
TOKEN = 16  # bytes that each run writes into the file of a lock when it gets it, if it writes anything: `Store.begin`
MOST = 6  # times the timeout that somebody waits at most, however often the lock changes hands
LONGEST = 0.2  # seconds between two questions to the kernel. Each asks after twice as long as it has waited so far: two
# hundred processes that asked fifty times a second would leave no processor for the one that they wait for.
WANTED = 0.25  # seconds between two looks whether somebody in line is still wanted


def of_tap(tap: str) -> str:
    """The name of the lock of *tap*."""
    return f"tap.{tap}"


def path(run_dir: Path, name: str) -> Path:
    """The file of the lock *name*; there once the lock has been held."""
    return run_dir / "lock" / name


@contextmanager
def hold(run_dir: Path, names: Sequence[str], timeout: float) -> Iterator[None]:
    """Hold the locks *names*, taken in sorted order so that two runs cannot wait for each other.

    *timeout* is in seconds, for all of them, and for one holder: it begins anew when somebody else gets the lock. With
    0 nobody is waited for. Raises LockTimeoutError, NotReadyError. The files stay: removing a lock file that another
    run has just opened would give both the lock.
    """
    directory = places.made(run_dir, "lock")
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        for name in sorted(names):
            file = f"{directory}/{name}"
            descriptor = places.lock_file(file)
            stack.callback(os.close, descriptor)
            turn = stack.enter_context(_in_line(file))
            _wait(descriptor, name, deadline, timeout, turn)
            # Explicitly: a forked announcer may hold a copy of the descriptor for a moment.
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
        yield


# Who in this process wants a lock, by its file: the first holds it, or asks the kernel for it. Were all to ask, sixty
# threads that look fifty times a second would take the processor from the one that they wait for, and luck would say
# who is next.
_lines: dict[str, deque[threading.Event]] = {}
_changing = threading.Lock()


@contextmanager
def _in_line(file: str) -> Iterator[threading.Event]:
    """Stand in line for the lock *file*; yields what is set when it is our turn. Who leaves has the next one's set."""
    turn = threading.Event()
    with _changing:
        line = _lines.setdefault(file, deque())
        line.append(turn)
        line[0].set()
    try:
        yield turn
    finally:
        with _changing:
            line.remove(turn)
            if line:
                line[0].set()
            else:
                del _lines[file]


def _wait(descriptor: int, name: str, deadline: float, timeout: float, turn: threading.Event) -> None:
    pause = 0.001
    last = deadline + (MOST - 1) * timeout
    holder: bytes | None = None  # nobody has been seen to hold it
    while True:
        if turn.is_set() or timeout == 0:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
        now = time.monotonic()
        before, holder = holder, os.pread(descriptor, TOKEN, 0)
        if before not in (None, holder):
            deadline = min(now + timeout, last)
        if now >= deadline:
            whose = f"other runs have held the lock {name} for {MOST * timeout:g} s, one after the other"
            if not timeout or deadline < last:
                whose = f"another run has held the lock {name} for {timeout:g} s"
            raise LockTimeoutError(whose, hint="try again") from None
        checkpoint()
        if turn.is_set():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST)
        else:
            turn.wait(min(WANTED, deadline - now))
