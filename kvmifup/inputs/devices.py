"""The names of network devices: one has many, and only one of them is its own."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Iterable

SIOCGIFNAME, SIOCGIFINDEX = 0x8910, 0x8933  # linux/sockios.h
IFREQ = struct.Struct("16si20x")  # a name, and an index in the union behind it
LONGEST = 15  # bytes of a name that fits in there


def index_of(name: str) -> int | None:
    """The index of the device that is called *name*, also if that is an alternative name; None if there is none.

    Raises OSError if nobody can be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        return _index(asking, name)


def no_longer(named: Iterable[tuple[str, int]]) -> list[str]:
    """Which of the names in *named* are not, or no longer, those of the devices with these indices.

    Raises OSError if nobody can be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        return [name for name, index in named if _index(asking, name) != index]


def name_of(index: int) -> str | None:
    """The own name of the device with *index*, None if there is none. Raises OSError if nobody can be asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        return _name(asking, index)


def own_name(name: str) -> str:
    """The device's own name, if *name* is another one of it (ip-link(8), altname); else *name*.

    Only so it has one journal and one lock. Raises OSError if nobody can be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        index = _index(asking, name)
        return name if index is None else _name(asking, index) or name  # it may have just gone


def _name(asking: socket.socket, index: int) -> str | None:
    try:
        answer = fcntl.ioctl(asking, SIOCGIFNAME, IFREQ.pack(b"", index))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    found: bytes = IFREQ.unpack(answer)[0]
    return found.rstrip(b"\0").decode("utf-8", "surrogateescape")


def _index(asking: socket.socket, name: str) -> int | None:
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > LONGEST:
        return None
    try:
        found: int = IFREQ.unpack(fcntl.ioctl(asking, SIOCGIFINDEX, IFREQ.pack(encoded, 0)))[1]
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return found
