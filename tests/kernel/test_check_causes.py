"""`check` says of a difference what is known, and does not invent who made it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness import manager, nodes, tools
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_IP6
from harness.hooks import call, check
from harness.manager import RUN_DIR
from harness.nodes import Node
from tests.kernel.checking import BRIDGED, ROUTED, TABLE, found, text
from tests.kernel.checking import wire as wired
from tests.kernel.staging import NICS

INVENTED = ("somebody", "something", "earlier", "restart", "daemon")  # nobody and nothing has done it
THREE = [GUEST_IP4, GUEST_IP6, "192.0.2.9"]
CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "routed to bridged": (
        ROUTED, {"mode": "bridged", "link": "br0", "ip": None}, "mode routed -> bridged; link none -> br0",
    ),
    "bridged to routed": (
        BRIDGED, {"mode": "routed", "link": None, "ip": [GUEST_IP4]}, "mode bridged -> routed; link br0 -> none",
    ),
    "another bridge": (BRIDGED, {"link": "br1"}, "link br0 -> br1"),
    "another table": (TABLE, {"link": "200"}, "link 100 -> 200"),
    "an address more": (ROUTED, {"ip": THREE}, f"ip {GUEST_IP4}, {GUEST_IP6} -> {GUEST_IP4}, {GUEST_IP6}, 192.0.2.9"),
    "an address less": (ROUTED, {"ip": [GUEST_IP6]}, f"ip {GUEST_IP4}, {GUEST_IP6} -> {GUEST_IP6}"),
    "another MAC": (ROUTED, {"mac": FOREIGN_MAC}, f"mac aa:00:00:35:ac:01 -> {FOREIGN_MAC}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_nic_that_is_described_otherwise_is_said_to_be_just_that(node: Node, name: str) -> None:
    kind, changed, words = CHANGES[name]
    wired(node, kind)
    for family in (4, 6):  # the administrator's part, if it is another table
        tools.ip(f"-{family} rule add iif eth0 lookup 200")
    manager.write_nic(**{**NICS[kind], **changed})
    code, findings = found()
    assert code == 1
    assert findings[0]["what"].startswith("described otherwise since: ")
    assert words in findings[0]["what"]
    assert findings[0]["why"].endswith("/0.toml has been changed")
    assert len(findings) > 1
    assert not any(word in text(findings) for word in INVENTED), text(findings)
    assert call("kvm-ifup", "check", "--repair").code == 0
    assert found() == (0, [])


def test_a_change_that_cannot_be_made_is_not_blamed_on_anybody(node: Node) -> None:
    wired(node, ROUTED)
    tools.ip("route add 192.0.2.99 dev eth0")
    manager.write_nic(**{**NICS[ROUTED], "ip": ["192.0.2.99"]})
    code, findings = found()
    assert code == 1
    assert "is already routed" in text(findings)
    assert "given to somebody else" not in text(findings)


def test_what_was_done_to_the_node_is_still_told_beside_a_new_description(node: Node) -> None:
    wired(node, ROUTED)
    manager.write_nic(**{**NICS[ROUTED], "ip": [GUEST_IP4, GUEST_IP6, "192.0.2.9"]})
    tools.ip("link set tap0 down")
    findings = found()[1]
    (down,) = [one for one in findings if "tap0 state: down -> up" in one["what"]]
    assert "somebody has set it down" in down["why"]


@pytest.mark.parametrize("setting", ["loose", "off"])
def test_another_configuration_is_not_somebody_who_has_changed_the_node(node: Node, setting: str) -> None:
    wired(node, ROUTED)
    code, findings = found(manager.configuration(routed={"rp_filter": setting}))
    assert code == 1
    (one,) = [one for one in findings if "rp_filter" in one["what"]]
    assert one["why"] == "the configuration has changed since, or kvm-ifup itself"


@pytest.mark.parametrize("mtu", [1400, 9100])
def test_another_mtu_of_the_bridge_is_not_a_change_of_the_tap(node: Node, mtu: int) -> None:
    wired(node, BRIDGED)
    tools.ip(f"link set br0 mtu {mtu}")
    (one,) = [one for one in found()[1] if "tap0 MTU" in one["what"]]
    assert one["why"].startswith("the bridge's has changed since")


@pytest.mark.pyroute2
@pytest.mark.parametrize("family", [4, 6])
def test_a_rule_made_just_now_is_not_called_an_earlier_guests(node: Node, family: int) -> None:
    wired(node, ROUTED)
    tools.ip(f"-{family} rule add iif tap0 lookup 200 priority 5")
    code, findings = found()
    assert code == 1
    assert f"rule v{family} 5: iif tap0" in text(findings)
    assert "earlier" not in text(findings)
    assert "stale" not in text(findings)


def test_the_hint_against_stp_is_a_shorter_delay_first(node: Node) -> None:
    wired(node, BRIDGED, "kvm-ifup-pre")
    tools.ip("link set br0 type bridge stp_state 1")
    mend = found()[1][0]["mend"]
    assert mend.index("forward_delay 200") < mend.index("stp_state 0")
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2.example.com", mode="bridged", link="br0", incoming=True)
    check(call("kvm-ifup-pre", "tap1"), 69, "forward_delay 200`, or `ip link set br0 type bridge stp_state 0`")
    # Where even the shortest is too long, it is not offered.
    impatient = manager.configuration(bridged={"forwarding_timeout": 3})
    refused = call("kvm-ifup-pre", "tap1", impatient)
    assert refused.code == 69
    assert "forward_delay" not in refused.err


# --- one thing leads to another ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nic", "command", "what", "why"),
    [
        (BRIDGED, "ip link set br0 down", "tap0 port state", "because br0 is down"),
        (ROUTED, "ip link set tap0 down", "tap0 address fe80::", "it went when the tap went down"),
        (ROUTED, "sysctl -qw net.ipv4.conf.tap0.forwarding=0", "", ""),
        (ROUTED, "sysctl -qw net.ipv4.ip_forward=0", "", ""),
        (ROUTED, "sysctl -qw net.ipv6.conf.tap0.forwarding=0", "", ""),
    ],
)
def test_what_follows_from_something_else_is_not_given_another_cause(
    node: Node, nic: str, command: str, what: str, why: str
) -> None:
    wired(node, nic)
    tools.run(*command.split())
    code, findings = found()
    assert code == 1
    assert what == "" or [one["why"] for one in findings if one["what"].startswith(what)] == [why]
    assert "STP has found a loop" not in text(findings)
    assert "is refused" not in text(findings)  # without forwarding there is no way for anything


def test_what_an_earlier_version_did_not_do_is_not_blamed_on_anybody(node: Node) -> None:
    wired(node, BRIDGED)
    journal = RUN_DIR / "state/tap0.json"
    earlier = json.loads(journal.read_text())
    new = ("accept_redirects", "arp_ignore")
    earlier["entries"] = [one for one in earlier["entries"] if one.get("name") not in new]
    journal.write_text(json.dumps({**earlier, "boot": ""}))
    for name in new:
        tools.run("sysctl", "-qw", f"net/ipv4/conf/tap0/{name}=1")
    tools.ip("link set tap0 nomaster")
    whys = {one["what"].split(": ")[0]: one["why"] for one in found()[1]}
    for name in new:
        assert whys[f"sysctl net/ipv4/conf/tap0/{name}"].startswith("an earlier version of kvm-ifup has wired it")
    assert whys["tap0 bridge"].startswith("something took it off its bridge")  # each version does that


def test_a_journal_that_was_set_aside_is_why_a_tap_has_none(node: Node) -> None:
    wired(node, BRIDGED)
    assert call("kvm-ifdown", "tap0").code == 0
    assert "kvm-ifdown was called" in text(found()[1])
    (RUN_DIR / "state/tap0.json").write_text("{")
    assert call("kvm-ifup", "gc").code == 0
    (one,) = found()[1]
    assert one["why"].endswith(f"its journal could not be read, and is now {RUN_DIR}/state/tap0.unreadable")
