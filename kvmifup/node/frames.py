"""The ARP and neighbour discovery frames that we send, and what we read out of the frames of others.

MACs are six bytes here, and addresses text, unless a docstring says otherwise.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from kvmifup.core.model import Nic, link_local_of
from kvmifup.node.messages import mac_bytes, packed

ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD  # linux/if_ether.h
NAMES = {0x0800: "IPv4", ETH_P_ARP: "ARP", 0x8035: "RARP", ETH_P_IPV6: "IPv6"}
MIN_FRAME = 60  # bytes, without the checksum: IEEE 802.3
BROADCAST = b"\xff" * 6
ARP_REQUEST, ARP_REPLY = 1, 2  # RFC 826
ARP_FOR_IPV4 = struct.pack("!HHHBB", ETH_P_ARP, 1, 0x0800, 6, 4)  # the ethertype, and what is in front of the operation
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136  # RFC 4861, sections 4.3 and 4.4
ECHO_REQUEST = 128  # RFC 4443, section 4.1
QUESTIONS = 64  # for one guest at a time
SOLICITED, OVERRIDE = 0x40000000, 0x20000000  # flags of an advertisement: RFC 4861, section 4.4
SOURCE_MAC, TARGET_MAC = 1, 2  # options: RFC 4861, section 4.6.1
MULTICAST = 0xFF  # the first byte of such an address
ALL_NODES = packed("ff02::1")
SOLICITED_NODE = packed("ff02::1:ff00:0")[:13]  # of the group; the address's last three bytes follow


# --- what we send -----------------------------------------------------------------------------------------


def gratuitous_arp(mac: bytes, address: str) -> bytes:
    """The broadcast frame that moves *address* to *mac* in every cache that knows it.

    It is a request whose sender and target are the same address. It updates existing entries and makes no new
    ones (`arp_is_garp` and `arp_process` in net/ipv4/arp.c; RFC 5227, section 2.3).
    """
    return arp_request(BROADCAST, mac, packed(address), packed(address))


def unsolicited_na(mac: bytes, address: str, source: str) -> bytes:
    """The multicast frame that moves *address* to *mac* in every neighbour cache that knows it (RFC 4861, 7.2.6).

    Override is set, because without it a cached MAC stays. Solicited is not, and Router is not: the guest is a host.
    """
    return neighbour_message(
        NEIGHBOUR_ADVERTISEMENT, multicast_mac(ALL_NODES), mac, packed(source), ALL_NODES, packed(address), OVERRIDE
    )


def who_has(mac: bytes, address: str, sources: Sequence[str]) -> bytes:
    """The frame in which *mac* asks everybody on its segment who has *address*.

    The sender is the first of *sources* that is of the same family, or the unspecified address.
    """
    target = packed(address)
    source = next((one for one in map(packed, sources) if len(one) == len(target)), bytes(len(target)))
    if len(target) == 4:
        return arp_request(BROADCAST, mac, source, target)
    group = SOLICITED_NODE + target[13:]  # RFC 4291, section 2.7.1
    return neighbour_message(NEIGHBOUR_SOLICITATION, multicast_mac(group), mac, source, group, target)


def questions(nic: Nic, about: str = "") -> list[bytes]:
    """Frames to send into the tap of *nic*, which its guest answers if it runs: one for each address, *about* first.

    They go to the guest's MAC alone. The ARP requests are probes (RFC 5227, section 2.1.1), which change no cache.
    Who has only prefixes is asked for their first addresses, for the link-local address that its MAC gives, and for an
    echo.
    """
    guest, tap = mac_bytes(nic.mac), mac_bytes(nic.tap_mac)
    source = packed(nic.gateway)
    hosts = [prefix.network_address.packed for prefix in nic.ip if prefix.prefixlen == prefix.max_prefixlen]
    hosts.sort(key=lambda host: host != (packed(about) if about else b""))
    more = []
    if nic.ip and not hosts:
        v4 = chain.from_iterable(prefix.hosts() for prefix in nic.ip if prefix.version == 4)
        hosts = [*(host.packed for host in islice(v4, QUESTIONS - 1)), packed(link_local_of(nic.mac))]
        more = [icmpv6(guest, tap, source, ALL_NODES, ECHO_REQUEST, bytes(4))]
    return [
        neighbour_message(NEIGHBOUR_SOLICITATION, guest, tap, source, host, host)
        if len(host) == 16
        else arp_request(guest, tap, bytes(4), host)
        for host in hosts[:QUESTIONS]
    ] + more


def arp_request(to: bytes, mac: bytes, sender: bytes, target: bytes) -> bytes:
    """The ARP request from *mac* to the MAC *to*, as a frame: *sender* asks for *target*, four bytes each (RFC 826)."""
    arp = struct.pack("!HHBBH6s4s6x4s", 1, 0x0800, 6, 4, ARP_REQUEST, mac, sender, target)
    return (to + mac + struct.pack("!H", ETH_P_ARP) + arp).ljust(MIN_FRAME, b"\0")


def neighbour_message(
    kind: int, to: bytes, mac: bytes, source: bytes, destination: bytes, target: bytes, flags: int = 0
) -> bytes:
    """The neighbour solicitation or advertisement (*kind*) about *target*, as a frame from *mac* to the MAC *to*.

    It carries *mac* as an option: as the source's in a solicitation, as the target's in an advertisement. The
    addresses are 16 bytes each (RFC 4861, sections 4.3, 4.4 and 4.6.1).
    """
    option = SOURCE_MAC if kind == NEIGHBOUR_SOLICITATION else TARGET_MAC
    return icmpv6(to, mac, source, destination, kind, struct.pack("!I16sBB6s", flags, target, option, 1, mac))


def icmpv6(to: bytes, mac: bytes, source: bytes, destination: bytes, kind: int, body: bytes) -> bytes:
    """The ICMPv6 message of *kind* with *body*, as a frame from *mac* to the MAC *to* (RFC 4443, section 2.1)."""
    pseudo = source + destination + struct.pack("!I3xB", 4 + len(body), socket.IPPROTO_ICMPV6)
    checksum = internet_checksum(pseudo + struct.pack("!BBH", kind, 0, 0) + body)
    icmp = struct.pack("!BBH", kind, 0, checksum) + body
    # Hop limit 255: receivers drop any other, because only a node on the segment can have sent it.
    header = struct.pack("!IHBB16s16s", 6 << 28, len(icmp), socket.IPPROTO_ICMPV6, 255, source, destination)
    return to + mac + struct.pack("!H", ETH_P_IPV6) + header + icmp


def internet_checksum(data: bytes) -> int:
    """The checksum of RFC 1071 over *data*; 0 if a right one is in it."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def multicast_mac(group: bytes) -> bytes:
    """The MAC that frames to the IPv6 multicast address *group*, 16 bytes, go to (RFC 2464, section 7)."""
    return b"\x33\x33" + group[12:]


