"""A run directory that is full or read-only: what is to be undone is undone, and nothing new is begun."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness import agents, disturb, guests, hooks, manager, namespaces, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, IPS
from harness.agents import NOT_WIRED, WIRED, until, wired
from harness.guests import rarp
from harness.hooks import call, call_in_child, check, hook
from harness.manager import RUN_DIR
from harness.nodes import Node

MS_RDONLY, MS_REMOUNT = 1, 32  # linux/mount.h


@pytest.fixture
def small(uplinked: Node) -> Iterator[Node]:
    """A node whose run directory has room for little."""
    RUN_DIR.mkdir(exist_ok=True)
    namespaces.mount("tmpfs", str(RUN_DIR), "tmpfs", data="size=256k,nr_inodes=64,mode=755")
    yield uplinked
    namespaces.unmount(RUN_DIR)


def no_blocks() -> None:
    """Nothing more can be written."""
    with open(RUN_DIR / "filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def no_inodes() -> None:
    """No file can be made."""
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (RUN_DIR / f"filler.{number}").touch()


def read_only() -> None:
    """Nothing can be changed at all."""
    namespaces.mount("tmpfs", str(RUN_DIR), "tmpfs", MS_REMOUNT | MS_RDONLY)


def room_again() -> None:
    """What has filled it is gone."""
    namespaces.mount("tmpfs", str(RUN_DIR), "tmpfs", MS_REMOUNT)
    for filler in RUN_DIR.glob("filler*"):
        filler.unlink()


FULL = pytest.mark.parametrize("fill", [no_blocks, no_inodes], ids=lambda fill: fill.__name__)


def described(**keys: Any) -> None:
    """A routed NIC on tap0."""
    nodes.add_tap()
    manager.write_nic(**({"mode": "routed", "link": "100", "ip": IPS} | keys))


def kept() -> list[str]:
    """The journals, and what is left of some."""
    return sorted(path.name for path in (RUN_DIR / "state").iterdir())


@FULL
def test_kvm_ifdown_works(small: Node, fill: Callable[[], None]) -> None:
    described()
    before = snapshots.snapshot_of_kernel()
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.reap()
    fill()
    check(hook("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert kept() == []


@FULL
def test_gc_works(small: Node, fill: Callable[[], None]) -> None:
    before = snapshots.snapshot_of_kernel()
    described()
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.reap()
    fill()
    tools.ip("link del tap0")
    check(hook("kvm-ifup", "gc"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert kept() == []


def test_read_only_it_is_undone_and_said_that_the_journal_stays(small: Node) -> None:
    described()
    before = snapshots.snapshot_of_kernel()
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.reap()
    read_only()
    check(hook("kvm-ifdown", "tap0"), 71, "tap0.json", "Read-only")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    room_again()
    check(hook("kvm-ifdown", "tap0"), 0)
    assert kept() == []


@FULL
@pytest.mark.parametrize("after", [None, "kvm-ifup-pre"])
@pytest.mark.parametrize("phase", ["kvm-ifup-pre", "kvm-ifup-post"])
def test_nothing_new_is_begun_and_nothing_is_left(
    small: Node, fill: Callable[[], None], after: str | None, phase: str
) -> None:
    described(incoming=True)
    if after:
        check(hook(after, "tap0"), 0)
        if phase == after:
            tools.ip("link set tap0 mtu 1400")
            manager.write_nic(mode="routed", link="101", ip=IPS, incoming=True)
    else:
        check(hook("kvm-ifdown", "tap0"), 0)
    (RUN_DIR / "state").mkdir(exist_ok=True)
    fill()
    before, files = snapshots.snapshot_of_kernel(), kept()
    check(hook(phase, "tap0"), 71, "state/tap0.json", "No space left")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert kept() == files
    room_again()
    check(hook("kvm-ifup-post", "tap0"), 0)


def test_with_room_for_one_of_two_nics_neither_is_begun(small: Node) -> None:
    nodes.add_tap()
    nodes.add_tap("tap1")
    manager.write_nic("tap0", mode="routed", ip=[GUEST_IP4])
    manager.write_nic("tap1", index=1, mode="routed", ip=["192.0.2.9"], mac="aa:00:00:35:ac:02")
    check(hook("kvm-ifdown", "--instance", "web1.example.com"), 0)
    (RUN_DIR / "state").mkdir(exist_ok=True)
    no_blocks()
    filler = RUN_DIR / "filler"
    os.truncate(filler, filler.stat().st_size - 4096)
    before = snapshots.snapshot_of_kernel()
    check(hook("kvm-ifup-post", "--instance", "web1.example.com"), 71, "No space left")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert kept() == []


def test_with_room_for_one_of_two_nics_to_arrive_both_stay_in_pre(small: Node) -> None:
    """What is about to be changed could be written; there is no more room for what is done."""
    for number, mac in enumerate(("aa:00:00:35:ac:01", "aa:00:00:35:ac:02")):
        nodes.add_tap(f"tap{number}")
        ips = [f"192.0.2.{8 + number}", *(f"198.51.{number}.{last}" for last in range(40))]
        manager.write_nic(f"tap{number}", index=number, mode="routed", ip=ips, mac=mac, incoming=True)
    guest = ("--instance", "web1.example.com")
    check(hook("kvm-ifup-pre", *guest), 0)
    before, files = snapshots.snapshot_of_kernel(), kept()
    failed = 0
    for room in range(0, 80 << 10, 4 << 10):
        no_blocks()
        filler = RUN_DIR / "filler"
        os.truncate(filler, filler.stat().st_size - room)
        result = call("kvm-ifup-post", *guest)
        if result.code == 0:
            break
        failed += 1
        check(result, 71, "No space left")
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
        assert {agents.phase("tap0"), agents.phase("tap1")} == {"pre"}
        assert kept() == files
    assert failed > 4
    room_again()
    check(hook("kvm-ifdown", *guest), 0)
    assert kept() == []


@FULL
def test_a_guest_that_has_left_is_withdrawn_and_comes_back(small: Node, fill: Callable[[], None]) -> None:
    client = small.listen()
    with agents.running() as agent:
        guest = guests.arrived(small, agent)
        fill()

        def told() -> bool:
            client.send(guests.garp())
            client.send(guests.advert())
            return wired() == NOT_WIRED

        until(told)
        check(hook("kvm-ifup", "gc"), 0)
        assert wired() == NOT_WIRED
        room_again()
        guest.send(rarp())
        until(lambda: wired() == WIRED)


@FULL
def test_the_next_guest_on_a_dead_ones_tap_finds_nothing_of_it(small: Node, fill: Callable[[], None]) -> None:
    before = snapshots.snapshot_of_kernel()
    described()
    check(hook("kvm-ifup-post", "tap0"), 0)
    hooks.reap()
    tools.ip("link del tap0")
    nodes.add_tap()
    manager.write_nic(instance="web2", mode="routed", ip=[f"192.0.2.{number}" for number in range(100, 160)])
    # Its journal takes more than that of the dead one, which makes room.
    fill()
    check(hook("kvm-ifup-post", "tap0"), 71, "No space left")
    tools.ip("link del tap0")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert kept() == []


@FULL
def test_what_another_script_has_wired_is_taken_away(small: Node, fill: Callable[[], None]) -> None:
    described(link=None, ip=[GUEST_IP4])
    tools.ip("link set tap0 up")
    tools.ip(f"route add {GUEST_IP4} dev tap0")
    tools.ip(f"neigh add proxy {GUEST_IP4} dev eth0")
    check(hook("kvm-ifdown", "tap7"), 0)
    call("kvm-ifup-pre", "tap0", "--plan")
    with agents.locked("tap0"), agents.locked("uplink"):
        pass
    (RUN_DIR / "lock" / "tap.tap0").touch(0o600)
    (RUN_DIR / "lock" / "uplink").touch(0o600)
    fill()
    check(hook("kvm-ifdown", "tap0"), 0)
    assert (oracle.routes("tap0"), oracle.proxies("eth0")) == (set(), set())


@pytest.mark.sweep
@FULL
def test_killed_at_any_write_of_it_gc_finishes(small: Node, fill: Callable[[], None]) -> None:
    nodes.add_tap()
    before = snapshots.snapshot_of_kernel()
    manager.write_nic(mode="routed", link="100", ip=IPS)
    for number in itertools.count(1):
        check(call("kvm-ifup-post", "tap0"), 0)
        fill()
        with disturb.disturbed(after=disturb.kill(number)):
            ended = call_in_child("kvm-ifdown", "tap0")
        check(call("kvm-ifup", "gc"), 0)
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
        assert kept() == []
        room_again()
        if ended == 0:
            break
    assert number > 5


@FULL
def test_a_run_that_was_killed_before_is_cleared_up(small: Node, fill: Callable[[], None]) -> None:
    described(incoming=True)
    check(call("kvm-ifup-pre", "tap0"), 0)
    before = snapshots.snapshot_of_kernel()
    with disturb.disturbed(after=disturb.kill(2)):
        call_in_child("kvm-ifup-post", "tap0")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) != []
    fill()
    for _ in range(2):
        check(call("kvm-ifup", "gc"), 0)
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert "0 changed" in call("kvm-ifup-pre", "tap0", "-v").err
    check(call("kvm-ifdown", "tap0"), 0)
    assert kept() == []
