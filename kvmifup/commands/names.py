"""What a name on the command line is, if it is not what belongs there: a guest's where a tap is meant, and the like.

All of this is for mistakes. A hook that is given what it needs comes to none of it, but for one look at a directory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvmifup.core.errors import NicError, UsageError
from kvmifup.core.text import shown
from kvmifup.inputs import ganeti, nicfiles
from kvmifup.inputs.values import most_like
from kvmifup.runs.store import Store

DEVICES = Path("/sys/class/net")


def as_tap(name: str, program: str, run_dir: Path) -> UsageError | None:
    """Why *name*, which nothing describes as a tap, cannot be one: what it is instead. None if it can."""
    if "/" in name:
        return as_path(name, program, run_dir, "a tap")
    kind = kind_of_device(name)
    if kind == "a tap" or is_known_tap(name, run_dir):
        return None
    if is_guest(name, run_dir):
        return UsageError(f"{shown(name)} is a guest, not a tap", hint=f"`{program} --instance {name}`")
    if kind:
        return UsageError(f"{name} is {kind}, not a guest's tap", hint="`kvm-ifup show` lists guests and their taps")
    return None


def as_path(name: str, program: str, run_dir: Path, wanted: str) -> UsageError | None:
    """The same for what has a slash in it: a NIC as messages name it, or the path of a NIC file or of a device."""
    path = Path(name.partition(" ")[0])
    is_file = path.suffix == ".toml"
    try:
        file = run_dir / "nic" / path.parent.name / (path.name if is_file else f"{path.name}.toml")
        tap = nicfiles.read_nic(file, run_dir).tap
    except (NicError, ValueError, OSError):
        tap = path.name if kind_of_device(path.name) == "a tap" else ""
        hint = f"`{program} {tap}`" if tap else f"give the name of {wanted}"
        return UsageError(f"{shown(name)} is a path, not {wanted}", hint=hint) if tap or is_file else None
    return UsageError(f"{shown(name)} is a NIC{' file' * is_file}, not {wanted}", hint=f"`{program} {tap}`")


def as_guest(name: str, program: str, run_dir: Path) -> UsageError | None:
    """Why *name*, which is no guest's that is known, cannot be one: what it is instead. None if it can."""
    if "/" in name:
        return as_path(name, program, run_dir, "a guest")
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


def meant(name: str, program: str, run_dir: Path, *, tap: bool | None) -> str:
    """A hint that names the known tap or guest that is most like *name*; empty if there is none.

    *tap*: a tap is wanted, and not a guest; None for either. If it is the other, the hint is what to type.
    """
    taps = {*Store(run_dir).taps(), *entries(run_dir / "tap")}
    taps |= {device for device in entries(DEVICES) if kind_of_device(device) == "a tap"}
    guests = {guest for guest in entries(run_dir / "nic") if (run_dir / "nic" / guest).is_dir()}
    guess = most_like(name, taps | guests)
    if not guess or tap is None or guess in (taps if tap else guests):
        return guess and f"did you mean {guess}?"
    return f"did you mean `{program} {'--instance ' if tap else ''}{guess}`?"


def misplaced(name: str, run_dir: Path) -> str:
    """A hint that names a file which is about the tap or guest *name*, where no NIC file is looked for; or empty."""
    top = run_dir / "nic"
    places = [top / one for one in entries(top)]
    for path in (*places, *(place / one for place in places for one in entries(place))):
        read = path.parent != top and path.suffix == ".toml"
        if not read and path.is_file() and (path.stem == name or names_tap(path, name)):
            return f"{path} is no NIC file: move it to {top}/INSTANCE/0.toml"
    return ""


def names_tap(path: Path, tap: str) -> bool:
    """Whether the text of *path* has the name of *tap*."""
    try:
        return re.search(rf"\b{re.escape(tap)}\b", path.read_text(errors="replace")) is not None
    except OSError:
        return False


def unknown_guest(name: str, run_dir: Path) -> str:
    """Why there is nothing about the guest *name*."""
    if kind_of_device(name) == "a tap" or is_known_tap(name, run_dir):
        return f"{name} is a tap, not a guest"
    return meant(name, "kvm-ifup show", run_dir, tap=False) or "no NIC file is about it"


def entries(directory: Path) -> list[str]:
    """What is in *directory*; nothing if it cannot be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []
