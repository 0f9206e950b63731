"""NICs in mode ext: an administrator's program, told the phase; or any other mode, named in the configuration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import hooks, manager, namespaces, nodes, oracle, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.hooks import check, hook
from harness.nodes import Node
from harness.oracle import link
from harness.snapshots import changes, snapshot

pytestmark = pytest.mark.userns  # whose program is trusted

CONFIGURATION = Path("/etc/kvm-ifup")
CALLS = Path("/run/calls")


@pytest.fixture
def programs(uplinked: Node) -> Iterator[Path]:
    """The directory of the programs, in an /etc/kvm-ifup that only this test sees and starts empty; tap0 is there."""
    nodes.add_tap()
    with namespaces.private_etc():
        shutil.rmtree(CONFIGURATION, ignore_errors=True)
        (CONFIGURATION / "ext").mkdir(parents=True)
        yield CONFIGURATION / "ext"


def put(directory: Path, body: str = "", name: str = "blue") -> Path:
    """A program that notes how it was called, and then does *body*."""
    program = directory / name
    note = 'echo "$KVM_IFUP_PHASE $INTERFACE $MODE $LINK $MAC $IP $INSTANCE $INTERFACE_INDEX"'
    program.write_text(f"#!/bin/sh\n{note} >> {CALLS}\n{body}\n")
    program.chmod(0o755)
    return program


def phases() -> list[str]:
    """The phases it was called with."""
    return [line.split()[0] for line in CALLS.read_text().splitlines()] if CALLS.exists() else []


def test_each_phase_calls_the_program_once(programs: Path) -> None:
    put(programs)
    manager.write_nic(mode="ext", link="blue", ip=[GUEST_IP4], incoming=True)
    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert CALLS.read_text() == f"pre tap0 ext blue {GUEST_MAC} {GUEST_IP4} web1.example.com 0\n"
    for _ in range(2):
        check(hook("kvm-ifup-post", "tap0"), 0)
        assert phases() == ["pre", "post"]
    for _ in range(2):
        check(hook("kvm-ifdown", "tap0"), 0)
        assert phases() == ["pre", "post", "down"]


@pytest.mark.parametrize("how", ["kvm-ifdown", "gc"])
def test_a_slow_program_holds_up_nobody_elses_hook(programs: Path, how: str) -> None:
    """Not the lock of what taps share, either: its guest is not routed, and shares nothing."""
    fifo = Path("/run/fifo")
    os.mkfifo(fifo)
    put(programs, f'[ "$KVM_IFUP_PHASE" != down ] || read -r line < {fifo}')
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="ext", link="blue")
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(hook("kvm-ifup-post", "tap1"), 0)
    if how == "gc":
        tools.ip("link del tap1")
    slow = hooks.start(*(("kvm-ifup", "gc") if how == "gc" else ("kvm-ifdown", "tap1")))
    while "down" not in phases():
        assert slow.poll() is None, hooks.finish(slow)
    at_once = manager.configuration(lock_timeout=0)
    for program in ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"):
        check(hook(program, "tap0", at_once), 0)
    check(hook("kvm-ifdown", "tap1", at_once), 75, "tap.tap1")
    assert slow.poll() is None
    fifo.write_text("go on\n")
    check(hooks.finish(slow), 0)
    assert phases() == ["pre", "post", "down"]


@pytest.fixture
def beside(programs: Path) -> Path:
    """Beside a slow NIC of a guest, on tap0, is a routed one, on tap1; tap2 is another guest's. What lets it go on."""
    fifo = Path("/run/fifo")
    os.mkfifo(fifo)
    put(programs, f'[ "$KVM_IFUP_PHASE" = down ] || read -r line < {fifo}; [ "$line" != fail ]')
    for tap in ("tap1", "tap2"):
        nodes.add_tap(tap)
    manager.write_nic("tap0", mode="ext", link="blue", incoming=True)
    manager.write_nic("tap1", index=1, mode="routed", ip=[GUEST_IP4, GUEST_IP6], incoming=True, mac=GUEST_MAC)
    return fifo


