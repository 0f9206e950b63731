"""Which NICs this node knows, and how they are: every journal and every NIC file, read once."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvmifup.core.errors import JournalError, KvmIfupError, NamespaceError, NicError, NotReadyError, RollbackError
from kvmifup.core.model import Config, Nic, Phase
from kvmifup.inputs import nicfiles, values
from kvmifup.node.overview import Overview
from kvmifup.runs import planning
from kvmifup.runs.apply import Change
from kvmifup.runs.journal import Journal
from kvmifup.runs.session import Session, alive, opened
from kvmifup.runs.store import Store


@dataclass(frozen=True)
class Known:
    """A tap that a journal or a NIC file is about. *nic* is as it is to be wired: the NIC file counts, if there is one.

    *trouble* is what is wrong with its NIC file or journal; then *nic* can be missing.
    """

    tap: str
    nic: Nic | None
    journal: Journal | None = None
    trouble: KvmIfupError | None = None

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.nic.label if self.nic else self.tap

    @property
    def order(self) -> tuple[str, int, str]:
        """By guest, then by number."""
        if self.nic is None:
            return "", 0, self.tap
        return self.nic.instance or "", self.nic.index or 0, self.tap

    def is_called(self, name: str) -> bool:
        """Whether a person who says *name* means this one: its tap, or its guest."""
        return name == self.tap or (self.nic is not None and name == self.nic.instance)

    @property
    def elsewhere(self) -> bool:
        """Whether it is wired in another network namespace."""
        return isinstance(self.trouble, NamespaceError)

    @property
    def phase(self) -> Phase:
        """The last phase that succeeded, DOWN for none."""
        return self.journal.phase if self.journal else Phase.DOWN


def known(run_dir: Path, store: Store) -> list[Known]:
    """Every NIC that a journal or a NIC file tells of, by guest and number.

    Raises PermissionError if they are not ours to read.
    """
    found: dict[str, Known] = {}
    next(store.others("", ""), None)  # reads all of them at once, and `load` then finds them decoded
    for tap in store.taps():
        try:
            journal = store.load(tap)
        except (JournalError, NamespaceError) as error:
            found[tap] = Known(tap, None, None, error)
            continue
        if journal is not None:
            found[tap] = Known(tap, journal.nic, journal)
    unchanged = {path for tap, one in found.items() if one.journal and (path := unchanged_file(run_dir, one.journal))}
    for path in sorted((run_dir / "nic").glob("*/*.toml")):
        if path in unchanged:
            continue
        try:
            nic = nicfiles.read_nic(path, run_dir)
        except NicError as error:
            key = str(path.relative_to(run_dir))
            found[key] = Known(key, None, None, error)
            continue
        earlier = found.get(nic.tap)
        described = earlier and earlier.journal is None and not earlier.trouble
        if earlier is None or (described and leads_to(run_dir / "tap" / nic.tap, path)):
            found[nic.tap] = Known(nic.tap, nic)
        elif earlier.trouble or (earlier.journal and owner(nic) == owner(earlier.journal.nic)):
            found[nic.tap] = replace(earlier, nic=nic)
    return sorted(found.values(), key=lambda one: one.order)


def owner(nic: Nic) -> tuple[str | None, int | None]:
    """Which NIC of which guest it is."""
    return nic.instance, nic.index


def unchanged_file(run_dir: Path, journal: Journal) -> Path | None:
    """The NIC file that *journal* was made from, if it has not been written since: reading it would tell nothing."""
    nic = journal.nic
    if nic.instance is None or nic.index is None:
        return None
    path = run_dir / "nic" / nic.instance / f"{nic.index}.toml"
    with suppress(OSError):
        if path.stat().st_mtime < journal.since and leads_to(run_dir / "tap" / nic.tap, path):
            return path
    return None


def leads_to(link: Path, path: Path) -> bool:
    """Whether the symlink *link* of a tap leads to the NIC file *path*."""
    try:
        return str(link.readlink()) == f"../nic/{path.parent.name}/{path.name}"
    except OSError:
        return False


def selected(name: str | None, everything: Sequence[Known]) -> list[Known]:
    """Those that *name*, a tap or a guest, means; for None all that are of this network namespace.

    Raises NicError if it means none.
    """
    found = [one for one in everything if (not one.elsewhere if name is None else one.is_called(name))]
    if not found and name is not None:
        raise NicError("no journal and no NIC file is about it", hint="`kvm-ifup show` lists all", where=name)
    return found


@contextmanager
def look(name: str | None, run_dir: Path, config: Config) -> Iterator[tuple[list[Known], Session, Overview]]:
    """The NICs that *name* means (`selected`), and the node as it is now, with a dry session on it. Raises NicError."""
    found = selected(name, known(run_dir, Store(run_dir)))
    overview = Overview()
    with opened(run_dir, config, dry=True, kernel=lambda: overview) as session:
        yield found, session, overview


# --- how it is ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How a NIC is, compared with how its phase wants it. *wired* is None where nothing has been asked for yet.

    *missing* is what differs, *problem* why that could not be found out, or what keeps it from being right.
    """

    wired: bool | None
    missing: tuple[Change, ...] = ()
    problem: KvmIfupError | None = None


def state_of(one: Known, session: Session) -> State:
    """Compare *one* with what its phase's hook would make of it. *session* must be a dry one."""
    problem = one.trouble or stopped(one, session)
    if problem:
        return State(False, problem=problem)
    if one.phase is Phase.DOWN:
        return State(None)
    try:
        missing = compare(one, session)
    except KvmIfupError as error:
        return State(False, problem=error)
    return State(not missing, missing)


def stopped(one: Known, session: Session) -> KvmIfupError | None:
    """What has to be cleared up before anything else can be said about *one*."""
    if one.journal and not alive(one.journal, session):
        return NotReadyError("its tap is gone", hint="`kvm-ifup gc` clears up after it", where=one.label)
    if one.journal and one.journal.pending:
        return RollbackError("a run on it was killed", hint="`kvm-ifup gc`, then the hook again", where=one.label)
    return None


def compare(one: Known, session: Session) -> tuple[Change, ...]:
    """What the hook of the phase that *one* has reached would do now. Raises what `planning.plan` raises."""
    return planning.plan(one.phase, intended(one, session.config), one.journal, session).due


def intended(one: Known, config: Config) -> Nic:
    """The NIC as it is to be wired in the phase that it has reached, and in no later one. Raises NicError."""
    assert one.nic is not None
    nic = values.as_wired(one.nic, config)
    return replace(nic, incoming=True) if one.phase is Phase.PRE else nic


def phase_word(one: Known, config: Config, *, agent: bool) -> str:
    """The phase for people: "none", "pre", "armed" (pre, and the agent waits for the guest), "post"."""
    if one.phase is Phase.DOWN:
        return "none"
    if one.phase is Phase.PRE and one.journal and agent:
        waited = time.time() - one.journal.since
        return "armed" if waited < config.agent.arrival_timeout else "pre"
    return one.phase.name.lower()


def agent_lives(run_dir: Path) -> bool:
    """Whether somebody answers on the agent's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as caller:
        caller.settimeout(1.0)
        try:
            caller.connect(str(run_dir / "agent.sock"))
        except OSError:
            return False
        return True
