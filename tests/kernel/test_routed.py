"""Routed NICs: what may be true on two nodes at once in pre; routes, proxies and announcements in post only."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import agents, hooks, manager, namespaces, nodes, oracle, snapshots, tools, wire
from harness.addresses import (
    CLIENT_IP4,
    CLIENT_IP6,
    CLIENT_MAC,
    GUEST_IP4,
    GUEST_IP6,
    GUEST_MAC,
    IPS,
    NODE_IP4,
    NODE_IP6,
    NODE_MAC,
    TAP_MAC,
)
from harness.hooks import call, check, hook
from harness.nodes import Node

pytestmark = pytest.mark.userns  # writes sysctls, of which a user namespace does not own all

HOSTS = [GUEST_IP4, "192.0.2.9", GUEST_IP6, "2001:db8::9"]
PREFIXES = ["198.51.100.0/29", "2001:db8:1::/64"]
TAP_SYSCTLS = {
    "ipv4/conf/tap0/forwarding": "1",
    "ipv4/conf/tap0/proxy_arp": "1",
    "ipv4/conf/tap0/send_redirects": "0",
    "ipv4/conf/tap0/rp_filter": "1",
    "ipv4/neigh/tap0/proxy_delay": "0",
    "ipv6/conf/tap0/forwarding": "1",
    "ipv6/conf/tap0/proxy_ndp": "1",
    "ipv6/neigh/tap0/proxy_delay": "0",
}
UPLINK_SYSCTLS = {
    "ipv4/neigh/eth0/proxy_delay": "0",
    "ipv6/neigh/eth0/proxy_delay": "0",
    "ipv6/conf/eth0/proxy_ndp": "1",
    "ipv6/conf/all/proxy_ndp": "1",
}


@pytest.fixture
def table_name(node: Node) -> Iterator[str]:
    """A name for table 100, in an rt_tables of this mount namespace's own. Debian 13 has none below /etc."""
    with contextlib.ExitStack() as stack:
        target = Path("/etc/iproute2/rt_tables")
        if not target.exists():
            stack.enter_context(namespaces.private_etc())
            target.parent.mkdir(exist_ok=True)
            target.touch()
        file = nodes.scratch() / "rt_tables"
        file.write_text("254 main\n# a comment\n0x64\tguests # another\n")
        namespaces.bind_mount(file, target)
        stack.callback(namespaces.unmount, target)
        yield "guests"


def current(wanted: dict[str, str]) -> dict[str, str]:
    """The present values of the sysctls in *wanted*."""
    return {path: oracle.sysctl(path) for path in wanted}


def announced(frames: list[bytes]) -> list[str]:
    """The guest's addresses among the senders of ARP and the targets of NAs."""
    found = [one.sender for one in map(wire.arp, frames) if one] + [
        one.target for one in map(wire.advertisement, frames) if one
    ]
    return [address for address in found if address in HOSTS]


@pytest.mark.parametrize("link", [None, "100", "254", "4294967295"])
def test_route_proxy_entry_and_announcement_come_with_post_never_with_pre(uplinked: Node, link: str | None) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", link=link, ip=HOSTS + PREFIXES, incoming=True)
    client = uplinked.listen()

    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert oracle.routes("tap0") == set()
    assert oracle.proxies() == set()
    assert announced(uplinked.fence(client)) == []
    assert current(TAP_SYSCTLS | UPLINK_SYSCTLS) == TAP_SYSCTLS | UPLINK_SYSCTLS
    tap = oracle.link("tap0")
    assert tap["address"] == TAP_MAC
    assert "UP" in tap["flags"]
    assert oracle.neighbours() == dict.fromkeys(HOSTS, GUEST_MAC)
    table = {None: None, "254": "main"}.get(link, link)
    assert oracle.rules() == ([(4, 10000, table), (6, 10000, table)] if table else [])

    check(hook("kvm-ifup-post", "tap0"), 0)
    assert oracle.routes("tap0", link or "main") == {*HOSTS, *PREFIXES}
    assert oracle.proxies("eth0") == set(HOSTS)
    assert current(TAP_SYSCTLS | UPLINK_SYSCTLS) == TAP_SYSCTLS | UPLINK_SYSCTLS
    assert set(announced(uplinked.fence(client))) == set(HOSTS)


