"""Which NICs this node knows, and how they are: every journal and every NIC file, ours and Ganeti's, read once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG

from kvmifup.core.errors import JournalError, KvmIfupError, NamespaceError, NicError
from kvmifup.core.model import Nic, Phase
from kvmifup.core.records import record
from kvmifup.inputs import devices, nicfiles, values
from kvmifup.runs import clock, managed
from kvmifup.runs.expected import Expected
from kvmifup.runs.journal import Journal
from kvmifup.runs.leftovers import is_another
from kvmifup.runs.store import Store


@record
class Known:
    """A tap that a journal, a NIC file or Ganeti is about.

    *nic* is as it is to be wired: the NIC file counts, if there is one. *trouble* is what is wrong with its NIC file or
    journal; then *nic* can be missing. *told*: there is no tap yet, because its guest is only expected; since when, in
    seconds since 1970.
    """

    tap: str
    nic: Nic | None
    journal: Journal | None = None
    trouble: KvmIfupError | None = None
    told: float | None = None

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
        """Whether a person who says *name* means this one: its tap, its guest, or what messages call it."""
        if self.nic is None:
            return name == self.tap
        if self.told:
            return name in (self.nic.instance, self.label)
        return name in (self.tap, self.nic.instance, self.label, self.label.removesuffix(f" ({self.tap})"))

    @property
    def elsewhere(self) -> bool:
        """Whether it is wired in another network namespace."""
        return isinstance(self.trouble, NamespaceError)

    @property
    def phase(self) -> Phase:
        """The last phase that succeeded, DOWN for none."""
        return self.journal.phase if self.journal else Phase.DOWN


def all_nics(run_dir: Path, store: Store) -> list[Known]:
    """Every NIC that a journal, a NIC file or Ganeti tells of, by guest and number.

    Raises PermissionError if they are not ours to read.
    """
    found: dict[str, Known] = {}
    for tap, known in store.everything():
        try:
            journal = store.of_here(known) if known else store.load(tap)
        except (JournalError, NamespaceError) as error:
            found[tap] = Known(tap, None, None, error)
            continue
        if journal is not None:
            found[tap] = Known(tap, journal.nic, journal)
    unchanged = {file: tap for tap, one in found.items() if one.journal and (file := as_before(run_dir, one.journal))}
    described: dict[str, list[Nic]] = {}
    for path in nicfiles.files(run_dir):
        if str(path) in unchanged:
            continue
        try:
            nic = nicfiles.read_nic(path, run_dir)
        except NicError as error:
            key = str(path.relative_to(run_dir))
            found[key] = Known(key, None, None, error)
            continue
        if nic.tap not in found:  # the file may call it by another name of it
            nic = replace(nic, tap=devices.own_name(nic.tap))
        described.setdefault(nic.tap, []).append(nic)
    for file, tap in unchanged.items():
        if tap in described and (own := found[tap].nic):  # by another file, too
            described[tap].append(replace(own, source=file))
    for tap, nics in described.items():
        found |= of_tap(found.get(tap, Known(tap, None)), nics, run_dir)
    for tap, one in managed.all_nics(found):
        found[tap] = Known(tap, one) if isinstance(one, Nic) else Known(tap, None, None, one)
    return sorted(found.values(), key=lambda one: one.order)


def of_tap(known: Known, nics: Sequence[Nic], run_dir: Path) -> dict[str, Known]:
    """What is known of a tap, of which *known* is what its journal tells, and which the files of *nics* describe."""
    tap, journal = known.tap, known.journal
    leading = [nic for nic in nics if leads_to(f"{run_dir}/tap/{tap}", nic.source)]
    wired = [nic for nic in nics if journal and is_same(nic, journal.nic)]
    if not journal:
        wired = leading or (list(nics) if len(nics) == 1 else [])
    found = {tap: replace(known, nic=wired[0])} if wired else {tap: known} if journal or known.trouble else {}
    for nic in nics:
        others = [other for other in nics if other is not nic]
        if nic in wired[:1]:
            continue
        trouble = nicfiles.taken(nic, others[0]) if others and nic not in leading else None
        found[str(Path(nic.source).relative_to(run_dir))] = Known(tap, nic, None, trouble)
    return found


def is_same(nic: Nic, wired: Nic) -> bool:
    """Whether *nic* describes the NIC that was *wired*, perhaps otherwise by now."""
    return (nic.instance, nic.index) == (wired.instance, wired.index) or not is_another(nic, wired)


def as_before(run_dir: Path, journal: Journal) -> str | None:
    """The NIC file that *journal* was made from, if it has not been written since: reading it would tell nothing."""
    nic = journal.nic
    if nic.instance is None or nic.index is None:
        return None
    path = f"{run_dir}/nic/{nic.instance}/{nic.index}.toml"  # no `Path`: there are thousands
    reached = min(journal.since, time.time() - clock.age(journal))  # by either way that the clock may have been set
    with suppress(OSError):
        file = os.lstat(path)
        if S_ISREG(file.st_mode) and file.st_mtime < reached and leads_to(f"{run_dir}/tap/{nic.tap}", path):
            return path
    return None


def leads_to(link: str, path: str) -> bool:
    """Whether the symlink *link* of a tap leads to the NIC file *path*."""
    try:
        return os.readlink(link) == f"../nic/{'/'.join(path.split('/')[-2:])}"
    except OSError:
        return False


def coming(guests: Sequence[Expected], here: Sequence[Known]) -> list[Known]:
    """The NICs of *guests* that are to come, without those that are *here*, in their order."""
    wired = {(one.nic.instance, one.nic.mac) for one in here if one.nic}
    nics = [Known("", nic, told=since) for since, guest in ((one.since, one) for one in guests) for nic in guest.nics]
    return [one for one in nics if one.nic and (one.nic.instance, one.nic.mac) not in wired]


def selected(name: str | None, everything: Sequence[Known]) -> list[Known]:
    """Those that *name*, a tap or a guest, means; for None all that are of this network namespace.

    Raises NicError if it means none.
    """
    found = [one for one in everything if (not one.elsewhere if name is None else one.is_called(name))]
    if not found and name is not None:
        own = devices.own_name(name)
        found = [one for one in everything if one.tap == own]
    if not found and name is not None:
        known = [word for one in everything for word in (one.tap, one.nic.instance if one.nic else None) if word]
        hint = values.misspelt(name, known) or "`kvm-ifup show` lists all"
        raise NicError("no journal and no NIC file is about it", hint=hint, where=name)
    return found
