"""A guest does not configure its node: what it says about routers, routes and addresses is ignored, in every mode."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any

import pytest

from harness import disturb, manager, nodes, oracle, snapshots, tools, wire
from harness.addresses import CLIENT_IP4, GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_IP4, TAP_MAC
from harness.hooks import call, check, hook
from harness.nodes import Node

pytestmark = pytest.mark.userns  # writes sysctls, of which a user namespace does not own all

FAR = "198.51.100.77"  # somebody behind the default gateway
THIEF = "192.0.2.66"  # to whom a redirect leads
# A bridge hands frames to this address up to the node, as if they had come to its own.
TO_THE_NODE = "01:80:c2:00:00:0e"
BRIDGED: dict[str, Any] = {"mode": "bridged", "link": "br0"}
ROUTED: dict[str, dict[str, Any]] = {
    "IPv4": {"mode": "routed", "ip": [GUEST_IP4]},
    "IPv6": {"mode": "routed", "ip": [GUEST_IP6]},
    "both, table": {"mode": "routed", "ip": [GUEST_IP4, GUEST_IP6], "link": "100"},
}
CLOSED = {
    "ipv4/conf/tap0/accept_redirects": "0",
    "ipv4/conf/tap0/accept_source_route": "0",
    "ipv6/conf/tap0/accept_ra": "0",
    "ipv6/conf/tap0/accept_redirects": "0",
    "ipv6/conf/tap0/autoconf": "0",
}
PORT = {
    **CLOSED,
    "ipv4/conf/tap0/arp_ignore": "8",
    "ipv4/conf/tap0/drop_unicast_in_l2_multicast": "1",
    "ipv6/conf/tap0/disable_ipv6": "1",
}


def current(wanted: dict[str, str]) -> dict[str, str]:
    """The present values of the sysctls in *wanted*."""
    return {path: oracle.sysctl(path) for path in wanted}


def advertisement(to: str = "33:33:00:00:00:01") -> bytes:
    """A router advertisement of the guest's, with a prefix in which to make addresses."""
    prefix = struct.pack("!BBBBIII16s", 3, 4, 64, 0xC0, 7200, 3600, 0, ipaddress.IPv6Address("2001:db8:bad::").packed)
    source = struct.pack("!BB6s", 1, 1, wire.mac_bytes(GUEST_MAC))
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + source + prefix
    return wire.icmp6(to, GUEST_MAC, "fe80::1", "ff02::1", body)


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ip4(source: str, target: str, payload: bytes) -> bytes:
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, 1, 0,
                         socket.inet_aton(source), socket.inet_aton(target))  # fmt: skip
    return header[:10] + struct.pack("!H", _sum(header)) + header[12:] + payload


def redirect(to: str = TAP_MAC) -> bytes:
    """ "For that packet of yours, take the thief as your gateway", as if the node's gateway had said it."""
    quoted = _ip4(NODE_IP4, FAR, bytes(8))  # an echo reply
    body = struct.pack("!BBH4s", 5, 1, 0, socket.inet_aton(THIEF)) + quoted
    body = body[:2] + struct.pack("!H", _sum(body)) + body[4:]
    return wire.ethernet(to, GUEST_MAC, wire.ETH_P_IP, _ip4(CLIENT_IP4, NODE_IP4, body))


def ask_for_trouble() -> None:
    """A node that believes all it hears, as far as its administrator could have it so."""
    for which in ("all", "default"):
        oracle.sysctl(f"ipv4/conf/{which}/accept_redirects", 1)
        oracle.sysctl(f"ipv4/conf/{which}/accept_source_route", 1)
        oracle.sysctl(f"ipv6/conf/{which}/accept_ra", 2)
    tools.ip(f"neigh replace {THIEF} lladdr 02:00:00:00:00:66 nud permanent dev eth0")


def attack(node: Node, guest: wire.Tap, to: str | None = None) -> None:
    """All that the guest tries; the node has seen it when this returns."""
    for frame in (advertisement(), redirect()):
        guest.send(frame if to is None else wire.mac_bytes(to) + frame[6:])
    # What comes after has been through the same queue.
    tap = wire.Wire(wire.packet_socket(guest.name), guest.name)
    node.wires.append(tap)
    last = wire.ethernet(wire.BROADCAST, GUEST_MAC, wire.ETH_P_FENCE, bytes(46))
    guest.send(last)
    tap.until(lambda frame: frame == last)


