"""What `./dev check` and the verbs of ./dev run: the parts, in one table.

    python -m tests.parts check [--all]     side by side, as many as there are cores; logs in build/check
    python -m tests.parts VERB              the parts of one verb, one after the other, in front

A part is a list of commands. It has the cores that it can use to itself, so no more runs than the machine can bear.
What a part prints goes to build/check/PART.log, and is shown when the part fails. At the end: how long each part took,
the slowest tests, and in the last line how many tests passed and failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build/check"
DEBIAN = "/usr/bin/python3"  # with Debian's own pyroute2, the oldest that is supported
NEWEST = ".venv/bin/python"  # with the newest pyroute2 from PyPI
CORES = max(2, len(os.sched_getaffinity(0)))
SLOWEST = 10  # tests that are named at the end
PATIENCE = 20.0  # seconds that a part has to clear up when it is to end

Command = tuple[str, ...]


def pytest(*arguments: str, python: str = NEWEST, processes: int = 1, **environ: str) -> Command:
    """A run of pytest, shared out among so many *processes*."""
    settings = ("env", *(f"{name}={value}" for name, value in environ.items())) if environ else ()
    shared = ("-n", str(processes), "--dist", "worksteal") if processes > 1 else ()
    return (*settings, python, "-m", "pytest", "-q", f"--durations={SLOWEST}", *shared, *arguments)


def as_nobody(*arguments: str) -> Command:
    """A run of pytest as nobody. Debian's Python, because nobody may not reach what is in this checkout's .venv."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-eu", "-c", AS_NOBODY, "sh",
            str(ROOT), *pytest("-p", "no:cacheprovider", *arguments, python=DEBIAN))  # fmt: skip


# Debian gives /dev/net/tun to everybody, a container may not: a node of our own, in a mount namespace of our own.
# The checkout is mounted where nobody can reach it, wherever it is.
AS_NOBODY = """
mount --bind "$1" /mnt
mount -t tmpfs tmpfs /opt
mount -t tmpfs -o mode=1777 tmpfs /tmp
mknod -m 666 /opt/tun c 10 200
mount --bind /opt/tun /dev/net/tun
cd /mnt
shift
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all env HOME=/nonexistent \\
    PYTHONDONTWRITEBYTECODE=1 "$@"
"""

# Commands are Python without .py at the end of their names.
SCRIPTS = (*sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").iterdir()), "integration/libvirt/kvm-ifup")
SHELL = (
    *("dev", ".ci/run", "man/build", "completion/kvm-ifup", "debian/build", "debian/tests/installed"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "integration/ganeti").iterdir())),
    *(str(path.relative_to(ROOT)) for kind in ("postinst", "prerm", "postrm")
      for path in sorted((ROOT / "debian").glob(f"*.{kind}"))),
)  # fmt: skip
KERNEL = "tests/kernel"
MIGRATIONS = ("tests/e2e/test_migration.py", "tests/e2e/test_agents.py", "tests/e2e/test_filtered.py")
ONE_MIGRATION = "tests/e2e/test_migration.py::test_routed_guest_moves_with_phases"


@dataclass(frozen=True)
class Part:
    """One part: its commands in `./dev check`, and in `./dev check --all`; none where it has no place."""

    name: str
    verb: str
    check: tuple[Command, ...]
    all: tuple[Command, ...]
    cores: int = 1
    after: tuple[str, ...] = ()


def both(name: str, verb: str, *commands: Command, cores: int = 1) -> Part:
    """A part that is the same in both."""
    return Part(name, verb, commands, commands, cores)


def only_all(name: str, verb: str, *commands: Command, cores: int = 1, after: tuple[str, ...] = ()) -> Part:
    """A part that `./dev check` leaves out."""
    return Part(name, verb, (), commands, cores, after)


DEBS = str(ROOT / "build/deb")
PACKAGE = "tests/package"
AUTOPKGTEST, SYSTEMD = f"{PACKAGE}/test_autopkgtest.py", f"{PACKAGE}/test_systemd.py"

