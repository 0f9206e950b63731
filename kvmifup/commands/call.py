"""One call of a command: what was asked, by whom, and what has been done so far."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from kvmifup.commands.options import Options
from kvmifup.commands.request import Request
from kvmifup.core.errors import KvmIfupError, PrivilegeError
from kvmifup.core.model import Background, Config
from kvmifup.core.text import printable
from kvmifup.runs.outcome import Outcome

CAP_NET_ADMIN = 12  # linux/capability.h


@dataclass(eq=False, repr=False)
class Call:
    """*program*, called with *environ* and these streams; if *stdin* is None, there is none to read.

    *background* sends the later rounds of announcements; None leaves them out. *options*, *config* and *request* (of
    a hook, or of `plan`) are there once they have been read. *done* has an `Outcome` for each NIC that was worked on.
    *seconds* says how long each op took, by its key, if that was asked for. *troubles* do not keep the call from its
    work: they are raised after it.
    """

    program: str
    environ: Mapping[str, str]
    out: TextIO
    err: TextIO
    stdin: TextIO | None = None
    background: Background | None = None
    options: Options = field(default_factory=Options)
    config: Config = field(default_factory=Config)
    request: Request | None = None
    done: list[Outcome] = field(default_factory=list)
    seconds: Mapping[tuple[object, ...], float] | None = None
    troubles: list[KvmIfupError] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.options.run_dir

    @property
    def by(self) -> str:
        """Who calls, for the journal and the log."""
        return "person" if self.err.isatty() else "hook"

    @property
    def columns(self) -> int | None:
        """How wide the terminal is that shows stdout. None if it is none: then nothing is cut."""
        if not self.out.isatty():
            return None
        told = self.environ.get("COLUMNS", "")  # as `kvmifup.client` tells it, too
        if told.isascii() and told.isdigit() and int(told):
            return int(told)
        with suppress(OSError, ValueError):
            return os.get_terminal_size(self.out.fileno()).columns or 80
        return 80

    def say(self, lines: Iterable[str]) -> None:
        """Write *lines* to stdout."""
        self.out.writelines(f"{printable(line)}\n" for line in lines)

    def say_json(self, value: Any) -> None:
        """Write *value* to stdout."""
        self.out.write(json.dumps(value, indent=2) + "\n")

    def add(self, lines: Iterable[str]) -> None:
        """Write *lines* to stderr: what is not the result."""
        self.err.writelines(f"{line}\n" for line in lines)


def need_privileges() -> None:
    """Raise PrivilegeError unless we are root with CAP_NET_ADMIN: one without the other can do half of the work."""
    if os.geteuid() != 0:
        raise PrivilegeError("not root", hint="run it as root")
    need_capability()


@cache
def need_capability() -> None:
    """Raise PrivilegeError without CAP_NET_ADMIN. A process that has it keeps it, so one look is enough."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not effective >> CAP_NET_ADMIN & 1:
        raise PrivilegeError("root, but not permitted to change the network", hint="this takes CAP_NET_ADMIN")
