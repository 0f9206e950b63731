"""The filters of bridged NICs: what there is of one in nftables, and how it becomes what it is to be.

A change of one NIC is one transaction. What all NICs share is made by libnftables, once, with the first of them. What
is a NIC's own are elements, and a chain with one rule, and takes one message.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

from kvmifup.core.errors import KernelError, NotReadyError
from kvmifup.core.ops import Filter
from kvmifup.node import filter_shape as shape
from kvmifup.node import nft
from kvmifup.node.filter_changes import changes, commands, guard_made, note
from kvmifup.node.filter_rules import RESERVED
from kvmifup.node.filter_shape import GUARD, HERE, SETS
from kvmifup.node.filter_table import (
    THE_TABLE,
    Found,
    device_in,
    element,
    entries_for,
    everything,
    facts_in,
    guard_of,
    hooked_on,
    made_now,
    missing_of_both,
    text,
)
from kvmifup.node.messages import NetlinkError, attributes, failure
from kvmifup.node.nfevents import Heard
from kvmifup.node.nfmessages import (
    NFPROTO_BRIDGE,
    NFPROTO_NETDEV,
    WITHOUT_TABLE,
    Entry,
    Request,
    device_key,
    entries,
    entry_of,
    keyed,
    keys_of,
    listed,
    without_chain,
)
from kvmifup.node.nfnetlink import DISTURBED, Nftables, held
from kvmifup.node.refusals import refusals

SO_NETNS_COOKIE = 71  # asm-generic/socket.h
TRIES = 8  # of a change that other changes disturb
UNKNOWN = -1  # no generation
OURS = frozenset((NFPROTO_BRIDGE, NFPROTO_NETDEV))
KEPT_TAPS = 4096  # of which is kept what there is
NOT_PLAIN = '"\\*'  # in the name of a tap: nft has no way to write it


class Filters:
    """The filters of one network namespace. Threads share it, one after the other.

    It keeps what it has read as long as the ruleset is of the same generation: any change of any table makes another.
    Only its own changes do not count: it knows what they have changed. Nor do those of which the kernel has told that
    they were about other tables.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.nftables = Nftables(NFPROTO_BRIDGE, nft.TABLE)
        self.guards = Nftables(NFPROTO_NETDEV, nft.TABLE, self.nftables)
        self._lock = Lock()
        self._library: Any = None
        self._heard: Heard | None = None
        self._generation = UNKNOWN  # of which is true what follows
        self._missing: tuple[str, ...] | None = None  # of what NICs share
        self._messages: dict[str, list[bytes]] = {}  # that have the elements of sets: of those taps that are not below
        self._guests: set[bytes] | None = None  # the taps that have a filter
        self._found: dict[str, Found] = {}  # by tap

    def close(self) -> None:
        """Close the sockets."""
        self.nftables.close()
        if self._heard:
            self._heard.close()

    def read(self, tap: str) -> str | None:
        """The value of `Filter` for *tap*. Raises KernelError, PrivilegeError, NotReadyError."""
        with self._lock:
            return text(self._look(tap), tap)

    def all(self) -> tuple[tuple[str, ...], dict[str, Found]]:
        """What is missing of what NICs share, and what there is of each tap: a dump of each set. Raises as `read`."""
        with self._lock, refusals("reading filters"):
            return everything(self.nftables, self.guards)[1:]

    # --- what there is ---------------------------------------------------------------------------------------

    def _forget(self, generation: int) -> None:
        self._generation, self._missing, self._guests = generation, None, None
        self._messages.clear()
        self._found.clear()

    def _look(self, tap: str) -> Found:
        """What there is for *tap*. Raises KernelError, PrivilegeError; NotReadyError if the table is not ours."""
        with refusals(f"reading the filter of {tap}"):
            for _ in range(TRIES):
                self._heard = self._heard or Heard(OURS, nft.TABLE)
                generation = self.nftables.generation()
                if not self._is_still_true(generation) or len(self._found) > KEPT_TAPS:
                    self._forget(generation)
                self._generation = generation
                if tap in self._found:
                    return self._with_its_chain(tap)
                found = self._look_once(tap)
                if self.nftables.generation() == generation:
                    self._found[tap] = found
                    break
            return found

    def _is_still_true(self, generation: int) -> bool:
        """Whether what is known is true of *generation* as well."""
        if generation == self._generation or self._heard is None:
            return generation == self._generation
        return self._heard.only_others(self._generation, generation) and self._generation != UNKNOWN

    def _look_once(self, tap: str) -> Found:
        if self._missing is None:
            self._missing = missing_of_both(self.nftables, self.guards)
        found = frozenset((name, one) for name in SETS for one in self._entries(name, tap))
        return Found(self._missing, found, guard_of(self.guards, tap))

    def _entries(self, name: str, tap: str) -> Iterator[Entry]:
        """The elements of the set *name* that are about *tap*. One that has nothing but taps is not read whole."""
        table = self.guards if SETS[name].table == GUARD else self.nftables
        if SETS[name].size:
            if name not in self._messages:
                self._messages[name] = table.messages(name)
            for message in self._messages[name]:
                yield from entries(message, device_key(tap))
        elif (found := table.element(name, keyed(device_key(tap)))) is not None:
            yield entry_of(found)

    def _with_its_chain(self, tap: str) -> Found:
        """What was found for *tap*. Its own chain goes with the device, and that makes no new generation."""
        found = self._found[tap]
        if found.guard is not None and self.guards.chain(shape.chain_of(tap)) != hooked_on(tap):
            found = self._found[tap] = replace(found, guard=guard_of(self.guards, tap))
        return found

    # --- changing it -----------------------------------------------------------------------------------------

    def write(self, op: Filter) -> None:
        """Make what *op* wants true, all of it or nothing. Raises KernelError, PrivilegeError, NotReadyError."""
        need_plain_name(op)
        with self._lock:
            for attempt in range(1, TRIES + 1):
                found = self._look(op.dev)
                try:
                    self._write_once(op, found)
                except KernelError as error:  # somebody was quicker
                    self._forget(UNKNOWN)
                    if error.errno not in DISTURBED or attempt == TRIES:
                        raise
                else:
                    return

    def write_all(self, ops: Sequence[Filter]) -> None:
        """Make what *ops* want true: a filter for each tap, none of them without one. Raises as `write`.

        What NICs share is made with the first of them, where it is missing; the others are one transaction.
        """
        for op in ops:
            need_plain_name(op)
        whole = [op for op in ops if facts_in(op.want or "")]  # as in `_write_once`
        for attempt in range(1, TRIES + 1):
            for op in whole[:1]:
                self.write(op)
            if len(whole) < 2:
                return
            with self._lock, refusals("restricting guests"):
                try:
                    self._write_others(whole[1:])
                except NetlinkError as error:
                    if error.errno not in DISTURBED or attempt == TRIES:
                        raise
                else:
                    return

    def _write_others(self, ops: Sequence[Filter]) -> None:
        generation, lacking, every = everything(self.nftables, self.guards)
        if lacking:
            raise failure(errno.ERESTART)
        before: set[tuple[str, Entry]] = set()
        after: set[tuple[str, Entry]] = set()
        guards: list[Request] = []
        for op in ops:
            facts, found = facts_in(op.want or ""), every.get(op.dev, Found(()))
            assert facts is not None
            before |= found.entries
            after |= entries_for(op.dev, facts)
            if found.guard != shape.guard_marks(op.dev):
                guards += () if found.guard is None else without_chain(shape.chain_of(op.dev))
                guards += guard_made(op.dev)
        elements = frozenset(before), frozenset(after)
        here = [*changes(HERE, *elements)]
        self._forget(UNKNOWN)
        self.nftables.change(here, (self.guards, [*changes(GUARD, *elements), *guards]), generation=generation)

    def _write_once(self, op: Filter, found: Found) -> None:
        tap, facts = op.dev, None if op.want is None else facts_in(op.want)
        if op.want is None:
            self._remove(op, found)
        elif facts is None:  # the way back to what was not whole: what is in force stays, for that is closed
            return
        elif found.missing:
            self._library = self._library or nft.context()
            words = (*commands(tap, facts, found), *self._numbers(tap, found.missing))
            nft.script("\n".join(words), op.describe(), self._library)
            self._forget(UNKNOWN)
            self._note(op)
        else:
            due = Found((), entries_for(tap, facts), shape.guard_marks(tap))
            guards = [*changes(GUARD, found.entries, due.entries)]
            if found.guard != due.guard:
                guards += () if found.guard is None else without_chain(shape.chain_of(tap))
                guards += guard_made(tap)
            self._change(op, [*changes(HERE, found.entries, due.entries)], guards, due)

    def _note(self, op: Filter) -> None:
        """Note what the rules look like that were just made, unless too much is changed at the same time.

        Without that, their comments alone say whether they are right.
        """
        with refusals(op.describe()):
            for _ in range(TRIES):
                generation = self.nftables.generation()
                try:
                    self.nftables.change([*note(made_now(self.nftables, self.guards))], generation=generation)
                    return
                except NetlinkError as error:
                    if error.errno not in DISTURBED:
                        raise

    def _numbers(self, tap: str, missing: tuple[str, ...]) -> Iterator[str]:
        """The commands that put what other NICs have into sets of numbers that are not there.

        An older kvm-ifup had rules of each NIC instead, which those that NICs share do not use any more.
        """
        for name in SETS:
            origin = name.removeprefix(shape.INNER)
            if name == origin or f"set {name}" not in missing or f"set {origin}" in missing:
                continue
            for one in map(entry_of, self.nftables.elements(origin)):
                other = device_in(one[0])
                if other != tap:
                    yield shape.element("add", other, (name, element(origin, one)[1], ""))

    def _remove(self, op: Filter, found: Found) -> None:
        """Remove what was found. The last one takes the tables along."""
        if found.nothing:
            return
        tap, nothing = op.dev, Found(())
        here, guards = ([*changes(table, found.entries, nothing.entries)] for table in (HERE, GUARD))
        guards += () if found.guard is None else without_chain(shape.chain_of(tap))
        with refusals(op.describe()):
            if last := not self._others(tap):
                here = [] if THE_TABLE in found.missing else [WITHOUT_TABLE]
                guards = guards if self._is_shared(found) else [WITHOUT_TABLE]
        self._change(op, here, guards, None if last or found.missing else nothing)

    def _others(self, tap: str) -> set[bytes]:
        """The other taps that have a filter."""
        if self._guests is None:
            parts = map(held, self.nftables.messages("guests"))
            self._guests = {keys_of(attributes(one))[0] for part in parts for one in listed(part)}
        return self._guests - {device_key(tap)}

    def _is_shared(self, found: Found) -> bool:
        """Whether the table on taps has more than what is ours, and of the one NIC. Not: there is none."""
        itself = self.guards.itself()
        ours = len(self.guards.sets().keys() & SETS.keys()) + (self.guards.chain(RESERVED) is not None)
        return itself is None or itself[1] > ours + (found.guard is not None)

    def _change(self, op: Filter, here: list[Request], guards: list[Request], due: Found | None) -> None:
        """Change both tables; then there is for the tap what is *due*. None: what NICs share is not what it was."""
        if not here and not guards:
            return
        with refusals(op.describe()):
            self.nftables.change(here, (self.guards, guards), generation=self._generation)
            generation = self.nftables.generation()
        if due is None or generation != self._generation + 1:  # somebody else has changed something meanwhile
            self._forget(UNKNOWN)
            return
        if self._heard:  # or what it has heard of our own changes would fill it
            self._heard.only_others(self._generation, generation)
        self._generation, self._found[op.dev] = generation, due
        if self._guests is not None:
            self._guests = self._others(op.dev) | ({device_key(op.dev)} if due.entries else set())


class AllFilters:
    """The filters as they are when this is made, for who only looks, and at all of them."""

    def __init__(self, filters: Filters) -> None:
        self._missing, self._found = filters.all()

    def read(self, tap: str) -> str | None:
        """As `Filters.read`."""
        return text(self._found.get(tap, Found(self._missing)), tap)


def need_plain_name(op: Filter) -> None:
    """Raise NotReadyError if there can be no filter for a tap of that name."""
    if op.want is not None and any(one in NOT_PLAIN or not one.isprintable() for one in op.dev):
        raise NotReadyError(f"{op.dev} cannot have a filter: nft cannot write its name", hint="give it another one")


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