def addresses(tap: str) -> list[dict[str, Any]]:
    """The IPv6 addresses of *tap*."""
    return [info for one in tools.ask(f"addr show dev {tap}") for info in one["addr_info"]]


def loot(tap: str = "tap0") -> list[str]:
    """What the guest has brought about: default routes, addresses, and ways that lead to the thief."""
    found = [f"default {route.get('gateway')}" for route in tools.ask(f"-6 route show default dev {tap}")]
    found += [one["local"] for one in addresses(tap) if one["scope"] == "global"]
    way = tools.ask(f"-4 route get {FAR} from {NODE_IP4}")
    return found + [one["gateway"] for one in way if one.get("gateway") == THIEF]


def test_the_attack_succeeds_on_a_tap_that_nobody_has_closed(uplinked: Node) -> None:
    """Or the tests below would prove nothing."""
    ask_for_trouble()
    guest = uplinked.guest()
    oracle.sysctl("ipv4/conf/tap0/forwarding", 1)
    tools.ip("link set tap0 address fe:00:00:35:ac:01 up")
    tools.ip(f"route add {GUEST_IP4} dev tap0")
    attack(uplinked, guest)
    found = loot()
    assert "default fe80::1" in found
    assert THIEF in found
    assert [one for one in found if one.startswith("2001:db8:bad:")]


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("nic", ROUTED)
def test_a_routed_guest_changes_no_route_and_no_address_of_its_node(uplinked: Node, nic: str, incoming: bool) -> None:
    ask_for_trouble()
    guest = uplinked.guest()
    manager.write_nic(incoming=incoming, **ROUTED[nic])
    config = manager.configuration(routed={"rp_filter": "off"})  # strict would stop the redirect, too
    check(call("kvm-ifup-pre", "tap0", config), 0)
    attack(uplinked, guest)
    assert loot() == []
    assert current(CLOSED) == CLOSED
    check(call("kvm-ifup-post", "tap0", config), 0)
    attack(uplinked, guest)
    assert loot() == []


@pytest.mark.parametrize("forwarding", [0, 1])
def test_a_bridged_guest_reaches_its_node_by_no_reserved_address(node: Node, forwarding: int) -> None:
    node.uplink()
    ask_for_trouble()
    for family in (4, 6):
        for which in ("all", "default"):
            oracle.sysctl(f"ipv{family}/conf/{which}/forwarding", forwarding)
    ask_for_trouble()  # turning forwarding on and off sets them
    nodes.add_bridge()
    guest = node.guest()
    manager.write_nic(**BRIDGED)
    check(call("kvm-ifup-post", "tap0"), 0)
    attack(node, guest, TO_THE_NODE)
    assert loot() == []
    assert current(PORT) == PORT
    # Nor does the node answer, or remember who has asked.
    guest.send(wire.mac_bytes(TO_THE_NODE) + wire.arp_request(GUEST_MAC, GUEST_IP4, NODE_IP4)[6:])
    attack(node, guest, TO_THE_NODE)
    assert tools.ask("neigh show dev tap0") == []


def test_the_bridge_would_hand_it_up(node: Node) -> None:
    """Or the test above would prove nothing."""
    node.uplink()
    ask_for_trouble()
    nodes.add_bridge()
    guest = node.guest()
    tools.ip("link set tap0 address fe:00:00:35:ac:01 master br0 up")
    attack(node, guest, TO_THE_NODE)
    assert "default fe80::1" in loot()


@pytest.mark.parametrize("nic", [*ROUTED.values(), BRIDGED], ids=str)
def test_it_is_closed_before_it_is_up_or_a_port(uplinked: Node, nic: dict[str, Any]) -> None:
    ask_for_trouble()
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(**nic)
    wanted = PORT if nic is BRIDGED else CLOSED
    opened: list[str] = []

    def look(_number: int, op: Any) -> None:
        if type(op).__name__ == "LinkUp" or (type(op).__name__ == "LinkMaster" and op.want):
            assert current(wanted) == wanted
            opened.append(type(op).__name__)

    with disturb.disturbed(before=look):
        check(call("kvm-ifup-post", "tap0"), 0)
    assert opened == (["LinkMaster", "LinkUp"] if nic is BRIDGED else ["LinkUp"])


