"""Where the packets of a route go: next hops that the route itself has, or that are objects of their own.

With `nexthop_compat_mode` 0 the kernel tells of a route through a nexthop object only the object's number.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from struct import Struct

from kvmifup.core.records import record
from kvmifup.node.messages import (
    BODY,
    RTA_GATEWAY,
    RTA_MULTIPATH,
    RTA_NH_ID,
    RTA_OIF,
    RTA_TABLE,
    RTA_VIA,
    RTMSG,
    RTN_UNICAST,
    RTNEXTHOP,
    NetlinkError,
    address_of,
    attributes,
    number,
    u32,
)
from kvmifup.node.transport import Transport

# linux/nexthop.h
RTM_GETNEXTHOP = 106
NHA_ID, NHA_GROUP, NHA_OIF, NHA_GATEWAY = 1, 2, 5, 6
NHMSG = Struct("=BBBBI")  # family, scope, protocol, reserved, flags
NEXTHOP_GRP = Struct("=IBBH")  # id, weight, its high byte, reserved


@record
class Hop:
    """The index of the device that packets leave by, and the gateway's address, of either family, if there is one."""

    index: int
    gateway: str | None


def defaults(routes: Sequence[bytes]) -> list[bytes]:
    """The default routes among *routes*."""
    return list(filter(is_default, routes))


def is_default(message: bytes) -> bool:
    """Whether the route in an RTM_NEWROUTE message is a default route."""
    return message[BODY + 1] == 0 and message[BODY + 7] == RTN_UNICAST


def table_of(message: bytes) -> int:
    """The table that the route in an RTM_NEWROUTE message is in."""
    return u32(attributes(message, BODY + RTMSG.size).get(RTA_TABLE)) or message[BODY + 4]


def hops(routes: Sequence[bytes], via: Transport) -> list[Hop]:
    """The next hops of *routes*, each once; objects are asked for through *via*. Raises NetlinkError."""
    return list(dict.fromkeys(hop for message in routes for hop in hops_of(message, via)))


def hops_of(message: bytes, via: Transport) -> Iterator[Hop]:
    """The next hops of the route in an RTM_NEWROUTE message."""
    attrs = attributes(message, BODY + RTMSG.size)
    several = attrs.get(RTA_MULTIPATH, b"")
    if RTA_NH_ID in attrs and not several and RTA_OIF not in attrs:
        yield from object_hops(u32(attrs[RTA_NH_ID]) or 0, via)
        return
    index, offset = u32(attrs.get(RTA_OIF)), 0
    if index:
        yield Hop(index, gateway_in(attrs))
    while offset + RTNEXTHOP.size <= len(several):
        length, _flags, _weight, index = RTNEXTHOP.unpack_from(several, offset)
        if index:
            yield Hop(index, gateway_in(attributes(several[: offset + length], offset + RTNEXTHOP.size)))
        offset += max(length + 3 & ~3, RTNEXTHOP.size)


def gateway_in(attrs: dict[int, bytes]) -> str | None:
    """The gateway of a next hop: RTA_VIA has one of the other family, after two bytes that say which."""
    raw = attrs.get(RTA_GATEWAY) or attrs.get(RTA_VIA, b"")[2:]
    return address_of(raw) if raw else None


def object_hops(number_: int, via: Transport) -> Iterator[Hop]:
    """The next hops of a nexthop object; a group is one of several. None of one that drops what it gets, or is gone."""
    try:
        answer = via.ask(RTM_GETNEXTHOP, 0, NHMSG.pack(0, 0, 0, 0, 0) + number(NHA_ID, number_))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return
        raise
    attrs = attributes(answer, BODY + NHMSG.size)
    for member, *_ in NEXTHOP_GRP.iter_unpack(attrs.get(NHA_GROUP, b"")):
        yield from object_hops(member, via)
    index, gateway = u32(attrs.get(NHA_OIF)), attrs.get(NHA_GATEWAY)
    if index:
        yield Hop(index, address_of(gateway) if gateway else None)
