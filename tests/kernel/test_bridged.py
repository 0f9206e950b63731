"""Bridged NICs: pre makes the tap a port that really forwards; post finds it so."""

from __future__ import annotations

import signal
import struct
import subprocess
from typing import Any

import pytest

from harness import agents, disturb, hooks, manager, nodes, oracle, snapshots, tools
from harness.addresses import CLIENT_MAC, GUEST_MAC, TAP_MAC
from harness.guests import rarp
from harness.hooks import call, check, hook
from harness.nodes import Node
from harness.oracle import link
from harness.wire import ethernet
from tests.kernel.checking import netdev, qemu, unkept_tap

pytestmark = pytest.mark.userns  # a bridge's settings are sysfs files, too

HOOKS = ("kvm-ifup-pre", "kvm-ifup-post")
FROM_GUEST = ethernet("ff:ff:ff:ff:ff:ff", GUEST_MAC, 0x8035, bytes(46))  # RARP, as QEMU sends it on arrival


def port(name: str) -> dict[str, Any]:
    """One line of `bridge -j link`."""
    (found,) = tools.ask(f"bridge -j link show dev {name}")
    return found


@pytest.mark.parametrize("program", HOOKS)
@pytest.mark.parametrize("incoming", [False, True])
def test_the_tap_becomes_a_forwarding_port(node: Node, program: str, incoming: bool) -> None:
    """MAC fe:…, addrgenmode none, MTU of the bridge without the bridge's changing, forwarding by `bridge -j link`."""
    nodes.add_bridge(mtu=9000)
    node.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=incoming)
    before = oracle.link("br0")
    check(hook(program, "tap0"), 0)
    tap = link("tap0")
    assert tap["address"] == TAP_MAC
    assert tap["inet6_addr_gen_mode"] == "none"
    assert tap["mtu"] == 9000
    assert tap["master"] == "br0"
    assert "UP" in tap["flags"]
    assert port("tap0")["state"] == "forwarding"
    assert [link("br0")[key] for key in ("address", "mtu")] == [before[key] for key in ("address", "mtu")]
    assert [info for one in tools.ask("addr show dev tap0") for info in one["addr_info"]] == []


def test_frames_pass_between_guest_and_client_once_pre_has_returned(node: Node) -> None:
    nodes.add_bridge()
    node.uplink(master="br0")
    guest = node.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    wire = node.listen()
    check(call("kvm-ifup-pre", "tap0"), 0)
    guest.send(FROM_GUEST)
    wire.until(lambda frame: frame[6:14] == FROM_GUEST[6:14])
    answer = ethernet(GUEST_MAC, CLIENT_MAC, 0x88B6, bytes(46))
    wire.send(answer)
    guest.until(lambda frame: frame == answer)


@pytest.mark.parametrize("program", HOOKS)
def test_a_bare_bridge_keeps_its_own_mac(node: Node, program: str) -> None:
    """Also when the tap leaves again: no port is there whose address it could take."""
    tools.ip("link add name br0 type bridge")
    tools.ip("link set br0 up")
    own = link("br0")["address"]
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    check(call(program, "tap0"), 0)
    assert link("br0")["address"] == own
    tools.ip("link del tap0")
    assert link("br0")["address"] == own


def test_a_bare_bridge_keeps_its_own_mac_when_ifdown_takes_the_tap_away(node: Node) -> None:
    tools.ip("link add name br0 type bridge")
    tools.ip("link set br0 up")
    own = link("br0")["address"]
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert link("br0")["address"] == own
    assert "master" not in link("tap0")


def test_a_small_mtu_is_taken_over_and_stays(node: Node) -> None:
    """Below 1280 the kernel takes IPv6 off the tap altogether; the second run has to cope."""
    nodes.add_bridge(mtu=1200)
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert link("tap0")["mtu"] == 1200
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def addresses(dev: str = "tap0") -> list[str]:
    """The IPv6 addresses of *dev*."""
    return [info["local"] for one in tools.ask(f"addr show dev {dev}") for info in one["addr_info"]]


