"""A guest that arrives: post is prepared before, done and announced at its first frame, and then noted."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import replace

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Phase
from kvmifup.core.ops import Announce, Sysctl, UplinkVlans
from kvmifup.core.records import record
from kvmifup.node import announce
from kvmifup.runs.announcing import first_round
from kvmifup.runs.apply import Doing, Job
from kvmifup.runs.draft import ARMED
from kvmifup.runs.index import Stamp
from kvmifup.runs.journal import Journal
from kvmifup.runs.moves import holding, limited
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.planning import prepare
from kvmifup.runs.session import Session, about

PATIENCE = 0.5  # seconds to wait for what is shared when an arrival has to be undone; longer, and others do so
MANY = 100  # changes: more of them take so long that the agent has a thread make them


@record
class PreparedArrival:
    """post for a NIC whose guest has yet to arrive: computed, admitted and noted, so that only the doing is left.

    *stamp* is its journal's, *devices* are those that the ops are about, with their indices.
    """

    outcome: Outcome
    job: Job
    stamp: Stamp | None
    devices: tuple[tuple[str, int | None], ...]

    @property
    def waits(self) -> bool:
        """Whether it can take long."""
        return len(self.job.needed) > MANY or any(change.op.waits for change in self.job.needed)


def prepare_arrival(tap: str, session: Session, only: Collection[str] | None = None) -> PreparedArrival | None:
    """Find out what post will have to do for *tap*; None if its NIC does not wait for its guest.

    Also if the guest could do too much now: it is closed by whoever mends it, and if its arrival fails that must stay.
    *only*: for these of its addresses, and no others.
    Raises what `phases.plan` raises, LockTimeoutError, JournalError and NamespaceError.
    """
    with holding(tap, session, lambda journal: journal.phase is Phase.PRE) as journal:
        if journal is None:
            return None
        nic = journal.nic if only is None else limited(journal.nic, only)
        outcome, job = prepare(Phase.POST, nic, journal, session, announce=False)
        if any(change.op.restricts and change.op.wanted is not None for change in job.needed):
            return None
        devices = dict.fromkeys(dev for change in job.changes if (dev := getattr(change.op, "dev", None)))
        indices = tuple((dev, session.kernel.ifindex(dev)) for dev in devices)
        if only is None and job.pending.pending:
            with suppress(KvmIfupError):  # no space: then there is none at its arrival either, or there is again
                job = replace(job, noted=session.store.draft(job.pending, ARMED))
        for change in job.needed:
            if isinstance(change.op, Announce):
                announce.make_ready(change.op.messages)
        return PreparedArrival(outcome, job, session.store.stamp(tap), indices)


class Arriving:
    """A guest for which post has been done and announced. Its journal still says what to undo, until it is `finish`ed.

    Until then the lock of its tap is held. What taps share is not locked: as after a crash, what others can read in
    the journal claims the same as when it is finished.
    """

    def __init__(self, outcome: Outcome, journal: Journal, doing: Doing, locks: ExitStack, session: Session) -> None:
        self.outcome = outcome
        self.journal = journal
        self._doing = doing
        self._locks = locks
        self._session = session

    def finish(self) -> Stamp | None:
        """Make the journal say what is true now; returns its stamp. If that fails, all is undone. Raises as `apply`."""
        with self._locks, about(self.outcome.label):
            with self._doing.all_or_none(self._sharing):
                self._doing.settle()
            return self._session.store.stamp(self.outcome.tap)

    def _sharing(self) -> ExitStack:
        with ExitStack() as stack:
            config = replace(self._session.config, lock_timeout=PATIENCE)
            replace(self._session, config=config).share(stack, [], [self.journal])
            return stack.pop_all()


def arrive(prepared: PreparedArrival, session: Session) -> Arriving | None:
    """Do what is *prepared*, and announce it; None, and nothing was done, if anything has changed since.

    Only what others may change at any time is read again. The rest was checked when it was prepared, and the agent
    has everything checked again a moment later.
    Raises LockTimeoutError, and what `apply.apply` raises.
    """
    with ExitStack() as locks, ExitStack() as shared, about(prepared.outcome.label):
        session.locked(locks, [prepared.outcome.tap])
        session.share(shared, [], [prepared.job.before])
        if not is_as_prepared(prepared, session):
            return None
        assert prepared.job.after is not None
        after = session.dated(prepared.job.after)
        job = replace(prepared.job, after=after)
        doing = Doing([job], session.kernel, session.store)
        with doing.all_or_none():
            doing.change()
        told = replace(prepared.outcome, remarks=(*prepared.outcome.remarks, *first_round(job, session.kernel)))
        return Arriving(told, after, doing, locks.pop_all(), session)


def arrive_wholly(prepared: PreparedArrival, session: Session) -> Outcome | None:
    """The same, and finish it."""
    arriving = arrive(prepared, session)
    if arriving is None:
        return None
    arriving.finish()
    return arriving.outcome


def is_as_prepared(prepared: PreparedArrival, session: Session) -> bool:
    """Whether journal, devices and shared settings still are as they were when *prepared* was."""
    kernel = session.kernel
    if session.store.stamp(prepared.outcome.tap) != prepared.stamp:
        return False
    if any(kernel.ifindex(dev) != index for dev, index in prepared.devices):
        return False
    mutable = (change for change in prepared.job.changes if isinstance(change.op, Sysctl | UplinkVlans))
    return all(kernel.read(change.op) == change.now for change in mutable if change.op.shared)
