"""The frames of ARP and NDP that we send, and what we read out of others'."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from kvmifup.core.model import Nic

ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
BROADCAST = b"\xff" * 6
ALL_NODES = ipaddress.IPv6Address("ff02::1")
ALL_NODES_MAC = b"\x33\x33\x00\x00\x00\x01"  # RFC 2464, section 7
MIN_FRAME = 60  # bytes, without the checksum: IEEE 802.3


def gratuitous_arp(mac: bytes, address: str) -> bytes:
    """The broadcast frame that moves *address* to *mac* in every cache that knows it.

    A request whose sender and target are the same address: existing entries are updated and none is made
    (`arp_is_garp` and `arp_process` in net/ipv4/arp.c; RFC 5227, section 2.3).
    """
    packed = ipaddress.IPv4Address(address).packed
    arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, packed, bytes(6), packed)
    return (BROADCAST + mac + struct.pack("!H", ETH_P_ARP) + arp).ljust(MIN_FRAME, b"\0")


def unsolicited_na(mac: bytes, address: str, source: str) -> bytes:
    """The multicast frame that moves *address* to *mac* in every neighbour cache that knows it.

    RFC 4861, sections 4.4 and 7.2.6. Override is set: without it a cached MAC stays. Solicited is not,
    nor Router: the guest is a host.
    """
    override = 0x20000000
    body = struct.pack("!I16sBB6s", override, ipaddress.IPv6Address(address).packed, 2, 1, mac)
    sender = ipaddress.IPv6Address(source).packed
    pseudo = sender + ALL_NODES.packed + struct.pack("!I3xB", 4 + len(body), socket.IPPROTO_ICMPV6)
    checksum = internet_checksum(pseudo + struct.pack("!BBH", 136, 0, 0) + body)
    icmp = struct.pack("!BBH", 136, 0, checksum) + body
    header = struct.pack("!IHBB16s16s", 6 << 28, len(icmp), socket.IPPROTO_ICMPV6, 255, sender, ALL_NODES.packed)
    return ALL_NODES_MAC + mac + struct.pack("!H", ETH_P_IPV6) + header + icmp


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


ARP_REQUEST, ARP_REPLY = 1, 2


def question(mac: bytes, address: str, sources: Sequence[str]) -> bytes:
    """The frame that asks who has *address*, from one of *sources* of its family."""
    wanted = ipaddress.ip_address(address)
    ours = (ipaddress.ip_address(source) for source in sources)
    source = next((one for one in ours if one.version == wanted.version), None)
    if wanted.version == 4:
        sender = source.packed if source else bytes(4)  # RFC 5227, section 2.1.1
        arp = struct.pack("!HHBBH6s4s6x4s", 1, 0x0800, 6, 4, ARP_REQUEST, mac, sender, wanted.packed)
        return (BROADCAST + mac + struct.pack("!H", ETH_P_ARP) + arp).ljust(MIN_FRAME, b"\0")
    sender = source.packed if source else bytes(16)
    group = ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + wanted.packed[13:]  # RFC 4291, section 2.7.1
    body = struct.pack("!4x16sBB6s", wanted.packed, 1, 1, mac)
    pseudo = sender + group + struct.pack("!I3xB", 4 + len(body), socket.IPPROTO_ICMPV6)
    checksum = internet_checksum(pseudo + struct.pack("!BBH", NEIGHBOUR_SOLICITATION, 0, 0) + body)
    icmp = struct.pack("!BBH", NEIGHBOUR_SOLICITATION, 0, checksum) + body
    header = struct.pack("!IHBB16s16s", 6 << 28, len(icmp), socket.IPPROTO_ICMPV6, 255, sender, group)
    return b"\x33\x33" + group[12:] + mac + struct.pack("!H", ETH_P_IPV6) + header + icmp


def answered(frame: bytes) -> tuple[str, str] | None:
    """The address that *frame* answers for, and the MAC that it gives; None for any other frame."""
    try:
        (ethertype,) = struct.unpack_from("!H", frame, 12)
        if ethertype == ETH_P_ARP:
            kind, mac, sender = struct.unpack_from("!H6s4s", frame, 20)
            return (str(ipaddress.IPv4Address(sender)), mac.hex(":")) if kind == ARP_REPLY else None
        if ethertype == ETH_P_IPV6 and frame[20] == socket.IPPROTO_ICMPV6 and frame[54] == NEIGHBOUR_ADVERTISEMENT:
            return str(ipaddress.IPv6Address(frame[62:78])), frame[6:12].hex(":")
    except (struct.error, ValueError, IndexError):
        pass  # too short to be one
    return None


NAMES = {0x0800: "IPv4", ETH_P_ARP: "ARP", 0x8035: "RARP", ETH_P_IPV6: "IPv6"}
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136  # RFC 4861


def name_of(frame: bytes) -> str:
    """What kind of frame it is, for people."""
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    return NAMES.get(ethertype, f"ethertype 0x{ethertype:04x}")


def announced(frame: bytes) -> tuple[str, str] | None:
    """The address that *frame* announces and the MAC that it gives for it; None if it announces nothing.

    Advertisements count if they override (RFC 4861, section 4.4): one that does not moves nothing.
    """
    with suppress(struct.error, ValueError, IndexError):
        (ethertype,) = struct.unpack_from("!H", frame, 12)
        if ethertype == ETH_P_ARP:
            kind, protocol, lengths, mac, sender, target = struct.unpack_from("!HHH2x6s4s6x4s", frame, 14)
            if (kind, protocol, lengths) == (1, 0x0800, 0x0604) and sender == target:
                return str(ipaddress.IPv4Address(sender)), mac.hex(":")
        # Hop limit 255: nobody off the segment can have sent it (RFC 4861, section 7.1.2). 0x20 is Override.
        elif (
            ethertype == ETH_P_IPV6
            and frame[20:22] == bytes([socket.IPPROTO_ICMPV6, 255])
            and frame[38:54] == ALL_NODES.packed
            and frame[54] == NEIGHBOUR_ADVERTISEMENT
            and frame[58] & 0x20
        ):
            return str(ipaddress.IPv6Address(frame[62:78])), frame[6:12].hex(":")
    return None


def questions(nic: Nic) -> list[bytes]:
    """Frames into the tap that make the guest answer, whatever it is doing: one for each family that it has.

    To its MAC alone. The ARP one is a probe (RFC 5227, section 2.1.1), which changes no cache.
    """
    frames = []
    guest, tap = (bytes.fromhex(mac.replace(":", "")) for mac in (nic.mac, nic.tap_mac))
    hosts = [prefix.network_address for prefix in nic.ip if prefix.prefixlen == prefix.max_prefixlen]
    v4 = next((host for host in hosts if host.version == 4), None)
    if v4:
        arp = struct.pack("!HHBBH6s4x6x4s", 1, 0x0800, 6, 4, 1, tap, v4.packed)
        frames.append((guest + tap + struct.pack("!H", ETH_P_ARP) + arp).ljust(60, b"\0"))
    v6 = next((host for host in hosts if host.version == 6), None)
    if v6:
        # The tap's link-local address, as the kernel makes it: RFC 4291, appendix A.
        source = b"\xfe\x80" + bytes(6) + bytes([tap[0] ^ 2]) + tap[1:3] + b"\xff\xfe" + tap[3:]
        body = struct.pack("!4x16sBB6s", v6.packed, 1, 1, tap)
        pseudo = source + v6.packed + struct.pack("!I3xB", 4 + len(body), socket.IPPROTO_ICMPV6)
        checksum = internet_checksum(pseudo + struct.pack("!BBH", NEIGHBOUR_SOLICITATION, 0, 0) + body)
        icmp = struct.pack("!BBH", NEIGHBOUR_SOLICITATION, 0, checksum) + body
        header = struct.pack("!IHBB16s16s", 6 << 28, len(icmp), socket.IPPROTO_ICMPV6, 255, source, v6.packed)
        frames.append(guest + tap + struct.pack("!H", ETH_P_IPV6) + header + icmp)
    return frames
