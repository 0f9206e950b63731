"""nftables through libnftables: commands as one transaction, and what there is.

Commands and answers are those of libnftables-json(5), a script's those of nft(8). Nothing here knows what is
in a table.

No other module imports nftables, and this one does so only inside its function: it is Debian's python3-nftables, which
need not be installed, and few NICs have a filter.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from kvmifup.core.errors import KernelError, NotReadyError, PrivilegeError
from kvmifup.node.refusals import refusal

TABLE = "kvm-ifup"  # the name of our tables: `bridge kvm-ifup` and `inet kvm-ifup`
MISSING = "`apt-get install python3-nftables`"

Command = Mapping[str, Any]


def run(commands: Sequence[Command], what: str) -> None:
    """Do all *commands* as one transaction, or none; *what* says for whom.

    Raises KernelError if the kernel refuses one, PrivilegeError, NotReadyError without libnftables.
    """
    code, _, error = context().json_cmd({"nftables": list(commands)})
    if code:
        raise refused(what, error)


def script(text: str, what: str, library: Any = None) -> None:
    """Do the commands of *text*, as nft(8) has them, as one transaction, or none. Raises what `run` raises.

    *library* is a `context` that is used again.
    """
    code, _, error = (library or context()).cmd(text)
    if code:
        raise refused(what, error)


def ask(command: Command, what: str) -> list[dict[str, Any]] | None:
    """What *command* (list, get) shows, without what is only about nft itself; None if there is no such thing.

    Raises KernelError, PrivilegeError, NotReadyError without libnftables.
    """
    code, output, error = context().json_cmd({"nftables": [command]})
    if code:
        failure = refused(what, error)
        if isinstance(failure, KernelError) and failure.errno == errno.ENOENT:
            return None
        raise failure
    shown: list[dict[str, Any]] = output["nftables"] if output else []
    return [one for one in shown if "metainfo" not in one]


def context() -> Any:
    """A context of libnftables: it has a socket of its own, of this network namespace."""
    try:
        import nftables
    except ImportError:
        raise NotReadyError("a filter takes libnftables, which is not installed", hint=MISSING) from None
    try:
        return nftables.Nftables()
    except OSError as error:  # the library itself is not there
        raise NotReadyError(f"a filter takes libnftables: {error}", hint=MISSING) from None


def refused(what: str, error: str) -> KernelError | PrivilegeError:
    """The error for what libnftables prints: it tells the number only as the text that the C library has for it."""
    line = next((one for one in error.splitlines() if "Error: " in one), error.strip() or "refused")
    text = line.rpartition("Error: ")[2]
    number = next((code for words, code in numbers().items() if words in text), 0)
    if number in (errno.EPERM, errno.EACCES):
        return refusal(what, number)
    return KernelError(f"{what}: nftables: {text}", errno=number)


@cache
def numbers() -> dict[str, int]:
    """The number of every error by its text, the longest first: one may begin with another."""
    return {os.strerror(code): code for code in sorted(errno.errorcode, key=lambda one: -len(os.strerror(one)))}
