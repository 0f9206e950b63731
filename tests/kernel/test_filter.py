"""Filters of bridged NICs: in force before the tap joins its bridge, and read back as they are."""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from harness import manager, nodes, tools
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, IPS
from harness.hooks import Result, call, check
from harness.nodes import Node
from harness.wire import (
    BROADCAST,
    arp_request,
    ethernet,
    icmp6,
    mac_bytes,
    packet_socket,
    router_advertisement,
    solicitation,
)

pytestmark = pytest.mark.userns

LOCAL = "fe80::a800:ff:fe35:ac01"  # what GUEST_MAC gives
REASONS = ("mac", "address", "router", "dhcp", "protocol")
OTHER_IP4, OTHER_IP6 = "192.0.2.99", "2001:db8::99"


def wire(**keys: Any) -> Result:
    """Have post wire tap0."""
    manager.write_nic(mode="bridged", link="br0", **keys)
    return call("kvm-ifup-post", "tap0")


def table() -> dict[str, list[dict[str, Any]]]:
    """What nft has in our table, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in json.loads(tools.run("nft", "-j", "list", "ruleset"))["nftables"]:
        ((kind, what),) = one.items()
        found.setdefault(kind, []).append(what)
    return found


def nft(*words: str) -> str:
    """nft, as an administrator has it."""
    return tools.run("nft", *words)


@pytest.fixture
def bridged(node: Node) -> Node:
    """A node with a bridge, which has an uplink, and a tap."""
    nodes.add_bridge()
    node.uplink(master="br0")
    node.guest()
    return node


# --- frames -----------------------------------------------------------------------------------------------------


def udp(source: str, sport: int, dport: int, mac: str = GUEST_MAC) -> bytes:
    """A datagram of IPv4; br_netfilter wants the header's checksum right."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address("192.0.2.255").packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", total) + header[12:]
    return ethernet(BROADCAST, mac, 0x0800, header + struct.pack("!HHHH", sport, dport, 8, 0))


def advertisement(target: str, mac: str = GUEST_MAC, source: str = GUEST_IP6) -> bytes:
    """A neighbour advertisement with the option that tells a MAC."""
    body = struct.pack("!BBHI16sBB6s", 136, 0, 0, 0, ipaddress.ip_address(target).packed, 2, 1, mac_bytes(mac))
    return icmp6("33:33:00:00:00:01", GUEST_MAC, source, "ff02::1", body)


def rarp(mac: str) -> bytes:
    """What QEMU sends when a guest has arrived, with *mac* inside."""
    one = mac_bytes(mac) + bytes(4)
    return ethernet(BROADCAST, GUEST_MAC, 0x8035, struct.pack("!HHBBH", 1, 0x800, 6, 4, 3) + one + one + bytes(18))


def tagged(frame: bytes, vid: int, kind: int = 0x8100) -> bytes:
    """The frame in a VLAN."""
    return frame[:12] + struct.pack("!HH", kind, vid) + frame[12:]


ARP = arp_request(GUEST_MAC, GUEST_IP4, "192.0.2.1")
FORGED_ARP = ethernet(BROADCAST, GUEST_MAC, 0x0806, ARP[14:22] + mac_bytes(FOREIGN_MAC) + ARP[28:])
RIGHT = {
    "UDP": udp(GUEST_IP4, 1000, 1000),
    "DHCP": udp("0.0.0.0", 68, 67),
    "ARP": ARP,
    "a probe": arp_request(GUEST_MAC, "0.0.0.0", GUEST_IP4),
    "an announcement": rarp(GUEST_MAC),
    "NS": solicitation(GUEST_MAC, GUEST_IP6, "2001:db8::1"),
    "NA": advertisement(GUEST_IP6),
    "NA of the link-local address": advertisement(LOCAL, source=LOCAL),
}
WRONG_MAC = {
    "another MAC": (udp(GUEST_IP4, 1000, 1000, FOREIGN_MAC), "mac"),
    "ARP with another MAC": (FORGED_ARP, "mac"),
    "the announcement of another": (rarp(FOREIGN_MAC), "mac"),
    "NA with another MAC": (advertisement(GUEST_IP6, FOREIGN_MAC), "mac"),
}
WRONG_ADDRESS = {
    "another address": (udp(OTHER_IP4, 1000, 1000), "address"),
    "no address": (udp("0.0.0.0", 1000, 1000), "address"),
    "a DHCP server": (udp(GUEST_IP4, 67, 68), "dhcp"),
    "ARP of another address": (arp_request(GUEST_MAC, OTHER_IP4, "192.0.2.1"), "address"),
    "RA": (router_advertisement(GUEST_MAC, LOCAL), "router"),
    "NS of another address": (solicitation(GUEST_MAC, OTHER_IP6, "2001:db8::1"), "address"),
    "NA of another address": (advertisement(OTHER_IP6), "address"),
    "another protocol": (ethernet(BROADCAST, GUEST_MAC, 0x88B6, bytes(46)), "protocol"),
}
TAGS: dict[str, Callable[[bytes], bytes]] = {
    "bare": lambda frame: frame,
    "VID 0": lambda frame: tagged(frame, 0),
    "VID 5": lambda frame: tagged(frame, 5),
    "802.1ad": lambda frame: tagged(frame, 5, 0x88A8),
}


def dropped() -> dict[str, int]:
    """How many frames of tap0 were dropped, by reason."""
    found = {}
    for one in table()["set"]:
        if one["name"].startswith("dropped_"):
            (element,) = one["elem"]
            found[one["name"].removeprefix("dropped_")] = element["elem"]["counter"]["packets"]
    return found


def passing(node: Node, frames: dict[str, bytes]) -> set[str]:
    """The names of those *frames* of the guest that come out of the uplink."""
    with node.client:
        far = packet_socket("eth0")
        far.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: tells the tag
    names = set()
    for name, frame in frames.items():
        node.taps[0].send(frame)
        node.taps[0].send(FENCE)
        while True:
            data, ancillary, _, origin = far.recvmsg(2048, 64)
            if origin[2] == socket.PACKET_OUTGOING:
                continue
            if data == FENCE:
                break
            if ancillary:
                status, *_, tci, kind = struct.unpack("=IIIHHHH", ancillary[0][2])  # struct tpacket_auxdata
                data = tagged(data, tci, kind) if status & 0x10 else data  # TP_STATUS_VLAN_VALID
            if data == frame:
                names.add(name)
    far.close()
    return names


# What may always pass, so that all that was sent before it has been judged.
FENCE = arp_request(GUEST_MAC, GUEST_IP4, "192.0.2.254")


@pytest.mark.parametrize("kind", ["mac", "address"])
@pytest.mark.parametrize("tag", TAGS)
def test_what_is_the_guests_passes_and_nothing_else(bridged: Node, tag: str, kind: str) -> None:
    check(wire(ip=IPS, filter=kind), 0)
    wrong, right = dict(WRONG_MAC), dict(RIGHT)
    if kind == "address":
        wrong |= WRONG_ADDRESS
    else:
        right |= {name: frame for name, (frame, _) in WRONG_ADDRESS.items()}
    every = right | {name: frame for name, (frame, _) in wrong.items()}
    assert passing(bridged, {name: TAGS[tag](frame) for name, frame in every.items()}) == right.keys()
    assert dropped() == {reason: sum(why == reason for _, why in wrong.values()) for reason in REASONS}
