"""What systemd hands over, and what it wants to hear."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from kvmifup.core.errors import UsageError

FIRST_ACTIVATED = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


def activated() -> socket.socket | None:
    """The socket that systemd has opened for us; None if we were started in another way. See sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise UsageError("systemd hands over more or less than one socket", hint="see kvm-ifupd.socket")
    listener = socket.socket(fileno=FIRST_ACTIVATED)
    os.set_inheritable(FIRST_ACTIVATED, False)
    listener.setblocking(False)
    return listener


def is_journal(descriptor: int) -> bool:
    """Whether what is written to *descriptor* goes to systemd's journal: see $JOURNAL_STREAM in systemd.exec(5)."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def notify(state: str) -> None:
    """Tell systemd, if it wants to know: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def watchdog() -> float:
    """How often, in seconds, systemd wants a sign of life at least; 0 for never. See sd_watchdog_enabled(3)."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    return int(limit) / 1e6 if limit.isascii() and limit.isdigit() else 0.0