def slowly(program: str = "kvm-ifup-pre", before: int = 0) -> subprocess.Popen[str]:
    """Both NICs of the guest are wired, and the slow one's program is at work."""
    slow = hooks.start(program, "--instance", "web1.example.com", "--json", f"--run-dir={manager.RUN_DIR}")
    while len(phases()) <= before:
        assert slow.poll() is None, hooks.finish(slow)
    return slow


def test_a_slow_nic_beside_a_routed_one_holds_up_no_other_guest(beside: Path) -> None:
    """All of the guest's are wired or none, and yet nobody waits: neither in pre nor in post."""
    at_once = manager.configuration(lock_timeout=0)
    manager.write_nic("tap2", "web2", mode="routed", ip=["192.0.2.77"])
    for number, program in enumerate(("kvm-ifup-pre", "kvm-ifup-post")):
        slow = slowly(program, number)
        check(hook("kvm-ifup-post", "tap2", at_once), 0)
        assert oracle.routes("tap2") == {"192.0.2.77"}
        check(hook("kvm-ifdown", "tap2", at_once), 0)
        assert slow.poll() is None
        beside.write_text("go on\n")
        done = hooks.finish(slow)
        assert done.code == 0, done.err
        assert [outcome["tap"] for outcome in done.outcomes] == ["tap0", "tap1"]
    assert phases() == ["pre", "post"]
    assert oracle.routes("tap1") == oracle.proxies() == {GUEST_IP4, GUEST_IP6}


def test_an_address_that_is_taken_meanwhile_undoes_the_slow_nic(beside: Path) -> None:
    manager.write_nic("tap2", "web2", mode="routed", ip=[GUEST_IP6])
    before = snapshot()
    slow = slowly()
    check(hook("kvm-ifup-post", "tap2"), 0)
    beside.write_text("go on\n")
    refused = hooks.finish(slow)
    assert refused.code == 69
    assert GUEST_IP6 in refused.err
    assert phases() == ["pre", "down"]
    assert oracle.routes("tap2") == {GUEST_IP6}
    check(hook("kvm-ifdown", "tap2"), 0)
    assert changes(before, snapshot()) == []


def test_a_slow_nic_that_fails_leaves_the_routed_one_alone(beside: Path) -> None:
    before = snapshot()
    slow = slowly()
    beside.write_text("fail\n")
    assert hooks.finish(slow).code == 71
    assert changes(before, snapshot()) == []


def test_what_is_refused_at_once_does_not_wait_for_the_slow_nic(beside: Path) -> None:
    """All NICs are planned before the first is changed."""
    manager.write_nic("tap2", "web2", mode="routed", ip=[GUEST_IP4])
    check(hook("kvm-ifup-post", "tap2"), 0)
    check(hook("kvm-ifup-pre", "--instance", "web1.example.com"), 69, GUEST_IP4)
    assert phases() == []


def test_a_fresh_start_runs_both_phases(programs: Path) -> None:
    put(programs)
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-pre", "tap0"), 0)
    assert phases() == ["pre", "post"]


def test_the_program_of_a_vanished_tap_is_told_down(programs: Path) -> None:
    put(programs)
    manager.write_nic(mode="ext", link="blue", incoming=True)
    check(hook("kvm-ifup-pre", "tap0"), 0)
    tools.ip("link del tap0")
    check(hook("kvm-ifup", "gc"), 0)
    assert phases() == ["pre", "down"]


def test_without_its_program_a_tap_is_free_again_when_the_hint_is_followed(programs: Path) -> None:
    """Nobody can undo what the program did; and that is no affair of the next guest on a tap of that name."""
    program = put(programs)
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-post", "tap0"), 0)
    program.unlink()
    result = hook("kvm-ifdown", "tap0")
    check(result, 70, "could not put back", str(program), "then `kvm-ifup gc`")
    assert "or could not put everything back" in hook("kvm-ifup", "check").out
    nodes.add_bridge()
    manager.write_nic(mode="bridged", link="br0")
    for command in (["kvm-ifup-post", "tap0"], ["kvm-ifup", "gc"]):
        check(hook(*command), 70, "could not put back", str(program))
    subprocess.run(result.err.split("`")[-2].split(), check=True)
    check(hook("kvm-ifup-post", "tap0"), 0)
    assert link("tap0")["master"] == "br0"


