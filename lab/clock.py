"""One clock for all: CLOCK_MONOTONIC in seconds, the same in each process and namespace of a machine."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds of CLOCK_MONOTONIC."""
    return time.monotonic()


def from_realtime(seconds: float) -> float:
    """A recent CLOCK_REALTIME stamp (from the kernel or from QMP) as seconds of CLOCK_MONOTONIC.

    To be called soon after the stamp was taken, so that no step of the wall clock lies between.
    """
    return seconds + time.monotonic() - time.time()
