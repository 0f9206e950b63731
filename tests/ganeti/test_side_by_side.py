"""Ganeti's own script on one node, ours on the other, for the same NIC: nothing that it wires is missing.

`ip`, `bridge` and `ovs-vsctl` say what there is. How a NIC is described is what Ganeti's code gives to its scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC
from tests.ganeti.cluster import INSTANCE, Cluster, Node
from tests.ganeti.test_3_2 import tap

SCRIPT = "/usr/lib/ganeti/kvm-ifup"  # Ganeti's, which runs ours where it is
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
VLANS = ("", "100", ".100", ":100:200", ".100:200", "100:200")


@pytest.fixture
def ours(two_nodes: Cluster) -> Node:
    """The node on which Ganeti runs our script."""
    return two_nodes.a


@pytest.fixture
def theirs(two_nodes: Cluster) -> Node:
    """The node on which it runs its own."""
    two_nodes.b.run("/usr/lib/kvm-ifup/ganeti/takeover", "off")
    return two_nodes.b


def wired(node: Node, name: str, nic: Mapping[str, str], *, works: bool = True) -> None:
    """Have Ganeti's script wire *nic* on a new tap; *works*: it is content."""
    tap(node, name)
    given = {"INSTANCE": INSTANCE, "INTERFACE": name, "INTERFACE_INDEX": "0", "MAC": GUEST_MAC, "TAGS": "", **nic}
    said = node.run("sh", "-c", f"{SCRIPT} {name}; echo code $?", env=given)
    assert ("code 0" in said.splitlines()) is works, said


def facts(node: Node, name: str) -> set[tuple[Any, ...]]:
    """What is true of the NIC on *name*, as far as scripts for NICs wire it."""
    link = node.link(name)
    found: set[tuple[Any, ...]] = {("up",)} if "UP" in link["flags"] else set()
    found |= {("mtu", link["mtu"]), ("first byte of the MAC", link["address"][:2])}
    if "master" in link and link["master"] != "ovs-system":
        found.add(("bridge", link["master"]))
    for family in ("-4", "-6"):
        for route in node.json("ip", "-j", family, "route", "show", "table", "all", "dev", name, "proto", "static"):
            found.add(("route", family, route["dst"], route.get("table", "main")))
        for rule in node.json("ip", "-j", family, "rule"):
            if rule.get("iif") == name:
                found.add(("rule", family, rule["table"]))
    for setting in ("proxy_arp", "forwarding"):
        found.add((setting, node.run("cat", f"/proc/sys/net/ipv4/conf/{name}/{setting}").strip()))
    return found


def missing(ours: Node, theirs: Node, name: str) -> set[tuple[Any, ...]]:
    """What Ganeti's script has wired and ours has not."""
    return {
        one for one in facts(theirs, name) - facts(ours, name) if one[0] != "first byte of the MAC" or one[1] == "fe"
    }


def numbered() -> Iterator[str]:
    """Names for taps."""
    return (f"tap{number}" for number in range(100))


@pytest.mark.parametrize("mode", ["routed"])
def test_routed(ours: Node, theirs: Node) -> None:
    names = numbered()
    for ip in (GUEST_IP4, GUEST_IP6):
        for link in ("", "100"):
            for vlan in ("", ".100", "100"):
                name = next(names)
                nic = {"MODE": "routed", "IP": ip, "VLAN": vlan, **({"LINK": link} if link else {})}
                wired(theirs, name, nic)
                wired(ours, name, nic)
                assert ("route", "-6" if ":" in ip else "-4", ip, link or "main") in facts(theirs, name)
                assert missing(ours, theirs, name) == set(), nic
                for node in (ours, theirs):
                    node.run("ip", "link", "del", name)
                ours.run("kvm-ifup", "gc")


@pytest.mark.parametrize("mode", ["routed"])
def test_a_routed_nic_that_ganeti_refuses(ours: Node, theirs: Node) -> None:
    nic = {"MODE": "routed", "VLAN": "", "NETWORK_SUBNET6": "2001:db8:7::/64"}
    wired(theirs, "tap0", nic, works=False)
    wired(ours, "tap0", nic)
    assert ("route", "-6", "2001:db8:7:0:a800:ff:fe35:ac01", "main") in facts(ours, "tap0")


