"""The commands: arguments and environment in, exit code and a sentence out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from kvmifup import __version__, announce, config, ganeti, inputs, signals
from kvmifup.errors import BugError, KvmIfupError, NicError, PrivilegeError, UsageError, known
from kvmifup.model import Nic, Phase

if TYPE_CHECKING:  # what imports pyroute2 waits until the input has been found good
    from kvmifup.journal import Store
    from kvmifup.run import Outcome, Session

CAP_NET_ADMIN = 12  # linux/capability.h
RUN_DIR = Path("/run/kvm-ifup")

PHASES = {"kvm-ifup-pre": Phase.PRE, "kvm-ifup-post": Phase.POST, "kvm-ifdown": Phase.DOWN}
DOES = {
    "kvm-ifup-pre": "Wire a guest's tap as far as may be true on two nodes at once (before a live migration). "
    "For a NIC that is not incoming, go on to what kvm-ifup-post does.",
    "kvm-ifup-post": "Wire a guest's tap completely: the guest runs here (fresh start, or after a live migration).",
    "kvm-ifdown": "Undo what kvm-ifup-pre and kvm-ifup-post did for a tap. Repeating it succeeds.",
    "kvm-ifup": "Look after the NICs that the hooks wire.",
}
EPILOG = (
    "exit codes: 0 done or nothing to do, 64 usage, 65 bad NIC, 69 node not ready, 70 bug or incomplete rollback, "
    "71 refused by the kernel and rolled back, 75 busy, 77 not permitted, 78 bad configuration"
)


class Told(Exception):
    """What --help or --version has to say: parsers are shared by threads, and do not know who asks."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ours, and that writes nothing itself."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")

    def _print_message(self, message: str, file: object = None) -> NoReturn:
        raise Told(message)


def script(program: str, note: str = "") -> NoReturn:
    """*program* in this process. *note* says why the agent has not done it, to who asks for more (-v)."""
    signals.catch()
    # A caller may have closed what we write to; that must not change how we end.
    out, err = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if note and {"-v", "-vv", "--verbose"}.intersection(sys.argv[1:]):
        err.write(f"{program}: {note}\n")
    sys.exit(main(program, sys.argv[1:], os.environ, out, err, announce.repeat_detached, sys.stdin))


@cache
def parser(program: str) -> Parser:
    """The command line of *program*."""
    found = "; check: 1 something is wrong" if program == "kvm-ifup" else ""
    made = Parser(prog=program, description=DOES[program], epilog=EPILOG + found, allow_abbrev=False)
    if program != "kvm-ifup":
        made.add_argument("tap", nargs="?", metavar="TAP", help="the tap; default: INTERFACE from the environment")
        made.add_argument("--instance", metavar="NAME", help="all NICs of this guest in one run, all or none")
        if program != "kvm-ifdown":
            made.add_argument("--announce", action="store_true", help="announce even if nothing changed")
        made.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    add_options(made)
    made.add_argument("--version", action="version", version=f"{program} {__version__}")
    if program == "kvm-ifup":
        from kvmifup import shell

        shell.add_subcommands(made)
    return made


def add_options(made: Parser, *, again: bool = False) -> None:
    """What every command and subcommand takes; *again*: after a subcommand, too, where it wins."""

    def default(value: object) -> Any:
        return argparse.SUPPRESS if again else value

    made.add_argument("--json", action="store_true", default=default(False), help="print the outcome as JSON")
    made.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=default(0),
        help="tell on stderr what was done; twice: how long it took",
    )
    made.add_argument(
        "--config", metavar="FILE", type=Path, default=default(None), help=f"this file instead of {config.DIRECTORY}"
    )
    made.add_argument("--run-dir", metavar="DIR", type=Path, default=default(RUN_DIR), help=f"instead of {RUN_DIR}")


Background = Callable[[Sequence[tuple[str, str, str]], Callable[[], bool]], None]


@dataclass
class Done:
    """What a command has done to NICs so far, below which run directory, and how long each op took, by its key."""

    outcomes: list[Outcome] = field(default_factory=list)
    run_dir: Path = RUN_DIR
    seconds: Mapping[tuple[object, ...], float] | None = None


Observer = Callable[[str, int, float, KvmIfupError | None], None]


