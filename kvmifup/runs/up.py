"""Run pre or post for NICs, all or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations

from kvmifup import phases
from kvmifup.core.errors import NotReadyError
from kvmifup.core.model import Nic, Phase
from kvmifup.runs.announcing import carry_out
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.planning import prepare
from kvmifup.runs.session import Session, about

# --- up -------------------------------------------------------------------------------------------------


def up(asked: Phase, nics: Sequence[Nic], session: Session, *, announce: bool) -> list[Outcome]:
    """Run phase *asked* for all *nics*, or for none of them.

    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    need_own_addresses(nics)
    with ExitStack() as stack:
        stack.enter_context(about(", ".join(nic.label for nic in nics)))
        session.locked(stack, [nic.tap for nic in nics])
        # An earlier guest on this tap may have left something to clear up.
        session.share(stack, nics, (journal for nic in nics if (journal := session.store.load(nic.tap))))
        prepared = []
        for nic in nics:
            with about(nic.label):
                prepared.append(prepare(phases.effective(asked, nic), nic, session, announce=announce))
        if not session.dry:
            return carry_out(prepared, session.kernel, session.store)
    return [outcome for outcome, _ in prepared]


def need_own_addresses(nics: Sequence[Nic]) -> None:
    """Raise NotReadyError if two of *nics* have the same address."""
    for one, other in combinations(nics, 2):
        with about(one.label):
            if prefix := one.shares(other):
                raise NotReadyError(f"{prefix} is on {other.label}, too", hint="an address can be on one NIC only")
