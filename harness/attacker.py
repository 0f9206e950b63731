"""An attacker behind a tap: his end of it, and the judge: what of what he sends comes to others, and is it right."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator, Sequence

from harness import tools, wire
from harness.addresses import GUEST_EUI64, GUEST_IP4, GUEST_IP6, GUEST_LINK_LOCAL, GUEST_MAC
from harness.guestframes import ARP, IPV4, IPV6, RARP, SERVICE, VLAN, tagged
from harness.guests import rarp
from harness.namespaces import Namespace
from harness.nodes import Node, add_tap, certain, quieten
from harness.wire import mac_bytes

TPACKET_AUXDATA, SOL_PACKET, VLAN_VALID = 8, 263, 0x10  # linux/if_packet.h
RECEIVE = 33  # SO_RCVBUFFORCE


@contextlib.contextmanager
def attacker(guest: wire.Tap, *, fresh: bool = False) -> Iterator[Namespace]:
    """The guest is a namespace with all of a system's tools: its eth0 is the other end of the tap.

    A *fresh* one has no addresses yet, and looks for them as its kernel does by itself.

    A process of its own carries the frames between the tap's end and that of a second one, which is the eth0.
    """
    place = Namespace()
    with place:
        if not fresh:
            quieten()
        add_tap("eth0")
        inside = wire.attach("eth0")
        tools.ip("link set lo up")
        tools.ip(f"link set eth0 address {GUEST_MAC} mtu 1500 up")
        if not fresh:
            tools.ip(f"addr add {GUEST_IP4}/24 dev eth0")
            tools.ip(f"addr add {GUEST_IP6}/64 dev eth0")
            certain("eth0")
    pid = os.fork()
    if pid == 0:
        try:
            _carry(guest.descriptor, inside.descriptor)
        finally:
            os._exit(1)
    inside.close()
    try:
        yield place
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        place.close()


def _carry(one: int, other: int) -> None:
    waiting = select.poll()
    to = {one: other, other: one}
    for descriptor in to:
        waiting.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in waiting.poll():
            with contextlib.suppress(OSError):  # the tap is down, for a moment
                os.write(to[descriptor], os.read(descriptor, 65536))


# --- the judge --------------------------------------------------------------------------------------------


class FarEnd:
    """What comes to a device from outside, as it was on the wire: the kernel takes tags off, here they are put back."""

    def __init__(self, dev: str = "eth0") -> None:
        self._socket = wire.packet_socket(dev)
        self._socket.setsockopt(SOL_PACKET, TPACKET_AUXDATA, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, RECEIVE, 1 << 24)  # all of them at once

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def next(self, patience: float = wire.PATIENCE) -> bytes | None:
        """The next frame, None when none comes."""
        while wire.readable(self._socket.fileno(), patience):
            frame, extra, _, origin = self._socket.recvmsg(65536, 256)
            if origin[2] == socket.PACKET_OUTGOING:
                continue
            for _, _, data in extra:
                status, _, _, _, _, tci, tpid = struct.unpack("=IIIHHHH", data)
                if status & VLAN_VALID:
                    frame = tagged(frame, (tpid, tci))
            return frame
        return None

    def passed(self, guest: wire.Tap, frames: Sequence[bytes], *, tags: Sequence[tuple[int, int]] = ()) -> set[bytes]:
        """Let the guest send *frames*, and one that is right, which comes with *tags*; what has come of them."""
        right = rarp() + bytes(4)
        last = tagged(right, *tags)
        for frame in (*frames, right):
            guest.send(frame)
        seen: list[bytes | None] = []
        while not seen or seen[-1] != last:
            seen.append(self.next())
            assert seen[-1] is not None, "not even a frame that is right comes"
        return {one for one in seen if one}


def far_end(node: Node) -> FarEnd:
    """What comes to the client."""
    with node.client:
        return FarEnd()


OWN, OWN4 = mac_bytes(GUEST_MAC), socket.inet_aton(GUEST_IP4)
OWN6 = tuple(ipaddress.IPv6Address(one).packed for one in (GUEST_IP6, GUEST_EUI64, GUEST_LINK_LOCAL))
NONE4, NONE6 = bytes(4), bytes(16)


def harm(frame: bytes) -> str:
    """What is wrong with a frame of a guest that has one IPv4 address and two of IPv6; empty if nothing is."""
    if frame[6:12] != OWN:
        return f"source MAC {frame[6:12].hex(':')}"
    kind, inside = struct.unpack("!H", frame[12:14])[0], frame[14:]
    while kind in (VLAN, SERVICE):
        kind, inside = struct.unpack("!H", inside[2:4])[0], inside[4:]
    judge = {ARP: _harm_of_arp, RARP: _harm_of_rarp, IPV4: _harm_of_ip4, IPV6: _harm_of_ip6}.get(kind)
    return judge(inside) if judge else f"protocol {kind:#x}"


def _harm_of_arp(message: bytes) -> str:
    mac, sender, target = message[8:14], message[14:18], message[24:28]
    if message[:6] != bytes.fromhex("000108000604") or mac != OWN:
        return f"ARP with MAC {mac.hex(':')}"
    return "" if sender == OWN4 or (sender == NONE4 and target == OWN4) else f"ARP of {socket.inet_ntoa(sender)}"


def _harm_of_rarp(message: bytes) -> str:
    return "" if message[8:14] == message[18:24] == OWN else "RARP with another's MAC"


def _harm_of_ip4(packet: bytes) -> str:
    source, inside = packet[12:16], packet[4 * (packet[0] & 15) :]
    ports = b"" if struct.unpack("!H", packet[6:8])[0] & 0x1FFF else inside[:4]  # a later fragment has none
    if packet[9] == 1 and ports[:1] == b"\5":
        return "ICMP redirect"
    if packet[9] == 17 and ports == b"\0\x43\0\x44":
        return "DHCP server"
    if source == NONE4 and packet[9] == 17 and ports == b"\0\x44\0\x43":
        return ""
    return "" if source == OWN4 else f"IPv4 from {socket.inet_ntoa(source)}"


def _harm_of_ip6(packet: bytes) -> str:
    source, kind, rest = packet[8:24], packet[6], packet[40:]
    behind, part = False, False
    while kind in (0, 43, 44, 60):  # extension headers
        if kind == 44:
            part = True
            if struct.unpack("!H", rest[2:4])[0] & 0xFFF8:
                kind = 59  # a later fragment
                break
        length = 8 if kind == 44 else 8 + 8 * rest[1]
        behind, kind, rest = True, rest[0], rest[length:]
        if not rest and kind != 59:
            return "headers without what they are for"
    what = rest[0] if kind == 58 else None
    if what in (134, 137):
        return "router advertisement" if what == 134 else "redirect"
    if what in (133, 135, 136):
        return _harm_of_nd(what, source, rest, behind or part)
    if kind == 17 and rest[:4] == struct.pack("!HH", 547, 546):
        return "DHCPv6 server"
    if source == NONE6 and what == 143:
        return ""
    return "" if source in OWN6 else f"IPv6 from {ipaddress.IPv6Address(source)}"


def _harm_of_nd(what: int, source: bytes, message: bytes, behind: bool) -> str:
    target, options = message[8:24], message[8 if what == 133 else 24 :]
    if behind:
        return "ND behind headers"
    while options:
        if options[0] in (1, 2) and options[2:8] != OWN:
            return f"ND with MAC {options[2:8].hex(':')}"
        options = options[8 * max(options[1], 1) :]
    about = what == 136 or (what == 135 and source == NONE6)
    if about and target not in OWN6:
        return f"ND about {ipaddress.IPv6Address(target)}"
    return "" if source in (*OWN6, NONE6) else f"ND from {ipaddress.IPv6Address(source)}"
