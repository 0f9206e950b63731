"""What a person would do instead of calling a hook: the commands that `kvm-ifup plan` prints, as shell scripts."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import hooks

PLACE = Path("/run/by-hand")
BATCHED = ("ip", "bridge")  # these read many commands from one file


def commands(tap: str, environ: Mapping[str, str]) -> list[list[str]]:
    """The commands of a plan, each as its words."""
    planned = hooks.hook("kvm-ifup", "plan", "post", tap, "--json", environ=environ)
    assert planned.code == 0, planned.err
    (outcome,) = planned.outcomes
    lines = [line for op in outcome["ops"] for line in (op["command"] or "").split("; ") if line]
    return [shlex.split(line) for line in lines]


def script(lines: Sequence[str]) -> str:
    """The path of a shell script of *lines*, which stops at the first failure."""
    PLACE.mkdir(exist_ok=True)
    path = PLACE / "script"
    path.write_text("\n".join(["#!/bin/sh -e", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def one_by_one(found: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a script that runs each command for itself."""
    return [shlex.join(words) for words in found]


def program(words: Sequence[str]) -> tuple[str, ...]:
    """The program of a command, with the options before what it is to do: ("ip", "-6")."""
    return (words[0], *itertools.takewhile(lambda word: word.startswith("-"), words[1:]))


def in_batches(found: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a script that starts a program once for all commands in a row that it can take together."""
    lines: list[str] = []
    for start, group in itertools.groupby(found, key=program):
        rest = [shlex.join(words[len(start) :]) for words in group]
        if start[0] in BATCHED:
            lines += [f"{shlex.join(start)} -batch - <<'END'", *rest, "END"]
        elif start[0] == "sysctl":
            lines.append(f"{shlex.join(start)} {' '.join(rest)}")
        else:
            lines += [f"{shlex.join(start)} {one}" for one in rest]
    return lines
