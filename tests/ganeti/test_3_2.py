"""Ganeti 3.2, which Debian 12 does not have: what its `kvm-nic-setup` runs, in the environment that it gives.

The taps are held open by processes of the tests', as by a QEMU.
"""

from __future__ import annotations

import dataclasses
import time

import pytest

from harness.addresses import GUEST_IP4
from lab import guest
from tests.ganeti.cluster import FIRST, INSTANCE, SECOND, Cluster, Instance, Nic, Node

# A guest's end of a tap: carrier for as long as the process lives.
HOLD = """
import fcntl, os, struct, sys, time
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH", sys.argv[1].encode(), 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
if os.fork():
    os._exit(0)
for standard in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), standard)
time.sleep(3600)
"""


def tap(node: Node, name: str) -> None:
    """A tap as a QEMU makes it."""
    node.run("python3", "-c", HOLD, name)


def call(node: Node, action: str, nic: Nic, name: str, phase: str | None = None, instance: str = INSTANCE) -> str:
    """What Ganeti 3.2 does for one NIC; returns what was said, and raises LabError when it fails."""
    environment = {
        "INSTANCE": instance,
        "MAC": nic.mac,
        "MODE": nic.mode,
        "INTERFACE": name,
        "INTERFACE_INDEX": "0",
        "INTERFACE_UUID": str(nic.given["uuid"]),
        "TAGS": "",
        "VLAN": "",
        "ACTION": action,
    }
    environment |= {"IP": nic.ip} if nic.ip else {}
    environment |= {"LINK": nic.link} if nic.link else {}
    environment |= {"BRIDGE": nic.link} if nic.mode == "bridged" else {}
    environment |= {"MIGRATION_PHASE": phase} if phase else {}
    return node.run(f"/etc/ganeti/network/{nic.mode}/{action}", env=environment)


def test_start_and_stop(two_nodes: Cluster) -> None:
    node, nic = two_nodes.a, FIRST[two_nodes.mode]
    tap(node, "tap0")
    before = node.snapshot()
    assert call(node, "up", nic, "tap0") == ""
    node.must_be_wired(nic)
    assert call(node, "down", nic, "tap0") == ""
    assert node.snapshot() == before
    assert call(node, "down", nic, "tap0") == ""
    assert node.snapshot() == before


def test_down_when_the_tap_is_gone(two_nodes: Cluster) -> None:
    node, nic = two_nodes.a, FIRST[two_nodes.mode]
    before = node.snapshot()
    tap(node, "tap0")
    call(node, "up", nic, "tap0")
    node.run("ip", "link", "del", "tap0")
    for _ in range(2):
        assert call(node, "down", nic, "tap0") == ""
        assert node.snapshot() == before


def test_down_when_the_tap_is_another_guests_by_now(two_nodes: Cluster) -> None:
    node, mine, others = two_nodes.a, FIRST[two_nodes.mode], SECOND[two_nodes.mode]
    tap(node, "tap0")
    call(node, "up", mine, "tap0")
    node.run("ip", "link", "del", "tap0")
    tap(node, "tap0")
    call(node, "up", others, "tap0", instance="web2.example.com")
    node.must_be_wired(others)
    assert call(node, "down", mine, "tap0") == ""
    node.must_be_wired(others)


def test_a_guest_that_shuts_down_is_reached_until_its_end(two_nodes: Cluster, image: guest.Image) -> None:
    """3.2 calls down right after the power button; this guest takes its time, as it takes no notice."""
    node, nic = two_nodes.a, FIRST[two_nodes.mode]
    node.run("sh", "-c", "setsid kvm-ifupd </dev/null >/dev/null 2>&1 &")
    instance = Instance((nic,), image)
    node.ganeti("start", instance)  # 3.0's code, whose files are the same
    two_nodes.must_reach_guest()
    node.ganeti("shut_down", instance)
    for _ in range(2):
        assert call(node, "down", nic, "tap0") == ""
        assert two_nodes.client.try_run("ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", GUEST_IP4).returncode == 0
    node.must_be_wired(nic)
    node.ganeti("stop", instance)
    time.sleep(1)
    assert call(node, "down", nic, "tap0") == ""
    node.must_be_as_before()


@pytest.mark.parametrize("mode", ["bridged"])
def test_a_bridged_nic_is_wired_before_the_guest_arrives(two_nodes: Cluster) -> None:
    node, nic = two_nodes.b, FIRST["bridged"]
    tap(node, "tap0")
    call(node, "up", nic, "tap0")
    node.must_be_wired(nic)


@pytest.mark.parametrize("mode", ["routed"])
def test_a_routed_nic_is_wired_when_the_guest_has_arrived(two_nodes: Cluster) -> None:
    node, nic = two_nodes.b, FIRST["routed"]
    tap(node, "tap0")
    call(node, "up", nic, "tap0", phase="post")
    node.must_be_wired(nic)


@pytest.mark.parametrize("mode", ["routed"])
def test_an_ext_nic_that_is_routed_has_both_phases(two_nodes: Cluster) -> None:
    node, routed = two_nodes.b, dataclasses.replace(FIRST["routed"], link="")
    ext = dataclasses.replace(routed, mode="ext", link="dmz")  # type: ignore[arg-type]
    node.run("mkdir", "-p", "/etc/kvm-ifup")
    node.run("sh", "-c", "cat >/etc/kvm-ifup/config.toml", stdin='[ext.dmz]\nmode = "routed"\n')
    before = node.snapshot()
    tap(node, "tap0")

    call(node, "up", ext, "tap0", phase="pre")
    node.must_not_announce_or_route()
    assert "UP" in node.link("tap0")["flags"]
    assert node.link("tap0")["address"] == ext.tap_mac
    call(node, "up", ext, "tap0", phase="post")
    node.must_be_wired(routed)

    node.run("ip", "link", "del", "tap0")
    call(node, "down", ext, "tap0")
    assert node.snapshot() == before


@pytest.mark.parametrize("mode", ["routed"])
def test_an_ext_nic_whose_guest_never_came(two_nodes: Cluster) -> None:
    node = two_nodes.b
    ext = dataclasses.replace(FIRST["routed"], mode="ext", link="dmz")  # type: ignore[arg-type]
    node.run("mkdir", "-p", "/etc/kvm-ifup")
    node.run("sh", "-c", "cat >/etc/kvm-ifup/config.toml", stdin='[ext.dmz]\nmode = "routed"\n')
    tap(node, "tap0")
    before = node.snapshot()
    call(node, "up", ext, "tap0", phase="pre")
    call(node, "down", ext, "tap0")
    assert node.snapshot() == before
