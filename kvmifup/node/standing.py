"""What is the same for all NICs of a node: its own addresses, and its default routes in every table.

Each run asks for it, and to find it the kernel has to tell all addresses and routes of all guests. A process that lives
long keeps it (`keep`), and reads it anew only after the kernel has told of a change that can matter. A change is
reported before whoever made it goes on, so what is kept is right whenever it is asked for.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator

from kvmifup.node import nexthops
from kvmifup.node.addresses import addresses
from kvmifup.node.messages import (
    BODY,
    IFADDRMSG,
    IFINFOMSG,
    NLMSGHDR,
    RECEIVE,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
)
from kvmifup.node.netlink import Netlink

EVERY_TABLE = 0  # RT_TABLE_UNSPEC
GROUPS = (1, 5, 7, 9, 11, 32)  # linux/rtnetlink.h: LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, NEXTHOP
RT_SCOPE_LINK = 253  # linux/rtnetlink.h

Addresses = list[tuple[int, str]]  # the device's index, the address with its prefix length


def read_defaults(family: int, via: Netlink) -> list[bytes]:
    """The default routes of *family*, AF_*, in every table, as whole messages. Raises NetlinkError."""
    return nexthops.defaults(via.routes(family, EVERY_TABLE, keep=nexthops.is_default))


def read_addresses(family: int, via: Netlink) -> Addresses:
    """Every address of *family*, AF_*, that the node has. Raises NetlinkError."""
    return addresses(via.transport, family)


class Standing:
    """What is kept, for all threads of a process, in the network namespace that it was made in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._defaults: dict[int, list[bytes]] = {}  # by family
        self._addresses: dict[int, Addresses] = {}
        self._devices: set[int] = set()  # what happens to one of these matters
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, sum(1 << group - 1 for group in GROUPS)))

    def close(self) -> None:
        """Keep nothing any longer."""
        self._socket.close()

    def defaults(self, family: int, via: Netlink) -> list[bytes]:
        """As `read_defaults`."""
        with self._lock:
            self._catch_up()
            if family not in self._defaults:
                found = read_defaults(family, via)
                self._devices |= {hop.index for hop in nexthops.hops(found, via.transport)}
                self._defaults[family] = found
            return self._defaults[family]

    def addresses(self, family: int, via: Netlink) -> Addresses:
        """As `read_addresses`, without IPv6 ones of link scope, which every tap has."""
        with self._lock:
            self._catch_up()
            if family not in self._addresses:
                found = [one for one in read_addresses(family, via) if not one[1].startswith("fe80:")]
                self._devices |= {index for index, _ in found}
                self._addresses[family] = found
            return self._addresses[family]

    def _catch_up(self) -> None:
        """Forget what is kept if something has happened since that can change it."""
        for kind, body in self._happened():
            if self._matters(kind, body):
                for known in (self._defaults, self._addresses, self._devices):
                    known.clear()

    def _happened(self) -> Iterator[tuple[int, bytes]]:
        while True:
            try:
                data = self._socket.recv(RECEIVE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield 0, b""  # more than there was room for
                continue
            yield NLMSGHDR.unpack_from(data)[1], data[BODY:]  # one message each

    def _matters(self, kind: int, body: bytes) -> bool:
        """Whether a message of *kind* can be about an address or a default route.

        IPv4 routes go without a word with their device, and when it is set down (fib_flush in
        net/ipv4/fib_frontend.c); all IPv6 ones go with the last address.
        """
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            return body[1] == 0  # the length of the prefix
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            return IFINFOMSG.unpack_from(body)[2] in self._devices
        if kind in (RTM_NEWADDR, RTM_DELADDR):
            family, _length, _flags, scope, index = IFADDRMSG.unpack_from(body)
            return index in self._devices or (family, scope) != (socket.AF_INET6, RT_SCOPE_LINK)
        return True


_kept: list[Standing] = []


def keep() -> Callable[[], None]:
    """From now on keep what is read, for this process; what it returns ends that. Raises OSError."""
    standing = Standing()
    _kept.append(standing)

    def end() -> None:
        _kept.remove(standing)
        standing.close()

    return end


def defaults(family: int, via: Netlink) -> list[bytes]:
    """The default routes of *family*, AF_*, in every table, as whole messages. Raises NetlinkError."""
    return _kept[0].defaults(family, via) if _kept else read_defaults(family, via)


def own_addresses(family: int, via: Netlink) -> Addresses:
    """The addresses of *family*, AF_*, that the node has; perhaps without those of link scope. Raises NetlinkError."""
    return _kept[0].addresses(family, via) if _kept else read_addresses(family, via)
