"""Frames that a guest may or may not send, as data.

Each is for the NIC that `NIC` describes, with what must become of it under `filter = "mac"` and `"address"`: True for
passing, False for not, None where either is right. `right`: nothing is wrong with it. `misplaced`: only the MACs are
right. `forged`: its source MAC is another's, or a MAC inside is.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness import wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.addresses import GUEST_LINK_LOCAL as LINK_LOCAL
from harness.guests import rarp
from harness.wire import BROADCAST, ethernet, mac_bytes

IPV4, ARP, RARP, IPV6, VLAN, SERVICE = 0x0800, 0x0806, 0x8035, 0x86DD, 0x8100, 0x88A8
OTHER_MAC, OTHER_IP4, OTHER_IP6, OTHER_LINK_LOCAL = CLIENT_MAC, CLIENT_IP4, CLIENT_IP6, "fe80::1"
IN_PREFIX4, IN_PREFIX6 = "198.51.100.5", "2001:db8:8::77"
NIC: dict[str, Any] = {"mac": GUEST_MAC, "ip": [GUEST_IP4, "198.51.100.0/29", GUEST_IP6, "2001:db8:8::/64"]}
ALL_NODES, ALL_ROUTERS = "ff02::1", "ff02::2"
RESERVED = bytes.fromhex("0180c20000")  # groups that a bridge does not forward; but for BPDUs, if it has no STP
LLDP, EAPOL, BPDU = "01:80:c2:00:00:0e", "01:80:c2:00:00:03", "01:80:c2:00:00:00"
NS, NA, RS, RA, REDIRECT, REPORT = 135, 136, 133, 134, 137, 143
SOURCE, TARGET = 1, 2  # the kinds of link-layer options
PAD = b"\x01\x04\0\0\0\0"  # options that mean nothing, for an extension header of eight bytes


@dataclass(frozen=True)
class Sent:
    """A frame, and whether each filter must let it pass (None: it may)."""

    name: str
    frame: bytes
    mac: bool | None
    address: bool | None

    def passes(self, how: str) -> bool | None:
        """What must become of it under a filter."""
        return {"off": True, "mac": self.mac, "address": self.address}[how]


# --- making them ------------------------------------------------------------------------------------------


def tagged(frame: bytes, *tags: tuple[int, int]) -> bytes:
    """The same inside tags, the outermost first: (TPID, VID) each."""
    inside = b"".join(struct.pack("!HH", kind, vid) for kind, vid in tags)
    return frame[:12] + inside + frame[12:]


def sent_by(mac: str, frame: bytes) -> bytes:
    """The same with another source MAC outside."""
    return frame[:6] + mac_bytes(mac) + frame[12:]


def ip4(source: str, target: str, protocol: int, payload: bytes, *, options: bytes = b"", fragment: int = 0) -> bytes:
    """An IPv4 packet in a frame of the guest's; *fragment* is the field of that name: flags and offset."""
    length = 20 + len(options)
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | length // 4, 0, length + len(payload), 7, fragment, 64, protocol, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    ) + options  # fmt: skip
    header = header[:10] + struct.pack("!H", ~wire.ones_sum(header) & 0xFFFF) + header[12:]
    to = BROADCAST if target == "255.255.255.255" else CLIENT_MAC
    return ethernet(to, GUEST_MAC, IPV4, header + payload)


def udp(source: int, target: int, payload: bytes = b"") -> bytes:
    """A datagram, without a checksum."""
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def ip6(source: str, target: str, kind: int, payload: bytes, *chain: tuple[int, bytes]) -> bytes:
    """An IPv6 packet in a frame of the guest's: extension headers (kind, content but for the first byte), then that."""
    kinds = [*(one for one, _ in chain), kind]
    inside = b"".join(bytes([after]) + content for (_, content), after in zip(chain, kinds[1:], strict=True))
    ends = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(target).packed
    header = struct.pack("!IHBB", 6 << 28, len(inside + payload), kinds[0], 255) + ends
    group = ipaddress.IPv6Address(target)
    to = f"33:33:{group.packed[12:].hex(':')}" if group.is_multicast else CLIENT_MAC
    return ethernet(to, GUEST_MAC, IPV6, header + inside + payload)