# In the order in which they start: what is quick to fail first, then what takes all cores, then the longest first.
# Twice runs only what can come out differently: pyproject.toml says for which tests that is (markers).
PARTS = (
    both(
        "lint", "lint",
        (".venv/bin/ruff", "check", ".", *SCRIPTS),
        (".venv/bin/ruff", "format", "--check", ".", *SCRIPTS),
        ("shellcheck", *SHELL),
    ),
    both("types", "types", (".venv/bin/mypy",), (".venv/bin/mypy", "integration/libvirt/kvm-ifup")),
    both("unit", "unit", pytest("tests/unit")),
    only_all("unit-debian", "unit", pytest("tests/unit", python=DEBIAN)),
    only_all("deb", "deb", ("debian/build", "build/deb")),
    Part(
        "kernel", "kernel", cores=CORES,
        check=(pytest(KERNEL, "-m", "not sweep", processes=CORES + 1),),  # each waits half of its time
        all=(pytest(KERNEL, processes=CORES + 1),),
    ),
    both("attack", "attack", pytest("tests/attack")),
    only_all("installed-kernel", "package", pytest(AUTOPKGTEST, "-k", "kernel"), cores=CORES, after=("deb",)),
    only_all("package", "package", pytest(PACKAGE, f"--ignore={AUTOPKGTEST}", f"--ignore={SYSTEMD}"), after=("deb",)),
    only_all("systemd", "package", pytest(SYSTEMD), after=("deb",)),
    only_all("vm", "vm", pytest("tests/vm")),
    only_all("ganeti", "ganeti", pytest("tests/ganeti", KVM_IFUP_DEBS=DEBS), after=("deb",)),
    only_all("installed-e2e", "package", pytest(AUTOPKGTEST, "-k", "e2e"), after=("deb",)),
    only_all("userns", "unprivileged", as_nobody(KERNEL, "-m", "userns and not sweep")),
    both("docs", "docs", pytest("tests/docs", "--ignore=tests/docs/test_libvirt.py")),
    # The lab needs more than Debian has, so it runs on the newest; the scripts under test run on either.
    Part(
        "migration", "e2e",
        check=(pytest(ONE_MIGRATION, KVM_IFUP_PYTHON=DEBIAN),),
        all=(
            pytest(*MIGRATIONS, KVM_IFUP_PYTHON=DEBIAN),
            pytest(ONE_MIGRATION, KVM_IFUP_PYTHON=str(ROOT / NEWEST)),
        ),
    ),
    only_all("libvirt", "docs", pytest("tests/docs/test_libvirt.py")),
    both("scripts", "e2e", pytest("tests/e2e/test_scripts.py")),
    only_all("scripts-debian", "e2e", pytest("tests/e2e/test_scripts.py", python=DEBIAN)),
    only_all("pyroute2", "kernel", pytest(KERNEL, "-m", "pyroute2", python=DEBIAN)),
)  # fmt: skip


# --- what pytest says ---------------------------------------------------------------------------------------

CLOSING = re.compile(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s\b", re.M)
DURATION = re.compile(r"^ *(?P<seconds>[\d.]+)s (?:call|setup|teardown) +(?P<test>.+)$", re.M)
COUNTED = {"passed": "passed", "failed": "failed", "error": "failed", "errors": "failed", "skipped": "skipped"}


def counts(log: str) -> Counter[str]:
    """How many tests passed, failed and were skipped, by the closing lines of each run of pytest in *log*."""
    found: Counter[str] = Counter()
    for closing in CLOSING.findall(log):
        for number, word in re.findall(r"(\d+) (\w+)", closing):
            if word in COUNTED:
                found[COUNTED[word]] += int(number)
    return found


def said(found: Counter[str]) -> str:
    """The counts as pytest words them; skipped ones only if there are any."""
    words = ["passed", "failed", *(["skipped"] if found["skipped"] else [])]
    return ", ".join(f"{found[word]} {word}" for word in words)


def durations(log: str) -> list[tuple[float, str]]:
    """The slowest tests in *log*, as (seconds, test)."""
    return [(float(found["seconds"]), found["test"]) for found in DURATION.finditer(log)]


# --- running --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A part that runs, or has run."""

    part: Part
    commands: tuple[Command, ...]
    log: Path
    begun: float
    process: subprocess.Popen[bytes] | None = None
    left: list[Command] = field(default_factory=list)
    code: int = 0
    seconds: float = 0.0
    cpu: float = 0.0  # seconds of its processes, as far as they have ended: what takes little of them only waits

    def go_on(self) -> bool:
        """Start the next command if it is time; returns whether anything still runs."""
        if self.process is not None and self.process.returncode is None:
            ended, status, used = os.wait4(self.process.pid, os.WNOHANG)
            if not ended:
                return True
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.code = self.code or self.process.returncode
            self.cpu += used.ru_utime + used.ru_stime
        if not self.left:
            self.seconds = time.monotonic() - self.begun
            return False
        command = self.left.pop(0)
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command[:8])}{' ...' if len(command) > 8 else ''}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C reaches this process alone, which then ends the parts in order.
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return True

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def counts(self) -> Counter[str]:
        """Its tests; a failure that no test tells of counts as one."""
        found = counts(self.text())
        if self.code and not found["failed"]:
            found["failed"] = 1
        return found


