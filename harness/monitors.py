"""What happens on a node meanwhile, by `ip monitor`."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
from collections.abc import Iterator

import pytest

from harness.tools import CLEAN, PATIENCE, ip


class Monitor:
    """`ip monitor all`, and where in its output a stretch of time begins and ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["ip", "monitor", "all"], env=CLEAN, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        )
        self._text = b""
        self._numbers = itertools.count(7001)
        # Until it has subscribed it misses what happens: repeat until something has been seen.
        while not self._fenced(wait=0.05):
            pass
        self.events()

    def events(self) -> list[str]:
        """What has happened since the last call; neighbour entries that the kernel keeps for itself left out."""
        while not self._fenced(wait=PATIENCE):
            pytest.fail("ip monitor does not show what happens")
        lines = [line for line in self._text.decode().splitlines() if "lookup 70" not in line]
        self._text = b""
        return [line for line in lines if not line.startswith("[NEIGH]") or "PERMANENT" in line or "proxy" in line]

    def _fenced(self, wait: float) -> bool:
        table = next(self._numbers)
        ip(f"rule add priority 31999 table {table}")
        ip(f"rule del priority 31999 table {table}")
        end = f"[RULE]Deleted 31999:\tfrom all lookup {table}".encode()
        assert self._process.stdout is not None
        while end not in self._text:
            if not select.select([self._process.stdout], [], [], wait)[0]:
                return False
            self._text += os.read(self._process.stdout.fileno(), 65536)
        return True

    def close(self) -> None:
        """Stop watching."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def monitored() -> Iterator[Monitor]:
    """A Monitor that ends with the block."""
    monitor = Monitor()
    try:
        yield monitor
    finally:
        monitor.close()
