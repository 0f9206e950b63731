"""One run of a hook: lock, clear up after the dead, read the facts, plan, apply, remember."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from kvmifup import inputs, locks, phases
from kvmifup.apply import Change, Job, Node, apply, cause, survey, undo
from kvmifup.errors import (
    JournalError,
    KvmIfupError,
    LockTimeoutError,
    NamespaceError,
    PrivilegeError,
    RollbackError,
    VanishedError,
)
from kvmifup.journal import Entry, Journal, Stamp, Store
from kvmifup.model import Config, Nic, NodeFacts, Phase
from kvmifup.ops import Announce, Op, Sysctl, Value


@dataclass(frozen=True)
class Outcome:
    """What was done for one NIC, or would be: *undone* first (leftovers of a dead NIC), then *changes*."""

    label: str
    nic: Nic | None
    tap: str
    phase: Phase
    undone: tuple[Change, ...] = ()
    changes: tuple[Change, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def announced(self) -> tuple[tuple[str, str, str], ...]:
        """The messages whose first round has been sent."""
        return tuple(
            message
            for change in self.changes
            if change.needed and isinstance(change.op, Announce)
            for message in change.op.messages
        )


class Host(Node, Protocol):
    """A node that can also be asked for facts: `kvmifup.kernel.Kernel`, or a stand-in."""

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """What a plan for *nic* needs to know. Raises KernelError."""

    def ifindex(self, dev: str) -> int | None:
        """The index of *dev*, None if there is no such device."""

    def refresh(self) -> None:
        """Forget what was read: something may have changed."""


@dataclass(frozen=True)
class Session:
    """What a run works with. *dry*: read only: no lock is taken and nothing is written, not even a journal.

    *by* is who runs it: "hook", "person" or "agent", and *frame* what told the agent to, as in the journal.
    """

    kernel: Host
    store: Store
    run_dir: Path
    config: Config
    dry: bool = False
    by: str = "hook"
    frame: str | None = None

    def locked(self, stack: ExitStack, taps: Sequence[str]) -> None:
        """Hold the locks of *taps* until *stack* unwinds: their journals do not change. Raises LockTimeoutError."""
        self.store.refresh()
        self._hold(stack, [locks.of_tap(tap) for tap in taps])
        self.kernel.refresh()

    def share(self, stack: ExitStack, nics: Sequence[Nic], journals: Iterable[Journal] = ()) -> None:
        """Hold the lock of what taps share, too, if a run for *nics*, or with *journals* so far, can change any of it.

        After those of taps, always, so that no two runs wait for each other. A run that does not need it must not
        have it: a program of the administrator's can take long, and every routed guest would wait for it.

        Raises LockTimeoutError, and what *journals* raise.
        """
        if not self.dry and (any(nic.mode == "routed" for nic in nics) or any(map(shares, journals))):
            self._hold(stack, [locks.UPLINK])
            self.store.begin(locks.path(self.run_dir, locks.UPLINK))
            self.kernel.refresh()

    def dated(self, journal: Journal) -> Journal:
        """*journal*, as of now and of this run: it has reached a phase, or had something to mend."""
        return replace(journal, since=time.time(), by=self.by, frame=self.frame)

    def _hold(self, stack: ExitStack, names: Sequence[str]) -> None:
        if not self.dry:
            stack.enter_context(locks.hold(self.run_dir, names, self.config.lock_timeout))


# --- up -------------------------------------------------------------------------------------------------


def up(asked: Phase, nics: Sequence[Nic], session: Session, *, announce: bool) -> list[Outcome]:
    """Run phase *asked* for all *nics*, or for none of them.

    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(", ".join(nic.label for nic in nics)))
        session.locked(stack, [nic.tap for nic in nics])
        # There may be something to clear up after whoever had the tap before.
        session.share(stack, nics, (journal for nic in nics if (journal := session.store.load(nic.tap))))
        prepared = []
        for nic in nics:
            with about(nic.label):
                prepared.append(prepare(asked, nic, session, announce=announce))
        if not session.dry:
            apply([job for _, job in prepared], session.kernel, session.store)
    return [outcome for outcome, _ in prepared]


