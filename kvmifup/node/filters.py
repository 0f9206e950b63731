"""The filters of bridged NICs: what there is of one in nftables, and how it becomes what it is to be.

Reading trusts nothing that was written: it looks at the table, the base chain, every rule that NICs share, the rules
and elements of this one. A change of one NIC is one transaction.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range
from threading import Lock
from typing import Any

from kvmifup.core import filters
from kvmifup.core.errors import KernelError, NotReadyError
from kvmifup.core.filters import Facts, Prefix
from kvmifup.core.ops import Filter
from kvmifup.core.records import record
from kvmifup.node import filter_shape as shape
from kvmifup.node import nft
from kvmifup.node.filter_shape import Element
from kvmifup.node.nfmessages import (
    IFNAMSIZ,
    NF_ACCEPT,
    NF_BR_PRE_ROUTING,
    NF_NETDEV_INGRESS,
    NFPROTO_BRIDGE,
    NFPROTO_NETDEV,
    NFT_DATA_VERDICT,
    NFT_SET_INTERVAL,
    NFT_SET_MAP,
    NFT_TABLE_F_DORMANT,
    NFT_TABLE_F_OWNER,
    TYPES,
    WITHOUT_TABLE,
    Entry,
    Request,
    device_key,
    entry_of,
    keyed,
    remove,
    without_chain,
)
from kvmifup.node.nfnetlink import DISTURBED, Nftables
from kvmifup.node.refusals import refusals

SO_NETNS_COOKIE = 71  # asm-generic/socket.h
TRIES = 8  # of a change that other changes disturb
MAC, IP4, IP6 = 6, 4, 16  # bytes
KEYS = {"macs": MAC, "hosts4": IP4, "nets4": IP4, "hosts6": IP6, "nets6": IP6}  # of what comes after the tap's name
HOOKED = (NF_BR_PRE_ROUTING, -300, NF_ACCEPT, "filter", ())
THE_TABLE, BASE_CHAIN, NOTHING_WHOLE = "the table", f"the hook of chain {shape.BASE}", "nothing whole"
NOT_PLAIN = '"\\*'  # in the name of a tap: nft has no way to write it


@record
class Found:
    """What there is of the filter of one NIC.

    *missing* is what is not as it is to be of what NICs share. *marks* are those of the rules in its own chain, None if
    that is not there; *guard* the same of the chain on the tap itself.
    """

    missing: tuple[str, ...]
    elements: frozenset[Element] = frozenset()
    marks: tuple[str, ...] | None = None
    guard: tuple[str, ...] | None = None
    entries: tuple[tuple[str, Entry], ...] = ()
    generation: int = 0

    @property
    def nothing(self) -> bool:
        """Whether there is nothing of this NIC."""
        return not self.elements and self.marks is None and self.guard is None

    @property
    def facts(self) -> Facts | None:
        """What it lets through, by its elements; None if they do not say."""
        return facts_of(self.elements)

    def damage(self, tap: str) -> tuple[str, ...]:
        """What is not as `facts` says."""
        facts = self.facts
        found = list(self.missing)
        if facts is None or self.elements != shape.elements(tap, facts):
            found.append("its elements")
        if facts is None or self.marks != own_marks(tap, facts):
            found.append(f"chain {shape.chain_of(tap)}")
        if facts is None or self.guard != guard_marks(tap, facts):
            found.append("the chain on the tap itself")
        return tuple(found)


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
def own_marks(tap: str, facts: Facts) -> tuple[str, ...]:
    """The comments of the rules of its small chain."""
    chain = shape.chain_of(tap)
    return tuple(shape.mark(chain, rule) for rule in shape.own_rules(facts))


@lru_cache(filters.KEPT)
def guard_marks(tap: str, facts: Facts) -> tuple[str, ...]:
    """Those of the chain on the tap itself."""
    chain = shape.chain_of(tap)
    return tuple(shape.mark(chain, rule) for rule in shape.guard_rules(facts))


def text(found: Found, tap: str) -> str | None:
    """The value of `Filter`: None for nothing, the facts, or what can be said of one that is not whole."""
    if found.nothing:
        return None
    damage = found.damage(tap)
    said = found.facts.text if found.facts else NOTHING_WHOLE
    return f"{said}{filters.BROKEN}{', '.join(damage)})" if damage else said


class Filters:
    """The filters of one network namespace. Threads share it, one after the other.

    It keeps what it has read as long as the ruleset is of the same generation: any change of any table makes another.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.nftables = Nftables(NFPROTO_BRIDGE, nft.TABLE)
        self.guards = Nftables(NFPROTO_NETDEV, nft.TABLE, self.nftables)
        self._lock = Lock()
        self._library: Any = None
        self._shared: tuple[int, tuple[str, ...]] = -1, ()  # what is missing, and of which generation that is true
        self._found: dict[str, Found] = {}  # by tap

    def close(self) -> None:
        """Close the socket."""
        self.nftables.close()

    def read(self, tap: str) -> str | None:
        """The value of `Filter` for *tap*. Raises KernelError, PrivilegeError, NotReadyError."""
        with self._lock:
            return text(self._look(tap), tap)

    def _look(self, tap: str) -> Found:
        """What there is for *tap*. Raises KernelError, PrivilegeError; NotReadyError if the table is not ours."""
        with refusals(f"reading the filter of {tap}"):
            for _ in range(TRIES):
                generation = self.nftables.generation()
                if tap in self._found and self._found[tap].generation == generation:
                    return self._found[tap]
                found = self._look_once(tap, generation)
                if self.nftables.generation() == generation:
                    self._found[tap] = found
                    break
            return found

    def _look_once(self, tap: str, generation: int) -> Found:
        table = self.nftables
        if self._shared[0] != generation:
            self._shared = generation, tuple(missing(table))
        guard = self._guard(tap)
        if THE_TABLE in self._shared[1]:
            return Found(self._shared[1], guard=guard, generation=generation)
        chain = shape.chain_of(tap)
        entries = tuple((name, entry) for name in shape.TYPES for entry in self._entries(name, tap))
        elements = frozenset(element(name, entry) for name, entry in entries)
        marks = None if table.chain(chain) is None else table.comments(chain)
        return Found(self._shared[1], elements, marks, guard, entries, generation)

    def _entries(self, name: str, tap: str) -> list[Entry]:
        """The elements of the set *name* that are about *tap*. One that has nothing but taps is not read whole."""
        if name in KEYS:
            return self.nftables.entries(name, tap)
        found = self.nftables.element(name, keyed(device_key(tap)))
        return [] if found is None else [entry_of(found)]

    def _guard(self, tap: str) -> tuple[str, ...] | None:
        """The comments of the rules in the chain on the tap itself; None without it."""
        chain = shape.chain_of(tap)
        itself = self.guards.itself()
        base = None if itself is None else self.guards.chain(chain)
        if itself is None or base is None:
            return None
        if itself[0] or base != (NF_NETDEV_INGRESS, shape.GUARD_PRIORITY, NF_ACCEPT, "filter", (tap,)):
            return ("another hook",)
        return self.guards.comments(chain)

    def write(self, op: Filter) -> None:
        """Make what *op* wants true, all of it or nothing. Raises KernelError, PrivilegeError, NotReadyError."""
        if op.want is not None and any(one in NOT_PLAIN or not one.isprintable() for one in op.dev):
            raise NotReadyError(f"{op.dev} cannot have a filter: nft cannot write its name", hint="give it another one")
        with self._lock:
            for attempt in range(1, TRIES + 1):
                found = self._look(op.dev)
                try:
                    self._write_once(op, found)
                except KernelError as error:  # somebody was quicker
                    if error.errno not in DISTURBED or attempt == TRIES:
                        raise
                else:
                    return

    def _write_once(self, op: Filter, found: Found) -> None:
        if op.want is None:
            if found.nothing:
                return
            lasting = self._remove(op, found)
        else:
            facts = facts_in(op.want)
            if facts is None:  # the way back to what was not whole: what is in force stays, for that is closed
                return
            self._library = self._library or nft.context()
            nft.script("\n".join(commands(op.dev, facts, found)), op.describe(), self._library)
            lasting = True
        with refusals(op.describe()):
            # If nobody else has changed anything meanwhile, what NICs share is what it was, or has just been made.
            if lasting and self.nftables.generation() == found.generation + 1:
                self._shared = found.generation + 1, ()
        self._found.pop(op.dev, None)

    def _remove(self, op: Filter, found: Found) -> bool:
        """Remove what was found; returns whether the table stays, and was whole."""
        table, chain = self.nftables, shape.chain_of(op.dev)
        own = sum(name == "guests" for name, _ in found.entries)
        last = table.count("guests") <= own  # it takes the tables along
        own_table: list[Request] = []
        guards: list[Request] = []
        with refusals(op.describe()):
            if last and THE_TABLE not in found.missing:
                own_table.append(WITHOUT_TABLE)
            elif not last:
                own_table += [remove(name, keyed(key, end)) for name, (key, end, _) in found.entries]
                own_table += () if found.marks is None else without_chain(chain)
            if last and (itself := self.guards.itself()) and itself[1] <= (found.guard is not None):
                guards.append(WITHOUT_TABLE)
            elif found.guard is not None:
                guards += without_chain(chain)
            table.change(own_table, (self.guards, guards), generation=found.generation)
        return not last and not found.missing


