"""What several NICs share: an uplink's sysctls go back only when the last of them leaves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from harness import disturb, hooks, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.hooks import call, check
from harness.nodes import Node

SHARED = ("ipv4/neigh/eth0/proxy_delay", "ipv6/neigh/eth0/proxy_delay", "ipv6/conf/eth0/proxy_ndp")
IN_USE = ["0", "0", "1"]
NICS: dict[str, dict[str, Any]] = {
    "tap0": {"instance": "web1", "ip": [GUEST_IP4, GUEST_IP6]},
    "tap1": {"instance": "web2", "ip": ["192.0.2.9", "2001:db8::9"]},
    "tap2": {"instance": "web3", "ip": ["192.0.2.10", "2001:db8::10"]},
}
ADDRESSES = {address for nic in NICS.values() for address in nic["ip"]}


def shared() -> list[str]:
    """The uplink's sysctls."""
    return [oracle.sysctl(path) for path in SHARED]


def wire_up(tap: str, *more: str) -> None:
    """A new tap, wired."""
    if tap not in {one["ifname"] for one in tools.ask("link")}:
        nodes.add_tap(tap)
    manager.write_nic(tap, mode="routed", **NICS[tap])
    check(call("kvm-ifup-post", tap, *more), 0)


def leave(tap: str, how: str) -> None:
    """The guest on *tap* leaves: in good order, or it dies and gc finds out, or the next ifdown does."""
    if how == "ifdown":
        check(call("kvm-ifdown", tap), 0)
        return
    tools.ip(f"link del {tap}")
    check(call(*(("kvm-ifup", "gc") if how == "dies, gc" else ("kvm-ifdown", tap))), 0)


HOWS = ("ifdown", "dies, gc", "dies, ifdown")


@pytest.mark.parametrize("order", list(itertools.permutations(["tap0", "tap1"])), ids="-".join)
@pytest.mark.parametrize("first", HOWS)
@pytest.mark.parametrize("second", HOWS)
def test_shared_sysctls_are_put_back_when_the_last_of_two_nics_leaves(
    uplinked: Node, order: tuple[str, str], first: str, second: str
) -> None:
    original = shared()
    assert original != IN_USE
    wire_up("tap0")
    wire_up("tap1")
    leave(order[0], first)
    assert shared() == IN_USE
    assert oracle.proxies() == set(NICS[order[1]]["ip"])
    leave(order[1], second)
    assert shared() == original
    assert oracle.proxies() == set()


@pytest.mark.parametrize("clear", ["gc", "ifdown", "the next guest on that tap"])
@pytest.mark.parametrize("last", HOWS)
def test_shared_sysctls_stay_for_a_nic_that_came_after_the_first_one_had_died(
    uplinked: Node, clear: str, last: str
) -> None:
    """The dead NIC's journal alone knows what was there before; the live one found all as it needs it."""
    original = shared()
    wire_up("tap0")
    tools.ip("link del tap0")
    wire_up("tap1")
    if clear == "gc":
        check(call("kvm-ifup", "gc"), 0)
    elif clear == "ifdown":
        check(call("kvm-ifdown", "tap0"), 0)
    else:
        wire_up("tap0")
        check(call("kvm-ifdown", "tap0"), 0)
    assert shared() == IN_USE
    assert oracle.proxies() == set(NICS["tap1"]["ip"])
    leave("tap1", last)
    assert shared() == original


def test_a_dead_nic_not_yet_cleared_away_does_not_keep_the_sysctls_for_ever(uplinked: Node) -> None:
    original = shared()
    wire_up("tap0")
    wire_up("tap1")
    tools.ip("link del tap0")
    check(call("kvm-ifdown", "tap1"), 0)
    check(call("kvm-ifup", "gc"), 0)
    assert shared() == original
    assert oracle.proxies() == set()


@pytest.mark.sweep
@pytest.mark.parametrize("order", list(itertools.permutations(NICS)), ids="-".join)
def test_three_nics_leave_in_any_order_one_of_them_killed_half_way(uplinked: Node, order: tuple[str, str, str]) -> None:
    original = shared()
    for tap in NICS:
        nodes.add_tap(tap)
    manager.write_nic("tap0", mode="routed", **NICS["tap0"])
    for number in itertools.count(1):
        # Killed once it has set the last of the shared sysctls.
        with disturb.disturbed(after=disturb.kill(number)):
            assert hooks.call_in_child("kvm-ifup-post", "tap0") < 0
        if shared() == IN_USE:
            break
    wire_up("tap1")
    wire_up("tap2")
    wire_up("tap0")
    for tap in order[:-1]:
        check(call("kvm-ifdown", tap), 0)
        assert shared() == IN_USE
    check(call("kvm-ifdown", order[-1]), 0)
    assert shared() == original


def test_what_the_administrator_had_already_set_stays(uplinked: Node) -> None:
    for path, value in zip(SHARED, IN_USE, strict=True):
        oracle.sysctl(path, value)
    before = snapshots.snapshot()
    wire_up("tap0")
    wire_up("tap1")
    for tap in ("tap0", "tap1"):
        check(call("kvm-ifdown", tap), 0)
        tools.ip(f"link del {tap}")
    assert shared() == IN_USE
    files = {line for line in snapshots.changes(before, snapshots.snapshot()) if "/run/" not in line}
    assert files == set()


def test_a_post_that_fails_does_not_take_the_shared_sysctls_from_another_nic(uplinked: Node) -> None:
    wire_up("tap0")
    nodes.add_tap("tap1")
    manager.write_nic("tap1", mode="routed", **NICS["tap1"])
    before = snapshots.snapshot()
    for number in itertools.count(1):
        with disturb.disturbed(after=disturb.refuse(number)):
            result = call("kvm-ifup-post", "tap1")
        if result:
            break
        assert snapshots.changes(before, snapshots.snapshot()) == []
        assert shared() == IN_USE
