"""The shape of the table `bridge kvm-ifup`, as commands for nft: pure text.

One base chain sends the frames of a filtered tap to the chain of its kind, by one verdict map. All NICs share the
chains; what is true of one of them is an element of a set. Only what nft 1.0.6 cannot put into a typed set (it has no
names for what is inside RARP and neighbour discovery) stands in a small chain of the NIC.

What is dropped is counted by NIC and reason: each set `dropped_REASON` has an element for the NIC, with a counter:

    nft list set bridge kvm-ifup dropped_address

A change of a NIC's facts leaves these elements alone, so they count on.

A chain of a shared kind ends with a drop, so what a test cannot read (a frame that is too short, a header that makes no
sense) is dropped. A test for something that is to be dropped comes before that for the sake of its reason.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

from kvmifup.core.filters import KEPT, REASONS, Facts, said

HERE = "bridge kvm-ifup"
BASE = "prerouting"
HOOKED = "{ type filter hook prerouting priority -300; policy accept; }"

# What is known of taps, by their names, which stay when a tap is made anew.
TYPES = {
    "guests": ("map", "type ifname : verdict;"),
    "own": ("map", "type ifname : verdict;"),
    "macs": ("set", "type ifname . ether_addr;"),
    "with4": ("set", "type ifname;"),
    "with6": ("set", "type ifname;"),
    "hosts4": ("set", "type ifname . ipv4_addr;"),
    "nets4": ("set", "type ifname . ipv4_addr; flags interval;"),
    "hosts6": ("set", "type ifname . ipv6_addr;"),
    "nets6": ("set", "type ifname . ipv6_addr; flags interval;"),
    **{f"dropped_{reason}": ("set", "type ifname; counter;") for reason in REASONS},
}
# An authentication header before what could be neighbour discovery: its receivers know it as any other header.
SEALED = "meta l4proto ah ah nexthdr { 0, 43, 44, 58, 60 }"
RARP = "meta protocol 0x8035"  # nft has no name for it
# `>= 0` is true of whatever can be read. A later fragment has no header of its own to read; one that is the first has.
_SHARED: dict[str, tuple[str, ...]] = {
    BASE: ("iifname vmap @guests",),
    # --- kind "mac": the MACs, outside and inside, and nothing else
    "mac": (
        "iifname . ether saddr != @macs goto drop_mac",
        "meta protocol arp goto mac_arp",
        f"{RARP} iifname vmap @own",
        f"{RARP} goto drop_mac",
        "meta protocol ip6 goto mac_six",
        # A second tag, or one from before there was a standard: nobody here looks behind those.
        "meta protocol { 8021q, 8021ad, 0x9100, 0x9200, 0x9300 } goto drop_protocol",
        # ARP in an LLC frame (RFC 1042): some systems take it.
        "meta protocol 4 @nh,0,48 0xaaaa03000000 goto drop_protocol",
        "meta protocol 4 @nh,0,48 0xaaaa030000f8 goto drop_protocol",
        "accept",
    ),
    "mac_arp": (
        "@nh,0,48 != 0x000108000604 goto drop_protocol",
        "meta protocol arp iifname . arp saddr ether @macs accept",
        "goto drop_mac",
    ),
    "mac_six": (
        "meta l4proto != 255 goto mac_six_known",
        "goto drop_protocol",
    ),
    "mac_six_known": (
        f"{SEALED} goto drop_protocol",
        "meta l4proto != icmpv6 accept",
        "meta protocol ip6 icmpv6 type { 133, 134, 135, 136, 137 } goto discovery",
        "meta protocol ip6 icmpv6 type >= 0 accept",
        "frag frag-off != 0 accept",
        "goto drop_protocol",
    ),
    # --- kind "address": that, and the addresses
    "address": (
        "iifname . ether saddr != @macs goto drop_mac",
        "meta protocol ip iifname @with4 goto four",
        "meta protocol ip6 iifname @with6 goto six",
        "meta protocol arp iifname @with4 goto address_arp",
        f"{RARP} iifname vmap @own",
        f"{RARP} goto drop_mac",
        "meta protocol { ip, ip6, arp } goto drop_address",
        "goto drop_protocol",
    ),
    "address_arp": (
        "@nh,0,48 != 0x000108000604 goto drop_protocol",
        "meta protocol arp iifname . arp saddr ether != @macs goto drop_mac",
        "meta protocol arp iifname . arp saddr ip @hosts4 accept",
        "meta protocol arp iifname . arp saddr ip @nets4 accept",
        # A probe. One for another's address would have that guest give it up.
        "meta protocol arp arp saddr ip 0.0.0.0 iifname . arp daddr ip @hosts4 accept",
        "meta protocol arp arp saddr ip 0.0.0.0 iifname . arp daddr ip @nets4 accept",
        "goto drop_address",
    ),
    "four": (
        "meta l4proto != 255 goto four_known",
        "goto drop_protocol",
    ),
    "four_known": (
        "meta l4proto udp goto four_udp",
        "meta l4proto icmp goto four_icmp",
        "goto four_source",
    ),
    "four_udp": (
        # First: kernels read ports in a later fragment of IPv4, too, where there are none.
        "ip frag-off & 0x1fff != 0 goto four_source",
        "udp sport 67 goto drop_dhcp",
        "udp dport 68 goto drop_dhcp",
        "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept",
        "udp length >= 0 goto four_source",
        "goto drop_protocol",
    ),
    "four_icmp": (
        "ip frag-off & 0x1fff != 0 goto four_source",
        "icmp type { redirect, router-advertisement } goto drop_router",
        "icmp type >= 0 goto four_source",
        "goto drop_protocol",
    ),
    "four_source": (
        "iifname . ip saddr @hosts4 accept",
        "iifname . ip saddr @nets4 accept",
        "goto drop_address",
    ),
    "six": (
        "meta l4proto != 255 goto six_known",
        "goto drop_protocol",
    ),
    "six_known": (
        "meta l4proto udp goto six_udp",
        "meta l4proto icmpv6 goto six_icmp",
        f"{SEALED} goto drop_protocol",
        "goto six_source",
    ),
    "six_udp": (
        "udp sport 547 goto drop_dhcp",
        "udp dport 546 goto drop_dhcp",
        "udp length >= 0 goto six_source",
        "frag frag-off != 0 goto six_source",
        "goto drop_protocol",
    ),
    "six_icmp": (
        "meta protocol ip6 icmpv6 type { 134, 137 } goto drop_router",
        "meta protocol ip6 icmpv6 type { 133, 135, 136 } goto discovery",
        "ip6 saddr :: icmpv6 type { 131, 132, 143 } accept",
        "meta protocol ip6 icmpv6 type >= 0 goto six_source",
        "frag frag-off != 0 goto six_source",
        "goto drop_protocol",
    ),
    "six_source": (
        "iifname . ip6 saddr @hosts6 accept",
        "iifname . ip6 saddr @nets6 accept",
        "goto drop_address",
    ),
    # Where neighbour discovery goes whose content is right. Who has no address yet asks from `::`.
    "asking": (
        "ip6 saddr :: accept",
        "goto six_source",
    ),
    # --- both kinds: neighbour discovery, whose content the chain of the NIC knows
    "discovery": (
        "ip6 nexthdr != icmpv6 goto drop_protocol",
        "iifname vmap @own",
        "goto drop_mac",
    ),
    **{f"drop_{reason}": (f"iifname @dropped_{reason} drop", "drop") for reason in REASONS},
}

# What a chain is about. nft by itself puts a test of the frame's own type before one of a header, which sees the tag of
# a VLAN there.
ABOUT = {
    "mac_arp": "arp",
    "address_arp": "arp",
    "four": "ip",
    "six": "ip6",
    "mac_six": "ip6",
    "asking": "ip6",
    "discovery": "ip6",
}


def about(chain: str, rule: str) -> str:
    """*rule*, with a test of the protocol, which sees through VLAN tags."""
    protocol = next((ABOUT[one] for one in ABOUT if chain == one or chain.startswith(f"{one}_")), None)
    plain = rule.split(" ")[0] in ("goto", "drop", "accept")
    return rule if plain or protocol is None else f"meta protocol {protocol} {rule}"


SHARED = {chain: tuple(about(chain, rule) for rule in rules) for chain, rules in _SHARED.items()}

# A bridge also learns from frames to reserved addresses (STP, LLDP), which it does not show to its own hooks
# (`__br_handle_local_finish`): so there is one more chain for each NIC, on the tap itself.
GUARD = "netdev kvm-ifup"
GUARD_PRIORITY = -500

Element = tuple[str, str, str]  # the set, what comes after the tap's name ("" for nothing), the chain of a verdict


def chain_of(tap: str) -> str:
    """The name of the small chain of *tap*: nft takes letters, digits and a few signs, so other bytes are spelt out."""
    plain = (chr(one) for one in os.fsencode(tap))
    return "nic-" + "".join(
        one if one.isascii() and (one.isalnum() or one in "-._") else f"/{ord(one):02x}" for one in plain
    )


def mark(chain: str, rule: str) -> str:
    """The comment by which a rule is known again: nft tells the rule itself in other words than it was given."""
    return f"{zlib.crc32(f'{chain} {rule}'.encode()):08x}"


@cache
def shared_marks() -> dict[str, tuple[str, ...]]:
    """The comments of the rules in each shared chain."""
    return {chain: tuple(mark(chain, rule) for rule in rules) for chain, rules in SHARED.items()}


def added(chain: str, rules: tuple[str, ...]) -> Iterator[str]:
    """The commands that make *rules* the only ones in *chain*, which is there."""
    yield f"flush chain {HERE} {chain}"
    for rule in rules:
        yield f'add rule {HERE} {chain} {rule} comment "{mark(chain, rule)}"'


def shared_part(*, hooked: bool) -> Iterator[str]:
    """The commands that make all that NICs share; *hooked*: the base chain is there, but not as it is to be."""
    yield f"add table {HERE}"
    for name, (what, types) in TYPES.items():
        yield f"add {what} {HERE} {name} {{ {types} }}"
    if hooked:
        yield f"flush chain {HERE} {BASE}"
        yield f"delete chain {HERE} {BASE}"
    for chain in SHARED:
        yield f"add chain {HERE} {chain} {HOOKED if chain == BASE else ''}".rstrip()
    for chain, rules in SHARED.items():
        yield from added(chain, rules)


@lru_cache(KEPT)
def elements(tap: str, facts: Facts) -> frozenset[Element]:
    """The elements of *tap*."""
    found = {("guests", "", facts.kind), ("own", "", chain_of(tap))}
    found |= {(f"dropped_{reason}", "", "") for reason in REASONS}
    found |= {("macs", mac, "") for mac in facts.macs}
    for prefix in facts.everything:
        kind = "hosts" if prefix.prefixlen == prefix.max_prefixlen else "nets"
        found |= {(f"{kind}{prefix.version}", said(prefix), ""), (f"with{prefix.version}", "", "")}
    return frozenset(found)


def element(verb: str, tap: str, one: Element) -> str:
    """The command that adds or deletes an element."""
    name, key, verdict = one
    value = f" : goto {verdict}" if verdict else ""
    return f'{verb} element {HERE} {name} {{ "{tap}"{f" . {key}" if key else ""}{value} }}'


@lru_cache(KEPT)
def own_rules(facts: Facts) -> tuple[str, ...]:
    """The rules of the small chain of a NIC: what is inside RARP and neighbour discovery."""
    strict = facts.kind == "address"
    # A rule for each MAC: nft 1.0.6 cannot list a set of what is inside a protocol that it does not know.
    numbers = tuple(f"0x{mac.replace(':', '')}" for mac in facts.macs)
    macs = raw(numbers)
    zeros = ("@nh,112,32 0", "@nh,192,32 0") if strict else ()
    # QEMU's announcement is a request (3), and has no addresses.
    header = "@nh,0,64 0x0001080006040003" if strict else "@nh,0,48 0x000108000604"
    rules = [" ".join((RARP, header, f"@nh,64,48 {mac}", f"@nh,144,48 {mac}", *zeros, "accept")) for mac in numbers]
    rules.append(f"{RARP} goto drop_mac")
    then = "goto asking" if strict else "accept"
    if strict and facts.of_family(6):
        targets = raw(span(prefix) for prefix in facts.everything if prefix.version == 6)
        rules.append(f"meta protocol ip6 icmpv6 type 136 @th,64,128 != {targets} goto drop_address")
        # Another guest that is just asking for this address would give it up.
        rules.append(f"meta protocol ip6 icmpv6 type 135 ip6 saddr :: @th,64,128 != {targets} goto drop_address")
    for kind, length, source in ((133, 8, 1), (135, 24, 1), (136, 24, 2)):
        rules += [
            f"meta protocol ip6 icmpv6 type {kind} {test} {then}"
            for test in options(length, source, macs, nonce=source == 1)
        ]
    if not strict:
        # A router may say more before its own MAC than can be followed here.
        rules += [f"meta protocol ip6 icmpv6 type 137 {test} accept" for test in options(40, 2, macs, nonce=False)]
        rules += list(advertisements(macs))
    rules.append("goto drop_mac")
    return tuple(rules)


@lru_cache(KEPT)
def guard_rules(facts: Facts) -> tuple[str, ...]:
    """The rules of the chain on the tap itself."""
    macs = f"{{ {', '.join(facts.macs)} }}"
    return (f"ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 ether saddr != {macs} drop",)


def guard(tap: str, facts: Facts, *, there: bool) -> Iterator[str]:
    """The commands that make the chain on the tap itself; *there*: it is there, but not as it is to be."""
    chain = chain_of(tap)
    yield f"add table {GUARD}"
    if there:
        yield from no_guard(tap)
    hook = f'type filter hook ingress device "{tap}" priority {GUARD_PRIORITY}; policy accept;'
    yield f"add chain {GUARD} {chain} {{ {hook} }}"
    for rule in guard_rules(facts):
        yield f'add rule {GUARD} {chain} {rule} comment "{mark(chain, rule)}"'


def no_guard(tap: str) -> Iterator[str]:
    """The commands that remove it."""
    yield f"flush chain {GUARD} {chain_of(tap)}"
    yield f"delete chain {GUARD} {chain_of(tap)}"


def options(length: int, kind: int, macs: str, *, nonce: bool) -> Iterator[str]:
    """Tests for all the options that a message of *length* bytes may have: a MAC, and perhaps a nonce (RFC 7527)."""
    own = f"0x{kind:02x}01"
    first, second = 8 * length, 8 * length + 64
    yield f"ip6 length {length}"
    yield f"ip6 length {length + 8} @th,{first},16 {own} @th,{first + 16},48 {macs}"
    if nonce:
        yield f"ip6 length {length + 8} @th,{first},16 0x0e01"
        yield f"ip6 length {length + 16} @th,{first},16 {own} @th,{first + 16},48 {macs} @th,{second},16 0x0e01"
        yield f"ip6 length {length + 16} @th,{first},16 0x0e01 @th,{second},16 {own} @th,{second + 16},48 {macs}"


def advertisements(macs: str) -> Iterator[str]:
    """Rules for router advertisements: wherever in them an option could be a MAC, it is the guest's."""
    for place in range(128, 128 + 64 * ADVERTISED, 64):
        yield f"meta protocol ip6 icmpv6 type 134 @th,{place},16 0x0101 @th,{place + 16},48 != {macs} goto drop_mac"
    yield f"meta protocol ip6 icmpv6 type 134 ip6 length <= {16 + 8 * ADVERTISED} accept"


ADVERTISED = 16  # times eight bytes of options in a router advertisement


def raw(values: Iterable[str]) -> str:
    """Numbers as the right side of a test."""
    found = tuple(values)
    return found[0] if len(found) == 1 and "-" not in found[0] else f"{{ {', '.join(found)} }}"


def span(prefix: object) -> str:
    """An IPv6 prefix as a number, or two."""
    first, last = int(prefix.network_address), int(prefix.broadcast_address)  # type: ignore[attr-defined]
    return f"0x{first:032x}" if first == last else f"0x{first:032x}-0x{last:032x}"
