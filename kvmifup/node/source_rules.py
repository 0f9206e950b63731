"""The rules of the table `inet kvm-ifup`: the same for all guests. Made, and known again."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from kvmifup.node.elements import (
    DELRULE,
    NEWCHAIN,
    NEWRULE,
    NEWSET,
    NEWTABLE,
    VALUE,
    VERDICT,
    Request,
    big,
    create,
    listed,
    nested,
    text,
)
from kvmifup.node.messages import NLM_F_APPEND, attributes
from kvmifup.node.messages import attribute as raw
from kvmifup.node.messages import text as text_of

STRICT, LOOSE, OWN, BASE = "strict", "loose", "own", "prerouting"  # chains
SOURCES, DROPPED = "sources", "dropped_address"  # what leads a tap to a chain, and what counts what was dropped there
ADDRESSES, PREFIXES = "addresses", "prefixes"  # where a guest may send from
GUESTS, NETWORKS = {4: "guests4", 6: "guests6"}, {4: "networks4", 6: "networks6"}  # from where nobody on an uplink may
PRIORITY = -300  # NF_IP_PRI_RAW, linux/netfilter_ipv4.h: before connections are followed

# linux/netfilter/nf_tables.h, linux/netfilter.h
NF_DROP, NF_ACCEPT, NFT_JUMP, NFT_GOTO = 0, 1, -3, -4
NFPROTO, IIFNAME = 15, 6  # NFT_META_*
FIB_SADDR, FIB_IIF, FIB_PRESENT = 1, 8, 32  # NFTA_FIB_F_*
MAP, INTERVAL, CONCATENATED = 0x8, 0x4, 0x80  # NFT_SET_*
# The types of nft (datatype.h there): a concatenation has six bits for each.
TYPE_IFNAME, TYPE_IP = 41, {4: 7, 6: 8}
AF = {4: 2, 6: 10}


def verdict(code: int, chain: str = "") -> bytes:
    """A verdict: NF_* or NFT_*, and the chain that it leads to."""
    return nested(VERDICT, big(1, code) + (text(2, chain) if chain else b""))


def expression(name: str, payload: bytes) -> bytes:
    """One expression of a rule."""
    return nested(1, text(1, name) + nested(2, payload))


def is_family(version: int) -> bytes:
    """The packet is IPv4, or IPv6."""
    return meta(NFPROTO) + compare(bytes([AF[version]]))


def meta(key: int) -> bytes:
    """Load *key*."""
    return expression("meta", big(2, key) + big(1, 1))


def compare(value: bytes) -> bytes:
    """What was loaded is *value*."""
    return expression("cmp", big(1, 1) + big(2, 0) + nested(3, raw(VALUE, value)))


def source(version: int, register: int) -> bytes:
    """Load the source address."""
    offset, length = (12, 4) if version == 4 else (8, 16)
    return expression("payload", big(1, register) + big(2, 1) + big(3, offset) + big(4, length))


def within(prefix: ipaddress.IPv6Network) -> bytes:
    """The source is in *prefix*."""
    mask = nested(4, raw(VALUE, prefix.netmask.packed)) + nested(5, raw(VALUE, bytes(16)))
    narrowed = expression("bitwise", big(1, 1) + big(2, 1) + big(3, 16) + mask) if prefix.prefixlen < 128 else b""
    return is_family(6) + source(6, 1) + narrowed + compare(prefix.network_address.packed)


def among(name: str, version: int) -> bytes:
    """Device and source are in the set *name*."""
    return is_family(version) + meta(IIFNAME) + source(version, 2) + expression("lookup", text(1, name) + big(2, 1))


def then(code: int, chain: str = "") -> bytes:
    """The verdict of a rule."""
    return expression("immediate", big(1, 0) + nested(2, verdict(code, chain)))


def routed(flags: int) -> bytes:
    """There is a route to the source; with FIB_IIF, out of the device where the packet came in."""
    return expression("fib", big(3, FIB_SADDR | FIB_PRESENT | flags) + big(2, 1) + big(1, 1)) + compare(b"\1\0\0\0")


def rules() -> list[tuple[str, bytes]]:
    """The rules, each with its chain."""
    count = meta(IIFNAME) + expression("lookup", text(1, DROPPED) + big(2, 1)) + then(NF_DROP)
    return [
        *((BASE, among(names[version], version) + then(NF_DROP)) for version in (4, 6) for names in (GUESTS, NETWORKS)),
        (BASE, is_family(6) + meta(IIFNAME) + expression("lookup", text(1, SOURCES) + big(2, 1) + big(3, 0))),
        # What is only said on the link itself: neighbour discovery. The kernel never forwards it.
        (OWN, within(ipaddress.IPv6Network("fe80::/10")) + then(NF_ACCEPT)),
        (OWN, within(ipaddress.IPv6Network("::/128")) + then(NF_ACCEPT)),
        *((OWN, among(name, 6) + then(NF_ACCEPT)) for name in (ADDRESSES, PREFIXES)),
        # As for IPv4: strict is also what a route leads back to, and loose whatever there is a route to.
        *(
            (chain, rule)
            for chain, flags in ((STRICT, FIB_IIF), (LOOSE, 0))
            for rule in (then(NFT_JUMP, OWN), routed(flags) + then(NF_ACCEPT), count, then(NF_DROP))
        ),
    ]


def rules_made() -> Iterator[Request]:
    """What makes table, chains, sets and rules, or makes them right; the elements stay."""
    yield create(NEWTABLE, big(2, 0))
    # Sets first, or rules could not name them.
    yield made_set(1, SOURCES, TYPE_IFNAME, (16,), MAP)
    yield made_set(2, DROPPED, TYPE_IFNAME, (16,), counted=True)
    for number, (name, version, flags, counted) in enumerate(
        (
            (ADDRESSES, 6, 0, False),
            (PREFIXES, 6, INTERVAL, False),
            *((GUESTS[version], version, 0, True) for version in (4, 6)),
            *((NETWORKS[version], version, INTERVAL, True) for version in (4, 6)),
        ),
        start=3,
    ):
        size = 4 if version == 4 else 16
        yield made_set(number, name, TYPE_IFNAME << 6 | TYPE_IP[version], (16, size), flags, counted=counted)
    hook = nested(4, big(1, 0) + big(2, PRIORITY))  # NF_INET_PRE_ROUTING
    yield create(NEWCHAIN, text(3, BASE) + text(7, "filter") + big(5, NF_ACCEPT) + hook)
    yield from (create(NEWCHAIN, text(3, chain)) for chain in (OWN, STRICT, LOOSE))
    yield from ((DELRULE, 0, text(2, chain)) for chain in (BASE, OWN, STRICT, LOOSE))
    for chain, expressions in rules():
        kind, flags, payload = create(NEWRULE, text(2, chain) + nested(4, expressions))
        yield kind, flags | NLM_F_APPEND, payload


def made_set(
    number: int, name: str, kind: int, sizes: tuple[int, ...], flags: int = 0, *, counted: bool = False
) -> Request:
    """The request that makes a set; *counted*: each element counts what it has met."""
    wide = len(sizes) > 1 and flags & INTERVAL
    flags |= CONCATENATED if wide else 0
    payload = text(2, name) + big(3, flags) + big(4, kind) + big(5, sum(sizes))
    if flags & MAP:
        payload += big(6, 0xFFFFFF00 - (1 << 32)) + big(7, 0)  # NFT_DATA_VERDICT
    payload += big(10, number)
    if wide:
        payload += nested(9, nested(2, b"".join(nested(1, big(1, size)) for size in sizes)))
    # For nft: the byte order of a key that is no concatenation (NFTNL_UDATA_SET_KEYBYTEORDER).
    payload += raw(13, bytes((0, 4, 0 if len(sizes) > 1 else 1, 0, 0, 0)))
    if counted:
        payload += nested(17, text(1, "counter") + nested(2, b""))
    return create(NEWSET, payload)


Meaning = tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...]


def meaning(expressions: bytes) -> Meaning:
    """The expressions of a rule without what the kernel adds: by name, with the attributes that we write."""
    found = []
    for one in listed(expressions):
        parts = attributes(one)
        name = text_of(parts.get(1)) or ""
        said = attributes(parts.get(2, b""))
        kept = {kind: plain(value) for kind, value in said.items() if kind in OURS.get(name, said)}
        found.append((name, tuple(sorted(kept.items()))))
    return tuple(found)


# By expression: the attributes that we write, and that say what it does.
OURS = {"lookup": {1, 2, 3}, "bitwise": {1, 2, 3, 4, 5}, "counter": set[int]()}


def plain(value: bytes) -> bytes:
    """An attribute without the marks of those that hold others, which the kernel does not always set."""
    return value.replace(b"\1\x80", b"\1\0").replace(b"\2\x80", b"\2\0")


def are_ours(found: tuple[bytes, ...]) -> bool:
    """Whether the rules *found*, as the kernel lists them, are those that we write."""
    if found not in SEEN:
        parts = [attributes(one) for one in found]
        if [(text_of(one.get(2)) or "", meaning(one.get(4, b""))) for one in parts] != expected():
            return False
        SEEN.clear()
        SEEN.add(found)
    return True


SEEN: set[tuple[bytes, ...]] = set()  # what was last found to be right: to take it apart takes a while


def expected() -> list[tuple[str, Meaning]]:
    """What `meaning` makes of the rules that we write."""
    if not EXPECTED:
        EXPECTED.extend((chain, meaning(expressions)) for chain, expressions in in_order())
    return EXPECTED


EXPECTED: list[tuple[str, Meaning]] = []


def in_order() -> list[tuple[str, bytes]]:
    """The rules in the order in which the kernel lists them: chain by chain."""
    return sorted(rules(), key=lambda one: (BASE, OWN, STRICT, LOOSE).index(one[0]))
