"""Which network namespace this is: journals belong to one."""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path

PLACE = "/proc/self/ns/net"
SO_NETNS_COOKIE = 71  # asm-generic/socket.h


def number() -> int:
    """The number that `lsns` shows. That of one that is gone is given to another."""
    return Path(PLACE).stat().st_ino


def cookie() -> int:
    """The cookie of this network namespace, which no later one gets; 0 if the kernel has none (before 5.14)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        try:
            return int.from_bytes(asking.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return 0
