"""One loop: compare, journal what was there, write; on any failure put everything back, last first.

It knows no mode and no phase. It makes all of the changes that it is given, or leaves the node as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Protocol

from kvmifup.core.errors import KvmIfupError, NoSpaceError, ProgramError, RollbackError, VanishedError
from kvmifup.core.ops import Op, Value
from kvmifup.core.records import record
from kvmifup.core.signals import checkpoint, still_wanted
from kvmifup.runs.draft import Draft
from kvmifup.runs.journal import Entry, Journal, Mark
from kvmifup.runs.store import Store


class Node(Protocol):
    """What can be read and written: `kvmifup.node.kernel.Kernel`, or a stand-in that fails on purpose."""

    def read(self, op: Op) -> Value:
        """The value the node has now for *op*. Raises VanishedError, KernelError."""

    def write(self, op: Op) -> None:
        """Make the value that *op* wants true. Raises NotReadyError, VanishedError, KernelError, PrivilegeError."""

    def write_all(self, ops: Sequence[Op]) -> None:
        """The same of several that restrict guests, in as few steps as it takes."""


@record
class Change:
    """An op and the value found; *needed* if that is not the value wanted."""

    op: Op
    now: Value
    needed: bool

    @property
    def entry(self) -> Entry:
        """The entry for the journal."""
        return Entry(self.op, self.now)


@record
class Job:
    """The changes for one tap, with its journal before them and after; *after* None forgets the tap.

    *noted*: the journal `pending` is written already, and has only to be put in its place.
    """

    changes: tuple[Change, ...]
    before: Journal
    known: bool  # whether `before` is on disk, or an empty one made up for a new tap
    after: Journal | None
    noted: Draft | None = None

    @property
    def needed(self) -> tuple[Change, ...]:
        """The changes that have to be written."""
        return tuple(change for change in self.changes if change.needed)

    @property
    def pending(self) -> Journal:
        """The journal while the changes are made: what a crash leaves to undo."""
        return replace(self.before, pending=tuple(change.entry for change in undoable(self.needed)))


def survey(ops: Sequence[Op], node: Node, before: Journal | None = None) -> tuple[Change, ...]:
    """Find out what the node has for each of *ops*; nothing is written. Raises VanishedError, KernelError.

    An op that cannot be read counts as done if *before*, the journal, has it.
    """
    changes: list[Change] = []
    written: set[tuple[str, object]] = set()  # what is done so far, as `Op.disturbs` names it, and to which device
    told = False  # whether anything is that concerns others
    for op in ops:
        if op.after_change:
            now, needed = None, getattr(op, "force", False) or told
        else:
            now = node.read(op) if op.readable else before is not None and before.prior(op.key) is not None
            # Writing that undoes this.
            lost = bool(written) and any((what, device(op)) in written for what in op.lost_with)
            if lost and op.leaves:
                now = op.leaves[0]
            needed = lost or now != op.wanted
        if needed:
            written |= {(what, device(op)) for what in op.disturbs(now)}
            told = told or not op.private
        changes.append(Change(op, now, needed))
    return tuple(changes)


def survey_undo(entries: Sequence[Entry], node: Node, past: type[KvmIfupError] = VanishedError) -> tuple[Change, ...]:
    """The changes that undo *entries*, last first; one that cannot be read because of *past* is left out."""
    changes: list[Change] = []
    written: set[tuple[str, object]] = set()
    for entry in backwards(entries):
        op, dev = entry.undo, device(entry.op)
        with suppress(past):
            now = node.read(op)
            gone = any((kind, dev) in written for kind in op.gone_with)
            needed = (op.left(entry.prior) if gone else now) != entry.prior
            if needed:
                written |= {(what, dev) for what in op.disturbs(now)}
            changes.append(Change(op, now, needed))
    return tuple(changes)


def apply(jobs: Sequence[Job], node: Node, store: Store, rest: Callable[[], object] = lambda: None) -> None:
    """Do all *jobs* or none. What is to come after the changes (`Op.after_change`) is left to the caller.

    *rest* is called when they are done; if it fails, having undone what it has done itself, they are undone as well.
    Raises whatever stopped it, once the node and the journals are as they were before; RollbackError when
    something could not be put back, and then the journal keeps what is left to undo.
    """
    doing = Doing(jobs, node, store)
    with doing.all_or_none():
        doing.change()
        doing.settle()
        rest()


class Doing:
    """*jobs* that are being done: first `change`, then `settle`, each within `all_or_none`.

    In between, what is wanted is so, and the journals still say what to undo after a crash.
    """

    def __init__(self, jobs: Sequence[Job], node: Node, store: Store) -> None:
        self._jobs = jobs
        self._node = node
        self._store = store
        self._written: list[Change] = []

    @contextmanager
    def all_or_none(self, held: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[None]:
        """If anything fails inside it, put back all that was done, holding what *held* gives. Raises as `apply`."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, KvmIfupError):
                error.undone = bool(self._written)
            with held():
                self._put_back(error)
            raise

    def change(self) -> None:
        """Note in the journals what is about to be changed, and change it."""
        for job in self._jobs:
            note(job, self._store)
        done = self._restrict()
        for job in self._jobs:
            for change in in_steps(job.needed):
                if change.op.after_change or change in done:  # announcing is not done here
                    continue
                checkpoint()
                self._written.append(change)  # before the attempt: a failed write may have been half done
                try:
                    self._node.write(change.op)
                except ProgramError as error:
                    if error.untouched:
                        self._written.pop()
                    raise
        still_wanted()  # the last one may have taken long

    def _restrict(self) -> frozenset[Change]:
        """Restrict guests, all at once if they are several: none can do what it must not while others are seen to.

        But who moves leaves first: where it goes, it may be restricted less than it is now.
        """
        found = [
            change
            for job in self._jobs
            for change in job.needed
            if change.op.restricts and change.op.wanted is not None
            if change.now is None or in_steps(job.needed) == job.needed
        ]
        if len(found) < 2:
            return frozenset()
        checkpoint()
        self._written += found
        self._node.write_all([change.op for change in found])
        return frozenset(found)

    def settle(self) -> None:
        """Make the journals say what is true now."""
        # All of them first: with no space for one, none is committed.
        drafts = [draft(job, self._store) for job in self._jobs]
        for job, after in zip(self._jobs, drafts, strict=True):
            commit(job, after, self._store)

    def _put_back(self, error: BaseException) -> None:
        """Undo what was written, because of *error*. Raises RollbackError for what could not be undone."""
        for job in self._jobs:
            self._store.discard(job.before.nic.tap)
        lost = disturbed(self._written, [change for job in self._jobs for change in job.needed])
        problems = undo([change.entry for change in (*self._written, *lost)], self._node)
        if problems:
            for job in self._jobs:
                # Also one that has been committed by now, or nobody would try again.
                with suppress(KvmIfupError):  # it says so already, unless it has been committed
                    self._store.save(job.pending)
            raise RollbackError(
                f"{cause(error)}; and could not put back: {'; '.join(cause(problem) for _, problem in problems)}",
                hint="`kvm-ifup gc` tries again",
            ) from error
        for job in self._jobs:
            if job.known:
                save_or_mark(self._store, job.before, Mark.SETTLED)
            else:
                self._store.delete(job.before.nic.tap)


