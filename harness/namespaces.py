"""Namespaces: the whole process out of the host's, and further ones for the others on the network.

`isolate` takes the process out of the host's namespaces, for good; `guard` ends a run that is still in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from harness.tools import CLEAN

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # linux/mount.h
MNT_DETACH = 2
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
TOOLS = ("ip", "bridge", "ping", "unshare", "setpriv")
_libc = ctypes.CDLL(None, use_errno=True)


def netns_id() -> str:
    """Which network namespace this process is in."""
    return str(Path("/proc/self/ns/net").readlink())


_started_in = netns_id()
_isolated = False


def isolate() -> None:
    """Take this process into network and mount namespaces of its own, and a user namespace if it is not root.

    There is no way back, and a run that cannot be isolated ends here: the tests would rewire the host.
    """
    global _isolated
    if _isolated:
        return
    # unshare(2) and setns(2) move the thread that calls them; programs are started from this one.
    assert threading.current_thread() is threading.main_thread()
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=CLEAN["PATH"])]
    if missing:
        pytest.exit(f"these tools are missing: {', '.join(missing)} (iproute2, iputils-ping, util-linux)", returncode=3)
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWNET | CLONE_NEWNS | (CLONE_NEWUSER if uid else 0))
        if uid:
            for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                Path("/proc/self", name).write_text(content)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/run", "tmpfs", data="mode=755")
        mount("sysfs", "/sys", "sysfs")
    except OSError as error:
        pytest.exit(f"these tests need namespaces of their own: {error}", returncode=3)
    # The hooks' background children come back to us, so that none survives its test.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["PATH"] = CLEAN["PATH"]
    _isolated = True
    guard()


def guard() -> None:
    """End the run at once if a test could touch the network that the run was started in."""
    if not _isolated or netns_id() == _started_in:
        pytest.exit("still in the network namespace of the host: not one test may run here", returncode=3)


def unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    raw = [None if text is None else text.encode() for text in (source, target, kind, data)]
    if _libc.mount(raw[0], raw[1], raw[2], flags, raw[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount on {target}: {os.strerror(ctypes.get_errno())}")


def bind_mount(source: Path, target: Path) -> None:
    """Show *source* in the place of *target*, for this process and its children."""
    mount(str(source), str(target), None, 0x1000)  # MS_BIND


def unmount(target: Path) -> None:
    """Undo the last mount on *target*."""
    if _libc.umount2(str(target).encode(), MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), f"umount {target}: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def private_etc() -> Iterator[None]:
    """An /etc that can be written to, seen by this process and its children only; forgotten with the block."""
    upper, work = Path("/run/etc-upper"), Path("/run/etc-work")
    upper.mkdir()
    work.mkdir()
    mount("overlay", "/etc", "overlay", data=f"lowerdir=/etc,upperdir={upper},workdir={work}")
    try:
        yield
    finally:
        unmount(Path("/etc"))


class Namespace:
    """A network namespace without a name. A descriptor holds it, so it ends with this process, however that ends.

    `with namespace:` enters it; sockets opened and programs started inside belong to it.
    """

    def __init__(self) -> None:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        unshare(CLONE_NEWNET)
        self.descriptor = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _setns(home)
        os.close(home)
        self._homes: list[int] = []

    @property
    def path(self) -> str:
        """For `ip link … netns PATH`."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def __enter__(self) -> None:
        self._homes.append(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        _setns(self.descriptor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        home = self._homes.pop()
        _setns(home)
        os.close(home)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """In somebody else's network namespace, such as /proc/PID/ns/net: what is opened there stays there."""
    home, there = (os.open(one, os.O_RDONLY | os.O_CLOEXEC) for one in ("/proc/self/ns/net", path))
    _setns(there)
    try:
        yield
    finally:
        _setns(home)
        os.close(home)
        os.close(there)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
