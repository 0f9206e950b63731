"""Events for `kvm-ifup watch`: what runs and the agent do, sent to all who watch at the moment.

Each watcher listens on a datagram socket of its own in the directory `watch` below the run directory, where only root
may look. An event is sent to each of them, and never waits: who has no room for it misses it, and is told later how
many it has missed. Without a watcher it costs one look into the directory.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.signals import checkpoint
from kvmifup.inputs import places, trust
from kvmifup.runs.outcome import Outcome
from kvmifup.tell import render

BUFFER = 1 << 20  # bytes that may wait for a watcher that is busy writing
LARGEST = 1 << 17  # bytes of a datagram
OPS = 400  # in one event, so that it is not larger
More = Callable[[], Iterable[dict[str, Any]]]  # events that somebody else knows of
CHECK = 0.2  # seconds between two looks whether a signal has come


_telling = threading.Lock()
_missed: dict[str, int] = {}  # by watcher: events for which it had no room


def watched(run_dir: Path) -> bool:
    """Whether anybody watches, so that each op must be timed."""
    return bool(listeners(run_dir))


def listeners(run_dir: Path) -> list[str]:
    """The names of the sockets in the directory `watch`; none if others than root could have made one there."""
    try:
        names = os.listdir(f"{run_dir}/watch")
        if names:
            trust.check(run_dir / "watch", run_dir)
    except (OSError, trust.Untrusted):
        return []
    return names


def run(
    run_dir: Path,
    program: str,
    done: Sequence[Outcome],
    failures: Sequence[KvmIfupError],
    seconds: float,
    by: str,
    ops: Mapping[tuple[object, ...], float] | None,
) -> None:
    """Tell what *program*, called by *by*, did in *seconds*; *ops* has how long each op took, by its key."""
    if not watched(run_dir):
        return
    for outcome in done:
        needed = [change for change in (*outcome.undone, *outcome.changes) if change.needed]
        event = {
            "nic": outcome.label,
            "phase": outcome.phase.name.lower(),
            "what": f"{render.heading(outcome)}, {len(needed)} changed",
            "by": by,
            "seconds": seconds,
            "ops": [
                {"what": render.transition(change), "seconds": (ops or {}).get(change.op.key)}
                for change in needed[:OPS]
            ],
        }
        if len(needed) > OPS:
            event["more"] = len(needed) - OPS
        tell(run_dir, program, event)
    for failure in failures:
        what = f"code {failure.code}: {failure.where}{': ' if failure.where else ''}{failure}"
        tell(run_dir, program, {"nic": failure.where, "what": what, "by": by, "seconds": seconds, "ops": []})


def tell(run_dir: Path, program: str, event: dict[str, Any]) -> None:
    """Send *event* of *program* to every watcher; the socket of one that was killed is removed."""
    directory = run_dir / "watch"
    names = listeners(run_dir)
    if not names:
        return
    event = {"at": time.time(), "program": program, **event}
    data = json.dumps(event).encode()
    paths = [str(directory / name) for name in names]
    with _telling, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        for gone in _missed.keys() - paths:
            del _missed[gone]
        for path in paths:
            missed = _missed.get(path, 0)
            try:
                sender.sendto(json.dumps({**event, "missed": missed}).encode() if missed else data, path)
                _missed.pop(path, None)
            except BlockingIOError:
                _missed[path] = missed + 1
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    with suppress(FileNotFoundError):  # another run was quicker
                        os.unlink(path)


@contextmanager
def watching(run_dir: Path, more: More = lambda: ()) -> Iterator[Iterator[dict[str, Any]]]:
    """An endless iterator of the events from now on, and *more*, which is asked every `CHECK` seconds.

    Raises OSError; the iterator InterruptedRun, after a signal.
    """
    directory = places.made(run_dir, "watch", mode=0o700)
    path = directory / f"{os.getpid()}.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        listener.bind(str(path))
        try:
            yield _events(listener, more)
        finally:
            path.unlink(missing_ok=True)


def _events(listener: socket.socket, more: More) -> Iterator[dict[str, Any]]:
    listener.settimeout(CHECK)
    while True:
        checkpoint()
        yield from more()
        with suppress(ValueError, TimeoutError):
            event: dict[str, Any] = json.loads(listener.recv(LARGEST))
            yield event
