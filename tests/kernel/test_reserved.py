"""Addresses that are nobody's to give: the node's own, its gateways', networks', and other NICs'."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from harness import manager, nodes, oracle, snapshots, tools
from harness.addresses import CLIENT_IP4, CLIENT_IP6, GUEST_IP4, GUEST_IP6, NODE_IP4, NODE_IP6
from harness.hooks import call, check
from harness.nodes import Node

pytestmark = pytest.mark.userns  # writes sysctls, of which a user namespace does not own all

OWN, GATEWAY = "this node's own address", "the gateway of a default route"
# What is set up, as arguments of `ip`; the NIC's link and address; what the refusal says.
RESERVED: dict[str, tuple[Sequence[str], str | None, str, str]] = {
    "own, IPv4": ((), None, NODE_IP4, OWN),
    "own, in another table": ((), "100", NODE_IP4, OWN),
    "own, IPv6": ((), "100", NODE_IP6, OWN),
    "own, device down": (("link add name d type bridge", "addr add 198.51.100.7/24 dev d"), None, "198.51.100.7", OWN),
    "own, device down, IPv6": (
        ("link add name d type bridge", "addr add 2001:db8:7::7/64 dev d"), None, "2001:db8:7::7", OWN,
    ),
    "prefix over own": (("addr add 198.51.100.1/32 dev lo",), None, "198.51.100.0/29", f"covers 198.51.100.1, {OWN}"),
    "prefix over own, IPv6": (("addr add 2001:db8:7::1/128 dev lo",), None, "2001:db8:7::/64", OWN),
    "gateway, IPv4": ((), None, CLIENT_IP4, GATEWAY),
    "gateway, IPv6": ((), None, CLIENT_IP6, GATEWAY),
    "gateway, NIC in another table": ((), "100", CLIENT_IP4, GATEWAY),
    "gateway of another table": (("route add default via 192.0.2.2 dev eth0 table 77",), None, "192.0.2.2", GATEWAY),
    "gateway of another table, IPv6": (
        ("-6 route add default via 2001:db8::2 dev eth0 table 77",), "100", "2001:db8::2", GATEWAY,
    ),
    "gateway, one of several": (
        ("route add default table 77 nexthop via 192.0.2.2 dev eth0 nexthop via 192.0.2.3 dev eth0",),
        None, "192.0.2.3", GATEWAY,
    ),
    "gateway, by object": (
        ("nexthop add id 7 via 192.0.2.4 dev eth0", "route add default nhid 7 table 77"), None, "192.0.2.4", GATEWAY,
    ),
    "gateway, by group": (
        (
            "nexthop add id 7 via 2001:db8::4 dev eth0", "nexthop add id 8 group 7",
            "-6 route add default nhid 8 table 77",
        ),
        None, "2001:db8::4", GATEWAY,
    ),
    "gateway, via inet6": (
        ("route add default via inet6 2001:db8::5 dev eth0 table 77",), None, "2001:db8::5", GATEWAY,
    ),
    "prefix over a gateway": ((), "100", "192.0.2.0/29", f"covers {CLIENT_IP4}, {GATEWAY}"),
    "prefix over a gateway, IPv6": ((), "100", "2001:db8::/125", GATEWAY),
    "broadcast": ((), None, "192.0.2.255", "broadcast address"),
    "broadcast of a device that is down": (
        ("link add name d type bridge", "addr add 198.51.100.7/24 dev d"), None, "198.51.100.255", "broadcast address",
    ),
    "prefix over a broadcast": ((), "100", "192.0.2.252/30", "covers 192.0.2.255"),
    "local, one of many": (("route add local 198.51.100.0/24 dev lo",), None, "198.51.100.7", OWN),
    "local, prefix within": (
        ("route add local 198.51.100.0/24 dev lo",), "100", "198.51.100.8/29", "is within 198.51.100.0/24",
    ),
    "local, prefix within, IPv6": (
        ("-6 route add local 2001:db8:7::/48 dev lo",), None, "2001:db8:7:1::/64", "is within 2001:db8:7::/48",
    ),
    "local, prefix over": (
        ("route add local 198.51.100.4 dev lo",), None, "198.51.100.0/29", f"covers 198.51.100.4, {OWN}",
    ),
    "local, prefix over, IPv6": (
        ("-6 route add local 2001:db8:7::4 dev lo",), "100", "2001:db8:7::/64", f"covers 2001:db8:7::4, {OWN}",
    ),
    "network": ((), None, "192.0.2.0", "the address of the network 192.0.2.0/24"),
}  # fmt: skip


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("compatible", [0, 1])
@pytest.mark.parametrize("case", RESERVED)
def test_what_is_not_to_be_given_is_refused(uplinked: Node, case: str, compatible: int, program: str) -> None:
    setup, link, address, words = RESERVED[case]
    if not compatible and "nexthop" not in " ".join(setup):
        return
    oracle.sysctl("ipv4/nexthop_compat_mode", compatible)
    for line in setup:
        tools.ip(line)
    nodes.add_tap()
    manager.write_nic(mode="routed", link=link, ip=[address], incoming=True)
    before = snapshots.snapshot()
    check(call(program, "tap0"), 69, "web1.example.com/0 (tap0)", words)
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize(
    ("setup", "address"),
    [
        ("route add 198.51.100.0/24 via 192.0.2.8 dev eth0", GUEST_IP4),  # a guest that is a router
        ("route add default via 192.0.2.8 dev tap0 onlink table 77", GUEST_IP4),  # also for others
        ("addr add 198.51.100.6/31 dev eth0", "198.51.100.7"),  # a network of two has no broadcast address
        ("addr add 198.51.100.7/32 dev eth0", "198.51.100.6"),
        ("route add 198.51.100.0/24 dev eth0", "198.51.100.255"),  # no network of the node's own
        ("link set lo up", "192.0.2.248/30"),
    ],
)
def test_what_a_guest_may_have_is_not_refused(uplinked: Node, setup: str, address: str) -> None:
    nodes.add_tap()
    tools.ip("link set tap0 up")
    tools.ip(setup)
    manager.write_nic(mode="routed", ip=[address])
    for _ in range(2):
        check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.routes("tap0", "main") == {address}


@pytest.mark.parametrize("ip", [GUEST_IP4, GUEST_IP6, "198.51.100.0/29", "2001:db8:7::/64"])
def test_what_becomes_the_nodes_own_is_what_hooks_and_check_say(uplinked: Node, ip: str) -> None:
    """They ask in different ways: a hook about one address, check for all at once."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[ip])
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("route add local 192.0.2.8 dev lo")
    tools.ip("route add local 198.51.100.4 dev lo")
    tools.ip("-6 route add local 2001:db8::8 dev lo")
    tools.ip("-6 route add local 2001:db8:7::/48 dev lo")
    why = json.loads(call("kvm-ifup-post", "tap0", "--json").out)["cause"]
    assert OWN in why
    shown = call("kvm-ifup", "check", "tap0")
    assert (shown.code, why in shown.out) == (1, True), shown


