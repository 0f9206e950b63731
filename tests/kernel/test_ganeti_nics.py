"""NICs as Ganeti describes them: nothing that its own script wires is refused, and what it inherits does no harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import agents, guests, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_MAC, TAP_MAC
from harness.hooks import call, check
from harness.nodes import Node
from tests.kernel.test_shell import log, logged

SUBNET = {"NETWORK_NAME": "six", "NETWORK_SUBNET6": "2001:db8:7::/64", "NETWORK_GATEWAY6": "2001:db8:7::1"}
OWN = "2001:db8:7:0:a800:ff:fe35:ac01"  # of the guest's MAC


def is_right() -> None:
    """Fail unless `show` and `check` find the one NIC wired and right."""
    (shown,) = json.loads(call("kvm-ifup", "show", "--json").out)
    assert (shown["phase"], shown["wired"], shown["problem"]) == ("post", True, None)
    assert call("kvm-ifup", "check").code == 0


def as_before(before: snapshots.Snapshot, environ: dict[str, str]) -> None:
    """Take the NIC down; fail if anything of it stays."""
    check(call("kvm-ifdown", environ={**environ, "ACTION": "down"}), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


# --- routed, without an address ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["", "100"])
def test_a_nic_without_ip_has_the_address_that_it_gives_itself(uplinked: Node, table: str) -> None:
    if table:
        tools.ip("-6 rule add iif eth0 lookup 100")
    nodes.add_tap()
    before = snapshots.snapshot()
    environ = manager.ganeti(MODE="routed", LINK=table, **SUBNET)
    check(call("kvm-ifup-post", environ=environ), 0)
    assert oracle.routes("tap0", table or "main") == {OWN}
    assert oracle.proxies("eth0") == {OWN}
    is_right()
    as_before(before, environ)


@pytest.mark.parametrize("network", [{}, {"NETWORK_SUBNET": "192.0.2.0/24"}, {"NETWORK_SUBNET6": "2001:db8:7::/80"}])
@pytest.mark.parametrize("table", ["", "100"])
def test_a_nic_without_any_address_is_wired_all_the_same(uplinked: Node, table: str, network: dict[str, str]) -> None:
    nodes.add_tap()
    before = snapshots.snapshot()
    environ = manager.ganeti(MODE="routed", LINK=table, **network)
    with log() as lines:
        check(call("kvm-ifup-post", environ=environ), 0)
        assert sum("it has no address: nothing is routed to the guest" in line for line in logged(lines)) == 1
    link = oracle.link("tap0")
    assert (link["address"], "UP" in link["flags"]) == (TAP_MAC, True)
    assert [rule[2] for rule in oracle.rules()] == ([table, table] if table else [])
    assert oracle.routes("tap0", table or "main") == set()
    assert oracle.proxies("eth0") == set()
    is_right()
    as_before(before, environ)


def test_such_a_guest_arrives_like_any_other(uplinked: Node) -> None:
    tap = uplinked.guest()
    environ = manager.ganeti(MODE="routed", MIGRATION_PHASE="pre")
    with agents.running() as agent:
        agents.through("kvm-ifup-pre", environ=environ)
        agent.armed()
        tap.send(guests.rarp())
        agents.until(lambda: (agents.journal() or {}).get("phase") == "post")
    is_right()


def test_a_nic_file_still_needs_an_address(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed")
    check(call("kvm-ifup-post", "tap0"), 65, "ip is missing")


# --- inherited ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vlan", ["100", ".100", ":100:200", "100:200"])
def test_a_routed_nic_that_inherits_vlans_is_wired(uplinked: Node, vlan: str) -> None:
    nodes.add_tap()
    before = snapshots.snapshot()
    environ = manager.ganeti(MODE="routed", IP=GUEST_IP4, VLAN=vlan)
    check(call("kvm-ifup-post", environ=environ), 0)
    assert oracle.routes("tap0") == {GUEST_IP4}
    is_right()
    as_before(before, environ)


def test_in_a_nic_file_they_are_a_mistake(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], vlan=".100")
    check(call("kvm-ifup-post", "tap0"), 65, "vlan means nothing on a routed NIC")


# --- ext ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["pre", "post"])
def test_a_program_gets_all_that_ganeti_gives(uplinked: Node, phase: str) -> None:
    nodes.add_tap()
    noted = Path("/run/noted")
    further = {"TAGS": "a:b c", "INTERFACE_NAME": "inside", "NETWORK_TAGS": "", **SUBNET}
    environ = manager.ganeti(MODE="ext", LINK="blue", MIGRATION_PHASE=phase, PATH="/nowhere", **further)
    with agents.configured() as directory:
        program = directory / "ext" / "blue"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n/usr/bin/env >{noted}\n")
        program.chmod(0o755)
        check(call(f"kvm-ifup-{phase}", environ=environ), 0)
        given = dict(line.split("=", 1) for line in noted.read_text().splitlines())
        assert {**given, **further, "INTERFACE_UUID": environ["INTERFACE_UUID"], "MAC": GUEST_MAC} == given
        assert given["PATH"] != "/nowhere"
        noted.unlink()
        check(call(f"kvm-ifup-{phase}", environ=environ), 0)
        assert not noted.exists()
        check(call("kvm-ifdown", "tap0"), 0)
        given = dict(line.split("=", 1) for line in noted.read_text().splitlines())
        assert (given["KVM_IFUP_PHASE"], given["TAGS"], given["NETWORK_NAME"]) == ("down", "a:b c", "six")


# --- bridged --------------------------------------------------------------------------------------------


def test_a_guest_starts_on_a_bridge_with_a_slow_spanning_tree(node: Node) -> None:
    nodes.add_bridge(options="stp_state 1 forward_delay 1500")
    nodes.add_tap()
    with log() as lines:
        check(call("kvm-ifup-post", environ=manager.ganeti(MODE="bridged", LINK="br0", BRIDGE="br0", IP="")), 0)
        assert any("<28>" in line and "forwards only after 30 s" in line for line in logged(lines))
    assert oracle.link("tap0")["master"] == "br0"
