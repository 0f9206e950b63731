"""Rules of nftables and iptables as `kvm-ifup check` understands them: what it does not know is neither of both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvmifup.diagnosis.firewall import Packet, walk
from kvmifup.node.firewall import Chain, nft_chains, saved_chains

IN = Packet(4, "eth0", "tap0", None, "192.0.2.8", "in", ("", ""))
BRIDGED = Packet(4, "br0", "br0", None, None, "in", ("", ""), "eth0", "tap0")


def iptables(*rules: str, policy: str = "DROP") -> str:
    """A table of iptables, as it is saved."""
    return "\n".join(["*filter", f":FORWARD {policy} [0:0]", ":mine - [0:0]", *rules, "COMMIT"])


def ends(chains: list[Chain], packet: Packet = IN) -> str:
    """How *packet* may end."""
    named = {(one.program, one.family, one.table, one.name): one for one in chains}
    (base,) = [one for one in chains if one.hook == "forward"]
    return " or ".join(sorted({end.verdict for end in walk(base, packet, named)}))


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        ([], "drop"),
        (["-A FORWARD -j ACCEPT"], "accept"),
        (["-A FORWARD -o tap+ -j ACCEPT"], "accept"),
        (["-A FORWARD ! -o tap+ -j ACCEPT"], "drop"),
        (["-A FORWARD -d 192.0.2.0/24 -j ACCEPT"], "accept"),
        (["-A FORWARD ! -d 192.0.2.0/24 -j ACCEPT"], "drop"),
        (["-A FORWARD -s 203.0.113.0/24 -j ACCEPT"], "accept or drop"),
        (["-A FORWARD -p tcp -m tcp --dport 22 -j ACCEPT"], "accept or drop"),
        (["-A FORWARD -p udp -m udp --dport 53 -j ACCEPT"], "drop"),
        (["-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"], "drop"),
        (["-A FORWARD -m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT"], "accept"),
        (["-A FORWARD -j mine", "-A mine -j RETURN", "-A mine -j ACCEPT"], "drop"),
        (["-A FORWARD -j mine", "-A mine -i eth0 -j ACCEPT"], "accept"),
        (["-A FORWARD -g mine", "-A FORWARD -j ACCEPT"], "drop"),
        (["-A FORWARD -j LOG --log-prefix \"a -j ACCEPT\"", "-A FORWARD -j ACCEPT"], "accept"),
        (["-A FORWARD -m comment --comment \"all of it\" -j ACCEPT"], "accept"),
        (["-A FORWARD -j NFQUEUE --queue-num 0"], "accept or drop"),
        (["-A FORWARD -m physdev --physdev-is-bridged -j ACCEPT"], "drop"),
        (["-A FORWARD -m set --match-set guests dst -j ACCEPT"], "accept or drop"),
        (["-A FORWARD -j REJECT --reject-with icmp-port-unreachable", "-A FORWARD -j ACCEPT"], "drop"),
    ],
)  # fmt: skip
def test_rules_of_iptables(rules: list[str], verdict: str) -> None:
    assert ends(list(saved_chains(iptables(*rules), "iptables-nft", "ip"))) == verdict


def test_what_only_a_bridge_forwards() -> None:
    rule = "-A FORWARD -m physdev --physdev-is-bridged -j ACCEPT"
    assert ends(list(saved_chains(iptables(rule), "iptables-nft", "ip")), BRIDGED) == "accept"
    rule = "-A FORWARD -m physdev --physdev-out tap+ --physdev-in eth1 -j ACCEPT"
    assert ends(list(saved_chains(iptables(rule), "iptables-nft", "ip")), BRIDGED) == "drop"


def ruleset(*expressions: list[Any], **sets: list[Any]) -> str:
    """What nft prints of a chain with these rules."""
    place = {"family": "inet", "table": "filter"}
    base = {**place, "name": "forward", "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}
    rules = [{"rule": {**place, "chain": "forward", "handle": 1, "expr": one}} for one in expressions]
    named = [{"set": {**place, "name": name, "elem": elements}} for name, elements in sets.items()]
    return json.dumps({"nftables": [{"metainfo": {}}, {"chain": base}, *named, *rules]})


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    """A "match"."""
    return {"match": {"op": op, "left": left, "right": right}}


TARGET = {"payload": {"protocol": "ip", "field": "daddr"}}
OIF = {"meta": {"key": "oifname"}}
ACCEPT: dict[str, None] = {"accept": None}


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ([ACCEPT], "accept"),
        ([match(OIF, "tap0"), {"counter": {"packets": 0, "bytes": 0}}, ACCEPT], "accept"),
        ([match(OIF, "tap0", "!="), ACCEPT], "drop"),
        ([match(TARGET, {"prefix": {"addr": "192.0.2.0", "len": 24}}), ACCEPT], "accept"),
        ([match(TARGET, {"set": [{"range": ["192.0.2.1", "192.0.2.7"]}]}), ACCEPT], "drop"),
        ([match(TARGET, "@guests"), ACCEPT], "accept"),
        ([match(TARGET, "@nobody"), ACCEPT], "accept or drop"),
        ([match({"payload": {"protocol": "ip6", "field": "daddr"}}, "2001:db8::8"), ACCEPT], "drop"),
        ([match({"concat": [OIF, TARGET]}, "@guests"), ACCEPT], "accept or drop"),
        ([{"limit": {"rate": 1, "per": "second"}}, ACCEPT], "accept or drop"),
        ([{"vmap": {"key": OIF, "data": {"set": [["tap0", ACCEPT], ["tap1", {"drop": None}]]}}}], "accept"),
        ([{"xt": {"type": "match", "name": "conntrack"}}, ACCEPT], "accept or drop"),
        ([{"xt": None}, ACCEPT], "accept or drop"),
        (["unheard of", ACCEPT], "accept or drop"),
        ([{"of": 1, "another": 2}, ACCEPT], "accept or drop"),
    ],
)
def test_rules_of_nftables(expression: list[Any], verdict: str) -> None:
    assert ends(list(nft_chains(ruleset(expression, guests=["192.0.2.8"])))) == verdict
