"""What the kernel reports unasked: devices that go or are down, changes that a plan relies on, and changed journals."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from kvmifup.agent.loop import Loop
from kvmifup.core.model import LOCAL_TABLE
from kvmifup.core.records import record
from kvmifup.node import messages, sockets

RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_IFADDR = (1,), (3,), (5, 9)  # linux/rtnetlink.h; addresses: IPv4, IPv6
RTNLGRP_ROUTE, RTNLGRP_RULE, RTNLGRP_NETCONF = (7, 11), (8, 19), (24, 25)  # IPv4, IPv6
RTNLGRP_NEXTHOP, RTNLGRP_TC = (32,), (4,)
RTM_NEWNETCONF = 80
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
RTM_NEWACTION, RTM_DELACTION = 48, 49
RTPROT_STATIC, RTN_UNICAST = 4, 1  # linux/rtnetlink.h; routing daemons have the protocols above
LIMITS = (messages.RTM_NEWQDISC, messages.RTM_DELQDISC, messages.RTM_NEWTFILTER, messages.RTM_DELTFILTER)
IFF_LOWER_UP = 0x10000  # linux/if.h
NUD_DYNAMIC = 0x1F  # linux/neighbour.h: INCOMPLETE, REACHABLE, STALE, DELAY, PROBE
NETCONFA_IFINDEX, NETCONFA_IFINDEX_DEFAULT = 1, -2  # linux/netconf.h
KIND_TUN = messages.attribute(messages.IFLA_INFO_KIND, b"tun\0")
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
BUFFER = 4 << 20  # bytes: some thousand events, each of which takes 1 to 4 KB
AT_ONCE = 512  # events
# Seconds from the first of several changes until they are taken: a hook makes dozens, and each time that the loop woke
# up for one, the hook's thread would have to wait.
MOMENT = 0.02


@record
class NetlinkMessage:
    """One netlink message, without its header."""

    kind: int
    body: bytes


class Subscription:
    """Calls *heard* with the messages of *groups*, *lost* when the kernel could not tell all.

    At once only if it is *urgent*; else with those of a `MOMENT` together.
    """

    def __init__(
        self,
        loop: Loop,
        groups: tuple[int, ...],
        heard: Callable[[list[NetlinkMessage]], None],
        lost: Callable[[], None],
        protocol: int = socket.NETLINK_ROUTE,
        *,
        urgent: bool = False,
    ) -> None:
        self.heard, self.lost = heard, lost
        self._loop = loop
        self.socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol
        )
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        except PermissionError:  # in a user namespace: as much as everybody gets
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.socket.bind((0, sum(1 << group - 1 for group in groups)))
        self._read_when_due = self.read if urgent else self._read_soon
        loop.watch(self.socket, self._read_when_due)

    def _read_soon(self) -> None:
        """Something has come: take it in a moment, and hear of nothing until then."""
        self._loop.ignore(self.socket)
        self._loop.later(MOMENT, self._read_all)

    def _read_all(self) -> None:
        self.read()
        self._loop.watch(self.socket, self._read_when_due)

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
    """Calls *gone* with the indices of devices that have disappeared, *down* with those of devices that are not up.

    Those that have disappeared are not up either. And *lost* when the kernel could not tell all.
    """

    def __init__(
        self,
        loop: Loop,
        gone: Callable[[list[int]], None],
        down: Callable[[list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        def heard(found: list[NetlinkMessage]) -> None:
            if indices := not_up(found):
                down(indices)
            if indices := removed(found):
                gone(indices)

        super().__init__(loop, RTNLGRP_LINK, heard, lost)


def links(found: list[NetlinkMessage]) -> Iterator[tuple[int, int, int]]:
    """Kind, index and flags of each device that *found* tells of.

    With another family it is not the device: a port that leaves its bridge says RTM_DELLINK with AF_BRIDGE.
    """
    for one in found:
        if one.kind in (messages.RTM_NEWLINK, messages.RTM_DELLINK):
            family, _type, index, flags, _change = messages.IFINFOMSG.unpack_from(one.body)
            if family == socket.AF_UNSPEC:
                yield one.kind, index, flags


def removed(found: list[NetlinkMessage]) -> list[int]:
    """The indices of the devices whose removal *found* reports."""
    return [index for kind, index, _flags in links(found) if kind == messages.RTM_DELLINK]


def not_up(found: list[NetlinkMessage]) -> list[int]:
    """The indices of the devices that are down, have no carrier, or have disappeared."""
    return [index for kind, index, flags in links(found) if kind == messages.RTM_DELLINK or not flags & IFF_LOWER_UP]


# One thing that has changed on the node, or that a NIC relies on: ("device", index), ("name", device's name),
# ("port", index), ("ports", index of their bridge), ("address", index of its device), ("route", prefix),
# ("rule", incoming device), ("neighbour", index, address), ("nft", family, device).
# A default route's prefix is "0.0.0.0/0" or "::/0".
Thing = tuple[object, ...]
ANYTHING: Thing = ("anything",)
DEFAULT_ROUTES: frozenset[Thing] = frozenset({("route", "0.0.0.0/0"), ("route", "::/0")})

# No neighbours that a bridge learns, and none that come and go by themselves: those can be thousands in a second.
# linux/netlink.h, linux/neighbour.h; a filter reads numbers from the left, and the kernel has written its own way.
NOT_LEARNT = [
    (sockets.LOAD_HALF, 0, 0, 4),
    (sockets.IF_EQUAL, 1, 0, int.from_bytes(messages.RTM_NEWNEIGH.to_bytes(2, sys.byteorder), "big")),
    (sockets.IF_EQUAL, 0, 4, int.from_bytes(messages.RTM_DELNEIGH.to_bytes(2, sys.byteorder), "big")),
    (sockets.LOAD_BYTE, 0, 0, messages.BODY),
    (sockets.IF_EQUAL, 3, 0, socket.AF_BRIDGE),
    (sockets.LOAD_BYTE, 0, 0, messages.BODY + 8 + (sys.byteorder == "big")),
    (sockets.IF_ANY, 1, 0, NUD_DYNAMIC),
    (sockets.RETURN, 0, 0, 0xFFFFFFFF),
    (sockets.RETURN, 0, 0, 0),
]


class NodeEvents(Subscription):
    """Calls *changed* with things that have changed on the node: see `Thing`.

    A socket of its own: in a storm of routes no device's end must get lost.
    """

    def __init__(self, loop: Loop, changed: Callable[[frozenset[Thing]], None]) -> None:
        def heard(found: list[NetlinkMessage]) -> None:
            if things := frozenset(touched(found)):
                changed(things)

        devices = (*RTNLGRP_LINK, *RTNLGRP_IFADDR, *RTNLGRP_NETCONF)
        groups = (*devices, *RTNLGRP_NEIGH, *RTNLGRP_ROUTE, *RTNLGRP_RULE, *RTNLGRP_NEXTHOP, *RTNLGRP_TC)
        super().__init__(loop, groups, heard, lambda: changed(frozenset({ANYTHING})))
        sockets.attach(self.socket, NOT_LEARNT)

    def catch_up(self) -> None:
        """Take all that has come by now: a change is reported before whoever made it goes on."""
        while self.read():
            pass


def touched(found: list[NetlinkMessage]) -> Iterator[Thing]:
    """What *found* is about."""
    for one in found:
        match one.kind:
            case messages.RTM_NEWLINK | messages.RTM_DELLINK:
                yield from touched_link(one.body)
            case messages.RTM_NEWADDR | messages.RTM_DELADDR:
                yield "address", messages.IFADDRMSG.unpack_from(one.body)[4]
            case messages.RTM_NEWROUTE | messages.RTM_DELROUTE:
                yield from touched_route(one.body)
            case messages.RTM_NEWRULE | messages.RTM_DELRULE:
                attrs = messages.attributes(one.body, messages.FIB_RULE_HDR.size)
                yield "rule", messages.text(attrs.get(messages.FRA_IIFNAME))
            case messages.RTM_NEWNEIGH | messages.RTM_DELNEIGH:
                _family, index, _state, _flags, _type = messages.NDMSG.unpack_from(one.body)
                address = messages.attributes(one.body, messages.NDMSG.size).get(messages.NDA_DST, b"")
                if len(address) in (4, 16):
                    yield "neighbour", index, messages.address_of(address)
            case _ if one.kind in (RTM_NEWNEXTHOP, RTM_DELNEXTHOP):  # a default route may lead through it
                yield from DEFAULT_ROUTES
            case _ if one.kind in LIMITS:
                yield "device", messages.TCMSG.unpack_from(one.body)[1]
            case _ if one.kind in (RTM_NEWACTION, RTM_DELACTION):  # a filter of any device may use it
                yield ANYTHING
            case _ if one.kind == RTM_NEWNETCONF:
                yield from touched_settings(one.body)


def touched_link(body: bytes) -> Iterator[Thing]:
    """What a message about a device, or about a port, is about."""
    family, _type, index, _flags, _change = messages.IFINFOMSG.unpack_from(body)
    if family == socket.AF_UNSPEC:
        attrs = messages.attributes(body, messages.IFINFOMSG.size)
        yield "device", index
        yield "name", messages.text(attrs.get(messages.IFLA_IFNAME))
        master = messages.u32(attrs.get(messages.IFLA_MASTER))
        if master and KIND_TUN not in attrs.get(messages.IFLA_LINKINFO, b""):  # taps come and go, and lead nowhere
            yield "ports", master
    else:
        yield "port", index


def touched_route(body: bytes) -> Iterator[Thing]:
    """What a message about a route is about."""
    family, length = body[:2]
    destination = messages.attributes(body, messages.RTMSG.size).get(messages.RTA_DST)
    packed = destination or bytes(16 if family == socket.AF_INET6 else 4)
    with suppress(ValueError, OSError):  # of a family that is none of ours
        yield "route", f"{socket.inet_ntop(family, packed)}/{length}"


def touched_settings(body: bytes) -> Iterator[Thing]:
    """What a message about a device's settings, such as forwarding, is about."""
    packed = messages.attributes(body, 4).get(NETCONFA_IFINDEX, b"")
    index = int.from_bytes(packed, sys.byteorder, signed=True)
    if index > 0:
        yield "device", index
    elif index != NETCONFA_IFINDEX_DEFAULT:  # -1 is the one for all
        yield ANYTHING


