"""Machines on which the documentation's examples run as printed: namespaces of their own, nothing installed.

A machine has its own network, process ids, /run, /sys and /proc, and an /etc and a /usr/sbin that are the
host's with something laid over them: what is written to /etc is gone with the machine, and /usr/sbin has the
commands of this checkout. All its processes, daemons too, end when the machine does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a login as root has; a developer's own INTERFACE must not reach the commands.
CLEAN: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
}
# Nothing here is expected to take long: this only turns a hang into a failure.
PATIENCE = 120

TOOLS = {
    "bash": "bash",
    "bridge": "iproute2",
    "ip": "iproute2",
    "man": "man-db",
    "mandoc": "mandoc",
    "nsenter": "util-linux",
    "qemu-system-x86_64": "qemu-system-x86",
    "scdoc": "scdoc",
    "setpriv": "util-linux",
    "socat": "socat",
    "sysctl": "procps",
    "unshare": "util-linux",
}

_SETUP = """
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/sbin /mnt/etc /mnt/work
ln -s "$0"/scripts/* /mnt/sbin
mount -t overlay -o lowerdir=/mnt/sbin:/usr/sbin overlay /usr/sbin
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/etc,workdir=/mnt/work overlay /etc
ip link set lo up
echo ready
sleep infinity & wait  # as its first process, the shell also reaps the daemons that end
"""


def require(tools: Mapping[str, str]) -> None:
    """Fail, and never skip, when a program that is needed is missing."""
    missing = [package for tool, package in tools.items() if not shutil.which(tool, path=CLEAN["PATH"])]
    if missing:
        pytest.fail(f"apt-get install {' '.join(sorted(set(missing)))}", pytrace=False)


@dataclass(frozen=True)
class Machine:
    """The namespaces of the process *pid*."""

    pid: int

    def enter(self, *argv: str) -> list[str]:
        """*argv* as a command that runs on the machine."""
        namespaces = ("--net", "--mount", "--pid", "--uts", "--root")
        return ["nsenter", f"--target={self.pid}", *namespaces, f"--wdns={ROOT}", *argv]

    def attempt(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run *script* as a person would type it in the checkout, up to the first line that fails."""
        return subprocess.run(
            self.enter("sh", "-e", "-c", script),
            env=CLEAN,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Like `attempt`, for a script that has to succeed."""
        done = self.attempt(script)
        assert done.returncode == 0, f"{script}\nexited with {done.returncode}: {done.stderr or done.stdout}"
        return done

    def ask(self, command: str) -> list[dict[str, Any]]:
        """What `ip -j ...` or `bridge -j ...` answers."""
        found: list[dict[str, Any]] = json.loads(self.run(command).stdout or "[]")
        return [one for one in found if one]

    def ports(self, bridge: str = "br0") -> dict[str, str]:
        """The ports of *bridge*, and the state that each is in."""
        return {one["ifname"]: one["state"] for one in self.ask("bridge -j link") if one.get("master") == bridge}

    def routes(self, device: str) -> set[str]:
        """The destinations that somebody has routed to *device*, in whatever table."""
        return {
            route["dst"]
            for family in (4, 6)
            for route in self.ask(f"ip -j -{family} route show table all dev {device}")
            if route.get("protocol") != "kernel"
        }

    def proxies(self) -> set[tuple[str, str]]:
        """(device, address) of all that the machine answers for."""
        return {(one["dev"], one["dst"]) for one in self.ask("ip -j neigh show proxy")}

    def rules(self, tap: str) -> list[str]:
        """The tables that policy rules send the traffic from *tap* to."""
        return [
            rule["table"] for family in (4, 6) for rule in self.ask(f"ip -j -{family} rule") if rule.get("iif") == tap
        ]

    def has(self, device: str) -> bool:
        """Whether there is such a device."""
        return device in [one["ifname"] for one in self.ask("ip -j link")]

    def end(self, pidfile: str) -> None:
        """Kill, as the kernel or a person in a hurry would, the process whose number is in *pidfile*."""
        self.run(f"kill -KILL $(cat {pidfile}); while kill -0 $(cat {pidfile}) 2>/dev/null; do sleep 0.05; done")


@contextlib.contextmanager
def machine(setup: str = _SETUP, *arguments: str) -> Iterator[Machine]:
    """A fresh machine, for as long as the block takes; *setup* makes it, and has the checkout and *arguments*."""
    require(TOOLS)
    if os.geteuid() != 0:
        pytest.fail("the examples are for root, and so is making the machine they run on", pytrace=False)
    # Whatever ends us, the kernel ends the holder, and with the first of its process ids all the others.
    argv = "setpriv --pdeathsig=KILL unshare --net --mount --pid --uts --fork --kill-child=KILL --propagation=private"
    holder = subprocess.Popen(
        [*argv.split(), "sh", "-e", "-c", setup, str(ROOT), *arguments],
        env=CLEAN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "ready\n":
            pytest.fail(f"cannot make a machine: {holder.stderr.read()}", pytrace=False)
        (child,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Machine(int(child))
    finally:
        holder.kill()
        holder.communicate()


def cable(one: Machine, other: Machine, device: str = "eth0") -> None:
    """Connect two machines by a new *device* on each."""
    # Inside the network namespace alone: the process ids are those that we see.
    link = f"ip link add {device} type veth peer name {device} netns {other.pid}"
    subprocess.run(["nsenter", f"--net=/proc/{one.pid}/ns/net", *link.split()], env=CLEAN, check=True)
    for each in (one, other):
        each.run(f"ip link set {device} up")
