"""Packet sockets that the kernel filters: a guest's own frames on its tap, and announcements on an uplink.

The filters are classic BPF (linux/filter.h).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from array import array
from contextlib import suppress

from kvmifup.announce import ALL_NODES, ETH_P_ARP, ETH_P_IPV6, internet_checksum, sender
from kvmifup.model import Nic

ETH_P_ALL = 3  # linux/if_ether.h
SO_ATTACH_FILTER, SO_TIMESTAMPNS = 26, 35  # asm-generic/socket.h
NAMES = {0x0800: "IPv4", ETH_P_ARP: "ARP", 0x8035: "RARP", ETH_P_IPV6: "IPv6"}
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136  # RFC 4861
SNAP = 128  # bytes of a frame that we look at, at most

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand: struct sock_filter
LOAD_WORD, LOAD_HALF, LOAD_BYTE, TO_X = 0x20, 0x28, 0x30, 0x07
IF_EQUAL, IF_EQUAL_X, RETURN = 0x15, 0x1D, 0x06
PACKET_TYPE = 0xFFFFF004  # SKF_AD_OFF + SKF_AD_PKTTYPE
PACKET_OUTGOING = 4  # linux/if_packet.h


def from_the_guest(mac: str) -> list[Instruction]:
    """Frames that come out of a tap with the source address *mac*, not those that we send into it."""
    packed = bytes.fromhex(mac.replace(":", ""))
    return [
        (LOAD_WORD, 0, 0, PACKET_TYPE),
        (IF_EQUAL, 5, 0, PACKET_OUTGOING),
        (LOAD_WORD, 0, 0, 6),
        (IF_EQUAL, 0, 3, int.from_bytes(packed[:4], "big")),
        (LOAD_HALF, 0, 0, 10),
        (IF_EQUAL, 0, 1, int.from_bytes(packed[4:], "big")),
        (RETURN, 0, 0, SNAP),
        (RETURN, 0, 0, 0),
    ]


# What another node sends when a guest has arrived there: ARP whose sender is its target, and advertisements.
GRATUITOUS_ARP: list[Instruction] = [
    (LOAD_WORD, 0, 0, 28),
    (TO_X, 0, 0, 0),
    (LOAD_WORD, 0, 0, 38),
    (IF_EQUAL_X, 0, 1, 0),
    (RETURN, 0, 0, SNAP),
    (RETURN, 0, 0, 0),
]
ADVERTISEMENTS: list[Instruction] = [
    (LOAD_BYTE, 0, 0, 20),
    (IF_EQUAL, 0, 3, socket.IPPROTO_ICMPV6),
    (LOAD_BYTE, 0, 0, 54),
    (IF_EQUAL, 0, 1, NEIGHBOUR_ADVERTISEMENT),
    (RETURN, 0, 0, SNAP),
    (RETURN, 0, 0, 0),
]


def guest_listener(tap: str, mac: str) -> socket.socket:
    """A non-blocking socket for what the guest with *mac* sends on *tap*. Raises OSError.

    For every ethertype: a bridge takes a port's frames away before a socket for one ethertype would get them
    (`__netif_receive_skb_core` in net/core/dev.c).
    """
    listener = _listen(tap, ETH_P_ALL, from_the_guest(mac))
    listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return listener


def uplink_listener(uplink: str, family: int) -> socket.socket:
    """A non-blocking socket for announcements of *family*, 4 or 6, that come in on *uplink*. Raises OSError.

    For one ethertype: it costs the uplink's other traffic nothing, and never shows what we send.
    """
    if family == 4:
        return _listen(uplink, ETH_P_ARP, GRATUITOUS_ARP)
    return _listen(uplink, ETH_P_IPV6, ADVERTISEMENTS)


def _listen(dev: str, ethertype: int, program: list[Instruction]) -> socket.socket:
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        code = array("B", b"".join(struct.pack("=HBBI", *line) for line in program))
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), code.buffer_info()[0])
        )
        listener.bind((dev, ethertype))  # only now: before the filter everything would get in
    except OSError:
        listener.close()
        raise
    return listener


def is_device(name: str, index: int) -> bool:
    """Whether *name* is still the device with *index*: a listener stays with the device that it began with."""
    try:
        return socket.if_nametoindex(name) == index
    except OSError:
        return False


def receive(listener: socket.socket) -> tuple[bytes, float]:
    """A frame of a `guest_listener`, and when the kernel got it, in seconds since 1970. Raises OSError."""
    frame, ancillary, _flags, _address = listener.recvmsg(SNAP, 64)
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("@ll", value[:16])
            return frame, seconds + nanoseconds / 1e9
    return frame, time.time()


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


def send(dev: str, frames: list[bytes]) -> None:
    """Send *frames* out of *dev*. Raises OSError."""
    via = sender.socket()
    for frame in frames:
        via.sendto(frame, (dev, 0))
