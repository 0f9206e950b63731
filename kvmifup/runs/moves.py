"""What the agent runs: a guest is to come or leaves; what was lost is put back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from kvmifup import phases
from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Nic, Phase
from kvmifup.core.ops import LinkMtu, Op
from kvmifup.node.overview import Overview
from kvmifup.runs.announcing import carry_out
from kvmifup.runs.apply import save_or_mark, survey
from kvmifup.runs.journal import Journal, Mark, marked
from kvmifup.runs.leftovers import revert
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.planning import prepare
from kvmifup.runs.session import Session, about, alive


def begin(nic: Nic, session: Session) -> Outcome | None:
    """pre for *nic*, whose guest is to come; None if its tap has been wired for it by now.

    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(nic.label))
        session.locked(stack, [nic.tap])
        journal = session.load(nic.tap)
        if journal and alive(journal, session) and journal.nic.mac == nic.mac:
            return None
        session.share(stack, [nic], [journal] if journal else [])
        prepared = prepare(Phase.PRE, nic, journal, session, announce=False)
        return carry_out([prepared], session.kernel, session.store)[0]


def limited(nic: Nic, addresses: Collection[str]) -> Nic:
    """*nic*, with only those of its addresses that are among *addresses*: its guest has these, so it is not asked."""
    ip = tuple(prefix for prefix in nic.ip if phases.is_host(prefix) and phases.bare(prefix) in addresses)
    return replace(nic, ip=ip, to_ask=False)


def run_post(
    tap: str, wanted: Callable[[Journal], bool], session: Session, known: Callable[[Nic], Nic] = lambda nic: nic
) -> Outcome | None:
    """post for the NIC whose journal *tap* has, whoever wired it; None if it is not the *wanted* one (any more).

    *known* gives the NIC as it is known by now.
    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    with holding(tap, session, lambda journal: journal.phase is not Phase.DOWN and wanted(journal)) as journal:
        if journal is None:
            return None
        return run(Phase.POST, known(journal.nic), journal, session, admitted=False)


def mend(tap: str, most: Phase, session: Session, mtu: int | None = None) -> Outcome | None:
    """Make true again what the NIC on *tap* has reached, but no more than *most*; None if there is nothing to do.

    *mtu*: what the tap's was before somebody changed it, and its bridge has followed. The bridge does so once more.
    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    with holding(tap, session, lambda journal: journal.phase is not Phase.DOWN) as journal:
        if journal is None:
            return None
        first = survey([LinkMtu(tap, mtu)], session.kernel) if mtu else ()
        for change in first:
            session.kernel.write(change.op)
        outcome = run(min(journal.phase, most), journal.nic, journal, session, admitted=True)
        return replace(outcome, changes=(*first, *outcome.changes))


def restrict(taps: Sequence[str], session: Session) -> list[Outcome]:
    """Make true again, all at once, what their journals say of that which the guests on *taps* must not do.

    The journals know already how to undo it. So nothing is noted before, and nothing is put back after a failure or a
    crash: that would open who was closed. One whose lock somebody else holds, or whose journal cannot be read, is left
    out. Raises KernelError, and what `Kernel.write_all` raises.
    """
    at_once = replace(session, config=replace(session.config, lock_timeout=0.0))
    with ExitStack() as stack:
        journals = []
        for tap in taps:
            with suppress(KvmIfupError):  # who looks at that one alone says what is wrong
                at_once.locked(stack, [tap])
                journal = session.load(tap)
                if journal and journal.phase is not Phase.DOWN and not journal.pending:
                    journals.append(journal)
        seen = Overview()
        stack.callback(seen.close)
        here = [one for one in journals if alive(one, replace(session, kernel=seen))]
        found = [(one.nic, one.phase, survey(restricting(one), seen)) for one in here]
        session.kernel.write_all([change.op for _, _, changes in found for change in changes if change.needed])
        return [Outcome(nic.label, nic, nic.tap, phase, changes=changes) for nic, phase, changes in found]


def restricting(journal: Journal) -> list[Op]:
    """What *journal* has of that which the guest must not do."""
    return [entry.op for entry in journal.entries if entry.op.restricts and entry.op.wanted is not None]


def run(phase: Phase, nic: Nic, journal: Journal, session: Session, *, admitted: bool) -> Outcome:
    """Do *phase* for *nic*, whose locks are held, and whose tap has this *journal*. Raises what `mend` raises."""
    prepared = prepare(phase, nic, journal, session, announce=False, admitted=admitted)
    return carry_out([prepared], session.kernel, session.store)[0]


def withdraw(tap: str, session: Session, guest: tuple[int, str], silent: Callable[[], bool]) -> Outcome | None:
    """Undo what draws the traffic of the guest on *tap* here: it has left. The rest stays, as it was after pre.

    *guest*: only for this one, with the tap's index and its MAC; by now the tap may be another's.
    *silent*: only if it still is, once nobody else works on the tap.
    None if there is nothing to undo. Raises LockTimeoutError, JournalError, NamespaceError, RollbackError.
    """

    def wanted(journal: Journal) -> bool:
        return answered_for(journal) and guest == (journal.ifindex, journal.nic.mac)

    with holding(tap, session, wanted) as journal:
        away = tuple(entry for entry in journal.entries if phases.only_here(entry.op)) if journal else ()
        if journal is None or not away or not silent():
            return None
        undone = revert(session.store.mark(journal, Mark.LEAVING), session)
        save_or_mark(session.store, session.dated(marked(journal, Mark.LEFT)), Mark.LEFT)
        return Outcome(journal.nic.label, journal.nic, tap, Phase.PRE, undone)


def answered_for(journal: Journal) -> bool:
    """Whether post has been done: this node answers for the guest."""
    return journal.phase is Phase.POST


@contextmanager
def holding(tap: str, session: Session, wanted: Callable[[Journal], bool]) -> Iterator[Journal | None]:
    """Hold the lock of *tap*, and that of what it shares; yields its journal.

    None if it has none, or it is not the *wanted* one, its tap is another one now, or a killed run has left
    something to undo. Raises LockTimeoutError, JournalError and NamespaceError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        journal = session.load(tap)
        if journal is None or journal.pending or not alive(journal, session) or not wanted(journal):
            yield None
            return
        session.share(stack, [], [journal])
        stack.enter_context(about(journal.nic.label))
        yield journal