def end(runs: Sequence[Run]) -> None:
    """End *runs* with all that they have started: in order if they can, for certain if they cannot."""
    processes = [run.process for run in runs if run.process is not None and run.process.poll() is None]
    for process in processes:
        os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list. A signal that would end this process appears in it instead, as long as the block lasts.

    An exception could come while a process is started, and nobody would know of that process.
    """
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def side_by_side(
    parts: Sequence[Part], everything: bool, logs: Path, cores: int, signals: Sequence[int] = ()
) -> list[Run]:
    """Run *parts* as their order, `cores` and `after` allow; a line when one ends, and its log if it failed.

    Raises KeyboardInterrupt as soon as there is something in *signals*; nothing runs any more then.
    """
    chosen = [part for part in parts if (part.all if everything else part.check)]
    waiting, running, done = list(chosen), list[Run](), list[Run]()
    for old in logs.glob("*.log"):
        old.unlink()
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            if signals:
                raise KeyboardInterrupt
            for run in [run for run in running if not run.go_on()]:
                running.remove(run)
                done.append(run)
                tell(run)
            succeeded = {run.part.name for run in done if run.code == 0}
            failed = {run.part.name for run in done if run.code != 0}
            for part in [one for one in waiting if failed.intersection(one.after)]:
                waiting.remove(part)
                print(f"== {part.name}: not run, because {' and '.join(part.after)} failed", flush=True)
            # In order: a part that takes all cores is not overtaken for ever by smaller ones.
            while waiting and succeeded.issuperset(waiting[0].after):
                if running and sum(run.part.cores for run in running) + waiting[0].cores > cores:
                    break
                part = waiting.pop(0)
                commands = part.all if everything else part.check
                running.append(Run(part, commands, logs / f"{part.name}.log", time.monotonic(), left=list(commands)))
                running[-1].go_on()
            time.sleep(0.1)
    finally:
        end(running)
    return done


def tell(run: Run) -> None:
    """A line about a part that has ended; of one that failed, what it printed."""
    if run.code:
        print(f"\n{run.text()}")
    print(f"== {run.part.name}: {'FAILED' if run.code else 'ok'}, {run.seconds:.0f} s", flush=True)


def table(done: Sequence[Run], seconds: float) -> str:
    """How long each part took, the slowest tests, and the closing line."""
    lines = [f"\n{'part':16} {'seconds':>8} {'CPU':>6}  result"]
    total: Counter[str] = Counter()
    slowest: list[tuple[float, str]] = []
    for run in done:
        found = run.counts()
        total += found
        slowest += durations(run.text())
        result = said(found) if found else "ok"
        lines.append(f"{run.part.name:16} {run.seconds:8.0f} {run.cpu:6.0f}  {result}")
    lines += [f"{'all of it':16} {seconds:8.0f}", "", "slowest tests:"]
    lines += [f"{taken:8.1f} s  {test}" for taken, test in sorted(slowest, reverse=True)[:SLOWEST]]
    return "\n".join([*lines, "", said(total)])


def check(everything: bool) -> int:
    """`./dev check`, or `./dev check --all`."""
    begun = time.monotonic()
    print(f"{CORES} cores; logs in {LOGS}", flush=True)
    with interruptible() as signals:
        try:
            done = side_by_side(PARTS, everything, LOGS, CORES, signals)
        except KeyboardInterrupt:
            print("\ninterrupted", flush=True)
            return 130
    print(table(done, time.monotonic() - begun), flush=True)
    wanted = sum(bool(part.all if everything else part.check) for part in PARTS)
    return int(len(done) != wanted or any(run.code for run in done))


def in_front(verb: str) -> int:
    """The parts of one verb, in full, one after the other; the first failure does not keep the others from running."""
    codes = []
    with contextlib.suppress(KeyboardInterrupt):
        for part in PARTS:
            if verb in (part.verb, part.name):
                print(f"\n== {part.name}", flush=True)
                codes += [subprocess.run(command, cwd=ROOT).returncode for command in part.all]
        return int(any(codes))
    return 130


def main(argv: Sequence[str]) -> int:
    if argv[0] == "check":
        return check(everything="--all" in argv[1:])
    return in_front(argv[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
