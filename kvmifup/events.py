"""What the kernel tells unasked: which devices have gone, and that a journal has changed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from kvmifup.loop import Loop

RTMGRP_LINK = 1  # linux/rtnetlink.h
RTM_DELLINK = 17
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
BUFFER = 1 << 20  # bytes: some thousand events
RECEIVE = 1 << 16


class LinkEvents:
    """Calls *gone* with the indices of devices that have disappeared, *lost* when the kernel could not tell all."""

    def __init__(self, loop: Loop, gone: Callable[[list[int]], None], lost: Callable[[], None]) -> None:
        self.gone, self.lost = gone, lost
        self.socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.socket.bind((0, RTMGRP_LINK))
        loop.watch(self.socket, self._read)

    def _read(self) -> None:
        try:
            found = removed(self.socket.recv(RECEIVE))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.lost()
            return
        if found:
            self.gone(found)


def removed(data: bytes) -> list[int]:
    """The indices of the devices whose removal *data*, netlink messages, reports."""
    found = []
    offset = 0
    while offset + HEADER.size + IFINFO.size <= len(data):
        length, kind, *_ = HEADER.unpack_from(data, offset)
        family, _type, index, _flags, _change = IFINFO.unpack_from(data, offset + HEADER.size)
        # With another family it is not the device that goes: a port that leaves its bridge says AF_BRIDGE.
        if kind == RTM_DELLINK and family == socket.AF_UNSPEC:
            found.append(index)
        offset += max(length + 3 & ~3, HEADER.size)
    return found


class DirectoryEvents:
    """Calls *changed* after files in *directory* have come, gone or been replaced (fcntl(2), F_NOTIFY)."""

    def __init__(self, loop: Loop, directory: Path, changed: Callable[[], None]) -> None:
        loop.on_signal(signal.SIGIO, changed)
        self._directory = directory
        self._descriptor = -1
        self.renew()

    def renew(self) -> None:
        """Watch what is at the directory's path now: somebody may have removed it and made another. Raises OSError."""
        self.close()
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.fcntl(self._descriptor, fcntl.F_NOTIFY, fcntl.DN_RENAME | fcntl.DN_DELETE | fcntl.DN_MULTISHOT)

    def close(self) -> None:
        """Watch it no longer."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
