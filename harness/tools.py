"""Programs of the system, run in a clean environment; among them `ip` and `bridge`, which tests judge by."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
# What a process manager hands down; a developer's own INTERFACE must not reach the scripts.
CLEAN: Mapping[str, str] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# Nothing here is expected to take long: this only turns a hang into a failure.
PATIENCE = 180


def run(*argv: str) -> str:
    """The output of a program that has to succeed."""
    done = subprocess.run(argv, env=CLEAN, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr or done.stdout}"
    return done.stdout


def ip(arguments: str) -> str:
    """`ip` with blank-separated *arguments*."""
    return run("ip", *arguments.split())


def ask(arguments: str) -> list[dict[str, Any]]:
    """What `ip -j` (or `bridge -j`, given in full) answers."""
    words = arguments.split()
    found: list[dict[str, Any]] = json.loads(run(*(words if words[0] == "bridge" else ["ip", "-j", *words])) or "[]")
    return [one for one in found if one]  # `ip` prints {} for what its filter left out
