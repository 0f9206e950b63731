"""One thing that `kvm-ifup check` has to say."""

from __future__ import annotations

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.records import record


@record
class Finding:
    """*what* is not as it should be, *why* most likely or what it leads to, and what to do: *mend*.

    *wrong* is false for what should merely be known. *drift*: the NIC's hook, called again, mends it; so does
    `check --repair`.
    """

    what: str
    why: str = ""
    mend: str = ""
    wrong: bool = True
    drift: bool = False


def of_error(error: KvmIfupError, why: str = "") -> Finding:
    """What an error says, as a finding."""
    return Finding(f"{error.where}: {error}" if error.where.startswith("/") else str(error), why, error.hint)
