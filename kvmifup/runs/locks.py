"""One run at a time per tap, and one at a time on what several taps share."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvmifup.core.errors import LockTimeoutError
from kvmifup.core.signals import checkpoint
from kvmifup.inputs import places

UPLINK = "uplink"  # no clash with a tap of that name: its lock is "tap.uplink"


def of_tap(tap: str) -> str:
    """The name of the lock of *tap*."""
    return f"tap.{tap}"


def path(run_dir: Path, name: str) -> Path:
    """The file of the lock *name*; there once the lock has been held."""
    return run_dir / "lock" / name


@contextmanager
def hold(run_dir: Path, names: Sequence[str], timeout: float) -> Iterator[None]:
    """Hold the locks *names*, taken in sorted order so that two runs cannot wait for each other.

    *timeout* is in seconds, for all of them. Raises LockTimeoutError, NotReadyError. The files stay: removing a lock
    file that another run has just opened would give both the lock.
    """
    directory = places.made(run_dir, "lock")
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        for name in sorted(names):
            descriptor = places.lock_file(f"{directory}/{name}")
            stack.callback(os.close, descriptor)
            _wait(descriptor, name, deadline, timeout)
            # Explicitly: a forked announcer may hold a copy of the descriptor for a moment.
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
        yield


def _wait(descriptor: int, name: str, deadline: float, timeout: float) -> None:
    pause = 0.001
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockTimeoutError(
                    f"another run has held the lock {name} for {timeout:g} s", hint="try again"
                ) from None
        checkpoint()
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
