"""The socket on which hooks find the agent: systemd's, or one that the agent makes itself."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from kvmifup.agent.systemd import activated
from kvmifup.core.errors import LockTimeoutError, NotReadyError
from kvmifup.inputs import places

BACKLOG = 1024  # as in the unit: when a node boots, all guests may start at once


class OnlyOne:
    """Keeps a second agent from running, by a lock on the file at *path*."""

    def __init__(self, path: Path) -> None:
        """Raises LockTimeoutError if another agent runs, OSError."""
        self._path = path
        self._descriptor = locked(path)

    def renew(self) -> None:
        """Lock what is at the path now: somebody may have removed it. Raises as `OnlyOne`."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                return
        ours = locked(self._path)
        os.close(self._descriptor)
        self._descriptor = ours

    def close(self) -> None:
        """Let another one run."""
        os.close(self._descriptor)


def locked(path: Path) -> int:
    """A descriptor of the file *path*, locked. Raises LockTimeoutError, OSError."""
    descriptor = places.lock_file(str(path))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        hint = "`systemctl stop kvm-ifupd`, or end it where somebody has started it"
        raise LockTimeoutError("another agent runs on this node", hint=hint) from None
    return descriptor


class Listener:
    """The socket at *path*. *given*: it is systemd's, who keeps it when the agent ends."""

    def __init__(self, path: Path, only: OnlyOne) -> None:
        """Take the socket that systemd hands over, or make one. Raises NotReadyError, UsageError, OSError."""
        found = activated()
        self.given = found is not None
        self.path = path
        self.socket = found or own_socket(path)
        self._only = only
        self._made = None if self.given else path.stat()

    def is_there(self) -> bool:
        """Whether hooks find the socket; one of systemd's is not ours to look after."""
        return self.given or self.path.exists()

    def renew(self) -> None:
        """Make the socket once more: somebody has removed it. Raises LockTimeoutError, NotReadyError, OSError."""
        places.made(self.path.parent)
        self._only.renew()
        self.socket = own_socket(self.path)
        self._made = self.path.stat()

    def remove(self) -> None:
        """Remove the socket's file, if it is the one that we have made: by now another one may be in its place."""
        with suppress(FileNotFoundError):
            if self._made and os.path.samestat(self._made, self.path.lstat()):
                self.path.unlink()


def own_socket(path: Path) -> socket.socket:
    """A socket at *path*, for root alone. Raises NotReadyError if somebody has one there, OSError."""
    if has_owner(path):
        raise NotReadyError(
            f"somebody listens on {path}, most likely systemd",
            hint="`systemctl start kvm-ifupd` runs the agent on it; `systemctl stop kvm-ifupd.socket` takes it away",
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener


def has_owner(path: Path) -> bool:
    """Whether a process has the socket at *path* open, and it is not just what a killed agent has left.

    The question is asked with a socket of another kind. So nobody is woken: systemd would start an agent for each
    connection (`unix_find_bsd` in net/unix/af_unix.c).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        try:
            asking.connect(str(path))
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
        return True
