"""Ganeti's own script wires a bridged NIC with VLANs, then ours, each on a fresh node: nothing may be missing.

The script is the one of Debian 12's Ganeti 3.0, as it is.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator

from harness import manager, nodes
from harness.hooks import call
from harness.nodes import Node
from harness.oracle import link
from harness.tools import CLEAN
from tests.vm.test_vlans import Vlans, bridge_vlans, filtering

SCRIPT = "/usr/lib/ganeti/kvm-ifup"
UPLINKS = {"link.br0": {"uplinks": ["eth0"]}}
VLANS = ("100", ":100:200", ".100:200:300")


def nic(vlan: str, tap: str = "tap0") -> dict[str, str]:
    """A bridged NIC as Ganeti describes it."""
    return manager.ganeti(tap, MODE="bridged", LINK="br0", BRIDGE="br0", VLAN=vlan)


@contextlib.contextmanager
def staged() -> Iterator[Node]:
    """A node with a bridge that keeps VLANs apart, and its uplink."""
    with nodes.fresh_node() as node:
        filtering()
        node.uplink(master="br0")
        yield node


def by_ganeti(vlan: str, tap: str = "tap0") -> int:
    """Have Ganeti's script wire it; its exit code."""
    environ = {**CLEAN, **nic(vlan, tap)}
    return subprocess.run([SCRIPT, tap], env=environ, capture_output=True, check=False).returncode


def by_us(vlan: str, tap: str = "tap0") -> int:
    """The same for our script."""
    return call("kvm-ifup-post", manager.configuration(**UPLINKS), environ=nic(vlan, tap)).code


def wired(wire: Callable[[str, str], int]) -> dict[str, tuple[Vlans, Vlans]]:
    """The VLANs of the tap and of the uplink, once *wire* has wired a NIC of each kind on a fresh node."""
    found = {}
    with staged() as node:
        for number, vlan in enumerate(VLANS):
            tap = f"tap{number}"
            node.guest(tap)
            assert wire(vlan, tap) == 0, vlan
            assert link(tap)["master"] == "br0"
            assert "UP" in link(tap)["flags"]
            found[vlan] = bridge_vlans(tap), bridge_vlans("eth0")
    return found


def test_nothing_that_ganetis_script_wires_is_missing() -> None:
    theirs, ours = wired(by_ganeti), wired(by_us)
    for vlan, (tap, uplink) in theirs.items():
        # A port begins in VLAN 1. Ganeti's script leaves it there; ours takes it away.
        asked = {vid: flags for vid, flags in tap.items() if vid != 1}
        assert asked, vlan
        assert {vid: ours[vlan][0].get(vid) for vid in asked} == asked, vlan
        assert {vid: ours[vlan][1].get(vid) for vid in uplink} == uplink, vlan


def test_both_refuse_a_bridge_that_does_not_keep_vlans_apart() -> None:
    with nodes.fresh_node() as node:
        nodes.add_bridge()
        node.guest()
        assert by_us(".100") == 69
        assert by_ganeti(".100") != 0
