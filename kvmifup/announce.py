"""Tell an uplink's neighbours where an address is now: gratuitous ARP and unsolicited NA, repeated."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Message = tuple[str, str, str]  # uplink, address, source: as in kvmifup.ops.Announce

# When QEMU announces a guest after a migration, in seconds (net/announce.c: 50 ms at first, growing by
# 100 ms, five rounds). The same schedule, because the same frames can get lost in the same way.
SCHEDULE = (0.0, 0.05, 0.2, 0.45, 0.8)

ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
BROADCAST = b"\xff" * 6
ALL_NODES = ipaddress.IPv6Address("ff02::1")
ALL_NODES_MAC = b"\x33\x33\x00\x00\x00\x01"  # RFC 2464, section 7
SIOCGIFHWADDR = 0x8927  # linux/sockios.h
NAMESPACE = Path("/proc/thread-self/ns/net")
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


class Sender:
    """A packet socket that receives nothing, for all that this process announces; also from several threads.

    It stays open because closing one takes the kernel a grace period of RCU (`packet_release` in
    net/packet/af_packet.c): 7 to 15 ms, longer than all the rest of a hook. It belongs to the network
    namespace that it was opened in, so it is opened anew in another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._namespace: Path | None = None
        self._socket: socket.socket | None = None

    def socket(self) -> socket.socket:
        """The socket. Raises OSError."""
        with self._lock:
            namespace = NAMESPACE.readlink()
            if self._socket is None or self._namespace != namespace:
                if self._socket:
                    self._socket.close()
                self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
                self._namespace = namespace
            return self._socket

    @property
    def descriptor(self) -> int | None:
        """What must be kept open in a child that goes on sending."""
        return self._socket.fileno() if self._socket else None


sender = Sender()


def mac_of(via: socket.socket, dev: str) -> bytes:
    """The MAC of *dev*. Raises OSError."""
    answer = fcntl.ioctl(via, SIOCGIFHWADDR, struct.pack("16s16x", os.fsencode(dev)))
    return answer[18:24]  # struct ifreq: the name, a family, the address


def send(messages: Sequence[Message]) -> None:
    """Send every message once, from its uplink's own MAC. Raises OSError."""
    via = sender.socket()
    macs = {dev: mac_of(via, dev) for dev in dict.fromkeys(message[0] for message in messages)}
    for dev, address, source in messages:
        mac = macs[dev]
        frame = unsolicited_na(mac, address, source) if ":" in address else gratuitous_arp(mac, address)
        via.sendto(frame, (dev, 0))


def close(packet_socket: socket.socket) -> None:
    """Close *packet_socket*, and do not wait until it is: see `Sender`."""
    threading.Thread(target=packet_socket.close, daemon=True).start()


def repeat_detached(messages: Sequence[Message], still_true: Callable[[], bool]) -> None:
    """Send the later rounds of `SCHEDULE` from a child process, and return at once.

    The child gives up when *still_true* says so before a round, or at the first error: the guest may have
    left in the meantime, or its uplink.
    """
    if os.fork():
        return
    try:
        # The caller may wait until our output is closed; and a tap stays while anything holds its descriptor.
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        kept = sender.descriptor or 2  # it is 3 or more, if there is one
        os.closerange(3, kept)
        os.closerange(kept + 1, 65536)
        start = time.monotonic()
        for moment in SCHEDULE[1:]:
            time.sleep(max(0.0, start + moment - time.monotonic()))
            if not still_true():
                break
            send(messages)
    except OSError:
        pass
    finally:
        os._exit(0)
