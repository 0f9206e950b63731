"""Write and remove NIC files, each with the symlink that finds it by its tap."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvmifup import trust
from kvmifup.errors import NicError
from kvmifup.inputs import instance_name, parse_nic, read_nic
from kvmifup.model import Nic

MAX_INDEX = 9999


def place(run_dir: Path, instance: str, index: int) -> Path:
    """Where the NIC file is. Raises NicError for a name or number that cannot be one."""
    if not 0 <= index <= MAX_INDEX:
        raise NicError(f"index {index} is not 0 to {MAX_INDEX}")
    return run_dir / "nic" / instance_name(instance) / f"{index}.toml"


def put(run_dir: Path, instance: str, index: int, text: str) -> Nic:
    """Install *text* as a NIC file, if it is a right one: whole or not at all, and found by its tap from then on.

    Raises NicError, OSError.
    """
    path = place(run_dir, instance, index)
    if len(text.encode("utf-8", "surrogateescape")) > trust.MAX_BYTES:
        raise NicError(f"it is larger than {trust.MAX_BYTES} bytes")
    nic = parse_nic(text, instance=instance, index=index, source=str(path))
    for other in (one for one in found(run_dir, instance) if isinstance(one, Nic) and one.index != index):
        if other.tap == nic.tap or (other.mode == nic.mode == "routed" and set(other.ip) & set(nic.ip)):
            same = nic.tap if other.tap == nic.tap else "one of its addresses"
            raise NicError(
                f"{same} is that of {other.label} already", hint=f"`kvm-ifup nic rm {instance} {other.index}`"
            )
    shortcut = run_dir / "tap" / nic.tap
    for directory in (path.parent, shortcut.parent):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    replace(path, partial(create, text))
    forget_links(run_dir, path, keep=nic.tap)
    replace(shortcut, partial(os.symlink, target(path)))
    return nic


def remove(run_dir: Path, instance: str, index: int | None = None) -> list[Path]:
    """Remove one NIC file of *instance*, or all; returns those that there were. Raises NicError, OSError."""
    directory = run_dir / "nic" / instance_name(instance)
    paths = sorted(directory.glob("*.toml")) if index is None else [place(run_dir, instance, index)]
    removed = []
    for path in paths:
        forget_links(run_dir, path)
        if path.exists() or path.is_symlink():
            path.unlink()
            removed.append(path)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    return removed


def found(run_dir: Path, instance: str | None = None) -> list[Nic | NicError]:
    """All NIC files, or those of *instance*; in the place of one that is wrong, what is wrong with it.

    Raises NicError for a name that cannot be a guest's.
    """
    nics: list[Nic | NicError] = []
    top = run_dir / "nic"
    for path in sorted(top.glob("*/*.toml") if instance is None else (top / instance_name(instance)).glob("*.toml")):
        try:
            nics.append(read_nic(path, run_dir))
        except NicError as error:
            nics.append(error)
    return nics


def forget_links(run_dir: Path, path: Path, keep: str | None = None) -> None:
    """Remove the symlinks that lead to *path*, but for that of the tap *keep*. Raises OSError."""
    for link in (run_dir / "tap").glob("*"):
        if link.name != keep and link.is_symlink() and str(link.readlink()) == target(path):
            link.unlink()


def target(path: Path) -> str:
    """What the symlink of a tap says."""
    return f"../nic/{path.parent.name}/{path.name}"


def replace(path: Path, make: Callable[[Path], None]) -> None:
    """Put what *make* makes in the place of *path*, so that nobody ever sees half of it, or nothing."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    make(new)
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def create(text: str, path: Path) -> None:
    """A new file that only root can read, on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