@pytest.mark.parametrize(("first", "second"), [(BRIDGED, ROUTED["IPv4"]), (ROUTED["IPv4"], BRIDGED)], ids=["r", "b"])
def test_it_stays_closed_when_a_running_tap_changes_its_mode(
    uplinked: Node, first: dict[str, Any], second: dict[str, Any]
) -> None:
    ask_for_trouble()
    nodes.add_bridge()
    uplinked.guest()
    manager.write_nic(**first)
    check(call("kvm-ifup-post", "tap0"), 0)
    manager.write_nic(**second)
    with disturb.disturbed(after=lambda _number, _op: _closed()) as written:
        check(call("kvm-ifup-post", "tap0"), 0)
    assert written


def _closed() -> None:
    assert current(CLOSED) == CLOSED


@pytest.mark.parametrize("nic", [ROUTED["IPv4"], BRIDGED], ids=["routed", "bridged"])
@pytest.mark.parametrize("up", [False, True])
def test_a_tap_without_ipv6_is_closed_as_soon_as_it_has_any(uplinked: Node, nic: dict[str, Any], up: bool) -> None:
    """With an MTU below 1280 the kernel takes IPv6 away, and its settings with it."""
    ask_for_trouble()
    nodes.add_bridge()
    guest = uplinked.guest()
    tools.ip(f"link set tap0 mtu 1200 {'up' if up else ''}")
    manager.write_nic(**nic)
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    wired = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    attack(uplinked, guest, TO_THE_NODE if nic is BRIDGED else None)
    assert loot() == []
    if nic is BRIDGED:
        assert current(PORT) == PORT
    check(call("kvm-ifdown", "tap0"), 0)
    # The bridge has had a carrier for the first time.
    assert [one for one in snapshots.changes(before, snapshots.snapshot()) if "br0" not in one] == []


def test_a_routed_guest_with_ipv6_needs_a_tap_that_can_have_it(uplinked: Node) -> None:
    nodes.add_tap()
    tools.ip("link set tap0 mtu 1200")
    manager.write_nic(mode="routed", ip=[GUEST_IP6])
    result = call("kvm-ifup-pre", "tap0")
    check(result, 69, "its MTU is 1200", "ip link set tap0 mtu 1500")
    tools.run(*result.err.split("`")[1].split())
    check(call("kvm-ifup-pre", "tap0"), 0)


# --- a tap is never an uplink -------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [None, "100"])
@pytest.mark.parametrize(("family", "address"), [(4, GUEST_IP4), (6, GUEST_IP6)])
def test_a_default_route_out_of_a_tap_leads_to_no_uplink(
    uplinked: Node, family: int, address: str, link: str | None
) -> None:
    """Whoever made it. In a table of its own it does not hide the one in main either."""
    nodes.taps(["tap0", "tap1"])
    tools.ip("link set tap1 up")
    tools.ip(f"-{family} route add default dev tap1 metric 1 table {link or 'main'}")
    manager.write_nic(mode="routed", ip=[address], link=link)
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert oracle.proxies("eth0") == {address}
    assert oracle.proxies("tap1") == set()
    assert oracle.sysctl(f"ipv{family}/neigh/tap1/proxy_delay") != "0"


@pytest.mark.parametrize("name", ["tap0", "tap1"])
def test_a_tap_that_is_configured_as_an_uplink_is_refused(uplinked: Node, name: str) -> None:
    nodes.taps(["tap0", "tap1"])
    tools.ip("link set tap1 up")
    manager.write_nic(mode="routed", ip=[GUEST_IP4], incoming=True)
    config = manager.configuration(routed={"uplinks": ["eth0", name]})
    before = snapshots.snapshot()
    check(call("kvm-ifup-pre", "tap0", config), 69, f"uplink {name} is a tap", "[routed] uplinks")
    assert snapshots.changes(before, snapshots.snapshot()) == []