def test_a_table_can_be_named(uplinked: Node, table_name: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", link=table_name, ip=HOSTS)
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert oracle.routes("tap0", table_name) == set(HOSTS)
    assert [(family, priority) for family, priority, _ in oracle.rules()] == [(4, 10000), (6, 10000)]


@pytest.mark.parametrize("incoming", [False, True])
def test_post_alone_is_a_full_start(uplinked: Node, incoming: bool) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=HOSTS, incoming=incoming)
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert oracle.routes("tap0") == set(HOSTS)
    assert oracle.proxies("eth0") == set(HOSTS)
    assert current(TAP_SYSCTLS) == TAP_SYSCTLS


def test_pre_on_a_nic_that_is_not_incoming_goes_on_to_post(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=HOSTS)
    client = uplinked.listen()
    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert oracle.routes("tap0") == set(HOSTS)
    assert oracle.proxies("eth0") == set(HOSTS)
    assert set(announced(uplinked.fence(client))) == set(HOSTS)


def test_post_finds_the_nic_in_the_journal_of_pre(uplinked: Node) -> None:
    """Ganeti's environment is there at pre; a person who calls post by hand has only the tap."""
    nodes.add_tap()
    environ = manager.ganeti(MODE="routed", IP=GUEST_IP4, MIGRATION_PHASE="pre")
    check(hook("kvm-ifup-pre", "tap0", environ=environ), 0)
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert oracle.routes("tap0") == {GUEST_IP4}


@pytest.mark.parametrize(("rp_filter", "value"), [("strict", "1"), ("loose", "2"), ("off", "0"), ("keep", "7")])
def test_rp_filter_is_the_administrators(uplinked: Node, rp_filter: str, value: str) -> None:
    nodes.add_tap()
    oracle.sysctl("ipv4/conf/tap0/rp_filter", 7)
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0", manager.configuration(routed={"rp_filter": rp_filter})), 0)
    assert oracle.sysctl("ipv4/conf/tap0/rp_filter") == value


def test_without_an_uplink_there_is_the_host_route_alone_and_a_remark(node: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    result = call("kvm-ifup-post", "-v", "tap0")
    assert result
    assert "no IPv4 uplink found" in result.err
    assert oracle.routes("tap0") == {GUEST_IP4}
    assert oracle.proxies() == set()


def test_several_uplinks_and_one_with_a_dot_in_its_name(uplinked: Node) -> None:
    tools.ip("link add eth1.100 type veth peer name far")
    tools.ip("link set eth1.100 up")
    oracle.sysctl("ipv4/conf/eth1.100/forwarding", 1)
    oracle.sysctl("ipv6/conf/eth1.100/forwarding", 1)
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    config = manager.configuration(routed={"uplinks": ["eth0", "eth1.100"]})
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0", config), 0)
    assert oracle.proxies("eth0") == oracle.proxies("eth1.100") == {GUEST_IP4, GUEST_IP6}
    check(call("kvm-ifdown", "tap0", config), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_uplinks_are_the_default_routes_of_the_nics_table(uplinked: Node) -> None:
    tools.ip("link add eth1 type veth peer name far")
    tools.ip("link set eth1 up")
    oracle.sysctl("ipv4/conf/eth1/forwarding", 1)
    tools.ip("route add default dev eth1 table 100")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], link="100")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.proxies("eth1") == {GUEST_IP4}
    assert oracle.proxies("eth0") == set()


def test_an_uplink_can_be_named_by_an_alternative_name(uplinked: Node) -> None:
    tools.ip("link property add dev eth0 altname enp0s1")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    config = manager.configuration(routed={"uplinks": ["enp0s1", "eth0"]})
    check(call("kvm-ifup-post", "tap0", config), 0)
    assert oracle.proxies("eth0") == {GUEST_IP4, GUEST_IP6}
    assert current(UPLINK_SYSCTLS) == UPLINK_SYSCTLS
    wired = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0", config), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    assert call("kvm-ifup", "show", "tap0", config).out.split()[-1] == "yes"