def fragment(offset: int = 0, more: bool = False) -> tuple[int, bytes]:
    """A fragment header."""
    return 44, struct.pack("!BHI", 0, offset | more, 7)


HOP, DESTINATION = (0, b"\0" + PAD), (60, b"\0" + PAD)
AUTHENTICATION = (51, b"\x04" + bytes(22))
ALERT = (0, bytes.fromhex("00 05 02 00 00 01 00"))  # hop-by-hop: a router alert, as MLD has it


def option(kind: int, mac: str) -> bytes:
    """A link-layer option."""
    return bytes([kind, 1]) + mac_bytes(mac)


def icmp6(source: str, target: str, body: bytes) -> bytes:
    """An ICMPv6 message with its checksum."""
    ends = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(target).packed
    total = wire.ones_sum(ends + struct.pack("!IxxxB", len(body), 58) + body)
    return body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]


def nd(
    kind: int,
    *options: bytes,
    about: str = "",
    source: str = GUEST_IP6,
    to: str = "",
    chain: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """A message of neighbour discovery."""
    target = ipaddress.IPv6Address(about or GUEST_IP6).packed
    fixed = {
        NS: bytes(4) + target,
        NA: bytes([0x20, 0, 0, 0]) + target,
        RS: bytes(4),
        RA: struct.pack("!BBHII", 64, 0, 1800, 0, 0),
        REDIRECT: bytes(4) + target + ipaddress.IPv6Address("2001:db8:ffff::1").packed,
    }[kind]
    group = str(ipaddress.IPv6Address(ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + target[13:]))
    to = to or {NS: group, RS: ALL_ROUTERS}.get(kind, ALL_NODES)
    return ip6(source, to, 58, icmp6(source, to, bytes([kind, 0, 0, 0]) + fixed + b"".join(options)), *chain)


def report(source: str) -> bytes:
    """An MLDv2 report, behind its router alert."""
    body = struct.pack("!BBHHH", REPORT, 0, 0, 0, 1) + b"\4\0\0\0" + ipaddress.IPv6Address("ff02::1:ff35:ac01").packed
    return ip6(source, "ff02::16", 58, icmp6(source, "ff02::16", body), ALERT)


def arp(
    *,
    mac: str = GUEST_MAC,
    sender: str = GUEST_IP4,
    target: str = OTHER_IP4,
    op: int = 1,
    hardware: int = 1,
    sizes: bytes = b"\6\4",
) -> bytes:
    """An ARP message in a frame of the guest's."""
    body = struct.pack("!HH2sH6s4s6s4s", hardware, IPV4, sizes, op, mac_bytes(mac), socket.inet_aton(sender), bytes(6),
                       socket.inet_aton(target))  # fmt: skip
    return ethernet(BROADCAST, GUEST_MAC, ARP, body)


def reverse(*, op: int = 3, sender: str = GUEST_MAC, target: str = GUEST_MAC) -> bytes:
    """RARP, as QEMU sends it; with other MACs inside."""
    frame = rarp()
    return frame[:20] + struct.pack("!H", op) + mac_bytes(sender) + frame[28:32] + mac_bytes(target) + frame[38:]


ECHO4, ECHO6 = b"\x08\0\xf7\xfd\0\1\0\1", bytes([128, 0, 0, 0, 0, 1, 0, 1])
IGMP = bytes.fromhex("2200") + bytes(6)
NONCE = bytes([14, 1, 1, 2, 3, 4, 5, 6])
LLC_BPDU = bytes.fromhex("424203") + bytes(35)
SNAP = bytes.fromhex("aaaa03000000")
MINE, YOURS = option(SOURCE, GUEST_MAC), option(SOURCE, OTHER_MAC)
MINE_TOO, YOURS_TOO = option(TARGET, GUEST_MAC), option(TARGET, OTHER_MAC)


# --- the table --------------------------------------------------------------------------------------------


def right() -> dict[str, bytes]:
    """What both filters must let pass."""
    return {
        "ARP request": arp(),
        "ARP reply": arp(op=2),
        "ARP probe": arp(sender="0.0.0.0", target=GUEST_IP4),
        "ARP announcement": arp(target=GUEST_IP4),
        "ARP of an address in a prefix": arp(sender=IN_PREFIX4),
        "QEMU's RARP": reverse(),
        "IPv4 UDP": ip4(GUEST_IP4, OTHER_IP4, 17, udp(9, 9)),
        "IPv4 ping": ip4(GUEST_IP4, OTHER_IP4, 1, ECHO4),
        "IPv6 TCP behind an authentication header": ip6(GUEST_IP6, OTHER_IP6, 6, bytes(20), AUTHENTICATION),
        "IPv4 from a prefix": ip4(IN_PREFIX4, OTHER_IP4, 17, udp(9, 9)),
        "IPv4 to everybody": ip4(GUEST_IP4, "255.255.255.255", 17, udp(9, 9)),
        "IPv4, the first fragment": ip4(GUEST_IP4, OTHER_IP4, 17, udp(9, 9, bytes(16)), fragment=0x2000),
        "IPv4, a later fragment": ip4(GUEST_IP4, OTHER_IP4, 17, bytes(16), fragment=0x0003),
        "IPv4, a later fragment that looks like DHCP": ip4(GUEST_IP4, OTHER_IP4, 17, udp(67, 68), fragment=0x0003),
        "IPv4, a later fragment that looks like a redirect": ip4(GUEST_IP4, OTHER_IP4, 1, b"\5" + bytes(7), fragment=3),
        "IPv4 with options": ip4(GUEST_IP4, OTHER_IP4, 17, udp(9, 9), options=bytes([1] * 8)),
        "IGMP with a router alert": ip4(GUEST_IP4, "224.0.0.22", 2, IGMP, options=b"\x94\4\0\0"),
        "IPv6 in IPv4": ip4(GUEST_IP4, OTHER_IP4, 41, ip6(OTHER_IP6, CLIENT_IP6, 17, udp(9, 9))[14:]),
        "jumbo": ip4(GUEST_IP4, OTHER_IP4, 17, udp(9, 9, bytes(8000))),
        "DHCP discover": ip4("0.0.0.0", "255.255.255.255", 17, udp(68, 67, bytes(240))),
        "DHCP renewal": ip4(GUEST_IP4, OTHER_IP4, 17, udp(68, 67, bytes(240))),
        "IPv6 UDP": ip6(GUEST_IP6, OTHER_IP6, 17, udp(9, 9)),
        "IPv6 ping": ip6(GUEST_IP6, OTHER_IP6, 58, icmp6(GUEST_IP6, OTHER_IP6, ECHO6)),
        "IPv6 from a prefix": ip6(IN_PREFIX6, OTHER_IP6, 17, udp(9, 9)),
        "IPv6 from the link-local address": ip6(LINK_LOCAL, OTHER_LINK_LOCAL, 17, udp(9, 9)),
        "IPv6, the first fragment": ip6(GUEST_IP6, OTHER_IP6, 17, udp(9, 9, bytes(16)), fragment(more=True)),
        "IPv6, a later fragment": ip6(GUEST_IP6, OTHER_IP6, 17, bytes(16), fragment(24)),
        "IPv6 ping, a later fragment": ip6(GUEST_IP6, OTHER_IP6, 58, bytes(16), fragment(24)),
        "IPv6, a later fragment that looks like DHCP": ip6(GUEST_IP6, OTHER_IP6, 17, udp(547, 546), fragment(24)),
        "IPv6, a later fragment that looks like an RA": ip6(GUEST_IP6, OTHER_IP6, 58, b"\x86" + bytes(7), fragment(24)),
        "ESP": ip6(GUEST_IP6, OTHER_IP6, 50, bytes(32)),
        "IPv6 without anything": ip6(GUEST_IP6, OTHER_IP6, 59, b""),
        "IPv6 UDP behind options": ip6(GUEST_IP6, OTHER_IP6, 17, udp(9, 9), HOP, DESTINATION),
        "IPv6 ping behind options": ip6(GUEST_IP6, OTHER_IP6, 58, icmp6(GUEST_IP6, OTHER_IP6, ECHO6), DESTINATION),
        "DHCPv6 client": ip6(LINK_LOCAL, "ff02::1:2", 17, udp(546, 547, bytes(8))),
        "MLD report": report(LINK_LOCAL),
        "MLD report for DAD": report("::"),
        "DAD": nd(NS, source="::"),
        "DAD of the link-local address": nd(NS, about=LINK_LOCAL, source="::"),
        "DAD of an address in a prefix": nd(NS, about=IN_PREFIX6, source="::"),
        "DAD with a nonce": nd(NS, NONCE, source="::"),
        "NS": nd(NS, MINE, about=OTHER_IP6),
        "NS from the link-local address": nd(NS, MINE, about=OTHER_LINK_LOCAL, source=LINK_LOCAL),
        "NS without an option": nd(NS, about=OTHER_IP6, to=OTHER_IP6),
        "NA": nd(NA, MINE_TOO),
        "NA to one": nd(NA, MINE_TOO, to=OTHER_IP6),
        "NA for the link-local address": nd(NA, MINE_TOO, about=LINK_LOCAL, source=LINK_LOCAL),
        "NA for an address in a prefix": nd(NA, MINE_TOO, about=IN_PREFIX6),
        "NA without an option": nd(NA, to=OTHER_IP6),
        "RS": nd(RS, MINE, source=LINK_LOCAL),
        "RS without an option": nd(RS, source=LINK_LOCAL),
    }  # fmt: skip


def misplaced() -> dict[str, bytes]:
    """What has the guest's MAC everywhere, and so passes by "mac", but not by "address"."""
    unknown = ethernet(BROADCAST, GUEST_MAC, 0x88B6, bytes(46))
    return {
        "ARP of another's address": arp(sender=OTHER_IP4, target=GUEST_IP4),
        "ARP reply of another's address": arp(sender=OTHER_IP4, op=2),
        "ARP announcement of another's address": arp(sender=OTHER_IP4, target=OTHER_IP4),
        "ARP probe for another's address": arp(sender="0.0.0.0", target=OTHER_IP4),
        "ARP from the address before the prefix": arp(sender="198.51.99.255"),
        "ARP from the address after the prefix": arp(sender="198.51.100.8"),
        "IPv4 from another": ip4(OTHER_IP4, GUEST_IP4, 17, udp(9, 9)),
        "IPv4 from a neighbour of the prefix": ip4("198.51.100.8", OTHER_IP4, 17, udp(9, 9)),
        "IPv4 from a group": ip4("224.0.0.1", OTHER_IP4, 17, udp(9, 9)),
        "IPv4 from everybody": ip4("255.255.255.255", OTHER_IP4, 17, udp(9, 9)),
        "IPv4 from loopback": ip4("127.0.0.1", OTHER_IP4, 17, udp(9, 9)),
        "IPv4 from another, with options": ip4(OTHER_IP4, GUEST_IP4, 17, udp(9, 9), options=bytes([1] * 12)),
        "IPv4 from another, the first fragment": ip4(OTHER_IP4, GUEST_IP4, 17, bytes(8), fragment=0x2000),
        "IPv4 from another, a later fragment": ip4(OTHER_IP4, GUEST_IP4, 17, bytes(16), fragment=0x0003),
        "ping from 0.0.0.0": ip4("0.0.0.0", OTHER_IP4, 1, ECHO4),
        "UDP from 0.0.0.0": ip4("0.0.0.0", "255.255.255.255", 17, udp(9, 9)),
        "UDP from 0.0.0.0 to a DHCP server's port": ip4("0.0.0.0", "255.255.255.255", 17, udp(9, 67)),
        "TCP from 0.0.0.0 with DHCP's ports": ip4("0.0.0.0", OTHER_IP4, 6, udp(68, 67, bytes(12))),
        "a later fragment from 0.0.0.0": ip4("0.0.0.0", "255.255.255.255", 17, udp(68, 67), fragment=0x0003),
        "IGMP from 0.0.0.0": ip4("0.0.0.0", "224.0.0.22", 2, IGMP, options=b"\x94\4\0\0"),
        "IGMP from another": ip4(OTHER_IP4, "224.0.0.22", 2, IGMP, options=b"\x94\4\0\0"),
        "DHCP server": ip4(GUEST_IP4, "255.255.255.255", 17, udp(67, 68, bytes(240))),
        "DHCP server, with IP options": ip4(GUEST_IP4, OTHER_IP4, 17, udp(67, 68), options=bytes([1] * 4)),
        "DHCP server, fragmented": ip4(GUEST_IP4, OTHER_IP4, 17, udp(67, 68), fragment=0x2000),
        "ICMP redirect": ip4(GUEST_IP4, OTHER_IP4, 1, b"\5\1\0\0" + socket.inet_aton(GUEST_IP4) + bytes(28)),
        "IPv6 from another": ip6(OTHER_IP6, GUEST_IP6, 17, udp(9, 9)),
        "IPv6 from a neighbour of the prefix": ip6("2001:db8:9::", OTHER_IP6, 17, udp(9, 9)),
        "IPv6 from another link-local address": ip6(OTHER_LINK_LOCAL, OTHER_IP6, 17, udp(9, 9)),
        "IPv6 from loopback": ip6("::1", OTHER_IP6, 17, udp(9, 9)),
        "IPv6 from the guest's IPv4 address": ip6(f"::ffff:{GUEST_IP4}", OTHER_IP6, 17, udp(9, 9)),
        "IPv6 from a group": ip6("ff02::1", OTHER_IP6, 17, udp(9, 9)),
        "IPv6 from another behind options": ip6(OTHER_IP6, GUEST_IP6, 17, udp(9, 9), HOP, DESTINATION),
        "IPv6 from another, the first fragment": ip6(OTHER_IP6, GUEST_IP6, 17, udp(9, 9), fragment(more=True)),
        "IPv6 from another, a later fragment": ip6(OTHER_IP6, GUEST_IP6, 17, bytes(16), fragment(24)),
        "MLD report from another": report(OTHER_LINK_LOCAL),
        "UDP from ::": ip6("::", ALL_NODES, 17, udp(9, 9)),
        "ping from ::": ip6("::", ALL_NODES, 58, icmp6("::", ALL_NODES, ECHO6)),
        "a later fragment from ::": ip6("::", ALL_NODES, 58, nd(NS, source="::")[54:], fragment(24)),
        "DAD of another's address": nd(NS, about=OTHER_IP6, source="::"),
        "DAD of another's link-local address": nd(NS, about=OTHER_LINK_LOCAL, source="::"),
        "NS from another": nd(NS, MINE, source=OTHER_IP6),
        "NA for another": nd(NA, MINE_TOO, about=OTHER_IP6),
        "NA for another, without an option": nd(NA, about=OTHER_IP6),
        "NA from another": nd(NA, MINE_TOO, source=OTHER_IP6),
        "NA for another's link-local address": nd(NA, MINE_TOO, about=OTHER_LINK_LOCAL, source=LINK_LOCAL),
        "RS from another": nd(RS, MINE, source=OTHER_LINK_LOCAL),
        "RA": nd(RA, MINE, source=LINK_LOCAL),
        "RA without an option": nd(RA, source=LINK_LOCAL),
        "redirect": nd(REDIRECT, MINE_TOO, source=LINK_LOCAL),
        "redirect without an option": nd(REDIRECT, source=LINK_LOCAL),
        "DHCPv6 server": ip6(LINK_LOCAL, OTHER_LINK_LOCAL, 17, udp(547, 546, bytes(8))),
        "DHCPv6 server behind options": ip6(LINK_LOCAL, OTHER_LINK_LOCAL, 17, udp(547, 546), DESTINATION),
        "DHCPv6 server, fragmented": ip6(LINK_LOCAL, OTHER_LINK_LOCAL, 17, udp(547, 546), fragment(more=True)),
        "STP": ethernet(BPDU, GUEST_MAC, 38, LLC_BPDU),
        "LLC": ethernet(BROADCAST, GUEST_MAC, 46, bytes.fromhex("e0e003") + bytes(43)),
        "LLDP": ethernet(LLDP, GUEST_MAC, 0x88CC, bytes(46)),
        "EAPOL": ethernet(EAPOL, GUEST_MAC, 0x888E, bytes(46)),
        "PPPoE": ethernet(BROADCAST, GUEST_MAC, 0x8863, bytes(46)),
        "a PPPoE session": ethernet(CLIENT_MAC, GUEST_MAC, 0x8864, bytes.fromhex("110000010016 0021") + bytes(40)),
        "MPLS": ethernet(CLIENT_MAC, GUEST_MAC, 0x8847, bytes.fromhex("00001140") + bytes(42)),
        "an unknown protocol": unknown,
    }  # fmt: skip


def hidden() -> dict[str, bytes]:
    """What "address" must not let pass, because nobody can look into it, or it is no proper message; "mac" may."""
    whole = nd(NS, MINE, about=OTHER_IP6)
    first, rest = whole[54:70], whole[70:]
    group = ipaddress.IPv6Address(whole[38:54])
    return {
        "NS behind options": nd(NS, MINE, about=OTHER_IP6, chain=[DESTINATION]),
        "NS behind an authentication header": nd(NS, MINE, about=OTHER_IP6, chain=[AUTHENTICATION]),
        "NS behind two": nd(NS, MINE, about=OTHER_IP6, chain=[AUTHENTICATION, AUTHENTICATION]),
        "RA behind two": nd(RA, MINE, source=LINK_LOCAL, chain=[AUTHENTICATION, AUTHENTICATION]),
        "DHCPv6 server behind one": ip6(LINK_LOCAL, OTHER_LINK_LOCAL, 17, udp(547, 546), AUTHENTICATION),
        "NS behind a router alert": nd(NS, MINE, about=OTHER_IP6, chain=[ALERT]),
        "NA in a fragment that is the whole": nd(NA, MINE_TOO, chain=[fragment()]),
        "NS, the first fragment": ip6(GUEST_IP6, str(group), 58, first, fragment(more=True)),
        "RA in a fragment that is the whole": nd(RA, MINE, source=LINK_LOCAL, chain=[fragment()]),
        "RA behind many headers": nd(RA, MINE, source=LINK_LOCAL, chain=[HOP, DESTINATION, fragment(), DESTINATION]),
        "RA, the first fragment ends before it": ip6(LINK_LOCAL, ALL_NODES, 60, b"\x3a\0" + PAD, fragment(more=True)),
        "a first fragment without what it carries": ip6(GUEST_IP6, OTHER_IP6, 60, b"\x11\3" + PAD, fragment(more=True)),
        "NS with its option twice": nd(NS, MINE, MINE, about=OTHER_IP6),
        "a foreign kind of tag": tagged(arp(), (0x9100, 5)),
        "SNAP with ARP": ethernet(BROADCAST, GUEST_MAC, 60, SNAP + arp()[12:] + bytes(24)),
        "SNAP with another's ARP": ethernet(BROADCAST, GUEST_MAC, 60, SNAP + arp(mac=OTHER_MAC)[12:] + bytes(24)),
        "a later fragment of ND": ip6(GUEST_IP6, ALL_NODES, 60, rest, fragment(16)),
        "half an ARP message": arp()[:28],
        "half an IPv4 header": ip4(GUEST_IP4, OTHER_IP4, 17, b"")[:24],
        "half an IPv6 header": ip6(GUEST_IP6, OTHER_IP6, 17, b"")[:28],
        "a header alone": ethernet(CLIENT_MAC, GUEST_MAC, IPV4, b""),
        "half an NA": nd(NA, MINE_TOO)[:66],
        "ARP with addresses of other sizes": arp(sizes=b"\4\6"),
    }  # fmt: skip


def forged_inside() -> dict[str, bytes]:
    """The guest's MAC outside, another's inside."""
    return {
        "ARP request with another's MAC": arp(mac=OTHER_MAC),
        "ARP reply with another's MAC": arp(mac=OTHER_MAC, op=2),
        "ARP probe with another's MAC": arp(mac=OTHER_MAC, sender="0.0.0.0", target=GUEST_IP4),
        "InARP with another's MAC": arp(mac=OTHER_MAC, op=8),
        "ARP over IEEE 802 with another's MAC": arp(mac=OTHER_MAC, hardware=6),
        "ARP with another's MAC in a foreign kind of tag": tagged(arp(mac=OTHER_MAC), (0x9100, 5)),
        "RARP with another's MAC": reverse(sender=OTHER_MAC, target=OTHER_MAC),
        "RARP with another's MAC as sender": reverse(sender=OTHER_MAC),
        "RARP with another's MAC as target": reverse(target=OTHER_MAC),
        "RARP reply with another's MAC": reverse(op=4, sender=OTHER_MAC),
        "NS with another's MAC": nd(NS, YOURS, about=OTHER_IP6),
        "NS with another's MAC from the link-local address": nd(NS, YOURS, about=OTHER_IP6, source=LINK_LOCAL),
        "NA with another's MAC": nd(NA, YOURS_TOO),
        "NA with another's MAC, to one": nd(NA, YOURS_TOO, to=OTHER_IP6),
        "NA with the MAC of everybody": nd(NA, option(TARGET, BROADCAST)),
        "RS with another's MAC": nd(RS, YOURS, source=LINK_LOCAL),
        "RA with another's MAC": nd(RA, YOURS, source=LINK_LOCAL),
        "redirect with another's MAC": nd(REDIRECT, YOURS_TOO, source=LINK_LOCAL),
        "NS with its own MAC and another's": nd(NS, MINE, YOURS, about=OTHER_IP6),
        "NA with its own MAC and another's": nd(NA, MINE_TOO, YOURS_TOO),
        "NS with a nonce and another's MAC": nd(NS, NONCE, YOURS, about=OTHER_IP6),
        "RS with a nonce and another's MAC": nd(RS, NONCE, YOURS, source=LINK_LOCAL),
        "NS with another's MAC as target": nd(NS, YOURS_TOO, about=OTHER_IP6),
        "NS behind options with another's MAC": nd(NS, YOURS, about=OTHER_IP6, chain=[DESTINATION]),
        "NS behind two with another's MAC": nd(NS, YOURS, about=OTHER_IP6, chain=[AUTHENTICATION, AUTHENTICATION]),
        "NA behind many headers with another's MAC": nd(NA, YOURS_TOO, chain=[HOP, DESTINATION, DESTINATION]),
        "NA in a fragment with another's MAC": nd(NA, YOURS_TOO, chain=[fragment()]),
    }  # fmt: skip


# A bare one is in the table anyway.
TAGS = {
    "VID 0": [(VLAN, 0)],
    "VID 100": [(VLAN, 100)],
    "VID 0 twice": [(VLAN, 0), (VLAN, 0)],
    "two tags": [(VLAN, 100), (VLAN, 200)],
    "802.1ad": [(SERVICE, 100)],
    "802.1ad and 802.1Q": [(SERVICE, 100), (VLAN, 0)],
}
THREE = [(VLAN, 0), (VLAN, 0), (VLAN, 0)]


def bare() -> list[Sent]:
    """Those without tags whose source MAC is the guest's, and each kind of them with another's."""
    kinds = (
        (right(), True, True), (misplaced(), True, False), (hidden(), None, False), (forged_inside(), False, False),
    )  # fmt: skip
    found = [Sent(name, frame, mac, address) for one, mac, address in kinds for name, frame in one.items()]
    return [*found, *_from_another(found)]


def table() -> tuple[Sent, ...]:
    """All of them; no two are the same."""
    without = bare()
    found = [*without, *_in_tags({one.name: one for one in without})]
    assert len({one.frame for one in found}) == len(found)
    return tuple(found)


# With a source MAC of another outside, nothing of any kind may pass.
OUTSIDE = (
    "ARP request", "ARP probe", "QEMU's RARP", "IPv4 UDP", "IPv4, a later fragment", "DHCP discover", "IPv6 UDP",
    "DAD", "NS", "NA", "RS", "MLD report", "RA", "STP", "LLC", "LLDP", "EAPOL", "PPPoE", "MPLS",
    "an unknown protocol", "a foreign kind of tag", "IPv6 UDP behind options", "half an ARP message",
)  # fmt: skip


def _from_another(own: Sequence[Sent]) -> Iterator[Sent]:
    """Each with a MAC of its own: whoever has moved the bridge's table can be told by it."""
    frames = {one.name: one.frame for one in own}
    for number, name in enumerate(OUTSIDE):
        yield Sent(f"{name}, from another's MAC", sent_by(f"02:f0:00:00:00:{number:02x}", frames[name]), False, False)


TAGGED = (
    "ARP request", "ARP probe", "QEMU's RARP", "IPv4 UDP", "DHCP discover", "IPv6 UDP", "DAD", "NS", "NA",
    "MLD report", "ARP of another's address", "IPv4 from another", "IPv6 from another", "NA for another", "RA",
    "DHCP server", "DHCPv6 server", "DAD of another's address", "an unknown protocol",
    "ARP request with another's MAC", "RARP with another's MAC", "NS with another's MAC", "NA with another's MAC",
    "NS behind options with another's MAC",
)  # fmt: skip


def _in_tags(without: dict[str, Sent]) -> Iterator[Sent]:
    """Tags do not hide anything."""
    for number, name in enumerate(TAGGED):
        one = without[name]
        for words, tags in TAGS.items():
            judged = one if len(tags) == 1 else in_two(one)
            yield Sent(f"{name}, {words}", tagged(one.frame, *tags), judged.mac, judged.address)
        if not one.mac:
            yield Sent(f"{name}, three tags", tagged(one.frame, *THREE), False, False)
        if not one.address:
            yield Sent(f"{name}, VID 1 three times", tagged(one.frame, *[(VLAN, 1)] * 3), one.mac and None, False)
        outside = sent_by(f"02:f1:00:00:00:{number:02x}", one.frame)
        yield Sent(f"{name}, two tags, from another's MAC", tagged(outside, (VLAN, 5), (VLAN, 6)), False, False)
    for name, one in without.items():
        if name not in TAGGED:
            yield replace(in_two(one), name=f"{name}, {TWO_WORDS}", frame=tagged(one.frame, *TAGS[TWO_WORDS]))


TWO_WORDS = "two tags"
# What is right, but cannot be looked into behind a second tag: it passes by "mac", by "address".
CLOSED = {
    "IPv4 with options": (True, False),
    "IPv6 UDP behind options": (False, False),
    "IPv6 ping behind options": (False, False),
    "IPv6 TCP behind an authentication header": (False, False),
    "IPv6 from another behind options": (False, False),
    "DHCPv6 server behind options": (False, False),
}


def in_two(one: Sent) -> Sent:
    """What must become of a frame inside two tags."""
    mac, address = CLOSED.get(one.name.partition(",")[0], (one.mac, one.address))
    return replace(one, mac=one.mac and mac, address=one.address and address)
