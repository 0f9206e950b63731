"""The shape of the tables of filters, as commands for nft: pure text.

One base chain of `bridge kvm-ifup` sends the frames of a filtered tap to the chain of its kind, by one verdict map. All
NICs share the chains and rules; what is true of one of them is an element of a set. MACs and addresses stand there
twice: in the words of people, and as numbers in the sets `inner_…`, for what nft has no names for.

What is dropped is counted by NIC and reason: each set `dropped_REASON` has an element for the NIC, with a counter:

    nft list set bridge kvm-ifup dropped_address

A change of a NIC's facts leaves these elements alone, so they count on.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from ipaddress import ip_network

from kvmifup.core.filters import KEPT, REASONS, Facts, said
from kvmifup.core.records import record
from kvmifup.node.filter_rules import BASE, RESERVED, RULES

HERE = "bridge kvm-ifup"
HOOKED = "{ type filter hook prerouting priority -300; policy accept; }"
# A bridge also learns from frames to reserved addresses (STP, LLDP), which it does not show to its own hooks
# (`__br_handle_local_finish`): so there is one more chain for each NIC, on the tap itself, with one rule.
GUARD = "netdev kvm-ifup"
GUARD_PRIORITY = -500
GUARDED = f"goto {RESERVED}"
CHAIN = "nic-"  # so the name of the chain on a tap begins
INNER = "inner_"  # so the name of a set begins whose keys are numbers for nft


@record
class Shape:
    """A set or a map of *table*: the key in nft's words, its types, how many bytes there are after the tap's name."""

    key: str
    types: tuple[str, ...] = ("ifname",)
    size: int = 0
    more: str = ""  # what else nft is told
    table: str = HERE

    @property
    def what(self) -> str:
        """What nft calls it."""
        return "map" if self.is_map else "set"

    @property
    def is_map(self) -> bool:
        """Whether an element leads to a chain."""
        return self.more.startswith(":")

    @property
    def has_ranges(self) -> bool:
        """Whether an element may be a range."""
        return "interval" in self.more


TAP, RANGES = "type ifname", "flags interval;"
MAC, IP4, IP6 = 6, 4, 16  # bytes
NUMBER = ("ifname", "integer")
# What is known of taps, by their names, which stay when a tap is made anew.
SETS = {
    "guests": Shape(TAP, more=": verdict;"),
    "macs": Shape(f"{TAP} . ether_addr", ("ifname", "ether_addr"), MAC),
    "inner_macs": Shape("typeof iifname . @nh,64,48", NUMBER, MAC),
    "with4": Shape(TAP),
    "with6": Shape(TAP),
    "hosts4": Shape(f"{TAP} . ipv4_addr", ("ifname", "ipv4_addr"), IP4),
    "nets4": Shape(f"{TAP} . ipv4_addr", ("ifname", "ipv4_addr"), IP4, RANGES),
    "hosts6": Shape(f"{TAP} . ipv6_addr", ("ifname", "ipv6_addr"), IP6),
    "nets6": Shape(f"{TAP} . ipv6_addr", ("ifname", "ipv6_addr"), IP6, RANGES),
    "inner_hosts4": Shape("typeof iifname . @nh,128,32", NUMBER, IP4),
    "inner_nets4": Shape("typeof iifname . @nh,128,32", NUMBER, IP4, RANGES),
    "inner_hosts6": Shape("typeof iifname . @th,64,128", NUMBER, IP6),
    "inner_nets6": Shape("typeof iifname . @th,64,128", NUMBER, IP6, RANGES),
    **{f"dropped_{reason}": Shape(TAP, more="counter;") for reason in REASONS},
    "port_macs": Shape(f"{TAP} . ether_addr", ("ifname", "ether_addr"), MAC, table=GUARD),
}

Element = tuple[str, str, str]  # the set, what comes after the tap's name ("" for nothing), the chain of a verdict


def chain_of(tap: str) -> str:
    """The name of the chain on *tap*: nft takes letters, digits and a few signs, so other bytes are spelt out."""
    plain = (chr(one) for one in os.fsencode(tap))
    return CHAIN + "".join(
        one if one.isascii() and (one.isalnum() or one in "-._") else f"/{ord(one):02x}" for one in plain
    )


def tap_of(chain: str) -> str:
    """The reverse."""
    plain = re.sub("/([0-9a-f]{2})", lambda byte: chr(int(byte[1], 16)), chain.removeprefix(CHAIN))
    return os.fsdecode(plain.encode("latin-1", "replace"))


def mark(chain: str, rule: str) -> str:
    """The comment by which a rule is known again: nft tells the rule itself in other words than it was given."""
    return f"{zlib.crc32(f'{chain} {rule}'.encode()):08x}"


@cache
def marks(table: str) -> dict[str, tuple[str, ...]]:
    """The comments of the rules in each chain that NICs share."""
    return {chain: tuple(mark(chain, rule) for rule in rules) for chain, rules in RULES[table].items()}


@lru_cache(KEPT)
def guard_marks(tap: str) -> tuple[str, ...]:
    """Those of the chain on the tap itself."""
    return (mark(chain_of(tap), GUARDED),)


def shared_part(*, hooked: bool) -> Iterator[str]:
    """The commands that make all that NICs share; *hooked*: the base chain is there, but not as it is to be."""
    yield from (f"add table {table}" for table in RULES)
    for name, one in SETS.items():
        more = f"{' ' if one.is_map else '; '}{one.more}".rstrip()
        yield f"add {one.what} {one.table} {name} {{ {one.key}{more} }}"
    if hooked:
        yield f"flush chain {HERE} {BASE}"
        yield f"delete chain {HERE} {BASE}"
    for table, chains in RULES.items():
        for chain in chains:
            yield f"add chain {table} {chain} {HOOKED if chain == BASE else ''}".rstrip()
        for chain, rules in chains.items():
            yield f"flush chain {table} {chain}"
            for rule in rules:
                yield f'add rule {table} {chain} {rule} comment "{mark(chain, rule)}"'


@lru_cache(KEPT)
def elements(facts: Facts) -> frozenset[Element]:
    """The elements of a NIC that say *facts*."""
    found = {("guests", "", facts.kind)}
    found |= {(f"dropped_{reason}", "", "") for reason in REASONS}
    # What is for a reserved address is no ARP, RARP or IP: of the kind "address" nobody sends that.
    names = ["macs", "inner_macs"] + ["port_macs"] * (facts.kind == "mac")
    found |= {(name, mac, "") for mac in facts.macs for name in names}
    for prefix in facts.everything:
        kind = "hosts" if prefix.prefixlen == prefix.max_prefixlen else "nets"
        found |= {(name, said(prefix), "") for name in (f"{kind}{prefix.version}", f"{INNER}{kind}{prefix.version}")}
        found.add((f"with{prefix.version}", "", ""))
    return frozenset(found)


def element(verb: str, tap: str, one: Element) -> str:
    """The command that adds or deletes an element."""
    name, key, verdict = one
    if name.startswith(INNER):
        first, last = (f"0x{end.hex()}" for end in ends(name, key))
        key = first if first == last else f"{first}-{last}"
    value = f" : goto {verdict}" if verdict else ""
    return f'{verb} element {SETS[name].table} {name} {{ "{tap}"{f" . {key}" if key else ""}{value} }}'


def ends(name: str, key: str) -> tuple[bytes, bytes]:
    """The first and the last of what a *key* of the set *name* says after the tap's name."""
    if SETS[name].size == MAC:
        raw = bytes.fromhex(key.replace(":", ""))
        return raw, raw
    first, _, last = key.partition("-")  # a prefix, or what somebody else has put there
    return ip_network(first).network_address.packed, ip_network(last or first).broadcast_address.packed


def guard(tap: str, *, there: bool) -> Iterator[str]:
    """The commands that make the chain on the tap itself; *there*: it is there, but not as it is to be."""
    chain = chain_of(tap)
    if there:
        yield from no_guard(tap)
    hook = f'type filter hook ingress device "{tap}" priority {GUARD_PRIORITY}; policy accept;'
    yield f"add chain {GUARD} {chain} {{ {hook} }}"
    yield f'add rule {GUARD} {chain} {GUARDED} comment "{guard_marks(tap)[0]}"'


def no_guard(tap: str) -> Iterator[str]:
    """The commands that remove it."""
    yield f"flush chain {GUARD} {chain_of(tap)}"
    yield f"delete chain {GUARD} {chain_of(tap)}"
