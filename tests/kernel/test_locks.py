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

from tests import netns
from tests.netns import GUEST_IP4, Node, call, check, finish, hook, start


@contextlib.contextmanager
def held(name: str) -> Iterator[None]:
    """The lock *name*, held by somebody else."""
    directory = netns.RUN_DIR / "lock"
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
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4])
    config = netns.configuration(lock_timeout=0.1)
    before = netns.snapshot()
    with held(lock):
        check(call(program, "tap0", config), 75, "tap0", lock, "try again")
        assert netns.changes(before, netns.snapshot()) == []
    check(call(program, "tap0", config), 0)


def test_gc_is_75_too(uplinked: Node) -> None:
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    netns.ip("link del tap0")
    with held("tap.tap0"):
        check(call("kvm-ifup", "gc", netns.configuration(lock_timeout=0)), 75, "tap.tap0")


def test_a_bridged_nic_does_not_wait_for_the_uplinks_lock(node: Node) -> None:
    netns.add_bridge()
    netns.add_tap()
    netns.write_nic(mode="bridged", link="br0")
    with held("uplink"), held("tap.tap1"):
        check(call("kvm-ifup-post", "tap0", netns.configuration(lock_timeout=0)), 0)


def test_the_lock_is_waited_for(uplinked: Node) -> None:
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4])
    with held("tap.tap0"):
        process = start("kvm-ifup-post", "tap0", netns.configuration(lock_timeout=600))
        waits_for_lock(process)
        assert process.poll() is None
    check(finish(process), 0)
    assert netns.routes("tap0") == {GUEST_IP4}


@pytest.mark.parametrize("program", ["kvm-ifup-post", "kvm-ifdown"])
def test_which_locks_it_takes_is_found_out_once_the_tap_is_locked(uplinked: Node, program: str) -> None:
    """While a run waits for its tap, whoever has it may make a routed NIC of it."""
    netns.add_bridge()
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    netns.write_nic(mode="bridged", link="br0")
    journal, later = netns.RUN_DIR / "state/tap0.json", Path("/run/later.json")
    journal.rename(later)
    with held("uplink"):
        with held("tap.tap0"):
            process = start(program, "tap0", netns.configuration(lock_timeout=600))
            waits_for_lock(process)
            later.rename(journal)
        waits_for_lock(process, "uplink")
        assert netns.routes("tap0") == {GUEST_IP4}
    check(finish(process), 0)
    assert netns.routes("tap0") == set()


def waits_for_lock(process: subprocess.Popen[str], name: str = "") -> None:
    """Return once *process* has the lock's file open."""

    def opened() -> Iterator[str]:
        for descriptor in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                yield str(Path(f"/proc/{process.pid}/fd/{descriptor}").readlink())

    while not any(f"/lock/{name}" in path for path in opened()):
        assert process.poll() is None, finish(process)


def test_a_signal_while_waiting_for_a_lock_is_75_and_nothing_changes(uplinked: Node) -> None:
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4])
    before = netns.snapshot()
    with held("tap.tap0"):
        process = start("kvm-ifup-post", "tap0", netns.configuration(lock_timeout=600))
        waits_for_lock(process)
        process.send_signal(signal.SIGTERM)
        check(finish(process), 75, "SIGTERM")
    assert netns.changes(before, netns.snapshot()) == []


def test_sixteen_hooks_at_once_on_different_taps(uplinked: Node) -> None:
    """On a bare bridge and on one uplink: what they share must end as one of them alone would leave it."""
    netns.ip("link add name br0 type bridge")
    netns.ip("link set br0 mtu 9000 up")
    own = netns.link("br0")["address"]
    names = [f"tap{number}" for number in range(16)]
    netns.taps(names)
    for number, name in enumerate(names):
        keys: dict[str, Any] = {"mode": "routed", "ip": [f"192.0.2.{100 + number}"]}
        if number % 2:
            keys = {"mode": "bridged", "link": "br0"}
        netns.write_nic(name, f"web{number}", mac=f"aa:00:00:00:00:{number:02x}", **keys)
    before = netns.snapshot()
    patient = netns.configuration(lock_timeout=600)
    for process in [start("kvm-ifup-pre", name, patient) for name in names]:
        check(finish(process), 0)
    for number, name in enumerate(names):
        link = netns.link(name)
        assert link["address"] == f"fe:00:00:00:00:{number:02x}"
        if number % 2:
            assert (link["master"], link["mtu"]) == ("br0", 9000)
        else:
            assert netns.routes(name) == {f"192.0.2.{100 + number}"}
    assert netns.link("br0")["address"] == own
    assert len(netns.proxies("eth0")) == 8
    for name in names:
        check(call("kvm-ifdown", name), 0)
    # A bare bridge that has once had a port has no link-local address any more: nobody's doing but the kernel's.
    assert [line for line in netns.changes(before, netns.snapshot()) if "br0" not in line] == []


def test_eight_hooks_at_once_on_the_same_tap(uplinked: Node) -> None:
    """Pre, post and post once more, as an agent, a process manager and a person may call them."""
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4], link="100", incoming=True)
    before = netns.snapshot()
    patient = netns.configuration(lock_timeout=600)
    programs = ["kvm-ifup-pre", "kvm-ifup-post"] * 4
    for process in [start(program, "tap0", patient) for program in programs]:
        check(finish(process), 0)
    netns.reap()
    wired = netns.snapshot()
    assert netns.routes("tap0", "100") == {GUEST_IP4}
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert netns.changes(wired, netns.snapshot()) == []
    for process in [start("kvm-ifdown", "tap0", patient) for _ in range(8)]:
        check(finish(process), 0)
    assert netns.changes(before, netns.snapshot()) == []


def test_up_and_down_at_once_end_as_one_of_the_two(uplinked: Node) -> None:
    netns.add_tap()
    netns.write_nic(mode="routed", ip=[GUEST_IP4], link="100")
    down = netns.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    up = netns.snapshot()
    patient = netns.configuration(lock_timeout=600)
    for process in [start(program, "tap0", patient) for program in ["kvm-ifup-post", "kvm-ifdown"] * 4]:
        check(finish(process), 0)
    netns.reap()
    now = netns.snapshot()
    assert netns.changes(down, now) == [] or netns.changes(up, now) == []