_KEEPING = Lock()
_KEPT: dict[bytes, Filters] = {}  # of the namespace that was asked last


def of_namespace(other: socket.socket) -> Filters:
    """The filters of the network namespace that *other* is of. They are kept, with their socket, for the next run."""
    cookie = other.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    with _KEEPING, refusals("asking nftables"):
        found = _KEPT.get(cookie)
        if found is None or found.owner != os.getpid():  # a child must not use its parent's socket
            for one in _KEPT.values():
                one.close()
            _KEPT.clear()
            found = _KEPT[cookie] = Filters()
        return found


def missing(table: Nftables) -> Iterator[str]:
    """What is not as it is to be of what NICs share. Raises NotReadyError if the table is not ours."""
    itself = table.itself()
    if itself is None:
        yield THE_TABLE
        return
    flags, used = itself
    if flags & NFT_TABLE_F_OWNER:
        raise not_ours("a running program owns it")
    known = [table.set_types(name) for name in shape.TYPES]
    wrong = [name for name, one in zip(shape.TYPES, known, strict=True) if one and not fits(one, shape.TYPES[name])]
    if wrong:
        raise not_ours(f"its set {wrong[0]} is another one")
    base = table.chain(shape.BASE)
    marks = {name: table.comments(name) for name in shape.SHARED}
    if used and not any(known):
        raise not_ours("it has none of our sets")
    if flags & NFT_TABLE_F_DORMANT:
        yield "the table, which sleeps"
    yield from (f"{shape.TYPES[name][0]} {name}" for name, one in zip(shape.TYPES, known, strict=True) if not one)
    if base is None:
        yield f"chain {shape.BASE}"
    elif base != HOOKED:
        yield BASE_CHAIN
    wanted = shape.shared_marks()
    yield from (f"chain {name}" for name, found in marks.items() if found != wanted[name])