@dataclass(frozen=True)
class Caller:
    """What a command has of whoever called it: see `main`."""

    environ: Mapping[str, str]
    out: TextIO
    err: TextIO
    stdin: TextIO | None
    background: Background | None

    @property
    def by(self) -> str:
        """Who it is, for the journal and the log."""
        return "person" if self.err.isatty() else "hook"


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

    *background* sends the later announcements (messages, and whether they are still true); None leaves
    them out. *stdin* None: there is none to read, nor are files whose path is relative. *observer* is told
    the program, its exit code, how many seconds it took, and the error if any.
    """
    begun = time.monotonic()
    caller = Caller(environ, stdout, stderr, stdin, background)
    done = Done()
    failure, code = attempt(program, argv, caller, done)
    seconds = time.monotonic() - begun
    if done.outcomes or (failure and program in PHASES and "--plan" not in argv):
        from kvmifup import live, log

        log.run(program, done.outcomes, failure, seconds, caller.by)
        live.run(done.run_dir, program, done.outcomes, failure, seconds, caller.by, done.seconds)
    if observer:
        observer(program, code, seconds, failure)
    if failure is None:
        return code
    from kvmifup import report

    if "--json" in argv:
        stdout.write(report.error_object(failure) + "\n")
    stderr.write(report.error_line(program, failure) + "\n")
    return failure.code


def attempt(program: str, argv: Sequence[str], caller: Caller, done: Done) -> tuple[KvmIfupError | None, int]:
    """Run *program*; returns why it failed, and else its exit code. What it has done is added to *done*."""
    try:
        return None, command(program, argv, caller, done)
    except Exception as error:
        failure = known(error, hint="please report it; KVM_IFUP_DEBUG=1 shows where")
        if isinstance(failure, BugError) and caller.environ.get("KVM_IFUP_DEBUG"):
            import traceback

            traceback.print_exception(error, file=caller.err)
    return failure, failure.code


def command(program: str, argv: Sequence[str], caller: Caller, done: Done) -> int:
    """Parse, gather, and only then load what speaks to the kernel. Raises KvmIfupError."""
    try:
        options = parser(program).parse_args(list(argv))
    except Told as told:
        caller.out.write(str(told))
        return 0
    done.run_dir = options.run_dir
    if program == "kvm-ifup" and options.subcommand != "gc":
        from kvmifup import shell

        return shell.command(shell.Shell(options, caller, done))
    work = partial(collect, caller.err) if program == "kvm-ifup" else hook(program, options, caller.environ)
    if work is None:
        return 0
    settings = config.load(options.config)
    if not options.plan:
        need_privileges()

    from kvmifup import live, report
    from kvmifup.journal import Store
    from kvmifup.kernel import Kernel
    from kvmifup.run import Session
    from kvmifup.timing import Timed

    kernel = Kernel()
    timed = Timed(kernel) if options.verbose > 1 or live.watched(options.run_dir) else None
    done.seconds = timed.seconds if timed else None
    try:
        store = Store(options.run_dir)
        outcomes = work(Session(timed or kernel, store, options.run_dir, settings, dry=options.plan, by=caller.by))
        if not options.plan:
            done.outcomes += outcomes
            announce_later(outcomes, store, caller.background)
    finally:
        kernel.close()
    if options.json:
        caller.out.write(report.as_json(outcomes) + "\n")
    elif options.plan:
        caller.out.writelines(f"{line}\n" for line in report.plan_lines(outcomes))
    if options.verbose:
        seconds = timed.seconds if timed and options.verbose > 1 else None
        lines = report.remark_lines(outcomes) if options.plan else report.verbose_lines(outcomes, seconds)
        caller.err.writelines(f"{line}\n" for line in lines)
    return 0


def need_privileges() -> None:
    """Raise PrivilegeError unless we are root with CAP_NET_ADMIN: half of it would do half of the work."""
    if os.geteuid() != 0:
        raise PrivilegeError("not root", hint="run it as root")
    need_capability()


@cache
def need_capability() -> None:
    """Raise PrivilegeError without CAP_NET_ADMIN. A process that has it keeps it, so it is looked at once."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not effective >> CAP_NET_ADMIN & 1:
        raise PrivilegeError("root, but not permitted to change the network", hint="this takes CAP_NET_ADMIN")


def collect(err: TextIO, session: Session) -> list[Outcome]:
    """`kvm-ifup gc`. Whoever runs it in the wrong network namespace must not take silence for success."""
    from kvmifup import run

    outcomes = run.gc(session)
    for namespace, number in sorted(session.store.elsewhere().items()):
        hint = "(run gc there; `lsns -t net` finds it)"
        err.write(f"kvm-ifup: NICs of network namespace {namespace} left alone: {number} {hint}\n")
    return outcomes


