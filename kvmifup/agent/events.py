"""What the kernel reports unasked: devices that go or come up, changes that a plan relied on, and changed journals."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvmifup.agent.loop import Loop
from kvmifup.node import messages

RTNLGRP_LINK, RTNLGRP_ROUTE, RTNLGRP_NETCONF = (1,), (7, 11), (24, 25)  # linux/rtnetlink.h; IPv4, IPv6
RTM_NEWNETCONF = 80
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000  # linux/if.h
NETCONFA_IFINDEX, NETCONFA_IFINDEX_DEFAULT = 1, -2  # linux/netconf.h
BUFFER = 1 << 20  # bytes: some thousand events
AT_ONCE = 512  # events


@dataclass(frozen=True)
class NetlinkMessage:
    """One netlink message, without its header."""

    kind: int
    body: bytes


class Subscription:
    """Calls *heard* with the messages of *groups*, *lost* when the kernel could not tell all."""

    def __init__(
        self,
        loop: Loop,
        groups: tuple[int, ...],
        heard: Callable[[list[NetlinkMessage]], None],
        lost: Callable[[], None],
    ) -> None:
        self.heard, self.lost = heard, lost
        self.socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.socket.bind((0, sum(1 << group - 1 for group in groups)))
        loop.watch(self.socket, self.read)

    def read(self) -> bool:
        """Take what has come, at most `AT_ONCE` messages; False if there was nothing.

        Each change is a message of its own, and who hears of it looks through all taps.
        """
        found: list[NetlinkMessage] = []
        lost = False
        with suppress(BlockingIOError):
            for _ in range(AT_ONCE):
                try:
                    found += split(self.socket.recv(messages.RECEIVE))
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    lost = True
        if found:
            self.heard(found)
        if lost:
            self.lost()
        return bool(found) or lost


def split(data: bytes) -> Iterator[NetlinkMessage]:
    """The netlink messages in *data*."""
    offset = 0
    while offset + messages.NLMSGHDR.size <= len(data):
        length, kind, *_ = messages.NLMSGHDR.unpack_from(data, offset)
        yield NetlinkMessage(kind, data[offset + messages.NLMSGHDR.size : offset + length])
        offset += max(length + 3 & ~3, messages.NLMSGHDR.size)


class LinkEvents(Subscription):
    """Calls *gone* with the indices of devices that have disappeared, *up* with the names of those that have come up.

    And *lost* when the kernel could not tell all.
    """

    def __init__(
        self,
        loop: Loop,
        gone: Callable[[list[int]], None],
        up: Callable[[list[str]], None],
        lost: Callable[[], None],
    ) -> None:
        down: set[int] = set()

        def heard(found: list[NetlinkMessage]) -> None:
            if indices := removed(found):
                gone(indices)
            if names := came_up(found, down):
                up(names)

        super().__init__(loop, RTNLGRP_LINK, heard, lost)


def removed(found: list[NetlinkMessage]) -> list[int]:
    """The indices of the devices whose removal *found* reports."""
    links = (messages.IFINFOMSG.unpack_from(one.body) for one in found if one.kind == messages.RTM_DELLINK)
    # With another family it is not the device that goes: a port that leaves its bridge says AF_BRIDGE.
    return [index for family, _type, index, _flags, _change in links if family == socket.AF_UNSPEC]


def came_up(found: list[NetlinkMessage], down: set[int]) -> list[str]:
    """The names of the devices that *found* reports to have come up, with a carrier.

    *down* has the indices of devices that are down or have no carrier, and is updated. A message says whether
    somebody has set the device up or down (`ifi_change`), but not whether the carrier has changed.
    """
    names = []
    for one in found:
        if one.kind not in (messages.RTM_NEWLINK, messages.RTM_DELLINK):
            continue
        family, _type, index, flags, changed = messages.IFINFOMSG.unpack_from(one.body)
        if family != socket.AF_UNSPEC:
            continue
        if one.kind == messages.RTM_NEWLINK and not flags & IFF_LOWER_UP:
            down.add(index)
            continue
        if one.kind == messages.RTM_NEWLINK and (index in down or changed & IFF_UP):
            name = messages.attributes(one.body, messages.IFINFOMSG.size).get(messages.IFLA_IFNAME)
            names.append(messages.text(name) or "")
        down.discard(index)
    return names


@dataclass(frozen=True)
class Touched:
    """What has changed on the node: devices by their index, destinations of routes. 0 and "" stand for any."""

    devices: frozenset[int]
    routes: frozenset[str]


ANYTHING = Touched(frozenset({0}), frozenset({""}))


class NodeEvents(Subscription):
    """Calls *changed* when something has changed that a plan may have relied on: a device, what it forwards, a route.

    A socket of its own: in a storm of routes no device's end must get lost.
    """

    def __init__(self, loop: Loop, changed: Callable[[Touched], None]) -> None:
        def heard(found: list[NetlinkMessage]) -> None:
            changed(touched(found))

        groups = (*RTNLGRP_LINK, *RTNLGRP_ROUTE, *RTNLGRP_NETCONF)
        super().__init__(loop, groups, heard, lambda: changed(ANYTHING))

    def catch_up(self) -> None:
        """Take all that has come by now: a change is reported before whoever made it goes on."""
        while self.read():
            pass


def touched(found: list[NetlinkMessage]) -> Touched:
    """What *found* is about. A default route's destination is "0.0.0.0/0" or "::/0"."""
    devices, routes = set(), set()
    for one in found:
        if one.kind in (messages.RTM_NEWLINK, messages.RTM_DELLINK):
            family, _type, index, _flags, _change = messages.IFINFOMSG.unpack_from(one.body)
            if family == socket.AF_UNSPEC:
                devices.add(index)
        elif one.kind in (messages.RTM_NEWROUTE, messages.RTM_DELROUTE):
            family, length = one.body[:2]
            destination = messages.attributes(one.body, messages.RTMSG.size).get(messages.RTA_DST)
            packed = destination or bytes(16 if family == socket.AF_INET6 else 4)
            with suppress(ValueError, OSError):  # of a family that is none of ours
                routes.add(f"{socket.inet_ntop(family, packed)}/{length}")
        elif one.kind == RTM_NEWNETCONF:
            packed = messages.attributes(one.body, 4).get(NETCONFA_IFINDEX, b"")
            index = int.from_bytes(packed, sys.byteorder, signed=True)
            if index != NETCONFA_IFINDEX_DEFAULT:
                devices.add(max(index, 0))  # -1 is the one for all
    return Touched(frozenset(devices), frozenset(routes))