@pytest.mark.parametrize("mode", ["bridged"])
@pytest.mark.parametrize("mtu", [1500, 1400])
def test_bridged(ours: Node, theirs: Node, mtu: int) -> None:
    for node in (ours, theirs):
        node.run("ip", "link", "set", "eth0", "mtu", str(mtu))
        node.run("ip", "link", "set", "br0", "mtu", str(mtu))
    nic = {"MODE": "bridged", "LINK": "br0", "BRIDGE": "br0", "VLAN": ""}
    for node in (ours, theirs):
        wired(node, "tap0", nic)
        assert {("bridge", "br0"), ("mtu", mtu), ("up",)} <= facts(node, "tap0")
    assert missing(ours, theirs, "tap0") == set()


def switch(node: Node) -> None:
    """A running Open vSwitch with a bridge, on the userspace datapath."""
    place = "/run/openvswitch"
    quiet = "--pidfile --detach --log-file=/dev/null </dev/null >/dev/null 2>&1"  # they keep what they are given open
    commands = [
        f"mkdir -p {place}",
        f"ovsdb-tool create {place}/conf.db {SCHEMA}",
        f"ovsdb-server {place}/conf.db --remote=punix:{place}/db.sock {quiet}",
        "ovs-vsctl --no-wait init",
        f"ovs-vswitchd {quiet}",
        "ovs-vsctl --timeout=60 add-br ovs0 -- set bridge ovs0 datapath_type=netdev",
    ]
    node.run("sh", "-ec", "; ".join(commands))


def vlans(node: Node, name: str) -> set[tuple[str, int]]:
    """The VLANs of a port, as ovs-vswitchd.conf.db(5) has it: with a tag and no mode, trunks do not count."""
    assert node.run("ovs-vsctl", "port-to-br", name).strip() == "ovs0"
    said = node.run("ovs-vsctl", "--format=json", "--columns=tag,trunks,vlan_mode", "list", "port", name)
    (row,) = json.loads(said)["data"]
    tags, trunks, modes = (one[1] if isinstance(one, list) else [one] for one in row)
    if tags and not modes:
        trunks = []
    return {("untagged", tag) for tag in tags} | {("tagged", trunk) for trunk in trunks}


@pytest.mark.parametrize("mode", ["bridged"])
def test_openvswitch(ours: Node, theirs: Node) -> None:
    for node in (ours, theirs):
        switch(node)
    for name, vlan in zip(numbered(), VLANS, strict=False):
        nic = {"MODE": "openvswitch", "LINK": "ovs0", "VLAN": vlan}
        for node in (ours, theirs):
            wired(node, name, nic)
        assert missing(ours, theirs, name) == set(), vlan
        assert vlans(theirs, name) <= vlans(ours, name), vlan
    assert vlans(ours, "tap4") == {("untagged", 100), ("tagged", 200)}
    for node in (ours, theirs):
        node.run("ovs-appctl", "-t", "ovs-vswitchd", "exit")
        node.run("ovs-appctl", "-t", "ovsdb-server", "exit")


@pytest.mark.parametrize("mode", ["bridged"])
def test_the_tap_of_ganetis_own_communication(ours: Node) -> None:
    """Ganeti 3.2 wires the tap of its communication with a guest by a script of its own, if there is one."""
    own = "/usr/lib/ganeti/network/routed"
    nic = {"INSTANCE": INSTANCE, "INTERFACE": "gnt.com.0", "MODE": "routed", "MAC": GUEST_MAC, "IP": "169.254.7.1"}
    ours.run("ip", "tuntap", "add", "gnt.com.0", "mode", "tap")
    for action in ("up", "down"):
        assert ours.run(f"/etc/ganeti/network/routed/{action}", env=nic) == ""
        assert "UP" not in ours.link("gnt.com.0")["flags"]
    ours.run("mkdir", "-p", own)
    for action in ("up", "down"):
        text = f"#!/bin/sh\nip link set $INTERFACE {action}\n"
        ours.run("sh", "-c", f"cat >{own}/{action} && chmod 755 {own}/{action}", stdin=text)
    ours.run("/etc/ganeti/network/routed/up", env={**nic, "ACTION": "up"})
    assert "UP" in ours.link("gnt.com.0")["flags"]
    ours.run("/etc/ganeti/network/routed/down", env={**nic, "ACTION": "down"})
    assert "UP" not in ours.link("gnt.com.0")["flags"]
    assert ours.remembered() == []
