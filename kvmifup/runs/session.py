"""What one run works with: the node, the journals, the configuration, and the locks that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Config, Nic
from kvmifup.core.records import record
from kvmifup.node import procfs
from kvmifup.node.kernel import Kernel
from kvmifup.runs import clock, locks
from kvmifup.runs.host import Host, Timed
from kvmifup.runs.journal import Entry, Journal
from kvmifup.runs.store import Store


@record
class Session:
    """What a run works with. A *dry* one only reads: it takes no lock and writes nothing, not even a journal.

    *by* is who runs it: "hook", "person" or "agent", and *reason* why the agent does, as in the journal.
    *doomed* are the taps that this run will still clear up, if they are dead.
    """

    kernel: Host
    store: Store
    run_dir: Path
    config: Config
    dry: bool = False
    by: str = "hook"
    reason: str | None = None
    doomed: Collection[str] = ()

    def locked(self, stack: ExitStack, taps: Sequence[str]) -> None:
        """Hold the locks of *taps* until *stack* unwinds: their journals do not change. Raises LockTimeoutError."""
        if not self.dry:  # it is all one look
            self.store.refresh()
        self._hold(stack, [locks.of_tap(tap) for tap in taps])
        self.kernel.refresh()

    def share(self, stack: ExitStack, nics: Sequence[Nic], journals: Iterable[Journal] = ()) -> None:
        """Also hold the lock of what taps share, if a run for *nics* with these *journals* can change any of it.

        Always after those of taps, so that no two runs wait for each other. A run that does not need it must not
        hold it: an administrator's program can take long, and every routed guest would wait for it.

        Raises LockTimeoutError, and what *journals* raise.
        """
        if not self.dry and (any(nic.on_uplinks for nic in nics) or any(map(shares, journals))):
            self.store.prepare()  # while others can still go on
            self._hold(stack, [locks.UPLINK])
            self.store.begin(locks.path(self.run_dir, locks.UPLINK))
            self.kernel.refresh()

    def load(self, tap: str) -> Journal | None:
        """The journal of *tap* as `followed`, None if it has none. Raises JournalError and NamespaceError."""
        journal = self.store.load(tap)
        return journal and followed(journal, self.kernel)

    def dated(self, journal: Journal) -> Journal:
        """*journal* with the time and the caller of this run, which has reached a phase or changed something."""
        return replace(
            journal, since=time.time(), uptime=clock.uptime(), boot=procfs.boot(), by=self.by, reason=self.reason
        )

    @property
    def seconds(self) -> Mapping[tuple[object, ...], float] | None:
        """How long each op took, by its key; None if that was not asked for."""
        return self.kernel.seconds if isinstance(self.kernel, Timed) else None

    def _hold(self, stack: ExitStack, names: Sequence[str]) -> None:
        if not self.dry:
            stack.enter_context(locks.hold(self.run_dir, names, self.config.lock_timeout))


@contextmanager
def opened(
    run_dir: Path,
    config: Config,
    *,
    dry: bool = False,
    by: str = "hook",
    reason: str | None = None,
    timed: bool = False,
    kernel: Callable[[], Kernel] | None = None,
    store: Store | None = None,
) -> Iterator[Session]:
    """A session on this node, in the network namespace of the calling thread. *timed*: note how long each op takes.

    *store*: one that was made before in this namespace, for the same directory. A *dry* session goes on with what that
    has read.
    """
    node = (kernel or Kernel)()
    if store and not dry:
        store.refresh()
    try:
        yield Session(Timed(node) if timed else node, store or Store(run_dir), run_dir, config, dry, by, reason)
    finally:
        node.close()


def alive(journal: Journal, session: Session) -> bool:
    """Whether the tap is still the one that *journal* is about."""
    if journal.boot not in ("", procfs.boot()):
        return False  # indices begin anew with each start of the node
    return session.kernel.ifindex(journal.nic.tap) == journal.ifindex


def followed(journal: Journal, kernel: Host) -> Journal:
    """*journal* with the names that its devices have now: somebody may have renamed an uplink.

    What is on it goes with it, proxy neighbours and settings. The list of devices stays as it is on disk, so that the
    next run sees that the journal has to be written.
    """
    names = {
        dev: name
        for dev, index in journal.devices
        if kernel.ifindex(dev) != index and (name := kernel.device(index)) is not None
    }
    if not names:
        return journal

    def renamed(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple(
            replace(entry, op=replace(entry.op, dev=names[dev]))  # type: ignore[call-arg]
            if (dev := getattr(entry.op, "dev", None)) in names
            else entry
            for entry in entries
        )

    return replace(journal, entries=renamed(journal.entries), pending=renamed(journal.pending))


def devices_of(journal: Journal, kernel: Host) -> tuple[tuple[str, int], ...]:
    """The devices that the entries of *journal* are about, other than its tap, with their indices."""
    devices: set[str] = {getattr(entry.op, "dev", journal.nic.tap) for entry in journal.entries} - {journal.nic.tap}
    return tuple((dev, index) for dev in sorted(devices) if (index := kernel.ifindex(dev)) is not None)


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