@pytest.mark.parametrize("given", [[], ["2001:db8::77/64", "2001:db8:1::77/128"]], ids=["its own", "given"])
@pytest.mark.parametrize("mtu", [1500, 1200])
def test_a_tap_loses_its_ipv6_addresses_and_a_failure_gives_them_back(node: Node, mtu: int, given: list[str]) -> None:
    nodes.add_bridge()
    node.guest()
    tools.ip(f"link set tap0 mtu {mtu} up")
    for address in given if mtu >= 1280 else ():
        tools.ip(f"addr add {address} dev tap0 nodad")
    manager.write_nic(mode="bridged", link="br0")
    had = addresses()
    assert len(had) == (len(given) + 1 if mtu >= 1280 else 0)
    before = [one for one in snapshots.snapshot() if "br0" not in one]
    with disturb.disturbed(before=refuse_to_forward):
        check(call("kvm-ifup-post", "tap0"), 71)
    assert sorted(addresses()) == sorted(had)
    assert [one for one in snapshots.snapshot() if "br0" not in one] == before
    check(call("kvm-ifup-post", "tap0"), 0)
    assert addresses() == []
    wired = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    # Not even when somebody turns IPv6 on everywhere.
    oracle.sysctl("ipv6/conf/all/disable_ipv6", 1)
    oracle.sysctl("ipv6/conf/all/disable_ipv6", 0)
    assert addresses() == []


def refuse_to_forward(_number: int, op: Any) -> None:
    """The last op fails."""
    if type(op).__name__ == "PortForwarding":
        disturb.refuse(1)(1, op)


