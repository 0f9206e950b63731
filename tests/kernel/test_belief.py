"""What the kernel believes of neighbours, the agent believes: the same frames, put before both."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator

from harness import guests, oracle, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, CLIENT_MAC, FOREIGN_MAC, GUEST_IP4, GUEST_IP6, NODE_MAC
from harness.agents import until
from harness.nodes import Node, certain
from kvmifup.node import frames, sockets

BEFORE, FENCE = "02:00:00:00:00:0c", "192.0.2.99"
MAC = wire.mac_bytes(FOREIGN_MAC)
OVERRIDES, SOLICITED = 0x20000000, 0x40000000
TELLS, ASKS = b"\2\1" + MAC, b"\1\1" + MAC
PAD = bytes([1, 4, 0, 0, 0, 0])


def arp(op: int = 1, hardware: int = 1, to: str = wire.BROADCAST, target: str = GUEST_IP4, mac: str = FOREIGN_MAC,
        protocol: int = 0x0800, sender: str = GUEST_IP4) -> bytes:  # fmt: skip
    """An ARP message of the guest's address."""
    body = struct.pack("!HHBBH6s4s6x4s", hardware, protocol, 6, 4, op, wire.mac_bytes(mac), socket.inet_aton(sender),
                       socket.inet_aton(target))  # fmt: skip
    return wire.ethernet(to, FOREIGN_MAC, wire.ETH_P_ARP, body)


def nd(kind: int = 136, options: bytes = TELLS, flags: int = OVERRIDES, source: str = "fe80::b", to: str = "ff02::1",
       about: str = GUEST_IP6, frame_to: str | None = None, code: int = 0) -> bytes:  # fmt: skip
    """A message of neighbour discovery."""
    group = ipaddress.IPv6Address(to).packed
    frame_to = frame_to or (f"33:33:{group[12:].hex(':')}" if group[0] == 0xFF else CLIENT_MAC)
    target = ipaddress.IPv6Address(about).packed if kind != 133 else b""
    return wire.icmp6(frame_to, FOREIGN_MAC, source, to, struct.pack("!BBHI", kind, code, 0, flags) + target + options)


def asked(about: str = CLIENT_IP6, to: str = "ff02::1:ff00:1", options: bytes = ASKS, source: str = GUEST_IP6) -> bytes:
    """A solicitation that the guest's address sends."""
    return nd(135, options, 0, source, to, about)


