"""What is wired stays wired, whoever breaks it; and where nothing is wrong, nothing is done."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import agents, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, IPS
from harness.agents import Agent, phase, until, wired
from harness.guests import answering, arrived, incoming, rarp, witness
from harness.hooks import call, check, hook
from harness.nodes import Node

ROUTED: dict[str, Any] = {"mode": "routed", "link": "100", "ip": IPS}
BRIDGED: dict[str, Any] = {"mode": "bridged", "link": "br0"}

# What others do to a routed NIC with a table, as commands, and whether the kernel tells of it.
TO_ROUTED = {
    "rule": "ip rule del iif tap0",
    "IPv6 rule": "ip -6 rule del iif tap0",
    "another table": "ip rule del iif tap0; ip rule add iif tap0 lookup 200 priority 10000",
    "route": f"ip route del {GUEST_IP4} table 100",
    "IPv6 route": f"ip -6 route del {GUEST_IP6} table 100",
    "all routes": "ip route flush table 100; ip -6 route flush table 100",
    "proxy": f"ip neigh del proxy {GUEST_IP4} dev eth0",
    "IPv6 proxy": f"ip neigh del proxy {GUEST_IP6} dev eth0",
    "neighbour": f"ip neigh del {GUEST_IP4} dev tap0",
    "IPv6 neighbour": f"ip neigh del {GUEST_IP6} dev tap0",
    "neighbour's MAC": f"ip neigh replace {GUEST_IP4} dev tap0 lladdr 02:00:00:00:00:99 nud permanent",
    "proxy_ndp": "sysctl -qw net.ipv6.conf.eth0.proxy_ndp=0",
    "proxy_delay": "sysctl -qw net.ipv4.neigh.eth0.proxy_delay=80",
    "IPv6 proxy_delay": "sysctl -qw net.ipv6.neigh.eth0.proxy_delay=80",
    "the tap's proxy_arp": "sysctl -qw net.ipv4.conf.tap0.proxy_arp=0",
    "the tap's proxy_delay": "sysctl -qw net.ipv4.neigh.tap0.proxy_delay=80",
    "the tap's rp_filter": "sysctl -qw net.ipv4.conf.tap0.rp_filter=0",
    "IPv6 sources": "nft flush map inet kvm-ifup sources",
    "an IPv6 source": f"nft delete element inet kvm-ifup addresses {{ tap0 . {GUEST_IP6} }}",
    "rules about sources": "nft flush chain inet kvm-ifup prerouting",
    "all rules": "nft flush ruleset",
    "rules that sleep": "nft add table inet kvm-ifup '{ flags dormant; }'",
    "the tap's redirects": "sysctl -qw net.ipv4.conf.tap0.send_redirects=1",
    "the tap's forwarding": "sysctl -qw net.ipv4.conf.tap0.forwarding=0",
    "the tap's accept_ra": "sysctl -qw net.ipv6.conf.tap0.accept_ra=1",
    "proxy_ndp for all": "sysctl -qw net.ipv6.conf.all.proxy_ndp=0",
    "gateway": "ip -6 addr flush dev tap0",
    "the tap flaps": "ip link set tap0 down; ip link set tap0 up",
    "the tap is down": "ip link set tap0 down",
    "MAC": "ip link set tap0 address 02:00:00:00:00:99",
    "on a bridge": "ip link add name other0 type bridge; ip link set tap0 master other0",
}
TO_BRIDGED = {
    "MTU": "ip link set tap0 mtu 1400",
    "MAC": "ip link set tap0 address 02:00:00:00:00:99",
    "no bridge": "ip link set tap0 nomaster",
    "another bridge": "ip link add name other0 type bridge; ip link set tap0 master other0",
    "the tap is down": "ip link set tap0 down",
    "addrgenmode": "ip link set tap0 addrgenmode eui64",
    "port option": "bridge link set dev tap0 mcast_router 0",
    "IPv6": "sysctl -qw net.ipv6.conf.tap0.disable_ipv6=0",
}
# A bridge made anew, as `ifdown br0; ifup br0` does: at once, and with a pause.
ANEW = ["ip link del br0; {}", "ip link del br0; sleep 0.7; {}"]
MAKE = "ip link add name br0 address 02:00:00:00:b0:30 type bridge; ip link set br0 mtu 1500 up"
RENAMED = "ip link set br0 down; ip link set br0 name old0; "


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


def wire(agent: Agent, node: Node, **nic: Any) -> None:
    """A guest that runs here, and that nobody hears from."""
    node.guest()
    manager.write_nic("tap0", "web1", **nic)
    agents.through("kvm-ifup-post", "tap0")
    settled(node, agent)


def settled(node: Node, agent: Agent) -> None:
    """Wait until the agent has looked at what has happened by now."""
    witness(node, agent)
    until(agent.rests)


@pytest.mark.parametrize("disturbance", TO_ROUTED)
def test_what_others_take_from_a_routed_nic_is_put_back(uplinked: Node, agent: Agent, disturbance: str) -> None:
    tools.ip("rule add iif eth0 lookup 100")
    wire(agent, uplinked, **ROUTED)
    disturbed_and_mended(agent, TO_ROUTED[disturbance])


@pytest.mark.parametrize("disturbance", TO_BRIDGED)
def test_what_others_do_to_a_bridged_nic_is_put_right(uplinked: Node, agent: Agent, disturbance: str) -> None:
    nodes.add_bridge()
    wire(agent, uplinked, **BRIDGED)
    disturbed_and_mended(agent, TO_BRIDGED[disturbance])


def differing(before: Any) -> list[str]:
    """What is not as it was, without what a test has made.

    An address that the kernel makes by itself has other flags than one that somebody has added.
    """
    found = snapshots.changes(before, snapshots.snapshot_of_kernel())
    addresses = [line for line in found if " addr tap0 " in line]
    made = [line for line in found if "other0" in line]
    known = [line for line in addresses if "fe80::fc00:ff:fe35:ac01" in line] if len(addresses) == 2 else []
    return [line for line in found if line not in (*made, *known)]


def disturbed_and_mended(agent: Agent, disturbance: str) -> None:
    """Break it, and wait until it is as it was; one line says what it was."""
    before = snapshots.snapshot_of_kernel()
    said = agent.said().count("tap0): mended: ")
    tools.run("sh", "-c", disturbance)
    until(lambda: agent.said().count("tap0): mended: ") > said)
    until(lambda: differing(before) == [])
    assert phase() == "post"


@pytest.mark.parametrize("anew", ANEW)
def test_a_bridge_that_is_made_anew_has_its_taps_again(uplinked: Node, agent: Agent, anew: str) -> None:
    nodes.add_bridge()
    wire(agent, uplinked, **BRIDGED)
    tools.run("sh", "-c", anew.format(MAKE))
    until(lambda: oracle.link("tap0").get("master") == "br0")
    agent.heard("tap0", "mended", "br0")


@pytest.mark.parametrize("phase_reached", ["pre", "post"])
@pytest.mark.parametrize("incoming", [False, True], ids=["started here", "arrived"])
def test_a_bridge_made_anew_with_slow_stp_has_its_taps_again(
    uplinked: Node, agent: Agent, incoming: bool, phase_reached: str
) -> None:
    """A port that forwards late is better than none; only a migration is refused because of it."""
    nodes.add_bridge()
    uplinked.guest()
    manager.write_nic("tap0", "web1", **BRIDGED, incoming=incoming)
    agents.through(f"kvm-ifup-{phase_reached}", "tap0")
    settled(uplinked, agent)
    tools.run("sh", "-c", "ip link del br0; " + MAKE.replace("bridge;", "bridge stp_state 1 forward_delay 1500;"))
    until(lambda: oracle.link("tap0").get("master") == "br0")
    agent.heard("tap0", "mended", "br0")
    time.sleep(3)
    assert agent.said().count("tap0): mended: ") == 1  # nobody mends what only takes its time
    assert tools.ask("bridge -j link show dev tap0")[0]["state"] in ("listening", "learning")


def test_a_bridge_whose_mtu_changes_has_the_taps_follow(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge(mtu=9000)
    wire(agent, uplinked, **BRIDGED)
    assert oracle.link("tap0")["mtu"] == 9000
    tools.ip("link set br0 mtu 1500")
    until(lambda: oracle.link("tap0")["mtu"] == 1500)


def test_a_tap_that_drags_down_its_bridge_does_not_drag_down_the_others(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge()
    for number in range(4):
        nodes.add_tap(f"tap{number}")
        manager.write_nic(f"tap{number}", f"web{number}", mac=f"aa:00:00:00:02:{number:02x}", **BRIDGED)
        check(hook("kvm-ifup-post", f"tap{number}"), 0)
    settled(uplinked, agent)
    tools.ip("link set tap2 mtu 1400")
    assert oracle.link("br0")["mtu"] == 1400
    agent.heard("(tap2): mended")
    assert [oracle.link(dev)["mtu"] for dev in ("br0", "tap0", "tap1", "tap2", "tap3")] == [1500] * 5
    # But if the bridge's own is changed, they all follow.
    tools.ip("link set br0 mtu 1300")
    until(lambda: {oracle.link(f"tap{number}")["mtu"] for number in range(4)} == {1300})
    time.sleep(1)
    assert {oracle.link(f"tap{number}")["mtu"] for number in range(4)} == {1300}


def test_a_guest_that_is_waited_for_is_kept_in_pre_and_no_further(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent, **ROUTED)
    tools.ip("rule del iif tap0")
    tools.ip("link set tap0 down")
    oracle.sysctl("ipv4/neigh/tap0/proxy_delay", 80)
    until(lambda: len(oracle.rules()) == 2 and oracle.sysctl("ipv4/neigh/tap0/proxy_delay") == "0")
    until(lambda: "UP" in oracle.link("tap0")["flags"])
    settled(uplinked, agent)
    assert phase() == "pre"
    assert wired() == agents.NOT_WIRED
    guest.send(rarp())
    until(lambda: wired() == agents.WIRED)


def test_a_bridged_guest_that_is_waited_for_gets_its_bridge_back(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge()
    incoming(uplinked, agent, **BRIDGED)
    tools.ip("link set tap0 nomaster")
    until(lambda: oracle.link("tap0").get("master") == "br0")
    assert phase() == "pre"


def test_several_nics_and_several_things_at_once(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge()
    wire(agent, uplinked, **BRIDGED)
    arrived(uplinked, agent, "tap1", ip=["192.0.2.77"], mac="aa:00:00:00:00:77")
    before = snapshots.snapshot_of_kernel()
    tools.ip("link set tap0 nomaster mtu 1400")
    tools.ip("route del 192.0.2.77")
    tools.ip("neigh del proxy 192.0.2.77 dev eth0")
    until(lambda: snapshots.changes(before, snapshots.snapshot_of_kernel()) == [])


def test_kvm_ifdown_is_the_way_to_have_it_gone(uplinked: Node, agent: Agent) -> None:
    clean = snapshots.snapshot_of_kernel()
    wire(agent, uplinked, **ROUTED)
    check(hook("kvm-ifdown", "tap0"), 0)
    settled(uplinked, agent)
    tools.ip("link del tap0")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []
    assert "mended" not in agent.said()


def test_a_node_that_was_told_not_to_mend_does_not(uplinked: Node) -> None:
    with agents.configured(agent={"mend": False}), agents.running() as agent:
        wire(agent, uplinked, **ROUTED)
        tools.ip(f"route del {GUEST_IP4} table 100")
        tools.ip(f"neigh del proxy {GUEST_IP4} dev eth0")
        settled(uplinked, agent)
        time.sleep(5)  # longer than between two looks
        assert (oracle.proxies(), oracle.routes("tap0")) == ({GUEST_IP6}, {GUEST_IP6})
        # Until it is told otherwise.
        agents.configure(agent={"mend": True})
        tools.run("kill", "-HUP", str(agent.process.pid))
        until(lambda: wired() == agents.WIRED)


def test_who_breaks_the_same_again_and_again_gets_it_mended_less_often(uplinked: Node, agent: Agent) -> None:
    wire(agent, uplinked, **ROUTED)
    times = []
    for _ in range(6):
        tools.ip(f"route del {GUEST_IP4} table 100")
        begun = time.monotonic()
        until(lambda: GUEST_IP4 in oracle.routes("tap0"))
        times.append(time.monotonic() - begun)
    until(lambda: re.findall(r"again and again: left alone for the next (\d+) s", agent.said()) == ["2", "4", "8"])
    assert times[-1] > 1.9
    # Something else is mended at once.
    tools.ip("rule del iif tap0")
    until(lambda: len(oracle.rules()) == 2)


def test_what_cannot_be_mended_is_said_once_and_mended_when_it_can_be(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge()
    wire(agent, uplinked, **BRIDGED)
    tools.run("sh", "-c", RENAMED)
    agent.heard("cannot be mended", "tap0", "no such bridge: br0")
    time.sleep(3)
    assert agent.said().count("cannot be mended") == 1
    tools.run("sh", "-c", MAKE)
    until(lambda: oracle.link("tap0").get("master") == "br0")


# What the kernel does with neighbours that it has found out itself; an entry of ours is PERMANENT or a proxy.
BY_ITSELF = ("STALE", "DELAY", "PROBE", "REACHABLE", "ff02:")


def test_where_nothing_is_wrong_nothing_is_written(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge()
    for number in range(20):
        tap = f"tap{number}"
        nodes.add_tap(tap)
        if number % 2:
            manager.write_nic(tap, f"web{number}", mac=f"aa:00:00:00:02:{number:02x}", **BRIDGED)
        else:
            nic: dict[str, Any] = {"mode": "routed", "ip": [f"192.0.2.{50 + number}", f"2001:db8::{50 + number}"]}
            manager.write_nic(tap, f"web{number}", mac=f"aa:00:00:00:02:{number:02x}", **nic)
        check(hook("kvm-ifup-post", tap), 0)
    settled(uplinked, agent)
    journals = {path: path.stat().st_mtime_ns for path in agents.STATE.iterdir()}
    tools.run("sh", "-c", "timeout 10 ip monitor all > /run/monitor; true")
    lines = [
        line for line in Path("/run/monitor").read_text().splitlines() if not any(word in line for word in BY_ITSELF)
    ]
    assert lines == []
    assert journals == {path: path.stat().st_mtime_ns for path in agents.STATE.iterdir()}
    assert "mended" not in agent.said()


# --- the run directory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["", "/state", "/agent.sock"])
def test_what_was_removed_of_the_run_directory_is_made_again(uplinked: Node, agent: Agent, what: str) -> None:
    clean = snapshots.snapshot_of_kernel()
    wire(agent, uplinked, **ROUTED)
    nodes.add_bridge()
    incoming(uplinked, agent, "tap1", mode="bridged", link="br0", mac="aa:00:00:00:00:77")
    settled(uplinked, agent)
    before = [agents.journal(tap) for tap in ("tap0", "tap1")]
    for _ in range(2):
        tools.run("rm", "-rf", f"{manager.RUN_DIR}{what}")
        until(lambda: [agents.journal(tap) for tap in ("tap0", "tap1")] == before and agents.SOCKET.exists())
    # Hooks find the agent, it finds their journals, and mends.
    manager.write_nic("tap0", "web1", **ROUTED)
    agents.through("kvm-ifup-post", "tap0")
    tools.ip(f"route del {GUEST_IP4} table 100")
    until(lambda: GUEST_IP4 in oracle.routes("tap0"))
    for tap in ("tap0", "tap1"):
        agents.through("kvm-ifdown", tap)
        tools.ip(f"link del {tap}")
    tools.ip("link del br0")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []
    until(lambda: len(list(agents.STATE.glob("*.json"))) == 0)
    assert agent.end() == 0
    assert not agents.SOCKET.exists()


def test_a_guest_that_is_waited_for_arrives_also_without_its_run_directory(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent, **ROUTED)
    tools.run("rm", "-rf", str(manager.RUN_DIR))
    guest.send(rarp())  # before there is a journal again, so it is asked
    with answering(guest):
        until(lambda: wired() == agents.WIRED and phase() == "post")


def test_a_tap_that_vanishes_with_the_run_directory_leaves_nothing(uplinked: Node, agent: Agent) -> None:
    clean = snapshots.snapshot_of_kernel()
    wire(agent, uplinked, **ROUTED)
    agent.send(signal.SIGSTOP)
    tools.run("rm", "-rf", str(manager.RUN_DIR))
    tools.ip("link del tap0")
    agent.send(signal.SIGCONT)
    until(lambda: snapshots.changes(clean, snapshots.snapshot_of_kernel()) == [])


@pytest.mark.parametrize("nic", [ROUTED, {"mode": "routed", "ip": [GUEST_IP4]}, {"mode": "bridged", "link": "br0"}])
@pytest.mark.parametrize("how", ["the agent", "a hook alone", "the tap's end"])
def test_a_nic_that_was_taken_down_right_before_does_not_come_back(
    uplinked: Node, agent: Agent, nic: dict[str, Any], how: str
) -> None:
    nodes.add_bridge()
    nodes.add_port("br0")
    other = {"mode": "routed", "link": "100", "ip": ["192.0.2.99", "2001:db8::99"]}  # which shares the uplink
    wire(agent, uplinked, **other)
    settled(uplinked, agent)
    clean = snapshots.snapshot_of_kernel()
    uplinked.guest("tap1")
    manager.write_nic("tap1", "web2", mac="aa:00:00:00:00:77", **nic)
    agents.through("kvm-ifup-post", "tap1")
    settled(uplinked, agent)
    if how == "the agent":
        agents.through("kvm-ifdown", "tap1")
    elif how == "a hook alone":
        check(call("kvm-ifdown", "tap1"), 0)
    else:
        tools.ip("link del tap1")
        until(lambda: agents.journal("tap1") is None)
    tools.run("rm", "-rf", str(manager.RUN_DIR))
    until(lambda: agents.journal("tap0") and agents.SOCKET.exists())
    agent.heard("the journals were removed")
    settled(uplinked, agent)
    assert agents.journal("tap1") is None
    until(lambda: "written again for tap0\n" in agent.said())
    if how != "the tap's end":
        tools.ip("link del tap1")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []


def test_only_one_agent_runs_also_after_the_run_directory_was_removed(agent: Agent) -> None:
    tools.run("rm", "-rf", str(manager.RUN_DIR))
    until(agents.SOCKET.exists)
    with pytest.raises(AssertionError, match="another agent runs"):
        Agent().ready()
    assert agent.process.poll() is None


def test_without_a_nic_the_socket_is_made_again_as_well(agent: Agent) -> None:
    for _ in range(3):
        tools.run("rm", "-rf", str(manager.RUN_DIR))
        until(agents.SOCKET.exists)
    until(lambda: agent.said().count("made again") == 3)