# Routes that were added, and not by the kernel or by hand: our own are "static". In linux/rtnetlink.h the protocol is
# byte 5 of struct rtmsg.
OF_DAEMONS = [
    (sockets.LOAD_HALF, 0, 0, 4),
    (sockets.IF_EQUAL, 0, 3, int.from_bytes(messages.RTM_NEWROUTE.to_bytes(2, sys.byteorder), "big")),
    (sockets.LOAD_BYTE, 0, 0, messages.BODY + 5),
    (sockets.IF_GREATER, 0, 1, RTPROT_STATIC),
    (sockets.RETURN, 0, 0, 0xFFFFFFFF),
    (sockets.RETURN, 0, 0, 0),
]


class RouteEvents(Subscription):
    """Calls *learnt* for each route that a routing daemon has added: its prefix, its protocol, its device if any.

    A socket of its own, which may lose some: what a daemon adds is nothing that the node relies on.
    """

    def __init__(self, loop: Loop, learnt: Callable[[str, int, int | None], None]) -> None:
        def heard(found: list[NetlinkMessage]) -> None:
            for one in found:
                if one.kind == messages.RTM_NEWROUTE:
                    family, length, _, _, table, protocol, _, kind, _ = messages.RTMSG.unpack_from(one.body)
                    if protocol > RTPROT_STATIC and kind == RTN_UNICAST and table != LOCAL_TABLE:
                        attributes = messages.attributes(one.body, messages.RTMSG.size)
                        with suppress(ValueError, OSError):  # of a family that is none of ours, or a default route
                            address = socket.inet_ntop(family, attributes.get(messages.RTA_DST, b""))
                            learnt(f"{address}/{length}", protocol, messages.u32(attributes.get(messages.RTA_OIF)))

        super().__init__(loop, RTNLGRP_ROUTE, heard, lambda: None, urgent=True)
        sockets.attach(self.socket, OF_DAEMONS)
