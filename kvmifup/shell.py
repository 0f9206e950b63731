"""What a person at a shell can ask, and do: `kvm-ifup show`, `plan`, `check`, `watch` and `nic`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvmifup import cli, config, inputs, nicfiles, report, trust
from kvmifup.errors import InterruptedRun, KvmIfupError, NicError, UsageError, shown
from kvmifup.model import Config, Nic, Phase

if TYPE_CHECKING:  # what imports pyroute2 waits until the input has been found good
    from kvmifup.apply import Change
    from kvmifup.census import Known, State
    from kvmifup.diagnose import Finding
    from kvmifup.kernel import Overview
    from kvmifup.run import Outcome, Session

PHASES = {"pre": "kvm-ifup-pre", "post": "kvm-ifup-post", "down": "kvm-ifdown"}
GREEN, RED, YELLOW, BOLD, PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[1m", "\033[0m"
COLOURS = {"yes": GREEN, "no": RED, "armed": YELLOW, "pre": YELLOW}
WRONG = 1  # the exit code of a check that has found something


@dataclass(frozen=True)
class Shell:
    """One call: its options, who called, and where to add what has been done to NICs."""

    options: argparse.Namespace
    caller: cli.Caller
    done: cli.Done

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        found: Path = self.options.run_dir
        return found

    def say(self, lines: Iterable[str]) -> None:
        """Write *lines* to stdout."""
        self.caller.out.writelines(f"{report.printable(line)}\n" for line in lines)

    def say_json(self, value: Any) -> None:
        """Write *value* to stdout."""
        self.caller.out.write(json.dumps(value, indent=2) + "\n")


# --- the command line -----------------------------------------------------------------------------------


def add_subcommands(made: cli.Parser) -> None:
    """All that `kvm-ifup` takes after its own options."""
    subcommands = made.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")

    def add(to: Any, name: str, does: str) -> argparse.ArgumentParser:
        one: cli.Parser = to.add_parser(
            name, help=does, description=f"{does[0].upper()}{does[1:]}.", allow_abbrev=False
        )
        cli.add_options(one, again=True)
        return one

    one = add(subcommands, "show", "list NICs: how they are described, their phase, and whether they are wired so")
    one.add_argument("name", nargs="?", metavar="INSTANCE|TAP", help="only this guest's, or this one")
    one = add(subcommands, "plan", "print what a phase would change, and the commands to do it by hand")
    one.add_argument("phase", choices=PHASES, help="the phase")
    one.add_argument("name", metavar="INSTANCE|TAP", help="all NICs of this guest, or this one")
    one = add(subcommands, "check", "compare NICs with what their phase wants; exit with 1 if something differs")
    one.add_argument("name", nargs="?", metavar="INSTANCE|TAP", help="only this guest's, or this one")
    one.add_argument("--repair", action="store_true", help="then repeat the phase that each has reached")
    one.add_argument("--probe", action="store_true", help="ask the uplinks whether somebody else has the addresses")
    one.add_argument("--node", action="store_true", help="instead: is the node ready for guests that arrive?")
    one = add(subcommands, "gc", "clear up after dead NICs and killed runs")
    one.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    add(subcommands, "watch", "print what hooks and the agent do, as they do it, until interrupted")
    verbs = add(subcommands, "nic", "write, list and remove NIC files").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    one = add(verbs, "put", "check a NIC file and put it into its place")
    one.add_argument("instance", metavar="INSTANCE", help="the guest")
    one.add_argument("index", metavar="INDEX", type=int, help="the NIC's number")
    one.add_argument("file", metavar="FILE", help='the TOML to read; "-" for standard input')
    one = add(verbs, "list", "list NIC files")
    one.add_argument("instance", metavar="INSTANCE", nargs="?", help="only this guest's")
    one = add(verbs, "rm", "remove NIC files; what is not there is as good as removed")
    one.add_argument("instance", metavar="INSTANCE", help="the guest")
    one.add_argument("index", metavar="INDEX", type=int, nargs="?", help="only the NIC with this number")


def command(shell: Shell) -> int:
    """Run the subcommand; returns the exit code. Raises KvmIfupError, OSError."""
    if shell.options.subcommand == "nic":
        return VERBS[shell.options.verb](shell)
    return SUBCOMMANDS[shell.options.subcommand](shell)


# --- show -----------------------------------------------------------------------------------------------


def look(shell: Shell, settings: Config) -> tuple[list[Known], Session, Overview]:
    """The NICs that are asked about, and the node as it is now, with a session on it. Raises NicError."""
    from kvmifup import census
    from kvmifup.journal import Store
    from kvmifup.kernel import Overview
    from kvmifup.run import Session

    store = Store(shell.run_dir)
    found = census.selected(shell.options.name, census.known(shell.run_dir, store))
    kernel = Overview()
    return found, Session(kernel, store, shell.run_dir, settings, dry=True), kernel


def show(shell: Shell) -> int:
    """`kvm-ifup show`."""
    from kvmifup import census

    found, session, _ = look(shell, config.load(shell.options.config))
    agent = census.agent_lives(shell.run_dir)
    rows = [(one, census.phase_word(one, session.config, agent=agent), census.state(one, session)) for one in found]
    if shell.options.json:
        shell.say_json([nic_object(*row) for row in rows])
        return 0
    table = [["INSTANCE", "NIC", "TAP", "MODE", "LINK", "ADDRESSES", "PHASE", "SINCE", "BY", "WIRED"]]
    now = time.time()
    table += [cells(*row, now) for row in rows]
    colour = (
        shell.caller.out.isatty()
        and not shell.caller.environ.get("NO_COLOR")
        and shell.caller.environ.get("TERM") != "dumb"
    )
    for number, row in enumerate(report.table(table, elastic=(0, 4, 5))):
        shown_row = [report.printable(cell) for cell in row]
        if colour:
            shown_row = [f"{BOLD if number == 0 else COLOURS.get(cell.strip(), '')}{cell}{PLAIN}" for cell in shown_row]
        shell.caller.out.write("  ".join(shown_row).rstrip() + "\n")
    for one, _, state in rows:
        if state.problem:
            shell.say([report.error_line(one.label, state.problem)])
    return 0


def cells(one: Known, phase: str, state: State, now: float) -> list[str]:
    """One line of the table."""
    nic, journal = one.nic, one.journal
    if nic is None:
        file = one.tap if "/" in one.tap else ""  # else it is a journal that cannot be read
        return [file or "?", "-", "-" if file else one.tap, "-", "-", "-", "?", "-", "-", "no"]
    first, *more = [short(prefix) for prefix in nic.ip] or [""]
    wired = {True: "yes", False: "no", None: "-"}[state.wired]
    return [
        nic.instance or "-",
        "-" if nic.index is None else str(nic.index),
        nic.tap,
        nic.mode,
        nic.link or "-",
        f"{first} +{len(more)}" if more else first or "-",
        phase,
        ago(now - journal.since) if journal and journal.since else "-",
        (journal.by if journal else "") or "-",
        wired,
    ]


def short(prefix: Any) -> str:
    """An address without the length that it has anyway."""
    text = str(prefix)
    return text.rpartition("/")[0] if prefix.prefixlen == prefix.max_prefixlen else text


def ago(seconds: float) -> str:
    """How long ago, in the largest unit that is full: "59s", "2h", "12d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def nic_object(one: Known, phase: str, state: State) -> dict[str, Any]:
    """One NIC as kvm-ifup(8) documents it."""
    nic, journal = one.nic, one.journal
    return {
        "instance": nic.instance if nic else None,
        "index": nic.index if nic else None,
        "tap": nic.tap if nic else one.tap,
        "mac": nic.mac if nic else None,
        "mode": nic.mode if nic else None,
        "link": nic.link if nic else None,
        "ip": [short(prefix) for prefix in nic.ip] if nic else [],
        "vlan": nic.vlan if nic else None,
        "incoming": nic.incoming if nic else None,
        "phase": phase,
        "since": journal.since if journal else None,
        "by": journal.by if journal else None,
        "frame": journal.frame if journal else None,
        "wired": state.wired,
        "missing": [report.change_object(change) for change in state.missing],
        "problem": error_object(state.problem),
    }