def test_both_devices_of_a_multipath_default_route_are_uplinks(uplinked: Node) -> None:
    tools.ip("link add eth1 type veth peer name far")
    tools.ip("link set eth1 up")
    tools.ip("addr add 203.0.113.2/24 dev eth1")
    oracle.sysctl("ipv4/conf/eth1/forwarding", 1)
    tools.ip("link set far up")
    tools.ip("route del default")
    tools.ip(f"route add default nexthop via {CLIENT_IP4} dev eth0 nexthop via 203.0.113.1 dev eth1")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.proxies("eth0") == oracle.proxies("eth1") == {GUEST_IP4}


def test_an_uplink_without_carrier_is_no_obstacle(uplinked: Node) -> None:
    """A pulled cable must not keep a guest from starting."""
    with uplinked.client:
        tools.ip("link set eth0 down")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0", manager.configuration(routed={"uplinks": ["eth0"]})), 0)
    assert oracle.proxies("eth0") == {GUEST_IP4, GUEST_IP6}


def test_the_first_packet_reaches_the_guest_without_a_question(uplinked: Node) -> None:
    """The permanent neighbour entry saves the first ARP round; the node answers for the guest on the uplink."""
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    with uplinked.client:
        tools.run("sh", "-c", f"ping -c 1 -W 1 {GUEST_IP4} >/dev/null 2>&1 || true")
    (*earlier, _) = guest.until(lambda frame: frame[12:14] == b"\x08\x00" and frame[30:34] == bytes([192, 0, 2, 8]))
    assert [one for one in map(wire.arp, earlier) if one and one.target == GUEST_IP4] == []


@pytest.mark.parametrize("link", [None, "100"])
def test_the_node_answers_arp_and_ndp_for_the_guest_only_after_post(uplinked: Node, link: str | None) -> None:
    """In table 100 the administrator's own rule brings the uplink's traffic in."""
    if link:
        for family in (4, 6):
            tools.ip(f"-{family} rule add iif eth0 lookup {link} priority 9999")
    nodes.add_tap()
    manager.write_nic(mode="routed", link=link, ip=[GUEST_IP4, GUEST_IP6], incoming=True)
    # If the node were to answer, it would do so at once and not after the fence.
    oracle.sysctl("ipv4/neigh/eth0/proxy_delay", 0)
    oracle.sysctl("ipv6/neigh/eth0/proxy_delay", 0)
    client = uplinked.listen()
    with uplinked.client:
        (local,) = [
            info["local"]
            for one in tools.ask("addr show dev eth0")
            for info in one["addr_info"]
            if info["scope"] == "link"
        ]
    asking = (wire.arp_request(CLIENT_MAC, CLIENT_IP4, GUEST_IP4), wire.solicitation(CLIENT_MAC, local, GUEST_IP6))
    # The node's own address, as proof that it has seen the question before.
    control = (
        wire.arp_request(CLIENT_MAC, CLIENT_IP4, NODE_IP4),
        wire.solicitation(CLIENT_MAC, local, NODE_IP6),
    )

    def arp_of(address: str, frame: bytes) -> bool:
        answer = wire.arp(frame)
        return bool(answer and answer.op == 2 and answer.sender == address and answer.mac == NODE_MAC)

    def na_of(address: str, frame: bytes) -> bool:
        answer = wire.advertisement(frame)
        return bool(answer and answer.solicited and answer.target == address and answer.mac == NODE_MAC)

    check(call("kvm-ifup-pre", "tap0"), 0)
    for question in (*asking, *control):
        client.send(question)
    seen = client.until(lambda frame: na_of(NODE_IP6, frame)) + uplinked.fence(client)
    assert any(arp_of(NODE_IP4, frame) for frame in seen)
    assert not any(arp_of(GUEST_IP4, frame) or na_of(GUEST_IP6, frame) for frame in seen)

    check(call("kvm-ifup-post", "tap0"), 0)
    for question, answered in zip(asking, (arp_of, na_of), strict=True):
        client.send(question)
        address = GUEST_IP4 if answered is arp_of else GUEST_IP6
        client.until(lambda frame, answered=answered, address=address: answered(address, frame))  # type: ignore[misc]

    check(call("kvm-ifdown", "tap0"), 0)
    hooks.reap()
    uplinked.fence(client)
    for question in (*asking, *control):
        client.send(question)
    seen = client.until(lambda frame: na_of(NODE_IP6, frame)) + uplinked.fence(client)
    assert not any(arp_of(GUEST_IP4, frame) or na_of(GUEST_IP6, frame) for frame in seen)


