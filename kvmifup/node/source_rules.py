"""The rules of the table `inet kvm-ifup`: the same for all guests. Made, and known again."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from kvmifup.node.messages import NLM_F_APPEND, attribute, attributes, text
from kvmifup.node.nfmessages import (
    IFNAMSIZ,
    NF_ACCEPT,
    NF_DROP,
    NF_INET_PRE_ROUTING,
    NFT_DATA_VERDICT,
    NFT_JUMP,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWTABLE,
    NFT_SET_CONCAT,
    NFT_SET_INTERVAL,
    NFT_SET_MAP,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TYPE,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_LIST_ELEM,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_SET_DATA_LEN,
    NFTA_SET_DATA_TYPE,
    NFTA_SET_DESC,
    NFTA_SET_DESC_CONCAT,
    NFTA_SET_EXPR,
    NFTA_SET_FIELD_LEN,
    NFTA_SET_FLAGS,
    NFTA_SET_ID,
    NFTA_SET_KEY_LEN,
    NFTA_SET_KEY_TYPE,
    NFTA_SET_NAME,
    NFTA_SET_USERDATA,
    NFTA_TABLE_FLAGS,
    TYPES,
    Request,
    big,
    create,
    emptied,
    expression,
    listed,
    made_rule,
    named,
    nested,
    plain,
    then,
    typed,
    valued,
)

STRICT, LOOSE, OWN, BASE = "strict", "loose", "own", "prerouting"  # chains
SOURCES, DROPPED = "sources", "dropped_address"  # what leads a tap to a chain, and what counts what was dropped there
ADDRESSES, PREFIXES = "addresses", "prefixes"  # where a guest may send from
GUESTS, NETWORKS = {4: "guests4", 6: "guests6"}, {4: "networks4", 6: "networks6"}  # from where nobody on an uplink may
PARTS = 12  # chains and sets that `rules_made` makes
USES = 4  # of the chains STRICT and LOOSE while nobody is led there: their rules
PRIORITY = -300  # NF_IP_PRI_RAW, linux/netfilter_ipv4.h: before connections are followed

# linux/netfilter/nf_tables.h
NFPROTO, IIFNAME = 15, 6  # NFT_META_*
FIB_SADDR, FIB_IIF, FIB_PRESENT = 1, 8, 32  # NFTA_FIB_F_*
TYPE_IFNAME, TYPE_IP = TYPES["ifname"], {4: TYPES["ipv4_addr"], 6: TYPES["ipv6_addr"]}
AF = {4: 2, 6: 10}


def is_family(version: int) -> bytes:
    """The packet is IPv4, or IPv6."""
    return meta(NFPROTO) + compare(bytes([AF[version]]))


def meta(key: int) -> bytes:
    """Load *key*."""
    return expression("meta", big(2, key) + big(1, 1))


def compare(value: bytes) -> bytes:
    """What was loaded is *value*."""
    return expression("cmp", big(1, 1) + big(2, 0) + valued(3, value))


def source(version: int, register: int) -> bytes:
    """Load the source address."""
    offset, length = (12, 4) if version == 4 else (8, 16)
    return expression("payload", big(1, register) + big(2, 1) + big(3, offset) + big(4, length))


def within(prefix: ipaddress.IPv6Network) -> bytes:
    """The source is in *prefix*."""
    mask = valued(4, prefix.netmask.packed) + valued(5, bytes(16))
    narrowed = expression("bitwise", big(1, 1) + big(2, 1) + big(3, 16) + mask) if prefix.prefixlen < 128 else b""
    return is_family(6) + source(6, 1) + narrowed + compare(prefix.network_address.packed)


def among(name: str, version: int) -> bytes:
    """Device and source are in the set *name*."""
    return is_family(version) + meta(IIFNAME) + source(version, 2) + expression("lookup", named(1, name) + big(2, 1))


def routed(flags: int) -> bytes:
    """There is a route to the source; with FIB_IIF, out of the device where the packet came in."""
    return expression("fib", big(3, FIB_SADDR | FIB_PRESENT | flags) + big(2, 1) + big(1, 1)) + compare(b"\1\0\0\0")


def rules() -> list[tuple[str, bytes]]:
    """The rules, each with its chain."""
    count = meta(IIFNAME) + expression("lookup", named(1, DROPPED) + big(2, 1)) + then(NF_DROP)
    return [
        *((BASE, among(names[version], version) + then(NF_DROP)) for version in (4, 6) for names in (GUESTS, NETWORKS)),
        (BASE, is_family(6) + meta(IIFNAME) + expression("lookup", named(1, SOURCES) + big(2, 1) + big(3, 0))),
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
    yield create(NFT_MSG_NEWTABLE, big(NFTA_TABLE_FLAGS, 0))
    # Sets first, or rules could not name them.
    yield made_set(1, SOURCES, TYPE_IFNAME, (IFNAMSIZ,), NFT_SET_MAP)
    yield made_set(2, DROPPED, TYPE_IFNAME, (IFNAMSIZ,), counted=True)
    for number, (name, version, flags, counted) in enumerate(
        (
            (ADDRESSES, 6, 0, False),
            (PREFIXES, 6, NFT_SET_INTERVAL, False),
            *((GUESTS[version], version, 0, True) for version in (4, 6)),
            *((NETWORKS[version], version, NFT_SET_INTERVAL, True) for version in (4, 6)),
        ),
        start=3,
    ):
        size = 4 if version == 4 else 16
        yield made_set(number, name, TYPE_IFNAME << 6 | TYPE_IP[version], (IFNAMSIZ, size), flags, counted=counted)
    yield base_chain(BASE, PRIORITY)
    yield from (create(NFT_MSG_NEWCHAIN, named(NFTA_CHAIN_NAME, chain)) for chain in (OWN, STRICT, LOOSE))
    yield from (emptied(chain) for chain in (BASE, OWN, STRICT, LOOSE))
    for chain, expressions in rules():
        kind, flags, payload = made_rule(chain, expressions)
        yield kind, flags | NLM_F_APPEND, payload


def base_chain(name: str, priority: int) -> Request:
    """The request that makes a chain that sees whatever comes in."""
    hook = big(NFTA_HOOK_HOOKNUM, NF_INET_PRE_ROUTING) + big(NFTA_HOOK_PRIORITY, priority)
    what = named(NFTA_CHAIN_TYPE, "filter") + big(NFTA_CHAIN_POLICY, NF_ACCEPT) + nested(NFTA_CHAIN_HOOK, hook)
    return create(NFT_MSG_NEWCHAIN, named(NFTA_CHAIN_NAME, name) + what)


def made_set(
    number: int, name: str, kind: int, sizes: tuple[int, ...], flags: int = 0, *, counted: bool = False
) -> Request:
    """The request that makes a set; *counted*: each element counts what it has met."""
    wide = len(sizes) > 1 and flags & NFT_SET_INTERVAL
    flags |= NFT_SET_CONCAT if wide else 0
    payload = named(NFTA_SET_NAME, name) + big(NFTA_SET_FLAGS, flags)
    payload += big(NFTA_SET_KEY_TYPE, kind) + big(NFTA_SET_KEY_LEN, sum(sizes))
    if flags & NFT_SET_MAP:
        payload += big(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT) + big(NFTA_SET_DATA_LEN, 0)
    payload += big(NFTA_SET_ID, number)
    if wide:
        fields = b"".join(nested(NFTA_LIST_ELEM, big(NFTA_SET_FIELD_LEN, size)) for size in sizes)
        payload += nested(NFTA_SET_DESC, nested(NFTA_SET_DESC_CONCAT, fields))
    # For nft: the byte order of a key that is no concatenation (NFTNL_UDATA_SET_KEYBYTEORDER).
    payload += attribute(NFTA_SET_USERDATA, bytes((0, 4, 0 if len(sizes) > 1 else 1, 0, 0, 0)))
    if counted:
        payload += nested(NFTA_SET_EXPR, typed("counter", b""))
    return create(NFT_MSG_NEWSET, payload)


Meaning = tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...]


def meaning(expressions: bytes) -> Meaning:
    """The expressions of a rule without what the kernel adds: by name, with the attributes that we write."""
    found = []
    for one in listed(expressions):
        parts = attributes(one)
        name = text(parts.get(NFTA_EXPR_NAME)) or ""
        said = attributes(parts.get(NFTA_EXPR_DATA, b""))
        kept = {kind: plain(value) for kind, value in said.items() if kind in OURS.get(name, said)}
        found.append((name, tuple(sorted(kept.items()))))
    return tuple(found)


# By expression: the attributes that we write, and that say what it does.
OURS = {"lookup": {1, 2, 3}, "bitwise": {1, 2, 3, 4, 5}, "counter": set[int]()}


def are_ours(found: tuple[bytes, ...]) -> bool:
    """Whether the rules *found*, as the kernel lists them, are those that we write."""
    if found not in SEEN:
        parts = [attributes(one) for one in found]
        if [rule_of(one) for one in parts] != expected():
            return False
        SEEN.clear()
        SEEN.add(found)
    return True


def rule_of(found: dict[int, bytes]) -> tuple[str, Meaning]:
    """What the attributes of a rule say: its chain, and what it does."""
    return text(found.get(NFTA_RULE_CHAIN)) or "", meaning(found.get(NFTA_RULE_EXPRESSIONS, b""))


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
