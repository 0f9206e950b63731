"""The ARP and neighbour discovery frames that we send, and what we read out of the frames of others.

MACs are six bytes here, and addresses text, unless a docstring says otherwise.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from itertools import chain, islice

from kvmifup.core.model import Nic, link_local_of
from kvmifup.core.records import record
from kvmifup.node.messages import mac_bytes, packed

ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0800, 0x0806, 0x86DD  # linux/if_ether.h
RARP = "RARP"  # what QEMU sends when a guest has come from another node; nobody else does
NAMES = {ETH_P_IP: "IPv4", ETH_P_ARP: "ARP", 0x8035: RARP, ETH_P_IPV6: "IPv6"}
MIN_FRAME = 60  # bytes, without the checksum: IEEE 802.3
BROADCAST = b"\xff" * 6
ARP_REQUEST, ARP_REPLY = 1, 2  # RFC 826
# What is in front of the operation: Ethernet, or IEEE 802, which the kernel takes for the same.
ARP_FOR_IPV4 = frozenset(struct.pack("!HHHBB", ETH_P_ARP, hardware, 0x0800, 6, 4) for hardware in (1, 6))
ROUTER_SOLICITATION = 133  # RFC 4861, section 4.1
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136  # RFC 4861, sections 4.3 and 4.4
# And how long they are, at least.
DISCOVERY = {ROUTER_SOLICITATION: 8, NEIGHBOUR_SOLICITATION: 24, NEIGHBOUR_ADVERTISEMENT: 24}
HOP_OPTIONS, OPTIONS = socket.IPPROTO_HOPOPTS, socket.IPPROTO_DSTOPTS  # headers that may be in front of a message
ECHO_REQUEST = 128  # RFC 4443, section 4.1
FIRST_LIMITS = frozenset({64, 128, 255})  # what hop limits begin with, in all the usual systems
QUESTIONS = 64  # for one guest at a time
SOLICITED, OVERRIDE = 0x40000000, 0x20000000  # flags of an advertisement: RFC 4861, section 4.4
SOURCE_MAC, TARGET_MAC = 1, 2  # options: RFC 4861, section 4.6.1
MULTICAST = 0xFF  # the first byte of such an address
ALL_NODES = packed("ff02::1")
SOLICITED_NODE = packed("ff02::1:ff00:0")[:13]  # of the group; the address's last three bytes follow
SITE_ROUTERS, LOOPBACK = packed("ff05::2"), packed("::1")


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
    found = discovery_in(frame)
    if found and found.kind == NEIGHBOUR_ADVERTISEMENT:
        # To who asked the guest alone, it may do without the option: the frame itself comes from there then.
        return found.address, (found.mac or frame[6:12]).hex(":")
    return None


def announcement_in(frame: bytes) -> tuple[str, str] | None:
    """The address that *frame* announces, and the MAC that it gives, as text; None if it announces nothing.

    It announces something if a neighbour's kernel that gets it, and knows the address, has the address at that MAC from
    then on. So an advertisement has to override, but who asks for something else announces its own address as well: an
    ARP message is believed by all, a solicitation by who is asked. It does not matter to a kernel that an ARP message
    comes from another MAC than the one that it tells, nor whether that can be a machine's.
    """
    if arp := arp_in(frame):
        return (arp.sender, arp.mac.hex(":")) if any(packed(arp.sender)) else None
    found = discovery_in(frame)
    if found and found.mac and (found.override or found.kind != NEIGHBOUR_ADVERTISEMENT):
        return found.address, found.mac.hex(":")
    return None


def sender_in(frame: bytes) -> str | None:
    """The address from which a machine has sent the IP packet in *frame* itself; None for any other frame.

    Who only passes a packet on has made its hop limit one less, so that it is none of those that packets begin with.
    """
    family, packet = frame[12:14], frame[14:]
    if family == struct.pack("!H", ETH_P_IP) and len(packet) >= 20 and packet[0] >> 4 == 4:
        header = packet[: 4 * (packet[0] & 0xF)]
        if len(header) >= 20 and packet[8] in FIRST_LIMITS and not internet_checksum(header):
            return socket.inet_ntoa(packet[12:16])
    six = family == struct.pack("!H", ETH_P_IPV6) and len(packet) >= 40 and packet[0] >> 4 == 6
    if six and packet[7] in FIRST_LIMITS:
        return str(ipaddress.IPv6Address(packet[8:24]))
    return None


def probe_in(frame: bytes) -> tuple[str, str] | None:
    """The address that somebody wants for itself if nobody has it, and its MAC, as text; None for any other frame.

    For IPv6 the kernel answers such a question (`ndisc_recv_ns`); for IPv4 it does not where it only stands in.
    """
    arp = arp_in(frame)
    if arp and arp.kind == ARP_REQUEST and not any(packed(arp.sender)) and is_station(arp.mac):
        return arp.target, arp.mac.hex(":")
    return None


@record
class Arp:
    """An ARP message: *kind* is its operation; the addresses are text."""

    kind: int
    mac: bytes
    sender: str
    target: str


def arp_in(frame: bytes) -> Arp | None:
    """The ARP message in *frame*, if the kernel would look at it (`arp_rcv`, `arp_process` in net/ipv4/arp.c)."""
    if len(frame) < 42 or frame[12:20] not in ARP_FOR_IPV4:
        return None
    kind, mac, sender, target = struct.unpack_from("!H6s4s6x4s", frame, 20)
    if kind not in (ARP_REQUEST, ARP_REPLY) or 224 <= target[0] < 240 or target[0] == 127:
        return None
    return Arp(kind, mac, socket.inet_ntoa(sender), socket.inet_ntoa(target))


@record
class Discovery:
    """A message of neighbour discovery: *kind* is its type; *mac* is what its option says of *address*, None without
    one.

    An advertisement is about its target, a solicitation about who sends it.
    """

    kind: int
    override: bool
    address: str
    mac: bytes | None


def discovery_in(frame: bytes) -> Discovery | None:
    """The advertisement or solicitation in *frame*, if a kernel would look at it.

    These are the checks of `ip6_rcv_core`, `icmpv6_rcv` and `ndisc_rcv`, and of RFC 4861, sections 6.1.1, 7.1.1 and
    7.1.2. Hop limit 255 says that it comes from this segment. A fragment has another next header. Options in front of
    the message are allowed, whatever they say. It may go to one machine, or to a group that somebody can be in.
    """
    if len(frame) < 62 or frame[12:14] != struct.pack("!H", ETH_P_IPV6) or frame[14] >> 4 != 6:
        return None
    length, next_header, hop_limit, source, destination = struct.unpack_from("!HBB16s16s", frame, 18)
    message, skipped = frame[54 : 54 + length], False
    if hop_limit != 255 or len(message) != length or LOOPBACK in (source, destination) or source[0] == MULTICAST:
        return None
    while next_header == OPTIONS or (next_header == HOP_OPTIONS and not skipped):
        size = 8 * (message[1] + 1) if len(message) > 1 else 0
        if not 0 < size <= len(message):
            return None
        next_header, message, skipped = message[0], message[size:], True
    pseudo = source + destination + struct.pack("!I3xB", len(message), socket.IPPROTO_ICMPV6)
    kind, code = message[:2] if len(message) > 1 else (0, 0)
    if next_header != socket.IPPROTO_ICMPV6 or code or not DISCOVERY.get(kind, 1 << 16) <= len(message):
        return None
    to_many = destination[0] == MULTICAST
    if (to_many and destination[1] & 0xF != 2 and destination != SITE_ROUTERS) or internet_checksum(pseudo + message):
        return None
    flags = int.from_bytes(message[4:8], "big")
    try:
        return _about(kind, flags, source, message, to_many)
    except ValueError:
        return None


def _about(kind: int, flags: int, source: bytes, message: bytes, to_many: bool) -> Discovery:
    """What a *message* of discovery says. Raises ValueError if a kernel would not look at it."""
    mac = mac_in(message[DISCOVERY[kind] :], TARGET_MAC if kind == NEIGHBOUR_ADVERTISEMENT else SOURCE_MAC)
    target = b"" if kind == ROUTER_SOLICITATION else message[8:24]
    if target[:1] == bytes([MULTICAST]):
        raise ValueError("it is about a group")
    if kind == NEIGHBOUR_ADVERTISEMENT:
        if to_many and flags & SOLICITED:
            raise ValueError("it answers a group")
        return Discovery(kind, bool(flags & OVERRIDE), str(ipaddress.IPv6Address(target)), mac)
    if source == target or not any(source):
        raise ValueError("nobody asks for what is its own, and nobody is no sender")
    return Discovery(kind, False, str(ipaddress.IPv6Address(source)), mac)


def mac_in(options: bytes, wanted: int) -> bytes | None:
    """The MAC in the first of *options* that is of the *wanted* kind. Raises ValueError if they are malformed."""
    mac = None
    while options:
        size = 8 * options[1] if len(options) > 1 else 0
        if not 0 < size <= len(options):
            raise ValueError("an option without an end")
        if options[0] == wanted and mac is None:
            if size != 8:
                raise ValueError("not the size of a MAC")
            mac = options[2:8]
        options = options[size:]
    return mac


def is_station(mac: bytes) -> bool:
    """Whether *mac* can be a machine's: it is neither a group's nor zero."""
    return any(mac) and not mac[0] & 1
