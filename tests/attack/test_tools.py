"""Ready-made attack tools of Debian, in a guest with `filter = "address"`: none gets through, what is right does.

The judges: what comes out of the tap before the filter (so that a tool which does nothing is noticed), what comes to
the victim, and what the victim believes afterwards.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from harness import attacker, manager, nodes, oracle, tools
from harness.addresses import CLIENT_IP4, CLIENT_IP6, CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.addresses import GUEST_LINK_LOCAL as LINK_LOCAL
from harness.agents import until
from harness.attacker import FarEnd, harm
from harness.hooks import call, check
from harness.namespaces import Namespace
from harness.nodes import Node

GATEWAY_MAC, GATEWAY_IP4, GATEWAY_IP6, GATEWAY_LINK_LOCAL = "02:00:00:00:00:77", "192.0.2.2", "2001:db8::2", "fe80::77"
CLIENT_LINK_LOCAL = "fe80::ff:fe00:1"
ENOUGH = 3  # harmful frames of one tool
PATIENCE = 60.0

# Each does harm without a filter, by itself and soon.
ATTACKS = {
    "dsniff": f"""
        arpspoof -i eth0 -t {CLIENT_IP4} {GATEWAY_IP4}
        macof -i eth0 -n 20
    """,
    "arping": f"""
        arping -i eth0 -c 1 -U -S {GATEWAY_IP4} {GATEWAY_IP4}
        arping -i eth0 -c 1 -P -U -S {GATEWAY_IP4} {CLIENT_IP4}
        arping -i eth0 -c 1 -p -s {GATEWAY_MAC} -S {GUEST_IP4} {CLIENT_IP4}
        arping -i eth0 -c 1 -V 0 -S {GATEWAY_IP4} {CLIENT_IP4}
    """,
    "mausezahn": f"""
        mausezahn eth0 -c 3 -t arp reply,smac={GATEWAY_MAC},sip={GUEST_IP4},tip={CLIENT_IP4}
        mausezahn eth0 -c 3 -t arp reply,sip={GATEWAY_IP4},tip={CLIENT_IP4}
        mausezahn eth0 -c 3 -Q 0 -b {CLIENT_MAC} -A {GATEWAY_IP4} -B {CLIENT_IP4} -t udp dp=9
        mausezahn eth0 -c 3 -Q 5,7 -a rand -b bc -A {GUEST_IP4} -B {CLIENT_IP4} -t udp dp=9
        mausezahn eth0 -c 3 -Q 5,7 -b bc -A {GATEWAY_IP4} -B {CLIENT_IP4} -t udp dp=9
        mausezahn eth0 -c 3 -Q 0,0 -b {CLIENT_MAC} -A {GUEST_IP4} -B {CLIENT_IP4} -t udp sp=67,dp=68
        mausezahn eth0 -c 3 -a rand -b {CLIENT_MAC} -A {GUEST_IP4} -B {CLIENT_IP4} -t udp dp=9
        mausezahn eth0 -c 3 -b {CLIENT_MAC} -A rand -B {CLIENT_IP4} -t udp dp=9
        mausezahn eth0 -c 3 -b {CLIENT_MAC} -A {GUEST_IP4} -B {CLIENT_IP4} -t udp sp=67,dp=68
        mausezahn eth0 -c 3 -t bpdu conf
        mausezahn eth0 -c 3 -a rand -t bpdu conf
        mausezahn eth0 -c 3 -t cdp change
        mausezahn -6 eth0 -c 3 -b {CLIENT_MAC} -A {GUEST_IP6} -B {CLIENT_IP6} -t udp sp=547,dp=546
        mausezahn -6 eth0 -c 3 -b {CLIENT_MAC} -A {GATEWAY_IP6} -B {CLIENT_IP6} -t udp dp=9
        mausezahn eth0 -c 3 0180c200000e02000000007788cc0000000000000000000000000000
    """,
    "thc-ipv6": f"""
        atk6-fake_router26 -A 2001:db8:bad::/64 -n 2 -i 0 eth0
        atk6-fake_router26 -E H -A 2001:db8:bad::/64 -n 2 -i 0 eth0
        atk6-fake_router26 -E 1 -A 2001:db8:bad::/64 -n 2 -i 0 eth0
        atk6-fake_router26 -E D -A 2001:db8:bad::/64 -n 2 -i 0 eth0
        atk6-fake_router26 -E F -A 2001:db8:bad::/64 -n 2 -i 0 eth0
        atk6-fake_router6 eth0 2001:db8:bad::/64
        atk6-flood_router26 eth0
        atk6-kill_router6 eth0 {GATEWAY_LINK_LOCAL}
        atk6-fake_advertise6 -n 2 -w 0 eth0 {GATEWAY_IP6}
        atk6-fake_advertise6 -H -n 2 -w 0 eth0 {GATEWAY_IP6} {CLIENT_IP6}
        atk6-fake_advertise6 -f -n 2 -w 0 eth0 {GATEWAY_IP6} {CLIENT_IP6}
        atk6-fake_advertise6 -D -n 2 -w 0 eth0 {GATEWAY_IP6} {CLIENT_IP6}
        atk6-fake_advertise6 -F -n 2 -w 0 eth0 {GATEWAY_IP6} {CLIENT_IP6}
        atk6-flood_advertise6 eth0
        atk6-fake_solicitate6 eth0 {GATEWAY_IP6} {CLIENT_IP6} {GATEWAY_MAC} {GATEWAY_IP6}
        atk6-flood_solicitate6 eth0
        atk6-redir6 eth0 {CLIENT_IP6} 2001:db8:ffff::1 {CLIENT_LINK_LOCAL} {LINK_LOCAL} {GUEST_MAC}
        atk6-smurf6 eth0 {CLIENT_IP6}
        atk6-toobig6 eth0 {CLIENT_IP6} {GATEWAY_IP6} 1280
        atk6-sendpees6 eth0 512 2001:db8:bad:: {CLIENT_IP6}
    """,
    "ipv6toolkit": f"""
        ra6 -i eth0 -s {LINK_LOCAL} -d ff02::1 -t 1800 -e -P 2001:db8:bad::/64#LA
        ra6 -i eth0 -s {LINK_LOCAL} -d ff02::1 -t 1800 -e -y 16
        ra6 -i eth0 -s {LINK_LOCAL} -d ff02::1 -t 1800 -e -u 8
        ra6 -i eth0 -s {LINK_LOCAL} -d ff02::1 -t 1800 -e -H 8
        ra6 -i eth0 -s {LINK_LOCAL} -d ff02::1 -t 1800 -E {GATEWAY_MAC}
        na6 -i eth0 -s {LINK_LOCAL} -d ff02::1 -t {GATEWAY_IP6} -o -e
        na6 -i eth0 -s {GUEST_IP6} -d {CLIENT_IP6} -t {GUEST_IP6} -o -E {GATEWAY_MAC}
        na6 -i eth0 -s {GUEST_IP6} -d {CLIENT_IP6} -t {GATEWAY_IP6} -o -e -u 8
        na6 -i eth0 -s {GUEST_IP6} -d {CLIENT_IP6} -t {GATEWAY_IP6} -o -e -y 8
        ns6 -i eth0 -S {GUEST_MAC} -s {GATEWAY_IP6} -d {CLIENT_IP6} -t {CLIENT_IP6} -e
        ns6 -i eth0 -S {GUEST_MAC} -s {GUEST_IP6} -d {CLIENT_IP6} -t {CLIENT_IP6} -E {GATEWAY_MAC}
        ns6 -i eth0 -F 5 -d ff02::1 -t {CLIENT_IP6} -e
        rs6 -i eth0 -s {GUEST_IP6} -d ff02::2 -E {GATEWAY_MAC}
        rs6 -i eth0 -s fe80::/64 -F 5 -d ff02::2 -e
        rd6 -i eth0 -s {GATEWAY_LINK_LOCAL} -d {CLIENT_IP6} -r 2001:db8:ffff::1 -t {LINK_LOCAL} -n -e
        rd6 -i eth0 -s {LINK_LOCAL} -d {CLIENT_IP6} -r 2001:db8:ffff::1 -t {LINK_LOCAL} -n -e
        frag6 -i eth0 -s {GATEWAY_IP6} -d {CLIENT_IP6} -F 5
    """,
}


@dataclass
class Scene:
    """A guest's system behind a filtered tap; what comes out of that tap, and what comes to the victim."""

    node: Node
    guest: Namespace
    sent: FarEnd
    seen: FarEnd

    def attack(self, *argv: str) -> str:
        """Run a tool until it has done enough; what is wrong, empty if it has not got through."""
        with self.guest:
            process = subprocess.Popen(
                argv, env=dict(tools.CLEAN), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        harmful, end = 0, time.monotonic() + PATIENCE
        while harmful < ENOUGH and time.monotonic() < end:
            ended = process.poll() is not None  # before the look at what it has sent
            frame = self.sent.next(0.05 if harmful else 0.5)
            harmful += bool(frame and harm(frame))
            if frame is None and (harmful or ended):
                break  # some send one, and wait for ever
        process.kill()
        said = process.communicate()[0].decode(errors="replace")
        if not harmful:
            return f"does nothing: {said[-300:]}"
        return "; ".join(sorted({found for frame in self.came() if (found := harm(frame))}))

    def came(self) -> list[bytes]:
        """What has come to the victim, up to a ping of the guest's, which has to come."""
        self.ping()
        found = []
        while (frame := self.seen.next(0)) is not None:
            found.append(frame)
        while self.sent.next(0) is not None:
            pass
        return found

    def ping(self) -> None:
        """What is right passes, in both families."""
        with self.guest:
            for address in (CLIENT_IP4, CLIENT_IP6):
                tools.run("ping", "-q", "-c", "1", "-W", "5", address)


@pytest.fixture
def scene(node: Node) -> Iterator[Scene]:
    oracle.sysctl("ipv6/conf/default/disable_ipv6", 1)  # the node says nothing of its own
    nodes.add_bridge(options="mcast_snooping 0")
    node.uplink(master="br0")
    guest = node.guest()
    manager.write_nic(mode="bridged", link="br0", filter="address", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    with node.client:
        for name, value in (("accept_ra", 2), ("autoconf", 1), ("accept_redirects", 1)):
            oracle.sysctl(f"ipv6/conf/eth0/{name}", value)
    with node.client:
        seen = FarEnd()
    sent = FarEnd("tap0")
    with attacker.attacker(guest) as place:
        yield Scene(node, place, sent, seen)
    sent.close()
    seen.close()


def neighbours() -> dict[str, str]:
    """What the victim believes of the gateway."""
    believed = {one["dst"]: one.get("lladdr", "") for one in tools.ask("neigh show dev eth0")}
    return {address: believed.get(address, "") for address in (GATEWAY_IP4, GATEWAY_IP6, GATEWAY_LINK_LOCAL)}


def ways() -> set[str]:
    """Where the victim sends what, and its own addresses."""
    routes = {f"{one['dst']} {one.get('gateway')}" for one in tools.ask("-6 route show")}
    return routes | {info["local"] for one in tools.ask("addr show dev eth0") for info in one["addr_info"]}


@pytest.mark.parametrize("package", ATTACKS)
def test_no_tool_gets_through_and_the_victim_believes_nothing(scene: Scene, package: str) -> None:
    with scene.node.client:
        for address in (GATEWAY_IP4, GATEWAY_IP6, GATEWAY_LINK_LOCAL):
            tools.ip(f"neigh replace {address} lladdr {GATEWAY_MAC} dev eth0 nud stale")
        believed = neighbours()
        configured = ways()
    commands = [line.split() for line in ATTACKS[package].strip().splitlines()]
    wrong = {" ".join(argv): found for argv in commands if (found := scene.attack(*argv))}
    assert wrong == {}
    with scene.node.client:
        assert neighbours() == believed
        assert ways() == configured
    assert {
        one["mac"] for one in tools.ask("bridge -j fdb show br br0 brport tap0") if one.get("state") != "permanent"
    } == {GUEST_MAC}


@pytest.mark.parametrize("how", ["", "-S"])
def test_nobody_keeps_others_from_new_addresses(scene: Scene, how: str) -> None:
    """atk6-dos-new-ip6 answers whoever asks whether an address is free, or asks the same."""
    with scene.guest:
        process = subprocess.Popen(
            ["atk6-dos-new-ip6", *how.split(), "eth0"], env=dict(tools.CLEAN), stdout=subprocess.DEVNULL
        )
    with scene.node.client:
        for name in ("dad_transmits", "accept_dad"):
            oracle.sysctl(f"ipv6/conf/eth0/{name}", 1)
        tools.ip("addr add 2001:db8::99/64 dev eth0")
        until(lambda: "tentative" not in state("2001:db8::99"))
        assert "dadfailed" not in state("2001:db8::99")
    process.kill()
    process.wait()
    assert any(harm(frame) for frame in iter(lambda: scene.sent.next(0), None))


def state(address: str) -> dict[str, object]:
    """An address of the victim's, as `ip` shows it."""
    (found,) = [
        info for one in tools.ask("addr show dev eth0") for info in one["addr_info"] if info.get("local") == address
    ]
    return dict(found)


def test_nobody_answers_for_others(scene: Scene) -> None:
    """atk6-parasite6 answers whatever is asked for, with its own MAC."""
    with scene.guest:
        process = subprocess.Popen(["atk6-parasite6", "eth0"], env=dict(tools.CLEAN), stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not (frame := scene.sent.next(0.01)) or not harm(frame):
            assert time.monotonic() < end, "it answers nothing"
            with scene.node.client:
                subprocess.run(["ping", "-q", "-c", "1", "-W", "0.2", GATEWAY_IP6], capture_output=True)
    finally:
        process.kill()
        process.wait()
    assert [found for frame in scene.came() if (found := harm(frame))] == []
    with scene.node.client:
        assert neighbours()[GATEWAY_IP6] == ""
