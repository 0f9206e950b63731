"""Without our package, or with only a leftover of it, Ganeti's own script wires the NIC, as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ganeti.cluster import FIRST, ROOT, Cluster, Instance, Node

pytestmark = pytest.mark.parametrize("mode", ["bridged"])

PLACE = "/etc/ganeti/kvm-vif-bridge"
SHIM = "/usr/lib/kvm-ifup/ganeti/kvm-vif-bridge"
INSTANCE = Instance((FIRST["bridged"],))


def must_be_wired_by_ganeti(node: Node) -> None:
    """On the bridge; the rest of the tap's MAC is random, where ours is the guest's, and nobody remembers it."""
    assert node.taps() == ["tap0"]
    assert node.ports()["tap0"] == ("br0", "forwarding")
    mac = node.link("tap0")["address"]
    assert mac.startswith("fe:")
    assert mac != FIRST["bridged"].tap_mac
    assert node.remembered() == []


def test_after_removal_ganetis_own_script_runs_again(two_nodes: Cluster) -> None:
    node = two_nodes.a
    node.remove("kvm-ifup-ganeti", "kvm-ifup")
    node.ganeti("start", INSTANCE)
    must_be_wired_by_ganeti(node)


def test_removal_disturbs_no_guest_that_runs(two_nodes: Cluster) -> None:
    node = two_nodes.a
    node.ganeti("start", INSTANCE)
    node.remove("kvm-ifup-ganeti")
    node.must_be_wired(*INSTANCE.nics)


def test_a_dangling_link_is_no_script(two_nodes: Cluster) -> None:
    node = two_nodes.a
    node.run("rm", "-r", "/usr/lib/kvm-ifup")
    assert node.run("readlink", PLACE).strip() == SHIM
    node.ganeti("start", INSTANCE)
    must_be_wired_by_ganeti(node)


def test_a_copy_on_a_node_without_the_package_hands_back(bare: Node) -> None:
    shim = Path(ROOT, "integration/ganeti/kvm-vif-bridge").read_text()
    bare.run("sh", "-c", f"cat >{PLACE} && chmod 755 {PLACE}", stdin=shim)
    bare.ganeti("start", INSTANCE)
    must_be_wired_by_ganeti(bare)


def test_a_copy_with_neither_says_so_and_fails(bare: Node) -> None:
    shim = Path(ROOT, "integration/ganeti/kvm-vif-bridge").read_text()
    bare.run("sh", "-c", f"cat >{PLACE} && chmod 755 {PLACE}", stdin=shim)
    said = bare.run("sh", "-c", f"{PLACE}; echo code $?", env={"INTERFACE": "tap0", "SYSCONFDIR": "/nonexistent"})
    assert said.split("\n")[:2] == [
        "code 69",
        "kvm-vif-bridge: tap0: kvm-ifup is not installed (apt install kvm-ifup-ganeti)",
    ]


def test_a_copy_on_a_node_with_the_package_is_as_good_as_the_link(two_nodes: Cluster) -> None:
    node = two_nodes.a
    node.run("sh", "-c", f"rm {PLACE} && cp {SHIM} {PLACE}")
    node.ganeti("start", INSTANCE)
    node.must_be_wired(*INSTANCE.nics)


def test_ganetis_own_taps_are_left_alone(two_nodes: Cluster) -> None:
    """As Ganeti calls for the tap of its own communication with a guest."""
    node = two_nodes.a
    node.run("ip", "tuntap", "add", "gnt.com.0", "mode", "tap")
    before = node.link("gnt.com.0")
    nic = {"INSTANCE": "web1", "INTERFACE": "gnt.com.0", "MODE": "routed", "MAC": "aa:00:00:35:ac:09"}
    nic |= {"INTERFACE_INDEX": "1", "IP": "169.254.7.1"}
    for script in (PLACE, *(f"/etc/ganeti/network/routed/{action}" for action in ("up", "down"))):
        assert node.run(script, env=nic) == ""
    assert node.link("gnt.com.0") == before
    node.must_not_announce_or_route()