def test_what_it_says_last_is_in_our_error(programs: Path) -> None:
    put(programs, "echo one >&2; echo out of cables >&2; exit 3")
    manager.write_nic(mode="ext", link="blue")
    before = snapshot()
    check(hook("kvm-ifup-pre", "tap0"), 71, "exit code 3: out of cables")
    assert changes(before, snapshot()) == []
    assert phases() == ["pre"]  # what fails by itself leaves nothing to take down


def test_a_failing_post_takes_down_what_the_same_run_did_in_pre(programs: Path) -> None:
    put(programs, '[ "$KVM_IFUP_PHASE" != post ]')
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-post", "tap0"), 71)
    assert phases() == ["pre", "post", "down"]


def test_a_late_program_is_ended_with_its_children_and_taken_down(programs: Path) -> None:
    put(programs, '[ "$KVM_IFUP_PHASE" = down ] || { sleep 1000 & echo $! > /run/child; wait; }')
    manager.write_nic(mode="ext", link="blue")
    # The time limit is the subject here, not a measurement.
    (CONFIGURATION / "config.toml").write_text("[ext]\ntimeout = 0.5\n")
    check(hook("kvm-ifup-pre", "tap0"), 71, "did not end within 0.5 s")
    assert phases() == ["pre", "down"]
    child = Path("/proc", Path("/run/child").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_program_that_is_not_there_or_cannot_be_executed_is_69(programs: Path) -> None:
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-pre", "tap0"), 69, "no such program: /etc/kvm-ifup/ext/blue")
    put(programs).chmod(0o644)
    check(hook("kvm-ifup-pre", "tap0"), 69, "not an executable file")
    assert phases() == []


@pytest.mark.parametrize("what", ["program", "directory", "link"])
def test_a_program_that_others_can_change_is_78(programs: Path, what: str) -> None:
    program = put(programs)
    if what == "link":
        shutil.move(program, "/run/blue")
        program.symlink_to("/run/blue")
    else:
        (program if what == "program" else programs).chmod(0o777)
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-pre", "tap0"), 78, "not to be trusted")
    assert phases() == []


@pytest.mark.parametrize(
    ("mode", "target"), [("bridged", "br0"), ("routed", "100"), ("routed", None)], ids=["bridged", "table", "routed"]
)
def test_a_network_in_the_configuration_is_wired_in_its_mode(programs: Path, mode: str, target: str | None) -> None:
    nodes.add_bridge()
    lines = [f"mode = {json.dumps(mode)}", *([f"link = {json.dumps(target)}"] if target else [])]
    (CONFIGURATION / "config.toml").write_text("[ext.blue]\n" + "\n".join(lines) + "\n")
    environ = manager.ganeti(MODE="ext", LINK="blue", IP=GUEST_IP4)
    check(hook("kvm-ifup-pre", environ={**environ, "MIGRATION_PHASE": "pre", "ACTION": "up"}), 0)
    assert oracle.routes("tap0") == set()
    assert link("tap0").get("master") == ("br0" if mode == "bridged" else None)
    check(hook("kvm-ifup-post", environ={**environ, "MIGRATION_PHASE": "post", "ACTION": "up"}), 0)
    table = target if mode == "routed" and target else "main"
    assert oracle.routes("tap0", table) == ({GUEST_IP4} if mode == "routed" else set())
    check(hook("kvm-ifdown", environ={**environ, "ACTION": "down"}), 0)
    assert oracle.routes("tap0") == set()
    assert link("tap0").get("master") is None


def test_a_network_without_what_its_mode_needs_is_refused(programs: Path) -> None:
    (CONFIGURATION / "config.toml").write_text('[ext.blue]\nmode = "routed"\n')
    manager.write_nic(mode="ext", link="blue")
    check(hook("kvm-ifup-pre", "tap0"), 65, "ip is missing")
    (CONFIGURATION / "config.toml").write_text('[ext.blue]\nmode = "bridged"\n')
    check(hook("kvm-ifup-pre", "tap0"), 78, "ext.blue.link must be a string")
