"""Undo all that was done for a tap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from kvmifup import phases
from kvmifup.core.model import Nic, NodeFacts, Phase
from kvmifup.core.ops import Op
from kvmifup.inputs import nicfiles
from kvmifup.runs.apply import Job, apply, survey
from kvmifup.runs.journal import Journal
from kvmifup.runs.leftovers import forget
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session, about, alive
from kvmifup.runs.shared import with_claims

# --- down -----------------------------------------------------------------------------------------------


def down(tap: str, instance: str | None, describe: Callable[[], Nic | None], session: Session) -> Outcome:
    """Undo all that was done for *tap*; without a journal, withdraw the NIC that *describe* knows, if any.

    A second run succeeds. A tap that belongs to another guest than *instance* by now is left alone: names are
    reused at once, and a manager may be late.

    Raises LockTimeoutError, JournalError, NamespaceError, and RollbackError for what could not be undone.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        journal = session.load(tap)
        if journal is not None:
            owner = journal.nic.instance
            if None not in (owner, instance) and owner != instance and alive(journal, session):
                return Outcome(tap, None, tap, Phase.DOWN, remarks=(f"it is {journal.nic.label}'s now: left alone",))
            session.share(stack, [], [journal])
            undone = forget(journal, session)
            return Outcome(journal.nic.label, journal.nic, tap, Phase.DOWN, changes=undone)
        nic = describe()
        if nic is None:
            return Outcome(tap, None, tap, Phase.DOWN)
        session.share(stack, [nic])
        facts = with_claims(session.kernel.facts(nic, session.config), nic, session)
        changes = survey(present(phases.withdrawal(nic, facts), facts), session.kernel)
        if not session.dry:
            empty = Journal(
                nic,
                facts.tap.ifindex if facts.tap else 0,
                namespace=session.store.namespace,
                cookie=session.store.cookie,
            )
            apply([Job(changes, empty, False, None)], session.kernel, session.store)
        return Outcome(nic.label, nic, tap, Phase.DOWN, changes=changes)


def taps_of_instance(instance: str, session: Session) -> list[str]:
    """The taps that a journal or a NIC file gives to *instance*. Raises NicError."""
    taps = {nic.tap for nic in nicfiles.nics_of_instance(instance, session.run_dir)}
    taps |= {journal.nic.tap for journal in session.store.others("", instance) if journal.nic.instance == instance}
    return sorted(taps)


def present(ops: Sequence[Op], facts: NodeFacts) -> list[Op]:
    """Those of *ops* whose device is there; what was on another one went with it."""
    gone = {uplink.name for uplink in facts.uplinks if not uplink.present}
    return [op for op in ops if getattr(op, "dev", None) not in gone and (facts.tap or op.outlives_tap)]
