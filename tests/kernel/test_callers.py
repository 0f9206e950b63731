"""What a caller hands on to a hook without a word: signals that are ignored, and limits."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from harness import agents, manager, namespaces, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.hooks import call, check, finish, hook, start
from harness.manager import RUN_DIR
from harness.nodes import Node
from tests.kernel.test_locks import held

PROGRAMS = Path("/etc/kvm-ifup/ext")


@pytest.fixture
def etc(uplinked: Node) -> Iterator[Node]:
    """An /etc/kvm-ifup that only this test sees, with room for programs; tap0 is there."""
    nodes.add_tap()
    with namespaces.private_etc():
        shutil.rmtree(PROGRAMS.parent, ignore_errors=True)
        PROGRAMS.mkdir(parents=True)
        yield uplinked


def ignoring(*numbers: int) -> Callable[[], None]:
    """For a child that is to start with the signals *numbers* ignored, as a daemon or nohup(1) hands that on."""

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    return ignore


def program(body: str) -> None:
    """The administrator's program "blue"."""
    (PROGRAMS / "blue").write_text(f"#!/bin/sh\n{body}\n")
    (PROGRAMS / "blue").chmod(0o755)


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent", "body"), [(False, "echo out of cables >&2; exit 3"), (True, "kill -9 $$")])
def test_a_program_that_fails_is_noticed_by_who_ignores_children(etc: Node, agent: bool, body: str) -> None:
    """The kernel does not keep the exit code of a child whose parent ignores SIGCHLD, and that is inherited."""
    program(body)
    manager.write_nic(mode="ext", link="blue")
    if agent:
        with agents.running(preexec_fn=ignoring(signal.SIGCHLD)):
            # With -v there would be a second line if it were done without the agent.
            check(hook("kvm-ifup-post", "tap0", "-v"), 71, "/etc/kvm-ifup/ext/blue failed")
    else:
        check(hook("kvm-ifup-post", "tap0", preexec_fn=ignoring(signal.SIGCHLD)), 71, "/etc/kvm-ifup/ext/blue failed")
    assert not list((RUN_DIR / "state").glob("*.json"))


def test_a_program_that_fails_to_undo_is_noticed_as_well(etc: Node) -> None:
    program('[ "$KVM_IFUP_PHASE" != down ]')
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-post", "tap0", preexec_fn=ignoring(signal.SIGCHLD)), 0)
    check(hook("kvm-ifdown", "tap0", preexec_fn=ignoring(signal.SIGCHLD)), 70, "could not put back")
    program("")
    check(hook("kvm-ifup", "gc", preexec_fn=ignoring(signal.SIGCHLD)), 0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_that_the_caller_ignores_ends_no_hook(uplinked: Node, number: signal.Signals) -> None:
    """nohup(1) has SIGHUP ignored, a shell SIGINT for what it starts in the background."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    with held("tap.tap0"):
        waiting = start("kvm-ifup-post", "tap0", preexec_fn=ignoring(number))
        status = Path(f"/proc/{waiting.pid}/status")
        caught = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM} - {number}
        while not all(mask(status, "SigCgt") >> one - 1 & 1 for one in caught):
            assert waiting.poll() is None, finish(waiting)
        os.kill(waiting.pid, number)
    check(finish(waiting), 0)
    assert GUEST_IP4 in oracle.routes("tap0")


def mask(status: Path, name: str) -> int:
    """A set of signals in /proc/PID/status."""
    return next(int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


# --- limits -------------------------------------------------------------------------------------------------

NO_FILE = ("prlimit", "--fsize=0")  # QEMU hands its limits on to its scripts


@pytest.mark.parametrize("what", ["kvm-ifdown tap0", "kvm-ifdown --instance web1.example.com", "kvm-ifup gc"])
def test_what_is_to_be_undone_is_undone_by_who_must_not_write_files(uplinked: Node, what: str) -> None:
    before = snapshots.snapshot_of_kernel()
    nodes.add_tap()
    manager.write_nic(mode="routed", link="100", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    if what.endswith("gc"):
        tools.ip("link del tap0")
    check(hook(*what.split(), within=NO_FILE), 0)
    if not what.endswith("gc"):
        tools.ip("link del tap0")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert not list((RUN_DIR / "state").glob("*.json"))


@pytest.mark.parametrize("phase", ["kvm-ifup-pre", "kvm-ifup-post"])
def test_nothing_is_begun_by_who_must_not_write_files(uplinked: Node, phase: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], incoming=True)
    before = snapshots.snapshot_of_kernel()
    check(hook(phase, "tap0", within=NO_FILE), 71, "cannot write /run/kvm-ifup/state/tap0.json", "File too large")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert not list((RUN_DIR / "state").iterdir())


# --- files of others ------------------------------------------------------------------------------------------

A_NIC = 'tap = "tap5"\nmac = "aa:00:00:35:ac:55"\nmode = "bridged"\nlink = "br0"\n'


@pytest.mark.userns
@pytest.mark.parametrize("put", [os.mkfifo, partial(os.symlink, "/dev/zero")], ids=["fifo", "endless"])
@pytest.mark.parametrize("line", ["nic put web5 0 /run/new.toml", "nic list", "show"])
def test_what_somebody_puts_in_the_place_of_a_nic_file_holds_up_nobody(
    node: Node, put: Callable[[Path], None], line: str
) -> None:
    """A directory that a manager has given to another user is that user's to fill."""
    Path("/run/new.toml").write_text(A_NIC)
    theirs = RUN_DIR / "nic" / "theirs"
    theirs.mkdir(parents=True)
    put(theirs / "0.toml")
    theirs.chmod(0o777)
    result = hook("kvm-ifup", *line.split(), within=("timeout", "-s", "KILL", "20", "prlimit", f"--as={1 << 30}"))
    expected = {"nic put web5 0 /run/new.toml": 0, "nic list": 65, "show": 0}
    assert result.code == expected[line], result
    assert ("not to be trusted" in result.out + result.err) == (line in ("nic list", "show"))
    assert (RUN_DIR / "nic" / "web5" / "0.toml").exists() == line.startswith("nic put")


def test_nothing_of_a_huge_file_is_read_to_put_another(node: Node) -> None:
    Path("/run/new.toml").write_text(A_NIC)
    manager.write_nic("tap1", "huge")
    os.truncate(RUN_DIR / "nic" / "huge" / "0.toml", 1 << 40)
    check(hook("kvm-ifup", "nic", "put", "web5", "0", "/run/new.toml", within=("prlimit", f"--as={1 << 30}")), 0)