def test_a_tap_moves_over_from_another_bridge(node: Node) -> None:
    nodes.add_bridge("br0")
    nodes.add_bridge("br1")
    nodes.add_tap()
    tools.ip("link set tap0 master br1 up")
    manager.write_nic(mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert link("tap0")["master"] == "br0"


ELSEWHERE: dict[str, dict[str, Any]] = {
    "bridged": {"mode": "bridged", "link": "br1"},
    "routed": {"mode": "routed", "ip": ["192.0.2.8"]},
}


@pytest.mark.parametrize("there", ["by hand", "bridged", "routed"])
@pytest.mark.parametrize(("old", "new"), [(1500, 1200), (1200, 1500), (9000, 1300)])
@pytest.mark.parametrize("fails", [False, True])
def test_no_bridge_changes_when_a_running_tap_moves(node: Node, there: str, old: int, new: int, fails: bool) -> None:
    """Neither its MTU, with which its IPv6 addresses would go, nor its MAC; not even for a moment, or in a failure."""
    bridges = {"br0": new, "br1": old}
    for name, mtu in bridges.items():
        tools.ip(f"link add name {name} type bridge")  # with a MAC of its ports'
        tools.ip(f"link add name p{name} mtu {mtu} address 02:00:00:00:00:0{name[-1]} type veth peer name q{name}")
        tools.ip(f"link set p{name} master {name} up")
        tools.ip(f"link set q{name} up")
        tools.ip(f"link set {name} up")
        oracle.settle(name)
    node.guest()
    if there in ELSEWHERE:
        manager.write_nic(**ELSEWHERE[there])
        check(call("kvm-ifup-post", "tap0"), 0)
    if there != "routed":
        tools.ip(f"link set tap0 mtu {old} master br1 up")
    had = {name: (link(name)["mtu"], link(name)["address"]) for name in bridges}
    assert [mtu for mtu, _ in had.values()] == [new, old]
    manager.write_nic(mode="bridged", link="br0")
    before = snapshots.snapshot()

    def same(_number: int, _op: Any) -> None:
        assert {name: (link(name)["mtu"], link(name)["address"]) for name in bridges} == had

    with disturb.disturbed(before=refuse_to_forward if fails else disturb.nothing, after=same) as written:
        check(call("kvm-ifup-post", "tap0"), 71 if fails else 0)
    assert written
    if fails:
        assert snapshots.changes(before, snapshots.snapshot()) == []
        return
    with disturb.disturbed(after=same):
        check(call("kvm-ifdown", "tap0"), 0)
        same(0, None)


def test_a_tap_that_becomes_routed_leaves_its_bridge_before_its_mtu_changes(uplinked: Node) -> None:
    nodes.add_bridge(mtu=9000)
    tools.ip("link set br0 mtu 1500")
    tools.ip("link add name pbr0 mtu 9000 type veth peer name qbr0")
    tools.ip("link set pbr0 master br0 up")
    tools.ip("link set br0 mtu 9000")
    uplinked.guest()
    manager.write_nic(mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert link("tap0")["mtu"] == 9000
    manager.write_nic(mode="routed", ip=["192.0.2.8", "2001:db8::8"])

    def alone(_number: int, op: Any) -> None:
        assert link("br0")["mtu"] == 9000
        assert "master" not in link("tap0")

    with disturb.disturbed(after=alone):
        check(call("kvm-ifup-post", "tap0"), 0)
    assert link("tap0")["mtu"] == 1500
    assert oracle.routes("tap0") == {"192.0.2.8", "2001:db8::8"}


@pytest.mark.parametrize("mac", ["fe:ff:ff:00:00:01", "fe:00:00:35:ac:02", "02:00:00:00:00:01"])
@pytest.mark.parametrize("program", HOOKS)
def test_a_bridge_never_takes_over_the_taps_mac(node: Node, program: str, mac: str) -> None:
    """A bridge whose MAC nobody has set has the lowest of its ports'."""
    tools.ip("link add name br0 type bridge")
    tools.ip(f"link add name p0 address {mac} type veth peer name q0")
    tools.ip("link set p0 master br0 up")
    tools.ip("link set br0 up")
    assert link("br0")["address"] == mac
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    with disturb.disturbed(after=lambda _number, _op: _has(mac)):
        check(call(program, "tap0"), 0)
        wired = snapshots.snapshot()
        check(call(program, "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    _has(mac)


def test_a_bridge_that_already_has_the_taps_mac_keeps_it(node: Node) -> None:
    """Another script has put the tap there: when its MAC changes, the bridge's would, too."""
    tools.ip("link add name br0 type bridge")
    nodes.add_tap()
    tools.ip("link set tap0 master br0 up")
    tools.ip("link set br0 up")
    own = link("br0")["address"]
    assert own == link("tap0")["address"]
    manager.write_nic(mode="bridged", link="br0")
    with disturb.disturbed(after=lambda _number, _op: _has(own)):
        check(call("kvm-ifup-post", "tap0"), 0)
    _has(own)


def _has(mac: str) -> None:
    assert link("br0")["address"] == mac


def test_a_bridge_can_be_named_by_an_alternative_name(node: Node) -> None:
    nodes.add_bridge()
    tools.ip("link property add dev br0 altname guests")
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="guests")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert link("tap0")["master"] == "br0"
    wired = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    assert call("kvm-ifup", "show", "tap0").out.split()[-1] == "yes"


def test_ifdown_takes_the_tap_off_its_bridge_even_if_the_former_bridge_is_gone(node: Node) -> None:
    nodes.add_bridge("br0")
    nodes.add_bridge("br1")
    nodes.add_tap()
    tools.ip("link set tap0 master br1 up")
    manager.write_nic(mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del br1")
    check(call("kvm-ifdown", "tap0"), 0)
    assert "master" not in link("tap0")


@pytest.mark.parametrize("program", HOOKS)
@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("", ["no such bridge: br0", "ip link add br0 type bridge"]),
        ("link add name br0 type bridge", ["bridge br0 is down", "ip link set br0 up"]),
        ("tuntap add br0 mode tap", ["br0 is not a bridge"]),
        ("link add name br0 type bridge stp_state 1 forward_delay 1500", ["bridge br0"]),
    ],
    ids=["missing", "down", "not a bridge", "STP and down"],
)
def test_a_bridge_that_is_not_ready_is_refused_and_nothing_changes(
    node: Node, program: str, setup: str, words: list[str]
) -> None:
    if setup:
        tools.ip(setup)
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    before = snapshots.snapshot()
    check(call(program, "tap0"), 69, "web1.example.com/0 (tap0)", *words)
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("vlan", [".100", ":100:200", ".100:200"])
def test_a_vlan_is_never_ignored(node: Node, vlan: str) -> None:
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0", vlan=vlan)
    before = snapshots.snapshot()
    check(call("kvm-ifup-pre", "tap0"), 69, vlan)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_stp_with_a_long_delay_is_refused_and_nothing_changes(node: Node) -> None:
    """15 s of listening and 15 s of learning: QEMU's announcements would be lost."""
    nodes.add_bridge(options="stp_state 1 forward_delay 1500")
    node.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    before = snapshots.snapshot()
    check(call("kvm-ifup-pre", "tap0"), 69, "STP", "30 s", "stp_state 0")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
def test_stp_with_a_long_delay_only_holds_up_a_guest_that_starts(node: Node, program: str) -> None:
    nodes.add_bridge(options="stp_state 1 forward_delay 1500")
    node.guest()
    manager.write_nic(mode="bridged", link="br0")
    done = call(program, "tap0", "-v")
    assert done.code == 0, done.err
    assert "bridge br0 runs STP: a new port forwards only after 30 s" in done.err
    assert port("tap0")["state"] == "listening"
    again = snapshots.snapshot()
    check(call(program, "tap0"), 0)
    assert snapshots.changes(again, snapshots.snapshot()) == []
    assert "tap0, a port of br0, does not forward" in call("kvm-ifup", "check", "tap0").out


SLOW = "link set br0 type bridge stp_state 1 forward_delay 1500"
WARNING = "bridge br0 runs STP: a new port forwards only after 30 s"


def expected() -> None:
    """A guest that is expected here; the bridge becomes slow only after pre."""
    nodes.add_bridge()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    check(call("kvm-ifup-pre", "tap0"), 0)
    tools.ip(SLOW)


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("unplugged", [False, True])
def test_a_guest_that_has_arrived_is_not_refused_whatever_its_file_says(
    node: Node, program: str, unplugged: bool
) -> None:
    with unkept_tap() as guest:
        expected()
        if unplugged:
            tools.ip("link set tap0 nomaster")
        check(call(program, "tap0"), 69, "STP")  # it could still stay where it is
        guest.write(rarp())
        done = call(program, "tap0", "-v")
        assert (done.code, WARNING in done.err) == (0, True), done.err
        assert oracle.link("tap0")["master"] == "br0"
        assert call(program, "tap0", "--json").needed == []


@pytest.mark.parametrize("waits", [False, True])
def test_a_guest_whose_qemu_does_not_wait_is_not_refused_either(node: Node, waits: bool) -> None:
    nodes.add_bridge()
    tools.ip(SLOW)
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    with qemu(*netdev(), *(("-incoming", "unix:/run/migration") if waits else ())):
        check(call("kvm-ifup-pre", "tap0"), 69 if waits else 0, *(["STP"] if waits else []))
        check(call("kvm-ifup-post", "tap0"), 69 if waits else 0, *(["STP"] if waits else []))


def test_a_guest_whose_post_is_done_stays_when_its_bridge_becomes_slow(node: Node) -> None:
    """Its tap is one that earlier guests may have used, so that its frames say nothing."""
    node.guest()
    expected()
    tools.ip("link set br0 type bridge stp_state 0")
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip(SLOW)
    tools.ip("link set tap0 nomaster")
    for program in ("kvm-ifup-pre", "kvm-ifup-post"):
        check(call(program, "tap0"), 0)
    assert oracle.link("tap0")["master"] == "br0"


def test_with_the_agent_it_arrives_on_a_bridge_that_has_become_slow(node: Node) -> None:
    with agents.running() as agent, unkept_tap() as guest:
        expected()
        agent.armed()
        guest.write(rarp())
        agents.until(lambda: agents.phase() == "post")


def test_stp_with_a_short_delay_is_waited_for(node: Node) -> None:
    nodes.add_bridge(options="stp_state 1 forward_delay 200")
    node.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    check(call("kvm-ifup-pre", "tap0", manager.configuration(bridged={"forwarding_timeout": 60})), 0)
    assert port("tap0")["state"] == "forwarding"


def waiting_for_stp(node: Node) -> subprocess.Popen[str]:
    """A hook that waits for a port which takes 30 s to forward."""
    nodes.add_bridge(options="stp_state 1 forward_delay 1500")
    node.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    process = hooks.start("kvm-ifup-pre", "tap0", manager.configuration(bridged={"forwarding_timeout": 600}))
    while not [one for one in tools.ask("bridge -j link") if one["ifname"] == "tap0" and one["state"] == "listening"]:
        assert process.poll() is None, hooks.finish(process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_waiting_for_forwarding_puts_everything_back(node: Node, number: signal.Signals) -> None:
    manager.configuration(bridged={"forwarding_timeout": 600})
    process = waiting_for_stp(node)
    process.send_signal(number)
    check(hooks.finish(process), 75, number.name)
    after = snapshots.snapshot()
    tools.ip("link del tap0")
    hooks.reap()
    # The same tap, as nobody has ever touched it.
    node.guest()
    assert snapshots.changes(snapshots.snapshot(), after) == []


def test_a_port_that_will_not_forward_in_time_is_put_back(node: Node) -> None:
    """STP is switched on behind the hook's back, so the check beforehand did not see it."""
    nodes.add_bridge()
    node.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    before = snapshots.snapshot()
    config = manager.configuration(bridged={"forwarding_timeout": 0.2})

    def switch_on(_number: int, op: object) -> None:
        if type(op).__name__ == "LinkMaster":
            tools.ip("link set br0 type bridge stp_state 1 forward_delay 1500")

    with disturb.disturbed(before=switch_on):
        check(hooks.call("kvm-ifup-pre", "tap0", config), 69, "does not forward", "listening")
    tools.ip("link set br0 type bridge stp_state 0")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize(
    ("setup", "cause"),
    [("", "no such device: tap0"), ("link add tap0 type veth peer name x", "is not a tap"), (None, "is not a tap")],
    ids=["missing", "veth", "tun"],
)
def test_only_a_tap_is_ever_wired(node: Node, setup: str | None, cause: str) -> None:
    nodes.add_bridge()
    if setup is None:
        tools.ip("tuntap add tap0 mode tun")
    elif setup:
        tools.ip(setup)
    manager.write_nic(mode="bridged", link="br0")
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 69, cause)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_the_frame_type_is_rarp() -> None:
    """Guards the constant above."""
    assert struct.unpack("!H", FROM_GUEST[12:14]) == (0x8035,)
