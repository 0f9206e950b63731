"""One line in the system's log for every run of a phase: it stays when a hook's output is discarded.

RFC 3164, as syslog(3) writes it to /dev/log. The `syslog` module will not do: its identifier belongs to the process,
and the agent runs several programs at a time. It also waits when the log is stuck, and a VM start must not.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.text import printable
from kvmifup.runs.outcome import Outcome
from kvmifup.tell import render

SOCKET = "/dev/log"
DAEMON = 3 << 3  # the facility; sys/syslog.h
ERROR, WARNING, INFO = 3, 4, 6  # the severity
MAX_TEXT = 1500  # bytes: all of the line that every log keeps
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


_writing = threading.Lock()
_lost = 0  # lines that the log has not taken since the last one that it has


def run(program: str, done: Sequence[Outcome], failures: Sequence[KvmIfupError], seconds: float, by: str) -> None:
    """Say what *program*, called by *by*, did in *seconds*: a line for each NIC, remark and failure."""
    end = f"{1000 * seconds:.0f} ms, by {by}"
    for outcome in done:
        ops = sum(change.needed for change in (*outcome.undone, *outcome.changes))
        write(program, INFO, f"{render.heading(outcome)}: {ops} {'op' if ops == 1 else 'ops'}, {end}")
        for remark in outcome.remarks:
            write(program, WARNING, f"{outcome.label}: {remark}")
    for failure in failures:
        hint = f" ({failure.hint})" if failure.hint else ""
        where = f"{failure.where}: " if failure.where else ""
        write(program, ERROR, f"{where}code {failure.code}: {failure}{hint}, {end}")


def write(program: str, severity: int, text: str) -> None:
    """Write one line. If there is no log, nothing happens; if it is full, the next line that it takes says so."""
    global _lost
    now = time.localtime()
    moment = f"{MONTHS[now.tm_mon - 1]} {now.tm_mday:2} {now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02}"

    def line(severity: int, text: str) -> bytes:
        start = f"<{DAEMON | severity}>{moment} {program}[{os.getpid()}]: "
        return f"{start}{printable(text)}".encode("utf-8", "backslashreplace")[:MAX_TEXT]

    with _writing, suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as log:
        log.setblocking(False)
        log.connect(SOCKET)
        try:
            if _lost:
                log.send(line(ERROR, f"{_lost} lines lost: this log did not take them"))
                _lost = 0
            log.send(line(severity, text))
        except BlockingIOError:
            _lost += 1