def behind(headers: dict[int, bytes], frame: bytes) -> bytes:
    """The IPv6 packet in *frame*, with *headers* in front of what is in it."""
    kinds = [*headers, frame[20]]
    chain = b"".join(bytes([kinds[at + 1], (len(one) + 2) // 8 - 1]) + one for at, one in enumerate(headers.values()))
    (length,) = struct.unpack("!H", frame[18:20])
    return frame[:18] + struct.pack("!HB", length + len(chain), kinds[0]) + frame[21:54] + chain + frame[54:]


def tagged(frame: bytes, *vids: int) -> bytes:
    """With VLAN tags."""
    return frame[:12] + b"".join(struct.pack("!HH", 0x8100, vid) for vid in vids) + frame[12:]


NA, ROUTER = nd(), "ff02::2"
FRAMES = {
    "gratuitous request": arp(),
    "gratuitous reply": arp(2),
    "question for another": arp(target="192.0.2.77"),
    "question for this one": arp(target=CLIENT_IP4),
    "question for this one alone": arp(target=CLIENT_IP4, to=CLIENT_MAC),
    "question for another network": arp(target="203.0.113.9"),
    "question for nobody": arp(target="0.0.0.0"),
    "question for a group": arp(target="224.0.0.1"),
    "question for itself": arp(target="127.0.0.1"),
    "question for all": arp(target="255.255.255.255"),
    "question of nobody": arp(sender="0.0.0.0"),
    "answer to this one": arp(2, to=CLIENT_MAC, target=CLIENT_IP4),
    "answer to all": arp(2, target="192.0.2.77"),
    "IEEE 802": arp(hardware=6),
    "other hardware": arp(hardware=7),
    "other protocol": arp(protocol=0x86DD),
    "other operation": arp(3),
    "inverse": arp(8),
    "MAC of zeros": arp(mac="00:00:00:00:00:00"),
    "MAC of a group": arp(mac="03:00:00:00:00:0b"),
    "to a group of MACs": arp(to="01:00:5e:00:00:01"),
    "to another machine": arp(to="02:00:00:00:99:99"),
    "RARP": wire.ethernet(wire.BROADCAST, FOREIGN_MAC, 0x8035, arp(4)[14:]),
    "too short": arp()[:41],
    "in a VLAN": tagged(arp(), 5),
    "with a priority": tagged(arp(), 0xE000),
    "two tags": tagged(arp(), 0, 5),
    "two priorities": tagged(arp(), 0, 0),
    "advertisement": NA,
    "without override": nd(flags=0),
    "solicited, to all": nd(flags=OVERRIDES | SOLICITED),
    "without a MAC": nd(options=b""),
    "with the wrong option": nd(options=ASKS),
    "with a MAC of zeros": nd(options=b"\2\1" + bytes(6)),
    "with a MAC of a group": nd(options=b"\2\1\3" + bytes(5)),
    "with an option of 16": nd(options=b"\2\2" + MAC + bytes(8)),
    "behind an empty option": nd(options=b"\x0e\0" + bytes(6) + TELLS),
    "before half an option": nd(options=TELLS + b"\x0e\2" + bytes(6)),
    "behind another option": nd(options=b"\x0e\1" + bytes(6) + TELLS),
    "to routers": nd(to=ROUTER),
    "to routers of the site": nd(to="ff05::2"),
    "to this one's group": nd(to="ff02::1:ff00:1"),
    "to the node's own group": nd(to="ff01::1"),
    "to nobody's group": nd(to="ff0e::1"),
    "to this one": nd(to=CLIENT_IP6),
    "to this one, solicited": nd(to=CLIENT_IP6, flags=OVERRIDES | SOLICITED),
    "to this one, in a frame to many": nd(to=CLIENT_IP6, frame_to="33:33:00:00:00:01"),
    "from nobody": nd(source="::"),
    "from itself": nd(source="::1"),
    "from a group": nd(source="ff02::5"),
    "from elsewhere": nd(source="2001:db8:77::1"),
    "from off the segment": NA[:21] + b"\xfe" + NA[22:],
    "with a code": nd(code=1),
    "with more behind it": NA + bytes(5),
    "cut off": NA[:-1],
    "with a wrong checksum": NA[:56] + b"\0\0" + NA[58:],
    "of length 0": NA[:18] + b"\0\0" + NA[20:],
    "of version 4": NA[:14] + b"\x40" + NA[15:],
    "behind hop-by-hop options": behind({0: PAD}, NA),
    "behind options": behind({60: PAD}, NA),
    "behind both": behind({0: PAD, 60: PAD}, NA),
    "behind both, reversed": behind({60: PAD, 0: PAD}, NA),
    "behind a router alert": behind({0: bytes([5, 2, 0, 0, 1, 0])}, NA),
    "behind a route": behind({43: bytes(6)}, NA),
    "in a fragment": behind({44: bytes(6)}, NA),
    "in no header": behind({59: PAD}, NA),
    "advertisement in a VLAN": tagged(NA, 5),
    "advertisement with a priority": tagged(NA, 0xE000),
    "jumbo": nd(options=TELLS + (b"\x0e\xff" + bytes(2038)) * 3),
    "the guest asks": asked(),
    "the guest asks all": asked(to="ff02::1"),
    "the guest asks this one": asked(to=CLIENT_IP6),
    "the guest asks behind options": behind({0: PAD}, asked()),
    "the guest asks, without a MAC": asked(options=b""),
    "the guest asks, with the wrong option": asked(options=TELLS),
    "the guest asks for a group": asked(about="ff02::5"),
    "the guest asks for itself": asked(about=GUEST_IP6, to="ff02::1:ff00:8"),
    "nobody asks": asked(source="::", options=b""),
    "the guest asks routers": nd(133, ASKS, 0, GUEST_IP6, ROUTER),
    "the guest asks all for routers": nd(133, ASKS, 0, GUEST_IP6, "ff02::1"),
    "the guest asks routers, without a MAC": nd(133, b"", 0, GUEST_IP6, ROUTER),
    "the guest is a router": nd(134, bytes(8) + ASKS, 0, GUEST_IP6),
    "the guest redirects": nd(137, ipaddress.IPv6Address(GUEST_IP6).packed + TELLS, 0, "fe80::b", CLIENT_IP6),
}  # fmt: skip


@contextlib.contextmanager
def listening() -> Iterator[list[socket.socket]]:
    """What the agent listens with on an uplink."""
    four, six = (sockets.uplink_listener("eth0", *which) for which in ((4, [GUEST_IP4]), (6, [GUEST_IP6])))
    with four, six:
        yield [four, six]


def announced(listeners: list[socket.socket]) -> dict[str, str]:
    """What the agent takes out of what it has heard."""
    found: dict[str, str] = {}
    for listener in listeners:
        with contextlib.suppress(BlockingIOError):
            while True:
                found.update(filter(None, [frames.announcement_in(listener.recv(sockets.WHOLE))]))
    return found


def known() -> dict[str, str]:
    """Where the kernel thinks that its neighbours are."""
    return {one["dst"]: one["lladdr"] for one in tools.ask("neigh show dev eth0") if "lladdr" in one}


def remember(mac: str) -> None:
    """The kernel knows the guest at *mac*. (All namespaces share one limit of entries.)"""

    def done() -> bool:
        with contextlib.suppress(AssertionError):
            for address in (GUEST_IP4, GUEST_IP6, FENCE):
                tools.ip(f"neigh replace {address} dev eth0 lladdr {mac} nud stale")
            return True
        return False

    until(done)


def test_the_agent_believes_what_a_neighbours_kernel_believes(uplinked: Node) -> None:
    """The client is the neighbour, and a router. Its kernel, and the agent's sockets there, get the same frames."""
    tools.ip("link set eth0 mtu 9000")
    wrong = {}
    with wire.packet_socket("eth0") as sender, uplinked.client, listening() as listeners:
        tools.ip("link set eth0 mtu 9000")
        certain("eth0")  # until then it hears nothing that is sent to its address alone
        for family in (4, 6):
            oracle.sysctl(f"ipv{family}/conf/all/forwarding", 1)
        oracle.sysctl("ipv4/neigh/eth0/locktime", 0)
        for name, frame in FRAMES.items():
            remember(BEFORE)
            sender.send(frame)
            sender.send(guests.garp(NODE_MAC, FENCE))
            until(lambda: known().get(FENCE) == NODE_MAC)
            kernel = {
                address: mac for address, mac in known().items() if address in (GUEST_IP4, GUEST_IP6) and mac != BEFORE
            }
            if (ours := announced(listeners)) != kernel:
                wrong[name] = (kernel, ours)
    assert wrong == {}
    assert len(FRAMES) > 80


def test_most_of_them_are_told_from_the_others() -> None:
    """Or the test above would show nothing."""
    believed = [name for name, frame in FRAMES.items() if frames.announcement_in(frame)]
    assert 25 < len(believed) < len(FRAMES) - 25
