"""What a name on the command line is, if it is not what belongs there: a guest's where a tap is meant, and the like.

All of this is for mistakes. A hook that is given what it needs comes to none of it, but for one look at a directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvmifup.core.errors import NicError, UsageError
from kvmifup.core.text import shown
from kvmifup.inputs import ganeti, nicfiles
from kvmifup.inputs.values import misspelt
from kvmifup.runs.store import Store

DEVICES = Path("/sys/class/net")


def as_tap(name: str, program: str, run_dir: Path) -> UsageError | None:
    """Why *name*, which nothing describes as a tap, cannot be one: what it is instead. None if it can."""
    if name.endswith(".toml") and "/" in name:
        return path_as_tap(name, program, run_dir)
    kind = kind_of_device(name)
    if kind == "a tap" or is_known_tap(name, run_dir):
        return None
    if is_guest(name, run_dir):
        return UsageError(f"{shown(name)} is a guest, not a tap", hint=f"`{program} --instance {name}`")
    if kind:
        return UsageError(f"{name} is {kind}, not a guest's tap", hint="`kvm-ifup show` lists guests and their taps")
    return None


def path_as_tap(name: str, program: str, run_dir: Path) -> UsageError:
    """The same for the path of a NIC file."""
    path = Path(name)
    try:
        tap = nicfiles.read_nic(run_dir / "nic" / path.parent.name / path.name, run_dir).tap
    except (NicError, ValueError, OSError):
        return UsageError(f"{shown(name)} is a path, not a tap", hint="give the tap's name, like tap0")
    return UsageError(f"{shown(name)} is a NIC file, not a tap", hint=f"`{program} {tap}`")


def as_guest(name: str, program: str, run_dir: Path) -> UsageError | None:
    """Why *name*, which is no guest's that is known, cannot be one: what it is instead. None if it can."""
    kind = kind_of_device(name)
    if kind == "a tap" or is_known_tap(name, run_dir):
        return UsageError(f"{name} is a tap, not a guest", hint=f"`{program} {name}`")
    return UsageError(f"{name} is {kind}, not a guest", hint="`kvm-ifup show` lists guests") if kind else None


def is_guest(name: str, run_dir: Path) -> bool:
    """Whether a NIC file or a journal, ours or Ganeti's, tells of a guest *name*."""
    if name in ("", ".", ".."):
        return False
    directories = (run_dir / "nic" / name, ganeti.DIRECTORY / "nic" / name)
    return any(map(os.path.isdir, directories)) or any(
        journal.nic.instance == name for journal in Store(run_dir).others("", name)
    )


def is_known_tap(name: str, run_dir: Path) -> bool:
    """Whether a journal or a NIC file's symlink is about a tap *name*."""
    return os.path.lexists(run_dir / "tap" / name) or os.path.lexists(Store(run_dir).path(name))


def was_ever_known(tap: str, run_dir: Path) -> bool:
    """Whether any run has ever been about *tap*: it left its lock, or its journal."""
    return os.path.lexists(run_dir / "lock" / f"tap.{tap}") or os.path.lexists(Store(run_dir).path(tap))


def kind_of_device(name: str) -> str | None:
    """What kind of network device *name* is, as people call it; None if there is none."""
    if "/" in name or name in ("", ".", "..") or name not in entries(DEVICES):
        return None
    place = DEVICES / name
    if (place / "tun_flags").exists():
        return "a tap"
    return "a bridge" if (place / "bridge").is_dir() else "another network device"


# --- what may have been meant --------------------------------------------------------------------------------


def meant(name: str, run_dir: Path) -> str:
    """A hint that names the known tap or guest that is most like *name*; empty if there is none."""
    known = {*Store(run_dir).taps(), *entries(run_dir / "tap"), *entries(run_dir / "nic")}
    known |= {device for device in entries(DEVICES) if kind_of_device(device) == "a tap"}
    return misspelt(name, known)


def entries(directory: Path) -> list[str]:
    """What is in *directory*; nothing if it cannot be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []
