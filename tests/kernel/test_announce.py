"""Announcements: after the route and the proxy entry, five rounds, only when something changed."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from harness import disturb, hooks, manager, nodes, oracle, snapshots, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_MAC, TAP_MAC
from harness.hooks import call, check, hook
from harness.nodes import Node

pytestmark = pytest.mark.userns  # sends through raw sockets

ROUNDS = 5
IPS = [GUEST_IP4, GUEST_IP6]


def garps(frames: Sequence[bytes], address: str = GUEST_IP4) -> list[wire.Arp]:
    """The ARP messages that announce *address* to everybody."""
    return [one for one in map(wire.arp, frames) if one and one.sender == one.target == address]


def asked(frames: Sequence[bytes]) -> list[tuple[str, str, str, str]]:
    """(MAC, sender, target, MAC in the message) of the questions that are asked in a guest's name."""
    found = [
        (frame[6:12].hex(":"), one.sender, one.target, one.mac)
        for frame in frames
        if (one := wire.arp(frame)) and one.op == 1 and one.sender != one.target and one.sender in IPS
    ]
    for frame in frames:
        if frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] == 135:
            source, target = (str(ipaddress.IPv6Address(frame[at : at + 16])) for at in (22, 62))
            if source in IPS:
                assert frame[78:80] == b"\x01\x01"  # source link-layer address
                found.append((frame[6:12].hex(":"), source, target, frame[80:86].hex(":")))
    return found


def nas(frames: Sequence[bytes], address: str = GUEST_IP6) -> list[wire.Advertisement]:
    """The neighbour advertisements about *address*."""
    return [one for one in map(wire.advertisement, frames) if one and one.target == address]


@pytest.fixture
def routed(uplinked: Node) -> Node:
    """A node with a tap and the file of a routed NIC that comes in."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    return uplinked


@pytest.fixture
def client(routed: Node) -> wire.Wire:
    """What the client hears."""
    return routed.listen()


def test_post_sends_five_rounds_of_gratuitous_arp_and_unsolicited_na(routed: Node, client: wire.Wire) -> None:
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.wait_for_children()
    heard = routed.fence(client)
    assert garps(heard) == [wire.Arp("ff:ff:ff:ff:ff:ff", 1, NODE_MAC, GUEST_IP4, GUEST_IP4)] * ROUNDS
    assert len(nas(heard)) == ROUNDS
    (na,) = set(nas(heard))
    assert (na.target_frame, na.destination, na.hop_limit) == ("33:33:00:00:00:01", "ff02::1", 255)
    assert na.source.startswith("fe80:")
    assert (na.solicited, na.override, na.mac) == (False, True, NODE_MAC)
    assert na.checksum_right


def test_each_gateway_is_asked_in_the_guests_name(routed: Node, client: wire.Wire) -> None:
    """Some routers ignore announcements; every one takes the sender's MAC out of a question."""
    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert asked(routed.fence(client)) == []
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.wait_for_children()
    heard = asked(routed.fence(client))
    assert set(heard) == {
        (NODE_MAC, GUEST_IP4, CLIENT_IP4, NODE_MAC),
        (NODE_MAC, GUEST_IP6, CLIENT_IP6, NODE_MAC),
    }
    assert len(heard) == 2 * ROUNDS


@pytest.mark.parametrize("accept", ["arp_accept", "drop_gratuitous_arp"])
def test_a_router_that_ignores_announcements_learns_where_the_guest_is(routed: Node, accept: str) -> None:
    with routed.client:
        if accept == "drop_gratuitous_arp":
            oracle.sysctl("ipv4/conf/eth0/drop_gratuitous_arp", 1)
            oracle.sysctl("ipv6/conf/eth0/drop_unsolicited_na", 1)
        # It does not hear a question about an address that it is still checking.
        while any("tentative" in info for one in tools.ask("addr show dev eth0") for info in one["addr_info"]):
            pass
        for address in IPS:
            tools.ip(f"neigh replace {address} lladdr 02:00:00:00:00:99 nud stale dev eth0")
    check(call("kvm-ifup-post", "tap0"), 0)
    with routed.client:
        assert {one["dst"]: one["lladdr"] for one in tools.ask("neigh show dev eth0") if one["dst"] in IPS} == {
            GUEST_IP4: NODE_MAC,
            GUEST_IP6: NODE_MAC,
        }


