"""The journals of one directory, in memory: each is read again only when its file has changed.

docs/code.md explains the token, by which a process knows that nobody else has changed anything.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Hashable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from kvmifup.core.errors import JournalError
from kvmifup.core.finder import Finder
from kvmifup.core.records import record
from kvmifup.runs.journal import Journal

Stamp = tuple[int, ...]  # of a file: what changes when it is replaced or written
TRUSTED = 1.0  # seconds after which all files are looked at anyway: a person may have changed one
TICK = 20_000_000  # ns: changes of a file that are this far apart have different times (a jiffy is 10 ms at most)

# Names of what journals have in common: a routed NIC; one that has more than single addresses.
ROUTED, NETWORKS = ("routed",), ("networks",)


@record
class Seen:
    """A file as it was when it was read last. *stamp* changes with the file; *journal* is None if it is unreadable.

    *settled*: it had not just been written, so a later write must give it another time. *known* is the hash of its
    text, which is as long as the journal is large; None if nobody has read it whole. (64 bits with a key of this
    process's own, so nobody can make another text that has the same.)
    """

    stamp: Stamp
    settled: bool
    known: int | None
    journal: Journal | None

    @property
    def names(self) -> set[Hashable]:
        """The names by which `Store.others` finds the journal."""
        return names_of(self.journal) if self.journal else set()


def names_of(journal: Journal) -> set[Hashable]:
    """The names by which `Store.others` finds *journal*."""
    nic, entries = journal.nic, (*journal.entries, *journal.pending)
    kinds = [ROUTED] * (nic.mode == "routed") + [NETWORKS] * (nic.mode == "routed" and bool(nic.networks))
    return {nic.instance, *kinds, *map(str, nic.ip), *(entry.op.key for entry in entries if entry.op.shared)}


class Files(Protocol):
    """The journal files of one directory: `kvmifup.runs.store.Store`."""

    def trusted_stamps(self) -> dict[str, Stamp]:
        """The stamps of all journals, by tap. Raises KvmIfupError."""

    def trusted_stamp(self, tap: str) -> Stamp | None:
        """That of the journal of *tap*; None if it has none. Raises KvmIfupError."""

    def read(self, tap: str) -> tuple[str, Journal]:
        """The text of the file of *tap*, and the journal that it is. Raises JournalError, FileNotFoundError, and other
        errors if that cannot be found out."""


class Index:
    """The journals in one directory, each read again only when its file has changed; for all threads.

    A full node has hundreds, and every hook must know which address is on which of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, Seen] = {}
        self._taps: Finder[Hashable, str] = Finder()  # by name
        self._token = b""
        self._updated = 0.0
        self.heeded = False  # somebody looks whenever a file has changed

    @property
    def updated(self) -> bool:
        """Whether the files have been looked at."""
        return self._updated > 0

    def take_over(self, before: bytes, token: bytes) -> bool:
        """Take over the lock as *token*, after the holder that left *before*; whether what is known is still right.

        It is if the last holder was this process, and if it has looked at the files a moment ago, or looks whenever
        one changes.
        """
        with self._lock:
            recent = self.heeded or time.monotonic() - self._updated < TRUSTED
            ours = self._token == before != b"" and recent
            self._token = token if ours else b""
            return ours

    def vouch(self, token: bytes) -> None:
        """What is known is right as of *token*: it was updated after the lock was taken."""
        with self._lock:
            self._token = token

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change to a file: without the token meanwhile, so that nothing is trusted if it fails half way."""
        with self._lock:
            token, self._token = self._token, b""
        yield
        with self._lock:
            self._token = token

    def update(self, files: Files) -> None:
        """Look at every file, and read those that have changed. Raises what *files* raises: then not all are known."""
        self._updated = time.monotonic()
        self._catch_up(files, files.trusted_stamps())

    def heed(self, files: Files, stamps: Mapping[str, Stamp], taps: Collection[str] | None = None) -> None:
        """The same, for who looks at the *stamps* whenever a file changes: then nobody else need do it. Raises so.

        *taps*: only those of these, because no other has changed.
        """
        heeded, self.heeded = self.heeded or taps is None, False
        if taps is None:
            self._catch_up(files, stamps)
        for tap in taps or ():
            with self._lock:
                self._look_at(tap, files)
        self.heeded = heeded

    def _catch_up(self, files: Files, there: Mapping[str, Stamp]) -> None:
        # To look at thousands takes long, and hooks wait for the lock: so what seems new is looked at once more.
        with self._lock:
            new = [tap for tap, stamp in there.items() if not self._knows(tap, stamp)]
            gone = self._seen.keys() - there.keys()
        for tap in (*new, *gone):
            with self._lock:
                self._look_at(tap, files)

    def _knows(self, tap: str, stamp: Stamp) -> bool:
        seen = self._seen.get(tap)
        return seen is not None and seen.settled and seen.stamp == stamp

    def _look_at(self, tap: str, files: Files) -> None:
        stamp = files.trusted_stamp(tap)
        if stamp is None:
            self._forget(tap)
            return
        if self._knows(tap, stamp):
            return
        now = time.time_ns()
        known, journal = None, None
        try:
            text, journal = files.read(tap)
            known = hash(text)
        except FileNotFoundError:  # its guest has just left
            self._forget(tap)
            return
        except JournalError:
            pass
        # abs: the clock may have been set back since.
        self._remember(tap, Seen(stamp, abs(now - stamp[0]) > TICK, known, journal))

    def _forget(self, tap: str) -> None:
        seen = self._seen.pop(tap, None)
        for name in seen.names if seen else ():
            self._taps.remove(name, tap)

    def decoded(self, tap: str, text: str) -> Journal | None:
        """The journal of *tap*, if its file had this *text* when it was read last; else None."""
        seen = self._seen.get(tap)
        return seen.journal if seen and seen.known == hash(text) else None

    def removed(self, tap: str) -> None:
        """Forget what this process has removed."""
        with self._lock:
            self._forget(tap)

    def written(self, tap: str, text: str | None, journal: Journal, names: Set[Hashable] | None = None) -> None:
        """Remember what this process has written; *text* None for a part of it. The file is read again all the same: it
        may have changed by then. *names*: those of the journal, if they have been found already.
        """
        kept = replace(journal, nic=replace(journal.nic))  # copies: what the run has looked up in them goes with it
        with self._lock:
            self._remember(tap, Seen((), False, None if text is None else hash(text), kept), names)

    def _remember(self, tap: str, seen: Seen, names: Set[Hashable] | None = None) -> None:
        self._forget(tap)
        self._seen[tap] = seen
        for name in seen.names if names is None else names:
            self._taps.add(name, tap)

    def naming(self, name: Hashable) -> Iterator[tuple[str, Journal]]:
        """The journals that *name* is in, with their taps; one by one, because mostly only the first is wanted."""
        with self._lock:
            taps = self._taps.by(name)
        for tap in taps:
            with self._lock:
                seen = self._seen.get(tap)
            if seen and seen.journal:
                yield tap, seen.journal

    def by_tap(self) -> list[tuple[str, Journal | None]]:
        """All of them, by tap; None for one that is unreadable."""
        with self._lock:
            return sorted(((tap, seen.journal) for tap, seen in self._seen.items()), key=itemgetter(0))


def stamp_of(info: os.stat_result) -> Stamp:
    """The stamp of a file, its time in ns first."""
    return info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_size


@cache
def index_of(_directory: Path) -> Index:
    """The index of a directory: one in each process."""
    return Index()
