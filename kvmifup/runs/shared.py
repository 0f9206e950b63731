"""What several NICs share: settings of an uplink and addresses, and who else needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvmifup.core.model import Nic, NodeFacts
from kvmifup.core.ops import Op
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
    return replace(facts, taken=(*claims, *facts.taken))


def unshared(journal: Journal, entries: Sequence[Entry], session: Session) -> list[Entry]:
    """Those of *entries* that no other live tap needs as well."""
    return [
        entry for entry in entries if not (entry.op.shared and claimed_elsewhere(entry.op, journal.nic.tap, session))
    ]
