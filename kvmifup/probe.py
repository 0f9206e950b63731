"""Does another node answer for an address? ARP requests and neighbour solicitations, and who replies."""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
import time
from array import array
from collections.abc import Sequence

from kvmifup.announce import BROADCAST, ETH_P_ARP, ETH_P_IPV6, MIN_FRAME, internet_checksum

# A node that answers for somebody else waits at random for up to proxy_delay, 0.8 s unless somebody has set it.
PATIENCE = 1.2  # seconds
ARP_REQUEST, ARP_REPLY = 1, 2
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136  # RFC 4861
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# On a busy uplink only advertisements are worth waking up for. Classic BPF, linux/filter.h: next header and type.
ADVERTISEMENTS = (
    (0x30, 0, 0, 20),
    (0x15, 0, 3, socket.IPPROTO_ICMPV6),
    (0x30, 0, 0, 54),
    (0x15, 0, 1, NEIGHBOUR_ADVERTISEMENT),
    (0x06, 0, 0, 256),
    (0x06, 0, 0, 0),
)


def others(
    uplink: str, addresses: Sequence[str], sources: Sequence[str], wait: float = PATIENCE
) -> dict[str, set[str]]:
    """For each of *addresses* the MACs, other than the uplink's own, that answer for it on *uplink*.

    *sources* are addresses of this node there: a node does not answer a question without a sender for an address
    that it only stands in for (`arp_process` in net/ipv4/arp.c). *wait* is in seconds. Raises OSError.
    """
    found: dict[str, set[str]] = {address: set() for address in addresses}
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as arp,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as ndp,
    ):
        code = array("B", b"".join(struct.pack("=HBBI", *line) for line in ADVERTISEMENTS))
        option = struct.pack("@HP", len(ADVERTISEMENTS), code.buffer_info()[0])
        ndp.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)
        arp.bind((uplink, ETH_P_ARP))
        ndp.bind((uplink, ETH_P_IPV6))
        mac: bytes = arp.getsockname()[4]
        for address in addresses:
            (ndp if ":" in address else arp).send(question(mac, address, sources))
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            for ready in select.select([arp, ndp], [], [], left)[0]:
                answer = answered(ready.recv(256))
                if answer and answer[0] in found and answer[1] != mac.hex(":"):
                    found[answer[0]].add(answer[1])
    return found


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