def not_ours(why: str) -> NotReadyError:
    """The error for a table of somebody else."""
    return NotReadyError(
        f"the table {shape.HERE} of nftables is not ours: {why}",
        hint=f"`nft delete table {shape.HERE}` if nobody needs it",
    )


def fits(found: tuple[int, int, int], wanted: tuple[str, str]) -> bool:
    """Whether a set is what `filter_shape.TYPES` says."""
    flags, key, data = found
    types, _, verdict = wanted[1].partition(";")[0].removeprefix("type ").partition(" : ")
    number = 0
    for one in types.split(" . "):
        number = number << 6 | TYPES[one]
    is_map = bool(verdict)
    return (
        key == number
        and bool(flags & NFT_SET_INTERVAL) == ("interval" in wanted[1])
        and (bool(flags & NFT_SET_MAP), data == NFT_DATA_VERDICT) == (is_map, is_map)
    )


def element(name: str, entry: Entry) -> Element:
    """An element as `filter_shape` has it."""
    key, end, verdict = entry
    size = KEYS.get(name, 0)
    raw, last = (one[IFNAMSIZ : IFNAMSIZ + size] for one in (key, end or key))
    if size == MAC:
        return name, raw.hex(":"), verdict
    if not size:
        return name, "", verdict
    return name, spanned(raw, last), verdict


