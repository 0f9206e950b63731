"""Filters on a bridge that keeps VLANs apart, and in Debian's kernel: the table of frames, inside VLANs and beside."""

from __future__ import annotations

from typing import Any

import pytest

from harness import agents, guestframes, manager
from harness.addresses import GUEST_MAC
from harness.attacker import far_end
from harness.guestframes import NIC, VLAN, tagged
from harness.hooks import call, check
from harness.nodes import Node, add_bridge
from harness.tools import ask, ip

UPLINKS: dict[str, dict[str, Any]] = {"link.br0": {"uplinks": ["eth0"]}}
MTU = 9000
# Untagged frames are in VLAN 100, which leaves the node with its tag; those of VLAN 200 have theirs already.
OWN, OTHER = (VLAN, 100), (VLAN, 200)


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
    sent = [*(one.frame for one in bare), *(tagged(one.frame, OTHER) for one in bare)]
    came = end.passed(guest, sent, tags=[OWN])
    end.close()
    wrong = {}
    for one in bare:
        for words, frame in (("", tagged(one.frame, OWN)), (" in VLAN 200", tagged(one.frame, OTHER))):
            if one.passes(how) not in (None, frame in came):
                wrong[one.name + words] = frame in came
    assert wrong == {}
    learnt = ask("bridge -j fdb show br br0 brport tap0")
    assert {one["mac"] for one in learnt if one.get("state") != "permanent"} == {GUEST_MAC}