# --- what others send -------------------------------------------------------------------------------------


def name_of(frame: bytes) -> str:
    """What kind of frame it is, for people: "RARP"."""
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    return NAMES.get(ethertype, f"ethertype 0x{ethertype:04x}")


def answer_in(frame: bytes) -> tuple[str, str] | None:
    """The address that *frame* answers for, and the MAC that it gives, as text; None for any other frame."""
    if arp := arp_in(frame):
        return (arp.sender, arp.mac.hex(":")) if arp.kind == ARP_REPLY else None
    if advertisement := advertisement_in(frame):
        # To who asked the guest alone, it may do without the option: the frame itself comes from there then.
        return advertisement.target, (advertisement.mac or frame[6:12]).hex(":")
    return None


def announcement_in(frame: bytes) -> tuple[str, str] | None:
    """The address that *frame* announces, and the MAC that it gives, as text; None if it announces nothing.

    It announces something if the neighbours' kernels change their caches for it. So an advertisement has to override,
    and to say a MAC. That an ARP message comes from another MAC than the one it tells does not matter to them.
    """
    if arp := arp_in(frame):
        return (arp.sender, arp.mac.hex(":")) if arp.sender == arp.target and is_station(arp.mac) else None
    found = advertisement_in(frame)
    if found and found.mac and found.override and found.destination == ALL_NODES and is_station(found.mac):
        return found.target, found.mac.hex(":")
    return None


