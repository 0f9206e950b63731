"""What the kernel reports of directories: which files in them have changed (inotify(7)).

Python has no inotify of its own, and what it has (F_NOTIFY) does not tell which file it is: then all would have to be
looked at, and a node may have thousands. So this is the one place that calls the C library.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from kvmifup.agent.events import MOMENT
from kvmifup.agent.loop import Loop
from kvmifup.core.errors import KernelError, NotReadyError
from kvmifup.inputs import places

# linux/inotify.h
IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF, IN_UNMOUNT, IN_Q_OVERFLOW, IN_IGNORED = 0x400, 0x800, 0x2000, 0x4000, 0x8000
IN_ONLYDIR = 0x01000000
GONE = IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT | IN_Q_OVERFLOW | IN_IGNORED
COME_AND_GO = IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
EVENT = struct.Struct("=iIII")  # struct inotify_event: which directory, what, cookie, bytes of the name that follows
SOME = 65536  # bytes of events that are read at once
BLIND = 1.0  # seconds between two looks where the kernel reports nothing, because there are too many who want to hear
_libc = ctypes.CDLL(None, use_errno=True)

Names = frozenset[str]


class DirectoryEvents:
    """Calls *changed* after files in *directory* have come, gone or been replaced, with their names.

    With None where any may have: the directory itself has gone or come, it is watched since a moment ago, or more has
    happened than the kernel could report. *also* are directories that others make, once they are there: there it
    counts, too, what is written into files; these have no names. Nor has what happens to one of *beside*, which are
    files next to the directory.
    It is called a `MOMENT` after the first change, and once for all until then: a hook writes its journal twice.
    """

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        changed: Callable[[Names | None], None],
        also: Sequence[Path] = (),
        beside: Collection[str] = (),
    ) -> None:
        self._loop = loop
        self._directory = directory
        self._changed = changed
        self._also = also
        self._beside = {directory.name, *beside}
        self._missing: tuple[Path, ...] = ()
        self._held: dict[Path, int] = {}  # the directories themselves, so that none is taken for another one
        self._watched: dict[int, Path] = {}  # by the number that events have
        self._events = -1
        self._waiting = False  # something has come, and is read in a moment
        self._new = False  # what happened before it was watched has not been told
        self.renew()

    def renew(self) -> None:
        """Watch what is at the directory's path now, and its parent: somebody may remove it and make another.

        If it cannot be watched, it is tried again and again. Raises OSError, NotReadyError, KernelError.
        """
        self.close()
        try:
            self._watch()
        except BaseException:
            self.close()  # it is not watched
            self._wait(BLIND)
            raise

    def _watch(self) -> None:
        places.made(self._directory.parent, self._directory.name)
        self._events = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._events < 0:  # then somebody has to look from time to time
            self._held[self._directory] = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._wait(BLIND)
            return
        # IN_ATTRIB: for `Store.mark`. IN_MODIFY: for a person with an editor.
        self._open(self._directory, COME_AND_GO | IN_ATTRIB | IN_MODIFY)
        self._open(self._directory.parent, COME_AND_GO | IN_CREATE)
        missing = []
        for directory in self._also:
            try:
                self._open(directory, COME_AND_GO | IN_CREATE | IN_MODIFY)
            except (OSError, KernelError):
                missing.append(directory)
        self._missing = tuple(missing)
        self._loop.watch(self._events, self._notified)
        self._new = True
        self._wait(MOMENT)

    def _open(self, directory: Path, what: int) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._held[directory] = descriptor
        number = _libc.inotify_add_watch(self._events, b"/proc/self/fd/%d" % descriptor, what)
        if number < 0:
            why = ctypes.get_errno()
            raise KernelError(f"cannot watch {directory}: {os.strerror(why)}", errno=why)
        self._watched[number] = directory

    def complete(self) -> None:
        """Watch also what was not there before, or is another one now, and what could not be watched."""
        others = not all(is_same(*one) for one in self._held.items())
        if others or self._events < 0 or any(map(Path.is_dir, self._missing)):
            with suppress(OSError, NotReadyError, KernelError):
                self.renew()

    def close(self) -> None:
        """Watch it no longer."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held, self._watched = {}, {}
        if self._events >= 0:
            with suppress(KeyError):  # while something waits to be read
                self._loop.ignore(self._events)
            os.close(self._events)
            self._events = -1

    def is_watched(self) -> bool:
        """Whether what is at the directory's path now is what is watched. Raises OSError if there is nothing."""
        held = self._held.get(self._directory)
        return held is not None and os.path.samestat(self._directory.stat(), os.fstat(held))

    def _notified(self) -> None:
        """Something has come: take it in a moment, and hear of nothing until then."""
        self._loop.ignore(self._events)
        self._wait(MOMENT)

    def _wait(self, delay: float) -> None:
        if not self._waiting:
            self._waiting = True
            self._loop.later(delay, self._due)

    def _due(self) -> None:
        self._waiting = False
        names = self._read()
        if self._new:
            names, self._new = None, False
        with suppress(OSError, NotReadyError, KernelError):
            # Only once there is another: it may still be on its way out.
            if not self.is_watched():
                names = None
                self.renew()
        if self._events < 0:
            self._wait(BLIND)
        elif self._events not in self._loop:
            self._loop.watch(self._events, self._notified)
        self._changed(names)

    def _read(self) -> Names | None:
        """The names of what has changed since in the directory; None for any."""
        names: set[str] = set()
        everything = self._events < 0
        with suppress(BlockingIOError):
            while self._events >= 0:
                data = os.read(self._events, SOME)
                while data:
                    number, what, _cookie, size = EVENT.unpack_from(data)
                    name = os.fsdecode(data[EVENT.size : EVENT.size + size].rstrip(b"\0"))
                    data = data[EVENT.size + size :]
                    where = self._watched.get(number)
                    everything |= bool(what & GONE) or (where == self._directory.parent and name in self._beside)
                    if where == self._directory:
                        names.add(name)
        return None if everything else frozenset(names)


def is_same(directory: Path, descriptor: int) -> bool:
    """Whether nothing else is at the path of the *directory* that *descriptor* is of."""
    try:
        return os.path.samestat(directory.stat(), os.fstat(descriptor))
    except OSError:  # nothing is there: what comes in its place will be another one
        return True
