"""Plans: golden ones as data, properties over generated NICs and nodes, and every refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings

from kvmifup import phases
from kvmifup.core import ovsport
from kvmifup.core.errors import NotReadyError
from kvmifup.core.model import BridgedConfig, Config, LinkConfig, Nic, NodeFacts, Phase, RoutedConfig, Tap
from kvmifup.core.ops import (
    RTPROT_STATIC,
    Announce,
    Filter,
    Neighbour,
    Op,
    OvsPort,
    Program,
    ProxyNeighbour,
    Route,
    Rule,
    Sources,
    UplinkGuard,
)

from .samples import (
    BRIDGE,
    BRIDGED,
    CONFIG,
    DUAL,
    ETH0_4,
    ETH0_6,
    ETH1_4,
    ETH1_6,
    EXT,
    FACTS_BRIDGED,
    FACTS_EXT,
    FACTS_ROUTED,
    FILTERING,
    MAC,
    OVS,
    ROUTED,
    ROUTED_6,
    TAP,
    nets,
)
from .strategies import cases

GOLDEN = Path(__file__).with_name("golden")


class Scenario(NamedTuple):
    nic: Nic
    facts: NodeFacts
    config: Config = CONFIG


FACTS_FILTERING = replace(FACTS_BRIDGED, bridge=FILTERING)
LEFTOVERS = (
    Rule(4, "tap0", 200, 10000, RTPROT_STATIC, True),  # a dead NIC's, or its table was another one
    Rule(6, "tap0", 100, 0, 3, True),  # made by a shell script with `ip rule add`
    Rule(4, "tap0", 100, 10000, RTPROT_STATIC, True),  # just the one that is wanted
)
SEVERAL = nets("192.0.2.8", "192.0.2.9", "198.51.100.0/29", "2001:db8::8", "2001:db8:1::/64")

SCENARIOS = {
    "bridged": Scenario(BRIDGED, FACTS_BRIDGED),
    "bridged-bare": Scenario(BRIDGED, replace(FACTS_BRIDGED, bridge=replace(BRIDGE, adopts=True))),
    "bridged-no-ipv6": Scenario(BRIDGED, replace(FACTS_BRIDGED, ipv6=False)),
    "bridged-stale-rules": Scenario(BRIDGED, replace(FACTS_BRIDGED, rules=LEFTOVERS)),
    "bridged-vlan": Scenario(replace(BRIDGED, vlan=".100"), FACTS_FILTERING),
    "bridged-trunk": Scenario(replace(BRIDGED, vlan=":300:100-199"), FACTS_FILTERING),
    "bridged-hybrid": Scenario(replace(BRIDGED, vlan=".1:100"), FACTS_FILTERING),
    "bridged-all-vlans": Scenario(replace(BRIDGED, vlan=":1-4094"), FACTS_FILTERING),
    "bridged-vlan-no-uplink": Scenario(
        replace(BRIDGED, vlan=".100"), replace(FACTS_FILTERING, bridge=replace(FILTERING, trunks=()))
    ),
    "bridged-filtering-no-vlan": Scenario(BRIDGED, FACTS_FILTERING),
    "bridged-vlan-taken-away": Scenario(BRIDGED, replace(FACTS_FILTERING, bridge=replace(FILTERING, keeps=True))),
    "bridged-snooping": Scenario(BRIDGED, replace(FACTS_BRIDGED, bridge=replace(BRIDGE, snoops=True))),
    "bridged-options": Scenario(
        replace(BRIDGED, isolated=True, hairpin=False),
        replace(FACTS_BRIDGED, bridge=replace(BRIDGE, snoops=True)),
        Config(
            bridged=BridgedConfig(hairpin=True, learning=False, multicast_router=True),
            link=(("br0", LinkConfig(isolated=False, multicast_router=False)), ("br1", LinkConfig(learning=True))),
        ),
    ),
    "bridged-filter-mac": Scenario(
        replace(BRIDGED, filter="mac"),
        FACTS_BRIDGED,
        Config(link=(("br0", LinkConfig(filter="address", allow_mac=("02:00:00:00:00:0b",))),)),
    ),
    "bridged-filter-address": Scenario(
        replace(BRIDGED, ip=SEVERAL), FACTS_BRIDGED, Config(bridged=BridgedConfig(filter="address"))
    ),
    "bridged-limits": Scenario(
        replace(BRIDGED, rate=(("to_guest", "100mbit"),)),
        FACTS_BRIDGED,
        Config(
            bridged=BridgedConfig(rate=(("to_guest", "1mbit"), ("from_guest", "1gbit"), ("from_guest_burst", "2mb")))
        ),
    ),
    "openvswitch-limits": Scenario(replace(OVS, rate=(("to_guest", "1mbit"), ("from_guest", "1mbit"))), FACTS_BRIDGED),
    "routed-limits": Scenario(
        replace(ROUTED, link="100", rate=(("from_guest", "off"),)),
        replace(FACTS_ROUTED, table=100, uplinks=(ETH0_4,)),
        Config(link=(("100", LinkConfig(rate=(("to_guest", "8kbit"), ("from_guest", "1mbit")))),)),
    ),
    "openvswitch": Scenario(replace(OVS, vlan=None), FACTS_BRIDGED),
    "openvswitch-vlans": Scenario(OVS, FACTS_BRIDGED),
    "ext": Scenario(EXT, FACTS_EXT),
    "routed-v4": Scenario(ROUTED, replace(FACTS_ROUTED, uplinks=(ETH0_4,))),
    "routed-v6": Scenario(ROUTED_6, replace(FACTS_ROUTED, uplinks=(ETH0_6,))),
    "routed-v6-no-link-local": Scenario(ROUTED_6, replace(FACTS_ROUTED, uplinks=(replace(ETH0_6, source=None),))),
    "routed-dual": Scenario(DUAL, FACTS_ROUTED),
    "routed-several": Scenario(replace(ROUTED, ip=SEVERAL), FACTS_ROUTED),
    "routed-table": Scenario(replace(DUAL, link="guests"), replace(FACTS_ROUTED, table=100)),
    "routed-no-ipv6": Scenario(
        replace(ROUTED, link="100"), replace(FACTS_ROUTED, table=100, uplinks=(ETH0_4,), ipv6=False)
    ),
    "routed-two-uplinks": Scenario(DUAL, replace(FACTS_ROUTED, uplinks=(ETH0_4, ETH1_4, ETH0_6, ETH1_6))),
    "routed-point-to-point": Scenario(DUAL, replace(FACTS_ROUTED, uplinks=(replace(ETH0_4, arp=False), ETH0_6))),
    "routed-no-uplink": Scenario(DUAL, replace(FACTS_ROUTED, uplinks=())),
    "routed-gateways": Scenario(
        DUAL,
        replace(
            FACTS_ROUTED,
            uplinks=(
                replace(ETH0_4, gateways=("192.0.2.1",)),
                ETH1_4,
                replace(ETH0_6, gateways=("fe80::2", "2001:db8::1")),
            ),
        ),
    ),
    "routed-prefix-only": Scenario(replace(ROUTED, ip=nets("198.51.100.0/29")), FACTS_ROUTED),
    "routed-stale-rules": Scenario(replace(ROUTED, link="100"), replace(FACTS_ROUTED, table=100, rules=LEFTOVERS)),
    "routed-settings": Scenario(
        replace(ROUTED, link="100"),
        replace(FACTS_ROUTED, table=100),
        Config(routed=RoutedConfig(rule_priority=77, rp_filter="keep")),
    ),
}


def run(asked: Phase, nic: Nic, config: Config, facts: NodeFacts, *, announce: bool = False) -> tuple[Op, ...]:
    """The plan for the phase that a hook asks for."""
    return phases.plan(phases.effective(asked, nic), nic, config, facts, announce=announce)


def as_text(plan: Sequence[Op]) -> str:
    return "".join(f"{op.describe()}\n    {op!r}\n" for op in plan)


def rendered(scenario: Scenario) -> str:
    """The plans of *scenario*, equal ones under one heading: each op as `--plan` describes it, then in full."""
    nic, facts, config = scenario
    incoming = replace(nic, incoming=True)
    headings: dict[str, list[str]] = {}
    for heading, asked, one in (
        ("pre, incoming", Phase.PRE, incoming),
        ("pre, not incoming", Phase.PRE, nic),
        ("post", Phase.POST, incoming),
    ):
        headings.setdefault(as_text(run(asked, one, config, facts)), []).append(heading)
    return "".join(f"== {'; '.join(names)}\n{plan}" for plan, names in headings.items())


@pytest.mark.parametrize("name", SCENARIOS)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.txt"
    found = rendered(SCENARIOS[name])
    if request.config.getoption("--regenerate-golden"):
        path.write_text(found, encoding="utf-8")
        pytest.fail(f"wrote {path.name}: read the diff, then run without --regenerate-golden")
    assert found == path.read_text(encoding="utf-8")


def test_every_golden_file_has_a_scenario() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.txt" for name in SCENARIOS}


# --- properties ---------------------------------------------------------------------------------------


few = settings(max_examples=25)  # each example is a whole node, and every run of the suite makes new ones


def is_subsequence(part: Sequence[Op], whole: Sequence[Op]) -> bool:
    remaining = iter(whole)
    return all(any(op == other for other in remaining) for op in part)


@few
@given(cases(ready=True))
def test_pre_is_a_part_of_post(case: tuple[Nic, Config, NodeFacts]) -> None:
    assert is_subsequence(phases.plan(Phase.PRE, *case), phases.plan(Phase.POST, *case))


@few
@given(cases(ready=True))
def test_pre_installs_no_route_no_proxy_entry_and_no_announcement(case: tuple[Nic, Config, NodeFacts]) -> None:
    nic, config, facts = case
    plan = run(Phase.PRE, replace(nic, incoming=True), config, facts)
    assert not [op for op in plan if isinstance(op, Route | ProxyNeighbour | Announce)]
    assert not [op for op in plan if isinstance(op, Program) and op.phase != "pre"]
    on_uplinks = [op for op in plan if getattr(op, "dev", None) in {uplink.name for uplink in facts.uplinks}]
    # These draw nothing here: the node answers for those that have a proxy neighbour.
    assert {(op.kind, getattr(op, "name", None)) for op in on_uplinks} <= {
        ("sysctl", "proxy_delay"),
        ("sysctl", "proxy_ndp"),
    }


@few
@given(cases(ready=True))
def test_pre_for_a_nic_that_is_not_incoming_is_post(case: tuple[Nic, Config, NodeFacts]) -> None:
    nic, config, facts = case
    at_home = replace(nic, incoming=False)
    assert run(Phase.PRE, at_home, config, facts) == run(Phase.POST, nic, config, facts)


def refusal(asked: Phase, case: tuple[Nic, Config, NodeFacts]) -> tuple[str, str, int] | None:
    nic, config, facts = case
    try:
        run(asked, replace(nic, incoming=True), config, facts)
    except NotReadyError as error:
        return str(error), error.hint, error.code
    return None


@few
@given(cases(ready=False))
def test_pre_refuses_whatever_post_would(case: tuple[Nic, Config, NodeFacts]) -> None:
    assert refusal(Phase.PRE, case) == refusal(Phase.POST, case)


@few
@given(cases(ready=True))
def test_the_announcement_comes_last(case: tuple[Nic, Config, NodeFacts]) -> None:
    plan = phases.plan(Phase.POST, *case, announce=True)
    announcements = [number for number, op in enumerate(plan) if isinstance(op, Announce)]
    assert announcements in ([], [len(plan) - 1])
    if announcements:
        last = plan[-1]
        assert isinstance(last, Announce)
        assert last.force
        # It says nothing that is not true by then.
        proxied = {(op.dev, op.address) for op in plan if isinstance(op, ProxyNeighbour)}
        assert {(dev, address) for dev, address, _ in last.messages} == proxied
        routes = {op.prefix.partition("/")[0] for op in plan if isinstance(op, Route)}
        assert {address for _, address in proxied} <= routes


@few
@given(cases(ready=True))
def test_every_address_and_prefix_gets_its_route(case: tuple[Nic, Config, NodeFacts]) -> None:
    nic, _, facts = case
    routes = [op for op in phases.plan(Phase.POST, *case) if isinstance(op, Route)]
    wanted = [Route(str(prefix), nic.tap, facts.table or 0, True) for prefix in nic.ip]
    assert routes == (wanted if nic.mode == "routed" else [])


@few
@given(cases(ready=True))
def test_no_two_ops_concern_one_thing(case: tuple[Nic, Config, NodeFacts]) -> None:
    keys = [op.key for op in phases.plan(Phase.POST, *case)]
    assert len(set(keys)) == len(keys)


@few
@given(cases(ready=True))
def test_a_plan_depends_on_nothing_else(case: tuple[Nic, Config, NodeFacts]) -> None:
    nic, config, facts = case
    again = replace(nic), replace(config), replace(facts)
    assert phases.plan(Phase.POST, *case) == phases.plan(Phase.POST, *again)


@few
@given(cases(ready=True))
def test_every_rule_that_names_the_tap_is_wanted_or_removed(case: tuple[Nic, Config, NodeFacts]) -> None:
    facts = case[2]
    for phase in (Phase.PRE, Phase.POST):
        touched = {op.key for op in phases.plan(phase, *case)}
        assert {rule.key for rule in facts.rules} <= touched


# --- refusals -----------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    nic: Nic
    facts: NodeFacts
    names: str  # what the message must mention
    config: Config = CONFIG


def bridge_is(**changes: object) -> NodeFacts:
    return replace(FACTS_BRIDGED, bridge=replace(BRIDGE, **changes))  # type: ignore[arg-type]


def eth0_is(**changes: object) -> NodeFacts:
    return replace(FACTS_ROUTED, uplinks=(replace(ETH0_4, **changes), ETH0_6))  # type: ignore[arg-type]


REFUSALS = {
    "no tap": Refusal(BRIDGED, replace(FACTS_BRIDGED, tap=None), "tap0"),
    "not a tap": Refusal(BRIDGED, replace(FACTS_BRIDGED, tap=Tap(7, False)), "tap0"),
    "no Open vSwitch bridge": Refusal(OVS, replace(FACTS_BRIDGED, bridge=None), "ovs0"),
    "not an Open vSwitch bridge": Refusal(OVS, bridge_is(is_bridge=False), "ovs0"),
    "no bridge": Refusal(BRIDGED, replace(FACTS_BRIDGED, bridge=None), "br0"),
    "not a bridge": Refusal(BRIDGED, bridge_is(is_bridge=False), "br0"),
    "bridge down": Refusal(BRIDGED, bridge_is(up=False), "br0"),
    "slow STP": Refusal(BRIDGED, bridge_is(stp=True, forward_delay=15.0), "30 s"),
    "STP just too slow": Refusal(BRIDGED, bridge_is(stp=True, forward_delay=2.6), "5.2 s"),
    "VLAN": Refusal(replace(BRIDGED, vlan=".100"), FACTS_BRIDGED, ".100"),
    "no table": Refusal(replace(ROUTED, link="guests"), replace(FACTS_ROUTED, table=None), "guests"),
    "taken": Refusal(ROUTED, replace(FACTS_ROUTED, taken=(("192.0.2.8/32", "is x"),)), "192.0.2.8"),
    "no uplink": Refusal(ROUTED, eth0_is(present=False), "eth0"),
    "uplink down": Refusal(ROUTED, eth0_is(up=False), "eth0"),
    "not forwarding": Refusal(ROUTED, eth0_is(mend=("net.x=1",)), "eth0"),
    "no IPv6": Refusal(ROUTED_6, replace(FACTS_ROUTED, ipv6=False), "IPv6"),
    "IPv6 off on the tap": Refusal(ROUTED_6, replace(FACTS_ROUTED, ipv6_mend=("net.y=0",)), "tap0"),
}


@pytest.mark.parametrize("asked", [Phase.PRE, Phase.POST])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, asked: Phase) -> None:
    nic, facts, names, config = REFUSALS[name]
    with pytest.raises(NotReadyError) as caught:
        run(asked, replace(nic, incoming=True), config, facts)
    assert caught.value.code == 69
    assert names in str(caught.value)
    assert caught.value.hint


def test_what_is_to_be_mended_is_in_the_hint() -> None:
    for facts, nic in ((REFUSALS["not forwarding"].facts, ROUTED), (REFUSALS["IPv6 off on the tap"].facts, ROUTED_6)):
        settings = (*facts.uplinks[0].mend, *facts.ipv6_mend)
        with pytest.raises(NotReadyError) as caught:
            phases.plan(Phase.PRE, nic, CONFIG, facts)
        assert all(f"sysctl -w {setting}" in caught.value.hint for setting in settings)


@pytest.mark.parametrize(
    "facts",
    [
        bridge_is(stp=True, forward_delay=2.5),  # just fast enough for the default of 5 s
        bridge_is(stp=False, forward_delay=30.0),
    ],
)
def test_a_bridge_that_forwards_in_time_is_fine(facts: NodeFacts) -> None:
    assert phases.plan(Phase.PRE, BRIDGED, CONFIG, facts)


def test_the_administrator_may_wait_for_a_slow_bridge() -> None:
    patient = Config(bridged=BridgedConfig(forwarding_timeout=30.0))
    assert phases.plan(Phase.PRE, BRIDGED, patient, bridge_is(stp=True, forward_delay=15.0))


def test_what_concerns_the_other_family_is_no_obstacle() -> None:
    facts = replace(
        FACTS_ROUTED, uplinks=(ETH0_4, replace(ETH0_6, up=False, mend=("net.x=1",))), ipv6_mend=("net.y=0",)
    )
    assert phases.plan(Phase.POST, ROUTED, CONFIG, facts)


@pytest.mark.parametrize(
    ("phase", "nic", "uplinks", "families"),
    [
        (Phase.POST, DUAL, (), ["IPv4", "IPv6"]),
        (Phase.PRE, DUAL, (ETH0_4,), ["IPv6"]),
        (Phase.POST, DUAL, (ETH0_4, ETH0_6), []),
        (Phase.POST, ROUTED, (ETH0_4,), []),
        (Phase.DOWN, DUAL, (), []),
        (Phase.POST, BRIDGED, (), []),
    ],
)
def test_a_missing_uplink_is_remarked_on(phase: Phase, nic: Nic, uplinks: tuple[()], families: list[str]) -> None:
    facts = NodeFacts(TAP, uplinks=uplinks)
    assert [text.split()[1] for text in phases.remarks(phase, nic, CONFIG, facts)] == families
    assert phases.remarks(phase, nic, Config(routed=RoutedConfig(uplinks=())), facts) == ()


@pytest.mark.parametrize(
    ("vlan", "value"),
    [
        (None, "ovs0"),
        (".100", "ovs0 .100"),
        (".0100", "ovs0 .100"),
        (":300:20:100", "ovs0 :20:100:300"),
        (".5:300:020", "ovs0 .5:20:300"),
    ],
)
def test_equal_sets_of_vlans_are_one_value(vlan: str | None, value: str) -> None:
    plan = phases.plan(Phase.PRE, replace(OVS, vlan=vlan), CONFIG, FACTS_BRIDGED)
    (port,) = [ovsport.parsed(op.want or "") for op in plan if isinstance(op, OvsPort)]
    assert f"{port.bridge} {port.vlan}".strip() == value


@pytest.mark.parametrize(
    ("own", "port", "found"),
    [
        (None, None, None),
        ("mine", None, "mine"),
        ("mine", f"ovs0 attached-mac={MAC} iface-id=theirs", "mine"),
        (None, f"ovs0 attached-mac={MAC} iface-id=theirs", "theirs"),
        (None, "ovs0 attached-mac=aa:00:00:35:ac:77 iface-id=theirs", None),
        (None, "ovs0 iface-id=theirs", None),
    ],
)
def test_a_dead_guests_name_in_an_ovn_network_is_not_taken_over(
    own: str | None, port: str | None, found: str | None
) -> None:
    plan = phases.plan(Phase.PRE, replace(OVS, iface_id=own), CONFIG, replace(FACTS_BRIDGED, port=port))
    (wanted,) = [ovsport.parsed(op.want) for op in plan if isinstance(op, OvsPort) and op.want]
    assert wanted.named(ovsport.INTERFACE) == found


# --- without a journal --------------------------------------------------------------------------------


@few
@given(cases(ready=False))
def test_withdrawing_removes_only_what_is_the_nics(case: tuple[Nic, Config, NodeFacts]) -> None:
    nic, _, facts = case
    prefixes = {str(prefix) for prefix in nic.ip}
    taken = {address for address, _ in facts.taken}
    for op in phases.withdrawal(nic, facts):
        assert not op.wanted
        match op:
            case Rule():
                assert op.iif == nic.tap
            case Neighbour() | Sources() | Filter():
                assert op.dev == nic.tap
            case UplinkGuard():
                assert str(ip_network(op.prefix)) in prefixes - taken
            case Route():
                assert op.dev == nic.tap
                assert op.prefix in prefixes
            case ProxyNeighbour():
                assert {f"{op.address}/32", f"{op.address}/128"} & (prefixes - taken)
            case _:
                pytest.fail(f"{op!r} may serve others as well")


@few
@given(cases(ready=True))
def test_withdrawing_removes_all_that_draws_traffic(case: tuple[Nic, Config, NodeFacts]) -> None:
    nic, config, facts = case
    drawing = [op for op in phases.plan(Phase.POST, nic, config, facts) if phases.only_here(op)]
    withdrawn = {op.key for op in phases.withdrawal(nic, facts)}
    assert {op.key for op in drawing} | {rule.key for rule in facts.rules} <= withdrawn
