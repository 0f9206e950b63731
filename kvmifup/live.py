"""What runs and the agent do, told to whoever watches at the moment: `kvm-ifup watch`.

A watcher listens on a datagram socket of its own in the directory `watch` below the run directory, which is root's
alone. Whoever has something to tell sends it to each of them and never waits; with no watcher that is one look into
a directory.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BUFFER = 1 << 20  # bytes that may wait for a watcher that is busy writing
LARGEST = 1 << 17  # bytes of a datagram


def tell(run_dir: Path, event: dict[str, Any]) -> None:
    """Send *event* to every watcher; one that has gone without a word is cleared away."""
    directory = run_dir / "watch"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    if not names:
        return
    data = json.dumps(event).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        for name in names:
            try:
                sender.sendto(data, str(directory / name))
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    (directory / name).unlink(missing_ok=True)


@contextmanager
def watching(run_dir: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """An endless iterator of the events from now on. Raises OSError."""
    directory = run_dir / "watch"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{os.getpid()}.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        listener.bind(str(path))
        try:
            yield _events(listener)
        finally:
            path.unlink(missing_ok=True)


def _events(listener: socket.socket) -> Iterator[dict[str, Any]]:
    while True:
        with suppress(ValueError):
            event: dict[str, Any] = json.loads(listener.recv(LARGEST))
            yield event
