"""Limits of what goes to a guest: as they were said, in force before the tap is up, and kept.

This kernel cannot limit what comes from a guest: tests/vm/test_rate.py. Nor has it fq_codel.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from harness import agents, disturb, hooks, manager, nodes, snapshots, tools
from harness.addresses import CLIENT_MAC, GUEST_IP4, GUEST_MAC
from harness.hooks import Result, call, check
from harness.nodes import Node
from harness.wire import ethernet, packet_socket
from tests.kernel.test_openvswitch import switch, vsctl  # noqa: F401 (a fixture)
from tests.kernel.test_shell import by_hand, commands

pytestmark = [pytest.mark.userns, pytest.mark.pyroute2]

LIMIT: dict[str, Any] = {"to_guest": "100mbit"}
MODES: dict[str, dict[str, Any]] = {
    "bridged": {"mode": "bridged", "link": "br0"},
    "routed": {"mode": "routed", "ip": [GUEST_IP4]},
    "openvswitch": {"mode": "openvswitch", "link": "ovs0"},
}
WITHOUT_SWITCH = ("bridged", "routed")


def asked(command: str) -> list[dict[str, Any]]:
    """What `tc -j` answers."""
    found: list[dict[str, Any]] = json.loads(tools.run(*command.split()) or "[]")
    return found


def root(dev: str = "tap0") -> dict[str, Any] | None:
    """The queueing discipline of a device that somebody has made, as `tc` has it."""
    found = [one for one in asked(f"tc -j qdisc show dev {dev}") if one.get("root") and one["handle"] != "0:"]
    return found[0] if found else None


def limit(dev: str = "tap0") -> tuple[int, int] | None:
    """Bytes a second to the guest, and the burst in bytes."""
    found = root(dev)
    if found is None or found["kind"] != "tbf":
        return None
    return found["options"]["rate"], found["options"]["burst"]


def is_limited(rate: int, burst: int) -> bool:
    """Whether the guest gets *rate* bytes a second; `tc` rounds the burst to microseconds, and so to some bytes."""
    found = limit()
    return found is not None and found[0] == rate and abs(found[1] - burst) <= max(20, rate // 500_000)


def wire(mode: str = "bridged", program: str = "kvm-ifup-post", **keys: Any) -> Result:
    """Have *program* wire tap0."""
    manager.write_nic(**{**MODES[mode], **keys})
    return call(program, "tap0")


@pytest.fixture
def ready(node: Node) -> Node:
    """A node with an uplink, a bridge and a tap."""
    node.uplink()
    nodes.add_bridge()
    node.guest()
    return node


# --- what is said is there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", WITHOUT_SWITCH)
def test_a_limit_to_the_guest_is_a_shaper_on_its_tap(ready: Node, mode: str) -> None:
    check(wire(mode, rate=LIMIT), 0)
    assert is_limited(12_500_000, 131_072)
    check(call("kvm-ifdown", "tap0"), 0)
    assert root() is None


@pytest.mark.parametrize(
    ("said", "rate", "burst"),
    [
        ("8kbit", 1000, 1522),  # one frame at least
        ("1mbit", 125_000, 12_500),
        ("10mbps", 10_000_000, 131_072),
        ("1gbit", 125_000_000, 1_250_000),
        ("32gbit", 4_000_000_000, 40_000_000),
    ],
)
def test_the_burst_follows_from_the_rate(ready: Node, said: str, rate: int, burst: int) -> None:
    check(wire(rate={"to_guest": said}), 0)
    assert is_limited(rate, burst)


def test_a_burst_can_be_said(ready: Node) -> None:
    check(wire(rate={"to_guest": "1gbit", "to_guest_burst": "256kb"}), 0)
    assert is_limited(125_000_000, 262_144)
    tools.ip("link set br0 mtu 9000")
    tools.ip("link set tap0 mtu 9000")
    check(wire(rate={"to_guest": "1gbit", "to_guest_burst": "2kb"}), 0)
    assert is_limited(125_000_000, 9_022), "the largest frame must pass"


LADDER: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any], int | None]] = {
    "its mode": ({}, {}, {"bridged": {"rate": LIMIT}}, 12_500_000),
    "its link": ({}, {}, {"link.br0": {"rate": {"to_guest": "1mbit"}}, "bridged": {"rate": LIMIT}}, 125_000),
    "another mode": ({}, {}, {"routed": {"rate": LIMIT}}, None),
    "its network": ({}, {"NETWORK_TAGS": "kvm-ifup:rate:to_guest:2mbit"}, {"link.br0": {"rate": LIMIT}}, 250_000),
    "its guest": ({}, {"TAGS": "kvm-ifup:rate:to_guest:off"}, {"link.br0": {"rate": LIMIT}}, None),
    "the other direction": ({"rate": {"from_guest": "off"}}, {}, {"bridged": {"rate": LIMIT}}, 12_500_000),
}


@pytest.mark.parametrize("who", LADDER)
def test_who_is_nearer_to_the_nic_is_heard(ready: Node, who: str) -> None:
    nic, tags, settings, rate = LADDER[who]
    if tags:
        environ = manager.ganeti(MODE="bridged", LINK="br0", **tags)
        check(call("kvm-ifup-post", manager.configuration(**settings), environ=environ), 0)
    else:
        manager.write_nic(mode="bridged", link="br0", **nic)
        check(call("kvm-ifup-post", "tap0", manager.configuration(**settings)), 0)
    assert (limit() or (None,))[0] == rate


@pytest.mark.parametrize("mode", WITHOUT_SWITCH)
def test_it_is_in_force_before_the_tap_is_up(ready: Node, mode: str) -> None:
    seen = []

    def look(_number: int, op: Any) -> None:
        if type(op).__name__ == "LinkUp":
            seen.append((limit() is not None, "UP" in tools.ask("link show dev tap0")[0]["flags"]))

    with disturb.disturbed(before=look):
        check(wire(mode, "kvm-ifup-pre", incoming=True, rate=LIMIT), 0)
    assert seen == [(True, False)]


def test_no_more_gets_through_than_was_said(ready: Node) -> None:
    """The kernel's own counters: what has left the shaper while there was always more that waited in it."""
    check(wire(rate={"to_guest": "8mbit", "to_guest_burst": "10kb"}), 0)
    nodes.add_port("br0")
    frame = ethernet(GUEST_MAC, CLIENT_MAC, 0x88B5, bytes(1400))
    begin = time.monotonic()
    with packet_socket("br0-far") as sender:
        for _ in range(1000):
            sender.send(frame)
    (first,) = [one for one in asked("tc -j -s qdisc show dev tap0") if one.get("root")]
    between = time.monotonic()
    time.sleep(0.4)
    passed = time.monotonic() - between
    (second,) = [one for one in asked("tc -j -s qdisc show dev tap0") if one.get("root")]
    assert first["overlimits"] > 0
    assert second["bytes"] < 1.3 * (time.monotonic() - begin) * 1_000_000 + 10_240
    # It may have sent all that there was, if this process has slept for longer.
    assert second["backlog"] == 0 or second["bytes"] - first["bytes"] > 0.3 * passed * 1_000_000


