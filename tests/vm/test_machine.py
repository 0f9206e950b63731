"""What the test machine is for: its kernel can do what that of the machine that it runs on may not."""

from __future__ import annotations

import os
import platform
import sys

import pytest

from harness import tools
from harness.nodes import Node, add_bridge
from harness.oracle import link
from harness.tools import ask, ip


def test_it_has_the_kernel_of_debian_for_clouds() -> None:
    assert platform.release().endswith("-cloud-amd64")
    assert os.geteuid() == 0


@pytest.mark.parametrize("kind", ["vlan id 100", "vrf table 100", "dummy", "ifb", "bond", "macvlan"])
def test_it_has_devices_of_this_kind(node: Node, kind: str) -> None:
    add_bridge("br0")
    ip(f"link add {'link br0 ' if kind.startswith(('vlan', 'macvlan')) else ''}name other type {kind}")
    assert link("other")["linkinfo"]["info_kind"] == kind.split()[0]


def test_a_bridge_filters_vlans(node: Node) -> None:
    add_bridge("br0", options="vlan_filtering 1")
    node.guest("tap0")
    ip("link set tap0 master br0")
    tools.run("bridge", "vlan", "add", "dev", "tap0", "vid", "100", "pvid", "untagged")
    (port,) = ask("bridge -j vlan show dev tap0")
    untagged = "Egress Untagged"
    assert port["vlans"] == [{"vlan": 1, "flags": [untagged]}, {"vlan": 100, "flags": ["PVID", untagged]}]


def test_it_polices_what_comes_in(node: Node) -> None:
    node.guest("tap0")
    tools.run("tc", "qdisc", "add", "dev", "tap0", "handle", "ffff:", "ingress")
    police = "filter add dev tap0 parent ffff: protocol all matchall action police rate 1mbit burst 64k drop"
    tools.run("tc", *police.split())
    assert "police" in tools.run("tc", "-j", "filter", "show", "dev", "tap0", "parent", "ffff:")


def test_it_has_the_switch_of_the_kernel(node: Node) -> None:
    """Open vSwitch's kernel module, which `ovs-dpctl` talks to without a daemon."""
    tools.run("ovs-dpctl", "add-dp", "other")
    assert link("other")["linkinfo"]["info_kind"] == "openvswitch"


def test_pyroute2_is_the_one_of_whoever_runs_the_tests() -> None:
    """Hooks in processes of their own find the same."""
    where = "import importlib.util; print(importlib.util.find_spec('pyroute2').origin)"
    found = tools.run(sys.executable, "-I", "-c", where)
    assert found == "/usr/local/lib/python3.11/dist-packages/pyroute2/__init__.py\n"
