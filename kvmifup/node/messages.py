"""Layouts of the rtnetlink messages that every hook needs, with the names of the kernel's headers.

pyroute2 knows every message there is, and that costs: importing it takes 150 ms, and asking for one link 0.4 ms, of
which the kernel takes 0.02. A hook makes thirty requests, and a node with 500 NICs dumps 500 rules and routes for
each of them. So what is the same for every NIC is written and read here. A dump is searched as bytes, and only the
messages that name the device or address asked for are taken apart. Messages that others can fill with anything
(foreign policy rules), and those that few NICs need (limits), go through pyroute2: `kvmifup.node.pyroute`.

A message is passed round whole, as the bytes that the kernel sent, header included.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from struct import Struct

from kvmifup.core.records import record

# linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND, NLM_F_DUMP = 0x100, 0x200, 0x400, 0x800, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_TYPE_MASK, NLA_F_NESTED = 0x3FFF, 0x8000
# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
RTM_NEWVLAN, RTM_DELVLAN, RTM_GETVLAN = 112, 113, 114
RTM_F_FIB_MATCH, RTEXT_FILTER_SKIP_STATS = 0x2000, 0x8
RTA_DST, RTA_SRC, RTA_IIF, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE = 1, 2, 3, 4, 5, 6, 9, 15
RTA_PREFSRC, RTA_METRICS, RTA_CACHEINFO, RTA_VIA, RTA_PREF, RTA_NH_ID = 7, 8, 12, 18, 20, 30
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST = 1, 2, 3, 4, 5
LEADING_NOWHERE = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}  # RTN_*
RTNH_F_ONLINK = 4
RTPROT_UNSPEC, RTPROT_BOOT, RTPROT_STATIC, RTPROT_RA, RTPROT_DHCP = 0, 3, 4, 9, 16
RT_SCOPE_LINK, RT_SCOPE_UNIVERSE = 253, 0
# linux/if.h, linux/if_arp.h
IFF_UP, IFF_NOARP = 0x1, 0x80
ARPHRD_ETHER = 1
# linux/if_link.h, linux/if_bridge.h
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_PROTINFO, IFLA_LINKINFO = 1, 3, 4, 5, 10, 12, 18
IFLA_AF_SPEC, IFLA_EXT_MASK, IFLA_CARRIER, IFLA_LINK_NETNSID, IFLA_PROP_LIST, IFLA_ALT_IFNAME = 26, 29, 33, 37, 52, 53
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_BR_VLAN_FILTERING, IFLA_BR_VLAN_DEFAULT_PVID = 7, 39
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BRPORT_STATE, IFLA_INET6_ADDR_GEN_MODE = 1, 5, 1, 8
IFLA_BR_MCAST_SNOOPING = 23
# By the names of kvmifup.core.bridgeport. IFLA_BRPORT_MODE is hairpin's, _PROTECT is root_block's.
IFLA_BRPORT = {
    **{"hairpin": 4, "guard": 5, "root_block": 6, "fastleave": 7, "learning": 8, "flood": 9, "multicast_router": 25},
    **{"mcast_flood": 27, "mcast_to_unicast": 28, "bcast_flood": 30, "neigh_suppress": 32, "isolated": 33},
    "locked": 39,
}
# linux/if_addr.h
IFA_ADDRESS, IFA_LOCAL, IFA_F_NODAD, IFA_F_TENTATIVE = 1, 2, 0x02, 0x40
# linux/neighbour.h
NDA_DST, NDA_LLADDR = 1, 2
NUD_NOARP, NUD_PERMANENT, NTF_PROXY = 0x40, 0x80, 0x08
# linux/fib_rules.h
FRA_IIFNAME, FRA_PRIORITY, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_OIFNAME, FRA_PROTOCOL = 3, 6, 14, 15, 17, 21
FR_ACT_TO_TBL, FIB_RULE_INVERT = 1, 0x2
NO_PREFIX_LENGTH = 0xFFFFFFFF  # an unset FRA_SUPPRESS_PREFIXLEN

NLMSGHDR = Struct("=IHHII")  # length, type, flags, sequence, port
NLATTR = Struct("=HH")  # length, type
IFINFOMSG = Struct("=BxHiII")  # family, type, index, flags, change
IFADDRMSG = Struct("=BBBBi")  # family, prefix length, flags, scope, ifindex
RTMSG = Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
RTNEXTHOP = Struct("=HBBi")  # length, flags, hops, ifindex
NDMSG = Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
FIB_RULE_HDR = Struct("=BBBBBxxBI")  # family, dst_len, src_len, tos, table, action, flags
TCMSG = Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
U32 = Struct("=I")
BODY = NLMSGHDR.size  # where a message's own header begins
RECEIVE = 1 << 16  # bytes to receive at once: the kernel puts up to 32 KiB of a dump into one datagram
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
USER_HZ = 100  # the kernel tells times in hundredths of a second: include/asm-generic/param.h


class NetlinkError(OSError):
    """The kernel has refused a request with the error `errno`."""


def failure(code: int) -> NetlinkError:
    """The error for errno *code*."""
    return NetlinkError(code, os.strerror(code))


# --- bytes and values ------------------------------------------------------------------------------------


def packed(address: str) -> bytes:
    """The bytes of an IPv4 or IPv6 address. Raises OSError if it is none."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def address_of(data: bytes) -> str:
    """The address that *data* is, four bytes or 16: the reverse of `packed`."""
    return socket.inet_ntop(socket.AF_INET if len(data) == 4 else socket.AF_INET6, data)


