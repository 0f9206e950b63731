"""kvm-ifupd as a process: start-up, single instance, logging, shutdown."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from kvmifup import __version__
from kvmifup.agent.agent import SOCKET, Agent
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import PROGRAM
from kvmifup.agent.systemd import activated, is_journal, notify
from kvmifup.commands import options
from kvmifup.commands.call import need_privileges
from kvmifup.core.errors import BugError, LockTimeoutError, as_ours
from kvmifup.core.text import printable
from kvmifup.inputs import config
from kvmifup.tell import render, syslog

BACKLOG = 256
SWITCH = 0.0005  # seconds that a thread may keep the others waiting: an arrival must not wait for hooks


def script() -> NoReturn:
    """What scripts/kvm-ifupd is. Never returns; the exit codes are those of the other commands."""
    with_standard_streams()
    try:
        main(sys.argv[1:])
        code = 0
    except Exception as error:
        failure = as_ours(error)
        say(render.sentence(failure), syslog.ERROR)
        if isinstance(failure, BugError):  # for the report: it may not happen again for long
            traceback.print_exception(error)
        code = failure.code
    sys.exit(code)


def main(argv: Sequence[str], run_dir: Path = options.RUN_DIR) -> None:
    """Run until a signal says otherwise, or there is nothing left to look after. Raises KvmIfupError."""
    parser = options.Parser(
        prog=PROGRAM,
        description="The node's agent: runs hooks without the time that Python takes to start, wires an incoming "
        "guest when its first frame arrives, and clears up when a tap disappears. Stays in the foreground.",
        epilog=options.EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    try:
        parser.parse_args(list(argv))
    except options.Told as told:
        sys.stdout.write(str(told))
        return
    need_privileges()
    run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with only_one(run_dir):
        config.load(None)  # what is wrong with it is found before there is a socket
        more_descriptors()
        given = activated()
        listener = given or own_socket(run_dir / SOCKET)
        sys.setswitchinterval(SWITCH)
        loop = Loop()
        agent = Agent(loop, listener, run_dir, say, activated=given is not None)
        gc.collect()
        gc.freeze()  # what has been loaded stays: the collector need not look at it again and again
        say("ready")
        notify("READY=1")
        try:
            loop.run()
        finally:
            if given is None:
                (run_dir / SOCKET).unlink(missing_ok=True)
            agent.close()


def say(line: str, severity: int = syslog.INFO) -> None:
    """Write one line to stderr, if anybody reads it.

    It begins with our name, or in systemd's journal, which knows the name, with the priority, as in sd-daemon(3).
    """
    start = f"<{severity}>" if is_journal(2) else f"{PROGRAM}: "
    with suppress(OSError):
        os.write(2, f"{start}{printable(line)}\n".encode())


def with_standard_streams() -> None:
    """Open those of 0, 1 and 2 that are closed: else a socket would get such a number, and our output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def more_descriptors() -> None:
    """Raise the limit of open files as far as we may: each tap that is armed takes one, each hook some."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Raise LockTimeoutError if another agent runs; keep others from running."""
    with open(run_dir / "agent.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockTimeoutError("another agent runs on this node", hint="`systemctl stop kvm-ifupd`") from None
        yield


def own_socket(path: Path) -> socket.socket:
    """A socket at *path*, for root alone."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener
