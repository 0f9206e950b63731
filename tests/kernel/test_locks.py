"""Many hooks at once, and one that holds on for too long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import hooks, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4
from harness.hooks import call, check, finish, hook, start
from harness.nodes import Node


@contextlib.contextmanager
def held(name: str) -> Iterator[None]:
    """The lock *name*, held by somebody else."""
    directory = manager.RUN_DIR / "lock"
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
@pytest.mark.parametrize("lock", ["tap.tap0", "uplink"])
def test_a_held_lock_is_75_and_nothing_changes(uplinked: Node, program: str, lock: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    config = manager.configuration(lock_timeout=0.1)
    before = snapshots.snapshot()
    with held(lock):
        check(call(program, "tap0", config), 75, "tap0", lock, "try again")
        assert snapshots.changes(before, snapshots.snapshot()) == []
    check(call(program, "tap0", config), 0)


def test_gc_is_75_too(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    with held("tap.tap0"):
        check(call("kvm-ifup", "gc", manager.configuration(lock_timeout=0)), 75, "tap.tap0")


def test_a_bridged_nic_does_not_wait_for_the_uplinks_lock(node: Node) -> None:
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br0")
    with held("uplink"), held("tap.tap1"):
        check(call("kvm-ifup-post", "tap0", manager.configuration(lock_timeout=0)), 0)


def test_the_lock_is_waited_for(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    with held("tap.tap0"):
        process = start("kvm-ifup-post", "tap0", manager.configuration(lock_timeout=600))
        waits_for_lock(process)
        assert process.poll() is None
    check(finish(process), 0)
    assert oracle.routes("tap0") == {GUEST_IP4}


@pytest.mark.parametrize("program", ["kvm-ifup-post", "kvm-ifdown"])
def test_which_locks_it_takes_is_found_out_once_the_tap_is_locked(uplinked: Node, program: str) -> None:
    """While a run waits for its tap, whoever has it may make a routed NIC of it."""
    nodes.add_bridge()
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    manager.write_nic(mode="bridged", link="br0")
    journal, later = manager.RUN_DIR / "state/tap0.json", Path("/run/later.json")
    journal.rename(later)
    with held("uplink"):
        with held("tap.tap0"):
            process = start(program, "tap0", manager.configuration(lock_timeout=600))
            waits_for_lock(process)
            later.rename(journal)
        waits_for_lock(process, "uplink")
        assert oracle.routes("tap0") == {GUEST_IP4}
    check(finish(process), 0)
    assert oracle.routes("tap0") == set()


def waits_for_lock(process: subprocess.Popen[str], name: str = "") -> None:
    """Return once *process* has the lock's file open."""

    def opened() -> Iterator[str]:
        for descriptor in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                yield str(Path(f"/proc/{process.pid}/fd/{descriptor}").readlink())

    while not any(f"/lock/{name}" in path for path in opened()):
        assert process.poll() is None, finish(process)


def test_a_signal_while_waiting_for_a_lock_is_75_and_nothing_changes(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    before = snapshots.snapshot()
    with held("tap.tap0"):
        process = start("kvm-ifup-post", "tap0", manager.configuration(lock_timeout=600))
        waits_for_lock(process)
        process.send_signal(signal.SIGTERM)
        check(finish(process), 75, "SIGTERM")
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_sixteen_hooks_at_once_on_different_taps(uplinked: Node) -> None:
    """On a bare bridge and on one uplink: what they share must end as one of them alone would leave it."""
    tools.ip("link add name br0 type bridge")
    tools.ip("link set br0 mtu 9000 up")
    own = oracle.link("br0")["address"]
    names = [f"tap{number}" for number in range(16)]
    nodes.taps(names)
    for number, name in enumerate(names):
        keys: dict[str, Any] = {"mode": "routed", "ip": [f"192.0.2.{100 + number}"]}
        if number % 2:
            keys = {"mode": "bridged", "link": "br0"}
        manager.write_nic(name, f"web{number}", mac=f"aa:00:00:00:00:{number:02x}", **keys)
    before = snapshots.snapshot()
    patient = manager.configuration(lock_timeout=600)
    for process in [start("kvm-ifup-pre", name, patient) for name in names]:
        check(finish(process), 0)
    for number, name in enumerate(names):
        link = oracle.link(name)
        assert link["address"] == f"fe:00:00:00:00:{number:02x}"
        if number % 2:
            assert (link["master"], link["mtu"]) == ("br0", 9000)
        else:
            assert oracle.routes(name) == {f"192.0.2.{100 + number}"}
    assert oracle.link("br0")["address"] == own
    assert len(oracle.proxies("eth0")) == 8
    for name in names:
        check(call("kvm-ifdown", name), 0)
    # A bare bridge that has once had a port has no link-local address any more: nobody's doing but the kernel's.
    assert [line for line in snapshots.changes(before, snapshots.snapshot()) if "br0" not in line] == []


def test_eight_hooks_at_once_on_the_same_tap(uplinked: Node) -> None:
    """Pre, post and post once more, as an agent, a process manager and a person may call them."""
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], link="100", incoming=True)
    before = snapshots.snapshot()
    patient = manager.configuration(lock_timeout=600)
    programs = ["kvm-ifup-pre", "kvm-ifup-post"] * 4
    for process in [start(program, "tap0", patient) for program in programs]:
        check(finish(process), 0)
    hooks.reap()
    wired = snapshots.snapshot()
    assert oracle.routes("tap0", "100") == {GUEST_IP4}
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    for process in [start("kvm-ifdown", "tap0", patient) for _ in range(8)]:
        check(finish(process), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_up_and_down_at_once_end_as_one_of_the_two(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], link="100")
    down = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    up = snapshots.snapshot()
    patient = manager.configuration(lock_timeout=600)
    for process in [start(program, "tap0", patient) for program in ["kvm-ifup-post", "kvm-ifdown"] * 4]:
        check(finish(process), 0)
    hooks.reap()
    now = snapshots.snapshot()
    assert snapshots.changes(down, now) == [] or snapshots.changes(up, now) == []
