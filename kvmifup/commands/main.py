"""The commands: arguments and environment in, exit code and a sentence out.

All input is read and checked here, before the verb's module is loaded. That module loads what speaks to the kernel,
and wrong input must not wait for it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn, TextIO

from kvmifup.commands import call as calls
from kvmifup.commands import options, request, streams
from kvmifup.commands.call import Call
from kvmifup.commands.options import Options
from kvmifup.core import signals
from kvmifup.core.errors import BugError, KvmIfupError, all_as_ours
from kvmifup.core.model import Background, Phase
from kvmifup.inputs import config
from kvmifup.runs import announcing
from kvmifup.tell import render, syslog, watchers

# Told the program, its exit code, how many seconds it took, and what went wrong, once all is written for the caller.
Observer = Callable[[str, int, float, Sequence[KvmIfupError]], None]


def script(program: str, note: str = "") -> NoReturn:
    """*program* in this process. *note* says why the agent has not done it, to who asks for more (-v)."""
    signals.catch()
    out, err = streams.standard_output()
    if note and {"-v", "-vv", "--verbose"}.intersection(sys.argv[1:]):
        err.write(f"{program}: {note}\n")
    code = main(program, sys.argv[1:], os.environ, out, err, detached(program), sys.stdin)
    out.flush()
    if out.lost:
        err.write(f"{program}: stdout: {out.lost}\n")
    err.flush()
    os._exit(code)  # all is written; to take apart what has been loaded would cost a hook a sixth of its time


def detached(program: str) -> Background:
    """Sends the later rounds of announcements from a child process; the log is told what could not be sent."""
    return partial(announcing.repeat_detached, complain=partial(syslog.write, program, syslog.WARNING))


def main(
    program: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    stdout: TextIO,
    stderr: TextIO,
    background: Background | None = None,
    stdin: TextIO | None = None,
    observer: Observer | None = None,
) -> int:
    """Run *program* with *argv* (without the program's name); returns the exit code, never raises.

    *background* sends the later rounds of announcements; None leaves them out. If *stdin* is None, there is none to
    read, and files with a relative path are not read either.
    """
    begun = time.monotonic()
    call = Call(program, environ, stdout, stderr, stdin, background)
    failures: list[KvmIfupError] = []
    code = 0
    try:
        code = execute(call, argv)
    except Exception as error:
        failures = all_as_ours(error, hint="please report it; KVM_IFUP_DEBUG=1 shows where")
        code = failures[0].code
        if environ.get("KVM_IFUP_DEBUG") and any(isinstance(one, BugError) for one in failures):
            import traceback

            traceback.print_exception(error, file=stderr)
    seconds = time.monotonic() - begun
    complain(call, argv, failures)
    if observer:
        observer(program, code, seconds, failures)
    record(call, argv, failures, seconds)  # last: nobody waits for the log
    return code


def execute(call: Call, argv: Sequence[str]) -> int:
    """Read and check all input, then run the verb; returns the exit code. Raises KvmIfupError, or a group of them."""
    try:
        asked = call.options = parsed(call.program, argv)
    except options.Told as told:
        call.out.write(str(told))
        return 0
    asked.check_run_dir()
    if asked.subcommand in ("hook", "plan"):
        call.request = requested(call)
        if call.request is None:
            return 0
    if asked.subcommand not in ("nic", "watch"):
        try:
            call.config = config.load(asked.config)
        except KvmIfupError as error:
            if not only_undoes(call):
                raise
            call.troubles.append(error)  # a journal says all that undoing takes
    if asked.writes:
        calls.need_privileges()
    return runner(asked.subcommand)(call)


def only_undoes(call: Call) -> bool:
    """Whether *call* does nothing but undo what has been done."""
    down = call.options.subcommand == "hook" and call.request and call.request.phase is Phase.DOWN
    return bool(down or call.options.subcommand == "gc")


def parsed(program: str, argv: Sequence[str]) -> Options:
    """The options of *program* in *argv*. Raises UsageError, and Told."""
    if program in request.PHASES and (plain := options.of_manager(argv)):
        return plain
    from kvmifup.commands import arguments

    return arguments.parse(program, argv)


def requested(call: Call) -> request.Request | None:
    """What a hook or `kvm-ifup plan` is about; None for a tap that is left alone. Raises KvmIfupError."""
    asked = call.options
    if call.program in request.PHASES:
        return request.of_hook(call.program, asked.tap, asked.instance, call.run_dir, call.environ)
    assert asked.name is not None  # the command line takes it
    is_tap = request.names_tap(asked.name, call.run_dir, call.environ)
    tap, instance = (asked.name, None) if is_tap else (None, asked.name)
    hook = options.HOOKS[asked.phase]
    try:
        return request.of_hook(hook, tap, instance, call.run_dir, call.environ)
    except KvmIfupError as error:  # who asks for a plan is not told to do it
        error.hint = re.sub(f"`{hook} (--instance )?", f"`kvm-ifup plan {asked.phase} ", error.hint)
        raise


def runner(verb: str) -> Callable[[Call], int]:
    """The function that runs *verb*. Of all modules of verbs, only its own is loaded."""
    match verb:
        case "hook":
            from kvmifup.commands.hooks import run
        case "show":
            from kvmifup.commands.show import run
        case "plan":
            from kvmifup.commands.plan import run
        case "check":
            from kvmifup.commands.check import run
        case "gc":
            from kvmifup.commands.gc import run
        case "watch":
            from kvmifup.commands.watch import run
        case "expect":
            from kvmifup.commands.expect import run
        case _:
            from kvmifup.commands.nic import run
    return run


def complain(call: Call, argv: Sequence[str], failures: Sequence[KvmIfupError]) -> None:
    """Tell the caller what went wrong."""
    if failures and "--json" in argv:
        call.out.write(render.errors_object(failures) + "\n")
    call.add(render.error_line(call.program, failure) for failure in failures)


def record(call: Call, argv: Sequence[str], failures: Sequence[KvmIfupError], seconds: float) -> None:
    """Tell the log and the watchers what was done."""
    hook_failed = failures and call.program in request.PHASES and "--plan" not in argv
    if call.done or hook_failed:
        syslog.run(call.program, call.done, failures, seconds, call.by)
        watchers.run(call.run_dir, call.program, call.done, failures, seconds, call.by, call.seconds)
