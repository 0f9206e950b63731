"""What happens on a node meanwhile, by `ip monitor`; and in a directory, by inotify."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.tools import CLEAN, PATIENCE, ip

FENCE = 31999  # the priority of rules that nobody else has


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
        lines = [line for line in self._text.decode().splitlines() if f" {FENCE}:\t" not in line.replace("]", " ")]
        self._text = b""
        return [line for line in lines if not line.startswith("[NEIGH]") or "PERMANENT" in line or "proxy" in line]

    def _fenced(self, wait: float) -> bool:
        table = next(self._numbers)
        ip(f"rule add priority {FENCE} table {table}")
        ip(f"rule del priority {FENCE} table {table}")
        end = f"[RULE]Deleted {FENCE}:\tfrom all lookup {table}".encode()
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


IN_MOVED_TO = 0x80  # sys/inotify.h
EVENT = struct.Struct("iIII")  # struct inotify_event: watch, mask, cookie, length of the name


@contextlib.contextmanager
def renamed_in(directory: Path) -> Iterator[Callable[[], list[str]]]:
    """Yields what gives the names that files in *directory* have got since, in order."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    assert libc.inotify_add_watch(descriptor, os.fsencode(directory), IN_MOVED_TO) > 0

    def names() -> list[str]:
        found, data, offset = [], os.read(descriptor, 65536), 0
        while offset < len(data):
            *_, length = EVENT.unpack_from(data, offset)
            offset += EVENT.size
            found.append(data[offset : offset + length].rstrip(b"\0").decode())
            offset += length
        return found

    try:
        yield names
    finally:
        os.close(descriptor)