def test_an_ipv4_nic_leaves_the_nodes_autoconfigured_ipv6_default_route_alone(node: Node) -> None:
    """Forwarding on any one device makes the kernel drop the default routes that routers advertise."""
    node.uplink()
    oracle.sysctl("ipv6/conf/all/forwarding", 0)
    oracle.sysctl("ipv6/conf/eth0/accept_ra", 1)
    tools.ip("-6 route del default")
    client = node.listen()
    client.send(wire.router_advertisement(CLIENT_MAC, "fe80::1"))
    node.fence(client)
    while not (default := tools.ask("-6 route show default")):
        client.send(wire.router_advertisement(CLIENT_MAC, "fe80::1"))
    assert default[0]["protocol"] == "ra"
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    assert [route["gateway"] for route in tools.ask("-6 route show default")] == ["fe80::1"]


def test_a_tap_that_is_still_a_port_of_a_bridge_is_taken_off_it(uplinked: Node) -> None:
    """What comes in at a bridge port is the bridge's: the guest would not reach the node's routes."""
    nodes.add_bridge("br1")
    nodes.add_tap()
    tools.ip("link set tap0 master br1 up")
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert "master" not in oracle.link("tap0")
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize(
    "address",
    [
        "2001:DB8:0:0:0:0:0:8",
        "64:ff9b::192.0.2.8",
        "::ffff:192.0.2.8",
        "::192.0.2.8",
        "::2",
        "2001:db8:0:1:1:1:1:1",
        "169.254.7.7",
        "240.0.0.1",
        "192.0.2.8/31",
        "2001:db8::20/127",
    ],
)
def test_an_address_is_refused_or_the_second_run_finds_it_there(uplinked: Node, address: str) -> None:
    """An address has several spellings, and the kernel's need not be Python's."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[address])
    before = snapshots.snapshot()
    first = call("kvm-ifup-post", "tap0")
    if first.code == 65:
        return
    check(first, 0)
    wired = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


# --- the guest's IPv6 gateway -----------------------------------------------------------------------------

GATEWAY = "fe80::fc00:ff:fe35:ac01"  # what the tap's MAC gives: RFC 4291, appendix A


def link_locals(dev: str = "tap0") -> dict[str, bool]:
    """The link-local addresses of *dev*, and whether each is in use."""
    found = [info for one in tools.ask(f"-6 addr show dev {dev}") for info in one.get("addr_info", ())]
    return {one["local"]: not one.get("tentative") for one in found if one.get("scope") == "link"}


def answers(guest: wire.Tap) -> None:
    """The guest asks for its gateway, and is told the tap's MAC."""
    for _ in range(10):  # a tap that has just come up may not listen yet
        guest.send(wire.solicitation(GUEST_MAC, GUEST_IP6, GATEWAY))
        while wire.readable(guest.descriptor, 1):
            found = wire.advertisement(os.read(guest.descriptor, 65536))
            if found and found.target == GATEWAY:
                assert (found.mac, found.solicited) == (TAP_MAC, True)
                return
    pytest.fail("the gateway does not answer")


