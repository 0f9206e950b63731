"""Debian's own Ganeti drives QEMU, and what it makes of a NIC is right at each step, on both nodes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lab import guest
from tests.ganeti.cluster import FIRST, SECOND, Cluster, GanetiError, Instance, Node, cluster


def test_start_hot_add_reboot_stop(two_nodes: Cluster, image: guest.Image) -> None:
    first, second = FIRST[two_nodes.mode], SECOND[two_nodes.mode]
    node, other = two_nodes.nodes
    instance = Instance((first,), image)

    node.ganeti("start", instance)
    node.must_be_wired(first)
    two_nodes.must_reach_guest()

    node.ganeti("hot_add", instance, nic=second.given)
    node.must_be_wired(first, second)
    both = dataclasses.replace(instance, nics=(first, second))

    node.ganeti("reboot", both)
    node.must_be_wired(first, second)
    node.hooks("instance-reboot", both)
    node.must_be_wired(first, second)
    two_nodes.must_reach_guest()

    node.ganeti("stop", both)
    for one in two_nodes.nodes:
        one.hooks("instance-stop", both)
    node.must_be_as_before()
    other.must_be_as_before()


def test_migration(two_nodes: Cluster, image: guest.Image) -> None:
    first, second = FIRST[two_nodes.mode], SECOND[two_nodes.mode]
    a, b = two_nodes.nodes
    instance = Instance((first, second), image)
    a.ganeti("start", instance)
    a.must_be_wired(first, second)
    two_nodes.must_reach_guest()

    info = a.ganeti("migration_info", instance)
    b.ganeti("accept", instance, info=info, target=b.address)
    a.must_be_wired(first, second)
    if two_nodes.mode == "bridged":
        b.must_be_wired(first, second)  # before the guest is there, or the frames that announce it are lost
    b.must_not_announce_or_route()

    two_nodes.migrate(instance, a, b, info)
    b.must_not_announce_or_route()
    a.ganeti("finalize_source", instance, success=True)
    b.ganeti("finalize_target", instance, info=info, success=True)
    b.must_be_wired(first, second)
    assert a.taps() == []
    for node in two_nodes.nodes:
        node.hooks("instance-migrate", instance)
    b.must_be_wired(first, second)
    a.must_be_as_before()
    two_nodes.must_reach_guest()

    b.ganeti("stop", instance)
    b.hooks("instance-stop", instance)
    b.must_be_as_before()


def test_there_and_back_again(two_nodes: Cluster) -> None:
    """No hook runs in between, and the taps have other names than the first time."""
    first, second = FIRST[two_nodes.mode], SECOND[two_nodes.mode]
    a, b = two_nodes.nodes
    instance = Instance((first, second))
    a.ganeti("start", instance)
    for source, target in ((a, b), (b, a)):
        if target is a:
            a.run("ip", "tuntap", "add", "tap0", "mode", "tap")  # nothing of Ganeti's, nor of ours
        info = source.ganeti("migration_info", instance)
        target.ganeti("accept", instance, info=info, target=target.address)
        two_nodes.migrate(instance, source, target, info)
        source.ganeti("finalize_source", instance, success=True)
        target.ganeti("finalize_target", instance, info=info, success=True)
        if target is a:
            a.run("ip", "link", "set", "tap0", "name", "vpn0")
        target.must_be_wired(first, second)
    for node in two_nodes.nodes:
        node.hooks("instance-migrate", instance)
    a.must_be_wired(first, second)
    b.must_be_as_before()


def test_failed_migration(two_nodes: Cluster, image: guest.Image) -> None:
    first = FIRST[two_nodes.mode]
    a, b = two_nodes.nodes
    instance = Instance((first,), image)
    a.ganeti("start", instance)
    two_nodes.must_reach_guest()

    info = a.ganeti("migration_info", instance)
    b.ganeti("accept", instance, info=info, target=b.address)
    b.run("sh", "-c", f"kill -KILL $(cat /run/ganeti/kvm-hypervisor/pid/{instance.name})")
    a.ganeti("migrate", instance, target=b.address)
    while (status := a.ganeti("migration_status", instance)) != "failed":
        assert status == "active"
    b.ganeti("finalize_target", instance, info=info, success=False)
    a.ganeti("finalize_source", instance, success=False)

    a.must_be_wired(first)
    two_nodes.must_reach_guest()
    assert b.taps() == []
    b.must_not_announce_or_route()
    # Ganeti runs no hook after a failure; the next one there clears up.
    b.hooks("instance-migrate", instance)
    b.must_be_as_before()


@pytest.mark.parametrize("mode", ["bridged"])
def test_a_missing_bridge_fails_the_start_with_our_sentence(two_nodes: Cluster) -> None:
    node = two_nodes.a
    instance = Instance((dataclasses.replace(FIRST["bridged"], link="br9"),))
    with pytest.raises(GanetiError, match=r"web1\.example\.com/0 \(tap0\): no such bridge: br9 \(`ip link add br9"):
        node.ganeti("start", instance)
    assert node.ganeti("running", instance) is False
    node.must_be_as_before()


@pytest.mark.parametrize("mode", ["bridged"])
def test_with_ganetis_own_script_it_starts_unplugged(bare: Node) -> None:
    """The contrast: what the test above is there for."""
    instance = Instance((dataclasses.replace(FIRST["bridged"], link="br9"),))
    bare.ganeti("start", instance)
    assert bare.ganeti("running", instance) is True
    assert bare.taps() == ["tap0"]
    assert "tap0" not in bare.ports()


@pytest.mark.parametrize("mode", ["bridged"])
def test_a_missing_bridge_on_the_target_leaves_the_guest_where_it_is(two_nodes: Cluster) -> None:
    first = FIRST["bridged"]
    a, b = two_nodes.nodes
    instance = Instance((first,))
    a.ganeti("start", instance)
    b.run("ip", "link", "del", "br0")
    with pytest.raises(GanetiError, match="no such bridge: br0"):
        b.ganeti("accept", instance, info=a.ganeti("migration_info", instance), target=b.address)
    assert b.taps() == []
    a.must_be_wired(first)


def test_a_routed_nic_with_a_table(packages: list[Path]) -> None:
    nic = dataclasses.replace(FIRST["routed"], link="100")
    with cluster("routed", packages) as found:
        instance = Instance((nic,))
        found.a.ganeti("start", instance)
        found.a.must_be_wired(nic)
        found.a.ganeti("stop", instance)
        assert [tap for tap, _ in found.a.rules()] == ["tap0", "tap0"]  # they outlive the tap
        found.a.hooks("instance-stop", instance)
        found.a.must_be_as_before()


@pytest.mark.parametrize(("mode", "operation"), [("bridged", "instance-failover"), ("routed", "instance-migrate")])
def test_a_target_that_cannot_take_the_guest_refuses_before_it_moves(two_nodes: Cluster, operation: str) -> None:
    mode, b = two_nodes.mode, two_nodes.b
    instance = Instance((FIRST[mode], SECOND[mode]))
    b.before_move(operation, instance)
    spoil, why = {
        "bridged": (("ip", "link", "del", "br0"), "no such bridge: br0"),
        "routed": (("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0"), "IPv4 forwarding is off on uplink eth0"),
    }[mode]
    b.run(*spoil)
    with pytest.raises(GanetiError, match=rf"50-kvm-ifup.*kvm-ifup: {re.escape(instance.name)}/0: {why}"):
        b.before_move(operation, instance)
    # Nobody else is asked: the hook also runs on the source and on the master.
    b.before_move(operation, instance, NEW_PRIMARY="a.example.com")
    # Nothing moves.
    b.before_move(operation, instance, MIGRATE_CLEANUP="True")
    b.before_move(operation, instance, FAILOVER_CLEANUP="True")
    # An administrator's own script wires the NICs.
    b.run("sh", "-c", "rm /etc/ganeti/kvm-vif-bridge; echo exit 0 >/etc/ganeti/kvm-vif-bridge")
    b.before_move(operation, instance)


@pytest.mark.parametrize("version", ["3.0", "3.1"])
@pytest.mark.parametrize("mode", ["routed"])
def test_with_agents_a_routed_guest_does_not_wait_for_ganeti(two_nodes: Cluster, image: guest.Image) -> None:
    """Its second NIC is not up in the guest, which so does not answer for the address: that is left to Ganeti."""
    first, second = FIRST["routed"], SECOND["routed"]
    a, b = two_nodes.nodes
    instance = Instance((first, second), image)
    for node in (a, b):
        node.start_agent()
    a.ganeti("start", instance)
    two_nodes.must_reach_guest()

    b.before_move("instance-migrate", dataclasses.replace(instance, nics=(second, first)))
    info = a.ganeti("migration_info", instance)
    b.ganeti("accept", instance, info=info, target=b.address)
    b.must_not_announce_or_route()
    two_nodes.migrate(instance, a, b, info)
    tap0, tap1 = b.taps()
    two_nodes.must_reach_guest()
    assert b.routes() == {first.ip: tap0}
    assert b.proxies() == {(first.ip, "eth0")}
    assert first.ip not in a.routes()  # withdrawn, because b has announced it
    assert "armed" in b.run("kvm-ifup", "show", tap1)

    a.ganeti("finalize_source", instance, success=True)
    b.ganeti("finalize_target", instance, info=info, success=True)
    b.must_be_wired(first, second)
    for node in (a, b):
        node.hooks("instance-migrate", instance)
    a.must_be_as_before()
