"""kvm-ifupd as a process: start-up, single instance, logging, shutdown."""

from __future__ import annotations

import gc
import resource
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn, TextIO

from kvmifup import __version__
from kvmifup.agent.agent import SOCKET, Agent
from kvmifup.agent.listening import Listener, OnlyOne
from kvmifup.agent.log import Log
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import PROGRAM
from kvmifup.agent.systemd import notify
from kvmifup.commands import arguments, options
from kvmifup.commands.call import need_privileges
from kvmifup.commands.streams import standard_output
from kvmifup.core import signals
from kvmifup.core.errors import BugError, as_ours
from kvmifup.inputs import config, places
from kvmifup.tell import render, syslog

log = Log(PROGRAM)

SWITCH = 0.0005  # seconds that a thread may keep the others waiting: an arrival must not wait for hooks


def script() -> NoReturn:
    """What scripts/kvm-ifupd is. Never returns; the exit codes are those of the other commands."""
    signals.hear_of_children()
    out, _ = standard_output()
    try:
        main(sys.argv[1:], out=out)
        code = 0
    except Exception as error:
        failure = as_ours(error)
        log.write(render.sentence(failure), syslog.ERROR)
        if isinstance(failure, BugError):  # for the report: it may not happen again for long
            for line in "".join(traceback.format_exception(error)).splitlines():
                log.write(line, syslog.ERROR)
        code = failure.code
    out.flush()
    log.close()
    sys.exit(code)


def main(argv: Sequence[str], run_dir: Path = options.RUN_DIR, out: TextIO = sys.stdout) -> None:
    """Run until a signal says otherwise, or there is nothing left to look after. Raises KvmIfupError.

    *out* is for --help and --version.
    """
    parser = arguments.Parser(
        prog=PROGRAM,
        description="The node's agent: runs hooks without the time that Python takes to start, wires an incoming "
        "guest when its first frame arrives, and clears up when a tap disappears. Stays in the foreground.",
        epilog=arguments.EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    try:
        parser.parse_args(list(argv))
    except options.Told as told:
        out.write(str(told))
        return
    need_privileges()
    places.made(run_dir)
    with closing(OnlyOne(run_dir / "agent.lock")) as only:
        config.load(None)  # what is wrong with it is found before there is a socket
        more_descriptors()
        listener = Listener(run_dir / SOCKET, only)
        sys.setswitchinterval(SWITCH)
        loop = Loop()
        agent = Agent(loop, listener, run_dir, log.say)
        gc.collect()
        gc.freeze()  # what has been loaded stays: the collector need not look at it again and again
        log.say("ready")
        notify("READY=1")
        try:
            loop.run()
        finally:
            listener.remove()
            agent.close()


def more_descriptors() -> None:
    """Raise the limit of open files as far as we may: each tap that is armed takes one, each hook some."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
