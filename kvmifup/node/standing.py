"""What a run asks for, and the kernel can tell only with all that is there of all guests.

That is the node's own addresses, its default routes in every table, the policy rules of each tap, and which routes
there may be at all. A process that lives long keeps it (`keep`), and reads it anew only after the kernel has told of a
change that can matter. A change is reported before whoever made it goes on, so what is kept is right whenever it is
asked for.

Of routes it is kept that there may be one: additions are always told, but IPv4 routes go without a word with their
device. Whoever is told that there may be one asks the kernel. A new guest's are not there, so nobody has to look
through those of thousands. Rules never go without a word: they are kept as they are.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator

from kvmifup.core.finder import Finder
from kvmifup.node import nexthops, transport
from kvmifup.node.addresses import addresses
from kvmifup.node.messages import (
    BODY,
    IFADDRMSG,
    IFINFOMSG,
    NLMSGHDR,
    RTA_NH_ID,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTMSG,
    attributes,
    incoming_device,
    rule_identity,
    rule_order,
)
from kvmifup.node.netlink import Netlink
from kvmifup.node.routes import route_of

EVERY_TABLE = 0  # RT_TABLE_UNSPEC
# linux/rtnetlink.h: LINK; IPV4_ and IPV6_IFADDR, _ROUTE, _RULE; NEXTHOP
GROUPS = (1, 5, 9, 7, 11, 8, 19, 32)
RT_SCOPE_LINK = 253  # linux/rtnetlink.h
RULES = (RTM_NEWRULE, RTM_DELRULE)
START = 1024  # bytes of a message: what matters comes first
MANY = 20_000  # routes in a table, of which no more is kept then: a router may have a million

Addresses = list[tuple[int, str]]  # the device's index, the address with its prefix length
Table = tuple[int, int]  # of routes: the family, the number
Destination = tuple[bytes, int]  # of a route: the address, the length of the prefix
Leading = Finder[Destination, int]  # the indices of the devices out of which routes may lead
ELSEWHERE = 0  # in the place of an index


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
        self._leading: dict[Table, Leading | None] = {}  # None: too many
        self._out_of: Finder[int, tuple[Table, Destination]] = Finder()  # what is in there of a device, by its index
        self._rules: dict[int, dict[str, list[bytes]]] = {}  # in order, by family and incoming device
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

    def leading(self, family: int, table: int, to: Destination, via: Netlink) -> tuple[int, ...] | None:
        """Out of which devices routes in *table* to exactly *to* may lead; None if that is not kept."""
        with self._lock:
            self._catch_up()
            if (family, table) not in self._leading:
                there = via.routes(family, table)
                self._leading[family, table] = None if len(there) > MANY else Finder()
                for message in there:
                    self._route_added(message, (family, table))
            known = self._leading[family, table]
            return None if known is None else known.by(to)

    def rules(self, family: int, iif: str, via: Netlink) -> list[bytes]:
        """As `Netlink.rules`."""
        with self._lock:
            self._catch_up()
            if family not in self._rules:
                self._rules[family] = via.rules_by_iif(family)
            return [*self._rules[family].get(iif, ())]

    def _catch_up(self) -> None:
        """Forget what is kept if something has happened since that can change it."""
        for message in self._happened():
            if not message:
                self._forget_routes()
                self._rules.clear()
            kind, body = NLMSGHDR.unpack_from(message)[1] if message else 0, message[BODY:]
            if kind == RTM_NEWROUTE:
                self._route_added(message, (body[0], nexthops.table_of(message)))
            elif kind == RTM_DELLINK and body[0] == socket.AF_UNSPEC:
                self._device_gone(IFINFOMSG.unpack_from(body)[2])
            elif kind in RULES and body[0] in self._rules:
                self._rule_changed(message, body[0], added=kind == RTM_NEWRULE)
            if self._matters(kind, body):
                for known in (self._defaults, self._addresses, self._devices):
                    known.clear()

    def _route_added(self, message: bytes, table: Table) -> None:
        known = self._leading.get(table)
        if known is None:
            return
        entry, to = route_of(message)
        # One through a nexthop object leads elsewhere without a word of its own.
        through_object = RTA_NH_ID in attributes(message, BODY + RTMSG.size)
        index = ELSEWHERE if through_object else entry.oif or ELSEWHERE
        known.add(to, index)
        self._out_of.add(index, (table, to))
        if len(known) > MANY:  # perhaps of guests that have left: read anew when somebody asks
            self._forget_routes()

    def _forget_routes(self) -> None:
        self._leading.clear()
        self._out_of = Finder()

    def _rule_changed(self, message: bytes, family: int, *, added: bool) -> None:
        known, iif, said = self._rules[family], incoming_device(message), rule_identity(message)
        there = known.get(iif, [])
        place = next((place for place, one in enumerate(there) if rule_identity(one) == said), None)
        if added == (place is not None):
            # Not as it was thought. What changes while all are read is in what was read, and is told after that.
            del self._rules[family]  # they are read anew when somebody asks
        elif place is None:  # after those of its priority (fib_nl_newrule in net/core/fib_rules.c)
            known[iif] = sorted((*there, message), key=rule_order)
        elif len(there) == 1:
            del known[iif]
        else:
            del there[place]

    def _device_gone(self, index: int) -> None:
        for table, to in self._out_of.by(index):
            self._out_of.remove(index, (table, to))
            if (known := self._leading.get(table)) is not None:
                known.remove(to, index)

    def _happened(self) -> Iterator[bytes]:
        """The start of each message that has come since, b"" for more than there was room for."""
        while True:
            try:
                yield self._socket.recv(START)  # one message each
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield b""

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
        return kind not in RULES


_kept: list[Standing] = []


def keep() -> Callable[[], None]:
    """From now on keep what is read, and sockets, for this process; what it returns ends that. Raises OSError."""
    standing = Standing()
    end_of_sockets = transport.keep()
    _kept.append(standing)

    def end() -> None:
        _kept.remove(standing)
        standing.close()
        end_of_sockets()

    return end


def defaults(family: int, via: Netlink) -> list[bytes]:
    """The default routes of *family*, AF_*, in every table, as whole messages. Raises NetlinkError."""
    return _kept[0].defaults(family, via) if _kept else read_defaults(family, via)


def own_addresses(family: int, via: Netlink) -> Addresses:
    """The addresses of *family*, AF_*, that the node has; perhaps without those of link scope. Raises NetlinkError."""
    return _kept[0].addresses(family, via) if _kept else read_addresses(family, via)


def leading(family: int, table: int, to: Destination, via: Netlink) -> tuple[int, ...] | None:
    """Out of which devices (indices, or `ELSEWHERE`) routes of *family*, AF_*, in *table* to exactly *to* may lead.

    None if nobody knows without looking. Raises NetlinkError.
    """
    return _kept[0].leading(family, table, to, via) if _kept else None


def rules(family: int, iif: str, via: Netlink) -> list[bytes]:
    """The policy rules of *family*, AF_*, that name the incoming device *iif*, as whole messages, in order.

    Raises NetlinkError.
    """
    return _kept[0].rules(family, iif, via) if _kept else via.rules(family, iif)