# --- other NICs' -------------------------------------------------------------------------------------------

OVERLAPS = [
    ([GUEST_IP4], [GUEST_IP4]),
    ([GUEST_IP6], ["2001:db8::9", GUEST_IP6]),
    (["198.51.100.0/29"], ["198.51.100.3"]),
    (["198.51.100.3"], ["198.51.100.0/29"]),
    (["198.51.100.0/24"], ["198.51.100.64/26"]),
    (["2001:db8:7::/64"], ["2001:db8:7::1"]),
    (["2001:db8:7:1::/64"], ["2001:db8:7::/48"]),
]
SITES = {"ext": {"red": {"mode": "routed", "link": "100"}, "blue": {"mode": "routed", "link": "200"}}}


def sites() -> str:
    """A configuration with two networks, each in a table of its own."""
    from pathlib import Path

    config = manager.configuration()
    sections = [f'[ext.{name}]\nmode = "routed"\nlink = "{site["link"]}"\n' for name, site in SITES["ext"].items()]
    Path(config.partition("=")[2]).write_text("".join(sections))
    return config


def two(ours: list[str], theirs: list[str], instances: tuple[str, str], *, ext: bool) -> None:
    """Two NICs, on tap0 and tap1."""
    nodes.taps(["tap0", "tap1"])
    for number, (tap, ip, instance, site) in enumerate(
        zip(("tap0", "tap1"), (ours, theirs), instances, SITES["ext"], strict=True)
    ):
        link = site if ext else SITES["ext"][site]["link"]
        mac = f"aa:00:00:00:00:0{number}"
        manager.write_nic(tap, instance, number, mode="ext" if ext else "routed", link=link, ip=ip, mac=mac)


@pytest.mark.parametrize("ext", [False, True])
@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize(("ours", "theirs"), OVERLAPS)
def test_two_nics_of_an_instance_do_not_share_an_address(
    uplinked: Node, ours: list[str], theirs: list[str], program: str, ext: bool
) -> None:
    """Neither in one table nor in two; and neither of them is wired."""
    two(ours, theirs, ("web1", "web1"), ext=ext)
    config = sites()
    before = snapshots.snapshot()
    result = call(program, "--instance", "web1", config)
    if not ext and set(ours) & set(theirs):
        check(result, 65, "web1: two of its NIC files name")  # seen before anything else
    else:
        check(result, 69, "web1/0 (tap0)", "web1/1 (tap1)")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("ext", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), OVERLAPS)
def test_nobody_gets_what_another_nic_has(uplinked: Node, ours: list[str], theirs: list[str], ext: bool) -> None:
    two(ours, theirs, ("web1", "web2"), ext=ext)
    config = sites()
    check(call("kvm-ifup-post", "tap0", config), 0)
    before = snapshots.snapshot()
    for program in ("kvm-ifup-pre", "kvm-ifup-post"):
        check(call(program, "tap1", config), 69, "web2/1 (tap1)", "web1/0 (tap0)")
        assert snapshots.changes(before, snapshots.snapshot()) == []
    tools.ip("link del tap0")
    check(call("kvm-ifup-post", "tap1", config), 0)


def test_what_is_beside_each_other_is_fine(uplinked: Node) -> None:
    two(["198.51.100.0/29", GUEST_IP4, "198.51.100.2"], ["198.51.100.8/29", "192.0.2.9"], ("web1", "web1"), ext=False)
    check(call("kvm-ifup-post", "--instance", "web1"), 0)
    check(call("kvm-ifup-post", "--instance", "web1"), 0)
