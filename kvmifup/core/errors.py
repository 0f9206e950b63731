"""Every way to fail: a type, an exit code, a cause and a hint.

::

    KvmIfupError
    ├── UsageError         64  the command line is wrong, or contradicts the environment
    ├── NicError           65  a NIC's description is wrong, missing or not to be trusted
    ├── NotReadyError      69  the node cannot take this NIC: nothing was touched, or all was put back
    ├── NamespaceError     69  the tap's journal is of another network namespace: nothing was touched
    ├── BugError           70  our own mistake
    ├── JournalError       70  a journal that is broken
    │   └── ForeignJournalError 70  a journal that is not for us: of another version, or not to be trusted
    ├── RollbackError      70  something failed, and so did putting it back
    ├── KernelError        71  the kernel refused; all was put back
    │   ├── VanishedError  71  the device is not there any more
    │   └── NoSpaceError   71  the run directory is full; what is to be undone can be undone all the same
    ├── ProgramError       71  a program that we run for the node failed; all was put back
    ├── LockTimeoutError   75  another run holds the lock
    ├── InterruptedRun     75  a signal arrived; all was put back
    ├── PrivilegeError     77  not root, or not enough of it
    └── ConfigError        78  the configuration is wrong, missing or not to be trusted

The codes are those of sysexits.h.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar


class KvmIfupError(Exception):
    """The root of the tree. `str()` is the cause in one clause, `hint` what to do, `where` the NIC or the file."""

    code: ClassVar[int] = 70
    reference: ClassVar[str] = ""  # the hint if none is given

    def __init__(self, cause: str, *, hint: str = "", where: str = "") -> None:
        super().__init__(cause)
        self.hint = hint or self.reference
        self.where = where
        self.undone = False  # whether something had been changed before, and had to be put back

    def at(self, where: str) -> KvmIfupError:
        """Name the NIC or file that this is about, unless it is named already."""
        self.where = self.where or where
        return self


class UsageError(KvmIfupError):
    """The command line is wrong, or contradicts the environment."""

    code = 64


class NicError(KvmIfupError):
    """What describes the NIC is wrong, missing, or could have been written by somebody else."""

    code = 65
    reference = "see kvm-ifup-nic(5)"


class NotReadyError(KvmIfupError):
    """The node is not ready for this NIC: a bridge, table, uplink, address or directory is not as it must be."""

    code = 69


class NamespaceError(KvmIfupError):
    """The tap of this name is wired in another network namespace, and only a run in there can touch it."""

    code = 69


class BugError(KvmIfupError):
    """An exception that nobody has foreseen: a defect of kvm-ifup."""

    code = 70


class JournalError(KvmIfupError):
    """The journal of a tap has been read and makes no sense, so nobody knows what is to be undone."""

    code = 70


class ForeignJournalError(JournalError):
    """A journal that another version of kvm-ifup understands, or that others could have written: it stays."""


class RollbackError(KvmIfupError):
    """Something failed, and not all that had been done could be put back; the journal has the rest."""

    code = 70


class KernelError(KvmIfupError):
    """The kernel refused a change; `errno` is its number. What had been done was put back."""

    code = 71

    def __init__(self, cause: str, *, errno: int, hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.errno = errno


class VanishedError(KernelError):
    """The device that is to be read or written does not exist (any more)."""


class NoSpaceError(KernelError):
    """Nothing can be written below the run directory: it is full, or read-only. What is there can be undone."""


class ProgramError(KvmIfupError):
    """ovs-vsctl or an administrator's program failed or took too long. What had been done was put back.

    *untouched*: the program ended by itself. So it is taken to have left things as they were: nothing is undone.
    """

    code = 71

    def __init__(self, cause: str, *, untouched: bool = False) -> None:
        super().__init__(cause)
        self.untouched = untouched


class LockTimeoutError(KvmIfupError):
    """Another run holds the lock for longer than the configured time."""

    code = 75


class InterruptedRun(KvmIfupError):
    """A signal asked us to stop; what had been done was put back."""

    code = 75


class PrivilegeError(KvmIfupError):
    """Changing a node's network takes root (CAP_NET_ADMIN)."""

    code = 77


class ConfigError(KvmIfupError):
    """The configuration is wrong, missing, or could have been written by somebody else."""

    code = 78
    reference = "see kvm-ifup.toml(5)"


def raise_all(failures: Sequence[KvmIfupError]) -> None:
    """Raise all that went wrong, if anything: the one error, or a group of several."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup("several failures", failures)


def all_as_ours(error: Exception, hint: str = "please report it") -> list[KvmIfupError]:
    """Every error in *error*, which may be a group, as `as_ours` makes it."""
    if isinstance(error, ExceptionGroup):
        return [one for inner in error.exceptions for one in all_as_ours(inner, hint)]
    return [as_ours(error, hint)]


def as_ours(error: Exception, hint: str = "please report it") -> KvmIfupError:
    """*error* as a KvmIfupError, whatever it is. *hint* is for one that nobody has foreseen."""
    if isinstance(error, KvmIfupError):
        return error
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        what += error.strerror or str(error)
        if isinstance(error, PermissionError):
            return PrivilegeError(what, hint="run it as root")
        return KernelError(what, errno=error.errno or 0)
    if isinstance(error, MemoryError):
        return KernelError("there is no memory left", errno=errno.ENOMEM)
    return BugError(f"unexpected {type(error).__name__}: {error}", hint=hint)