def disturbed(written: Sequence[Change], changes: Sequence[Change]) -> list[Change]:
    """Those of *changes* that are not among the *written*, but whose values have gone with what was written."""
    gone = {(what, device(one.op)) for one in written for what in one.op.disturbs(one.now)}
    lost = [one for one in changes if any((what, device(one.op)) in gone for what in one.op.lost_with)]
    done = set(written)  # there may be thousands
    return [one for one in lost if one not in done]


def device(op: Op) -> object:
    """The device that *op* is about, None if it is about none."""
    return getattr(op, "dev", None)


def note(job: Job, store: Store) -> None:
    """Make the journal say what is about to be changed."""
    if job.noted and job.noted.is_there():
        store.publish(job.noted)
        return
    if not job.pending.pending:
        return
    try:
        store.save(job.pending)
    except NoSpaceError:
        # What is only removed, and remembered nowhere, needs no space: to remove it again would finish it.
        if job.known or job.after is not None:
            raise


def in_steps(changes: Sequence[Change]) -> tuple[Change, ...]:
    """*changes* as they are made, one step after the other: what is moved leaves first, and comes in its turn.

    `undo` does the same.
    """
    moving = [change for change in changes if change.needed and change.op.moves]
    moved = [one for one in moving if one.op.place(one.now) not in (None, one.op.place(one.op.wanted))]
    leaving = [Change(change.op.turned(None), change.now, needed=True) for change in moved]
    rest = [change for change in changes if change not in moved or change.op.wanted is not None]
    return (*leaving, *(replace(change, now=None) if change in moved else change for change in rest))


