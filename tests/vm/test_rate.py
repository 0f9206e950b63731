"""Limits in both directions, on a kernel that has all it takes: what `tc` says, and how much gets through."""

from __future__ import annotations

import json
import re
import shlex
import time
from typing import Any

from harness import disturb, hooks, manager, tools
from harness.addresses import CLIENT_MAC, GUEST_IP4, GUEST_MAC
from harness.hooks import call, check
from harness.nodes import Node, add_bridge, add_port
from harness.wire import ethernet, packet_socket

BOTH = {"to_guest": "100mbit", "from_guest": "50mbit"}


def tc(arguments: str) -> list[dict[str, Any]]:
    """What `tc -j` answers."""
    found: list[dict[str, Any]] = json.loads(tools.run("tc", "-j", *arguments.split()) or "[]")
    return found


def shaper() -> tuple[int, str] | None:
    """Bytes a second to the guest, and the kind of queue below."""
    found = {one.get("parent", "root"): one for one in tc("qdisc show dev tap0")}
    if "root" not in found or found["root"]["kind"] != "tbf":
        return None
    return found["root"]["options"]["rate"], found["6b76:1"]["kind"]


def police() -> list[tuple[int, str, float]]:
    """Priority, rate and burst in KiB of each filter that polices what comes from the guest.

    As text: `tc` of Debian 12 leaves both out of its JSON.
    """
    said = tools.run("tc", "filter", "show", "dev", "tap0", "ingress")
    priorities = re.findall(r"protocol all pref (\d+) matchall .*handle 0x", said)
    limits = re.findall(r"police \S+ rate (\S+) burst (\S+) .*action drop/continue", said)
    assert said.count("police") == len(limits), said
    return [(int(one), rate, kib(burst)) for one, (rate, burst) in zip(priorities, limits, strict=True)]


def kib(size: str) -> float:
    """A size as `tc` says it."""
    number, unit = re.fullmatch(r"([0-9.]+)(b|Kb|Mb)", size).groups()  # type: ignore[union-attr]
    return float(number) * {"b": 1 / 1024, "Kb": 1, "Mb": 1024}[unit]


def ingress() -> list[dict[str, Any]]:
    """What of ours is there for what comes in."""
    return [one for one in tc("qdisc show dev tap0") if one["kind"] == "ingress"]


def wire(**keys: Any) -> None:
    """Have post wire tap0."""
    manager.write_nic(**({"mode": "bridged", "link": "br0"} | keys))
    check(call("kvm-ifup-post", "tap0"), 0)


def is_policed(rate: str, burst: int) -> bool:
    """Whether the guest may send at *rate*, and so many KiB at once; `tc` rounds."""
    return [(one[1], abs(one[2] / burst - 1) < 0.01) for one in police()] == [(rate, True)]


def test_limits_in_both_directions_follow_what_is_said_and_go(node: Node) -> None:
    add_bridge("br0")
    node.guest()
    wire(rate=BOTH)
    assert shaper() == (12_500_000, "fq_codel")
    assert is_policed("50Mbit", 305)
    with disturb.disturbed() as written:
        wire(rate=BOTH)
    assert written == []
    (first,) = tc("qdisc show dev tap0 root")
    wire(rate={"to_guest": "10mbit", "from_guest": "1gbit", "from_guest_burst": "256kb"})
    assert shaper() == (1_250_000, "fq_codel")
    assert is_policed("1Gbit", 256)
    assert tc("qdisc show dev tap0 root")[0]["handle"] == first["handle"]
    wire(rate={"from_guest": "8kbit"})
    assert shaper() is None
    assert is_policed("8Kbit", 128)
    check(call("kvm-ifdown", "tap0"), 0)
    assert (shaper(), police(), [one for one in tc("qdisc show dev tap0") if one["kind"] == "ingress"]) == (
        None,
        [],
        [],
    )


