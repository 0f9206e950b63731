"""The journals on disk: loading, saving atomically, finding by name."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kvmifup.core.errors import (
    ForeignJournalError,
    JournalError,
    KernelError,
    KvmIfupError,
    NamespaceError,
    NoSpaceError,
    PrivilegeError,
)
from kvmifup.core.model import Nic, Phase
from kvmifup.inputs import devices, places, trust
from kvmifup.runs import namespaces
from kvmifup.runs.draft import ARMED, Draft
from kvmifup.runs.index import Stamp, index_of, names_of, stamp_of
from kvmifup.runs.journal import HEAD, Journal, Mark, OtherVersion, decode, encode, marked

STATE = "state"
FOLDER = os.O_RDONLY | os.O_DIRECTORY
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # the last one is a limit of our caller's
MAX_BYTES = 16 << 20  # a NIC may have thousands of addresses


class Store:
    """The journals below *run_dir* of the network namespace in which the store is made.

    It neither loads nor finds those of another one. Writing is atomic and survives a power cut. The next write
    replaces the temporary file of a run that was killed.

    Large because all that touches a journal's file is here.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / STATE
        self.namespace = namespaces.number()
        self.cookie = namespaces.cookie()
        self._index = index_of(self.directory)
        self._local = threading.local()  # fresh: this thread has updated the index since it had to

    def refresh(self) -> None:
        """Forget what this thread has found out about other taps: something may have changed."""
        self._local.fresh = False
        self._local.token = b""

    def trust_index(self) -> None:
        """Take other taps' journals as they are in memory, if somebody looks whenever a file changes (`heed`).

        For that process itself, where it only looks: it knows no more of the tap that it looks at.
        """
        self._local.fresh = self._index.heeded

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
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                before = os.pread(descriptor, len(token), 0)
                os.pwrite(descriptor, token, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            before = token = b""  # nor has anybody else left one: to write over it would have taken no space
        self._local.token = token
        self._local.fresh = self._index.take_over(before, token)

    def path(self, tap: str) -> Path:
        """Where the journal of *tap* is."""
        return self.directory / f"{tap}.json"

    def load(self, tap: str) -> Journal | None:
        """The journal of *tap*, None if it has none, or that of a network namespace that is gone.

        Raises JournalError; NamespaceError for another namespace's; KernelError and PrivilegeError if it cannot be
        read, and NotReadyError if others could have put it there.
        """
        try:
            os.lstat(self.path(tap))  # most hooks find none, and this is quicker than what it takes to trust one
            _, journal = self.read(tap)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            places.verify(self.run_dir, STATE)
            return None
        return self.of_here(journal)

    def everything(self) -> list[tuple[str, Journal | None]]:
        """Every tap that has a journal, with it; None if it is unreadable. Of any namespace. Raises as `others`."""
        self._catch_up()
        return self._index.by_tap()

    def of_here(self, journal: Journal) -> Journal | None:
        """*journal*, None if its network namespace is gone. Raises NamespaceError if it is another one."""
        if journal.namespace != self.namespace:
            raise NamespaceError(
                f"a tap of this name is wired in network namespace {journal.namespace}, and this is {self.namespace}",
                hint=f"run it there: `lsns -t net` finds it; if it is gone, remove {self.path(journal.nic.tap)}",
            )
        return journal if self.is_here(journal) else None

    def is_here(self, journal: Journal) -> bool:
        """Whether *journal* is of this network namespace: not of another, nor of an earlier one with its number."""
        return journal.namespace == self.namespace and journal.cookie in (0, self.cookie)

    def read(self, tap: str) -> tuple[str, Journal]:
        """The text of the file of *tap*, and the journal that it is.

        Raises JournalError for what has been read whole and is none, ForeignJournalError for what is not for us,
        NotReadyError, KernelError and PrivilegeError as `load` does, FileNotFoundError.
        """
        path = self.path(tap)
        try:
            text = trust.read(path, self.run_dir, MAX_BYTES)
        except trust.Untrusted as error:
            if isinstance(error, trust.NotText):
                raise unreadable(path, str(error)) from None
            places.verify(self.run_dir, STATE)
            raise ForeignJournalError(f"the journal {path} is not to be trusted: {error}", hint=error.mend) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise refused(error, f"cannot read the journal {path}") from None
        except MemoryError:
            raise no_memory(path) from None
        seen = self._index.decoded(tap, text)
        if seen:
            return text, seen
        try:
            journal = decode(json.loads(text))
            if journal.nic.tap != tap:
                raise ValueError
        except OtherVersion:
            raise ForeignJournalError(
                f"the journal {path} is of another version of kvm-ifup",
                hint=f"only that version can undo what it has done; if the guest has gone, remove {path}",
            ) from None
        except MemoryError:
            raise no_memory(path) from None
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise unreadable(path, type(error).__name__) from None
        return text, journal

    def stamp(self, tap: str) -> Stamp | None:
        """A stamp that changes whenever the journal of *tap* does; None if it has none. Raises OSError."""
        try:
            return stamp_of(os.lstat(f"{self.directory}/{tap}.json"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def save(self, journal: Journal) -> None:
        """Write *journal* so that it is either wholly there or not at all, even after a crash. Raises as `draft`."""
        self.publish(self.draft(journal))

    def draft(self, journal: Journal, directory: str = STATE) -> Draft:
        """Write *journal*, but not yet in the place of the one that is there. `publish` then takes no more space.

        There is one draft of each tap in a *directory*.
        Raises KernelError when the file system refuses, PrivilegeError when we may not, NotReadyError when others may.
        """
        tap = journal.nic.tap
        temporary = f"{self.run_dir}/{directory}/{tap}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            places.made(self.run_dir, directory)
            # Not indented: that keeps `json` from using its encoder in C, and takes it ten times as long.
            text = json.dumps(encode(journal))
            with opened(temporary, flags, 0o600) as file:
                left = text.encode()
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
                stamp = stamp_of(os.fstat(file))
        except OSError as error:
            self.discard(tap, directory)
            raise refused(error, f"cannot write {self.path(tap)}") from None
        return Draft(journal, names_of(journal), text, temporary, stamp)

    def publish(self, draft: Draft) -> None:
        """Put *draft* in the place of the journal, at once or not at all. Raises KernelError, PrivilegeError."""
        tap = draft.journal.nic.tap
        path = self.path(tap)
        try:
            with self._index.changing():
                os.rename(draft.file, path)
                sync(self.directory)
                self._index.written(tap, draft.text, draft.journal, draft.names)
        except OSError as error:
            self.discard(tap)
            raise refused(error, f"cannot write {path}") from None

    def discard(self, tap: str, directory: str = STATE) -> None:
        """Let go of the draft of *tap* in *directory*, if there is one: it takes space."""
        with suppress(OSError):
            os.unlink(f"{self.run_dir}/{directory}/{tap}.new")

    def mark(self, journal: Journal, mark: Mark) -> Journal:
        """Say *mark* in the file of *journal*, at once or not at all; returns what the journal is with it.

        It takes no space: one letter is written over another. Where nobody can write to a file any more, or we must
        not (RLIMIT_FSIZE), nothing is said, because what is to be undone has to be undone all the same.
        Raises KernelError, PrivilegeError.
        """
        path = self.path(journal.nic.tap)
        after = marked(journal, mark)
        try:
            with opened(path, os.O_RDWR | os.O_NOFOLLOW) as file:
                head = os.pread(file, len(HEAD) + 1, 0)
                if not head.startswith(HEAD):  # version 1
                    with suppress(NoSpaceError):
                        self.save(after)
                    return after
                if mark is Mark.UNDO and head[len(HEAD) :].decode() not in (Mark.NONE.value, Mark.UNDO.value):
                    mark = Mark.UNDO_ENTRIES
                with self._index.changing():
                    os.pwrite(file, mark.value.encode(), len(HEAD))
                    os.utime(file)  # tells who watches the directory
                    os.fsync(file)
                    self._index.written(journal.nic.tap, None, after)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EFBIG):
                raise refused(error, f"cannot write {path}") from None
        return after

    def delete(self, tap: str) -> None:
        """Forget *tap*. Raises KernelError, PrivilegeError."""
        try:
            with self._index.changing():
                with suppress(FileNotFoundError, NotADirectoryError):
                    self.path(tap).unlink()
                sync(self.directory)
                self._index.removed(tap)
            self.discard(tap, ARMED)
        except OSError as error:
            raise refused(error, f"what was to be undone is, but cannot remove {self.path(tap)}") from None

    def set_aside(self, tap: str) -> Path:
        """Move an unreadable journal out of the way; returns where it is now."""
        aside = set_aside(self.path(tap))
        with self._index.changing():
            os.rename(self.path(tap), aside)
            self._index.removed(tap)
        return aside

    def nic_of_live(self, tap: str) -> Nic | None:
        """The NIC that an earlier phase wired, if *tap* is still the device that it wired.

        Raises JournalError, NamespaceError.
        """
        journal = self.load(tap)
        return journal.nic if journal and devices.index_of(tap) == journal.ifindex else None

    def has_here(self, tap: str, addresses: Collection[str]) -> bool:
        """Whether post has been done for *addresses* on *tap*, not been undone, and the tap is still that one.

        Raises KernelError and OSError if nobody knows.
        """
        try:
            journal = self.load(tap)
        except KernelError:
            raise
        except KvmIfupError:
            return False
        if journal is None or journal.phase is not Phase.POST or devices.index_of(tap) != journal.ifindex:
            return False
        return {str(prefix.network_address) for prefix in journal.nic.ip}.issuperset(addresses)

    def taps(self) -> list[str]:
        """The taps that have a journal."""
        return sorted(self.stamps())

    def stamps(self, taps: Collection[str] | None = None) -> dict[str, Stamp]:
        """The stamps of all journals, by tap; or of those of *taps*. Raises OSError."""
        if taps is not None:
            return {tap: stamp for tap in taps if (stamp := self.stamp(tap))}
        found: dict[str, Stamp] = {}
        with suppress(FileNotFoundError, NotADirectoryError), opened(self.directory, FOLDER) as directory:
            with os.scandir(directory) as files:
                listed = list(files)
            for file in listed:
                tap = file.name.removesuffix(".json")
                if tap != file.name:
                    with suppress(FileNotFoundError):  # its guest has just left
                        found[tap] = stamp_of(file.stat(follow_symlinks=False))
        return found

    def trusted_stamps(self) -> dict[str, Stamp]:
        """The stamps of all journals, by tap. Raises NotReadyError where others could write, KernelError."""
        try:
            places.verify(self.run_dir, STATE)
            return self.stamps()
        except OSError as error:
            raise refused(error, f"cannot read {self.directory}") from None

    def trusted_stamp(self, tap: str) -> Stamp | None:
        """The same of one; None if there is none."""
        try:
            return self.stamp(tap)
        except OSError as error:
            raise refused(error, f"cannot read {self.path(tap)}") from None

    def heed(self, stamps: Mapping[str, Stamp], taps: Collection[str] | None = None) -> None:
        """Take in what has changed, for who looks at the *stamps* whenever a file does: at all of them, or only at
        those of *taps*. Raises as `others`.
        """
        self._index.heed(self, stamps, taps)

    def others(self, tap: str, name: Hashable) -> Iterator[Journal]:
        """The readable journals of other taps that name *name*: an instance, an address or prefix of the NIC, or
        the key of a shared op. One that is broken or not for us is its own tap's trouble; one that cannot be read now
        is everybody's, because what is in it is not known. Raises KernelError, PrivilegeError, NotReadyError.

        They are as they were at `begin`, or else at the first call after `refresh`, with what this process has
        written since.
        """
        self._catch_up()
        for other, journal in self._index.naming(name):
            if other != tap and self.is_here(journal):
                yield journal

    def _catch_up(self) -> None:
        if not getattr(self._local, "fresh", False):
            self._index.update(self)
            self._local.fresh = True
            if getattr(self._local, "token", b""):
                self._index.vouch(self._local.token)

    def elsewhere(self) -> Counter[int]:
        """How many journals there are of other network namespaces, by namespace."""
        self._index.update(self)
        found = Counter(journal.namespace for _, journal in self._index.by_tap() if journal)
        return found - Counter({self.namespace: found[self.namespace]})


def sync(directory: Path) -> None:
    """Have what was changed in *directory* survive a power cut. Raises OSError."""
    with suppress(FileNotFoundError, NotADirectoryError), opened(directory, FOLDER) as descriptor:
        os.fsync(descriptor)


@contextmanager
def opened(path: Path | str, flags: int, mode: int = 0) -> Iterator[int]:
    """A descriptor of *path*, which is made with *mode* if *flags* say so. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def set_aside(journal: Path) -> Path:
    """Where *journal* is, if it could not be read and was moved out of the way."""
    return journal.with_suffix(".unreadable")


def unreadable(path: Path, why: str) -> JournalError:
    """The journal at *path* has been read, and makes no sense."""
    hint = "`kvm-ifup gc` sets it aside; what it would have undone stays"
    return JournalError(f"the journal {path} cannot be read: {why}", hint=hint)


def no_memory(path: Path) -> KernelError:
    """There is not enough to know what the journal at *path* is."""
    return KernelError(f"cannot read the journal {path}: no memory", errno=errno.ENOMEM)


def refused(error: OSError, what: str) -> KvmIfupError:
    """*error* as ours: *what* could not be done."""
    if isinstance(error, PermissionError):
        return PrivilegeError(what, hint="run it as root")
    kind = NoSpaceError if error.errno in NO_SPACE else KernelError
    return kind(f"{what}: {error.strerror}", errno=error.errno or 0)
