"""Options of a bridged guest's port: said for the NIC, its link or all bridges, and kept as they were said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import agents, disturb, hooks, manager, nodes, snapshots, tools
from harness.addresses import CLIENT_IP6, CLIENT_MAC, GUEST_IP6, GUEST_MAC
from harness.hooks import Result, call, check
from harness.nodes import Node
from harness.oracle import link
from harness.wire import ethernet, solicitation

pytestmark = pytest.mark.userns

# What `bridge -j -d link` says of them.
NEW = {"isolated": False, "hairpin": False, "learning": True, "mcast_router": 1}
WIRED = {**NEW, "mcast_router": 2}  # bridges snoop unless they are told not to
KEYS = {"isolated": "isolated", "hairpin": "hairpin", "learning": "learning", "multicast_router": "mcast_router"}
OTHER: dict[str, Any] = {"isolated": True, "hairpin": True, "learning": False, "multicast_router": False}
ASKED = {"isolated": True, "hairpin": True, "learning": False, "mcast_router": 1}


def port(name: str = "tap0") -> dict[str, Any]:
    """The options of a port."""
    (found,) = tools.ask(f"bridge -j -d link show dev {name}")
    return {key: found[key] for key in NEW}


def wire(**keys: Any) -> Result:
    """Have post wire tap0."""
    manager.write_nic(mode="bridged", link="br0", **keys)
    return call("kvm-ifup-post", "tap0")


@pytest.fixture
def bridged(node: Node) -> Node:
    """A node with a bridge and a tap."""
    nodes.add_bridge()
    node.guest()
    return node


# --- what is asked for is there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", KEYS)
def test_an_option_of_a_nic_is_that_of_its_port(bridged: Node, option: str) -> None:
    check(wire(**{option: OTHER[option]}), 0)
    assert port() == {**WIRED, KEYS[option]: ASKED[KEYS[option]]}


def test_all_options_are_set_before_the_tap_comes_up(bridged: Node) -> None:
    manager.write_nic(mode="bridged", link="br0", incoming=True, **OTHER)
    seen = []

    def look(_number: int, op: Any) -> None:
        if type(op).__name__ == "LinkUp":
            seen.append((port(), "UP" in tools.ask("link show dev tap0")[0]["flags"]))

    with disturb.disturbed(before=look):
        check(call("kvm-ifup-pre", "tap0"), 0)
    assert seen == [(ASKED, False)]


def test_what_nobody_says_stays_as_it_is(bridged: Node) -> None:
    """The administrator has set it before us. (All but what a guest that moves relies on.)"""
    tools.ip("link set tap0 master br0")
    tools.run("bridge", "link", "set", "dev", "tap0", "isolated", "on", "hairpin", "on", "learning", "off")
    check(wire(), 0)
    assert port() == {**ASKED, "mcast_router": 2}
    check(call("kvm-ifdown", "tap0"), 0)
    assert port() == ASKED


@pytest.mark.parametrize(("snooping", "said", "router"), [(1, None, 2), (0, None, 1), (0, True, 2), (1, False, 1)])
def test_a_bridge_that_snoops_sends_all_multicast(bridged: Node, snooping: int, said: bool | None, router: int) -> None:
    """Unless somebody says otherwise."""
    tools.ip(f"link set br0 type bridge mcast_snooping {snooping}")
    check(wire(multicast_router=said), 0)
    assert port() == {**NEW, "mcast_router": router}


# --- who says it -------------------------------------------------------------------------------------------------

LADDER: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any], bool]] = {
    "all bridges": ({}, {}, {"bridged": {"isolated": True}}, True),
    "its link": ({}, {}, {"link.br0": {"isolated": True}, "bridged": {"isolated": False}}, True),
    "another link": ({}, {}, {"link.br1": {"isolated": True}}, False),
    "its network": ({}, {"NETWORK_TAGS": "x kvm-ifup:isolated:true"}, {"link.br0": {"isolated": False}}, True),
    "its guest": ({}, {"TAGS": "kvm-ifup:isolated:false", "NETWORK_TAGS": "kvm-ifup:isolated:true"}, {}, False),
    "itself": ({"isolated": False}, {}, {"link.br0": {"isolated": True}, "bridged": {"isolated": True}}, False),
}


@pytest.mark.parametrize("who", LADDER)
def test_who_is_nearer_to_the_nic_is_heard(bridged: Node, who: str) -> None:
    nic, tags, settings, isolated = LADDER[who]
    config = manager.configuration(**settings)
    if nic:
        manager.write_nic(mode="bridged", link="br0", **nic)
        check(call("kvm-ifup-post", "tap0", config), 0)
    else:
        environ = manager.ganeti(MODE="bridged", LINK="br0", **tags)
        check(call("kvm-ifup-post", "tap0", config, environ=environ), 0)
    assert port() == {**WIRED, "isolated": isolated}


@pytest.mark.parametrize("mode", ["routed", "openvswitch"])
def test_a_nic_file_says_it_of_bridged_nics_only(bridged: Node, mode: str) -> None:
    manager.write_nic(mode=mode, link="100", ip=["192.0.2.8"], hairpin=False)
    check(call("kvm-ifup-post", "tap0"), 65, "hairpin", "mode " + mode)


def test_a_tag_of_the_guest_means_nothing_to_its_routed_nic(uplinked: Node) -> None:
    uplinked.guest()
    environ = manager.ganeti(MODE="routed", IP="192.0.2.8", TAGS="kvm-ifup:isolated:true")
    check(call("kvm-ifup-post", "tap0", environ=environ), 0)


@pytest.mark.parametrize("tag", ["isolatd:true", "isolated:yes", "isolated", "isolated:true kvm-ifup:isolated:false"])
def test_a_tag_that_is_wrong_is_refused_before_anything_is_done(bridged: Node, tag: str) -> None:
    before = snapshots.snapshot()
    environ = manager.ganeti(MODE="bridged", LINK="br0", TAGS=f"kvm-ifup:{tag}")
    check(call("kvm-ifup-post", "tap0", environ=environ), 65, "kvm-ifup:isolat")
    assert snapshots.changes(before, snapshots.snapshot()) == []


# --- frames -----------------------------------------------------------------------------------------------------


def test_isolated_guests_reach_the_client_and_not_each_other(node: Node) -> None:
    nodes.add_bridge()
    node.uplink(master="br0")
    one, other = node.guest("tap0"), node.guest("tap1")
    for number in (0, 1):
        mac = f"aa:00:00:00:00:0{number}"
        manager.write_nic(f"tap{number}", f"web{number}", mode="bridged", link="br0", mac=mac, isolated=True)
        check(call("kvm-ifup-post", f"tap{number}"), 0)
    wire_ = node.listen()
    frame = ethernet("ff:ff:ff:ff:ff:ff", "aa:00:00:00:00:00", 0x88B6, bytes(46))
    one.send(frame)
    wire_.until(lambda seen: seen == frame)
    answer = ethernet("ff:ff:ff:ff:ff:ff", CLIENT_MAC, 0x88B6, bytes(46))
    wire_.send(answer)
    assert frame not in other.until(lambda seen: seen == answer)


def test_a_guest_that_has_moved_gets_solicitations_at_once(node: Node) -> None:
    """Though the bridge snoops, somebody asks who listens, and the guest has not answered yet."""
    nodes.add_bridge(options="mcast_snooping 1 mcast_querier 1 mcast_startup_query_count 0")
    node.uplink(master="br0")
    guest = node.guest()
    check(wire(incoming=True), 0)
    wire_ = node.listen()
    guest.send(ethernet("ff:ff:ff:ff:ff:ff", GUEST_MAC, 0x8035, bytes(46)))
    question = solicitation(CLIENT_MAC, CLIENT_IP6, GUEST_IP6)
    wire_.send(question)
    guest.until(lambda seen: seen == question)


# --- it stays so ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", KEYS)
def test_check_names_an_option_that_somebody_has_set_and_repairs_it(bridged: Node, option: str) -> None:
    check(wire(**OTHER), 0)
    key = KEYS[option]
    words = {"isolated": "off", "hairpin": "off", "learning": "on", "mcast_router": "2"}
    tools.run("bridge", "link", "set", "dev", "tap0", key, words[key])
    said = call("kvm-ifup", "check")
    assert said.code == 1
    assert f"tap0 {option}" in said.out
    plan = call("kvm-ifup", "plan", "post", "tap0").out
    assert f"bridge link set dev tap0 {key}" in plan
    assert call("kvm-ifup", "check", "--repair").code == 0
    assert port() == ASKED


@pytest.mark.parametrize(
    "by", ["bridge link set dev tap0 isolated off", "ip link set tap0 nomaster", "ip link set tap0 master br1"]
)
def test_the_agent_puts_back_what_others_take(uplinked: Node, by: str) -> None:
    for bridge in ("br0", "br1"):
        nodes.add_bridge(bridge)
    with agents.running():
        uplinked.guest()
        manager.write_nic(mode="bridged", link="br0", isolated=True)
        agents.through("kvm-ifup-post", "tap0")
        tools.run(*by.split())
        agents.until(lambda: link("tap0").get("master") == "br0" and port()["isolated"] and port()["mcast_router"] == 2)
        assert port() == {**WIRED, "isolated": True}


def test_post_changes_the_options_of_a_nic_that_runs(bridged: Node) -> None:
    check(wire(isolated=True), 0)
    check(wire(isolated=False, hairpin=True), 0)
    assert port() == {**WIRED, "hairpin": True}
    check(wire(), 0)  # nobody says anything any more
    assert port() == WIRED
    tools.ip("link set br0 type bridge mcast_snooping 0")
    check(wire(), 0)
    assert port() == NEW
    before = snapshots.snapshot()
    check(wire(), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


# --- undone -----------------------------------------------------------------------------------------------------

BEFORE = {
    "fresh": [],
    "on its bridge": ["ip link set tap0 master br0", "bridge link set dev tap0 hairpin on isolated on"],
    "on another bridge": ["ip link set tap0 master br1", "bridge link set dev tap0 isolated on learning off"],
    "up on another bridge": ["ip link set tap0 up master br1", "bridge link set dev tap0 isolated on mcast_router 0"],
}


def prepare(before: str) -> snapshots.Snapshot:
    """Two bridges, a tap that is as *before* says, and its NIC file."""
    for bridge in ("br0", "br1"):
        nodes.add_bridge(bridge)
    nodes.add_tap()
    for command in BEFORE[before]:
        tools.run(*command.split())
    manager.write_nic(mode="bridged", link="br0", isolated=True, learning=False, hairpin=False)
    return snapshots.snapshot()


@pytest.mark.parametrize("before", BEFORE)
def test_down_puts_back_the_options_that_were_there(node: Node, before: str) -> None:
    earlier = prepare(before)
    check(call("kvm-ifup-post", "tap0"), 0)
    assert port() == {**ASKED, "hairpin": False, "mcast_router": 2}
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(earlier, snapshots.snapshot()) == []


@pytest.mark.parametrize("before", BEFORE)
def test_a_failure_at_any_write_changes_no_option(node: Node, before: str) -> None:
    earlier = prepare(before)
    for number in range(1, 40):
        with disturb.disturbed(before=disturb.refuse(number)) as written:
            code = call("kvm-ifup-post", "tap0").code
        if code == 0:
            break
        assert code == 71
        assert snapshots.changes(earlier, snapshots.snapshot()) == [], f"write {number}: {written}"
    assert number > 8


@pytest.mark.parametrize("option", ["isolated", "multicast_router"])
@pytest.mark.parametrize("before", ["fresh", "up on another bridge"])
def test_what_a_killed_run_has_left_is_undone(node: Node, before: str, option: str) -> None:
    earlier = prepare(before)

    def kill(_number: int, op: Any) -> None:
        if getattr(op, "option", None) == option:
            disturb.kill(1)(1, op)

    with disturb.disturbed(after=kill):
        assert hooks.call_in_child("kvm-ifup-post", "tap0") == -9
    assert call("kvm-ifup", "gc").code == 0
    assert snapshots.changes(earlier, snapshots.snapshot()) == []


def test_a_journal_from_before_this_option_is_understood(bridged: Node) -> None:
    check(wire(), 0)
    (file,) = Path("/run/kvm-ifup/state").glob("*.json")
    text = file.read_text()
    for option in KEYS:
        text = text.replace(f', "{option}": null', "")
    assert "isolated" not in text
    file.write_text(text)
    assert call("kvm-ifup", "check").code == 0