@pytest.mark.parametrize("how", ["main", "table", "link-local", "several", "objects", "configured"])
def test_the_gateways_are_those_of_the_uplinks_default_routes(routed: Node, client: wire.Wire, how: str) -> None:
    table, config, gateways = None, manager.configuration(), {CLIENT_IP4, CLIENT_IP6}
    if how == "table":
        table, gateways = "100", {"192.0.2.2", "2001:db8::2"}
        tools.ip("route add default via 192.0.2.2 dev eth0 table 100")
        tools.ip("-6 route add default via 2001:db8::2 dev eth0 table 100")
    elif how == "link-local":
        gateways = {CLIENT_IP4, "fe80::99"}
        tools.ip("-6 route del default")
        tools.ip("-6 route add default via fe80::99 dev eth0")
    elif how == "several":
        gateways = {"192.0.2.2", "192.0.2.3", CLIENT_IP6}
        tools.ip("route del default")
        tools.ip("route add default nexthop via 192.0.2.2 dev eth0 nexthop via 192.0.2.3 dev eth0")
    elif how == "objects":
        gateways = {"192.0.2.2", CLIENT_IP6}
        oracle.sysctl("ipv4/nexthop_compat_mode", 0)
        tools.ip("route del default")
        tools.ip("nexthop add id 7 via 192.0.2.2 dev eth0")
        tools.ip("route add default nhid 7")
    elif how == "configured":
        config = manager.configuration(routed={"uplinks": ["eth0"]})
    manager.write_nic(mode="routed", ip=IPS, link=table)
    check(call("kvm-ifup-post", "tap0", config), 0)
    assert {target for _, _, target, _ in asked(routed.fence(client))} == gateways


def test_on_an_uplink_without_link_local_address_the_na_is_from_the_guests_own(routed: Node) -> None:
    tools.ip("-6 addr flush dev eth0 scope link")
    client = routed.listen()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert [one.source for one in nas(routed.fence(client))] == [GUEST_IP6]


def test_the_clients_kernel_moves_the_guest_to_the_nodes_mac(routed: Node) -> None:
    """Its neighbour cache judges whether the messages are valid, the NA's checksum and Override included."""
    with routed.client:
        for address in IPS:
            tools.ip(f"neigh replace {address} lladdr 02:00:00:00:00:99 nud stale dev eth0")
    check(call("kvm-ifup-post", "tap0"), 0)
    with routed.client:
        assert {one["dst"]: one["lladdr"] for one in tools.ask("neigh show dev eth0") if one["dst"] in IPS} == {
            GUEST_IP4: NODE_MAC,
            GUEST_IP6: NODE_MAC,
        }


def test_announcements_are_sent_after_the_route_and_the_proxy_entry_are_in(routed: Node, client: wire.Wire) -> None:
    seen: list[bool] = []

    def look(_number: int, op: Any) -> None:
        if type(op).__name__ == "Announce":
            assert garps(routed.fence(client)) == []
            seen.append(oracle.routes("tap0") == set(IPS) == oracle.proxies("eth0"))

    with disturb.disturbed(before=look):
        check(call("kvm-ifup-post", "tap0"), 0)
    assert seen == [True]
    assert len(garps(routed.fence(client))) == 1


def test_a_post_that_fails_before_it_announces_is_silent_on_the_wire(routed: Node, client: wire.Wire) -> None:
    def look(number: int, op: Any) -> None:
        if type(op).__name__ == "ProxyNeighbour":
            disturb.refuse(number)(number, op)

    with disturb.disturbed(before=look):
        check(call("kvm-ifup-post", "tap0"), 71)
    heard = routed.fence(client)
    assert garps(heard) == []
    assert nas(heard) == []


