"""Frames: what a guest and a neighbour send and see. Written anew here, so that nothing of ours judges itself."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest

ETH_P_ALL, ETH_P_IP, ETH_P_ARP, ETH_P_IPV6, ETH_P_FENCE = 0x0003, 0x0800, 0x0806, 0x86DD, 0x88B5
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
PATIENCE = 90  # seconds; only turns a hang into a failure
BROADCAST = "ff:ff:ff:ff:ff:ff"


def mac_bytes(mac: str) -> bytes:
    """ "02:…" as it is on the wire."""
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(target: str, source: str, kind: int, payload: bytes) -> bytes:
    """A frame."""
    return mac_bytes(target) + mac_bytes(source) + struct.pack("!H", kind) + payload


def packet_socket(dev: str, protocol: int = ETH_P_ALL) -> socket.socket:
    """Every frame on *dev*, in the namespace that this process is in; of one *protocol*, those that are received."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(protocol))
    made.bind((dev, protocol))
    return made


# --- ARP and NDP ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arp:
    """An ARP message: *op* 1 asks, 2 answers."""

    target_frame: str
    op: int
    mac: str
    sender: str
    target: str


def arp(frame: bytes) -> Arp | None:
    """The ARP message in *frame*, None if it is something else."""
    if frame[12:14] != struct.pack("!H", ETH_P_ARP):
        return None
    op, mac, sender, _, target = struct.unpack("!6xH6s4s6s4s", frame[14:42])
    return Arp(frame[:6].hex(":"), op, mac.hex(":"), socket.inet_ntoa(sender), socket.inet_ntoa(target))


def arp_request(mac: str, sender: str, target: str) -> bytes:
    """Who has *target*? Tell *sender*."""
    body = struct.pack("!HHBBH6s4s6s4s", 1, ETH_P_IP, 6, 4, 1, mac_bytes(mac), socket.inet_aton(sender), bytes(6),
                       socket.inet_aton(target))  # fmt: skip
    return ethernet(BROADCAST, mac, ETH_P_ARP, body)


@dataclass(frozen=True)
class Advertisement:
    """A neighbour advertisement."""

    target_frame: str
    source: str
    destination: str
    hop_limit: int
    solicited: bool
    override: bool
    target: str
    mac: str
    checksum_right: bool


def advertisement(frame: bytes) -> Advertisement | None:
    """The neighbour advertisement in *frame*, None if it is something else."""
    if frame[12:14] != struct.pack("!H", ETH_P_IPV6) or len(frame) < 54 + 24 or frame[20] != 58 or frame[54] != 136:
        return None
    length, hop_limit = struct.unpack("!4xHxB", frame[14:22])
    source, destination = frame[22:38], frame[38:54]
    body = frame[54 : 54 + length]
    flags = body[4]
    option = body[24:32]
    return Advertisement(
        target_frame=frame[:6].hex(":"),
        source=socket.inet_ntop(socket.AF_INET6, source),
        destination=socket.inet_ntop(socket.AF_INET6, destination),
        hop_limit=hop_limit,
        solicited=bool(flags & 0x40),
        override=bool(flags & 0x20),
        target=socket.inet_ntop(socket.AF_INET6, body[8:24]),
        mac=option[2:8].hex(":") if option[:2] == b"\x02\x01" else "",
        checksum_right=ones_sum(source + destination + struct.pack("!IxxxB", len(body), 58) + body) == 0xFFFF,
    )


def solicitation(mac: str, sender: str, target: str) -> bytes:
    """A neighbour solicitation with the sender's MAC, to the target's solicited-node group."""
    wanted = ipaddress.IPv6Address(target).packed
    group = ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + wanted[13:]
    body = struct.pack("!BBHI16sBB6s", 135, 0, 0, 0, wanted, 1, 1, mac_bytes(mac))
    return icmp6(f"33:33:{group[12:].hex(':')}", mac, sender, socket.inet_ntop(socket.AF_INET6, group), body)


def router_advertisement(mac: str, sender: str) -> bytes:
    """ "I am your default router for half an hour"."""
    body = struct.pack("!BBHBBHIIBB6s", 134, 0, 0, 64, 0, 1800, 0, 0, 1, 1, mac_bytes(mac))
    return icmp6("33:33:00:00:00:01", mac, sender, "ff02::1", body)


def icmp6(frame_target: str, mac: str, sender: str, target: str, body: bytes, hops: int = 255) -> bytes:
    """An ICMPv6 message with so many *hops* left; its checksum is filled in."""
    source, destination = ipaddress.IPv6Address(sender).packed, ipaddress.IPv6Address(target).packed
    total = ones_sum(source + destination + struct.pack("!IxxxB", len(body), 58) + body)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), 58, hops) + source + destination
    return ethernet(frame_target, mac, ETH_P_IPV6, header + body)


def ones_sum(data: bytes) -> int:
    """The sum of RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


# --- both ends ------------------------------------------------------------------------------------------


def readable(descriptor: int, patience: float) -> bool:
    """Wait until there is something to read. (select(2) knows no descriptor above 1023.)"""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(1000 * patience))


class Wire:
    """The frames that reach a device from outside, in order."""

    def __init__(self, opened: socket.socket, dev: str) -> None:
        self._socket, self._dev = opened, dev

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Send a frame out of the device."""
        self._socket.send(frame)

    def next(self, patience: float = PATIENCE) -> bytes | None:
        """The next frame, None when none comes."""
        while readable(self._socket.fileno(), patience):
            frame, origin = self._socket.recvfrom(65536)
            if origin[2] != socket.PACKET_OUTGOING:
                return frame
        return None

    def until(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """All frames up to the first that *wanted* accepts, which is the last of them."""
        seen: list[bytes] = []
        while not seen or not wanted(seen[-1]):
            frame = self.next()
            if frame is None:
                pytest.fail(f"{self._dev}: what was waited for does not come; seen: {[one.hex() for one in seen]}")
            seen.append(frame)
        return seen

    def up_to_fence(self, sender: socket.socket) -> list[bytes]:
        """Send a frame that only we send, from *sender* at the other end; all that came before it."""
        sender.send(ethernet(BROADCAST, "02:00:00:00:00:fe", ETH_P_FENCE, bytes(46)))
        return self.until(lambda frame: frame[12:14] == struct.pack("!H", ETH_P_FENCE))[:-1]


class Tap:
    """The guest's side of a tap."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name, self.descriptor = name, descriptor

    def close(self) -> None:
        """The guest is gone."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def send(self, frame: bytes) -> None:
        """The guest sends."""
        os.write(self.descriptor, frame)

    def until(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """All frames that reach the guest up to the first that *wanted* accepts."""
        seen: list[bytes] = []
        while not seen or not wanted(seen[-1]):
            if not readable(self.descriptor, PATIENCE):
                pytest.fail(f"{self.name}: what was waited for does not come; seen: {[one.hex() for one in seen]}")
            seen.append(os.read(self.descriptor, 65536))
        return seen


def attach(name: str) -> Tap:
    """Take the guest's side of the existing tap *name*."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    except OSError as error:
        os.close(descriptor)
        pytest.fail(f"cannot attach to {name}: {errno.errorcode.get(error.errno or 0, error)}")
    return Tap(name, descriptor)
