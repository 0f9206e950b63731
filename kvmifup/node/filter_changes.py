"""What makes the filter of a NIC of what was found: as commands for nft, and as requests of one transaction."""

from __future__ import annotations

from collections.abc import Iterator

from kvmifup.core import filters
from kvmifup.core.filters import Facts
from kvmifup.core.ops import Filter
from kvmifup.node import filter_shape as shape
from kvmifup.node.filter_rules import MADE, RESERVED
from kvmifup.node.filter_shape import SETS
from kvmifup.node.filter_table import BASE_CHAIN, THE_TABLE, Entries, Found, entries_for, facts_in
from kvmifup.node.messages import NLM_F_APPEND, attribute
from kvmifup.node.nfmessages import (
    NF_ACCEPT,
    NF_NETDEV_INGRESS,
    NFT_GOTO,
    NFT_MSG_NEWCHAIN,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TYPE,
    NFTA_HOOK_DEV,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_RULE_USERDATA,
    NFTA_SET_ELEM_DATA,
    Request,
    big,
    commented,
    create,
    emptied,
    for_each_set,
    keyed,
    made_rule,
    named,
    nested,
    put,
    remove,
    then,
    verdict,
)


def changes(table: str, before: Entries, after: Entries) -> Iterator[Request]:
    """The requests that make the elements *before* in *table* those *after*, and leave alone what stays."""
    for how, every in ((remove, before - after), (put, after - before)):
        elements = (
            (name, keyed(key, end) + (leading(chain) if how is put else b""))
            for name, (key, end, chain) in every
            if SETS[name].table == table
        )
        yield from for_each_set(how, elements)


def leading(chain: str) -> bytes:
    """The attribute of an element of a map that leads to *chain*; nothing for none."""
    return nested(NFTA_SET_ELEM_DATA, verdict(NFT_GOTO, chain)) if chain else b""


def guard_made(tap: str) -> Iterator[Request]:
    """The requests that make the chain on the tap itself, with its rule."""
    chain = shape.chain_of(tap)
    hook = big(NFTA_HOOK_HOOKNUM, NF_NETDEV_INGRESS) + big(NFTA_HOOK_PRIORITY, shape.GUARD_PRIORITY)
    what = named(NFTA_CHAIN_TYPE, "filter") + big(NFTA_CHAIN_POLICY, NF_ACCEPT)
    what += nested(NFTA_CHAIN_HOOK, hook + named(NFTA_HOOK_DEV, tap))
    yield create(NFT_MSG_NEWCHAIN, named(NFTA_CHAIN_NAME, chain) + what)
    kind, flags, rule = made_rule(chain, then(NFT_GOTO, RESERVED))
    yield kind, flags | NLM_F_APPEND, rule + attribute(NFTA_RULE_USERDATA, commented(shape.guard_marks(tap)[0]))


def note(said: str) -> Iterator[Request]:
    """The requests that make *said* the comment in the chain `MADE`."""
    yield create(NFT_MSG_NEWCHAIN, named(NFTA_CHAIN_NAME, MADE))
    yield emptied(MADE)
    kind, flags, rule = made_rule(MADE, then(NF_ACCEPT))
    yield kind, flags | NLM_F_APPEND, rule + attribute(NFTA_RULE_USERDATA, commented(said))


def commands(tap: str, facts: Facts, found: Found) -> Iterator[str]:
    """What makes *facts* of what was found: one transaction, which leaves alone what is right."""
    if found.missing:
        yield from shape.shared_part(hooked=BASE_CHAIN in found.missing)
    if found.guard != shape.guard_marks(tap):
        yield from shape.guard(tap, there=found.guard is not None)
    wanted = shape.elements(facts)
    # One whose chain is another now has to go before it can come again.
    yield from (shape.element("delete", tap, one) for one in sorted(found.elements - wanted))
    yield from (shape.element("add", tap, one) for one in sorted(wanted - found.elements))


def by_hand(op: Filter, now: object) -> tuple[list[str], list[str]]:
    """What nft(8) is to be told to make what *op* wants of *now*: what NICs share, if it is due; the NIC's own."""
    said = None if now is None else str(now)
    damage = said.partition(filters.BROKEN)[2].rstrip(")").split(", ") if said else [THE_TABLE]
    before = facts_in(said) if said else None
    wanted = facts_in(op.want) if op.want else None
    if wanted is None:
        elements = shape.elements(before) if before else frozenset()
        return [], [*(shape.element("delete", op.dev, one) for one in sorted(elements)), *shape.no_guard(op.dev)]
    whole = damage == [""]
    found = Found((), entries_for(op.dev, before), shape.guard_marks(op.dev)) if before and whole else Found(())
    shared = [] if whole else [*shape.shared_part(hooked=BASE_CHAIN in damage)]
    return shared, [*commands(op.dev, wanted, found)]
