"""From where guests may send, as commands for nft: all that `kvmifup.node.sources` writes."""

from __future__ import annotations

from collections.abc import Iterator

from kvmifup.core.ops import Sources, UplinkGuard, Value
from kvmifup.node.nft import TABLE
from kvmifup.node.source_rules import ADDRESSES, DROPPED, GUESTS, NETWORKS, PREFIXES, SOURCES
from kvmifup.node.sources import LONGEST, NOTHING

HERE = f"inet {TABLE}"
PAIR = "type ifname . {}_addr;"
SETS = {
    DROPPED: "type ifname;counter;",
    ADDRESSES: PAIR.format("ipv6"),
    PREFIXES: PAIR.format("ipv6") + "flags interval;",
    **{name: PAIR.format(f"ipv{version}") + "counter;" for version, name in GUESTS.items()},
    **{name: PAIR.format(f"ipv{version}") + "flags interval;counter;" for version, name in NETWORKS.items()},
}
RULES = {
    "prerouting": (
        *(f"iifname . ip saddr @{names[4]} drop" for names in (GUESTS, NETWORKS)),
        *(f"iifname . ip6 saddr @{names[6]} drop" for names in (GUESTS, NETWORKS)),
        f"meta nfproto ipv6 iifname vmap @{SOURCES}",
    ),
    "own": (
        "ip6 saddr fe80::/10 accept",
        "ip6 saddr :: accept",
        *(f"iifname . ip6 saddr @{name} accept" for name in (ADDRESSES, PREFIXES)),
    ),
    **{
        chain: ("jump own", f"fib saddr{where} oif exists accept", f"iifname @{DROPPED} drop", "drop")
        for chain, where in (("strict", " . iif"), ("loose", ""))
    },
}


def commands(op: Sources | UplinkGuard, now: Value) -> tuple[list[str], list[str]]:
    """What nft(8) is to be told to make *op* true, if the value there is *now*: what NICs share; what is its own."""
    made = [] if op.want in (None, False) else [*shared()]
    return made, [*(of_guest(op, now) if isinstance(op, Sources) else of_uplink(op))]


def shared() -> Iterator[str]:
    """What makes table, sets and rules, or makes them right."""
    yield f"add table {HERE}"
    yield f"add map {HERE} {SOURCES} {{type ifname : verdict;}}"
    yield from (f"add set {HERE} {name} {{{kind}}}" for name, kind in SETS.items())
    yield f"add chain {HERE} prerouting {{type filter hook prerouting priority -300;}}"
    yield from (f"add chain {HERE} {chain}" for chain in RULES)
    yield from (f"flush chain {HERE} {chain}" for chain in RULES)
    yield from (f"add rule {HERE} {chain} {rule}" for chain, rules in RULES.items() for rule in rules)


def of_guest(op: Sources, now: Value) -> Iterator[str]:
    """What is of one guest."""
    _, *having = str(now).split() if now else [""]
    chain, *wanted = op.want.split() if op.want else [""]
    yield from (element("add", ADDRESSES, PREFIXES, op.dev, one) for one in wanted if one not in having)
    if now:
        yield f'delete element {HERE} {SOURCES} {{ "{op.dev}" }}'
    if op.want:
        said = " ".join(wanted) or NOTHING
        comment = f' comment "{said}"' if len(said) <= LONGEST else ""
        yield f'add element {HERE} {SOURCES} {{ "{op.dev}"{comment} : goto {chain} }}'
    yield from (element("delete", ADDRESSES, PREFIXES, op.dev, one) for one in having if one not in wanted)
    yield f'{"add" if op.want else "delete"} element {HERE} {DROPPED} {{ "{op.dev}" }}'


def of_uplink(op: UplinkGuard) -> Iterator[str]:
    """What is of one guest on one uplink."""
    family = 6 if ":" in op.prefix else 4
    yield element("add" if op.want else "delete", GUESTS[family], NETWORKS[family], op.dev, op.prefix)


def element(verb: str, single: str, wide: str, dev: str, prefix: str) -> str:
    """One address or prefix, in the set for it."""
    return f'{verb} element {HERE} {wide if "/" in prefix else single} {{ "{dev}" . {prefix} }}'
