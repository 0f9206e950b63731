"""Frames on the wire: the ones the lab sends, and what it understands of the ones it sees. Pure functions."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Literal

ETH_P_ARP, ETH_P_RARP, ETH_P_IPV6 = 0x0806, 0x8035, 0x86DD
BROADCAST = "ff:ff:ff:ff:ff:ff"

ICMP_ECHO, ICMP_ECHO_REPLY = 8, 0
ICMP6_ECHO, ICMP6_ECHO_REPLY = 128, 129
NEIGHBOUR_ADVERTISEMENT = 136

Kind = Literal["rarp", "garp", "arp-request", "arp-reply", "na", "unsolicited-na"]


@dataclass(frozen=True)
class Seen:
    """What one frame says about an address.

    `mac` is the frame's source; `address` is what it speaks of (empty for RARP, which names only a MAC);
    `asker` is the IPv4 address an ARP reply goes to, otherwise empty.
    """

    kind: Kind
    mac: str
    address: str
    asker: str = ""


def read(frame: bytes) -> Seen | None:
    """What an ARP, RARP or neighbour advertisement frame says; None for any other frame."""
    if len(frame) < 42:
        return None
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    source = _mac(frame[6:12])
    if ethertype == ETH_P_RARP:
        return Seen("rarp", source, "")
    if ethertype == ETH_P_ARP:
        (operation,) = struct.unpack_from("!H", frame, 20)
        sender, target = str(ipaddress.IPv4Address(frame[28:32])), str(ipaddress.IPv4Address(frame[38:42]))
        if sender == target:
            return Seen("garp", source, sender)
        if operation == 2:
            return Seen("arp-reply", source, sender, asker=target)
        return Seen("arp-request", source, target)
    # An NA is never fragmented and has no extension headers (RFC 6980), so its offsets are fixed.
    if ethertype == ETH_P_IPV6 and len(frame) >= 78 and frame[20] == 58 and frame[54] == NEIGHBOUR_ADVERTISEMENT:
        solicited = bool(frame[58] & 0x40)
        return Seen("na" if solicited else "unsolicited-na", source, str(ipaddress.IPv6Address(frame[62:78])))
    return None


def arp_request(mac: str, ip: str, wanted: str) -> bytes:
    """The broadcast frame with which `ip` at `mac` asks who has `wanted`."""
    sender_mac = bytes.fromhex(mac.replace(":", ""))
    ethernet = bytes.fromhex(BROADCAST.replace(":", "")) + sender_mac + struct.pack("!H", ETH_P_ARP)
    header = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    sender, target = ipaddress.IPv4Address(ip).packed, ipaddress.IPv4Address(wanted).packed
    return (ethernet + header + sender_mac + sender + bytes(6) + target).ljust(60, b"\0")


def echo(identifier: int, sequence: int) -> bytes:
    """An ICMP echo request with its checksum."""
    head = struct.pack("!BBHHH", ICMP_ECHO, 0, 0, identifier, sequence)
    total = sum(struct.unpack("!4H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:2] + struct.pack("!H", ~total & 0xFFFF) + head[4:]


def echo6(identifier: int, sequence: int) -> bytes:
    """An ICMPv6 echo request; the kernel fills in its checksum."""
    return struct.pack("!BBHHH", ICMP6_ECHO, 0, 0, identifier, sequence)


def echo_reply(packet: bytes, kind: int) -> tuple[int, int] | None:
    """Identifier and sequence of an echo reply (an ICMP message without its IP header), else None."""
    if len(packet) < 8 or packet[0] != kind:
        return None
    identifier, sequence = struct.unpack_from("!HH", packet, 4)
    return identifier, sequence


def _mac(octets: bytes) -> str:
    return octets.hex(":")
