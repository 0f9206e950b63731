"""Clear up after dead NICs and killed runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from kvmifup.core.errors import (
    ForeignJournalError,
    JournalError,
    KernelError,
    KvmIfupError,
    NamespaceError,
    PrivilegeError,
    RollbackError,
    VanishedError,
)
from kvmifup.core.model import Nic, Phase
from kvmifup.phases import only_here
from kvmifup.runs.apply import Change, cause, put_back, save_or_mark, survey_undo
from kvmifup.runs.journal import Entry, Journal, Mark, marked
from kvmifup.runs.outcome import Outcome, Results
from kvmifup.runs.session import Session, alive
from kvmifup.runs.shared import unshared

# --- after a crash ----------------------------------------------------------------------------------------


def recover(journal: Journal, session: Session, nic: Nic | None = None) -> tuple[Journal | None, tuple[Change, ...]]:
    """Undo what a killed run was doing, or all that a dead NIC left; returns the journal that remains.

    On a tap that outlives its guests, one that is to be *nic*'s by now is like a dead NIC: how far another guest had
    come says nothing about this one.
    """
    if not alive(journal, session) or (nic and is_another(nic, journal.nic)):
        return None, forget(journal, session)
    if not journal.pending:
        return journal, ()
    undone = revert(journal, session)
    rest = replace(journal, pending=())
    if rest.phase is Phase.DOWN and not rest.entries:
        if not session.dry:
            session.store.delete(journal.nic.tap)
        return None, undone
    if not session.dry:
        save_or_mark(session.store, rest, Mark.SETTLED)
    return rest, undone


def is_another(nic: Nic, earlier: Nic) -> bool:
    """Whether *nic* is not the NIC that *earlier* was: it has another MAC, or is another guest's.

    Its number does not count: managers number a guest's NICs anew when one of them goes. Not every caller names the
    guest.
    """
    return nic.mac != earlier.mac or (None not in (nic.instance, earlier.instance) and nic.instance != earlier.instance)


def forget(journal: Journal, session: Session) -> tuple[Change, ...]:
    """Undo everything that *journal* knows, then remove it; returns what was undone.

    First the journal says that all is to be undone, so that after a crash the next run goes on with that.
    Raises PrivilegeError when we may not, RollbackError for what could not be undone.
    """
    if session.dry:
        return revert(marked(journal, Mark.UNDO), session)
    doomed = session.store.mark(journal, Mark.UNDO)
    try:
        undone = revert(doomed, session)
    except PrivilegeError:
        session.store.mark(journal, Mark.NONE)
        raise
    session.store.delete(journal.nic.tap)
    return undone


def stands(journal: Journal, session: Session) -> bool:
    """Whether anything that *journal* knows is still as it was made, so that there is something to undo.

    A value that others share may be theirs by now, and says nothing. (Of a dead tap a proxy neighbour may be all that
    is left.) What cannot be read counts as standing, and so does a NIC for which nothing had to be made.
    Raises KernelError.
    """
    entries = (*journal.entries, *journal.pending)
    if alive(journal, session):
        mine = [entry for entry in entries if not entry.op.shared]
    else:
        mine = [entry for entry in entries if entry.op.outlives_tap]
        mine = [entry for entry in mine if only_here(entry.op) or not entry.op.shared]
    return not entries or any(made(entry, session) for entry in mine)


def made(entry: Entry, session: Session) -> bool:
    """Whether what *entry* is about is as it was made, and not as it was before. Raises KernelError."""
    with suppress(VanishedError):
        return not entry.op.readable or session.kernel.read(entry.op) == entry.op.wanted != entry.prior
    return False


def revert(journal: Journal, session: Session) -> tuple[Change, ...]:
    """Undo what is pending in *journal*; returns what was undone.

    If the tap is another device now, only what outlives a tap is undone. A shared value stays while another
    live tap needs it. Raises PrivilegeError when we may not, RollbackError for what could not be undone;
    the journal then has what is left.
    """
    live = alive(journal, session)
    mine = unshared(journal, [entry for entry in journal.pending if live or entry.op.outlives_tap], session)
    if session.dry:
        return survey_undo(mine, session.kernel, past=KvmIfupError)
    changes, problems = put_back(mine, session.kernel)
    for _, error in problems:
        if isinstance(error, PrivilegeError):
            raise error.at(journal.nic.label)
    if problems:
        failed = {id(entry) for entry, _ in problems}
        left = tuple(entry for entry in mine if id(entry) in failed)
        with suppress(KernelError):  # then all of it is still to be undone
            session.store.save(replace(journal, pending=left))
        given_up = f"`rm {session.store.path(journal.nic.tap)}`"
        raise RollbackError(
            f"could not put back: {'; '.join(cause(error) for _, error in problems)}",
            hint=f"mend that, then `kvm-ifup gc`; to leave it as it is, {given_up}",
        ).at(journal.nic.label)
    return changes


def collect(session: Session, taps: Sequence[str] | None = None) -> Results:
    """Clear up after dead NICs and killed runs, of *taps* or of all; each for itself.

    A journal of another network namespace is left alone: whether its tap is alive cannot be seen from here.
    """
    outcomes: list[Outcome] = []
    failures: list[KvmIfupError] = []
    taps = session.store.taps() if taps is None else taps
    doomed = set(taps)
    session = replace(session, doomed=doomed)
    for tap in taps:
        doomed.discard(tap)
        try:
            with ExitStack() as stack:
                session.locked(stack, [tap])
                try:
                    journal = session.load(tap)
                except NamespaceError:
                    continue
                except ForeignJournalError:
                    raise
                except JournalError as error:
                    where = "" if session.dry else f"; it is now {session.store.set_aside(tap)}"
                    outcomes.append(Outcome(tap, None, tap, Phase.DOWN, remarks=(f"{error}{where}",)))
                    continue
                if journal is None and not session.dry:
                    session.store.delete(tap)  # of a network namespace that is gone, with all that was in it
                if journal is not None and (journal.pending or not alive(journal, session)):
                    session.share(stack, [], [journal])
                    _, undone = recover(journal, session)
                    outcomes.append(Outcome(journal.nic.label, journal.nic, tap, Phase.DOWN, undone))
        except KvmIfupError as error:
            failures.append(error.at(tap))
    return outcomes, failures