def hook(
    program: str, options: argparse.Namespace, environ: Mapping[str, str]
) -> Callable[[Session], list[Outcome]] | None:
    """What a hook has to do once the kernel can be spoken to; None for a tap that is none of our business.

    Raises UsageError and NicError: everything that can be wrong with the input is found here.
    """
    if options.tap is not None and options.instance is not None:
        raise UsageError("TAP and --instance exclude each other", hint="give one of them")
    if options.instance is not None and environ.get("INTERFACE"):
        raise UsageError("--instance takes the NIC files, but the environment has INTERFACE", hint="unset INTERFACE")
    tap = None if options.tap is None else inputs.tap_argument(options.tap)
    if (tap or environ.get("INTERFACE", "")).startswith(inputs.GANETI_OWN):
        return None
    inputs.refuse_contradiction(program, tap, environ)
    if options.instance is not None:
        inputs.instance_name(options.instance)
    else:
        tap = tap or environ.get("INTERFACE")
        if tap is None:
            raise UsageError("which tap?", hint="give TAP or --instance NAME, or set INTERFACE")
        inputs.device(tap, "tap")
    return lowering(tap, options, environ) if PHASES[program] is Phase.DOWN else raising(program, tap, options, environ)


def raising(
    program: str, tap: str | None, options: argparse.Namespace, environ: Mapping[str, str]
) -> Callable[[Session], list[Outcome]]:
    """pre or post, for NICs that have been found and validated. Raises NicError."""
    if tap is None:
        nics = inputs.nics_of_instance(options.instance, options.run_dir) or ganeti.nics_of_instance(options.instance)
        if not nics:
            raise NicError("there are no NIC files for it", hint=f"see {options.run_dir}/nic", where=options.instance)
    else:
        nic = nic_of(tap, options.run_dir, environ)
        if nic is None:
            raise NicError(
                "nothing describes this tap",
                hint=f"write {options.run_dir}/nic/INSTANCE/0.toml, or set INTERFACE, MODE, MAC and LINK",
                where=tap,
            )
        nics = [nic]

    def work(session: Session) -> list[Outcome]:
        from kvmifup import run

        wired = [inputs.as_wired(nic, session.config) for nic in nics]
        return run.up(PHASES[program], wired, session, announce=options.announce)

    return work


def lowering(
    tap: str | None, options: argparse.Namespace, environ: Mapping[str, str]
) -> Callable[[Session], list[Outcome]]:
    """down: the journal says what to undo, so a NIC file is only looked at where there is no journal."""

    def described(one: str, session: Session) -> Nic | None:
        nic = nic_of(one, options.run_dir, environ, needed=False)
        return nic and inputs.as_wired(nic, session.config)

    instance = options.instance or (environ.get("INSTANCE") if environ.get("INTERFACE") else None)

    def work(session: Session) -> list[Outcome]:
        from kvmifup import run

        taps = [tap] if tap else run.taps_of_instance(options.instance, session)
        outcomes: list[Outcome] = []
        failures: list[KvmIfupError] = []
        for one in taps:
            try:
                outcomes.append(run.down(one, instance, partial(described, one, session), session))
            except KvmIfupError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return outcomes

    return work


def nic_of(tap: str, run_dir: Path, environ: Mapping[str, str], *, needed: bool = True) -> Nic | None:
    """The NIC on *tap*: from the environment, its NIC file, the journal of an earlier phase, or Ganeti's files.

    None when nothing describes it. Raises NicError, JournalError, NamespaceError.
    """
    if environ.get("INTERFACE"):
        return inputs.from_environment(environ)
    nic = inputs.nic_of_tap(tap, run_dir, needed=needed)
    if nic is not None:
        return nic
    from kvmifup.journal import Store

    return Store(run_dir).nic_of_live(tap) or ganeti.nic_of_tap(tap)


def announce_later(outcomes: Sequence[Outcome], store: Store, background: Background | None) -> None:
    """Hand over the later rounds of whatever was announced; they stop when the guest leaves."""
    for outcome in outcomes:
        if outcome.announced and background:
            addresses = {address for _, address, _ in outcome.announced}
            background(outcome.announced, partial(store.has_here, outcome.tap, addresses))
