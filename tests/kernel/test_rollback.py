"""Whatever stops a run, the node is as it was: refusals by the kernel, signals, a tap that vanishes."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import pytest

from harness import manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4
from harness.disturb import disturbed, refuse
from harness.hooks import call, call_in_child, check
from harness.nodes import Node
from tests.kernel.staging import NICS, Scene, scenes

WHEN = ("before", "after")


@pytest.mark.sweep
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("scene", scenes(), ids=str)
def test_failing_at_op_k_leaves_the_snapshot_unchanged_for_every_k(uplinked: Node, scene: Scene, when: str) -> None:
    """The error comes before the write or after it; the run directory is part of the snapshot."""
    scene.set_up()
    before = snapshots.snapshot()
    for number in itertools.count(1):
        with disturbed(**{when: refuse(number)}) as written:
            result = call(scene.program, "tap0")
        if result:
            break
        check(result, 71, "web1.example.com/0 (tap0)", "injected")
        assert snapshots.changes(before, snapshots.snapshot()) == [], f"{when} write {number}: {written[number - 1]}"
    assert number > scene.least


@pytest.mark.sweep
@pytest.mark.parametrize("scene", scenes(elsewhere=False), ids=str)
def test_a_signal_between_two_ops_leaves_the_snapshot_unchanged(uplinked: Node, scene: Scene) -> None:
    from kvmifup.core import signals

    scene.set_up()
    before = snapshots.snapshot()

    def stop(at: int, _op: Any) -> None:
        if at == 1:
            signals.catch()
        if at == number:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in itertools.count(1):
        with disturbed(before=stop):
            code = call_in_child(scene.program, "tap0")
        if code == 0:  # it came too late
            break
        assert code == 75
        assert snapshots.changes(before, snapshots.snapshot()) == [], f"before write {number}"
    assert number >= scene.least


@pytest.mark.sweep
@pytest.mark.parametrize("scene", scenes(), ids=str)
def test_when_the_rollback_fails_as_well_gc_completes_it(uplinked: Node, scene: Scene) -> None:
    """From write k on the kernel refuses everything: 70, both causes told, the journal still knows."""
    scene.set_up()
    before = snapshots.snapshot()
    for number in itertools.count(2):

        def refuse_from(at: int, op: Any, first: int = number) -> None:
            if at >= first:
                refuse(at)(at, op)

        with disturbed(before=refuse_from) as written:
            result = call(scene.program, "tap0")
        if result:
            break
        if result.code == 71:  # nothing had been changed that needed undoing
            continue
        check(result, 70, f"injected at write {number}", "could not put back", "`kvm-ifup gc`")
        check(call("kvm-ifup", "gc"), 0)
        assert snapshots.changes(before, snapshots.snapshot()) == [], f"from write {number}: {written[number - 1]}"
    assert number > scene.least


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("scene", "clean"),
    [
        (Scene("bridged"), ("kvm-ifup", "gc")),
        (Scene("routed, table"), ("kvm-ifup", "gc")),
        (Scene("routed, table", earlier="kvm-ifup-pre"), ("kvm-ifdown", "tap0")),
        (Scene("routed"), ("kvm-ifdown", "tap0")),
    ],
    ids=str,
)
def test_deleting_the_tap_half_way_leaves_nothing_behind(uplinked: Node, scene: Scene, clean: tuple[str, str]) -> None:
    """Before op k, for every k; the node is then as one that never had the tap."""
    scene.set_up()
    check(call("kvm-ifdown", "tap0"), 0)
    tools.ip("link del tap0")
    without = snapshots.snapshot()

    def vanish(at: int, _op: Any) -> None:
        if at == number:
            tools.ip("link del tap0")

    for number in itertools.count(1):
        scene.make_tap()
        scene.prepare()
        with disturbed(before=vanish) as written:
            result = call(scene.program, "tap0")
        if len(written) < number:
            break
        assert result.code in (0, 71), result.err
        check(call(*clean), 0)
        assert snapshots.changes(without, snapshots.snapshot()) == [], f"before write {number}: {written[number - 1]}"
    assert number > scene.least


@pytest.mark.sweep
@pytest.mark.parametrize("nic", NICS)
def test_a_tap_that_is_replaced_half_way_keeps_nothing_of_the_dead_nic(uplinked: Node, nic: str) -> None:
    """Tap names are reused at once: the next guest's hook waits for our lock while we still work on its tap."""
    nodes.add_bridge("br0", mtu=9000)
    nodes.add_tap()
    other: dict[str, Any] = {"mode": "routed", "ip": ["192.0.2.99"], "mac": "aa:00:00:00:00:99"}
    manager.write_nic(**other)
    check(call("kvm-ifup-post", "tap0"), 0)
    fresh = snapshots.snapshot()
    check(call("kvm-ifdown", "tap0"), 0)

    def replace(at: int, _op: Any) -> None:
        if at == number:
            tools.ip("link del tap0")
            nodes.add_tap()

    def comparable(found: snapshots.Snapshot) -> snapshots.Snapshot:
        """Without the journal, which tells the two taps apart by their index."""
        return snapshots.Snapshot({line: count for line, count in found.items() if "/state/tap0.json" not in line})

    for number in itertools.count(1):
        tools.ip("link del tap0")
        nodes.add_tap()
        manager.write_nic(**NICS[nic])
        with disturbed(before=replace) as written:
            call("kvm-ifup-post", "tap0")
        if len(written) < number:
            break
        manager.write_nic(**other)
        check(call("kvm-ifup-post", "tap0"), 0)
        differences = snapshots.changes(comparable(fresh), comparable(snapshots.snapshot()))
        assert differences == [], f"before write {number}: {written[number - 1]}"
        check(call("kvm-ifdown", "tap0"), 0)


STALE = [
    "iif tap0 lookup 100",
    "iif tap0 lookup 100 priority 10000",
    "iif tap0 lookup 200 priority 10000 protocol static",
    "iif tap0 lookup 1000 protocol 0",
]


@pytest.mark.pyroute2
@pytest.mark.parametrize(("nic", "rule"), [("bridged", STALE[0]), *(("routed, table", rule) for rule in STALE)])
def test_a_removed_stale_rule_is_put_back_by_a_rollback_but_not_by_ifdown(uplinked: Node, nic: str, rule: str) -> None:
    """A shell script leaves `iif tap0 lookup 100` behind, and it then applies to the next guest on tap0."""
    scene = Scene(nic)
    scene.set_up()
    clean = snapshots.snapshot()
    tools.ip(f"rule add {rule}")
    before = snapshots.snapshot()
    with disturbed(after=refuse(3)):
        check(call("kvm-ifup-post", "tap0"), 71, "injected")
    assert snapshots.changes(before, snapshots.snapshot()) == []
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.rules() == ([(4, 10000, "100"), (6, 10000, "100")] if NICS[nic]["mode"] == "routed" else [])
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(clean, snapshots.snapshot()) == []


def test_a_rule_about_another_device_is_left_alone(uplinked: Node) -> None:
    Scene("routed, table").set_up()
    nodes.taps(["tap1", "tap00"])
    for other in ("iif tap1 lookup 100", "iif tap00 lookup 100", "oif tap0 lookup 100", f"from {GUEST_IP4} lookup 100"):
        tools.ip(f"rule add {other}")
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []
