"""The rtnetlink requests that a hook makes, and those that show the whole node; the layouts are in `messages`."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from struct import Struct

from kvmifup.core.model import Prefix
from kvmifup.node.messages import (
    BODY,
    FIB_RULE_HDR,
    FRA_IIFNAME,
    IFINFOMSG,
    IFLA_AF_SPEC,
    IFLA_EXT_MASK,
    IFLA_IFNAME,
    IFLA_PROTINFO,
    NDA_DST,
    NDA_LLADDR,
    NDMSG,
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTA_DST,
    RTA_IIF,
    RTA_OIF,
    RTA_SRC,
    RTA_TABLE,
    RTEXT_FILTER_SKIP_STATS,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_F_FIB_MATCH,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTM_SETLINK,
    RTMSG,
    Link,
    NetlinkError,
    address_of,
    attribute,
    attributes,
    deleted_with,
    incoming_device,
    link_of,
    mac_bytes,
    name_bytes,
    neighbour_body,
    number,
    packed,
    plain_rule,
    rule_body,
    u32,
)
from kvmifup.node.pyroute import make_again
from kvmifup.node.routes import RouteEntry, route_body
from kvmifup.node.transport import Keep, Transport

SIOCGIFINDEX = 0x8933  # linux/sockios.h
IFNAMSIZ = 16  # linux/if.h
IFREQ = Struct("=16si20x")  # name, index


class Netlink:
    """What can be asked and changed; not for two threads at once.

    Every request raises NetlinkError if the kernel refuses it. Families are AF_*.
    """

    def __init__(self) -> None:
        self.transport = Transport()

    def close(self) -> None:
        """Close the socket."""
        self.transport.close()

    # --- links ------------------------------------------------------------------------------------------

    def index(self, name: str) -> int | None:
        """The index of the device *name*, None if there is none.

        `socket.if_nametoindex` would open a socket of its own each time.
        """
        raw = os.fsencode(name)
        if not 0 < len(raw) < IFNAMSIZ:
            return None
        try:
            return int(IFREQ.unpack(fcntl.ioctl(self.transport.socket, SIOCGIFINDEX, IFREQ.pack(raw, 0)))[1])
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None

    def link(self, name: str) -> Link:
        """The device *name*."""
        return link_of(link_message(name, self.transport))

    def set_link(self, index: int, attrs: bytes = b"", flags: int = 0, change: int = 0) -> None:
        """Set *attrs*, and those of the *flags* that *change* names, of the device *index*."""
        self.transport.ask(RTM_SETLINK, NLM_F_ACK, IFINFOMSG.pack(0, 0, index, flags, change) + attrs)

    def set_port(self, index: int, attrs: bytes) -> None:
        """Set *attrs*, IFLA_BRPORT_*, of the device *index* as a port of its bridge."""
        body = IFINFOMSG.pack(socket.AF_BRIDGE, 0, index, 0, 0) + attribute(IFLA_PROTINFO | NLA_F_NESTED, attrs)
        self.transport.ask(RTM_SETLINK, NLM_F_ACK, body)

    # --- routes -----------------------------------------------------------------------------------------

    def routes(
        self, family: int, table: int, oif: int | None = None, wanted: bytes = b"", keep: Keep = None
    ) -> list[bytes]:
        """The routes in *table*, as whole messages; none for a table that was never used.

        With *oif*, the index of a device, only those that lead out of it. For *wanted* and *keep* see `Transport.dump`.
        """
        body = RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + number(RTA_TABLE, table)
        if oif is not None:
            body += number(RTA_OIF, oif)
        try:
            return self.transport.dump(RTM_GETROUTE, body, wanted, keep)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def route_type(self, family: int, address: str) -> int:
        """The type (RTN_*) of the route that packets to *address* take."""
        raw = packed(address)
        body = RTMSG.pack(family, 8 * len(raw), 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH) + attribute(RTA_DST, raw)
        return self.transport.ask(RTM_GETROUTE, 0, body)[BODY + 7]

    def add_route(self, prefix: Prefix, table: int, entry: RouteEntry, *, last: bool = False) -> None:
        """Add the route *entry* to *prefix*.

        An IPv4 route comes before others to *prefix* of the same priority, or as the *last* of them, and replaces none
        (fib_table_insert).
        """
        flags = NLM_F_ACK | NLM_F_CREATE | (NLM_F_APPEND if last else 0)
        self.transport.ask(RTM_NEWROUTE, flags, route_body(prefix, table, entry))

    def delete_route(self, prefix: Prefix, table: int, entry: RouteEntry) -> None:
        """Remove the route *entry* to *prefix*, and no other."""
        self.transport.ask(RTM_DELROUTE, NLM_F_ACK, route_body(prefix, table, entry))

    # --- neighbours ---------------------------------------------------------------------------------------

    def neighbour(self, index: int, address: str, flags: int) -> tuple[int, str | None] | None:
        """State (NUD_*) and MAC of the entry for *address* on the device *index*, None if there is none.

        With *flags* NTF_PROXY it is the proxy entry that is asked for.
        """
        try:
            message = self.transport.ask(RTM_GETNEIGH, 0, neighbour_body(index, address, 0, flags))
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        mac = attributes(message, BODY + NDMSG.size).get(NDA_LLADDR)
        return NDMSG.unpack_from(message, BODY)[2], mac.hex(":") if mac else None

    def put_neighbour(self, index: int, address: str, state: int, flags: int, mac: str | None) -> None:
        """Add or replace an entry; *state* is NUD_*, *flags* NTF_*."""
        body = neighbour_body(index, address, state, flags)
        if mac is not None:
            body += attribute(NDA_LLADDR, mac_bytes(mac))
        self.transport.ask(RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)

    def delete_neighbour(self, index: int, address: str, flags: int) -> None:
        """Remove an entry; *flags* is NTF_*."""
        self.transport.ask(RTM_DELNEIGH, NLM_F_ACK, neighbour_body(index, address, 0, flags))

    # --- policy rules -----------------------------------------------------------------------------------------

    def rules(self, family: int, iif: str) -> list[bytes]:
        """The policy rules that name the incoming device *iif*, as whole messages."""
        named = attribute(FRA_IIFNAME, name_bytes(iif))
        found = self.transport.dump(RTM_GETRULE, FIB_RULE_HDR.pack(family, 0, 0, 0, 0, 0, 0), named)
        # The same bytes may also be part of another attribute.
        return [one for one in found if incoming_device(one) == iif]

    def put_rule(self, family: int, iif: str, table: int, priority: int, protocol: int) -> None:
        """Add the rule `iif IIF lookup TABLE`; *protocol* is RTPROT_*."""
        # Not NLM_F_EXCL: a rule that says more counts as the same then (rule_find in net/core/fib_rules.c).
        body = rule_body(family, iif, table, priority, protocol)
        self.transport.ask(RTM_NEWRULE, NLM_F_ACK | NLM_F_CREATE, body)

    def delete_rule(
        self, family: int, iif: str, table: int, priority: int, protocol: int, among: Sequence[bytes]
    ) -> None:
        """Remove the rule `iif IIF lookup TABLE` that says nothing more; *among* are all rules with IIF, in order.

        One that says more, and that the kernel would take first, is made once more before: the new one comes last.
        """
        rule = (table, priority, protocol)
        body = rule_body(family, iif, *rule)
        fitting = [message for message in among if deleted_with(message, *rule)]
        while any(plain_rule(message) == rule for message in fitting):
            first = fitting.pop(0)
            if plain_rule(first) != rule:
                make_again(first)
            self.transport.ask(RTM_DELRULE, NLM_F_ACK, body)

    # --- for the whole node -----------------------------------------------------------------------------------

    def links(self) -> dict[str, Link]:
        """Every device, by its name and by its alternative ones."""
        body = IFINFOMSG.pack(0, 0, 0, 0, 0) + number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
        found = map(link_of, self.transport.dump(RTM_GETLINK, body))
        return {name: one for one in found for name in one.names}

    def rules_by_iif(self, family: int) -> dict[str, list[bytes]]:
        """The policy rules, as whole messages, by the name of the incoming device that they are for, "" for any."""
        found: dict[str, list[bytes]] = {}
        for message in self.transport.dump(RTM_GETRULE, FIB_RULE_HDR.pack(family, 0, 0, 0, 0, 0, 0)):
            found.setdefault(incoming_device(message), []).append(message)
        return found

    def neighbours(self, flags: int) -> dict[tuple[int, str], tuple[int, str | None]]:
        """State (NUD_*) and MAC of every entry, with *flags* NTF_PROXY of every proxy entry.

        They are found by the index of the device and the address.
        """
        found = {}
        for message in self.transport.dump(RTM_GETNEIGH, NDMSG.pack(0, 0, 0, flags, 0)):
            _family, index, state, _flags, _type = NDMSG.unpack_from(message, BODY)
            attrs = attributes(message, BODY + NDMSG.size)
            mac = attrs.get(NDA_LLADDR)
            found[index, address_of(attrs.get(NDA_DST, b""))] = state, mac.hex(":") if mac else None
        return found

    def way(self, source: str, destination: str, iif: int) -> int | None:
        """The index of the device by which a packet leaves that comes in on the device *iif*.

        None if the reverse path filter drops it, because replies to *source* would not go out of *iif*.
        """
        to, by = packed(destination), packed(source)
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        body = RTMSG.pack(family, 8 * len(to), 8 * len(by), 0, 0, 0, 0, 0, 0)
        body += attribute(RTA_DST, to) + attribute(RTA_SRC, by) + number(RTA_IIF, iif)
        try:
            answer = self.transport.ask(RTM_GETROUTE, 0, body)
        except NetlinkError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL):  # which one, depends on the kernel: ip_route_input_slow
                return None
            raise
        return u32(attributes(answer, BODY + RTMSG.size).get(RTA_OIF)) or 0


def link_message(name: str, via: Transport) -> bytes:
    """The RTM_NEWLINK message about the device *name*. Raises NetlinkError."""
    body = IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name_bytes(name))
    return via.ask(RTM_GETLINK, 0, body + number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS))


def spec(name: str, via: Transport) -> bytes:
    """What `Link.spec` is of the device *name*; to take the rest apart takes longer. Raises NetlinkError."""
    return attributes(link_message(name, via), BODY + IFINFOMSG.size).get(IFLA_AF_SPEC, b"")