LOST = {
    "a setting of the tap": ("echo 1 > /proc/sys/net/ipv6/conf/tap0/accept_dad", False),
    "another one": ("echo 0 > /proc/sys/net/ipv4/conf/tap0/forwarding", False),
    "IPv6 sources": ("nft delete table inet kvm-ifup", False),
    "a proxy neighbour": (f"ip neigh del proxy {GUEST_IP4} dev eth0", True),
    "a route": (f"ip route del {GUEST_IP4}", True),
    "a setting of the uplink": ("echo 80 > /proc/sys/net/ipv4/neigh/eth0/proxy_delay", True),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_is_between_the_guest_and_its_node_is_no_reason_to_announce_it(routed: Node, lost: str) -> None:
    """A newer version may have one more setting: else all guests would be announced when it is installed."""
    command, told = LOST[lost]
    manager.write_nic(mode="routed", ip=IPS)
    check(call("kvm-ifup-post", "tap0"), 0)
    whole, client = snapshots.snapshot_of_kernel(), routed.listen()
    tools.run("sh", "-c", command)
    assert snapshots.changes(whole, snapshots.snapshot_of_kernel()) != []
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.wait_for_children()
    assert len(garps(routed.fence(client))) == (ROUNDS if told else 0)
    assert snapshots.changes(whole, snapshots.snapshot_of_kernel()) == []


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
def test_a_no_op_is_silent_on_the_wire_and_announce_is_not(routed: Node, program: str) -> None:
    manager.write_nic(mode="routed", ip=IPS)
    check(call("kvm-ifup-post", "tap0"), 0)
    client = routed.listen()
    check(hook(program, "tap0"), 0)
    hooks.wait_for_children()
    heard = routed.fence(client)
    assert garps(heard) == []
    assert nas(heard) == []
    before = snapshots.snapshot()
    check(hook(program, "--announce", "tap0"), 0)
    hooks.wait_for_children()
    heard = routed.fence(client)
    assert len(garps(heard)) == ROUNDS
    assert len(nas(heard)) == ROUNDS
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_announce_with_pre_on_an_incoming_nic_says_nothing(routed: Node, client: wire.Wire) -> None:
    """The guest still runs elsewhere, whatever is asked for."""
    check(hook("kvm-ifup-pre", "--announce", "tap0"), 0)
    hooks.wait_for_children()
    heard = routed.fence(client)
    assert garps(heard) == []
    assert nas(heard) == []


def test_a_prefix_is_not_announced(routed: Node, client: wire.Wire) -> None:
    manager.write_nic(mode="routed", ip=["198.51.100.0/29", "2001:db8:1::/64"])
    check(call("kvm-ifup-post", "tap0"), 0)
    heard = routed.fence(client)
    assert not [one for one in map(wire.arp, heard) if one and one.sender.startswith("198.51.100.")]
    assert not [one for one in map(wire.advertisement, heard) if one and one.target.startswith("2001:db8:1:")]


# --- the later rounds -----------------------------------------------------------------------------------

Later = list[tuple[Sequence[tuple[str, str, str]], Callable[[], bool]]]


def post(later: Later, *argv: str) -> None:
    """Run post in this process; what would be repeated in the background goes to *later*."""
    import io

    from kvmifup.commands import main

    err = io.StringIO()
    code = main.main(
        "kvm-ifup-post", ["tap0", *argv], {}, io.StringIO(), err, lambda messages, true: later.append((messages, true))
    )
    assert code == 0, err.getvalue()


def test_the_later_rounds_are_for_what_was_announced(routed: Node) -> None:
    later: Later = []
    post(later)
    ((messages, still_true),) = later
    assert {(dev, address) for dev, address, _ in messages} == {("eth0", address) for address in IPS}
    assert still_true()
    post(later)
    assert len(later) == 1


def test_announcements_stop_when_kvm_ifdown_ran_in_between(routed: Node) -> None:
    later: Later = []
    post(later)
    check(call("kvm-ifdown", "tap0"), 0)
    assert not later[0][1]()


def test_announcements_stop_when_the_tap_is_gone(routed: Node) -> None:
    """QEMU was killed, and the guest may already run on another node: this one must not claim it back."""
    later: Later = []
    post(later)
    tools.ip("link del tap0")
    assert not later[0][1]()


def test_announcements_stop_when_the_tap_is_another_guests(routed: Node) -> None:
    """Tap names are reused at once."""
    later: Later = []
    post(later)
    check(call("kvm-ifdown", "tap0"), 0)
    tools.ip("link del tap0")
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=["192.0.2.99"], mac="aa:00:00:00:00:99")
    post(later)
    assert not later[0][1]()
    assert later[1][1]()