# --- it is changed in place ---------------------------------------------------------------------------------------


def test_post_changes_the_limit_and_loses_nothing_that_waits(ready: Node) -> None:
    check(wire(rate={"to_guest": "8kbit"}), 0)
    frame = ethernet(GUEST_MAC, CLIENT_MAC, 0x88B5, bytes(1000))
    with packet_socket("tap0") as sender:
        for _ in range(10):
            sender.send(frame)
    (before,) = asked("tc -j -s qdisc show dev tap0")
    assert before["qlen"] >= 8
    check(wire(rate={"to_guest": "8mbit"}), 0)
    agents.until(lambda: asked("tc -j -s qdisc show dev tap0")[0]["qlen"] == 0)
    (after,) = asked("tc -j -s qdisc show dev tap0")
    assert (limit() or (0,))[0] == 1_000_000
    assert (after["drops"], after["packets"] >= 10, after["handle"]) == (0, True, before["handle"])


def test_a_second_run_writes_nothing_and_one_without_a_limit_removes_it(ready: Node) -> None:
    check(wire(rate={"to_guest": "12345678bit", "to_guest_burst": "77777"}), 0)
    with disturb.disturbed() as written:
        check(wire(rate={"to_guest": "12345678bit", "to_guest_burst": "77777"}), 0)
    assert written == []
    check(wire(), 0)
    assert root() is None