class DirectoryEvents:
    """Calls *changed* after files in *directory* have come, gone or been replaced (fcntl(2), F_NOTIFY)."""

    def __init__(self, loop: Loop, directory: Path, changed: Callable[[], None]) -> None:
        self._directory = directory
        self._changed = changed
        self._descriptors: tuple[int, ...] = ()
        loop.on_signal(signal.SIGIO, self._notified)
        self.renew()

    def renew(self) -> None:
        """Watch what is at the directory's path now, and its parent: somebody may remove it and make another.

        Raises OSError.
        """
        self.close()
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        wanted = fcntl.DN_RENAME | fcntl.DN_DELETE | fcntl.DN_MULTISHOT
        self._descriptors = (opened(self._directory, wanted),)
        self._descriptors += (opened(self._directory.parent, wanted | fcntl.DN_CREATE),)

    def close(self) -> None:
        """Watch it no longer."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = ()

    def _notified(self) -> None:
        # Only once there is another: it may still be on its way out.
        with suppress(OSError):
            if self._descriptors and not os.path.samestat(self._directory.stat(), os.fstat(self._descriptors[0])):
                self.renew()
        self._changed()


def opened(directory: Path, events: int) -> int:
    """A descriptor of *directory* that has SIGIO sent for *events*, as in fcntl(2). Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.fcntl(descriptor, fcntl.F_NOTIFY, events)
    return descriptor
