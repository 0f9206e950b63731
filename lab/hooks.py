"""The product as the lab uses it: NIC files in a node's /run, and the scripts as QEMU and a manager run them."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.addresses import GUEST_EUI64, GUEST_IP4, GUEST_IP6, GUEST_MAC
from lab.errors import LabError
from lab.nodes import Mode, Namespace

INSTANCE = "web1.example.com"
TAP = "tap0"

Hook = Literal["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"]
SCRIPTS = ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown", "kvm-ifup", "kvm-ifupd")


@dataclass(frozen=True)
class Hooks:
    """Where the scripts are."""

    directory: Path

    def path(self, script: str) -> Path:
        """A script's file, such as QEMU takes for `script=`."""
        return self.directory / script

    def run(self, hook: Hook, node: Namespace) -> None:
        """Runs one script for the guest's tap as a process manager does; LabError with its words on failure."""
        node.run(str(self.path(hook)), TAP)


def hooks(directory: Path, interpreter: Path | None, scratch: Path) -> Hooks:
    """The scripts in `directory`; with `interpreter`, wrappers in `scratch` that run them with that Python.

    Raises LabError when a script is not there or cannot be executed.
    """
    for name in SCRIPTS:
        if not (directory / name).is_file():
            raise LabError(f"there is no {name} in {directory}", "name the right directory with --scripts")
    if interpreter is None:
        return Hooks(directory.resolve())
    scratch.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        script = directory.resolve() / name
        # -I or -IS, as in the script's own first line: nothing from the caller's environment or directory is imported.
        options = script.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
        command = shlex.join([str(interpreter), *options, str(script)])
        (scratch / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (scratch / name).chmod(0o755)
    return Hooks(scratch)


def write_nic(node: Namespace, mode: Mode, incoming: bool) -> None:
    """Describes the guest's NIC to the scripts on `node`, in its own /run, as a process manager does at start."""
    ips = [GUEST_IP4, GUEST_IP6, *([GUEST_EUI64] if mode == "filtered" else [])]
    lines = [f'tap = "{TAP}"', f'mac = "{GUEST_MAC}"', f'mode = "{"routed" if mode == "routed" else "bridged"}"']
    lines += ['link = "br0"'] if mode != "routed" else []
    lines += [f"ip = {json.dumps(ips)}"] if mode != "bridged" else []
    lines += ['filter = "address"'] if mode == "filtered" else []
    lines += ["incoming = true"] if incoming else []
    run = "/run/kvm-ifup"
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        node.run("install", "-d", "-m", "0755", run, f"{run}/nic", f"{run}/nic/{INSTANCE}", f"{run}/tap")
        node.run("install", "-m", "0600", file.name, f"{run}/nic/{INSTANCE}/0.toml")
    node.run("ln", "-sfn", f"../nic/{INSTANCE}/0.toml", f"{run}/tap/{TAP}")
