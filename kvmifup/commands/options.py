"""What a command line can say, and what it says if it is a manager's: a tap and no more.

All others are read by `commands.arguments`. That takes argparse, and a guest that starts must not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmifup.core.errors import UsageError
from kvmifup.core.text import shown

RUN_DIR = Path("/run/kvm-ifup")

HOOKS = {"pre": "kvm-ifup-pre", "post": "kvm-ifup-post", "down": "kvm-ifdown"}  # by phase


class Told(Exception):
    """The text of --help or --version. Raised, because threads share the parsers, which do not know who asks."""


class Options:
    """The options and arguments of a command. Those that it does not take are as if they had not been given."""

    subcommand = "hook"  # or one of kvm-ifup's
    verb = ""  # of `kvm-ifup nic`
    tap: str | None = None
    instance: str | None = None
    name: str | None = None  # a guest's or a tap's
    phase = ""
    index: int | None = None
    file = ""
    trace: str | None = None  # a tap's name
    announce = plan = json = wrong = repair = probe = node = False
    verbose = 0
    config: Path | None = None
    run_dir = RUN_DIR

    @property
    def writes(self) -> bool:
        """Whether it needs root, because it changes the node or listens where only root may."""
        match self.subcommand:
            case "hook" | "gc":
                return not self.plan
            case "expect":
                return True
            case "check":
                return self.repair
            case found:
                return found == "watch"

    def check_run_dir(self) -> None:
        """Raise UsageError if --run-dir names nothing: of all that people do, only `nic put` makes it."""
        if self.subcommand == "hook" or self.verb == "put" or self.run_dir == RUN_DIR:
            return
        if not self.run_dir.is_dir():
            raise UsageError(f"there is no run directory {shown(str(self.run_dir))}", hint="correct --run-dir")


def of_manager(argv: Sequence[str]) -> Options | None:
    """The options of a hook that is given a tap or nothing; None if there is more to read."""
    if len(argv) > 1 or any(argument.startswith("-") or not argument for argument in argv):
        return None
    found = Options()
    found.tap = argv[0] if argv else None
    return found