def error_object(error: KvmIfupError | None) -> Any:
    """An error within a larger object."""
    return None if error is None else json.loads(report.error_object(error))


# --- plan -----------------------------------------------------------------------------------------------


def plan(shell: Shell) -> int:
    """`kvm-ifup plan`: the hook's own plan, with the command for each op."""
    options = shell.options
    is_tap = names_tap(options.name, shell.run_dir, shell.caller.environ)
    asked = argparse.Namespace(
        tap=options.name if is_tap else None,
        instance=None if is_tap else options.name,
        announce=False,
        run_dir=options.run_dir,
    )
    work = cli.hook(PHASES[options.phase], asked, shell.caller.environ)
    if work is None:
        return 0
    settings = config.load(options.config)

    from kvmifup.journal import Store
    from kvmifup.kernel import Kernel
    from kvmifup.run import Session

    kernel = Kernel()
    try:
        outcomes = work(Session(kernel, Store(shell.run_dir), shell.run_dir, settings, dry=True))
    finally:
        kernel.close()
    if options.json:
        shell.say_json([plan_object(outcome) for outcome in outcomes])
    else:
        shell.say(line for outcome in outcomes for line in plan_lines(outcome))
    if options.verbose:
        shell.caller.err.writelines(f"{line}\n" for line in report.remark_lines(outcomes))
    return 0