def mac_bytes(mac: str) -> bytes:
    """The six bytes of a MAC such as "aa:00:00:35:ac:01"."""
    return bytes.fromhex(mac.replace(":", ""))


def name_bytes(name: str) -> bytes:
    """A device's name as an attribute has it."""
    return os.fsencode(name) + b"\0"


# --- attributes ------------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    """An attribute, padded to a multiple of four bytes."""
    return NLATTR.pack(4 + len(payload), kind) + payload + bytes(-len(payload) & 3)


def number(kind: int, value: int) -> bytes:
    """An attribute that is a number of four bytes."""
    return attribute(kind, U32.pack(value))


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in *data* from *offset* on, by type. Where several are of one type, the last one counts."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        length, kind = NLATTR.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += length + 3 & ~3
    return found


def u8(data: bytes | None) -> int | None:
    """The number in an attribute of one byte, None without the attribute."""
    return None if data is None else data[0]


def u32(data: bytes | None) -> int | None:
    """The number in an attribute of four bytes, None without the attribute."""
    return None if data is None else int(U32.unpack_from(data)[0])


def text(data: bytes | None) -> str | None:
    """The string in an attribute, None without the attribute."""
    return None if data is None else data.rstrip(b"\0").decode("utf-8", "surrogateescape")


# --- links -----------------------------------------------------------------------------------------------


def alternative_names(others: bytes) -> list[str]:
    """The names in an attribute IFLA_PROP_LIST."""
    names, offset = [], 0
    while offset + NLATTR.size <= len(others):
        length, kind = NLATTR.unpack_from(others, offset)
        if kind & NLA_TYPE_MASK == IFLA_ALT_IFNAME:
            names.append(text(others[offset + NLATTR.size : offset + length]) or "")
        offset += max(length + 3 & ~3, NLATTR.size)
    return names