def test_down_and_a_failure_put_back_what_was_there(node: Node) -> None:
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(**MODES["bridged"], rate=LIMIT)
    earlier = snapshots.snapshot()
    for number in range(1, 40):
        with disturb.disturbed(before=disturb.refuse(number)) as written:
            code = call("kvm-ifup-post", "tap0").code
        if code == 0:
            break
        assert code == 71
        assert (root(), snapshots.changes(earlier, snapshots.snapshot())) == (None, []), f"write {number}: {written}"
    assert limit() is not None
    tools.run("rm", "/run/kvm-ifup/state/tap0.json")  # nobody knows any more who made it
    check(call("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert root() is None


def test_what_a_killed_run_has_left_is_undone(ready: Node) -> None:
    def kill(_number: int, op: Any) -> None:
        if type(op).__name__ == "Rate":
            disturb.kill(1)(1, op)

    manager.write_nic(**MODES["bridged"], rate=LIMIT)
    with disturb.disturbed(after=kill):
        assert hooks.call_in_child("kvm-ifup-post", "tap0") == -9
    assert limit() is not None
    check(call("kvm-ifup", "gc"), 0)
    assert root() is None


# --- others ---------------------------------------------------------------------------------------------------------

DRIFT = {
    "no limit": "tc qdisc del dev tap0 root",
    "another rate": "tc qdisc change dev tap0 root handle 6b76: tbf rate 1gbit burst 128kb limit 1mb",
    "another burst": "tc qdisc change dev tap0 root handle 6b76: tbf rate 100mbit burst 1mb limit 1mb",
    "nothing passes": "tc qdisc add dev tap0 parent 6b76:1 pfifo; tc qdisc del dev tap0 parent 6b76:1",
    "another kind": "tc qdisc replace dev tap0 root handle 1: htb default 1",
}


@pytest.mark.parametrize("drift", DRIFT)
def test_check_names_what_somebody_has_done_and_repairs_it(ready: Node, drift: str) -> None:
    check(wire(rate=LIMIT), 0)
    before = limit()
    tools.run("sh", "-ec", DRIFT[drift])
    said = call("kvm-ifup", "check")
    assert said.code == 1
    assert "tap0 limit to guest" in said.out
    assert "tbf rate 100mbit burst 131072b" in call("kvm-ifup", "plan", "post", "tap0").out
    assert call("kvm-ifup", "check", "--repair").code == 0
    assert limit() == before
    assert call("kvm-ifup", "check").code == 0


@pytest.mark.parametrize("kind", ["htb default 1", "tbf rate 1mbit burst 10kb limit 100kb"])
def test_a_shaper_of_others_is_not_destroyed(ready: Node, kind: str) -> None:
    def there() -> tuple[str, str]:
        found = root() or {}
        return found["kind"], found["handle"]

    tools.run("tc", "qdisc", "add", "dev", "tap0", "root", "handle", "1:", *kind.split())
    before = there()
    check(wire(rate=LIMIT), 69, f"tap0 has a queueing discipline of others: {kind.split()[0]} 1:")
    check(call("kvm-ifup", "plan", "post", "tap0"), 69, "tap0 has a queueing discipline of others")
    assert there() == before
    check(wire(), 0)  # without a limit of ours it is no affair of ours
    check(call("kvm-ifdown", "tap0"), 0)
    assert there() == before


@pytest.mark.parametrize("drift", ["no limit", "another rate"])
def test_the_agent_puts_it_back(ready: Node, drift: str) -> None:
    with agents.running():
        manager.write_nic(**MODES["bridged"], rate=LIMIT)
        agents.through("kvm-ifup-post", "tap0")
        before = limit()
        assert before is not None
        tools.run("sh", "-ec", DRIFT[drift])
        assert limit() != before
        agents.until(lambda: limit() == before)


def test_a_kernel_without_policing_says_what_it_lacks(ready: Node) -> None:
    check(wire(program="kvm-ifdown", rate={"from_guest": "1mbit"}), 0)
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 69, "cls_matchall or act_police")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert asked("tc -j qdisc show dev tap0 ingress") == []


def test_the_printed_commands_do_the_same(ready: Node) -> None:
    check(wire(rate=LIMIT), 0)
    wired = root()
    check(call("kvm-ifdown", "tap0"), 0)
    assert root() is None
    for phase, expected in (("post", wired), ("down", None)):
        by_hand(commands(phase))
        assert root() == expected
        if phase == "post":
            check(call("kvm-ifup-post", "tap0"), 0)


# --- Open vSwitch ---------------------------------------------------------------------------------------------------


def test_a_limit_on_a_switch_is_there_once_the_switch_has_the_tap(switch: Node) -> None:  # noqa: F811
    """The switch removes every queueing discipline that it finds on a port that is added to it."""
    check(wire("openvswitch", rate=LIMIT), 0)
    assert is_limited(12_500_000, 131_072)
    vsctl("set", "interface", "tap0", "external_ids:somebody=else")  # which makes it look at its ports again
    assert is_limited(12_500_000, 131_072)
    check(wire("openvswitch", rate={"to_guest": "1mbit"}), 0)
    assert is_limited(125_000, 12_500)
    assert call("kvm-ifup", "check").code == 0
    vsctl("del-port", "tap0")
    tools.run("sh", "-ec", "tc qdisc replace dev tap0 root handle 6b76: tbf rate 1mbit burst 12500b limit 1mb")
    check(wire("openvswitch", rate={"to_guest": "1mbit"}, vlan=".5"), 0)
    assert is_limited(125_000, 12_500), "it was right until the port was added again"
    check(call("kvm-ifdown", "tap0"), 0)
    assert root() is None