def names_tap(name: str, run_dir: Path, environ: Mapping[str, str]) -> bool:
    """Whether *name* is a tap's rather than a guest's: a guest has NIC files, here or Ganeti's, or a journal."""
    from kvmifup import ganeti
    from kvmifup.journal import Store

    if environ.get("INTERFACE") == name or Path("/sys/class/net", name).exists() or name in Store(run_dir).taps():
        return True
    try:
        inputs.device(name, "tap")
    except NicError:
        return False
    if (run_dir / "tap" / name).is_symlink():
        return True
    return not ((run_dir / "nic" / name).is_dir() or (ganeti.DIRECTORY / "nic" / name).is_dir())


def plan_lines(outcome: Outcome) -> Iterable[str]:
    """What `--plan` prints, with the command below each op that is needed."""
    from kvmifup import commands

    yield report.heading(outcome)
    for verb, changes in (("undo   ", outcome.undone), ("do     ", outcome.changes)):
        for change in changes:
            if change.needed:
                yield f"  {verb}{report.transition(change)}"
                command = commands.line(change.op)
                if command:
                    yield f"           {command}"
            elif verb == "do     ":
                yield f"  right  {report.transition(change)}"
    if not outcome.undone and not outcome.changes:
        yield "  nothing to do"


def plan_object(outcome: Outcome) -> dict[str, Any]:
    """The outcome, each op with its command."""
    from kvmifup import commands

    def with_command(change: Change) -> dict[str, Any]:
        return {**report.change_object(change), "command": commands.line(change.op) if change.needed else None}

    return {
        **report.as_object(outcome),
        "undone": [with_command(change) for change in outcome.undone],
        "ops": [with_command(change) for change in outcome.changes],
    }


# --- check ----------------------------------------------------------------------------------------------


def check(shell: Shell) -> int:
    """`kvm-ifup check`; returns 1 if anything is wrong, also after a repair."""
    options = shell.options
    if options.node:
        if options.name or options.repair or options.probe:
            raise UsageError("--node excludes INSTANCE|TAP, --repair and --probe", hint="it is about all of the node")
        return check_node(shell)
    settings = config.load(options.config)
    if options.repair:
        cli.need_privileges()
    found = diagnoses(shell, settings)
    done: list[Outcome] = []
    failures: list[KvmIfupError] = []
    if options.repair and any(wrong(many) for _, _, many in found):
        done, failures = repair(shell, settings, [one for one, _, many in found if wrong(many)])
        found = diagnoses(shell, settings)
    if options.json:
        shell.say_json(
            {
                "right": not any(wrong(many) for _, _, many in found),
                "repaired": [report.as_object(outcome) for outcome in done],
                "failed": [error_object(error) for error in failures],
                "nics": [
                    {**nic_object(one, phase, state), "findings": [finding_object(finding) for finding in many]}
                    for (one, phase, many), state in ((row, state_of(row[2])) for row in found)
                ],
            }
        )
    else:
        shell.say(line for outcome in done for line in repaired_lines(outcome))
        shell.say(report.error_line("not repaired", error) for error in failures)
        shell.say(line for one, phase, many in found for line in check_lines(one, phase, many))
    return WRONG if any(wrong(many) for _, _, many in found) else 0


