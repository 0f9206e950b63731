"""`kvm-ifup expect`: what keeps a guest from coming to this node is said before it leaves the other one."""

from __future__ import annotations

import json
import time

import pytest

from harness import agents, manager, nodes, tools
from harness.addresses import GUEST_IP4, GUEST_MAC
from harness.hooks import Result, call, check, hook
from harness.moving import FIRST, INSTANCE, Qemu, environment
from harness.nodes import Node
from harness.snapshots import changes, snapshot

SECOND = {"MODE": "routed", "MAC": "aa:00:00:35:ac:02", "IP": "192.0.2.9"}
DMZ: dict[str, object] = {"mode": "routed"}
BRIDGED = {"MODE": "bridged", "MAC": GUEST_MAC, "LINK": "br0"}


def expect(*nics: dict[str, str], operation: str = "migrate") -> Result:
    """As the hook runs it."""
    return call("kvm-ifup", "expect", environ=environment(*nics, operation=operation))


@pytest.mark.userns
def test_a_node_that_can_take_the_guest_only_writes_down_that_it_is_to_come(uplinked: Node) -> None:
    nodes.add_bridge()
    before = snapshot()
    check(hook("kvm-ifup", "expect", environ=environment(FIRST, {**BRIDGED, "MAC": SECOND["MAC"]})), 0)
    (change,) = changes(before, snapshot())
    assert change.startswith(f"+ /run/kvm-ifup/expected/{INSTANCE}.json: ")


def test_a_node_that_can_take_the_guest_says_as_json_which_nics_that_are(uplinked: Node) -> None:
    ran = call("kvm-ifup", "expect", "--json", environ=environment(FIRST, SECOND))
    check(ran, 0)
    keys = ("instance", "index", "tap", "mac", "mode", "incoming")
    assert [tuple(nic[key] for key in keys) for nic in json.loads(ran.out)] == [
        (INSTANCE, index, None, nic["MAC"], "routed", True) for index, nic in enumerate((FIRST, SECOND))
    ]


def test_show_says_who_is_expected_until_its_nic_is_there(uplinked: Node) -> None:
    line = f"{INSTANCE}: expected with {GUEST_IP4}, told 0s ago; its QEMU does not wait here yet"
    assert INSTANCE not in call("kvm-ifup", "show").out
    check(expect(FIRST), 0)
    assert line in call("kvm-ifup", "show").out.splitlines()
    assert INSTANCE not in call("kvm-ifup", "show", "--wrong").out
    assert told() == [("expected", None, None)]
    guest = uplinked.guest("tap0")
    with agents.running() as agent:
        qemu = Qemu([(guest, GUEST_MAC)], instance=INSTANCE, incoming=True)
        try:
            agent.armed()
            assert "expected" not in call("kvm-ifup", "show").out
            assert told() == [("armed", "tap0", True)]
        finally:
            qemu.end()


def told() -> list[tuple[str, str | None, bool | None]]:
    """Phase, tap and wired of each NIC, as `show --json` and `check --json` have them: both say the same."""
    shown, checked = (json.loads(call("kvm-ifup", verb, "--json").out) for verb in ("show", "check"))
    assert [{**nic, "findings": []} for nic in shown] == [
        {**nic, "findings": [], "since": one["since"]} for nic, one in zip(checked["nics"], shown, strict=True)
    ]
    return [(nic["phase"], nic["tap"], nic["wired"]) for nic in shown]


def test_each_nic_that_is_expected_is_in_json_as_it_is_described(uplinked: Node) -> None:
    check(expect({**FIRST, "IP": f"{GUEST_IP4},2001:db8::8"}, SECOND), 0)
    first, second = json.loads(call("kvm-ifup", "show", "--json").out)
    assert (first["instance"], first["index"], first["mac"], first["mode"]) == (INSTANCE, 0, GUEST_MAC, "routed")
    assert (first["ip"], second["ip"]) == ([GUEST_IP4, "2001:db8::8"], ["192.0.2.9"])
    assert (first["by"], first["missing"], first["problem"]) == ("hook", [], None)
    assert abs(first["since"] - time.time()) < 30
    assert first["since"] == second["since"]


def test_check_lists_who_is_expected_and_counts_it_as_not_wired(uplinked: Node) -> None:
    check(expect(FIRST, SECOND), 0)
    lines = call("kvm-ifup", "check").out.splitlines()
    assert lines[0].startswith(f"{INSTANCE}/0: routed, expected since 20")
    assert lines[0].endswith(" (hook): not wired")
    assert lines[1].startswith(f"{INSTANCE}/1: routed, expected since 20")
    assert lines[2] == "0 right, 0 wrong, 2 not wired"
    for name, number in {INSTANCE: 2, f"{INSTANCE}/1": 1}.items():
        for verb in ("show", "check"):
            assert len(json_nics(verb, name)) == number
    for verb in ("show", "check"):
        for name in ("", "default"):  # whatever it is called until it has a tap
            check(call("kvm-ifup", verb, name or "web2.example.com"), 65, "no journal and no NIC file is about it")


def json_nics(*argv: str) -> list[object]:
    """The NICs of `show` or `check`."""
    found = json.loads(call("kvm-ifup", *argv, "--json").out)
    return list(found["nics"] if isinstance(found, dict) else found)