def prepare(asked: Phase, nic: Nic, session: Session, *, announce: bool) -> tuple[Outcome, Job]:
    """Clear up after a dead or killed run on this tap, then find out what *nic* needs."""
    phase = phases.effective(asked, nic)
    journal = session.store.load(nic.tap)
    undone: tuple[Change, ...] = ()
    if journal is not None:
        journal, undone = recover(journal, session)
    if session.dry:
        session = replace(session, kernel=Foreseen(session.kernel, undone))
    facts = with_claims(session.kernel.facts(nic, session.config), nic, session)
    everything = phases.plan(Phase.POST, nic, session.config, facts, announce=announce)
    ops = everything
    if phase is not Phase.POST:
        ops = phases.plan(phase, nic, session.config, facts, announce=announce)
    assert facts.tap is not None  # phases.plan has refused a tap that is not there
    before = journal or Journal(nic, facts.tap.ifindex, namespace=session.store.namespace)
    unseen = (entry.op for entry in before.entries if phases.unseen(entry.op, nic, session.config, facts))
    kept = {op.key for op in (*everything, *unseen)}
    dropped = [entry for entry in before.entries if entry.op.key not in kept]
    obsolete = undoing(unshared(before, dropped, session), session)
    changes = (*obsolete, *survey(ops, session.kernel, before))
    after = replace(
        before,
        nic=nic,
        phase=max(phase, before.phase),
        entries=remembered(changes, ops, kept, before, session),
        pending=(),
    )
    if after.phase is not before.phase or any(change.needed and change.op.undoable for change in changes):
        after = session.dated(after)
    outcome = Outcome(nic.label, nic, nic.tap, phase, undone, changes, phases.remarks(phase, nic, facts))
    return outcome, Job(changes, before, journal is not None, after)


def remembered(
    changes: Sequence[Change], ops: Sequence[Op], kept: set[tuple[object, ...]], before: Journal, session: Session
) -> tuple[Entry, ...]:
    """What the journal must be able to undo once *changes* are done.

    The value from before the first run counts, not the one from before this one. A removal is final:
    putting a dead NIC's rule back when this guest leaves would set a trap for the next one.
    """
    planned = {op.key for op in ops}
    entries: list[Entry] = []
    for change in changes:
        op = change.op
        if op.key not in planned or not op.undoable or op.wanted is False:
            continue
        earlier = before.prior(op.key)
        if earlier is None and op.shared:
            # Also from a dead NIC's journal that nobody has cleared up yet: what it found was before us, too.
            earlier = claimed_elsewhere(op, before.nic.tap, session, dead=True)
        if earlier is not None:
            entries.append(Entry(op, earlier.prior))
        elif change.needed:
            entries.append(Entry(op, op.before_us(change.now)))
    # pre, called once more after post, takes nothing away from a guest that runs here.
    entries += [entry for entry in before.entries if entry.op.key in kept - planned]
    return tuple(entries)


def claimed_elsewhere(op: Op, tap: str, session: Session, *, dead: bool = False) -> Entry | None:
    """Another live tap's entry about the same shared value: it knows what was there before any of us.

    With *dead*, also the entry of a tap that is gone.
    """
    for journal in session.store.others(tap, op.key):
        # Also what a killed run was about to do: its value was read before ours.
        for entry in (*journal.entries, *journal.pending):
            if entry.op.key == op.key and (dead or alive(journal, session)):
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
        if other.nic.mode == "routed" and prefix in other.nic.ip and alive(other, session)
    ]
    return replace(facts, taken=(*claims, *facts.taken))


