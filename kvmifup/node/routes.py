"""Routes in rtnetlink messages: what the kernel tells of them, and what it takes to find and to make one."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from kvmifup.core.model import Prefix
from kvmifup.core.records import record
from kvmifup.node.messages import (
    BODY,
    FAMILIES,
    RTA_CACHEINFO,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_OIF,
    RTA_PREF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTMSG,
    RTN_LOCAL,
    RTN_UNICAST,
    RTNH_F_ONLINK,
    address_of,
    attribute,
    attributes,
    number,
    u32,
)

KEPT = 1024  # prefixes: each is read, and then written


@record
class RouteEntry:
    """What the kernel needs, beside prefix and table, to find a route and to make one.

    *more* are the attributes that only some routes have, as the kernel tells them.
    """

    protocol: int  # RTPROT_*
    scope: int  # RT_SCOPE_*
    type: int  # RTN_*
    oif: int | None  # the index of the device that it leads out of
    priority: int | None
    tos: int = 0
    source: int = 0  # the prefix length of the source for which it is, which is in *more*
    flags: int = 0  # RTNH_F_ONLINK
    more: bytes = b""

    @property
    def for_all(self) -> bool:
        """Whether it is for packets of every source and every kind of service."""
        return not self.tos and not self.source

    @property
    def direct(self) -> bool:
        """Whether every packet that takes it is for a neighbour on its device, by the packet's own destination."""
        plain = not self.more or attributes(self.more, 0).keys() <= {RTA_PREFSRC, RTA_METRICS, RTA_PREF}
        return plain and self.for_all and self.type == RTN_UNICAST

    def as_text(self) -> str:
        """All of it but the device."""
        said = {**vars(self), "oif": None, "more": self.more.hex()}
        return " ".join(f"{name}={value}" for name, value in said.items() if value)


@lru_cache(KEPT)
def network(prefix: str) -> Prefix:
    """The prefix that this is the text of."""
    return ipaddress.ip_network(prefix)


def route_entry(text: str, oif: int) -> RouteEntry:
    """The route out of the device *oif* that `RouteEntry.as_text` has described. Raises ValueError, TypeError."""
    said = dict(word.split("=") for word in text.split())
    more = bytes.fromhex(said.pop("more", ""))
    fields = {"protocol": 0, "scope": 0, "type": 0, "priority": None} | {name: int(one) for name, one in said.items()}
    return RouteEntry(**fields, oif=oif, more=more)  # type: ignore[arg-type]


def route_body(prefix: Prefix, table: int, entry: RouteEntry) -> bytes:
    """What RTM_NEWROUTE and RTM_DELROUTE say of the route *entry* to *prefix* in *table*."""
    lengths = (FAMILIES[prefix.version], prefix.prefixlen, entry.source)
    body = RTMSG.pack(*lengths, entry.tos, 0, entry.protocol, entry.scope, entry.type, entry.flags)
    body += attribute(RTA_DST, prefix.network_address.packed) + number(RTA_TABLE, table)
    for kind, value in ((RTA_OIF, entry.oif), (RTA_PRIORITY, entry.priority)):
        if value is not None:
            body += number(kind, value)
    return body + entry.more


def routes_to(prefix: Prefix, routes: list[bytes]) -> list[RouteEntry]:
    """Those of *routes* whose destination is exactly *prefix*."""
    raw, length = prefix.network_address.packed, prefix.prefixlen
    found = []
    for message in routes:
        if raw in message and message[BODY + 1] == length:
            entry, to = route_of(message)
            if to == (raw, length):
                found.append(entry)
    return found


USUAL = {RTA_DST, RTA_OIF, RTA_PRIORITY, RTA_TABLE, RTA_CACHEINFO}  # the last one says how it has been used


def route_of(message: bytes) -> tuple[RouteEntry, tuple[bytes, int]]:
    """The route in an RTM_NEWROUTE message; its destination and prefix length."""
    _family, length, source, tos, _table, protocol, scope, kind, flags = RTMSG.unpack_from(message, BODY)
    attrs = attributes(message, BODY + RTMSG.size)
    if attrs.get(RTA_PREF) == b"\0":  # the usual one
        del attrs[RTA_PREF]
    more = b"".join(attribute(one, attrs[one]) for one in sorted(attrs.keys() - USUAL))
    oif, priority = u32(attrs.get(RTA_OIF)), u32(attrs.get(RTA_PRIORITY))
    entry = RouteEntry(protocol, scope, kind, oif, priority, tos, source, flags & RTNH_F_ONLINK, more)
    return entry, (attrs.get(RTA_DST, b""), length)


def by_prefix(routes: list[bytes]) -> dict[tuple[bytes, int], list[bytes]]:
    """*routes* by destination and prefix length, so that `routes_to` need not search all of them each time."""
    found: dict[tuple[bytes, int], list[bytes]] = {}
    for message in routes:
        destination = attributes(message, BODY + RTMSG.size).get(RTA_DST, b"")
        found.setdefault((destination, message[BODY + 1]), []).append(message)
    return found


def default_type(routes: list[bytes]) -> int:
    """The type (RTN_*) of the default route among *routes* that the kernel takes first; 0 without one."""
    best: tuple[int, int] | None = None
    for message in routes:
        if message[BODY + 1] == 0:
            metric = u32(attributes(message, BODY + RTMSG.size).get(RTA_PRIORITY)) or 0
            best = min(best or (metric, message[BODY + 7]), (metric, message[BODY + 7]))
    return best[1] if best else 0


def connected(routes: list[bytes], index: int) -> list[Prefix]:
    """The networks among *routes* that are reached on the device *index* itself, without a next hop."""
    found = []
    for message in routes:
        length = message[BODY + 1]
        attrs = attributes(message, BODY + RTMSG.size)
        direct = u32(attrs.get(RTA_OIF)) == index and RTA_GATEWAY not in attrs and RTA_DST in attrs
        if length and direct and message[BODY + 7] == RTN_UNICAST:
            found.append(ipaddress.ip_network((attrs[RTA_DST], length)))
    return found


def local_addresses(routes: list[bytes]) -> dict[int | None, list[str]]:
    """The addresses of each device, by its index, as *routes*, those of the table local, have them."""
    found: dict[int | None, list[str]] = {}
    for message in routes:
        if message[BODY + 7] == RTN_LOCAL:
            attrs = attributes(message, BODY + RTMSG.size)
            found.setdefault(u32(attrs.get(RTA_OIF)), []).append(address_of(attrs[RTA_DST]))
    return found
