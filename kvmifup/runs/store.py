"""The journals on disk: loading, saving atomically, finding by name."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvmifup.core.errors import JournalError, KernelError, NamespaceError, PrivilegeError
from kvmifup.core.model import Nic, Phase
from kvmifup.inputs import trust
from kvmifup.runs.index import Stamp, index_of, stamp_of
from kvmifup.runs.journal import Journal, decode, encode

NAMESPACE = "/proc/self/ns/net"
MAX_BYTES = 16 << 20  # a NIC may have thousands of addresses


class Store:
    """The journals below *run_dir* of the network namespace in which the store is made.

    It neither loads nor finds those of another one. Writing is atomic and survives a power cut. The next write
    replaces the temporary file of a run that was killed.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / "state"
        self.namespace = Path(NAMESPACE).stat().st_ino
        self._index = index_of(self.directory)
        self._local = threading.local()  # fresh: this thread has updated the index since it had to

    def refresh(self) -> None:
        """Forget what this thread has found out about other taps: something may have changed."""
        self._local.fresh = False
        self._local.token = b""

    def prepare(self) -> None:
        """Read all journals if this process has never done so. Of thousands, `begin` then reads only what is new."""
        if not self._index.updated:
            self._index.update(self)

    def begin(self, lock: Path) -> None:
        """A run begins that holds *lock*, without which nobody changes what taps share.

        Each run writes a token of its own into the lock's file. If the last token is this process's, nobody else has
        held the lock since, and no journal need be looked at.
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
        """The journal of *tap*, None if it has none. Raises JournalError; NamespaceError for another namespace's."""
        try:
            os.lstat(self.path(tap))  # most hooks find none, and this is quicker than what it takes to trust one
            _, journal = self.read(tap)
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

    def read(self, tap: str) -> tuple[str, Journal]:
        """The text of the file of *tap*, and the journal that it is. Raises JournalError, OSError."""
        try:
            text = trust.read(self.path(tap), self.run_dir, MAX_BYTES)
            seen = self._index.decoded(tap, text)
            if seen:
                return text, seen
            journal = decode(json.loads(text))
            if journal.nic.tap != tap:
                raise ValueError
            return text, journal
        except trust.Untrusted as error:
            raise self._unreadable(tap, str(error)) from None
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self._unreadable(tap, type(error).__name__) from None

    def _unreadable(self, tap: str, why: str) -> JournalError:
        return JournalError(
            f"the journal {self.path(tap)} cannot be read: {why}",
            hint="`kvm-ifup gc` sets it aside; what it would have undone stays",
        )

    def stamp(self, tap: str) -> Stamp | None:
        """A stamp that changes whenever the journal of *tap* does; None if it has none."""
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

    def trusted_stamps(self) -> dict[str, Stamp]:
        """The stamps of all journals, by tap; none where others could write."""
        with suppress(trust.Untrusted, OSError):
            trust.check(self.directory, self.run_dir)
            return self.stamps()
        return {}

    def others(self, tap: str, name: Hashable) -> Iterator[Journal]:
        """The readable journals of other taps that name *name*: an instance, an address or prefix of the NIC, or
        the key of a shared op. An unreadable one is its own tap's trouble.

        They are as they were at `begin`, or else at the first call after `refresh`, with what this process has
        written since.
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
