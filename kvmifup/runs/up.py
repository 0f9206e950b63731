"""Run pre or post for NICs, all or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations

from kvmifup import phases
from kvmifup.core.errors import NotReadyError
from kvmifup.core.model import Nic, Phase
from kvmifup.runs.announcing import carry_out
from kvmifup.runs.apply import Job
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.planning import prepare
from kvmifup.runs.session import Session, about, shares

# --- up -------------------------------------------------------------------------------------------------


def up(asked: Phase, nics: Sequence[Nic], session: Session, *, announce: bool) -> list[Outcome]:
    """Run phase *asked* for all *nics*, or for none of them.

    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    need_own_addresses(nics)
    with ExitStack() as stack:
        stack.enter_context(about(", ".join(nic.label for nic in nics)))
        session.locked(stack, [nic.tap for nic in nics])
        with ExitStack() as shared:
            prepared = sharing(asked, nics, session, shared, announce=announce)
            if session.dry:
                return [outcome for outcome, _ in prepared]
            slow = [nic for nic, (_, job) in zip(nics, prepared, strict=True) if is_slow(job) and not concerns_all(job)]
            if not slow or not any(concerns_all(job) for _, job in prepared):
                return carry_out(prepared, session.kernel, session.store)
        return slow_first(asked, nics, slow, prepared, session, announce=announce)


def sharing(
    asked: Phase, nics: Sequence[Nic], session: Session, stack: ExitStack, *, announce: bool
) -> list[tuple[Outcome, Job]]:
    """What *nics* need, as long as *stack* holds what they share. Raises as `up`."""
    # An earlier guest on this tap may have left something to clear up.
    journals = []
    for nic in nics:
        with about(nic.label):
            journals.append(session.store.load(nic.tap))
    session.share(stack, nics, filter(None, journals))
    prepared = []
    for nic, journal in zip(nics, journals, strict=True):
        with about(nic.label):
            prepared.append(prepare(phases.effective(asked, nic), nic, journal, session, announce=announce))
    return prepared


def slow_first(
    asked: Phase,
    nics: Sequence[Nic],
    slow: Sequence[Nic],
    prepared: Sequence[tuple[Outcome, Job]],
    session: Session,
    *,
    announce: bool,
) -> list[Outcome]:
    """Do what is *prepared* for the *slow* ones of *nics*; then plan the others once more, and do them. All, or none.

    Nobody else's guest waits for the lock of what is shared while an administrator's program runs, or a port learns.
    """
    outcomes: dict[str, Outcome] = {}

    def others() -> None:
        with ExitStack() as shared:
            later = sharing(asked, [nic for nic in nics if nic not in slow], session, shared, announce=announce)
            outcomes.update((one.tap, one) for one in carry_out(later, session.kernel, session.store))

    first = [one for nic, one in zip(nics, prepared, strict=True) if nic in slow]
    outcomes.update((one.tap, one) for one in carry_out(first, session.kernel, session.store, others))
    return [outcomes[nic.tap] for nic in nics]


def is_slow(job: Job) -> bool:
    """Whether *job* may have to wait for something."""
    return any(change.op.waits for change in job.needed)


def concerns_all(job: Job) -> bool:
    """Whether *job* is about something that taps share."""
    return shares(job.before) or (job.after is not None and shares(job.after))


def need_own_addresses(nics: Sequence[Nic]) -> None:
    """Raise NotReadyError if two of *nics* have the same address."""
    for one, other in combinations(nics, 2):
        with about(one.label):
            if prefix := one.shares(other):
                raise NotReadyError(f"{prefix} is on {other.label}, too", hint="an address can be on one NIC only")