def probe_in(frame: bytes) -> tuple[str, str] | None:
    """The address that somebody wants for itself if nobody has it, and its MAC, as text; None for any other frame.

    For IPv6 the kernel answers such a question (`ndisc_recv_ns`); for IPv4 it does not where it only stands in.
    """
    arp = arp_in(frame)
    if arp and arp.kind == ARP_REQUEST and not any(packed(arp.sender)) and is_station(arp.mac):
        return arp.target, arp.mac.hex(":")
    return None


@dataclass(frozen=True)
class Arp:
    """An ARP message: *kind* is its operation; the addresses are text."""

    kind: int
    mac: bytes
    sender: str
    target: str


def arp_in(frame: bytes) -> Arp | None:
    """The ARP message in *frame*, if the kernel would look at it (`arp_rcv`, `arp_process` in net/ipv4/arp.c)."""
    if len(frame) < 42 or frame[12:20] != ARP_FOR_IPV4:
        return None
    kind, mac, sender, target = struct.unpack_from("!H6s4s6x4s", frame, 20)
    if kind not in (ARP_REQUEST, ARP_REPLY):
        return None
    return Arp(kind, mac, socket.inet_ntoa(sender), socket.inet_ntoa(target))


@dataclass(frozen=True)
class Advertisement:
    """A neighbour advertisement: *mac* is what its option says, None without one."""

    destination: bytes
    override: bool
    target: str
    mac: bytes | None


def advertisement_in(frame: bytes) -> Advertisement | None:
    """The neighbour advertisement in *frame*, if the kernel would look at it.

    These are the checks of `ip6_rcv_core`, `icmpv6_rcv`, `ndisc_rcv` and `ndisc_recv_na`, and of RFC 4861, section
    7.1.2. Hop limit 255 says that it comes from this segment. A fragment has another next header, and so have
    extension headers: nobody sends advertisements that way.
    """
    if len(frame) < 78 or frame[12:14] != struct.pack("!H", ETH_P_IPV6) or frame[14] >> 4 != 6:
        return None
    length, next_header, hop_limit, source, destination = struct.unpack_from("!HBB16s16s", frame, 18)
    body = frame[54 : 54 + length]
    if (next_header, hop_limit, body[:2]) != (socket.IPPROTO_ICMPV6, 255, bytes([NEIGHBOUR_ADVERTISEMENT, 0])):
        return None
    pseudo = source + destination + struct.pack("!I3xB", length, socket.IPPROTO_ICMPV6)
    if not 24 <= length == len(body) or internet_checksum(pseudo + body) != 0:
        return None
    flags, target = struct.unpack_from("!I16s", body, 4)
    to_many = destination[0] == MULTICAST
    if source[0] == MULTICAST or target[0] == MULTICAST or (to_many and flags & SOLICITED):
        return None
    try:
        mac = target_mac_in(body[24:])
    except ValueError:
        return None
    return Advertisement(destination, bool(flags & OVERRIDE), str(ipaddress.IPv6Address(target)), mac)


def target_mac_in(options: bytes) -> bytes | None:
    """The target's MAC among the *options* of an advertisement. Raises ValueError if they are malformed."""
    mac = None
    while options:
        size = 8 * options[1] if len(options) > 1 else 0
        if not 0 < size <= len(options):
            raise ValueError("an option without an end")
        if options[0] == TARGET_MAC and mac is None:
            if size != 8:
                raise ValueError("not the size of a MAC")
            mac = options[2:8]
        options = options[size:]
    return mac


def is_station(mac: bytes) -> bool:
    """Whether *mac* can be a machine's: it is neither a group's nor zero."""
    return any(mac) and not mac[0] & 1
