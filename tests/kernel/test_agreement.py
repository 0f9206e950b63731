"""After any single disturbance `show`, `check`, `plan`, `--plan` and the hook itself agree on what is to be done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness import manager, nodes, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.hooks import Result, call, check
from harness.nodes import Node

NICS: dict[str, dict[str, Any]] = {
    "bridged": {"mode": "bridged", "link": "br0"},
    "filter": {"mode": "bridged", "link": "br0", "ip": [GUEST_IP4, GUEST_IP6], "filter": "address"},
    "limited": {"mode": "bridged", "link": "br0", "rate": {"to_guest": "100mbit"}},
    "table": {"mode": "routed", "link": "100", "ip": [GUEST_IP4, "198.51.100.0/29", GUEST_IP6]},
    "routed": {"mode": "routed", "ip": [GUEST_IP4, GUEST_IP6]},
}
# What somebody does to the node.
TO_ANY = {
    "nothing": "true",
    "down": "ip link set tap0 down",
    "down and up": "ip link set tap0 down; ip link set tap0 up",
    "MAC": "ip link set tap0 address fe:00:00:00:00:01",
    "another bridge": "ip link set tap0 master br1",
    "another rule": "ip rule add iif tap0 lookup 200 priority 5",
}
TO_BRIDGED = {
    "MTU": "ip link set tap0 mtu 1300",
    "no bridge": "ip link set tap0 nomaster",
    "bridge MTU": "ip link set br0 mtu 1400",
    "bridge down": "ip link set br0 down",
    "bridge gone": "ip link del br0",
    "addrgenmode": "ip link set tap0 addrgenmode eui64",
    "port option": "bridge link set dev tap0 mcast_router 1",
    "snooping": "ip link set br0 type bridge mcast_snooping 0",
}
# The last rule of a chain becomes one that lets all through, with its comment; the kernel leaves it its handle, too.
OPENED = (
    """set -- $(nft -a list chain {} | sed -n 's/.* comment "\\(.*\\)" # handle \\(.*\\)/\\1 \\2/p' | tail -n 1); """
    """nft replace rule {} handle $2 accept comment '"'$1'"'"""
)
TO_FILTERED = {
    **{
        f"{chain} opened": OPENED.replace("{}", chain)
        for chain in (
            "bridge kvm-ifup prerouting",
            "bridge kvm-ifup address",
            "bridge kvm-ifup drop_protocol",
            "netdev kvm-ifup reserved",
            "netdev kvm-ifup nic-tap0",
        )
    },
    "no ruleset": "nft flush ruleset",
    "no table": "nft delete table bridge kvm-ifup",
    "no rules": "nft flush table bridge kvm-ifup",
    "a rule more": "nft insert rule bridge kvm-ifup address accept",
    "no rule on its tap": "nft flush chain netdev kvm-ifup nic-tap0",
    "no table on taps": "nft delete table netdev kvm-ifup",
    "no rule for taps": "nft flush chain netdev kvm-ifup reserved",
    "a rule more on taps": "nft insert rule netdev kvm-ifup reserved accept",
    "a MAC more": "nft add element bridge kvm-ifup macs { tap0 . 02:00:00:00:00:77 }",
    "a number more": "nft add element bridge kvm-ifup inner_macs { tap0 . 0x020000000077 }",
    "numbers more": "nft add element bridge kvm-ifup inner_nets6 { tap0 . 0x1-0xfffe }",
    "a MAC more on its tap": "nft add element netdev kvm-ifup port_macs { tap0 . 02:00:00:00:00:77 }",
    "a prefix more": "nft add element bridge kvm-ifup nets6 { tap0 . 2001:db8:7::/48 }",
    "an address less": f"nft delete element bridge kvm-ifup hosts4 {{ tap0 . {GUEST_IP4} }}",
    "another kind": "nft delete element bridge kvm-ifup guests { tap0 }; "
    "nft add element bridge kvm-ifup guests { tap0 : goto mac }",
    "no element": "nft delete element bridge kvm-ifup guests { tap0 }",
    "another policy": "nft add chain bridge kvm-ifup prerouting '{ policy drop; }'",
    "asleep": "nft add table bridge kvm-ifup '{ flags dormant; }'",
}
TO_LIMITED = {
    "nothing": "true",
    "down and up": "ip link set tap0 down; ip link set tap0 up",
    "another rate": "tc qdisc change dev tap0 root handle 6b76: tbf rate 1gbit burst 128kb limit 1mb",
    "no limit": "tc qdisc del dev tap0 root",
    "another shaper": "tc qdisc replace dev tap0 root handle 1: htb default 1",
    "bridge MTU": "ip link set br0 mtu 1400",
}
TO_ROUTED = {
    "no rule": "ip rule add iif tap0 lookup 100; ip rule del iif tap0 lookup 100",
    "no route": f"ip route flush {GUEST_IP4} dev tap0 table all",
    "another route": f"ip route replace {GUEST_IP4} dev eth0",
    "no neighbour": f"ip neigh del {GUEST_IP4} dev tap0",
    "another neighbour": f"ip neigh replace {GUEST_IP6} lladdr 02:00:00:00:00:77 nud permanent dev tap0",
    "no proxy": f"ip neigh add proxy {GUEST_IP4} dev eth0; ip neigh del proxy {GUEST_IP4} dev eth0",
    "proxy_ndp": "sysctl -qw net.ipv6.conf.eth0.proxy_ndp=0",
    "proxy_delay": "sysctl -qw net.ipv4.neigh.eth0.proxy_delay=80",
    "sources": "nft flush set inet kvm-ifup addresses",
    "no rules": "nft flush chain inet kvm-ifup strict",
    "rp_filter": "sysctl -qw net.ipv4.conf.tap0.rp_filter=0",
    "forwarding": "sysctl -qw net.ipv4.conf.tap0.forwarding=0",
    "uplink forwarding": "sysctl -qw net.ipv4.conf.eth0.forwarding=0",
    "uplink down": "ip link set eth0 down",
    "uplink down and up": "ip link set eth0 down; ip link set eth0 up",
    "uplink gone": "ip link del eth0",
    "no IPv4 default": "ip -4 route flush default",
    "no IPv6 default": "ip -6 route flush default",
    "no default": "ip -4 route flush default; ip -6 route flush default",
    "default elsewhere": "ip link add eth1 type veth peer name far; ip link set eth1 up; ip link set far up;"
    " sysctl -qw net.ipv4.conf.eth1.forwarding=1; ip route replace default dev eth1",
}
TO_MODE = {"bridged": TO_BRIDGED, "table": TO_ROUTED, "routed": TO_ROUTED}
CASES = [
    pytest.param(nic, phase, line, id=f"{nic}, {phase}, {name}")
    for nic in NICS
    if nic != "limited"
    for phase in (("post",) if nic == "filter" else ("pre", "post"))
    for name, line in (TO_FILTERED if nic == "filter" else {**TO_ANY, **TO_MODE[nic]}).items()
] + [
    pytest.param("limited", "post", line, id=f"limited, {name}", marks=pytest.mark.pyroute2)
    for name, line in TO_LIMITED.items()
]
What = set[tuple[str, str, Any]]


def set_up(node: Node, nic: str, phase: str) -> None:
    """A NIC that the hook of *phase* has wired."""
    node.uplink()
    nodes.add_bridge("br0", mtu=9000)
    nodes.add_bridge("br1")
    node.guest()
    tools.ip("rule add iif eth0 lookup 100")
    manager.write_nic(**NICS[nic], incoming=phase == "pre")
    check(call(f"kvm-ifup-{phase}", "tap0"), 0)


def due(ops: list[dict[str, Any]]) -> What:
    """What of *ops* differs; an announcement only follows from that, and so does what is done once more."""
    return {
        (op["about"], str(op["now"]), op["want"])
        for op in ops
        if op.get("needed", True) and op["op"] != "announce" and op["now"] != op["want"]
    }


def told(result: Result, *keys: str) -> What | str:
    """What a plan says, or why there is none."""
    if result.code:
        return str(json.loads(result.out)["cause"])
    (one,) = json.loads(result.out)
    return due([op for key in keys for op in one[key]])


def together(planned: What | str) -> What | str:
    """Leaving one bridge and joining another, which are two commands, as one change."""
    if isinstance(planned, str):
        return planned
    about = "tap0 bridge"
    left = [now for what, now, want in planned if what == about and want is None]
    joined = [want for what, now, want in planned if what == about and now == "None"]
    if not left or not joined:
        return planned
    return planned - {(about, left[0], None), (about, "None", joined[0])} | {(about, left[0], joined[0])}


def seen(one: dict[str, Any]) -> What | str:
    """The same of one NIC in `show --json`."""
    if one["wired"] is False and one["problem"] and not one["missing"]:
        return str(one["problem"]["cause"])
    return due(one["missing"])


@pytest.mark.parametrize(("nic", "phase", "disturbance"), CASES)
def test_all_agree_on_what_is_to_be_done(node: Node, nic: str, phase: str, disturbance: str) -> None:
    set_up(node, nic, phase)
    tools.run("sh", "-euc", disturbance)
    hook = f"kvm-ifup-{phase}"
    planned = told(call(hook, "tap0", "--plan", "--json"), "undone", "ops")
    assert together(told(call("kvm-ifup", "plan", phase, "tap0", "--json"), "undone", "ops")) == planned
    (shown,) = json.loads(call("kvm-ifup", "show", "--json").out)
    checked = call("kvm-ifup", "check", "--json")
    (found,) = json.loads(checked.out)["nics"]
    assert seen(shown) == planned
    assert found["missing"] == shown["missing"]
    if planned:
        assert checked.code == 1
        assert found["findings"]
    done = call(hook, "tap0", "--json")
    if isinstance(planned, str):
        assert (done.code, json.loads(done.out)["cause"]) == (69, planned)
        return
    assert told(done, "undone", "ops") == planned
    # And when it is done, nothing is left to do, for nobody.
    assert told(call(hook, "tap0", "--plan", "--json"), "undone", "ops") == set()
    (shown,) = json.loads(call("kvm-ifup", "show", "--json").out)
    assert (shown["wired"], shown["missing"]) == (True, [])