@pytest.mark.parametrize("ip", [GUEST_IP4, "2001:db8::8"])
@pytest.mark.parametrize(
    ("spoilt", "sentence"),
    [
        ("link set eth0 down", "uplink eth0 is down"),
        ("addr add {ip} dev eth0", "{ip}/"),
        ("route add {ip} dev lo", "is already routed out of lo"),
    ],
)
def test_a_node_that_can_take_it_no_longer_is_found_before_it_comes(
    uplinked: Node, spoilt: str, sentence: str, ip: str
) -> None:
    with agents.configured(routed={"uplinks": ["eth0"]}):
        check(expect({**FIRST, "IP": ip}), 0)
        assert call("kvm-ifup", "check").code == 0
        sentence = sentence.format(ip=ip)
        tools.ip(spoilt.format(ip=ip))
        for more in ([], ["--repair"]):
            done = call("kvm-ifup", "check", *more)
            assert done.code == 1
            assert sentence in done.out
            assert "now the guest would be cut off here" in done.out
            assert "--repair`" not in done.out
        assert sentence in call("kvm-ifup", "show", "--wrong").out
        (nic,) = json.loads(call("kvm-ifup", "show", "--json").out)
        assert sentence in nic["problem"]["cause"]


def test_who_has_not_come_in_time_is_expected_no_longer(uplinked: Node) -> None:
    with agents.configured(agent={"arrival_timeout": 1}):
        check(expect(FIRST), 0)
        file = manager.RUN_DIR / f"expected/{INSTANCE}.json"
        data = json.loads(file.read_text())
        file.write_text(json.dumps({**data, "uptime": data["uptime"] - 2}))
        assert json_nics("show") == json_nics("check") == []
        assert "expected" not in call("kvm-ifup", "check").out


@pytest.mark.parametrize(
    ("spoilt", "nic", "code", "sentence"),
    [
        ("", BRIDGED, 69, "no such bridge: br0"),
        ("link set eth0 down", FIRST, 69, "uplink eth0 is down"),
        ("", {**FIRST, "LINK": "nowhere"}, 69, "no such routing table: nowhere"),
        ("addr add 192.0.2.8/32 dev eth0", FIRST, 69, "is this node's own address"),
        ("", {**FIRST, "MODE": "openvswitch", "LINK": "ovs9"}, 69, "no such Open vSwitch bridge: ovs9"),
        ("", {**FIRST, "MODE": "ext", "LINK": "red"}, 69, "red"),
        ("", {**FIRST, "MAC": "aa:00"}, 65, "is not six pairs"),
    ],
)
def test_what_pre_would_refuse_is_refused_in_the_same_words(
    uplinked: Node, spoilt: str, nic: dict[str, str], code: int, sentence: str
) -> None:
    if spoilt:
        with agents.configured(routed={"uplinks": ["eth0"]}):
            tools.ip(spoilt)
            check(expect(nic), code, f"kvm-ifup: {INSTANCE}/0: ", sentence)
    else:
        check(expect(nic), code, f"kvm-ifup: {INSTANCE}/0: ", sentence)


def test_each_nic_that_cannot_be_taken_is_named(uplinked: Node) -> None:
    done = expect({**BRIDGED, "LINK": "br7"}, {**SECOND, "LINK": "nowhere"})
    assert done.code == 69
    assert [line.split(": ")[1] for line in done.err.splitlines()] == [f"{INSTANCE}/0", f"{INSTANCE}/1"]


def test_two_nics_with_one_address_are_refused(uplinked: Node) -> None:
    check(expect(FIRST, {**SECOND, "IP": GUEST_IP4}), 69, f"{GUEST_IP4}/32 is on {INSTANCE}/1, too")


def test_an_address_of_another_guest_here_is_refused(uplinked: Node) -> None:
    uplinked.guest("tap0")
    environ = manager.ganeti("tap0", MODE="routed", IP=GUEST_IP4, INSTANCE="web2", MAC=SECOND["MAC"])
    check(call("kvm-ifup-post", environ=environ), 0)
    check(expect(FIRST), 69, f"{GUEST_IP4}/32 is already on web2/0 (tap0)")
    check(expect(SECOND), 0)


def test_a_slow_bridge_refuses_who_arrives_and_only_warns_who_starts(node: Node) -> None:
    nodes.add_bridge(options="stp_state 1 forward_delay 1500")
    check(expect(BRIDGED), 69, "bridge br0 runs STP and a port takes 30 s to forward")
    for operation in ("failover", "move"):
        check(expect(BRIDGED, operation=operation), 0)


def test_what_a_new_tap_will_lack_is_known(uplinked: Node) -> None:
    tools.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    check(expect({**FIRST, "IP": "2001:db8::8"}), 69, "IPv6 is off")
    check(expect(FIRST), 0)


def test_ganetis_own_communication_is_its_own_business(uplinked: Node) -> None:
    check(expect(FIRST, {"NAME": "ganeti:communication:web1", "MODE": "routed", "MAC": "52:54:00:00:00:01"}), 0)


def test_an_ext_nic_is_looked_at_as_what_it_will_be(uplinked: Node) -> None:
    ext = {**FIRST, "MODE": "ext", "LINK": "dmz"}
    with agents.configured(**{"ext.dmz": DMZ}):
        check(expect(ext), 0)
        tools.run("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0")
        check(expect(ext), 69, "IPv4 forwarding is off on uplink eth0")


def test_a_shell_is_told_that_it_is_for_ganeti() -> None:
    check(call("kvm-ifup", "expect"), 64, "describes no guest")