# --- arrival and departure ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """post for a NIC whose guest has yet to arrive: computed and admitted, so that only the doing is left.

    *stamp* is its journal's, *devices* are those that the ops are about, with their indices.
    """

    outcome: Outcome
    job: Job
    stamp: Stamp | None
    devices: tuple[tuple[str, int | None], ...]

    @property
    def waits(self) -> bool:
        """Whether it can take long."""
        return any(change.op.waits for change in self.job.needed)


def ready(tap: str, session: Session) -> Ready | None:
    """Find out what post will have to do for *tap*; None if its NIC does not wait for its guest.

    Raises what `phases.plan` raises, LockTimeoutError, JournalError and NamespaceError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        stamp = session.store.stamp(tap)
        journal = undisturbed(tap, session)
        if journal is None or journal.phase is not Phase.PRE:
            return None
        session.share(stack, [], [journal])
        stack.enter_context(about(journal.nic.label))
        outcome, job = prepare(Phase.POST, journal.nic, session, announce=False)
        devices = dict.fromkeys(dev for change in job.changes if (dev := getattr(change.op, "dev", None)))
        return Ready(outcome, job, stamp, tuple((dev, session.kernel.ifindex(dev)) for dev in devices))


def arrive(ready: Ready, session: Session) -> Outcome | None:
    """Do what is *ready*; None, and nothing was done, if anything has changed since or somebody works on it.

    Only what others may change at any time is read again; the rest was checked a moment ago, or will be.
    Raises what `apply.apply` raises.
    """
    tap = ready.outcome.tap
    session = replace(session, config=replace(session.config, lock_timeout=0))
    with ExitStack() as stack:
        stack.enter_context(about(ready.outcome.label))
        try:
            session.locked(stack, [tap])
            session.share(stack, [], [ready.job.before])
        except LockTimeoutError:
            return None
        same = session.store.stamp(tap) == ready.stamp and all(
            session.kernel.ifindex(dev) == index for dev, index in ready.devices
        )
        shared = [change for change in ready.job.changes if isinstance(change.op, Sysctl) and change.op.shared]
        if not same or any(session.kernel.read(change.op) != change.now for change in shared):
            return None
        assert ready.job.after is not None
        apply([replace(ready.job, after=session.dated(ready.job.after))], session.kernel, session.store)
    return ready.outcome


def settle(tap: str, wanted: Callable[[Journal], bool], session: Session) -> Outcome | None:
    """post for the NIC whose journal *tap* has, whoever wired it; None if it is not the *wanted* one (any more).

    Raises what `phases.plan` and `apply.apply` raise, LockTimeoutError, JournalError and NamespaceError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        journal = undisturbed(tap, session)
        if journal is None or journal.phase is Phase.DOWN or not wanted(journal):
            return None
        session.share(stack, [], [journal])
        stack.enter_context(about(journal.nic.label))
        outcome, job = prepare(Phase.POST, journal.nic, session, announce=False)
        apply([job], session.kernel, session.store)
        return outcome


def undisturbed(tap: str, session: Session) -> Journal | None:
    """The journal of *tap*, if its tap is still that one and no killed run has left something to undo."""
    journal = session.store.load(tap)
    return journal if journal and not journal.pending and alive(journal, session) else None


def withdraw(tap: str, session: Session) -> Outcome | None:
    """Undo what draws the traffic of the guest on *tap* here: it has left. The rest stays, as it was after pre.

    None if there is nothing to undo. Raises LockTimeoutError, JournalError, NamespaceError, RollbackError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        journal = undisturbed(tap, session)
        if journal is None or journal.phase is not Phase.POST:
            return None
        session.share(stack, [], [journal])
        away = tuple(entry for entry in journal.entries if phases.only_here(entry.op))
        if not away:
            return None
        rest = tuple(entry for entry in journal.entries if entry not in away)
        waiting = session.dated(replace(journal, phase=Phase.PRE, entries=rest))
        doomed = replace(waiting, pending=away)
        session.store.save(doomed)
        undone = revert(doomed, session)
        session.store.save(waiting)
        return Outcome(journal.nic.label, journal.nic, tap, Phase.PRE, undone)


