"""Hints are tried: after the command that a finding prints, the finding is gone, and nothing else is wrong instead."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness import manager, nodes, oracle, tools, wire
from harness.addresses import CLIENT_IP6, CLIENT_MAC, GUEST_IP4, GUEST_IP6
from harness.agents import until
from harness.hooks import call, check
from harness.nodes import Node
from harness.oracle import sysctl
from tests.kernel.checking import BRIDGED, ROUTED, TABLE, Findings, found, found_on_node, netdev, qemu
from tests.kernel.checking import wire as wired
from tests.kernel.staging import NICS


@dataclass(frozen=True)
class Case:
    """A NIC of the kind *nic*, wired by *program*; *plant* makes what *words* tell; *where* it is said."""

    nic: str
    plant: Callable[[Node], None]
    words: str
    where: Callable[[], tuple[int, Findings]] = found
    program: str = "kvm-ifup-post"
    more: dict[str, Any] = field(default_factory=dict)


def do(*lines: str) -> Callable[[Node], None]:
    """Commands."""

    def plant(_node: Node) -> None:
        for line in lines:
            tools.run("sh", "-c", line)

    return plant


def learnt_default_route(node: Node) -> None:
    """The node has its IPv6 default route from a router's advertisement, and forwards nothing yet."""
    tools.ip("-6 route del default")
    for name, value in (("all/forwarding", 0), ("eth0/accept_ra", 1)):
        sysctl(f"ipv6/conf/{name}", value)
    with node.client, wire.packet_socket("eth0") as router:
        router.send(wire.router_advertisement(CLIENT_MAC, "fe80::ff"))
    until(lambda: tools.ask("-6 route show default") != [])


def not_wired(node: Node) -> None:
    tools.ip("link del tap0")
    node.taps[0].close()
    assert call("kvm-ifup", "gc").code == 0
    node.guest()


def second_default(node: Node) -> None:
    """Another uplink whose traffic would go back by the first one."""
    tools.ip(f"link add eth1 type veth peer name eth1 netns {node.client.path}")
    with node.client:
        tools.ip("link set eth1 up")
    tools.ip("link set eth1 up")
    oracle.settle("eth1")
    tools.ip("addr add 198.51.100.11/24 dev eth1")
    sysctl("ipv4/conf/eth1/forwarding", 1)
    tools.ip("route add default via 198.51.100.1 dev eth1 metric 100")
    assert call("kvm-ifup-post", "tap0").code == 0
    sysctl("ipv4/conf/eth1/rp_filter", 1)


V4 = {"ip": [GUEST_IP4]}
CASES = {
    "bridge down": Case(BRIDGED, do("ip link set br0 down"), "bridge br0 is down"),
    "bridge down, node": Case(BRIDGED, do("ip link set br0 down"), "br0 is down", found_on_node),
    "no bridge": Case(BRIDGED, do("ip link del br0"), "no such bridge: br0"),
    "no bridge, node": Case(BRIDGED, do("ip link del br0"), "there is no bridge br0", found_on_node),
    "STP, node": Case(BRIDGED, do("ip link set br0 type bridge stp_state 1"), "forwards after 30 s", found_on_node),
    "bridge's uplink down": Case(BRIDGED, do("ip link set br0-up down"), "an uplink of br0, is down"),
    "IPv4 forwarding": Case(ROUTED, do("sysctl -qw net.ipv4.conf.eth0.forwarding=0"), "IPv4 forwarding is off"),
    "IPv4 forwarding, all": Case(ROUTED, do("sysctl -qw net.ipv4.ip_forward=0"), "IPv4 forwarding is off"),
    "IPv6 forwarding": Case(ROUTED, do("sysctl -qw net.ipv6.conf.all.forwarding=0"), "IPv6 forwarding is off"),
    "IPv6 forwarding, learnt route": Case(ROUTED, learnt_default_route, "IPv6 forwarding is off"),
    "IPv6 forwarding, learnt route, node": Case(ROUTED, learnt_default_route, "IPv6 forwarding is off", found_on_node),
    "IPv6 off": Case(ROUTED, do("sysctl -qw net.ipv6.conf.tap0.disable_ipv6=1"), "IPv6 is off on tap0"),
    "uplink down": Case(ROUTED, do("ip link set eth0 down"), "where this node answers for the guest, is down"),
    "rp_filter of all": Case(
        ROUTED, do("sysctl -qw net.ipv4.conf.all.rp_filter=2"), "rp_filter on tap0 is loose in effect"
    ),
    "rp_filter of an uplink": Case(ROUTED, second_default, "reverse path filter", more=V4),
    "rp_filter of an uplink, node": Case(ROUTED, second_default, "reverse path filter", found_on_node, more=V4),
    "nobody looks the table up": Case(TABLE, do("ip rule del iif eth0 lookup 100"), "does not go out of tap0"),
    "nobody looks the table up, IPv6": Case(TABLE, do("ip -6 rule del iif eth0 lookup 100"), "does not go out of tap0"),
    **{
        f"{kind} default, IPv{family}": Case(
            TABLE, do(f"ip -{family} route add {kind} default table 100"), f"default route in table 100 is {kind}"
        )
        for kind in ("blackhole", "unreachable", "prohibit")
        for family in (4, 6)
    },
    "prefix of the uplink's network": Case(
        ROUTED, do("true"), "192.0.2.64/29 is part of", more={"ip": [GUEST_IP4, "192.0.2.64/29"]}
    ),
    "proxy_delay": Case(ROUTED, do("sysctl -qw net.ipv4.neigh.eth0.proxy_delay=80"), "proxy_delay", found_on_node),
    "file of others": Case(ROUTED, do("chmod o+w /run/kvm-ifup/nic/*/0.toml"), "not to be trusted", found_on_node),
    "tap gone": Case(ROUTED, do("ip link del tap0"), "its tap is gone"),
    **{f"never wired, {nic}": Case(nic, not_wired, "nothing has wired it") for nic in NICS},
}


