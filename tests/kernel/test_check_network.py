"""`check` and `check --node` name what no hook mends: the node's routes, filters and bridges around a NIC."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable

import pytest

from harness import manager, nodes, oracle, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_MAC, FOREIGN_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_IP4
from harness.hooks import call, check
from harness.nodes import Node
from harness.oracle import sysctl
from tests.kernel.checking import BRIDGED, ROUTED, TABLE, dropped, found, found_on_node, text
from tests.kernel.checking import wire as wired
from tests.kernel.staging import NICS


def second_uplink(node: Node, name: str = "eth1", address: str = "198.51.100.11/24") -> None:
    """Another device with a network of its own, to the same client."""
    tools.ip(f"link add {name} type veth peer name {name} netns {node.client.path}")
    with node.client:
        tools.ip(f"link set {name} up")
    tools.ip(f"link set {name} up")
    oracle.settle(name)
    tools.ip(f"addr add {address} dev {name}")
    for family in (4, 6):
        sysctl(f"ipv{family}/conf/{name}/forwarding", 1)


# --- no address -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["off", "mac", "address"])
def test_a_guest_that_is_filtered_by_address_and_has_none_is_not_right(node: Node, kind: str) -> None:
    wired(node, BRIDGED, filter=kind)
    code, findings = found()
    assert ("the guest can send nothing" in text(findings)) == (kind == "address")
    assert code == (1 if kind == "address" else 0)
    assert ("has no address" in call("kvm-ifup-post", "tap0", "-v").err) == (kind == "address")


def test_a_routed_guest_without_an_address_is_told_and_not_wrong(uplinked: Node) -> None:
    nodes.add_tap()
    check(call("kvm-ifup-post", environ=manager.ganeti(MODE="routed", LINK="")), 0)
    code, findings = found()
    assert (code, "nothing is routed to the guest" in text(findings)) == (0, True)


# --- routed: no uplink in a family ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_a_family_that_never_had_an_uplink_is_not_right(uplinked: Node, family: int) -> None:
    tools.ip(f"-{family} route del default")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    code, findings = found()
    assert code == 1
    assert f"there is no IPv{family} default route, so no IPv{family} uplink is known" in text(findings)
    assert [one["drift"] for one in findings] == [False]
    assert f"no IPv{family} default route" in call("kvm-ifup", "show").out


@pytest.mark.parametrize("family", [4, 6])
def test_a_default_route_that_is_gone_for_now_is_said_and_not_wrong(node: Node, family: int) -> None:
    wired(node, ROUTED)
    before = oracle.proxies()
    tools.ip(f"-{family} route del default")
    code, findings = found()
    assert code == 0
    assert f"there is no IPv{family} default route" in text(findings)
    assert "what was done on the last one stays" in text(findings)
    assert oracle.proxies() == before


@pytest.mark.parametrize(
    ("fault", "words"),
    [("link set eth0 down", "answers for the guest, is down"), ("link del eth0", "answered for the guest, is gone")],
)
def test_an_uplink_that_has_gone_down_is_named(node: Node, fault: str, words: str) -> None:
    wired(node, ROUTED)
    tools.ip(fault)
    code, findings = found()
    assert code == 1
    assert f"eth0, where this node {words}" in text(findings)


def test_an_uplink_that_was_renamed_is_the_same_one(node: Node) -> None:
    wired(node, ROUTED, ip=[GUEST_IP4])
    tools.ip("link set eth0 name lan0")
    assert found() == (0, [])


def test_no_uplink_at_all_is_not_right(uplinked: Node) -> None:
    for family in (4, 6):
        tools.ip(f"-{family} route del default")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    code, findings = found()
    assert code == 1
    assert "there is no default route, so no uplink is known" in text(findings)
    assert call("kvm-ifup", "check", "--repair").code == 1


# --- routed: what the kernel does with packets ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blackhole", "unreachable", "prohibit"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_default_route_that_leads_nowhere_is_named(node: Node, kind: str, family: int) -> None:
    wired(node, TABLE)
    tools.ip(f"-{family} route add {kind} default table 100")
    line = f"the IPv{family} default route in table 100 is {kind}"
    code, findings = found()
    assert code == 1
    assert text(findings).count(line) == 1
    code, findings = found_on_node()
    assert code == 1
    assert text(findings).count(line) == 1


def test_one_that_leads_nowhere_in_the_table_main(node: Node) -> None:
    wired(node, ROUTED)
    tools.ip("route replace default via 192.0.2.1 metric 100")
    tools.ip("route add unreachable default metric 5")
    tools.ip("route del default metric 0")
    assert "the IPv4 default route in table 254 is unreachable" in text(found()[1])


def test_a_throw_is_said_and_not_wrong(node: Node) -> None:
    wired(node, TABLE)
    tools.ip("route add throw default table 100")
    code, findings = found()
    assert code == 0
    assert "the IPv4 default route in table 100 is throw" in text(findings)


def test_a_better_default_route_beside_one_that_leads_nowhere(node: Node) -> None:
    wired(node, TABLE)
    tools.ip(f"route add default via {CLIENT_IP4} dev eth0 table 100")
    tools.ip("route add unreachable default metric 4000 table 100")
    assert found() == (0, [])


@pytest.mark.parametrize("family", [4, 6])
def test_a_rule_that_refuses_what_the_guest_sends(node: Node, family: int) -> None:
    wired(node, ROUTED)
    tools.ip(f"-{family} rule add from {GUEST_IP4 if family == 4 else GUEST_IP6} priority 5 prohibit")
    code, findings = found()
    assert code == 1
    assert f"what the guest sends from {GUEST_IP4 if family == 4 else GUEST_IP6} to other networks" in text(findings)


@pytest.mark.parametrize("where", ["all", "eth1"])
def test_a_reverse_path_filter_that_drops_on_an_uplink(node: Node, where: str) -> None:
    """Two default routes: what comes in by the worse one would not go back that way."""
    wired(node, ROUTED, ip=[GUEST_IP4])
    second_uplink(node)
    tools.ip("route add default via 198.51.100.1 dev eth1 metric 100")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert found() == (0, [])
    sysctl(f"ipv4/conf/{where}/rp_filter", 1)
    line = "what comes in on eth1 from networks beyond 198.51.100.1 is dropped: reverse path filter"
    for code, findings in (found(), found_on_node()):
        assert code == 1
        assert line in text(findings)
    assert dropped(node, "eth1", "9.9.9.9")
    sysctl("ipv4/conf/eth1/rp_filter", 2)
    assert found() == (0, [])
    assert not dropped(node, "eth1", "9.9.9.9")


def test_a_reverse_path_filter_that_drops_the_neighbours(node: Node) -> None:
    """Two devices in one network: the way back leads out of the first."""
    wired(node, ROUTED, ip=[GUEST_IP4])
    second_uplink(node, address="192.0.2.12/24")
    settings = manager.configuration(routed={"uplinks": ["eth1"]})
    sysctl("ipv4/conf/eth1/rp_filter", 1)
    check(call("kvm-ifup-post", "tap0", settings), 0)
    code, findings = found(settings)
    assert code == 1
    assert "what comes in on eth1 from 192.0.2.0/24 is dropped" in text(findings)


def test_a_strict_filter_that_drops_nothing_is_not_named(node: Node) -> None:
    wired(node, ROUTED)
    sysctl("ipv4/conf/all/rp_filter", 1)
    sysctl("ipv4/conf/eth0/rp_filter", 1)
    assert found() == (0, [])


# --- routed: prefixes that neighbours ask for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "network"), [("192.0.2.64/29", "192.0.2.0/24"), ("2001:db8::40/124", "2001:db8::/64")]
)
def test_a_prefix_of_the_uplinks_own_network_is_named(node: Node, prefix: str, network: str) -> None:
    wired(node, ROUTED, ip=[GUEST_IP4, prefix])
    for code, findings in (found(), found_on_node()):
        assert code == 1
        assert f"{prefix} is part of {network}, the network of eth0" in text(findings)


def test_a_prefix_that_is_answered_for_or_lies_elsewhere(node: Node) -> None:
    wired(node, ROUTED, ip=[GUEST_IP4, "198.51.100.0/29", "192.0.2.64/29"])
    sysctl("ipv4/conf/eth0/proxy_arp", 1)
    assert found() == (0, [])
    sysctl("ipv4/conf/eth0/proxy_arp", 0)
    for number in range(64, 72):
        tools.ip(f"neigh add proxy 192.0.2.{number} dev eth0")
    assert found() == (0, [])


# --- bridged --------------------------------------------------------------------------------------------------


def test_a_bridge_without_an_uplink_is_named(node: Node) -> None:
    wired(node, BRIDGED)
    assert (found(), found_on_node()) == ((0, []), (found_on_node()[0], []))
    tools.ip("link del br0-up")
    code, findings = found()
    assert code == 0  # it may be meant
    assert "br0 has no port but guests' taps" in text(findings)
    assert not any(one["wrong"] for one in findings)
    assert "br0 has no port but guests' taps" in text(found_on_node()[1])
    tools.ip("addr add 203.0.113.1/24 dev br0")
    assert "reach nobody but each other and this node" in text(found_on_node()[1])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("br0-up down", "br0-up, an uplink of br0, is down"),
        ("br0-far down", "br0-up, an uplink of br0, has no carrier"),
    ],
)
def test_a_bridge_whose_uplink_does_not_work(node: Node, fault: str, words: str) -> None:
    wired(node, BRIDGED)
    tools.ip(f"link set {fault}")
    for code, findings in (found(), found_on_node()):
        assert code == 1
        assert words in text(findings)


def test_a_program_s_own_tap_may_be_the_uplink(node: Node) -> None:
    wired(node, BRIDGED)
    tools.ip("link del br0-up")
    tunnel = node.guest("vpn0")
    tools.ip("link set vpn0 master br0 up")
    oracle.settle("vpn0")
    assert found() == (0, [])
    tunnel.close()
    assert "vpn0, an uplink of br0, has no carrier" in text(found()[1])


def query() -> bytes:
    """A general MLD query: "who listens to what?" (RFC 2710)."""
    source, target = bytes.fromhex("fe80") + bytes(13) + b"\x09", bytes.fromhex("ff02") + bytes(13) + b"\x01"
    body = struct.pack("!BBHHH16x", 130, 0, 0, 1000, 0)
    total = sum(struct.unpack(f"!{(40 + len(body)) // 2}H", source + target + struct.pack("!II", len(body), 58) + body))
    total = ~((total >> 16) + (total & 0xFFFF)) & 0xFFFF
    body = body[:2] + struct.pack("!H", total) + body[4:]
    options = bytes([58, 0, 5, 2, 0, 0, 1, 0])  # hop by hop: router alert
    header = struct.pack("!IHBB", 6 << 28, len(options + body), 0, 1) + source + target
    return wire.ethernet("33:33:00:00:00:01", FOREIGN_MAC, wire.ETH_P_IPV6, header + options + body)


def asks_itself(_node: Node) -> None:
    tools.ip("link set br0 type bridge mcast_snooping 1 mcast_querier 1")


def neighbour_asks(_node: Node) -> None:
    tools.ip("link set br0 type bridge mcast_snooping 1 mcast_querier 0")
    with wire.packet_socket("br0-far") as sender:
        sender.send(query())


@pytest.mark.parametrize("querier", [asks_itself, neighbour_asks])
def test_multicast_that_is_snooped_is_named(node: Node, querier: Callable[[Node], None]) -> None:
    """If somebody has said that it does not matter. Else the guest gets all of it."""
    wired(node, BRIDGED)
    querier(node)
    words, off = "br0 snoops multicast", manager.configuration(**{"link.br0": {"multicast_router": False}})
    assert found() == (0, [])
    assert words not in text(found_on_node()[1])
    check(call("kvm-ifup-post", "tap0", off), 0)
    code, findings = found("tap0", off)
    assert code == 0  # the guest may have no IPv6
    assert words in text(findings)
    code, findings = found_on_node(off)
    assert code == 1
    assert words in text(findings)


def test_multicast_without_a_querier_or_snooping_is_flooded(node: Node) -> None:
    wired(node, BRIDGED)
    tools.ip("link set br0 type bridge mcast_snooping 0 mcast_querier 1")
    check(call("kvm-ifup-post", "tap0"), 0)  # which takes back that the bridge sends it all
    assert found() == (0, [])


# --- the same MAC twice -----------------------------------------------------------------------------------------


def test_two_guests_with_one_mac_on_a_bridge_name_each_other(node: Node) -> None:
    wired(node, BRIDGED)
    node.guest("tap1")
    manager.write_nic("tap1", "web2.example.com", **NICS[BRIDGED])
    check(call("kvm-ifup-post", "tap1"), 0)
    for tap, other in (("tap0", "web2.example.com/0 (tap1)"), ("tap1", "web1.example.com/0 (tap0)")):
        code, findings = found(tap)
        assert code == 1
        assert f"{other} has the same MAC {GUEST_MAC} on br0" in text(findings)


def test_two_guests_with_one_mac_on_two_bridges_are_right(node: Node) -> None:
    wired(node, BRIDGED)
    node.guest("tap1")
    manager.write_nic("tap1", "web2.example.com", mode="bridged", link="br1")
    check(call("kvm-ifup-post", "tap1"), 0)
    assert found("tap0") == found("tap1") == (0, [])


def test_a_guest_that_moves_within_its_node_is_right(node: Node) -> None:
    wired(node, BRIDGED)
    node.guest("tap1")
    manager.write_nic("tap1", "web1.example.com", 1, **NICS[BRIDGED], incoming=True)
    check(call("kvm-ifup-pre", "tap1"), 0)
    assert found("tap0") == found("tap1") == (0, [])


def test_a_machine_behind_the_uplink_with_the_guests_mac(node: Node) -> None:
    wired(node, BRIDGED)
    with wire.packet_socket("br0-far") as sender:
        sender.send(wire.arp_request(GUEST_MAC, GUEST_IP4, GUEST_IP4))
    code, findings = found()
    assert code == 1
    assert f"the guest's MAC {GUEST_MAC} was last seen on br0-up, not on tap0" in text(findings)
    node.taps[0].send(wire.arp_request(GUEST_MAC, GUEST_IP4, GUEST_IP4))
    assert found() == (0, [])


@pytest.mark.parametrize("dev", ["br0", "br0-up"])
def test_a_device_of_the_node_with_the_guests_mac(node: Node, dev: str) -> None:
    wired(node, BRIDGED)
    tools.ip(f"link set {dev} address {GUEST_MAC}")
    code, findings = found()
    assert code == 1
    assert f"of this node has the guest's MAC {GUEST_MAC}" in text(findings)


# --- --probe ----------------------------------------------------------------------------------------------------


def test_a_probe_does_not_blame_the_nodes_own_devices(node: Node) -> None:
    """Two uplinks in one segment: what goes out of one comes in on the other, and the node answers itself."""
    wired(node, ROUTED)
    tools.ip(f"link add eth1 type veth peer name far netns {node.client.path}")
    with node.client:
        tools.ip("link add sw type bridge")
        for port in ("eth0", "far"):
            tools.ip(f"link set {port} master sw up")
        tools.ip("link set sw up")
    tools.ip("link set eth1 up")
    oracle.settle("eth1")
    for family in (4, 6):
        sysctl(f"ipv{family}/conf/eth1/forwarding", 1)
    sysctl("ipv4/conf/eth1/accept_local", 1)
    settings = manager.configuration(routed={"uplinks": ["eth0", "eth1"]})
    check(call("kvm-ifup-post", "tap0", settings), 0)
    with wire.packet_socket("eth0") as heard, wire.packet_socket("eth0") as sender:
        sender.send(wire.arp_request(oracle.link("eth0")["address"], NODE_IP4, GUEST_IP4))
        while True:  # the case is there: the node's other device answers
            answer = wire.arp(heard.recv(2048))
            if answer and answer.op == 2 and answer.mac == oracle.link("eth1")["address"]:
                break
    assert [one for one in found("--probe", settings)[1] if "answers for" in one["what"]] == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("ip link set eth0 down", "Network is down"),
        (
            "nft table netdev x { chain e { type filter hook egress device eth0 priority 0; policy drop; }; }",
            "No buffer",
        ),
    ],
)
def test_a_probe_that_cannot_be_sent_is_no_answer_and_no_failure(node: Node, fault: str, words: str) -> None:
    wired(node, ROUTED)
    settings = manager.configuration(routed={"uplinks": ["eth0"]})
    program, _, arguments = fault.partition(" ")
    tools.run(program, *(arguments.split() if program == "ip" else [arguments]))
    findings = found("--probe", settings)[1]
    (one,) = [one for one in findings if one["what"] == "nobody could be asked on eth0"]
    assert words in one["why"]
    assert not one["wrong"]


@pytest.mark.parametrize("descriptors", [1100, 1500])
def test_a_probe_of_a_process_with_many_descriptors(node: Node, descriptors: int) -> None:
    wired(node, ROUTED)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2048, limits[0]), max(2048, limits[1])))
    opened = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(descriptors)]
    try:
        assert found("--probe") == (0, [])
        with node.client:
            tools.ip(f"addr add {GUEST_IP4}/32 dev eth0")
        assert f"{CLIENT_MAC} on eth0 answers for {GUEST_IP4}, too" in text(found("--probe")[1])
    finally:
        for one in opened:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- rules of others --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("", "from 192.0.2.0/24 priority 20000"),
        ("", "fwmark 1 priority 32764"),
        ("-6 ", "iif tap0 tos 8 priority 10001"),
    ],
)
def test_a_rule_that_comes_after_ours_is_told(node: Node, family: str, rule: str) -> None:
    wired(node, TABLE)
    tools.ip(f"{family}rule add {rule} lookup 200")
    number = rule.split()[-1]
    assert found()[0] == 0
    for _, findings in (found(), found_on_node()):
        assert f"policy rule {number} comes after those of guests with a table, which are at 10000" in text(findings)
    config = manager.configuration(routed={"rule_priority": int(number) + 1})
    check(call("kvm-ifup-post", "tap0", config), 0)
    assert found(config) == (0, [])


@pytest.mark.parametrize("rule", ["iif eth0 priority 20000", "oif eth0 priority 20000", "from 192.0.2.0/24 priority 9"])
def test_a_rule_that_we_do_not_overtake_is_not(node: Node, rule: str) -> None:
    wired(node, TABLE)
    tools.ip(f"rule add {rule} lookup 200")
    assert found() == (0, [])