@pytest.mark.parametrize("link", [None, "100"])
def test_a_neighbour_that_asks_the_uplink_alone_is_answered(uplinked: Node, link: str | None) -> None:
    """So asks every neighbour before it forgets an entry; until the last NIC has gone."""
    if link:
        tools.ip(f"-6 rule add iif eth0 lookup {link} priority 9999")
    nodes.taps(["tap0", "tap1"])
    manager.write_nic(mode="routed", link=link, ip=[GUEST_IP6])
    manager.write_nic("tap1", "web2", mode="routed", ip=["2001:db8::9"], mac="aa:00:00:00:00:09")
    before = oracle.sysctl("ipv6/conf/all/proxy_ndp")
    assert before == "0"
    for tap in ("tap0", "tap1"):
        check(call("kvm-ifup-post", tap), 0)
    client = uplinked.listen()
    with uplinked.client:
        local = next(iter(link_locals("eth0")))
    multicast = wire.solicitation(CLIENT_MAC, local, GUEST_IP6)
    target = ipaddress.IPv6Address(GUEST_IP6).packed
    body = struct.pack("!BBHI16sBB6s", 135, 0, 0, 0, target, 1, 1, wire.mac_bytes(CLIENT_MAC))
    for question in (multicast, wire.icmp6(NODE_MAC, CLIENT_MAC, local, GUEST_IP6, body)):
        client.send(question)
        client.until(lambda frame: bool((na := wire.advertisement(frame)) and na.solicited and na.target == GUEST_IP6))
    check(call("kvm-ifdown", "tap0"), 0)
    assert oracle.sysctl("ipv6/conf/all/proxy_ndp") == "1"
    check(call("kvm-ifdown", "tap1"), 0)
    assert oracle.sysctl("ipv6/conf/all/proxy_ndp") == before


def test_an_ipv4_guest_leaves_ndp_alone(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.sysctl("ipv6/conf/all/proxy_ndp") == "0"


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("shape", ["one", "group", "blackhole beside"])
@pytest.mark.parametrize("link", [None, "100"])
def test_uplinks_are_found_through_nexthop_objects(uplinked: Node, mode: int, shape: str, link: str | None) -> None:
    """With compatibility mode 0 a route tells only the number of its nexthop object."""
    oracle.sysctl("ipv4/nexthop_compat_mode", mode)
    tools.ip("link add eth1 type veth peer name far")
    for dev in ("far", "eth1"):
        tools.ip(f"link set {dev} up")
    oracle.settle("eth1")
    tools.ip("addr add 203.0.113.2/24 dev eth1")
    tools.ip("addr add 2001:db8:1::2/64 dev eth1 nodad")
    for family, first, second in ((4, CLIENT_IP4, "203.0.113.1"), (6, CLIENT_IP6, "2001:db8:1::1")):
        oracle.sysctl(f"ipv{family}/conf/eth1/forwarding", 1)
        tools.ip(f"-{family} route del default")
        tools.ip(f"nexthop add id {family}1 via {first} dev eth0")
        tools.ip(f"nexthop add id {family}2 via {second} dev eth1")
        tools.ip(f"nexthop add id {family}3 group {family}1/{family}2")
        tools.ip(f"-{family} nexthop add id {family}4 blackhole")
        table = f"table {link or 'main'}"
        tools.ip(f"-{family} route add default nhid {family}{3 if shape == 'group' else 1} {table}")
        if shape == "blackhole beside":
            tools.ip(f"-{family} route add default nhid {family}4 metric 4000 {table}")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6], link=link)
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.proxies("eth0") == {GUEST_IP4, GUEST_IP6}
    assert oracle.proxies("eth1") == ({GUEST_IP4, GUEST_IP6} if shape == "group" else set())
    assert call("kvm-ifup", "show", "tap0").out.split()[-1] == "yes"