@record
class Link:
    """A device, as RTM_GETLINK describes it. What does not apply to it is None; *kind* is None for hardware."""

    index: int
    name: str
    type: int  # ARPHRD_*
    flags: int  # IFF_*
    address: str | None
    mtu: int  # in bytes
    master: int | None  # the index of the device that it is a port of
    carrier: bool
    kind: str | None
    stp: bool  # of a bridge
    forward_delay: float  # of a bridge, in seconds
    filters: bool  # of a bridge: it keeps VLANs apart
    default_pvid: int  # of a bridge: the VLAN of a new port; 0 for none
    port_of: str | None  # the kind of device that it is a port of
    port_state: int | None  # of a port of a bridge: BR_STATE_*
    port_options: Mapping[str, int]  # of a port of a bridge: its options, as far as this kernel has them
    snoops: bool  # of a bridge: it sends multicast only to those who have asked for it
    addr_gen_mode: int | None  # IN6_ADDR_GEN_MODE_*; None without IPv6
    lower: int | None  # the index of the device that it is a VLAN of, if that is in this network namespace
    spec: bytes  # IFLA_AF_SPEC: its sysctls (`settings`)
    others: bytes  # IFLA_PROP_LIST: what else it is called

    @property
    def names(self) -> list[str]:
        """Its name, and its alternative ones."""
        return [self.name, *alternative_names(self.others)] if self.others else [self.name]

    @property
    def is_tap(self) -> bool:
        """Whether it is a tap."""
        return self.kind == "tun" and self.type == ARPHRD_ETHER


def link_of(message: bytes) -> Link:
    """The device in an RTM_NEWLINK message."""
    _family, hardware, index, flags, _change = IFINFOMSG.unpack_from(message, BODY)
    found = attributes(message, BODY + IFINFOMSG.size)
    info = attributes(found.get(IFLA_LINKINFO, b""))
    kind, port_of = text(info.get(IFLA_INFO_KIND)), text(info.get(IFLA_INFO_SLAVE_KIND))
    bridge = attributes(info.get(IFLA_INFO_DATA, b"")) if kind == "bridge" else {}
    port = attributes(info.get(IFLA_INFO_SLAVE_DATA, b"")) if port_of == "bridge" else {}
    inet6 = attributes(attributes(found.get(IFLA_AF_SPEC, b"")).get(socket.AF_INET6, b""))
    address = found.get(IFLA_ADDRESS)
    return Link(
        index=index,
        name=text(found.get(IFLA_IFNAME)) or "",
        type=hardware,
        flags=flags,
        address=address.hex(":") if address else None,
        mtu=u32(found.get(IFLA_MTU)) or 0,
        master=u32(found.get(IFLA_MASTER)),
        carrier=bool(u8(found.get(IFLA_CARRIER))),
        kind=kind,
        stp=bool(u32(bridge.get(IFLA_BR_STP_STATE))),
        filters=bool(u8(bridge.get(IFLA_BR_VLAN_FILTERING))),
        default_pvid=int.from_bytes(bridge.get(IFLA_BR_VLAN_DEFAULT_PVID, b""), sys.byteorder),
        forward_delay=(u32(bridge.get(IFLA_BR_FORWARD_DELAY)) or 0) / USER_HZ,
        port_of=port_of,
        port_state=u8(port.get(IFLA_BRPORT_STATE)),
        port_options={name: port[kind][0] for name, kind in IFLA_BRPORT.items() if kind in port},
        snoops=bool(u8(bridge.get(IFLA_BR_MCAST_SNOOPING))),
        addr_gen_mode=u8(inet6.get(IFLA_INET6_ADDR_GEN_MODE)),
        lower=None if IFLA_LINK_NETNSID in found else u32(found.get(IFLA_LINK)),
        spec=found.get(IFLA_AF_SPEC, b""),
        others=found.get(IFLA_PROP_LIST, b""),
    )


def address_body(index: int, address: str, flags: int = 0) -> bytes:
    """What RTM_NEWADDR and RTM_DELADDR say of *address*, which has a prefix length; *flags* are IFA_F_*."""
    bare, _, length = address.partition("/")
    raw = packed(bare)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    body = IFADDRMSG.pack(family, int(length), flags, 0, index)
    return body + attribute(IFA_LOCAL, raw) + attribute(IFA_ADDRESS, raw)


def address_in(message: bytes) -> tuple[int, str]:
    """The index of the device, and the address with its prefix length, in an RTM_NEWADDR message."""
    _family, length, _flags, _scope, index = IFADDRMSG.unpack_from(message, BODY)
    found = attributes(message, BODY + IFADDRMSG.size)
    # On a point-to-point device IFA_ADDRESS is the other end's.
    return index, f"{address_of(found.get(IFA_LOCAL) or found[IFA_ADDRESS])}/{length}"


