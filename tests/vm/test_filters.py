"""Filters on a bridge that keeps VLANs apart, and in Debian's kernel: the table of frames, inside VLANs and beside."""

from __future__ import annotations

from typing import Any

import pytest

from harness import agents, guestframes, manager, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, FOREIGN_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.attacker import attacker, far_end
from harness.guestframes import LLDP, NIC, SERVICE, VLAN, tagged
from harness.hooks import call, check
from harness.nodes import Node, add_bridge, certain
from harness.tools import ask, ip

UPLINKS: dict[str, dict[str, Any]] = {"link.br0": {"uplinks": ["eth0"]}}
MTU = 9000
# Untagged frames are in VLAN 100, which leaves the node with its tag; those of VLAN 200 have theirs already.
OWN, OTHER, IN, AD = (VLAN, 100), (VLAN, 200), (VLAN, 7), (SERVICE, 5)


@pytest.mark.parametrize("how", ["mac", "address"])
def test_what_is_in_a_vlan_of_the_bridge_is_judged_like_anything_else(node: Node, how: str) -> None:
    add_bridge(mtu=MTU, options="vlan_filtering 1 mcast_snooping 0")
    node.uplink(master="br0")
    ip(f"link set eth0 mtu {MTU}")
    with node.client:
        ip(f"link set eth0 mtu {MTU}")
    guest = node.guest()
    manager.write_nic(mode="bridged", link="br0", vlan=".100:200", filter=how, **NIC)
    with agents.configured(**UPLINKS):
        check(call("kvm-ifup-post", "tap0"), 0)
    end = far_end(node)
    # What ends at a bridge by the standard does so here.
    bare = [one for one in guestframes.bare() if one.frame[:5] != guestframes.RESERVED]
    sent = []
    for one in bare:
        two = guestframes.in_two(one).passes(how)
        sent += [
            (one.name, one.frame, tagged(one.frame, OWN), one.passes(how)),
            (f"{one.name} in VLAN 200", tagged(one.frame, OTHER), tagged(one.frame, OTHER), one.passes(how)),
            (f"{one.name} in a tag in VLAN 200", tagged(one.frame, OTHER, IN), tagged(one.frame, OTHER, IN), two),
            # The bridge does not know 802.1ad, so that is nothing but content to it.
            (f"{one.name} in 802.1ad", tagged(one.frame, AD, IN), tagged(one.frame, OWN, AD, IN), two),
        ]
    came = end.passed(guest, [frame for _, frame, _, _ in sent], tags=[OWN])
    end.close()
    wrong = {name: seen in came for name, _, seen, passes in sent if passes not in (None, seen in came)}
    assert wrong == {}
    learnt = ask("bridge -j fdb show br br0 brport tap0")
    assert {one["mac"] for one in learnt if one.get("state") != "permanent"} == {GUEST_MAC}


def in_two_tags(outer: str, *addresses: str) -> None:
    """A system's eth0 has another network inside two tags, and the *addresses* there."""
    ip("link set eth0 up")
    ip(f"link add link eth0 name outer type vlan proto {outer} id 5")
    ip("link add link outer name inner type vlan id 7")
    for dev in ("outer", "inner"):
        ip(f"link set {dev} up")
    for one in addresses:
        ip(f"addr add {one} dev inner")
    certain("inner")


@pytest.mark.parametrize("outer", ["802.1Q", "802.1ad"])
def test_a_guests_own_system_finds_its_neighbour_inside_two_tags(node: Node, outer: str) -> None:
    """With all that it does by itself: ARP, duplicate address detection, neighbour discovery, reports."""
    add_bridge()
    node.uplink(master="br0")
    guest = node.guest()
    manager.write_nic(mode="bridged", link="br0", filter="address", **NIC)
    check(call("kvm-ifup-post", "tap0"), 0)
    with node.client:
        ip("addr flush dev eth0")
        in_two_tags(outer, f"{CLIENT_IP4}/24", f"{CLIENT_IP6}/64")
    with attacker(guest, fresh=True) as system, system:
        in_two_tags(outer, f"{GUEST_IP4}/24", f"{GUEST_IP6}/64")
        for address in (CLIENT_IP4, CLIENT_IP6):
            tools.run("ping", "-n", "-c", "1", "-w", "20", address)
        with node.client:
            for address in (GUEST_IP4, GUEST_IP6):
                tools.run("ping", "-n", "-c", "1", "-w", "20", address)


def test_a_tap_that_is_made_anew_has_its_chain_again(node: Node) -> None:
    """In this kernel a chain goes where its device goes, and that does not count as a change of the ruleset."""
    add_bridge()
    node.uplink(master="br0")
    manager.write_nic(mode="bridged", link="br0", filter="address", **NIC)
    for gone in (["link del tap0"], ["link set tap0 down", "link set tap0 name old0"], ["link del tap0"]):
        guest = node.guest()
        check(call("kvm-ifup-post", "tap0"), 0)
        guest.send(wire.ethernet(LLDP, FOREIGN_MAC, 0x88CC, bytes(46)))
        guest.send(guestframes.arp())
        learnt = ask("bridge -j fdb show br br0 brport tap0")
        assert {one["mac"] for one in learnt if one.get("state") != "permanent"} == {GUEST_MAC}
        assert call("kvm-ifup-post", "tap0", "--json").needed == []
        for words in gone:
            ip(words)
        node.taps.clear()
