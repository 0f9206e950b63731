"""Read a file only if nobody but root could have written it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 1 << 20  # a NIC may have thousands of addresses


# What an error of reading means when it is not the file's fault: the look has failed, and nobody knows what is there.
NO_ANSWER = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR, errno.EAGAIN, errno.ESTALE}


class Untrusted(Exception):
    """Why a file is not to be trusted, and how to *mend* that. The caller makes it an error with the exit code."""

    def __init__(self, why: str, mend: str) -> None:
        super().__init__(why)
        self.mend = mend


class NotText(Untrusted):
    """A file that only root could have written, and that is no text."""


def flaw(info: os.stat_result, *, roots_group: bool = False) -> str:
    """Why not only root could have written what *info* is about; "" if only root could.

    *roots_group*: root's group may write to a directory.
    """
    # In a user namespace the caller is root there, and 0 is the only owner that means anything.
    if info.st_uid not in (0, os.geteuid()):
        return f"is owned by uid {info.st_uid}, not by root"
    others = (
        stat.S_IWOTH if roots_group and info.st_gid == 0 and stat.S_ISDIR(info.st_mode) else stat.S_IWGRP | stat.S_IWOTH
    )
    if info.st_mode & others:
        return "can be written to by others"
    return ""


def taken_back(place: str) -> str:
    """How *place*, which has a flaw, becomes root's alone: not before somebody has looked at it."""
    return f"see what others have put there, then `chown root {place}; chmod go-w {place}`"


def need_answer(error: OSError) -> None:
    """Raise *error* if it says nothing about the file: a look that failed is not an answer."""
    if error.errno in NO_ANSWER:
        raise error


def listed(directory: Path, suffix: str = "") -> list[Path]:
    """What is in *directory* and ends with *suffix*, sorted; nothing if it is not there. Raises OSError.

    (Not by `Path.glob`: that takes a directory that cannot be read for an empty one.)
    """
    try:
        return [directory / name for name in sorted(os.listdir(directory)) if name.endswith(suffix)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def entries(directory: str | Path, suffix: str = "") -> list[os.DirEntry[str]]:
    """The same as entries of the directory: to make a path of each of thousands takes a while. Raises OSError."""
    try:
        with os.scandir(directory) as found:
            return sorted((one for one in found if one.name.endswith(suffix)), key=lambda one: one.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def check(path: Path, base: Path, *, roots_group: bool = False) -> Path:
    """The real path of *path*, if it and every directory up to *base* is root's alone.

    *roots_group*: root's group may write to these directories, but not to a file.

    Raises Untrusted; FileNotFoundError and other OSErrors pass through.
    """
    real, real_base = os.fspath(path), os.fspath(base)
    levels = list(_levels(real, real_base)) if real.startswith(f"{real_base}/") and "/../" not in f"{real}/" else []
    if not levels or any(stat.S_ISLNK(info.st_mode) for _, info in levels):
        real, real_base = os.path.realpath(path), os.path.realpath(base)
        if real != real_base and not real.startswith(f"{real_base}/".replace("//", "/")):
            raise Untrusted(f"it leads out of {base}", "put the file itself there, and no symlink to it")
        levels = list(_levels(real, real_base))
    for place, info in levels:
        why = flaw(info, roots_group=roots_group)
        if why:
            raise Untrusted(f"it {why}" if place == real else f"its directory {place} {why}", taken_back(place))
    return Path(real)


def _levels(place: str, top: str) -> Iterator[tuple[str, os.stat_result]]:
    """*place*, and each directory above it up to *top*, itself and not what a symlink leads to. Raises OSError."""
    while True:
        yield place, os.lstat(place)
        if place == top:
            return
        place = os.path.dirname(place)


def read(path: Path, base: Path, limit: int = MAX_BYTES, *, roots_group: bool = False) -> str:
    """The text of *path*, a regular file of at most *limit* bytes that `check` accepts.

    Raises Untrusted, also for text that is not UTF-8, and OSError.
    """
    real = check(path, base, roots_group=roots_group)
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise Untrusted("it is not a regular file", "put one there")
    try:
        if info.st_size > limit:
            raise Untrusted(f"it is larger than {limit} bytes", "make it smaller")
        return os.read(descriptor, info.st_size + 1).decode("utf-8")  # of a regular file that is all
    except UnicodeDecodeError as error:
        raise NotText(f"it is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    finally:
        os.close(descriptor)