def diagnoses(shell: Shell, settings: Config) -> list[tuple[Known, str, list[Finding]]]:
    """What there is to say about each NIC that is asked about."""
    from kvmifup import census, diagnose

    found, session, kernel = look(shell, settings)
    agent = census.agent_lives(shell.run_dir)
    return [
        (
            one,
            census.phase_word(one, settings, agent=agent),
            diagnose.findings(one, session, kernel, ask=shell.options.probe),
        )
        for one in found
    ]


def wrong(findings: Sequence[Finding]) -> bool:
    """Whether anything is."""
    return any(finding.wrong for finding in findings)


def state_of(findings: Sequence[Finding]) -> State:
    """What `show` would say."""
    from kvmifup.census import State

    return State(not wrong(findings))


def repair(shell: Shell, settings: Config, nics: Sequence[Known]) -> tuple[list[Outcome], list[KvmIfupError]]:
    """Repeat for each of *nics* the phase that it has reached, and no later one."""
    from kvmifup import census, run
    from kvmifup.journal import Store
    from kvmifup.kernel import Kernel
    from kvmifup.run import Session

    kernel = Kernel()
    store = Store(shell.run_dir)
    session = Session(kernel, store, shell.run_dir, settings, by=shell.caller.by)
    done: list[Outcome] = []
    failures: list[KvmIfupError] = []
    try:
        for one in nics:
            if one.nic is None or one.phase is Phase.DOWN:
                continue
            try:
                done += run.up(one.phase, [census.intended(one, settings)], session, announce=False)
            except KvmIfupError as error:
                failures.append(error.at(one.label))
        shell.done.outcomes.extend(done)
        cli.announce_later(done, store, shell.caller.background)
    finally:
        kernel.close()
    return done, failures


def repaired_lines(outcome: Outcome) -> Iterable[str]:
    """What a repair has changed."""
    for change in (*outcome.undone, *outcome.changes):
        if change.needed:
            yield f"repaired: {outcome.label}: {report.transition(change)}"


def check_lines(one: Known, phase: str, findings: Sequence[Finding]) -> Iterable[str]:
    """One NIC: how it is described, its phase, and what is wrong with it."""
    mode = f"{one.nic.mode}, " if one.nic else ""
    since = ""
    if one.journal and one.journal.since:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.journal.since))
        since = f" since {moment} ({one.journal.by})"
    yield f"{one.label}: {mode}{phase}{since}: {'wrong' if wrong(findings) else 'right'}"
    for finding in findings:
        yield from finding_lines(finding)


def finding_lines(finding: Finding) -> Iterable[str]:
    """One finding."""
    yield f"  {finding.what}"
    if finding.why:
        yield f"      {finding.why}"
    if finding.mend:
        yield f"      mend: {finding.mend}"


def finding_object(finding: Finding) -> dict[str, Any]:
    """One finding as kvm-ifup(8) documents it."""
    return {"what": finding.what, "why": finding.why, "mend": finding.mend, "wrong": finding.wrong}


def check_node(shell: Shell) -> int:
    """`kvm-ifup check --node`."""
    from kvmifup import readiness

    settings = config.load(shell.options.config)
    found, _, kernel = look(shell, settings)
    place = shell.options.config or config.DIRECTORY
    findings = list(readiness.findings(found, settings, kernel, shell.run_dir, place))
    if shell.options.json:
        shell.say_json({"ready": not wrong(findings), "findings": [finding_object(finding) for finding in findings]})
    else:
        shell.say([f"node: {'not ready' if wrong(findings) else 'ready'}"])
        shell.say(line for finding in findings for line in finding_lines(finding))
    return WRONG if wrong(findings) else 0


# --- watch ----------------------------------------------------------------------------------------------