@pytest.mark.parametrize("accept_dad", [0, 1])
@pytest.mark.parametrize("mode", ["eui64", "none", "stable_secret", "random"])
def test_the_gateway_of_a_guest_is_the_same_whatever_the_nodes_default_is(
    uplinked: Node, mode: str, accept_dad: int
) -> None:
    if mode == "stable_secret":
        oracle.sysctl("ipv6/conf/default/stable_secret", "2001:db8::1:2:3")
    oracle.sysctl("ipv6/conf/default/addr_gen_mode", ["eui64", "none", "stable_secret", "random"].index(mode))
    oracle.sysctl("ipv6/conf/default/accept_dad", accept_dad)
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=[GUEST_IP6], incoming=True)
    before = snapshots.snapshot()
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert link_locals() == {GATEWAY: True}
    answers(guest)
    wired = snapshots.snapshot()
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("mode", ["eui64", "none", "random"])
def test_a_tap_that_was_up_gets_the_gateway_and_keeps_it_when_it_flaps(uplinked: Node, mode: str) -> None:
    guest = uplinked.guest()
    tools.ip(f"link set tap0 addrgenmode {mode} up")
    manager.write_nic(mode="routed", ip=[GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    assert link_locals()[GATEWAY]
    answers(guest)
    tools.ip("link set tap0 down")
    tools.ip("link set tap0 up")
    agents.until(lambda: link_locals() == {GATEWAY: True})  # the kernel looks first whether it is a duplicate
    answers(guest)


@pytest.mark.parametrize("ip", [[GUEST_IP4], [GUEST_IP6], IPS, ["198.51.100.0/29"]])
def test_nobody_is_asked_whether_the_taps_own_address_is_a_duplicate(uplinked: Node, ip: list[str]) -> None:
    """The guest, before it has arrived, would find the question waiting in its tap, and it ends as the guest's own."""
    for name, value in (("accept_dad", 1), ("dad_transmits", 1), ("router_solicitation_delay", 0)):
        oracle.sysctl(f"ipv6/conf/default/{name}", value)
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=ip, incoming=True)
    check(call("kvm-ifup-pre", "tap0"), 0)
    agents.until(lambda: link_locals() == {GATEWAY: True})
    last = wire.ethernet(GUEST_MAC, TAP_MAC, wire.ETH_P_FENCE, bytes(46))
    with contextlib.closing(wire.packet_socket("tap0")) as sender:
        sender.send(last)
    seen = guest.until(lambda frame: frame == last)
    assert not [frame for frame in seen if frame[12:14] == b"\x86\xdd" and frame[54] == 135]


# --- admission ------------------------------------------------------------------------------------------


def _forwarding_off(path: str) -> None:
    oracle.sysctl(path, 0)


ADMISSION: dict[str, tuple[Callable[[], object], dict[str, Any], dict[str, Any], list[str]]] = {
    "own IPv4 address": (lambda: None, {"ip": [NODE_IP4]}, {}, ["192.0.2.11/32", "this node's own address"]),
    "own IPv6 address": (lambda: None, {"ip": [NODE_IP6]}, {}, ["2001:db8::11/128", "this node's own address"]),
    "broadcast address": (lambda: None, {"ip": ["192.0.2.255"]}, {}, ["192.0.2.255/32", "broadcast"]),
    "IPv4 routed elsewhere": (
        lambda: tools.ip(f"route add {GUEST_IP4} via {CLIENT_IP4}"), {"ip": [GUEST_IP4]}, {},
        ["192.0.2.8/32", "already routed out of eth0"],
    ),
    "IPv6 routed elsewhere": (
        lambda: tools.ip(f"-6 route add {GUEST_IP6} via {CLIENT_IP6}"), {"ip": [GUEST_IP6]}, {},
        ["2001:db8::8/128", "already routed out of eth0"],
    ),
    "routed elsewhere in the table": (
        lambda: tools.ip(f"route add {GUEST_IP4} via {CLIENT_IP4} table 100"), {"ip": [GUEST_IP4], "link": "100"}, {},
        ["already routed out of eth0 in table 100"],
    ),
    "blackholed": (
        lambda: tools.ip(f"route add blackhole {GUEST_IP4}"), {"ip": [GUEST_IP4]}, {}, ["192.0.2.8/32"],
    ),
    "connected prefix": (lambda: None, {"ip": ["192.0.2.0/24"]}, {}, ["already routed out of eth0"]),
    "IPv4 forwarding off on the uplink": (
        lambda: _forwarding_off("ipv4/conf/eth0/forwarding"), {"ip": [GUEST_IP4]}, {},
        ["IPv4 forwarding is off on uplink eth0", "sysctl -w net.ipv4.conf.eth0.forwarding=1"],
    ),
    "IPv6 forwarding off on the uplink": (
        lambda: _forwarding_off("ipv6/conf/eth0/forwarding"), {"ip": [GUEST_IP6]}, {},
        ["IPv6 forwarding is off on uplink eth0", "net.ipv6.conf.eth0.forwarding=1"],
    ),
    "IPv6 forwarding off for all": (
        lambda: _forwarding_off("ipv6/conf/all/forwarding"), {"ip": [GUEST_IP6]}, {},
        ["net.ipv6.conf.all.forwarding=1"],
    ),
    "IPv6 off on the tap": (
        lambda: oracle.sysctl("ipv6/conf/tap0/disable_ipv6", 1), {"ip": [GUEST_IP6]}, {},
        ["IPv6 is off on tap0", "net.ipv6.conf.tap0.disable_ipv6=0"],
    ),
    "unknown table": (lambda: None, {"ip": [GUEST_IP4], "link": "nosuch"}, {}, ["no such routing table: nosuch"]),
    "uplink missing": (
        lambda: None, {"ip": [GUEST_IP4]}, {"routed": {"uplinks": ["eth7"]}}, ["no such uplink: eth7"],
    ),
    "uplink down": (
        lambda: tools.ip("link set eth0 down"), {"ip": [GUEST_IP4]}, {"routed": {"uplinks": ["eth0"]}},
        ["uplink eth0 is down", "ip link set eth0 up"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("case", ADMISSION)
def test_what_would_make_post_fail_is_found_by_pre_and_nothing_changes(uplinked: Node, program: str, case: str) -> None:
    setup, nic, settings, words = ADMISSION[case]
    nodes.add_tap()
    setup()
    manager.write_nic(mode="routed", incoming=True, **nic)
    config = manager.configuration(**settings)
    client = uplinked.listen()
    before = snapshots.snapshot()
    check(call(program, "tap0", config), 69, "web1.example.com/0 (tap0)", *words)
    assert snapshots.changes(before, snapshots.snapshot()) == []
    if "IPv4" in case:  # the link is up there
        assert announced(uplinked.fence(client)) == []


def test_the_hint_about_forwarding_is_right(uplinked: Node) -> None:
    """A command in a hint does what it promises, also for a name with a dot."""
    tools.ip("link add eth1.100 type veth peer name far")
    tools.ip("link set eth1.100 up")
    oracle.sysctl("ipv6/conf/eth1.100/disable_ipv6", 1)
    oracle.sysctl("ipv6/conf/all/forwarding", 0)
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    config = manager.configuration(routed={"uplinks": ["eth1.100"]})
    for _ in range(3):
        result = call("kvm-ifup-pre", "tap0", config)
        if result:
            break
        assert result.code == 69
        tools.run(*result.err.split("`")[1].split())
    assert result, result.err
    assert oracle.proxies("eth1.100") == {GUEST_IP4, GUEST_IP6}


@pytest.mark.parametrize("phase", ["kvm-ifup-pre", "kvm-ifup-post"])
def test_an_address_held_by_another_live_tap_is_refused_until_that_tap_is_gone(uplinked: Node, phase: str) -> None:
    nodes.taps(["tap0", "tap1"])
    manager.write_nic("tap0", "web1", mode="routed", ip=[GUEST_IP4], incoming=True)
    manager.write_nic("tap1", "web2", mode="routed", ip=["192.0.2.9", GUEST_IP4], incoming=True, link="100")
    check(call(phase, "tap0"), 0)
    hooks.reap()
    before = snapshots.snapshot()
    for program in ("kvm-ifup-pre", "kvm-ifup-post"):
        check(call(program, "tap1"), 69, "192.0.2.8/32", "web1/0 (tap0)")
        assert snapshots.changes(before, snapshots.snapshot()) == []
    tools.ip("link del tap0")
    check(call("kvm-ifup-post", "tap1"), 0)
    assert oracle.routes("tap1") == {"192.0.2.9", GUEST_IP4}
