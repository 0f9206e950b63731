"""What nftables does with guests' packets while somebody watches."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

from kvmifup.core.signals import checkpoint
from kvmifup.node import drops
from kvmifup.node.trace import traced

EVERY = 1.0  # seconds between two looks at what was dropped


class Drops:
    """What our rules drop of guests' packets, looked at from time to time."""

    def __init__(self) -> None:
        self._counts: drops.Counts | None = None
        self._next = 0.0

    def news(self) -> Iterator[dict[str, Any]]:
        """An event for each guest of which something was dropped since the last look, if it is time for one."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        before, self._counts = self._counts, drops.counted()
        if before is None:
            return
        for tap, reasons in drops.since(before, self._counts).items():
            said = ", ".join(f"{packets} ({why})" for why, packets in reasons.items())
            what = f"{tap}: dropped of what its guest sent: {said}"
            yield {"at": time.time(), "program": "nftables", "nic": tap, "what": what, "dropped": dict(reasons)}


def trace(tap: str) -> Generator[str, None, None]:
    """What nft says of each packet that comes in on *tap*, line by line; "" while it says nothing.

    Raises what `traced` raises, and InterruptedRun after a signal.
    """
    with traced(tap) as lines:
        for line in lines:
            checkpoint()
            yield line
