"""`check` and `check --node` name a firewall of the node that drops what goes to a guest, and no other."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from harness import manager, nodes, tools, wire
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_MAC
from harness.hooks import call, check
from harness.nodes import Node
from harness.oracle import sysctl
from tests.kernel.checking import BRIDGED, ROUTED, comes, dropped, found, found_on_node, text
from tests.kernel.checking import wire as wired

DROP = "type filter hook forward priority filter; policy drop;"
# As each of these leaves it on a node whose administrator has not thought of guests.
UFW = """*filter
:FORWARD DROP [0:0]
:ufw-before-forward - [0:0]
:ufw-user-forward - [0:0]
-A FORWARD -j ufw-before-forward
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
COMMIT
"""
DOCKER = """*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
FIREWALLD = """table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        jump filter_FORWARD_ZONES
        reject with icmpx admin-prohibited
    }
    chain filter_FORWARD_ZONES {
        iifname "eth9" goto filter_FWD_public
        goto filter_FWD_trusted
    }
    chain filter_FWD_public { reject with icmpx admin-prohibited; }
    chain filter_FWD_trusted { oifname "lo" accept; }
}"""
VMAP = """table inet filter {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state vmap { established : accept, related : accept, invalid : drop }
        iifname vmap { "wg0" : accept, "eth0" : jump outside }
    }
    chain outside { ip daddr { 203.0.113.0/24, 198.51.100.1-198.51.100.9 } accept; }
}"""
POLICY = f"table ip filter {{ chain forward {{ {DROP} }}; }}"
RAW = "table inet raw { chain pre { type filter hook prerouting priority raw; policy drop; }; }"


def planted() -> str:
    """All rules of the node, without counters."""
    ruleset = tools.run("nft", "list", "ruleset")
    return re.sub(r"packets \d+ bytes \d+", "", ruleset) + Path("/proc/net/ip_tables_names").read_text()


def nft(text: str) -> None:
    """Load a ruleset."""
    tools.run("nft", text)


def restore(program: str, text: str) -> None:
    """Load a table of iptables."""
    tools.run("sh", "-c", f"printf '%s' '{text}' | {program}-restore")


def plant(firewall: str) -> None:
    """One of the firewalls by its name."""
    kind, _, name = firewall.partition(" ")
    tables = {"Docker": DOCKER, "ufw": UFW, "policy": "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n"}
    if kind == "nft":
        nft({"firewalld": FIREWALLD, "vmap": VMAP, "policy": POLICY, "raw": RAW}[name])
    else:
        restore(kind, tables[name])


FIREWALLS = {
    "nft policy": "the nftables chain ip filter forward",
    "nft vmap": "the nftables chain inet filter forward",
    "nft firewalld": "the nftables chain inet firewalld filter_FORWARD",
    "nft raw": "the nftables chain inet raw pre",
    "iptables-nft policy": "the iptables-nft chain FORWARD",
    "iptables-nft Docker": "the iptables-nft chain FORWARD",
    "iptables-nft ufw": "the iptables-nft chain FORWARD",
    "iptables-legacy policy": "the iptables-legacy chain FORWARD",
    "iptables-legacy Docker": "the iptables-legacy chain FORWARD",
}


@pytest.mark.parametrize("firewall", FIREWALLS)
def test_a_firewall_that_drops_a_routed_guests_traffic(node: Node, firewall: str) -> None:
    wired(node, ROUTED)
    assert not dropped(node, "eth0", "203.0.113.9")
    plant(firewall)
    assert dropped(node, "eth0", "203.0.113.9")
    before = planted()
    for code, findings in (found(), found_on_node()):
        assert code == 1
        assert f"{FIREWALLS[firewall]} drops new connections from eth0 to {GUEST_IP4} on tap0" in text(findings)
        manager_ = re.search("Docker|ufw|firewalld", firewall)
        assert f"{manager_[0]} manages it" in text(findings) if manager_ else "manages" not in text(findings)
    assert planted() == before
    for _ in range(4):  # one for each direction and family
        hints = [one["mend"] for one in found()[1] if one["mend"]]
        if not hints:
            break
        tools.run("sh", "-c", re.findall(r"`([^`]+)`", hints[0])[0])
    assert found() == (0, [])
    assert not dropped(node, "eth0", "203.0.113.9")


@pytest.mark.parametrize("program", ["ip6tables-nft", "ip6tables-legacy"])
def test_the_other_family_is_judged_by_itself(node: Node, program: str) -> None:
    wired(node, ROUTED)
    tools.run(program, "-P", "FORWARD", "DROP")
    code, findings = found()
    assert code == 1
    assert f"the {program} chain FORWARD drops new connections from eth0 to 2001:db8::8 on tap0" in text(findings)
    assert GUEST_IP4 not in text(findings)


ACCEPTING = {
    "by the tap": 'iifname "tap*" accept; oifname "tap*" accept;',
    "by the uplink": 'iifname { "eth0", "eth1" } accept; iifname "tap0" accept;',
    "by address": "ip daddr @guests accept; ip saddr @guests accept; "
    "ip6 daddr 2001:db8::/64 accept; ip6 saddr 2001:db8::8 accept;",
    "by a jump": 'jump more; iifname "tap0" accept;',
    "all": "accept;",
    "by state": "ct state established,related accept; ct state new accept;",
}