def draft(job: Job, store: Store) -> Draft | None:
    """Write the journal that says what is now true; a run that changed nothing does not write it again."""
    if job.after and (undoable(job.needed) or not job.known or job.after != job.before):
        return store.draft(job.after)
    return None


def commit(job: Job, after: Draft | None, store: Store) -> None:
    """Make the journal say what is now true: *after*, as it was drafted; without one it stays, or goes."""
    if job.after is None:
        store.delete(job.before.nic.tap)
    elif after:
        store.publish(after)


def undoable(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Those of *changes* that can be undone."""
    return tuple(change for change in changes if change.op.undoable)


def undo(entries: Sequence[Entry], node: Node) -> list[tuple[Entry, Exception]]:
    """`put_back` for who needs only what failed, and why."""
    return put_back(entries, node)[1]


def put_back(entries: Sequence[Entry], node: Node) -> tuple[tuple[Change, ...], list[tuple[Entry, Exception]]]:
    """Put back the prior values of *entries*, last first, also after failures; returns the changes, and what failed.

    Each value is read once, when it is its turn. What is no longer there needs no undoing.
    """
    changes: list[Change] = []
    problems: list[tuple[Entry, Exception]] = []
    places: dict[Entry, Value] = {}  # where what has left was
    for entry in entries:
        if entry.op.moves:
            with suppress(Exception):  # whatever it is, it is met again below
                leave(entry, node, places)
    for entry in backwards(entries):
        op = entry.undo
        if not entry.op.undoable:
            continue
        try:
            now = node.read(op)
            if now != entry.prior:
                node.write(op)
        except VanishedError:
            continue
        except Exception as error:  # whatever it is, the remaining ones must be tried
            problems.append((entry, error))
            continue
        now = places.get(entry, now)
        changes.append(Change(op, now, now != entry.prior))
    return tuple(changes), problems


def backwards(entries: Sequence[Entry]) -> list[Entry]:
    """*entries* in the order in which they are undone: last first.

    But what has moved comes back when all else is as it was, and then what is true of the place that it is in.
    """
    order = (False, False), (True, False), (False, True)
    return [one for turn in order for one in reversed(entries) if (one.op.moves, one.op.of_place) == turn]


def leave(entry: Entry, node: Node, places: dict[Entry, Value]) -> None:
    """Take what has moved away from where it is, unless it is where it was, and note that in *places*.

    Raises what the node raises.
    """
    place, now = entry.op.place, node.read(entry.undo)
    if place(now) not in (None, place(entry.prior)):
        node.write(entry.op.turned(None))
        places[entry] = now


def cause(error: BaseException) -> str:
    """What went wrong, in one clause."""
    if isinstance(error, KvmIfupError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def save_or_mark(store: Store, journal: Journal, mark: Mark) -> None:
    """Write *journal*, which is what the one on disk is with this *mark*; without space for it, only the mark.

    Raises KernelError, PrivilegeError.
    """
    try:
        store.save(journal)
    except NoSpaceError:
        store.mark(journal, mark)
