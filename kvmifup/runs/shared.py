"""What several NICs share: settings of an uplink and addresses, and who else needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvmifup.core.model import Nic, NodeFacts
from kvmifup.core.ops import Op, UplinkVlans, Value
from kvmifup.core.vlans import ids, tagged
from kvmifup.runs.index import NETWORKS, ROUTED
from kvmifup.runs.journal import Entry, Journal
from kvmifup.runs.session import Session, alive


def claimed_elsewhere(op: Op, tap: str, session: Session, *, dead: bool = False) -> Entry | None:
    """Another live tap's entry about the same shared value: it knows what was there before any of us.

    With *dead*, also the entry of a tap that is gone. One that this run will clear up itself, later, counts as well:
    the last of thousands that are dead undoes what they shared, and each has only to find one of the others.
    """
    for journal in session.store.others(tap, op.key):
        entry = journal.noted(op.key)
        if entry and (dead or journal.nic.tap in session.doomed or alive(journal, session)):
            return entry
    return None


def with_claims(facts: NodeFacts, nic: Nic, session: Session) -> NodeFacts:
    """*facts*, with the addresses that another live tap's journal holds added to those taken."""
    if nic.mode != "routed":
        return facts
    claims = [
        (str(prefix), f"is already on {other.nic.label}")
        for prefix in nic.ip
        for other in session.store.others(nic.tap, str(prefix))
        if other.nic.mode == "routed" and prefix in other.nic.prefixes and alive(other, session)
    ]
    # Who has a prefix, has all that is in it. Journals with single addresses matter only to a NIC with a prefix.
    names = ROUTED if nic.networks else NETWORKS
    claims += [
        (str(prefix), f"overlaps with what is on {other.nic.label}")
        for other in session.store.others(nic.tap, names)
        if (prefix := nic.shares(other.nic)) and prefix not in other.nic.prefixes and alive(other, session)
    ]
    return replace(facts, taken=(*claims, *facts.taken)) if claims else facts


def unshared(journal: Journal, entries: Sequence[Entry], session: Session) -> list[Entry]:
    """What of *entries* no other live tap needs as well."""
    found: list[Entry] = []
    for entry in entries:
        if isinstance(entry.op, UplinkVlans):
            found += without_others(entry, entry.op, journal.nic.tap, session)
        elif not (entry.op.shared and claimed_elsewhere(entry.op, journal.nic.tap, session)):
            found.append(entry)
    return found


# --- VLANs of an uplink: each counts for itself ---------------------------------------------------------------


def others_vlans(op: UplinkVlans, tap: str, session: Session, *, dead: bool) -> Iterator[tuple[UplinkVlans, Value]]:
    """What other taps' journals say of VLANs of the uplink of *op*, with those that were there before; as above."""
    for journal in session.store.others(tap, op.key):
        if dead or journal.nic.tap in session.doomed or alive(journal, session):
            for entry in (*journal.entries, *journal.pending):
                if isinstance(entry.op, UplinkVlans) and entry.op.key == op.key:
                    yield entry.op, entry.prior


def without_others(entry: Entry, op: UplinkVlans, tap: str, session: Session) -> list[Entry]:
    """*entry*, about *op*, with what others need left there when it is undone; none if nothing is left to undo."""
    stays = ids(str(entry.prior)).union(*(one.vids for one, _ in others_vlans(op, tap, session, dead=False)))
    return [Entry(op, tagged(op.vids & stays))] if op.vids - stays else []


def before_all(op: UplinkVlans, now: Value, earlier: Entry | None, tap: str, session: Session) -> Entry:
    """The entry about *op*, with those VLANs that were there before any of us, if *now* are there.

    *earlier*: what this NIC's journal has about it.
    """
    mine = [(earlier.op, earlier.prior)] if earlier and isinstance(earlier.op, UplinkVlans) else []
    made: set[int] = set()  # by us
    for one, prior in (*mine, *others_vlans(op, tap, session, dead=True)):
        made |= one.vids - ids(str(prior))
    found = ids(str(now)) | (ids(str(earlier.prior)) if earlier else frozenset())
    return Entry(op, tagged(op.vids & found - made))


def given_up(entry: Entry, op: Op) -> list[Entry]:
    """What of *entry* is to be undone when *op*, which is about the same, takes its place."""
    if not (isinstance(entry.op, UplinkVlans) and isinstance(op, UplinkVlans)) or not entry.op.vids - op.vids:
        return []
    gone = entry.op.of(entry.op.vids - op.vids)
    return [Entry(gone, tagged(gone.vids & ids(str(entry.prior))))]