# --- neighbours and policy rules -------------------------------------------------------------------------


def neighbour_body(index: int, address: str, state: int, flags: int) -> bytes:
    """What RTM_*NEIGH say of *address* on the device *index*; *state* is NUD_*, *flags* NTF_*."""
    raw = packed(address)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return NDMSG.pack(family, index, state, flags, 0) + attribute(NDA_DST, raw)


def rule_body(family: int, iif: str, table: int, priority: int, protocol: int) -> bytes:
    """What RTM_NEWRULE and RTM_DELRULE say of the policy rule `iif IIF lookup TABLE`."""
    body = FIB_RULE_HDR.pack(family, 0, 0, 0, 0, FR_ACT_TO_TBL, 0) + attribute(FRA_IIFNAME, name_bytes(iif))
    body += number(FRA_PRIORITY, priority) + number(FRA_TABLE, table)
    return body + attribute(FRA_PROTOCOL, bytes([protocol]))


def plain_rule(message: bytes) -> tuple[int, int, int] | None:
    """Table, priority and protocol of a rule that says `iif X lookup T` and nothing more; None for any other rule.

    Only of a protocol that people, scripts and we make rules with. Any other one names a program that looks after its
    rules itself.
    """
    _family, *fields, _table, action, flags = FIB_RULE_HDR.unpack_from(message, BODY)
    attrs = attributes(message, BODY + FIB_RULE_HDR.size)
    # The kernel tells an unset prefix length, too.
    if u32(attrs.pop(FRA_SUPPRESS_PREFIXLEN, None)) not in (None, NO_PREFIX_LENGTH):
        return None
    known = {FRA_IIFNAME, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL}
    if any(fields) or action != FR_ACT_TO_TBL or flags & FIB_RULE_INVERT or attrs.keys() - known:
        return None
    protocol = u8(attrs.get(FRA_PROTOCOL)) or RTPROT_UNSPEC
    if protocol not in (RTPROT_UNSPEC, RTPROT_BOOT, RTPROT_STATIC) or FRA_TABLE not in attrs:
        return None
    return u32(attrs[FRA_TABLE]) or 0, u32(attrs.get(FRA_PRIORITY)) or 0, protocol


def incoming_device(message: bytes) -> str:
    """The name of the device that a policy rule is for what comes in on; empty for any."""
    return text(attributes(message, BODY + FIB_RULE_HDR.size).get(FRA_IIFNAME)) or ""


def rule_order(message: bytes) -> int:
    """The priority of a policy rule: the lowest comes first."""
    return u32(attributes(message, BODY + FIB_RULE_HDR.size).get(FRA_PRIORITY)) or 0


def rule_identity(message: bytes) -> tuple[int, bytes, bytes]:
    """All that a policy rule says, without what its devices and others make of it meanwhile."""
    end = BODY + FIB_RULE_HDR.size
    flags = int.from_bytes(message[end - 4 : end], sys.byteorder)
    return flags & FIB_RULE_INVERT, message[BODY : end - 4], message[end:]


def rule_priority(message: bytes) -> int | None:
    """The priority of a policy rule that concerns packets which are forwarded; None for one that does not."""
    attrs = attributes(message, BODY + FIB_RULE_HDR.size)
    return None if FRA_OIFNAME in attrs else rule_order(message)


def deleted_with(message: bytes, table: int, priority: int, protocol: int) -> bool:
    """Whether RTM_DELRULE with `rule_body` can hit the rule in *message*: the kernel compares only what it is told.

    So it takes the first rule of the same table, priority and protocol, also one that says more (rule_find in
    net/core/fib_rules.c).
    """
    action = message[BODY + 7]
    attrs = attributes(message, BODY + FIB_RULE_HDR.size)
    return (
        action == FR_ACT_TO_TBL
        and u32(attrs.get(FRA_TABLE)) == table
        and (u32(attrs.get(FRA_PRIORITY)) or 0) == priority
        and protocol in (RTPROT_UNSPEC, u8(attrs.get(FRA_PROTOCOL)))
    )