def commands(finding: dict[str, Any]) -> list[str]:
    """The commands that a finding prints, the best one first."""
    return re.findall(r"`([^`]+)`", finding["mend"])


def follow(command: str) -> None:
    """Type it, as it is printed."""
    scripts = f"{tools.SCRIPTS}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", command], env={"PATH": scripts, "LC_ALL": "C"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def wrong(findings: Findings) -> set[str]:
    """What is wrong and no hook mends."""
    return {one["what"] for one in findings if one["wrong"] and not one["drift"]}


@pytest.mark.parametrize("name", CASES)
def test_what_a_hint_says_mends_it(node: Node, name: str) -> None:
    case = CASES[name]
    wired(node, case.nic, case.program, **case.more)
    case.plant(node)
    routes = default_routes()
    _, before = case.where()
    said = [one for one in before if case.words in one["what"]]
    assert said, before
    assert commands(said[0]), said
    others = wrong(before) - {one["what"] for one in said}
    for one in said:
        follow(commands(one)[0])
    try:
        _, after = case.where()
    except (AssertionError, ValueError):  # it is about nothing any more: there is no such NIC
        assert name == "tap gone"
        return
    assert [one for one in after if case.words in one["what"]] == []
    assert wrong(after) <= others
    assert default_routes() >= routes


@pytest.mark.parametrize(
    ("nic", "fault", "reason"),
    [
        (BRIDGED, "ip link del br0", "no such bridge: br0"),
        (BRIDGED, "ip link set br0 down", "bridge br0 is down"),
        (ROUTED, "sysctl -qw net.ipv4.conf.eth0.forwarding=0", "IPv4 forwarding is off"),
    ],
)
def test_a_tap_that_no_hook_can_wire_is_told_with_the_reason(node: Node, nic: str, fault: str, reason: str) -> None:
    """As after a hook that has failed, of whose sentence nobody knows any more."""
    wired(node, nic)
    check(call("kvm-ifdown", "tap0"), 0)
    follow(fault)
    check(call("kvm-ifup-pre", "tap0"), 69, reason)
    (one,) = found()[1]
    assert reason in one["what"]
    first, *_, last = commands(one)
    assert last == "kvm-ifup-pre tap0"
    follow(first)
    follow(last)
    assert found()[0] == 0


def default_routes() -> set[str]:
    """The default routes of the node."""
    found = [(family, one) for family in (4, 6) for one in tools.ask(f"-{family} route show default")]
    return {f"IPv{family} {one['dev']} {one.get('protocol', 'boot')}" for family, one in found}


def test_the_hint_for_a_guest_that_runs_here_already(node: Node) -> None:
    wired(node, ROUTED, "kvm-ifup-pre", incoming=True)
    node.taps[0].close()
    with qemu(*netdev()):
        (one,) = found()[1]
        follow(commands(one)[0])
        assert found() == (0, [])


def test_forwarding_turned_on_by_a_hooks_hint_keeps_the_default_route(uplinked: Node) -> None:
    """Without accept_ra=2 the kernel forgets it, and ignores the router from then on."""
    learnt_default_route(uplinked)
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP6])
    refused = call("kvm-ifup-post", "tap0")
    assert refused.code == 69
    follow(re.findall(r"`([^`]+)`", refused.err)[0])
    assert default_routes() >= {"IPv6 eth0 ra"}
    assert call("kvm-ifup-post", "tap0").code == 0
    assert sysctl("ipv6/conf/eth0/accept_ra") == "2"


def test_a_static_default_route_needs_no_other_accept_ra(uplinked: Node) -> None:
    sysctl("ipv6/conf/all/forwarding", 0)
    sysctl("ipv6/conf/eth0/accept_ra", 0)
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP6])
    refused = call("kvm-ifup-post", "tap0")
    assert refused.code == 69
    assert "accept_ra" not in refused.err
    assert CLIENT_IP6 in str(tools.ask("-6 route show default"))
