"""The clock by which a journal says how old it is: nobody can set it, and it goes on while the node sleeps."""

from __future__ import annotations

import time

from kvmifup.node import procfs
from kvmifup.runs.journal import Journal


def uptime() -> float:
    """Seconds since the node was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def age(journal: Journal) -> float:
    """How many seconds ago the phase of *journal* was reached, or last changed something."""
    if journal.boot == procfs.boot():
        return max(0.0, uptime() - journal.uptime)
    return max(0.0, time.time() - journal.since)  # of another start, or from before it was noted
