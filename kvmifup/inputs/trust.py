"""Read a file only if nobody but root could have written it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 20  # a NIC may have thousands of addresses


class Untrusted(Exception):
    """Why a file is not to be trusted. The caller makes it an error with the right exit code."""


def check(path: Path, base: Path) -> Path:
    """The real path of *path*, if it and every directory up to *base* is root's alone.

    Raises Untrusted; FileNotFoundError and other OSErrors pass through.
    """
    real, real_base = os.path.realpath(path), str(base)
    if real != str(path) or not real.startswith(f"{real_base}/"):  # else there is no symlink, not even in the base
        real_base = os.path.realpath(base)
    if real != real_base and not real.startswith(f"{real_base}/".replace("//", "/")):
        raise Untrusted(f"it leads out of {base}")
    place = real
    while True:
        info = os.lstat(place)
        what = "it" if place == real else f"its directory {place}"
        # In a user namespace the caller is root there, and 0 is the only owner that means anything.
        if info.st_uid not in (0, os.geteuid()):
            raise Untrusted(f"{what} is owned by uid {info.st_uid}, not by root")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Untrusted(f"{what} can be written to by others")
        if place == real_base:
            return Path(real)
        place = os.path.dirname(place)


def read(path: Path, base: Path, limit: int = MAX_BYTES) -> str:
    """The text of *path*, a regular file of at most *limit* bytes that `check` accepts.

    Raises Untrusted, also for text that is not UTF-8, and OSError.
    """
    real = check(path, base)
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise Untrusted("it is not a regular file")
    with open(descriptor, "rb") as file:
        if info.st_size > limit:
            raise Untrusted(f"it is larger than {limit} bytes")
        try:
            return file.read(limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Untrusted(f"it is not UTF-8 at byte {error.start}") from None
