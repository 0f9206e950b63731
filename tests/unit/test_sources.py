"""What a guest may send from, as the plan says it; what is heard of the tables; what was dropped between two looks."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import ip_network

import pytest

from kvmifup import phases
from kvmifup.agent.events import NetlinkMessage
from kvmifup.agent.rulesets import touched
from kvmifup.core.errors import NotReadyError
from kvmifup.core.model import Config, Phase, RoutedConfig
from kvmifup.core.ops import LinkUp, Sources, UplinkGuard
from kvmifup.node import drops, source_rules
from kvmifup.node.nfmessages import NFNL_SUBSYS_NFTABLES, NFT_MSG_DELSETELEM, among, keyed, named, nested

from .samples import FACTS_ROUTED, ROUTED


def planned(*ip: str, rp_filter: str | None = None) -> list[str | None]:
    """What the plan has of sources for a NIC with these addresses."""
    nic = replace(ROUTED, ip=tuple(map(ip_network, ip)))
    plan = phases.plan(Phase.PRE, nic, Config(routed=RoutedConfig(rp_filter=rp_filter)), FACTS_ROUTED)
    return [op.want for op in plan if isinstance(op, Sources)]


@pytest.mark.parametrize(
    ("ip", "want"),
    [
        ([], "strict"),
        (["192.0.2.8"], "strict"),
        (["2001:db8::8", "192.0.2.8"], "strict 2001:db8::8"),
        (["2001:db8::9", "2001:db8::8"], "strict 2001:db8::8 2001:db8::9"),
        (["2001:db8:1::/64", "2001:db8:1::8", "2001:db8::/32"], "strict 2001:db8::/32"),
        (["2001:db8:1::/64", "2001:db8:2::8"], "strict 2001:db8:1::/64 2001:db8:2::8"),
    ],
)
def test_sources_are_its_addresses_without_those_inside_others(ip: list[str], want: str) -> None:
    assert planned(*ip) == [want]
    assert planned(*ip, rp_filter="loose") == [want.replace("strict", "loose")]
    assert planned(*ip, rp_filter="off") == planned(*ip, rp_filter="keep") == []


def test_sources_are_judged_before_the_tap_is_up_and_uplinks_only_later() -> None:
    config = Config(routed=RoutedConfig(guard_uplinks=True))
    plans = {phase: phases.plan(phase, ROUTED, config, FACTS_ROUTED) for phase in (Phase.PRE, Phase.POST)}
    kinds = [type(op) for op in plans[Phase.PRE]]
    assert kinds.index(Sources) < kinds.index(LinkUp)
    assert UplinkGuard not in kinds
    guards = [op for op in plans[Phase.POST] if isinstance(op, UplinkGuard)]
    assert {op.prefix for op in guards} == {phases.as_told(prefix) for prefix in ROUTED.ip}
    assert all(map(phases.only_here, guards))


def test_who_has_not_asked_is_warned_and_who_has_is_refused() -> None:
    facts = replace(FACTS_ROUTED, unguarded="no nftables")
    assert not [op for op in phases.plan(Phase.POST, ROUTED, Config(), facts) if isinstance(op, Sources)]
    assert "the guest can send from any IPv6 address: no nftables" in phases.remarks(
        Phase.POST, ROUTED, Config(), facts
    )
    off = Config(routed=RoutedConfig(rp_filter="off"))
    assert phases.remarks(Phase.POST, ROUTED, off, facts) == phases.remarks(Phase.POST, ROUTED, off, FACTS_ROUTED)
    for asked in (RoutedConfig(rp_filter="strict"), RoutedConfig(rp_filter="loose"), RoutedConfig(guard_uplinks=True)):
        with pytest.raises(NotReadyError, match="no nftables"):
            phases.plan(Phase.PRE, ROUTED, Config(routed=asked), facts)


# --- events --------------------------------------------------------------------------------------------------------


def message(kind: int, table: str, rest: bytes, family: int = 1) -> NetlinkMessage:
    """A message as the kernel sends it."""
    return NetlinkMessage(NFNL_SUBSYS_NFTABLES << 8 | kind, struct.pack(">BBH", family, 0, 7) + named(1, table) + rest)


def an_element(tap: bytes) -> bytes:
    """The set, and an element whose key begins with *tap*."""
    return named(2, "addresses") + among([keyed(tap.ljust(16, b"\0") + bytes(16))])


@pytest.mark.parametrize(
    ("heard", "things"),
    [
        (message(NFT_MSG_DELSETELEM, "kvm-ifup", an_element(b"tap0")), {("nft", 1, "tap0")}),
        (message(NFT_MSG_DELSETELEM, "kvm-ifup", an_element(b"tap0"), 7), {("nft", 7, "tap0")}),
        (message(NFT_MSG_DELSETELEM, "kvm-ifup2", an_element(b"tap0")), set()),
        (message(NFT_MSG_DELSETELEM, "filter", an_element(b"kvm-ifup")), set()),
        (message(8, "kvm-ifup", named(2, "strict")), {("nft", 1, "")}),
        (message(8, "kvm-ifup", named(2, "nic-tap0"), 7), {("nft", 7, "tap0")}),
        (message(5, "kvm-ifup", named(3, "nic-tap0"), 7), {("nft", 7, "tap0")}),
        (message(2, "kvm-ifup", b""), {("nft", 1, "")}),
        (NetlinkMessage(1 << 8 | 2, b"kvm-ifup\0"), set()),
        (NetlinkMessage(NFNL_SUBSYS_NFTABLES << 8 | 15, struct.pack(">BBHI", 0, 0, 7, 8)), set()),
    ],
)
def test_changes_of_our_tables_are_told_by_tap(heard: NetlinkMessage, things: set[object]) -> None:
    assert set(touched([heard])) == things


# --- rules and counts ------------------------------------------------------------------------------------------------


def test_rules_that_say_something_else_are_not_taken_for_ours() -> None:
    ours = [(chain, source_rules.meaning(rule)) for chain, rule in source_rules.in_order()]
    assert ours == source_rules.expected()
    assert len({repr(one) for one in ours}) == len(ours)  # nothing of what they say was left out
    listed = tuple(named(2, chain) + nested(4, rule) for chain, rule in source_rules.in_order())
    assert source_rules.are_ours(listed)
    for number in range(len(listed)):
        assert not source_rules.are_ours(listed[:number] + listed[number + 1 :])
        assert not source_rules.are_ours((*listed[:number], listed[number], *listed[number:]))
    assert not source_rules.are_ours(())


def test_what_was_dropped_between_two_looks() -> None:
    before = {"tap0": {"mac": 3, "address": 5}, "tap1": {"mac": 9}, "tap2": {"dhcp": 2}}
    now = {"tap0": {"mac": 3, "address": 8}, "tap1": {"mac": 4}, "tap3": {"router": 1}}
    assert drops.since(before, now) == {"tap0": {"address": 3}, "tap1": {"mac": 4}, "tap3": {"router": 1}}
    assert drops.since(now, now) == {}