def test_a_routed_guest_sends_no_more_than_was_said(node: Node) -> None:
    node.uplink()
    tap = node.guest()
    wire(mode="routed", link=None, ip=[GUEST_IP4], rate={"from_guest": "800kbit"})
    frame = ethernet("ff:ff:ff:ff:ff:ff", GUEST_MAC, 0x88B5, bytes(1400))
    before = tc("-s filter show dev tap0 ingress")
    begin = time.monotonic()
    for _ in range(400):
        tap.send(frame)
    (action,) = [a for one in tc("-s filter show dev tap0 ingress") for a in one.get("options", {}).get("actions", ())]
    passed = time.monotonic() - begin  # after the counters were read: a frame may have waited for the processor
    assert before
    seen, dropped = action["stats"]["packets"], action["stats"]["drops"]
    assert seen == 400
    sent = (seen - dropped) * (len(frame) - 14)  # a limit at ingress counts no Ethernet header (sch_handle_ingress)
    assert sent <= 131_072 + 1.3 * passed * 100_000
    assert sent >= 100_000, "what is within the burst passes"


def test_filters_of_others_stay_and_still_see_what_is_within_the_limit(node: Node) -> None:
    add_bridge("br0")
    add_port("br0")
    tap = node.guest()
    tools.run("tc", "qdisc", "add", "dev", "tap0", "clsact")
    other = "tc filter add dev tap0 ingress pref 40000 matchall action drop"
    tools.run(*other.split())
    wire(rate={"from_guest": "1mbit"})
    with packet_socket("br0-far") as far:
        far.setblocking(False)
        tap.send(ethernet(CLIENT_MAC, GUEST_MAC, 0x88B5, bytes(100)))
    assert [
        action["stats"]["packets"]
        for one in tc("-s filter show dev tap0 ingress")
        for action in one.get("options", {}).get("actions", ())
    ] == [1, 1]
    check(call("kvm-ifdown", "tap0"), 0)
    assert [one["pref"] for one in tc("filter show dev tap0 ingress") if "options" in one] == [40000]
    assert "clsact" in [one["kind"] for one in tc("qdisc show dev tap0")]


def test_drift_is_named_and_mended_and_the_printed_commands_do_the_same(node: Node) -> None:
    add_bridge("br0")
    node.guest()
    wire(rate=BOTH)
    for command in (
        "tc filter del dev tap0 ingress pref 27510",
        "tc qdisc del dev tap0 ingress",
        "tc qdisc replace dev tap0 parent 6b76:1 pfifo; tc qdisc del dev tap0 parent 6b76:1",
    ):
        tools.run("sh", "-ec", command)
        said = call("kvm-ifup", "check")
        assert (said.code, "tap0 limit" in said.out) == (1, True), command
        assert call("kvm-ifup", "check", "--repair").code == 0
        assert (shaper(), is_policed("50Mbit", 305)) == ((12_500_000, "fq_codel"), True)
    check(call("kvm-ifdown", "tap0"), 0)
    for line in hooks.printed(call("kvm-ifup", "plan", "post", "tap0").out):
        tools.run(*shlex.split(line))
    assert (shaper(), is_policed("50Mbit", 305)) == ((12_500_000, "fq_codel"), True)
    with disturb.disturbed() as written:
        check(call("kvm-ifup-post", "tap0"), 0)
    assert [op for op in written if type(op).__name__ == "Rate"] == []


def test_a_failure_and_a_kill_leave_nothing(node: Node) -> None:
    add_bridge("br0")
    node.guest()
    manager.write_nic(mode="bridged", link="br0", rate=BOTH)
    seen: list[int] = []

    def refuse(number: int, op: Any) -> None:
        if type(op).__name__ == "LinkUp" and not seen:
            seen.append(len(police()))
            disturb.refuse(number)(number, op)

    with disturb.disturbed(before=refuse):
        assert call("kvm-ifup-post", "tap0").code == 71
    assert seen == [1], "in force before the tap is up"
    assert (shaper(), police(), [one for one in tc("qdisc show dev tap0") if one["kind"] == "ingress"]) == (
        None,
        [],
        [],
    )