def spanned(first: bytes, last: bytes) -> str:
    """The prefix from one address to another; "FIRST-LAST" if that is none."""
    make = IPv4Address if len(first) == IP4 else IPv6Address
    if first == last:
        return str(make(first))
    found: list[Prefix] = list(summarize_address_range(make(first), make(last)))
    return str(found[0]) if len(found) == 1 else f"{make(first)}-{make(last)}"


def facts_in(value: str) -> Facts | None:
    """The facts in a value of `Filter`; None if it has none, because what was found was not whole."""
    said = value.partition(filters.BROKEN)[0]
    return None if said == NOTHING_WHOLE else filters.parsed(said)


def commands(tap: str, facts: Facts, found: Found) -> Iterator[str]:
    """What makes *facts* of what was found: one transaction, which leaves alone what is right."""
    if found.missing:
        yield from shape.shared_part(hooked=BASE_CHAIN in found.missing)
    chain = shape.chain_of(tap)
    if found.marks != own_marks(tap, facts):
        yield f"add chain {shape.HERE} {chain}"
        yield from shape.added(chain, shape.own_rules(facts))
    if found.guard != guard_marks(tap, facts):
        yield from shape.guard(tap, facts, there=found.guard is not None)
    wanted = shape.elements(tap, facts)
    # One whose chain is another now has to go before it can come again.
    yield from (shape.element("delete", tap, one) for one in sorted(found.elements - wanted))
    yield from (shape.element("add", tap, one) for one in sorted(wanted - found.elements))


def by_hand(op: Filter, now: object) -> Iterator[str]:
    """What nft(8) is to be told to make what *op* wants of *now*: first what NICs share, then what is the NIC's own."""
    said = None if now is None else str(now)
    damage = said.partition(filters.BROKEN)[2].rstrip(")").split(", ") if said else [THE_TABLE]
    before = facts_in(said) if said else None
    elements = shape.elements(op.dev, before) if before else frozenset()
    wanted = facts_in(op.want) if op.want else None
    if wanted is None:
        yield one_line(
            (
                *(shape.element("delete", op.dev, one) for one in sorted(elements)),
                f"flush chain {shape.HERE} {shape.chain_of(op.dev)}",
                f"delete chain {shape.HERE} {shape.chain_of(op.dev)}",
                *shape.no_guard(op.dev),
            )
        )
        return
    if damage != [""]:
        yield one_line(shape.shared_part(hooked=BASE_CHAIN in damage))
    found = Found(())
    if before and damage == [""]:
        found = Found((), elements, own_marks(op.dev, before), guard_marks(op.dev, before))
    yield one_line(commands(op.dev, wanted, found))


def one_line(words: Iterable[str]) -> str:
    """Several commands for nft as one. (Two commands for the shell are told apart by a semicolon and a blank.)"""
    return ";".join(words).replace("; ", ";")
