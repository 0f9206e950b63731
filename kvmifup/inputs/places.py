"""The directories and locks that we make: root's alone, whatever the umask is and whoever has been there before."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvmifup.core.errors import NotReadyError
from kvmifup.inputs import trust

FOR_ALL = 0o755  # what is in them is root's, and anybody may look which NICs there are


def made(base: Path, *names: str, mode: int = FOR_ALL) -> Path:
    """The directory *names* below *base*. Each level is made if it is missing, the last with *mode*, and verified.

    It must be root's alone, and below *base* no symlink: then nobody can change it while it is used. Whoever could
    write there could have us write elsewhere, and pose as the agent.
    Raises NotReadyError, and OSError if it cannot be made.
    """
    place = os.fspath(base)
    _level(place, os.stat, FOR_ALL if names else mode)  # through a symlink: /var/run is one
    for number, name in enumerate(names, 1):
        place = f"{place}/{name}"
        _level(place, os.lstat, mode if number == len(names) else FOR_ALL)
    return Path(place)


def verify(base: Path, *names: str) -> None:
    """Raise NotReadyError if the directory *names* below *base*, or one on the way to it, is there and not `made`."""
    place = os.fspath(base)
    with suppress(FileNotFoundError):
        _verify(place, base.stat())
        for name in names:
            place = f"{place}/{name}"
            _verify(place, os.lstat(place))


def _level(place: str, look: Callable[[str], os.stat_result], mode: int) -> None:
    try:
        info = look(place)
    except FileNotFoundError:
        _make(Path(place), mode)
        info = look(place)
    _verify(place, info)


def _verify(place: str, info: os.stat_result) -> None:
    if not stat.S_ISDIR(info.st_mode):
        raise NotReadyError(f"{place} is not a directory", hint="look who has made it, and remove it")
    flaw = trust.flaw(info)
    if flaw:
        raise NotReadyError(f"{place} {flaw}", hint=trust.taken_back(place))


def _make(place: Path, mode: int) -> None:
    if not place.parent.is_dir():
        _make(place.parent, FOR_ALL)
    with suppress(FileExistsError):  # another run is as quick
        place.mkdir(mode)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, mode)  # the umask may have taken something away
        finally:
            os.close(descriptor)


def write(path: Path, text: str, mode: int) -> None:
    """Put *text* into *path*, in a directory that is `made`; it is never there by halves. Raises OSError.

    Not for what must survive a power cut: it is not synced.
    """
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, mode)  # whatever the umask
        file.write(text)
    os.rename(temporary, path)


def lock_file(path: str) -> int:
    """A descriptor of the file *path* to lock, in a directory that is `made`; the file is there from then on.

    Only for root: whoever can open a file can lock it, and would keep all others out. Raises OSError.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        descriptor = os.open(path, flags | os.O_RDONLY)  # it can be locked all the same
    if os.fstat(descriptor).st_mode & 0o077:
        os.fchmod(descriptor, 0o600)
    return descriptor
