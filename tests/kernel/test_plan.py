"""--plan prints what would be done and does nothing; the real run then does exactly that."""

from __future__ import annotations

import pytest

from harness import disturb, hooks, manager, nodes, snapshots, tools
from harness.addresses import GUEST_IP4
from harness.hooks import call, check, hook
from harness.monitors import monitored
from harness.nodes import Node
from tests.kernel.staging import NICS, Scene, scenes

BRIDGE = "tap0 bridge"


@pytest.mark.parametrize("scene", scenes(), ids=str)
@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
def test_the_plans_needed_ops_are_those_that_the_real_run_does(uplinked: Node, scene: Scene, program: str) -> None:
    scene.set_up()
    if program == "kvm-ifdown":
        check(call(scene.program, "tap0"), 0)
    before = snapshots.snapshot()
    planned = call(program, "--plan", "--json", "tap0")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    with disturb.disturbed() as written:
        done = call(program, "--json", "tap0")
    assert planned.needed == done.needed
    # And the report is not a story: these are the writes. A tap that moves leaves its bridge first, and joins later.
    writes, report = [op.subject() for op in written], [about for _, about, _ in done.needed]
    assert (BRIDGE in writes) == (BRIDGE in report)
    assert [one for one in writes if one != BRIDGE] == [one for one in report if one != BRIDGE]


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
@pytest.mark.parametrize("nic", NICS)
def test_plan_prints_lines_and_changes_nothing(uplinked: Node, nic: str, program: str) -> None:
    """Nor does it take a lock, write into the run directory, or say anything on netlink."""
    Scene(nic).set_up()
    if program == "kvm-ifdown":
        check(call("kvm-ifup-post", "tap0"), 0)
    before = snapshots.snapshot()
    files = sorted(manager.RUN_DIR.rglob("*"))
    with monitored() as monitor:
        result = hook(program, "--plan", "tap0")
        assert monitor.events() == []
    check(result, 0)
    heading, *lines = result.out.splitlines()
    assert heading.startswith(f"web1.example.com/0 (tap0): {NICS[nic]['mode']}, ")
    assert len(lines) >= 4
    assert all(line.startswith("  ") for line in lines)
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert sorted(manager.RUN_DIR.rglob("*")) == files


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("nic", NICS)
def test_the_plan_after_a_nics_death_is_what_the_real_run_does(uplinked: Node, nic: str, program: str) -> None:
    """The same guest is started again on the same tap name: its leftovers look right and are undone all the same."""
    scene = Scene(nic)
    scene.set_up()
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    scene.make_tap()
    before = snapshots.snapshot()
    planned = call(program, "--plan", "--json", "tap0")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    done = call(program, "--json", "tap0")
    assert planned.needed == done.needed


@pytest.mark.parametrize("number", [3, 9, 14])
def test_the_plan_after_a_killed_run_is_what_the_real_run_does(uplinked: Node, number: int) -> None:
    scene = Scene("routed, table")
    scene.set_up()
    with disturb.disturbed(after=disturb.kill(number)):
        assert hooks.call_in_child("kvm-ifup-post", "tap0") < 0
    before = snapshots.snapshot()
    planned = call("kvm-ifup-post", "--plan", "--json", "tap0")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    done = call("kvm-ifup-post", "--json", "tap0")
    assert planned.needed == done.needed


def test_the_plan_of_gc_is_what_gc_does(uplinked: Node) -> None:
    scene = Scene("routed, table")
    scene.set_up()
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    before = snapshots.snapshot()
    planned = call("kvm-ifup", "gc", "--plan", "--json")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert planned.needed == call("kvm-ifup", "gc", "--json").needed != []


def test_a_plan_that_cannot_be_carried_out_fails_as_the_run_would(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4], link="nosuch")
    assert call("kvm-ifup-pre", "--plan", "tap0") == call("kvm-ifup-pre", "tap0")


def test_a_plan_does_not_wait_for_locks(uplinked: Node) -> None:
    from tests.kernel.test_locks import held

    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    with held("tap.tap0"), held("uplink"):
        check(call("kvm-ifup-post", "--plan", "tap0", manager.configuration(lock_timeout=0)), 0)