@pytest.mark.parametrize("rules", ACCEPTING)
def test_a_policy_of_drop_with_rules_that_accept_is_right(node: Node, rules: str) -> None:
    wired(node, ROUTED)
    nft("table inet filter { set guests { type ipv4_addr; flags interval; elements = { 192.0.2.0/28 }; }; "
        f'chain forward {{ {DROP} {ACCEPTING[rules]} }}; chain more {{ oifname "tap0" accept; }}; }}')  # fmt: skip
    assert not dropped(node, "eth0", "203.0.113.9")
    assert found() == (0, [])


def test_what_cannot_be_judged_is_not_called_wrong(node: Node) -> None:
    wired(node, ROUTED)
    nft(f"table inet filter {{ chain forward {{ {DROP} tcp dport {{ 22, 80 }} accept; meta mark 7 accept; }}; }}")
    code, findings = found()
    assert code == 0
    assert "but for those that some rules accept" in text(findings)


@pytest.mark.parametrize("rule", ["ip saddr 203.0.113.0/24 drop;", "tcp dport 25 drop;", "ct state invalid drop;"])
def test_a_rule_that_drops_something_is_nobodys_business(node: Node, rule: str) -> None:
    wired(node, ROUTED)
    nft(f"table inet filter {{ chain forward {{ type filter hook forward priority 0; {rule} }}; }}")
    assert found() == (0, [])


def test_a_rule_that_drops_all_of_a_guest_is_named_without_a_command(node: Node) -> None:
    wired(node, ROUTED)
    nft('table inet filter { chain forward { type filter hook forward priority 0; oifname "tap0" drop; }; }')
    code, findings = found()
    assert code == 1
    assert "by rule 2 of chain forward" in text(findings)
    assert [one["mend"] for one in findings] == [""] * len(findings)


def test_without_a_program_to_read_them_nothing_is_said(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(node, ROUTED)
    plant("nft policy")
    monkeypatch.setattr("kvmifup.node.programs.PATH", "/nowhere")
    assert found() == (0, [])


# --- bridged ----------------------------------------------------------------------------------------------------


def lost(node: Node) -> bool:
    """Whether an IPv4 datagram from beyond the bridge's uplink does not come to the guest."""
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, bytes([203, 0, 113, 9]), bytes([192, 0, 2, 8]))
    words = sum(struct.unpack("!10H", header))
    words = ~((words >> 16) + (words & 0xFFFF)) & 0xFFFF
    header = header[:10] + struct.pack("!H", words) + header[12:]
    with wire.packet_socket("br0-far") as sender:
        sender.send(wire.ethernet(GUEST_MAC, FOREIGN_MAC, wire.ETH_P_IP, header + struct.pack("!HHHH", 1, 9, 8, 0)))
    return not comes(node.taps[0], header[12:20])


@pytest.mark.parametrize("firewall", ["nft policy", "nft firewalld", "iptables-nft Docker", "iptables-legacy policy"])
def test_a_firewall_that_drops_what_a_bridge_forwards(node: Node, firewall: str) -> None:
    wired(node, BRIDGED)
    sysctl("bridge/bridge-nf-call-iptables", 1)
    sysctl("bridge/bridge-nf-call-ip6tables", 1)
    assert not lost(node)
    plant(firewall)
    assert lost(node)
    for code, findings in (found(), found_on_node()):
        assert code == 1
        assert f"{FIREWALLS[firewall]} drops new connections of IPv4 from br0-up to tap0 on br0" in text(findings)
    (mend,) = {one["mend"] for one in found()[1]}
    tools.run("sh", "-c", re.findall(r"`([^`]+)`", mend)[0])
    assert found() == (0, [])
    assert not lost(node)


@pytest.mark.parametrize("bridge", [False, True])
def test_a_bridge_that_is_not_filtered_is_right(node: Node, bridge: bool) -> None:
    wired(node, BRIDGED)
    for family in ("iptables", "ip6tables"):
        sysctl(f"bridge/bridge-nf-call-{family}", 0)
    plant("nft policy")
    assert found() == (0, [])
    assert not lost(node)
    if bridge:  # it has a switch of its own
        tools.ip("link set br0 type bridge nf_call_iptables 1")
        assert lost(node)
        assert found()[0] == 1


def test_a_firewall_for_bridges_is_looked_at_too(node: Node) -> None:
    wired(node, BRIDGED)
    nft("table bridge filter { chain forward { type filter hook forward priority 0; policy drop; }; }")
    assert lost(node)
    code, findings = found()
    assert code == 1
    assert "the nftables chain bridge filter forward drops new connections" in text(findings)


def test_nothing_is_said_of_a_nic_that_needs_no_forwarding(node: Node) -> None:
    nodes.add_bridge()
    plant("nft policy")
    manager.write_nic(mode="bridged", link="br0")
    node.guest()
    sysctl("bridge/bridge-nf-call-iptables", 0)
    check(call("kvm-ifup-post", "tap0"), 0)
    assert found()[0] == 0
