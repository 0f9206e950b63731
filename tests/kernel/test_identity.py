"""Whose NIC it is: on a tap that outlives its guests, in a namespace that has another's number, by another name."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from harness import agents, hooks, manager, namespaces, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_MAC, IPS
from harness.agents import NOT_WIRED, STATE, WIRED, journal, phase, wired
from harness.guests import incoming
from harness.hooks import call, check, hook
from harness.namespaces import Namespace
from harness.nodes import Node

pytestmark = pytest.mark.userns

OTHER_MAC, OTHER_IP = "aa:00:00:35:ac:02", "192.0.2.9"
Keys = dict[str, Any]
ANOTHER: dict[str, Keys] = {
    "another guest": {"instance": "web2", "mac": OTHER_MAC, "ip": [OTHER_IP]},
    "another NIC of the guest": {"index": 1, "mac": OTHER_MAC, "ip": [OTHER_IP]},
    "a renamed guest": {"instance": "web2", "ip": [OTHER_IP]},
    "another guest with the address": {"instance": "web2", "mac": OTHER_MAC, "ip": [GUEST_IP4]},
    "a NIC with another MAC": {"mac": OTHER_MAC, "ip": [GUEST_IP4]},
}
THE_SAME: dict[str, Keys] = {
    "the same": {},
    "numbered anew": {"index": 1},
    "with another address": {"ip": [OTHER_IP]},
}


def first_one() -> snapshots.Snapshot:
    """A guest that is wired on tap0, which stays; returns the node without it."""
    nodes.add_tap()
    before = snapshots.snapshot_of_kernel()
    manager.write_nic(mode="routed", link="100", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.proxies("eth0") == {GUEST_IP4}
    return before


@pytest.mark.parametrize("nic", ANOTHER.values(), ids=ANOTHER.keys())
@pytest.mark.parametrize("link", ["100", None])
def test_the_next_one_begins_at_its_own_phase(uplinked: Node, nic: dict[str, Any], link: str | None) -> None:
    """It runs elsewhere: what draws traffic here is not done, and that of the one before is undone."""
    before = first_one()
    manager.write_nic(**Keys(mode="routed", link=link, incoming=True) | nic)
    plan = call("kvm-ifup-pre", "tap0", "--plan")
    assert "undo" in plan.out
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert phase() == "pre"
    assert (oracle.proxies("eth0"), oracle.routes("tap0"), oracle.routes("tap0", "100")) == (set(), set(), set())
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.proxies("eth0") == set(nic["ip"])
    assert oracle.routes("tap0", link or "main") == set(nic["ip"])
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


def test_a_bridged_one_after_a_routed_one(uplinked: Node) -> None:
    nodes.add_bridge()
    before = first_one()
    manager.write_nic(instance="web2", mac=OTHER_MAC, mode="bridged", link="br0", incoming=True)
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert (phase(), oracle.proxies("eth0"), oracle.link("tap0")["master"]) == ("pre", set(), "br0")
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


@pytest.mark.parametrize("nic", THE_SAME.values(), ids=THE_SAME.keys())
def test_pre_once_more_takes_nothing_from_a_guest_that_runs_here(uplinked: Node, nic: dict[str, Any]) -> None:
    first_one()
    manager.write_nic(**Keys(mode="routed", link="100", ip=[GUEST_IP4], incoming=True) | nic)
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert phase() == "post"
    assert GUEST_IP4 in oracle.proxies("eth0") or nic.get("ip")


def test_a_caller_that_does_not_name_the_guest_means_the_one_that_is_there(uplinked: Node) -> None:
    first_one()
    environ = {"INTERFACE": "tap0", "MODE": "routed", "LINK": "100", "IP": GUEST_IP4, "MAC": GUEST_MAC}
    check(call("kvm-ifup-pre", environ={**environ, "MIGRATION_PHASE": "pre"}), 0)
    assert phase() == "post"


# --- namespaces and starts of the node ------------------------------------------------------------------------


def rewrite(**changes: Any) -> None:
    """Another journal on tap0."""
    (STATE / "tap0.json").write_text(json.dumps({**(journal() or {}), **changes}))


def test_the_journal_of_a_namespace_that_is_gone_goes_without_undoing(uplinked: Node) -> None:
    """Nor is anything undone in this one."""
    first_one()
    found = journal()
    assert found
    assert found["cookie"] > 0
    rewrite(cookie=found["cookie"] + 1)
    before = snapshots.snapshot_of_kernel()
    assert call("kvm-ifup", "show", "--json").out == call("kvm-ifup", "show", "tap0", "--json").out
    check(call("kvm-ifup", "gc"), 0)
    assert not (STATE / "tap0.json").exists()
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


@contextlib.contextmanager
def another_node(own: Namespace) -> Iterator[str]:
    """Inside, this process is on another node, *own*, with an uplink and tap0. In the end there is no such node."""
    client = Namespace()
    try:
        with own:
            nodes.quieten()
            tools.ip("link set lo up")
            Node(client).uplink()
            nodes.add_tap()
            yield namespaces.netns_id()
    finally:
        client.close()
        own.close()


def namespace_called(number: str) -> Namespace | None:
    """A new namespace with a *number* that has been used: the kernel gives the lowest that is free, after a moment.

    None if somebody else on this machine has it, and keeps it.
    """
    end = time.monotonic() + 10
    while time.monotonic() < end:
        found = Namespace()
        with found:
            if namespaces.netns_id() == number:
                return found
        found.close()
    return None


def test_a_guest_in_a_namespace_with_a_used_number_begins_at_its_own_phase(node: Node) -> None:
    for _ in range(10):
        manager.write_nic(mode="routed", link="100", ip=IPS)
        with another_node(Namespace()) as first:
            check(hook("kvm-ifup-post", "tap0"), 0)
            assert (phase(), wired()) == ("post", WIRED)
            before = journal() or {}
            hooks.reap()  # who announces the guest still holds the namespace
        manager.write_nic(mode="routed", link="100", ip=IPS, incoming=True)
        if again := namespace_called(first):
            break
        (STATE / "tap0.json").unlink()  # whoever has that number now may be there for long
    assert again, "no namespace gets a number again"
    with another_node(again) as second:
        found = (oracle.link("tap0")["ifindex"], int(second.strip("net:[]")))
        assert found == (before["ifindex"], before["namespace"]), "only the cookie tells them apart"
        check(hook("kvm-ifup-pre", "tap0"), 0)
        assert (phase(), wired()) == ("pre", NOT_WIRED)
        check(hook("kvm-ifup-post", "tap0"), 0)
        assert (phase(), wired()) == ("post", WIRED)


def test_after_a_start_of_the_node_every_nic_of_before_is_dead(uplinked: Node) -> None:
    """Indices begin anew, so the same one means nothing."""
    first_one()
    rewrite(boot="00000000-0000-0000-0000-000000000000")
    manager.write_nic(mode="routed", link="100", ip=[GUEST_IP4], incoming=True)
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert (phase(), oracle.proxies("eth0")) == ("pre", set())


def test_a_journal_from_before_an_upgrade_is_understood(uplinked: Node) -> None:
    before = first_one()
    old = journal() or {}
    for name in ("mark", "cookie", "uptime", "boot"):
        del old[name]
    (STATE / "tap0.json").write_text(json.dumps({**old, "version": 1}))
    assert "0 changed" in call("kvm-ifup-post", "tap0", "-v").err
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


# --- other names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argv", "NIC file", "NIC file, own name in argv", "environment", "instance"])
def test_a_tap_by_another_name_of_it_has_one_journal(uplinked: Node, how: str) -> None:
    before = snapshots.snapshot_of_kernel()
    nodes.add_tap()
    tools.ip("link property add dev tap0 altname guest0")
    name = "tap0" if how == "argv" else "guest0"
    environ = manager.ganeti("guest0", MODE="routed", IP=GUEST_IP4) if how == "environment" else {}
    if how != "environment":
        manager.write_nic(name, mode="routed", ip=[GUEST_IP4])
    arguments = {
        "argv": ["guest0"],
        "NIC file": ["guest0"],
        "NIC file, own name in argv": ["tap0"],
        "environment": [],
        "instance": ["--instance", "web1.example.com"],
    }[how]
    check(call("kvm-ifup-post", *arguments, environ=environ), 0)
    assert [path.name for path in STATE.iterdir()] == ["tap0.json"]
    assert oracle.routes("tap0") == {GUEST_IP4}
    for shown in ([], ["guest0"], ["tap0"]):
        seen = json.loads(call("kvm-ifup", "show", *shown, "--json").out)
        assert [(one["tap"], one["phase"], one["wired"]) for one in seen] == [("tap0", "post", True)]
    check(call("kvm-ifup", "check", "guest0", "--json"), 0)
    check(call("kvm-ifup-post", "tap0", environ={}), 0)
    assert [path.name for path in STATE.iterdir()] == ["tap0.json"]
    check(call("kvm-ifdown", *arguments, environ=environ), 0)
    assert [*STATE.iterdir()] == []
    tools.ip("link del tap0")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


def test_two_nic_files_for_one_tap_by_two_names_are_refused(uplinked: Node) -> None:
    nodes.add_tap()
    tools.ip("link property add dev tap0 altname guest0")
    manager.write_nic("tap0", index=0, mode="routed", ip=[GUEST_IP4])
    manager.write_nic("guest0", index=1, mode="routed", ip=[OTHER_IP], mac=OTHER_MAC)
    check(call("kvm-ifup-post", "--instance", "web1.example.com"), 65, "tap0")
    assert oracle.routes("tap0") == set()


# --- a clock that is set --------------------------------------------------------------------------------------


@pytest.mark.parametrize("since", [1.0, 4_000_000_000.0], ids=["set forward", "set back"])
def test_a_guest_is_waited_for_whatever_the_clock_says(uplinked: Node, since: float) -> None:
    incoming(uplinked)
    rewrite(since=since)
    with agents.running() as agent:
        agent.armed()
        (shown,) = json.loads(hook("kvm-ifup", "show", "--json").out)
        assert shown["phase"] in ("armed", "pre")
        assert " armed " in hook("kvm-ifup", "show").out


def test_one_that_has_been_waited_for_long_enough_is_not_waited_for(uplinked: Node) -> None:
    incoming(uplinked)
    incoming(uplinked, tap="tap1", ip=[OTHER_IP], mac=OTHER_MAC)
    uptime = (journal() or {})["uptime"]
    rewrite(uptime=uptime - 1e6, since=4_000_000_000.0)
    with agents.running() as agent:
        agent.armed("tap1")
        assert agent.armings("tap0") == 0