def restore(tap: str, uplink: str, session: Session) -> Outcome | None:
    """Put back what the NIC on *tap* has lost on *uplink*: the kernel forgets proxy neighbours when it goes down.

    What that was is in the journal. A plan would look for the default route to find the uplinks, and that comes
    back later than the device: until then it would take away all that it should put back.

    None if the guest does not run here, or the uplink has gone. Raises what `apply.apply` raises,
    LockTimeoutError, JournalError and NamespaceError.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        journal = undisturbed(tap, session)
        if journal is None or journal.phase is not Phase.POST:
            return None
        session.share(stack, [], [journal])
        if session.kernel.ifindex(uplink) is None:
            return None
        stack.enter_context(about(journal.nic.label))
        only = replace(session.config, routed=replace(session.config.routed, uplinks=(uplink,)))
        facts = session.kernel.facts(journal.nic, only)
        ops = phases.again(uplink, [entry.op for entry in journal.entries], facts)
        changes = survey(ops, session.kernel)
        after = session.dated(journal) if any(change.needed for change in changes) else journal
        apply([Job(changes, journal, True, after)], session.kernel, session.store)
        return Outcome(journal.nic.label, journal.nic, tap, Phase.POST, changes=changes)


# --- down -----------------------------------------------------------------------------------------------


def down(tap: str, instance: str | None, describe: Callable[[], Nic | None], session: Session) -> Outcome:
    """Undo all that was done for *tap*; without a journal, withdraw the NIC that *describe* knows, if any.

    Repeating it succeeds. A tap that is another guest's than *instance*'s by now is left alone: names are
    reused at once, and a manager may be late.

    Raises LockTimeoutError, JournalError, NamespaceError, and RollbackError for what could not be undone.
    """
    with ExitStack() as stack:
        stack.enter_context(about(tap))
        session.locked(stack, [tap])
        journal = session.store.load(tap)
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
            empty = Journal(nic, facts.tap.ifindex if facts.tap else 0, namespace=session.store.namespace)
            apply([Job(changes, empty, False, None)], session.kernel, session.store)
        return Outcome(nic.label, nic, tap, Phase.DOWN, changes=changes)


def taps_of_instance(instance: str, session: Session) -> list[str]:
    """The taps that a journal or a NIC file gives to *instance*. Raises NicError."""
    taps = {nic.tap for nic in inputs.nics_of_instance(instance, session.run_dir)}
    taps |= {journal.nic.tap for journal in session.store.others("", instance) if journal.nic.instance == instance}
    return sorted(taps)


def present(ops: Sequence[Op], facts: NodeFacts) -> list[Op]:
    """Those of *ops* whose device is there: what is on a device goes with it."""
    gone = {uplink.name for uplink in facts.uplinks if not uplink.present}
    return [op for op in ops if getattr(op, "dev", None) not in gone and (facts.tap or op.outlives_tap)]


# --- after a crash ----------------------------------------------------------------------------------------


def recover(journal: Journal, session: Session) -> tuple[Journal | None, tuple[Change, ...]]:
    """Undo what a killed run was doing, or all that a dead NIC left; returns the journal that remains."""
    if not alive(journal, session):
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
        session.store.save(rest)
    return rest, undone


def forget(journal: Journal, session: Session) -> tuple[Change, ...]:
    """Undo everything that *journal* knows, then remove it; returns what was undone.

    First it says that all is to be undone, so that whoever comes after a crash goes on with that.
    Raises PrivilegeError when we may not, RollbackError for what could not be undone.
    """
    doomed = replace(journal, phase=Phase.DOWN, entries=(), pending=(*journal.entries, *journal.pending))
    if session.dry:
        return revert(doomed, session)
    session.store.save(doomed)
    try:
        undone = revert(doomed, session)
    except PrivilegeError:
        session.store.save(journal)
        raise
    session.store.delete(journal.nic.tap)
    return undone


def revert(journal: Journal, session: Session) -> tuple[Change, ...]:
    """Undo what is pending in *journal*; returns what was undone.

    On a tap that is another one now, only what outlives a tap is ours. A shared value stays while another
    live tap needs it. Raises PrivilegeError when we may not, RollbackError for what could not be undone;
    the journal then has what is left.
    """
    live = alive(journal, session)
    mine = unshared(journal, [entry for entry in journal.pending if live or entry.op.outlives_tap], session)
    changes = undoing(mine, session, past=KvmIfupError)  # `undo` meets it again, and reports it
    problems = [] if session.dry else undo(mine, session.kernel)
    for _, error in problems:
        if isinstance(error, PrivilegeError):
            raise error.at(journal.nic.label)
    if problems:
        left = tuple(entry for entry in mine if entry in [entry for entry, _ in problems])
        session.store.save(replace(journal, pending=left))
        raise RollbackError(
            f"could not put back: {'; '.join(cause(error) for _, error in problems)}", hint="`kvm-ifup gc` tries again"
        ).at(journal.nic.label)
    return changes


def unshared(journal: Journal, entries: Sequence[Entry], session: Session) -> list[Entry]:
    """Those of *entries* that no other live tap needs as well."""
    return [
        entry for entry in entries if not (entry.op.shared and claimed_elsewhere(entry.op, journal.nic.tap, session))
    ]


def undoing(entries: Sequence[Entry], session: Session, past: type[KvmIfupError] = VanishedError) -> tuple[Change, ...]:
    """The changes that undo *entries*, last first, without what cannot be read for the reason *past*."""
    changes: list[Change] = []
    for entry in reversed(entries):
        with suppress(past):
            now = session.kernel.read(entry.undo)
            changes.append(Change(entry.undo, now, now != entry.prior))
    return tuple(changes)


def alive(journal: Journal, session: Session) -> bool:
    """Whether the tap is still the one that *journal* is about."""
    return session.kernel.ifindex(journal.nic.tap) == journal.ifindex


def gc(session: Session, taps: Sequence[str] | None = None) -> list[Outcome]:
    """Clear up after dead NICs and killed runs, of *taps* or of all; goes on past failures, then raises the first.

    Whether the tap of a journal of another network namespace lives cannot be seen from here: it is left alone.
    """
    outcomes: list[Outcome] = []
    failures: list[KvmIfupError] = []
    for tap in session.store.taps() if taps is None else taps:
        try:
            with ExitStack() as stack:
                session.locked(stack, [tap])
                try:
                    journal = session.store.load(tap)
                except NamespaceError:
                    continue
                except JournalError as error:
                    where = "" if session.dry else f"; it is now {session.store.set_aside(tap)}"
                    outcomes.append(Outcome(tap, None, tap, Phase.DOWN, remarks=(f"{error}{where}",)))
                    continue
                if journal is not None and (journal.pending or not alive(journal, session)):
                    session.share(stack, [], [journal])
                    _, undone = recover(journal, session)
                    outcomes.append(Outcome(journal.nic.label, journal.nic, tap, Phase.DOWN, undone))
        except KvmIfupError as error:
            failures.append(error.at(tap))
    if failures:
        raise failures[0]
    return outcomes


class Foreseen:
    """The node as it will be once *undone* is undone: what a dry run plans on."""

    def __init__(self, kernel: Host, undone: Sequence[Change]) -> None:
        self._kernel = kernel
        self._values = {change.op.key: change.op.wanted for change in undone}

    def refresh(self) -> None:
        """As the kernel's."""
        self._kernel.refresh()

    def ifindex(self, dev: str) -> int | None:
        """As the kernel's."""
        return self._kernel.ifindex(dev)

    def write(self, op: Op) -> None:
        """Never: a dry run has nothing to write."""
        raise AssertionError(f"a dry run writes {op}")

    def read(self, op: Op) -> Value:
        """The value that will be there. Raises what the kernel raises."""
        return self._values[op.key] if op.key in self._values else self._kernel.read(op)

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """The facts, without the policy rules that will be gone."""
        facts = self._kernel.facts(nic, config)
        return replace(facts, rules=tuple(rule for rule in facts.rules if self._values.get(rule.key, True)))


# --- helpers ----------------------------------------------------------------------------------------------


def shares(journal: Journal) -> bool:
    """Whether *journal* is about something that taps share: an uplink's values, addresses."""
    return journal.nic.mode == "routed" or any(one.op.shared for one in (*journal.entries, *journal.pending))


@contextmanager
def about(label: str) -> Iterator[None]:
    """Errors inside name *label*, unless they already name something closer."""
    try:
        yield
    except KvmIfupError as error:
        error.at(label)
        raise