def watch(shell: Shell) -> int:
    """`kvm-ifup watch`: a line for each event, and one for each op that changed something, until a signal comes."""
    from kvmifup import live

    cli.need_privileges()
    with suppress(InterruptedRun, BrokenPipeError), live.watching(shell.run_dir) as events:
        for event in events:
            if shell.options.json:
                shell.caller.out.write(json.dumps(event) + "\n")
            else:
                shell.say(event_lines(event))
            shell.caller.out.flush()
    return 0


def event_lines(event: Mapping[str, Any]) -> Iterable[str]:
    """An event, for people."""
    at = float(event["at"])
    moment = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at * 1000) % 1000:03}"
    end = f" in {1000 * event['seconds']:.1f} ms, by {event['by']}" if "seconds" in event else ""
    yield f"{moment}  {event['program']}: {event['what']}{end}"
    for op in event.get("ops", ()):
        took = "" if op["seconds"] is None else f"{1000 * op['seconds']:.2f} ms"
        yield f"{took:>24}  {op['what']}"


# --- nic ------------------------------------------------------------------------------------------------


def put(shell: Shell) -> int:
    """`kvm-ifup nic put`."""
    options = shell.options
    nicfiles.place(options.run_dir, options.instance, options.index)
    text = content(options.file, shell.caller.stdin)
    try:
        nic = nicfiles.put(options.run_dir, options.instance, options.index, text)
    except NicError as error:
        raise error.at("standard input" if options.file == "-" else options.file) from None
    if options.verbose:
        shell.caller.err.write(f"{nic.label}: {nic.source}\n")
    return 0


def content(file: str, stdin: TextIO | None) -> str:
    """The text of *file*, "-" for *stdin*. Raises UsageError, NicError."""
    if stdin is None and not file.startswith("/"):
        raise UsageError(f"{shown(file)} cannot be read from here", hint="give a file with its whole path")
    try:
        if file == "-":
            assert stdin is not None
            return stdin.read(trust.MAX_BYTES + 1)
        with open(file, encoding="utf-8") as opened:
            return opened.read(trust.MAX_BYTES + 1)
    except UnicodeDecodeError as error:
        raise NicError(f"it is not UTF-8 at byte {error.start}", where=file) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{shown(file)} cannot be read: {reason}", hint="FILE is a NIC file, or - for stdin") from None


def list_nics(shell: Shell) -> int:
    """`kvm-ifup nic list`: all that are right, then the first that is wrong is the error."""
    instance = shell.options.instance
    found = nicfiles.found(shell.run_dir, instance)
    if instance and not found:
        raise NicError("there are no NIC files for it", hint="`kvm-ifup nic list` lists all", where=instance)
    nics = [one for one in found if isinstance(one, Nic)]
    wrongs = [one for one in found if isinstance(one, NicError)]
    if shell.options.json:
        keys = ("instance", "index", "tap", "mac", "mode", "link", "ip", "vlan", "incoming")
        shell.say_json(
            [{key: getattr(nic, key) for key in keys} | {"ip": [short(one) for one in nic.ip]} for nic in nics]
        )
    else:
        table = [["INSTANCE", "NIC", "TAP", "MODE", "LINK", "ADDRESSES", "INCOMING"]]
        for nic in nics:
            addresses = " ".join(map(short, nic.ip)) or "-"
            incoming = "yes" if nic.incoming else "no"
            link = nic.link or "-"
            table.append([nic.instance or "", str(nic.index), nic.tap, nic.mode, link, addresses, incoming])
        shell.say("  ".join(row).rstrip() for row in report.table(table, elastic=(0, 4, 5)))
    if wrongs:
        raise wrongs[0]
    return 0


def remove(shell: Shell) -> int:
    """`kvm-ifup nic rm`."""
    for path in nicfiles.remove(shell.run_dir, shell.options.instance, shell.options.index):
        if shell.options.verbose:
            shell.caller.err.write(f"removed {path}\n")
    return 0


SUBCOMMANDS: dict[str, Callable[[Shell], int]] = {"show": show, "plan": plan, "check": check, "watch": watch}
VERBS: dict[str, Callable[[Shell], int]] = {"put": put, "list": list_nics, "rm": remove}
