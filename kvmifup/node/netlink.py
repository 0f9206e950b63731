"""The rtnetlink messages that every hook needs, written and read here.

pyroute2 does this for any message there is, and pays for it: asking for one link takes it 0.4 ms, of which the
kernel has 0.02, and importing it 150 ms. A hook makes thirty requests, and a node with 500 NICs dumps 500 rules
and routes for each of them. So what is the same for every NIC has its layout below, with the names of the
kernel's headers; a dump is searched as bytes, and only what names the device or address asked for is taken
apart. Whatever is not of our making (a foreign policy rule) still goes through pyroute2: `kvmifup.kernel`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from ipaddress import IPv4Network, IPv6Network

from kvmifup.node.messages import (
    BODY,
    FIB_RULE_HDR,
    FRA_IIFNAME,
    FRA_PROTOCOL,
    IFINFOMSG,
    IFLA_EXT_MASK,
    IFLA_IFNAME,
    IFREQ,
    NDA_DST,
    NDA_LLADDR,
    NDMSG,
    NETLINK_CAP_ACK,
    NETLINK_GET_STRICT_CHK,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGHDR,
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
    RTN_UNICAST,
    SOL_NETLINK,
    Link,
    NetlinkError,
    RouteEntry,
    _neighbour,
    _route,
    _rule,
    address_of,
    attribute,
    attributes,
    link_of,
    mac_bytes,
    name_bytes,
    number,
    packed,
    refuse,
    text,
    u32,
)

# linux/sockios.h, linux/if.h
SIOCGIFINDEX, IFNAMSIZ = 0x8933, 16
RECEIVE = 1 << 16  # the kernel puts up to 32 KiB of a dump into one datagram
TRIES = 10


class Netlink:
    """An rtnetlink socket: one request, then its answer. Not for two threads at once.

    Everything raises NetlinkError for what the kernel refuses.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0
        # Filters of dumps count, and a request that the kernel does not understand is an error.
        self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    # --- links ------------------------------------------------------------------------------------------

    def index(self, name: str) -> int | None:
        """The index of the device *name*, None if there is none.

        Like `socket.if_nametoindex`, which opens a socket of its own each time.
        """
        raw = os.fsencode(name)
        if not 0 < len(raw) < IFNAMSIZ:
            return None
        try:
            return int(IFREQ.unpack(fcntl.ioctl(self._socket, SIOCGIFINDEX, IFREQ.pack(raw, 0)))[1])
        except OSError:
            return None

    def link(self, name: str) -> Link:
        """The device *name*."""
        body = IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name_bytes(name))
        body += number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
        return link_of(self._ask(RTM_GETLINK, 0, body))

    def set_link(self, index: int, attrs: bytes = b"", flags: int = 0, change: int = 0) -> None:
        """Set *attrs*, and those of the *flags* that *change* names, of the device *index*."""
        self._ask(RTM_SETLINK, NLM_F_ACK, IFINFOMSG.pack(0, 0, index, flags, change) + attrs)

    # --- routes -----------------------------------------------------------------------------------------

    def routes(self, family: int, table: int, oif: int | None = None) -> list[bytes]:
        """The routes in *table*, for `default_devices` and `routes_to`; none for a table that was never used.

        With *oif* only those out of that device: the kernel leaves out the others.
        """
        body = RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + number(RTA_TABLE, table)
        if oif is not None:
            body += number(RTA_OIF, oif)
        try:
            return self._dump(RTM_GETROUTE, body)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def route_type(self, family: int, address: str) -> int:
        """The RTN_* type of the route that *address* matches."""
        raw = packed(address)
        body = RTMSG.pack(family, 8 * len(raw), 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH) + attribute(RTA_DST, raw)
        return self._ask(RTM_GETROUTE, 0, body)[BODY + 7]

    def add_route(self, prefix: IPv4Network | IPv6Network, index: int, table: int, protocol: int, scope: int) -> None:
        """Add the route to *prefix* out of the device *index*."""
        entry = RouteEntry(protocol, scope, RTN_UNICAST, index, None)
        body = _route(prefix, table, entry)
        self._ask(RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)

    def delete_route(self, prefix: IPv4Network | IPv6Network, table: int, entry: RouteEntry) -> None:
        """Remove just this route to *prefix*."""
        self._ask(RTM_DELROUTE, NLM_F_ACK, _route(prefix, table, entry))

    # --- neighbours ---------------------------------------------------------------------------------------

    def neighbour(self, index: int, address: str, flags: int) -> tuple[int, str | None] | None:
        """State (NUD_*) and MAC of an entry, None if there is none."""
        try:
            message = self._ask(RTM_GETNEIGH, 0, _neighbour(index, address, 0, flags))
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        mac = attributes(message, BODY + NDMSG.size).get(NDA_LLADDR)
        return NDMSG.unpack_from(message, BODY)[2], mac.hex(":") if mac else None

    def put_neighbour(self, index: int, address: str, state: int, flags: int, mac: str | None) -> None:
        """Add or replace an entry."""
        body = _neighbour(index, address, state, flags)
        if mac is not None:
            body += attribute(NDA_LLADDR, mac_bytes(mac))
        self._ask(RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)

    def delete_neighbour(self, index: int, address: str, flags: int) -> None:
        """Remove an entry."""
        self._ask(RTM_DELNEIGH, NLM_F_ACK, _neighbour(index, address, 0, flags))

    # --- policy rules -----------------------------------------------------------------------------------------

    def rules(self, family: int, iif: str) -> list[bytes]:
        """The policy rules that name the incoming device *iif*, as whole messages."""
        named = attribute(FRA_IIFNAME, name_bytes(iif))
        found = self._dump(RTM_GETRULE, FIB_RULE_HDR.pack(family, 0, 0, 0, 0, 0, 0), named)
        # The bytes may also be there by chance.
        return [one for one in found if text(attributes(one, BODY + FIB_RULE_HDR.size).get(FRA_IIFNAME)) == iif]

    def put_rule(self, family: int, iif: str, table: int, priority: int, protocol: int) -> None:
        """Add the rule `iif IIF lookup TABLE`."""
        body = _rule(family, iif, table, priority) + attribute(FRA_PROTOCOL, bytes([protocol]))
        self._ask(RTM_NEWRULE, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)

    def delete_rule(self, family: int, iif: str, table: int, priority: int) -> None:
        """Remove the rule `iif IIF lookup TABLE`."""
        self._ask(RTM_DELRULE, NLM_F_ACK, _rule(family, iif, table, priority))

    # --- everything at once -----------------------------------------------------------------------------------

    def links(self) -> dict[str, Link]:
        """Every device, by name."""
        found = self._dump(RTM_GETLINK, IFINFOMSG.pack(0, 0, 0, 0, 0) + number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS))
        return {text(attributes(one, BODY + IFINFOMSG.size).get(IFLA_IFNAME)) or "": link_of(one) for one in found}

    def rules_by_iif(self, family: int) -> dict[str, list[bytes]]:
        """The policy rules that name an incoming device, as whole messages, by its name."""
        found: dict[str, list[bytes]] = {}
        for message in self._dump(RTM_GETRULE, FIB_RULE_HDR.pack(family, 0, 0, 0, 0, 0, 0)):
            iif = text(attributes(message, BODY + FIB_RULE_HDR.size).get(FRA_IIFNAME))
            if iif is not None:
                found.setdefault(iif, []).append(message)
        return found

    def neighbours(self, flags: int) -> dict[tuple[int, str], tuple[int, str | None]]:
        """State (NUD_*) and MAC of every entry, or with NTF_PROXY every proxy entry, by device and address."""
        found = {}
        for message in self._dump(RTM_GETNEIGH, NDMSG.pack(0, 0, 0, flags, 0)):
            _family, index, state, _flags, _type = NDMSG.unpack_from(message, BODY)
            attrs = attributes(message, BODY + NDMSG.size)
            mac = attrs.get(NDA_LLADDR)
            found[index, address_of(attrs.get(NDA_DST, b""))] = state, mac.hex(":") if mac else None
        return found

    def way(self, source: str, destination: str, iif: int) -> int | None:
        """The index of the device out of which a packet would go that comes in on the device *iif*.

        None if it would be dropped because *source* is not to be expected there (reverse path filter).
        """
        to, by = packed(destination), packed(source)
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        body = RTMSG.pack(family, 8 * len(to), 8 * len(by), 0, 0, 0, 0, 0, 0)
        body += attribute(RTA_DST, to) + attribute(RTA_SRC, by) + number(RTA_IIF, iif)
        try:
            answer = self._ask(RTM_GETROUTE, 0, body)
        except NetlinkError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL):  # as the kernel's version has it: ip_route_input_slow
                return None
            raise
        return u32(attributes(answer, BODY + RTMSG.size).get(RTA_OIF)) or 0

    # --- the socket -------------------------------------------------------------------------------------------

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._sequence += 1
        header = NLMSGHDR.pack(BODY + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.send(header + body)
        return self._sequence

    def _ask(self, kind: int, flags: int, body: bytes) -> bytes:
        """The message that answers; empty for a mere acknowledgement."""
        request = self._send(kind, flags, body)
        while True:
            data = self._socket.recv(RECEIVE)
            length, answer, _flags, sequence, _port = NLMSGHDR.unpack_from(data)
            if sequence != request:  # left over from a request that was interrupted
                continue
            if answer == NLMSG_ERROR:
                refuse(data, BODY)
                return b""
            return data[:length]

    def _dump(self, kind: int, body: bytes, wanted: bytes = b"") -> list[bytes]:
        """The messages of a dump that contain *wanted*.

        One that was disturbed may lack something (NLM_F_DUMP_INTR): ask again, unless it never ends.
        """
        found: list[bytes] = []
        for _ in range(TRIES):
            found, whole = self._dump_once(kind, body, wanted)
            if whole:
                break
        return found

    def _dump_once(self, kind: int, body: bytes, wanted: bytes) -> tuple[list[bytes], bool]:
        request = self._send(kind, NLM_F_DUMP, body)
        found: list[bytes] = []
        seen = 0
        unpack = NLMSGHDR.unpack_from
        while True:
            data = self._socket.recv(RECEIVE)
            offset, end = 0, len(data)
            hit = data.find(wanted)
            while offset + BODY <= end:
                length, answer, flags, sequence, _port = unpack(data, offset)
                if sequence != request or length < BODY:  # left over from a request that was interrupted
                    break
                seen |= flags
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    refuse(data, offset + BODY)
                    return found, not seen & NLM_F_DUMP_INTR
                # Most of a dump is not wanted.
                if 0 <= hit < offset + length:
                    found.append(data[offset : offset + length])
                    hit = data.find(wanted, offset + length)
                offset += length + 3 & ~3
