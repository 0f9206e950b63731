"""Hypothesis strategies for the data that flows between the modules."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from hypothesis import strategies as st

from kvmifup.core.model import (
    Bridge,
    BridgedConfig,
    Config,
    LinkConfig,
    Nic,
    NodeFacts,
    Phase,
    Prefix,
    RoutedConfig,
    Tap,
    Uplink,
)
from kvmifup.core.ops import (
    KINDS,
    PORT_OPTIONS,
    Address,
    AddrGenMode,
    Filter,
    LinkAddress,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Neighbour,
    Op,
    OvsPort,
    PortOption,
    Program,
    ProxyNeighbour,
    Rate,
    Route,
    Rule,
    Sources,
    Sysctl,
    UplinkGuard,
    UplinkVlans,
)
from kvmifup.core.vlans import NONE
from kvmifup.runs.journal import Entry, Journal

from .samples import BRIDGE

taps = st.sampled_from(["tap0", "tap0.100", "vnet-12", "täp"])
uplink_names = st.sampled_from(["eth0", "eth1", "bond0.7", "wg0"])
bridge_names = st.sampled_from(["br0", "br.1"])
macs = st.sampled_from(["aa:00:00:35:ac:01", "02:ff:ff:ff:ff:ff", "52:54:00:00:00:00"])


def _net4(bits: int, length: int) -> Prefix:
    return ipaddress.ip_network((0xC6120000 + bits, length), strict=False)  # in 198.18.0.0/15


def _net6(bits: int, length: int) -> Prefix:
    return ipaddress.ip_network(((0x20010DB8 << 96) + bits, length), strict=False)


prefixes = st.one_of(
    st.builds(_net4, st.integers(1, 4000), st.just(32)),
    st.builds(_net4, st.integers(0, 4000), st.integers(20, 31)),
    st.builds(_net6, st.integers(1, 2**64), st.just(128)),
    st.builds(_net6, st.integers(1, 2**64), st.integers(48, 127)),
)
prefix_lists = st.lists(prefixes, min_size=1, max_size=4, unique=True).map(tuple)

limits = st.sampled_from(
    [None, (("to_guest", "100mbit"),), (("to_guest", "off"), ("from_guest", "8kbit"), ("from_guest_burst", "2000b"))]
)

routed_nics = st.builds(
    Nic,
    tap=taps,
    mac=macs,
    mode=st.just("routed"),
    link=st.sampled_from([None, "100", "guests"]),
    ip=prefix_lists,
    incoming=st.booleans(),
    instance=st.sampled_from([None, "web1.example.com"]),
    index=st.sampled_from([None, 0, 3]),
    to_ask=st.booleans(),
    rate=limits,
)
plain_bridged_nics = st.builds(
    Nic,
    tap=taps,
    mac=macs,
    mode=st.just("bridged"),
    link=bridge_names,
    ip=st.just(()),
    incoming=st.booleans(),
    rate=limits,
)
said = st.sampled_from([None, True, False])
options = st.fixed_dictionaries(dict.fromkeys(PORT_OPTIONS, said))
bridged_nics = st.builds(lambda nic, more: replace(nic, **more), plain_bridged_nics, options)
ovs_nics = plain_bridged_nics.flatmap(
    lambda nic: st.builds(
        replace,
        st.just(nic),
        mode=st.just("openvswitch"),
        vlan=st.sampled_from([None, ".100", ":300:20", ".5:7"]),
        iface_id=st.sampled_from([None, "web1-0"]),
    )
)
ext_nics = routed_nics.map(
    lambda nic: replace(nic, mode="ext", link="site", given=(("TAGS", "a b"),) if nic.incoming else ())
)
good_nics = st.one_of(routed_nics, routed_nics, bridged_nics, ovs_nics, ext_nics)
nics = st.one_of(
    good_nics,
    bridged_nics.map(lambda nic: replace(nic, vlan=".100")),
)

configs = st.builds(
    Config,
    bridged=st.builds(BridgedConfig, st.sampled_from([0.0, 5.0, 40.0]), isolated=said, learning=said, rate=limits),
    link=st.builds(lambda **keys: (("br0", LinkConfig(**keys)),), hairpin=said, multicast_router=said),
    routed=st.builds(
        RoutedConfig,
        rule_priority=st.integers(1, 32765),
        rp_filter=st.sampled_from([None, "strict", "loose", "off", "keep"]),
    ),
)

protocols = st.sampled_from([0, 3, 4])


def rules(tap: str) -> st.SearchStrategy[tuple[Rule, ...]]:
    """Policy rules that name *tap*: of an earlier guest, of other scripts, and possibly just the one wanted."""
    one = st.builds(
        Rule,
        family=st.sampled_from([4, 6]),
        iif=st.just(tap),
        table=st.sampled_from([100, 254, 7]),
        priority=st.sampled_from([10000, 5, 32765]),
        protocol=protocols,
        want=st.just(True),
    )
    return st.lists(one, max_size=3, unique_by=lambda rule: rule.key).map(tuple)


def uplinks(*, ready: bool) -> st.SearchStrategy[tuple[Uplink, ...]]:
    """Uplinks, one per name and family; *ready* for guests, or in any state."""
    state = st.just(True) if ready else st.sampled_from([True, True, True, False])
    one = st.builds(
        Uplink,
        name=uplink_names,
        family=st.sampled_from([4, 6]),
        present=state,
        up=state,
        arp=st.booleans(),
        mend=st.just(()) if ready else st.sampled_from([(), (), ("net.ipv4.ip_forward=1",)]),
        source=st.sampled_from([None, "fe80::1"]),
    )
    return st.lists(one, max_size=4, unique_by=lambda u: (u.name, u.family)).map(tuple)


def bridges(*, ready: bool) -> st.SearchStrategy[Bridge | None]:
    """A bridge, *ready* for a port, or in any state."""
    good: st.SearchStrategy[Bridge | None] = st.builds(
        replace, st.just(BRIDGE), mtu=st.sampled_from([1500, 9000]), adopts=st.booleans(), snoops=st.booleans()
    )
    if ready:
        return good
    bad = {"is_bridge": st.booleans(), "up": st.booleans(), "stp": st.booleans()}
    return st.none() | good | st.builds(replace, st.just(BRIDGE), **bad)


@st.composite
def cases(draw: st.DrawFn, *, ready: bool) -> tuple[Nic, Config, NodeFacts]:
    """A NIC, a configuration and a node: one that can take the NIC when *ready*, else perhaps."""
    nic = draw(good_nics if ready else nics)
    config = draw(configs)
    v6_only_if_there = any(prefix.version == 6 for prefix in nic.ip) and ready
    facts = NodeFacts(
        tap=Tap(7, True) if ready else draw(st.sampled_from([Tap(7, True)] * 5 + [Tap(7, False), None])),
        bridge=draw(bridges(ready=ready)) if nic.mode in ("bridged", "openvswitch") else None,
        program="/ext/site" if nic.mode == "ext" else None,
        table=draw(st.sampled_from([100, 254] if ready else [100, 254, 254, None])),
        rules=draw(rules(nic.tap)),
        uplinks=draw(uplinks(ready=ready)) if nic.mode == "routed" else (),
        taken=() if ready else draw(st.sampled_from([(), (), (), (("198.18.0.1/32", "is taken"),)])),
        filtered=draw(st.booleans()),
        judged=draw(st.booleans()),
        ipv6=v6_only_if_there or draw(st.booleans()),
        ipv6_mend=() if ready else draw(st.sampled_from([(), (), ("net.ipv6.conf.tap0.disable_ipv6=0",)])),
    )
    return nic, config, facts


vlan_sets = st.sampled_from([NONE, ":100", ":100-102:200", ":1-4094"])

# --- journals -----------------------------------------------------------------------------------------

_words = st.text(max_size=8)
_fields: dict[type[Op], st.SearchStrategy[Op]] = {
    LinkAddress: st.builds(LinkAddress, taps, macs),
    AddrGenMode: st.builds(AddrGenMode, taps, st.integers(0, 3)),
    Address: st.builds(Address, taps, prefixes.map(lambda p: f"{p.network_address}/{p.prefixlen}"), st.booleans()),
    LinkMtu: st.builds(LinkMtu, taps, st.integers(68, 65535)),
    LinkMaster: st.builds(LinkMaster, taps, st.none() | bridge_names | st.just("br0 .100:200-299")),
    UplinkVlans: st.builds(UplinkVlans, bridge_names, uplink_names, vlan_sets, vlan_sets),
    Filter: st.builds(Filter, taps, st.none() | st.just("address aa:00:00:35:ac:01 192.0.2.8")),
    LinkUp: st.builds(LinkUp, taps, st.booleans()),
    Sysctl: st.builds(
        Sysctl,
        st.sampled_from([4, 6]),
        st.sampled_from(["conf", "neigh"]),
        taps | uplink_names,
        _words,
        st.booleans(),
        _words,
    ),
    Rule: st.builds(
        Rule, st.sampled_from([4, 6]), taps, st.integers(1, 2**32 - 1), st.integers(0, 32765), protocols, st.booleans()
    ),
    Neighbour: st.builds(Neighbour, taps, prefixes.map(lambda p: str(p.network_address)), st.none() | macs),
    Route: st.builds(Route, prefixes.map(str), taps, st.integers(1, 2**32 - 1), st.booleans()),
    PortOption: st.builds(PortOption, taps, st.sampled_from(list(PORT_OPTIONS)), st.sampled_from([None, 0, 1])),
    Rate: st.builds(
        Rate, taps, st.sampled_from(["to_guest", "from_guest"]), st.sampled_from([None, "1mbit burst 128kb", "htb 1:"])
    ),
    OvsPort: st.builds(OvsPort, taps, st.none() | _words),
    Program: st.builds(
        Program,
        _words,
        st.sampled_from(["pre", "post"]),
        st.lists(st.tuples(_words, _words), max_size=2).map(tuple),
        st.floats(0, 3600),
        st.booleans(),
    ),
    Sources: st.builds(Sources, taps, st.none() | st.just("strict 2001:db8::1 2001:db8:1::/64") | st.just("loose")),
    UplinkGuard: st.builds(UplinkGuard, uplink_names, prefixes.map(str), st.booleans()),
    ProxyNeighbour: st.builds(
        ProxyNeighbour, uplink_names, prefixes.map(lambda p: str(p.network_address)), st.booleans()
    ),
}
# Only what can be undone is journalled; a new kind must come with a strategy.
journalled_ops = st.one_of([_fields[cls] for cls in KINDS.values() if cls.undoable])


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """An op and an earlier value of the same kind."""
    op, other = draw(journalled_ops), draw(journalled_ops)
    return Entry(op, other.wanted if type(other) is type(op) else op.wanted)


journals = st.builds(
    Journal,
    nic=nics,
    ifindex=st.integers(1, 2**31 - 1),
    phase=st.sampled_from(Phase),
    entries=st.lists(entries(), max_size=4).map(tuple),
    pending=st.lists(entries(), max_size=4).map(tuple),
    since=st.floats(0, 4e9),
    by=st.sampled_from(["", "hook", "person", "agent"]),
    reason=st.none() | st.just("RARP"),
    namespace=st.integers(1, 2**32 - 1),
)
