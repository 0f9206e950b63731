"""The agent as tests and bench run it, what it has done so far, and the locks that it waits for."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import hooks, namespaces, oracle, tools
from harness.addresses import IPS
from harness.manager import RUN_DIR

SOCKET = RUN_DIR / "agent.sock"
STATE = RUN_DIR / "state"
CONFIGURATION = Path("/etc/kvm-ifup")
_numbers = itertools.count()

# Runs the script that its arguments name, after the constants that the first one names have got other values.
WITH_OTHERS = """
import importlib, json, os, runpy, sys
del sys.argv[0]
others, checkout = json.loads(sys.argv.pop(0)), os.path.dirname(os.path.dirname(os.path.realpath(sys.argv[0])))
if os.path.isdir(os.path.join(checkout, "kvmifup")):
    sys.path.insert(0, checkout)
for name, value in others.items():
    module, _, name = name.rpartition(".")
    module = importlib.import_module("kvmifup." + module)
    assert name in vars(module), name
    setattr(module, name, value)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Agent:
    """A running kvm-ifupd, with *within* before it (such as `setpriv …`); *more* goes to Popen.

    *others*: values of constants that are not the usual ones, such as {"agent.suspects.ANSWER": 60}. Where seconds
    decide, they can be so many, or so few, that it does not matter how busy the machine is.
    """

    def __init__(
        self,
        *argv: str,
        environ: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
        others: Mapping[str, float] | None = None,
        **more: Any,
    ) -> None:
        self.log = Path(f"/run/agent.{next(_numbers)}.log")
        python, isolated, *script = hooks.command("kvm-ifupd", *argv)
        changed = ["-c", WITH_OTHERS, json.dumps(others)] if others else []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*within, python, isolated, *changed, *script],
                env={**tools.CLEAN, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **more,
            )

    def ready(self) -> Agent:
        """Once it is."""
        until(lambda: "ready" in self.said() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        return self

    def said(self) -> str:
        """All that it has said."""
        return self.log.read_text()

    def heard(self, *words: str) -> None:
        """Wait until it says *words*, in one line."""
        until(lambda: any(all(word in line for word in words) for line in self.said().splitlines()))

    def armings(self, tap: str = "tap0") -> int:
        """How often it has said that it is armed."""
        return self.said().count(f"{tap}): armed")

    def armed(self, tap: str = "tap0", times: int = 1) -> None:
        """Wait until it has said so."""
        until(lambda: self.armings(tap) >= times)

    @contextlib.contextmanager
    def when_armed(self, tap: str = "tap0") -> Iterator[None]:
        """A block that begins once it has said so."""
        self.armed(tap)
        yield

    def holds(self, path: Path) -> bool:
        """Whether it has *path* open, such as a lock that it waits for."""
        found = []
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(descriptor.readlink())
        return path in found

    def taken(self) -> float:
        """Milliseconds of a processor that its threads have had so far."""
        found = (task.read_text() for task in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"))
        return sum(int(text.split()[0]) for text in found) / 1e6

    def waits(self) -> bool:
        """Whether none of its threads runs, or would run if a processor had time for it."""
        found = (task.read_text() for task in Path(f"/proc/{self.process.pid}/task").glob("*/stat"))
        return {text.rpartition(")")[2].split()[0] for text in found} == {"S"}

    def rests(self) -> bool:
        """Whether it does nothing for longer than it waits until the node is quiet (`kvmifup.agent.agent.QUIET`)."""
        before = self.taken()
        time.sleep(0.3)
        return self.waits() and self.taken() == before

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it, and wait until it has."""
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(number)
        return self.process.wait(tools.PATIENCE)


def until(true: Callable[[], object], patience: float = 40.0) -> None:
    """Wait for something that takes a moment."""
    end = time.monotonic() + patience
    while not true():
        if time.monotonic() > end:
            logs = sorted(Path("/run").glob("agent.*.log"), key=lambda path: path.stat().st_mtime)
            said = "".join(f"{path}:\n{path.read_text()}" for path in logs)
            pytest.fail(f"what was waited for does not happen; the agents said: {said}")
        time.sleep(0.005)


@contextlib.contextmanager
def running(*argv: str, **more: Any) -> Iterator[Agent]:
    """An agent that ends with the block, if not before."""
    agent = Agent(*argv, **more)
    try:
        yield agent.ready()
    finally:
        agent.end()


@contextlib.contextmanager
def configured(**sections: dict[str, object]) -> Iterator[Path]:
    """An /etc/kvm-ifup that only this test sees, with these sections and nothing else."""
    with namespaces.private_etc():
        for path in sorted(CONFIGURATION.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        CONFIGURATION.mkdir(exist_ok=True)
        configure(**sections)
        yield CONFIGURATION


def configure(**sections: dict[str, object]) -> None:
    """Write the node's configuration anew."""
    lines = []
    for name, section in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    (CONFIGURATION / "config.toml").write_text("\n".join(lines) + "\n")


def through(program: str, *argv: str, environ: Mapping[str, str] | None = None) -> hooks.Result:
    """Run a hook and see that the agent did it."""
    result = hooks.hook(program, *argv, "-v", environ=environ)
    assert result.code == 0, result.err
    assert "without the agent" not in result.err
    return result


def journal(tap: str = "tap0") -> dict[str, Any] | None:
    """The journal's file."""
    try:
        found: dict[str, Any] = json.loads((STATE / f"{tap}.json").read_text())
    except FileNotFoundError:
        return None
    return found


def phase(tap: str = "tap0") -> str | None:
    """The phase that the journal tells, None without one; "…" while a run is at work."""
    found = journal(tap)
    return str("…" if found["pending"] else found["phase"]) if found else None


def wired() -> tuple[set[str], set[str]]:
    """The addresses that the node answers for, and the routes to tap0: what only post may bring."""
    return oracle.proxies(), oracle.routes("tap0")


NOT_WIRED: tuple[set[str], set[str]] = (set(), set())
WIRED = (set(IPS), set(IPS))


def lock_file(tap: str) -> Path:
    """The file of a tap's lock."""
    return RUN_DIR / "lock" / f"tap.{tap}"


@contextlib.contextmanager
def locked(tap: str) -> Iterator[None]:
    """Somebody works on *tap*."""
    lock_file(tap).parent.mkdir(parents=True, exist_ok=True)
    with lock_file(tap).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
