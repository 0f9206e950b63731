"""How tests run a command of ours, and what it gave back.

As a process: `start` and `finish`, or `hook` for both; `as_manager` with nothing but its contract in the environment.
(`harness.agents.through` also sees that the agent did it.)
In this process: `call`, which saves the start of an interpreter, and `call_in_child`, for a run that is to be killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.tools import CLEAN, PATIENCE, SCRIPTS


@dataclass(frozen=True)
class Result:
    """What a hook gave back."""

    code: int
    out: str
    err: str

    def __bool__(self) -> bool:
        return self.code == 0

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """The parsed output of --json."""
        found: list[dict[str, Any]] = json.loads(self.out)
        return found

    @property
    def needed(self) -> list[tuple[Any, ...]]:
        """Of the output of --json: the ops that (would) write, and the undone ones before them."""
        return [
            (outcome["tap"], op["about"], op["want"])
            for outcome in self.outcomes
            for op in (*outcome["undone"], *outcome["ops"])
            if op["needed"]
        ]


def command(program: str, *argv: str) -> list[str]:
    """A hook as a command line, under the interpreter that runs the tests."""
    return [sys.executable, "-I", str(SCRIPTS / program), *argv]


def start(
    program: str, *argv: str, environ: Mapping[str, str] | None = None, within: Sequence[str] = (), **more: Any
) -> subprocess.Popen[str]:
    """Start a command of ours, with *within* before it (such as `setpriv …`); *more* goes to Popen."""
    settings: dict[str, Any] = {
        "env": {**CLEAN, **(environ or {})},
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": "/",
    }
    return subprocess.Popen([*within, *command(program, *argv)], **{**settings, **more})


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a started hook."""
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out, err)


def hook(
    program: str, *argv: str, environ: Mapping[str, str] | None = None, within: Sequence[str] = (), **more: Any
) -> Result:
    """Run the real script to its end; the rest as for `start`."""
    return finish(start(program, *argv, environ=environ, within=within, **more))


def as_manager(program: str, *argv: str, environ: Mapping[str, str]) -> Result:
    """Run a script as Ganeti's node daemon does: nothing but its contract in the environment, cwd /, umask 077."""
    return hook(program, *argv, env=dict(environ), umask=0o077)


def call(program: str, *argv: str, environ: Mapping[str, str] | None = None) -> Result:
    """Run the same code in this process: pyroute2 is imported once, not once per run. Nothing is repeated later."""
    from kvmifup.commands import main

    out, err = io.StringIO(), io.StringIO()
    code = main.main(program, argv, environ or {}, out, err)
    return Result(code, out.getvalue(), err.getvalue())


def printed(plan: str) -> list[str]:
    """The commands in what `kvm-ifup plan` prints: each ends with the line in which its last quote ends."""
    found: list[str] = []
    for line in plan.splitlines():
        if line.startswith(" " * 11):
            inside = found and found[-1].count("'") % 2
            found[-1:] = [f"{found[-1]}\n{line}"] if inside else [*found[-1:], line.strip()]
    return found


def call_in_child(program: str, *argv: str) -> int:
    """Like `call`, in a forked child that may die on the way: its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 113
        try:
            code = call(program, *argv).code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reap() -> None:
    """End every child of this process that is left: background announcers of hooks that have exited."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := [int(pid) for pid in children.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_for_children() -> None:
    """Wait until every background announcer has come to its own end."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def check(result: Result, code: int, *words: str) -> None:
    """The hook ended with *code*, and said *words*: one line on stderr on failure, silence on success."""
    assert result.code == code, f"{result.code}, not {code}: {result.err}"
    if code == 0:
        assert result.err == ""
        return
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n"), result.err
    for word in words:
        assert word in result.err


def loaded(program: str, *argv: str, environ: Mapping[str, str]) -> set[str]:
    """The modules that a hook loads, which must succeed: those of ours, and the first words of all others' names."""

    def imported(*command: str) -> set[str]:
        python = [sys.executable, "-I", "-X", "importtime", *command]
        told = subprocess.run(python, env={**CLEAN, **environ}, capture_output=True, text=True, check=True).stderr
        names = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}
        return {name if name.startswith("kvmifup.") else name.partition(".")[0] for name in names}

    return imported(str(SCRIPTS / program), *argv) - imported("-c", "pass")
