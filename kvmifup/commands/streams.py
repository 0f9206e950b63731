"""Standard streams that change nothing about how a command ends: full, closed, or read by nobody any more."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


class Raw(io.FileIO):
    """A standard stream. What cannot be written is lost, and *lost* is the error that says why."""

    lost: OSError | None = None

    def write(self, data: object) -> int:
        """Write *data*, or lose it."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.lost = error
            return memoryview(data).nbytes  # type: ignore[arg-type]


class Output(io.TextIOWrapper):
    """Text for the standard stream *descriptor*. Writing to it never fails."""

    def __init__(self, descriptor: int, like: TextIO | None) -> None:
        self.standard = Raw(descriptor, "w", closefd=False)
        super().__init__(
            io.BufferedWriter(self.standard),
            encoding=like.encoding if like else "utf-8",
            errors="backslashreplace",  # a locale may lack a character of a message
            line_buffering=descriptor == 2 or os.isatty(descriptor),
        )

    @property
    def unread(self) -> bool:
        """Whether its reader has gone."""
        return self.standard.lost is not None and self.standard.lost.errno == errno.EPIPE

    @property
    def lost(self) -> str:
        """Why a part of it is lost; "" if nothing is, and if it is only that the reader has gone."""
        return "" if self.unread or not self.standard.lost else str(self.standard.lost.strerror)


def standard_output() -> tuple[Output, Output]:
    """Our stdout and stderr."""
    with_standard_streams()
    return Output(1, sys.stdout), Output(2, sys.stderr)


def with_standard_streams() -> None:
    """Open those of 0, 1 and 2 that are closed: else a socket would get such a number, and our output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
