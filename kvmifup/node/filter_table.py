"""What there is in nftables of the filter of one NIC, and of what all of them share.

Reading trusts nothing that was written: it looks at the tables, the base chain, every rule that NICs share, the
elements of this one and the chain on its tap.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range

from kvmifup.core import filters
from kvmifup.core.errors import NotReadyError
from kvmifup.core.filters import Facts, Prefix
from kvmifup.core.records import record
from kvmifup.node import filter_shape as shape
from kvmifup.node import messages
from kvmifup.node.filter_rules import BASE, MADE, RESERVED, RULES
from kvmifup.node.filter_shape import GUARD, HERE, SETS, Element
from kvmifup.node.messages import attributes
from kvmifup.node.nfmessages import (
    IFNAMSIZ,
    NF_ACCEPT,
    NF_BR_PRE_ROUTING,
    NF_NETDEV_INGRESS,
    NFT_DATA_VERDICT,
    NFT_GOTO,
    NFT_SET_INTERVAL,
    NFT_SET_MAP,
    NFT_TABLE_F_DORMANT,
    NFT_TABLE_F_OWNER,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_USERDATA,
    TYPES,
    Entry,
    comment_of,
    device_key,
    entry_of,
    listed,
    plain,
    then,
)
from kvmifup.node.nfnetlink import Chain, Nftables, SetTypes, comments_of, held

HOOKED = (NF_BR_PRE_ROUTING, -300, NF_ACCEPT, "filter", ())
TRIES = 8  # of a look that changes disturb
THE_TABLE, BASE_CHAIN, NOTHING_WHOLE = "the table", f"the hook of chain {BASE}", "nothing whole"
GUARDED = plain(then(NFT_GOTO, RESERVED))  # what a rule on a tap does
NAMES = {HERE: THE_TABLE, GUARD: "the table on taps"}

Entries = frozenset[tuple[str, Entry]]  # each with its set


@record
class Found:
    """What there is of the filter of one NIC.

    *missing* is what is not as it is to be of what NICs share. *guard* are the comments of the rules in the chain on
    the tap itself, None if that is not there. All of it is true at the *generation* of the ruleset.
    """

    missing: tuple[str, ...]
    entries: Entries = frozenset()
    guard: tuple[str, ...] | None = None
    generation: int = 0

    @property
    def nothing(self) -> bool:
        """Whether there is nothing of this NIC."""
        return not self.entries and self.guard is None

    @property
    def elements(self) -> frozenset[Element]:
        """The elements in words."""
        return elements_of(self.entries)

    @property
    def facts(self) -> Facts | None:
        """What it lets through, by its elements; None if they do not say."""
        return facts_of(self.elements)

    def damage(self, tap: str) -> tuple[str, ...]:
        """What is not as `facts` says."""
        facts = self.facts
        found = list(self.missing)
        if facts is None or self.entries != entries_for(tap, facts):
            found.append("its elements")
        if self.guard != shape.guard_marks(tap):
            found.append("the chain on the tap itself")
        return tuple(found)


def text(found: Found, tap: str) -> str | None:
    """The value of `Filter`: None for nothing, the facts, or what can be said of one that is not whole."""
    if found.nothing:
        return None
    damage = found.damage(tap)
    said = found.facts.text if found.facts else NOTHING_WHOLE
    return f"{said}{filters.BROKEN}{', '.join(damage)})" if damage else said


def facts_in(value: str) -> Facts | None:
    """The facts in a value of `Filter`; None if it has none, because what was found was not whole."""
    said = value.partition(filters.BROKEN)[0]
    return None if said == NOTHING_WHOLE else filters.parsed(said)


# --- elements --------------------------------------------------------------------------------------------


@lru_cache(filters.KEPT)
def facts_of(elements: frozenset[Element]) -> Facts | None:
    """What the elements of a NIC say that it lets through; None if they do not say."""
    kind = next((verdict for name, _, verdict in elements if name == "guests"), "")
    macs = [key for name, key, _ in elements if name == "macs"]
    if kind not in ("mac", "address") or not macs:
        return None
    prefixes = [ip_network(key) for name, key, _ in elements if name[:4] in ("host", "nets") and "-" not in key]
    return filters.facts(kind, macs, prefixes)


@lru_cache(filters.KEPT)
def entries_for(tap: str, facts: Facts) -> Entries:
    """The elements of *tap* as the kernel has them."""
    return frozenset((one[0], entry(tap, one)) for one in shape.elements(facts))


@lru_cache(filters.KEPT)
def elements_of(entries: Entries) -> frozenset[Element]:
    """The reverse, for any elements."""
    return frozenset(element(name, one) for name, one in entries)


def entry(tap: str, one: Element) -> Entry:
    """An element as the kernel has it."""
    name, key, verdict = one
    if not key:
        return device_key(tap), b"", verdict
    # What is in a concatenation takes whole words.
    first, last = (device_key(tap) + end + bytes(-len(end) % 4) for end in shape.ends(name, key))
    return first, last if SETS[name].has_ranges else b"", verdict


def element(name: str, entry: Entry) -> Element:
    """The reverse."""
    key, end, verdict = entry
    size = SETS[name].size
    raw, last = (one[IFNAMSIZ : IFNAMSIZ + size] for one in (key, end or key))
    if size == shape.MAC:
        return name, raw.hex(":"), verdict
    return name, spanned(raw, last) if size else "", verdict


def spanned(first: bytes, last: bytes) -> str:
    """The prefix from one address to another; "FIRST-LAST" if that is none."""
    make = IPv4Address if len(first) == shape.IP4 else IPv6Address
    if first == last:
        return str(make(first))
    found: list[Prefix] = list(summarize_address_range(make(first), make(last)))
    return str(found[0]) if len(found) == 1 else f"{make(first)}-{make(last)}"


# --- what NICs share -------------------------------------------------------------------------------------


def missing(table: Nftables, which: str, noted: str) -> Iterator[str]:
    """What is not as it is to be of what NICs share in the table *which*. Raises NotReadyError if it is not ours.

    *noted* is what `made_now` has said of its rules when they were made; empty if nobody has noted it.
    """
    itself = table.itself()
    if itself is None:
        yield NAMES[which]
        return
    flags, used = itself
    if flags & NFT_TABLE_F_OWNER:
        raise not_ours(which, "a running program owns it")
    known = table.sets()
    ours = {name: one for name, one in SETS.items() if one.table == which}
    if wrong := [name for name, one in ours.items() if name in known and not fits(known[name], one)]:
        raise not_ours(which, f"its set {wrong[0]} is another one")
    if used and not known.keys() & ours.keys() and not is_older(table, used):
        raise not_ours(which, "it has none of our sets")
    if flags & NFT_TABLE_F_DORMANT:
        yield f"{NAMES[which]}, which sleeps"
    yield from (f"{one.what} {name}" for name, one in ours.items() if name not in known)
    chains = RULES[which]
    if BASE in chains:
        base = table.chain(BASE)
        if base is None:
            yield f"chain {BASE}"
        elif base != HOOKED:
            yield BASE_CHAIN
    rules = rules_of(table, which)
    found = comments_of(rules)
    yield from (f"chain {name}" for name, wanted in shape.marks(which).items() if found.get(name, ()) != wanted)
    if noted and noted != digest_of(rules, MADE):
        yield f"a rule of {NAMES[which]} that is another one now"


def rules_of(table: Nftables, which: str) -> tuple[bytes, ...]:
    """The rules that NICs share in the table *which*: there may be a chain for each NIC, so one chain is read alone."""
    chains = RULES[which]
    return tuple(table.rules(next(iter(chains)) if len(chains) == 1 else ""))


def made_now(here: Nftables, guards: Nftables) -> str:
    """What the rules of both tables look like now."""
    return f"{digest_of(rules_of(here, HERE), MADE)} {digest_of(rules_of(guards, GUARD), MADE)}"


@lru_cache(4)
def digest_of(rules: tuple[bytes, ...], without: str = "") -> str:
    """What tells *rules*, which are attributes NFTA_RULE_*, from others: what they do, in their order.

    Not those of the chain *without*, and not their numbers, which the kernel gives them.
    """
    number = 0
    for one in map(attributes, rules):
        if messages.text(one.get(NFTA_RULE_CHAIN)) != without:
            number = zlib.crc32(one.get(NFTA_RULE_CHAIN, b"") + one.get(NFTA_RULE_EXPRESSIONS, b""), number)
    return f"{number:08x}"


def noted(here: Nftables) -> tuple[str, str]:
    """What `made_now` has said when the rules were made; empty if nobody has noted it, as of older ones."""
    said = [one.split() for one in here.comments(MADE).get(MADE, ())]
    return (said[0][0], said[0][1]) if len(said) == 1 and len(said[0]) == 2 else ("", "")


def is_older(table: Nftables, used: int) -> bool:
    """Whether a table without our sets is of an older kvm-ifup: it has nothing but chains of NICs, with rules."""
    chains = table.comments()
    return used == len(chains) and all(one.startswith(shape.CHAIN) for one in chains)


def not_ours(which: str, why: str) -> NotReadyError:
    """The error for a table of somebody else."""
    return NotReadyError(
        f"the table {which} of nftables is not ours: {why}", hint=f"`nft delete table {which}` if nobody needs it"
    )


def fits(found: SetTypes, wanted: shape.Shape) -> bool:
    """Whether a set is what it is to be."""
    flags, key, data, size = found
    number = 0
    for one in wanted.types:
        number = number << 6 | TYPES[one]
    return (
        (key, size) == (number, IFNAMSIZ + wanted.size + -wanted.size % 4)
        and bool(flags & NFT_SET_INTERVAL) == wanted.has_ranges
        and (bool(flags & NFT_SET_MAP), data == NFT_DATA_VERDICT) == (wanted.is_map, wanted.is_map)
    )


def guard_of(guards: Nftables, tap: str) -> tuple[str, ...] | None:
    """The comments of the rules in the chain on the tap itself, if these are ours; None without it."""
    chain = shape.chain_of(tap)
    base = guards.chain(chain)
    return None if base is None else guard_in(tap, base, map(attributes, guards.rules(chain)))


def guard_in(tap: str, base: Chain | tuple[()], rules: Iterable[Mapping[int, bytes]]) -> tuple[str, ...]:
    """The same of a chain that is *base*, and has these *rules*."""
    if base != hooked_on(tap):
        return ("another hook",)
    found = tuple(rules)
    if any(plain(one.get(NFTA_RULE_EXPRESSIONS, b"")) != GUARDED for one in found):
        return ("another rule",)
    return tuple(comment_of(one.get(NFTA_RULE_USERDATA, b"")) or "" for one in found)


def all_guards(guards: Nftables) -> dict[str, tuple[str, ...]]:
    """The same of all taps that have such a chain."""
    rules: dict[str, list[Mapping[int, bytes]]] = {}
    for rule in map(attributes, guards.rules()):
        rules.setdefault(messages.text(rule.get(NFTA_RULE_CHAIN)) or "", []).append(rule)
    bases = {name: base for name, base in guards.chains().items() if name.startswith(shape.CHAIN)}
    taps = {name: shape.tap_of(name) for name in bases}
    return {taps[name]: guard_in(taps[name], base, rules.get(name, ())) for name, base in bases.items()}


def device_in(key: bytes) -> str:
    """The tap that the key of an element begins with."""
    return os.fsdecode(key[:IFNAMSIZ].rstrip(b"\0"))


def hooked_on(tap: str) -> Chain:
    """What there is to know of that chain, if it is as it is to be."""
    return NF_NETDEV_INGRESS, shape.GUARD_PRIORITY, NF_ACCEPT, "filter", (tap,)


# --- all of it -------------------------------------------------------------------------------------------


def missing_of_both(here: Nftables, guards: Nftables) -> tuple[str, ...]:
    """What is not as it is to be of what NICs share, in either table. Raises as `missing`."""
    said, said_of_guards = noted(here)
    return (*missing(here, HERE, said), *missing(guards, GUARD, said_of_guards))


def everything(here: Nftables, guards: Nftables) -> tuple[int, tuple[str, ...], dict[str, Found]]:
    """What is missing of what NICs share, and what there is of each tap, after the generation of which it is true.

    By a dump of each set, however many taps there are. Raises as `missing`.
    """
    for _ in range(TRIES):
        generation = here.generation()
        lacking = missing_of_both(here, guards)
        found: dict[str, set[tuple[str, Entry]]] = {}
        for name, kind in SETS.items():
            for message in (guards if kind.table == GUARD else here).messages(name):
                for one in map(entry_of, map(attributes, listed(held(message)))):
                    found.setdefault(device_in(one[0]), set()).add((name, one))
        chains = all_guards(guards)
        if here.generation() == generation:
            break
    taps = found.keys() | chains.keys()
    return generation, lacking, {tap: Found(lacking, frozenset(found.get(tap, ())), chains.get(tap)) for tap in taps}