def test_announcements_stop_when_the_live_guest_has_another_address(routed: Node) -> None:
    later: Later = []
    post(later)
    manager.write_nic(mode="routed", ip=["192.0.2.99"])
    post(later)
    assert not later[0][1]()


def test_real_announcements_stop_when_kvm_ifdown_ran_in_between(routed: Node, client: wire.Wire) -> None:
    check(hook("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    routed.fence(client)
    hooks.wait_for_children()
    # At most the round that had begun.
    assert len(garps(routed.fence(client))) <= 1


def test_the_hook_does_not_keep_stdout_and_stderr_open(routed: Node, client: wire.Wire) -> None:
    """A process manager reads to EOF. Here the background child cannot end before the reader has seen it."""
    gate = nodes.scratch() / "gate"
    os.mkfifo(gate)
    program = f"""
import sys
sys.path.insert(0, {str(tools.ROOT)!r})
from kvmifup.commands import main
from kvmifup.runs import announcing

def gated(messages, still_true):
    announcing.repeat_detached(messages, lambda: bool(open({str(gate)!r}).read()) and still_true(), print)

sys.exit(main.main("kvm-ifup-post", ["tap0"], {{}}, sys.stdout, sys.stderr, gated))
"""
    process = subprocess.Popen(
        [hooks.command("")[0], "-I", "-c", program],
        env=tools.CLEAN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    check(hooks.finish(process), 0)
    assert len(garps(routed.fence(client))) == 1
    gate.write_text("go")
    client.until(lambda frame: bool(garps([frame])))


def test_the_answer_to_the_node_is_the_guests(routed: Node) -> None:
    """After post a ping from the client reaches the guest's tap."""
    guest = wire.attach("tap0")
    routed.taps.append(guest)
    check(call("kvm-ifup-post", "tap0"), 0)
    with routed.client:
        pinging = subprocess.Popen(
            ["ping", "-c", "3", "-W", "1", GUEST_IP4], stdout=subprocess.DEVNULL, env=tools.CLEAN
        )
    frame = guest.until(lambda one: one[12:14] == b"\x08\x00" and one[23] == 1)[-1]
    pinging.kill()
    pinging.wait()
    assert frame[:6].hex(":") == GUEST_MAC
    assert frame[6:12].hex(":") == TAP_MAC
    assert frame[26:30] == bytes(map(int, CLIENT_IP4.split(".")))


# --- the socket that stays open -----------------------------------------------------------------------


def test_it_is_the_socket_of_the_namespace_that_announces(routed: Node, client: wire.Wire) -> None:
    from kvmifup.node import announce, sockets

    announce.send([("eth0", GUEST_IP4, GUEST_IP4)])
    first = sockets.sender.socket()
    with routed.client:
        announce.send([("eth0", "192.0.2.77", "192.0.2.77")])
    announce.send([("eth0", "192.0.2.78", "192.0.2.78")])
    assert sockets.sender.socket() is not first
    heard = routed.fence(client)
    assert (len(garps(heard)), len(garps(heard, "192.0.2.78"))) == (1, 1)
    # The client's own goes the other way, from its own address.
    assert all(one.mac == CLIENT_MAC for one in garps(heard, "192.0.2.77"))


def test_an_uplink_that_is_gone_is_an_error_and_its_successor_is_not(routed: Node) -> None:
    from kvmifup.node import announce

    nowhere = ("nosuch", GUEST_IP4, GUEST_IP4)
    assert [(one.dev, one.gone) for one in announce.send([nowhere])] == [("nosuch", True)]
    tools.ip("link del eth0")
    assert [one.gone for one in announce.send([("eth0", GUEST_IP4, GUEST_IP4)])] == [True]
    routed.uplink(addresses=False)
    client = routed.listen()
    assert len(announce.send([nowhere, ("eth0", GUEST_IP4, GUEST_IP4)])) == 1
    assert len(garps(routed.fence(client))) == 1
