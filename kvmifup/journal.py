"""What was done for each tap and what was there before, on disk before the kernel is touched.

One JSON file per tap, `state/<tap>.json` below the run directory::

    {"version": 1, "namespace": 4026531840, "nic": {...}, "ifindex": 7, "phase": "pre",
     "since": 1790000000.25, "by": "hook", "frame": null,
     "entries": [{"op": "link-mtu", "dev": "tap0", "want": 9000, "prior": 1500}, ...],
     "pending": [...]}

`namespace` is the network namespace that the tap is in, by the number that `lsns` shows too: runs in several can
have one run directory, and what is a live tap in one is nothing in another.
`since` (seconds since 1970) is when the phase was reached or last had something to mend, `by` whom: a hook,
a person at a terminal, or the agent at the guest's arrival, which it knew by `frame`.
`entries` is what successful runs did, each op with the value from before the first of them. `pending` is
what a run is about to do, or was doing when it was killed: its values are those from before that run.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvmifup import trust
from kvmifup.client import NAMESPACE
from kvmifup.errors import JournalError, KernelError, NamespaceError, PrivilegeError
from kvmifup.model import Nic, Phase
from kvmifup.ops import KINDS, Op, Value, field_names

Stamp = tuple[int, ...]  # of a file: what changes when it is replaced or written

VERSION = 1
MAX_BYTES = 16 << 20  # a NIC may have thousands of addresses
TRUSTED = 1.0  # seconds after which all files are looked at anyway: a person may have changed one
TICK = 20_000_000  # ns: longer than two changes of a file can have one time (a jiffy is 10 ms at most)


@dataclass(frozen=True)
class Entry:
    """An op that was or will be done, and the value that the kernel had before."""

    op: Op
    prior: Value

    @property
    def undo(self) -> Op:
        """The op that puts the old value back."""
        return self.op.turned(self.prior)


@dataclass(frozen=True)
class Journal:
    """Everything remembered about one tap; *phase* is the last one that succeeded, DOWN for none."""

    nic: Nic
    ifindex: int
    phase: Phase = Phase.DOWN
    entries: tuple[Entry, ...] = field(default=())
    pending: tuple[Entry, ...] = field(default=())
    since: float = 0.0
    by: str = ""
    frame: str | None = None
    namespace: int = field(kw_only=True)

    def prior(self, key: tuple[object, ...]) -> Entry | None:
        """The committed entry about *key*."""
        return next((entry for entry in self.entries if entry.op.key == key), None)


@dataclass(frozen=True)
class Known:
    """A file as it was when it was read last: *stamp* tells it from another, *journal* None for an unreadable one.

    *settled*: it had not just been written, so that a later write must give it another time.
    """

    stamp: Stamp
    settled: bool
    text: str
    journal: Journal | None

    @property
    def names(self) -> set[Hashable]:
        """What `Store.others` finds the journal by."""
        if self.journal is None:
            return set()
        nic, entries = self.journal.nic, (*self.journal.entries, *self.journal.pending)
        return {nic.instance, *map(str, nic.ip), *(entry.op.key for entry in entries if entry.op.shared)}


class Index:
    """The journals in one directory, each read again only when its file is another; for all threads.

    A full node has hundreds, and every hook must know which address is on which of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._taps: dict[Hashable, set[str]] = {}  # by name
        self._token = b""
        self._updated = 0.0

    def take_over(self, before: bytes, token: bytes) -> bool:
        """Whether nothing can have changed since this process held the lock last; it does now, as *token*."""
        with self._lock:
            ours = self._token == before != b"" and time.monotonic() - self._updated < TRUSTED
            self._token = token if ours else b""
            return ours

    def vouch(self, token: bytes) -> None:
        """It has been updated since the lock was taken as *token*."""
        with self._lock:
            self._token = token

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change to a file: if that fails half way, nothing is known for sure."""
        with self._lock:
            token, self._token = self._token, b""
        yield
        with self._lock:
            self._token = token

    def update(self, store: Store) -> None:
        """Look at every file, and read those that have changed."""
        with self._lock:
            self._updated = time.monotonic()
            there: dict[str, Stamp] = {}
            with suppress(trust.Untrusted, OSError):
                trust.check(store.directory, store.run_dir)
                there = store.stamps()
            for tap, stamp in there.items():
                self._look_at(tap, stamp, store)
            for tap in self._known.keys() - there.keys():
                self._forget(tap)

    def _look_at(self, tap: str, stamp: Stamp, store: Store) -> None:
        known = self._known.get(tap)
        if known and known.settled and known.stamp == stamp:
            return
        now = time.time_ns()
        try:
            text = store.text(tap)
            journal: Journal | None = store.decoded(tap, text)
        except (OSError, JournalError):
            text, journal = "", None
        self._remember(tap, Known(stamp, now - stamp[0] > TICK, text, journal))

    def _forget(self, tap: str) -> None:
        known = self._known.pop(tap, None)
        for name in known.names if known else ():
            self._taps[name].discard(tap)
            if not self._taps[name]:
                del self._taps[name]

    def decoded(self, tap: str, text: str) -> Journal | None:
        """The journal that *text* was last time, None if that was another text."""
        known = self._known.get(tap)
        return known.journal if known and known.text == text else None

    def removed(self, tap: str) -> None:
        """Forget what this process has removed."""
        with self._lock:
            self._forget(tap)

    def written(self, tap: str, text: str, journal: Journal) -> None:
        """Remember what this process has written. The file is read again all the same: it may be another by now."""
        with self._lock:
            self._remember(tap, Known((), False, text, journal))

    def _remember(self, tap: str, known: Known) -> None:
        self._forget(tap)
        self._known[tap] = known
        for name in known.names:
            self._taps.setdefault(name, set()).add(tap)

    def naming(self, name: Hashable) -> Iterator[tuple[str, Journal]]:
        """The journals that *name* is in, with their taps; one by one, as the first is mostly all that is wanted."""
        with self._lock:
            taps = tuple(self._taps.get(name, ()))
        for tap in taps:
            with self._lock:
                known = self._known.get(tap)
            if known and known.journal:
                yield tap, known.journal

    def all(self) -> list[Journal]:
        """All of them."""
        with self._lock:
            return [known.journal for known in self._known.values() if known.journal]


def stamp_of(info: os.stat_result) -> Stamp:
    """The stamp of a file, its time in ns first."""
    return info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_size


_index_of: Callable[[Path], Index] = cache(lambda _directory: Index())


class Store:
    """The journals below *run_dir*, for runs in the network namespace that it is made in: what they read, and
    find by name, is never another's. Writing is atomic and survives a power cut; a dead run's temporary file is
    overwritten by the next."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / "state"
        self.namespace = Path(NAMESPACE).stat().st_ino
        self._index = _index_of(self.directory)
        self._local = threading.local()  # fresh: this thread has updated the index since it had to

    def refresh(self) -> None:
        """Forget what this thread has found out about other taps: something may have changed."""
        self._local.fresh = False
        self._local.token = b""

    def begin(self, lock: Path) -> None:
        """A run begins that holds *lock*, without which nobody changes what taps share.

        Each run leaves its own mark in it: when the last one was this process's, there is nothing to look for.
        """
        token = os.urandom(16)
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            before = os.pread(descriptor, len(token), 0)
            os.pwrite(descriptor, token, 0)
        finally:
            os.close(descriptor)
        self._local.token = token
        self._local.fresh = self._index.take_over(before, token)

    def path(self, tap: str) -> Path:
        """Where the journal of *tap* is."""
        return self.directory / f"{tap}.json"

    def load(self, tap: str) -> Journal | None:
        """The journal of *tap*, None if it has none. Raises JournalError; NamespaceError if it is another's."""
        try:
            os.lstat(self.path(tap))  # most hooks find none, and this is quicker than what it takes to trust one
            journal = self.decoded(tap, self.text(tap))
        except FileNotFoundError:
            return None
        except PermissionError:
            raise
        except OSError as error:
            raise self._unreadable(tap, type(error).__name__) from None
        if journal.namespace != self.namespace:
            raise NamespaceError(
                f"a tap of this name is wired in network namespace {journal.namespace}, and this is {self.namespace}",
                hint=f"run it there: `lsns -t net` finds it; if it is gone, remove {self.path(tap)}",
            )
        return journal

    def text(self, tap: str) -> str:
        """What the file of *tap* says. Raises JournalError, OSError."""
        try:
            return trust.read(self.path(tap), self.run_dir, MAX_BYTES)
        except trust.Untrusted as error:
            raise self._unreadable(tap, str(error)) from None

    def decoded(self, tap: str, text: str) -> Journal:
        """The journal in *text*, if it is one and about *tap*. Raises JournalError."""
        known = self._index.decoded(tap, text)
        if known:
            return known
        try:
            journal = decode(json.loads(text))
            if journal.nic.tap != tap:
                raise ValueError
            return journal
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self._unreadable(tap, type(error).__name__) from None

    def _unreadable(self, tap: str, why: str) -> JournalError:
        return JournalError(
            f"the journal {self.path(tap)} cannot be read: {why}",
            hint="`kvm-ifup gc` sets it aside; what it would have undone stays",
        )

    def stamp(self, tap: str) -> Stamp | None:
        """What changes whenever the journal of *tap* does; None if it has none."""
        try:
            info = self.path(tap).stat()
        except OSError:
            return None
        return stamp_of(info)

    def save(self, journal: Journal) -> None:
        """Write *journal* so that it is either wholly there or not at all, even after a crash.

        Raises KernelError when the file system refuses, PrivilegeError when we may not.
        """
        path = self.path(journal.nic.tap)
        temporary = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            if not self.directory.is_dir():
                self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            # Not indented: that keeps `json` from using its encoder in C, and takes it ten times as long.
            text = json.dumps(encode(journal))
            with self._index.changing(), open(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
                os.rename(temporary, path)
                self._sync()
                self._index.written(journal.nic.tap, text, journal)
        except PermissionError as error:
            raise PrivilegeError(f"cannot write {error.filename or path}", hint="run it as root") from None
        except OSError as error:
            raise KernelError(f"cannot write {path}: {error.strerror}", errno=error.errno or 0) from None

    def delete(self, tap: str) -> None:
        """Forget *tap*."""
        with self._index.changing():
            self.path(tap).unlink(missing_ok=True)
            self._sync()
            self._index.removed(tap)

    def set_aside(self, tap: str) -> Path:
        """Move an unreadable journal out of the way; returns where it is now."""
        aside = self.path(tap).with_suffix(".unreadable")
        with self._index.changing():
            os.rename(self.path(tap), aside)
            self._index.removed(tap)
        return aside

    def nic_of_live(self, tap: str) -> Nic | None:
        """The NIC that an earlier phase wired, if *tap* is still the device that it wired.

        Raises JournalError, NamespaceError.
        """
        journal = self.load(tap)
        try:
            return journal.nic if journal and socket.if_nametoindex(tap) == journal.ifindex else None
        except OSError:
            return None

    def has_here(self, tap: str, addresses: Collection[str]) -> bool:
        """Whether post has been done for *addresses* on *tap*, not been undone, and the tap is still that one."""
        try:
            journal = self.load(tap)
            if journal is None or journal.phase is not Phase.POST or socket.if_nametoindex(tap) != journal.ifindex:
                return False
        except (JournalError, NamespaceError, OSError):
            return False
        return {str(prefix.network_address) for prefix in journal.nic.ip}.issuperset(addresses)

    def taps(self) -> list[str]:
        """The taps that have a journal."""
        return sorted(self.stamps())

    def stamps(self) -> dict[str, Stamp]:
        """The stamps of all journals, by tap."""
        found: dict[str, Stamp] = {}
        with suppress(FileNotFoundError, NotADirectoryError), opened(self.directory) as directory:
            with os.scandir(directory) as files:
                listed = list(files)
            for file in listed:
                tap = file.name.removesuffix(".json")
                if tap != file.name:
                    with suppress(FileNotFoundError):  # its guest has just left
                        found[tap] = stamp_of(file.stat(follow_symlinks=False))
        return found

    def others(self, tap: str, name: Hashable) -> Iterator[Journal]:
        """The readable journals of other taps that name *name*: an instance, an address or prefix of the NIC, or
        the key of a shared op. An unreadable one is its own tap's trouble.

        They are as they were when the run began (`begin`), or at the first call since `refresh`, but for what
        this process has written.
        """
        if not getattr(self._local, "fresh", False):
            self._index.update(self)
            self._local.fresh = True
            if getattr(self._local, "token", b""):
                self._index.vouch(self._local.token)
        for other, journal in self._index.naming(name):
            if other != tap and journal.namespace == self.namespace:
                yield journal

    def elsewhere(self) -> Counter[int]:
        """How many journals there are of other network namespaces, by namespace."""
        self._index.update(self)
        return Counter(one.namespace for one in self._index.all() if one.namespace != self.namespace)

    def _sync(self) -> None:
        with suppress(FileNotFoundError), opened(self.directory) as descriptor:
            os.fsync(descriptor)


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of *directory*. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- JSON ---------------------------------------------------------------------------------------------


def encode(journal: Journal) -> dict[str, Any]:
    """*journal* as JSON's types."""
    return {
        "version": VERSION,
        "namespace": journal.namespace,
        "nic": shallow(journal.nic) | {"ip": [str(prefix) for prefix in journal.nic.ip]},
        "ifindex": journal.ifindex,
        "phase": journal.phase.name.lower(),
        "since": journal.since,
        "by": journal.by,
        "frame": journal.frame,
        "entries": [encode_entry(entry) for entry in journal.entries],
        "pending": [encode_entry(entry) for entry in journal.pending],
    }


def encode_entry(entry: Entry) -> dict[str, Any]:
    """*entry* as JSON's types."""
    return {"op": entry.op.kind, **shallow(entry.op), "prior": entry.prior}


def shallow(data: Nic | Op) -> dict[str, Any]:
    """The fields of *data*, without the deep copy that `dataclasses.asdict` takes its time for."""
    return {name: getattr(data, name) for name in field_names(data)}


def decode(data: dict[str, Any]) -> Journal:
    """The journal that `encode` gave. Raises ValueError, KeyError or TypeError for anything else."""
    if data["version"] != VERSION:
        raise ValueError("another version")
    nic = Nic(**data["nic"] | {"ip": tuple(ipaddress.ip_network(prefix) for prefix in data["nic"]["ip"])})
    return Journal(
        nic=nic,
        ifindex=int(data["ifindex"]),
        phase=Phase[data["phase"].upper()],
        entries=tuple(decode_entry(entry) for entry in data["entries"]),
        pending=tuple(decode_entry(entry) for entry in data["pending"]),
        since=float(data["since"]),
        by=str(data["by"]),
        frame=None if data["frame"] is None else str(data["frame"]),
        namespace=int(data["namespace"]),
    )


def decode_entry(data: dict[str, Any]) -> Entry:
    """The entry that `encode_entry` gave."""
    values = {key: value for key, value in data.items() if key not in ("op", "prior")}
    for name in ("selectors", "environment"):
        if name in values:
            values[name] = tuple((str(key), value) for key, value in values[name])
    if not all(isinstance(value, str | int | float | tuple | None) for value in (*values.values(), data["prior"])):
        raise TypeError
    return Entry(KINDS[data["op"]](**values), data["prior"])
