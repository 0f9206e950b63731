"""kill -9 at any instant, then gc or the next hook: the node is as before or as after, never between."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from typing import Any

import pytest

from harness import hooks, manager, monitors, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.disturb import disturbed, kill
from harness.hooks import call, call_in_child, check
from harness.nodes import Node
from tests.kernel.staging import NICS, Scene

SCENES = [
    Scene("bridged", "elsewhere"),
    Scene("routed, table"),
    Scene("routed, table", earlier="kvm-ifup-pre"),
]


def killed_after(number: int) -> contextlib.AbstractContextManager[list[Any]]:
    """A run dies after write *number*, which is before the next one too; 0 is before the first."""
    return disturbed(after=kill(number)) if number else disturbed(before=kill(1))


def as_one_of(now: snapshots.Snapshot, *whole: snapshots.Snapshot) -> bool:
    """Whether the node is in one of the states that are allowed."""
    return any(snapshots.changes(one, now) == [] for one in whole)


@pytest.mark.sweep
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_after_kill_9_at_any_op_gc_or_any_hook_makes_the_node_whole(uplinked: Node, scene: Scene) -> None:
    scene.set_up()
    before = snapshots.snapshot()
    check(call(scene.program, "tap0"), 0)
    after = snapshots.snapshot()
    check(call("kvm-ifdown", "tap0"), 0)
    base = snapshots.snapshot()
    scene.prepare()
    remedies = {
        ("kvm-ifup", "gc"): (before, after),
        (scene.program, "tap0"): (after,),
        ("kvm-ifdown", "tap0"): (base,),
    }
    for number in itertools.count(0):
        for remedy, allowed in remedies.items():
            with killed_after(number):
                code = call_in_child(scene.program, "tap0")
            if code == 0:
                assert number >= scene.least
                return
            assert code == -signal.SIGKILL
            check(call(*remedy), 0)
            now = snapshots.snapshot()
            assert as_one_of(now, *allowed), f"after write {number}, {remedy}: {snapshots.changes(allowed[0], now)}"
            check(call("kvm-ifdown", "tap0"), 0)
            scene.prepare()


@pytest.mark.sweep
@pytest.mark.parametrize("nic", ["bridged", "routed, table"])
@pytest.mark.parametrize("remedy", [("kvm-ifup", "gc"), ("kvm-ifup-post", "tap0"), ("kvm-ifdown", "tap0")])
def test_after_kill_9_in_ifdown_at_any_op_the_node_is_made_whole(
    uplinked: Node, nic: str, remedy: tuple[str, str]
) -> None:
    scene = Scene(nic, "elsewhere")
    scene.set_up()
    base = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    wired = snapshots.snapshot()
    allowed = {"kvm-ifup": (base, wired), "kvm-ifup-post": (wired,), "kvm-ifdown": (base,)}[remedy[0]]
    for number in itertools.count(0):
        with killed_after(number):
            code = call_in_child("kvm-ifdown", "tap0")
        if code == 0:
            assert number >= 4
            return
        assert code == -signal.SIGKILL
        check(call(*remedy), 0)
        now = snapshots.snapshot()
        assert as_one_of(now, *allowed), f"after write {number}: {snapshots.changes(allowed[0], now)}"
        check(call("kvm-ifup-post", "tap0"), 0)


@pytest.mark.sweep
@pytest.mark.parametrize("scene", [Scene("bridged"), Scene("routed", earlier="kvm-ifup-pre")], ids=str)
@pytest.mark.parametrize("program", ["kvm-ifup-post", "kvm-ifdown"])
def test_after_kill_9_around_every_step_of_the_journal_the_node_is_made_whole(
    uplinked: Node, scene: Scene, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after each write, sync, rename and removal of a journal's file."""
    scene.set_up()
    states = {"kvm-ifup-post": snapshots.snapshot()}
    check(call("kvm-ifup-post", "tap0"), 0)
    wired = states["kvm-ifdown"] = snapshots.snapshot()
    check(call("kvm-ifdown", "tap0"), 0)
    base = snapshots.snapshot()
    allowed = (states["kvm-ifup-post"], wired) if program == "kvm-ifup-post" else (base, wired)
    steps = itertools.count(1)
    calls = {name: getattr(os, name) for name in ("open", "fsync", "rename", "unlink")}

    def dying(name: str) -> Any:
        def step(*arguments: Any, **more: Any) -> Any:
            die_at(next(steps))
            result = calls[name](*arguments, **more)
            die_at(next(steps))
            return result

        return step

    def die_at(step: int) -> None:
        if step == number:
            os.kill(os.getpid(), signal.SIGKILL)

    for number in itertools.count(1):
        if program == "kvm-ifdown":
            check(call("kvm-ifup-post", "tap0"), 0)
        else:
            scene.prepare()
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, dying(name))
            code = call_in_child(program, "tap0")
        if code == 0:
            assert number > 10
            return
        assert code == -signal.SIGKILL
        check(call("kvm-ifup", "gc"), 0)
        now = snapshots.Snapshot({line: n for line, n in snapshots.snapshot().items() if ".new: " not in line})
        assert as_one_of(now, *allowed), f"step {number}: {snapshots.changes(allowed[0], now)}"
        check(call("kvm-ifdown", "tap0"), 0)
        for left in (manager.RUN_DIR / "state").iterdir():  # half a temporary file, which the next save overwrites
            assert left.suffix == ".new"
            left.unlink()


def test_after_kill_9_and_the_death_of_the_tap_gc_leaves_nothing(uplinked: Node) -> None:
    """QEMU dies together with its hook: rules, proxies and the uplink's sysctls are what is left."""
    scene = Scene("routed, table")
    scene.set_up()
    tools.ip("link del tap0")
    without = snapshots.snapshot()
    for number in itertools.count(0):
        scene.make_tap()
        with killed_after(number):
            code = call_in_child("kvm-ifup-post", "tap0")
        tools.ip("link del tap0")
        check(call("kvm-ifup", "gc"), 0)
        assert snapshots.changes(without, snapshots.snapshot()) == [], f"after write {number}"
        if code == 0:
            return


def test_a_run_that_was_really_killed_is_undone_by_the_next_one(uplinked: Node) -> None:
    """The real script, killed while it waits for a port to forward."""
    nodes.add_bridge(options="stp_state 1 forward_delay 1500")
    uplinked.guest()
    manager.write_nic(mode="bridged", link="br0", incoming=True)
    config = manager.configuration(bridged={"forwarding_timeout": 600})
    before = snapshots.snapshot()
    process = hooks.start("kvm-ifup-pre", "tap0", config)
    while "master" not in oracle.link("tap0"):
        assert process.poll() is None, hooks.finish(process)
    process.kill()
    assert hooks.finish(process).code == -signal.SIGKILL
    check(hooks.hook("kvm-ifup", "gc"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


# --- a dead NIC's journal -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", NICS)
@pytest.mark.parametrize("before", NICS)
@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
def test_a_dead_nics_journal_is_undone_first_by_the_next_run_on_that_tap_name(
    uplinked: Node, program: str, before: str, after: str
) -> None:
    """The tap was deleted and made again; the next guest is wired as if nobody had been there."""
    other: dict[str, Any] = {"mac": "aa:00:00:00:00:99", "instance": "web2"}
    if NICS[after]["mode"] == "routed":
        other |= {"ip": ["192.0.2.99", "2001:db8::99"]}

    def journal() -> str:
        return (manager.RUN_DIR / "state/tap0.json").read_text()

    scene = Scene(after, program=program, more=other)
    scene.set_up()
    clean = snapshots.snapshot()
    check(call(program, "tap0"), 0)
    alone = snapshots.snapshot()
    check(call("kvm-ifdown", "tap0"), 0)
    # The same once more, but behind a guest that died.
    manager.write_nic(**NICS[before])
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    scene.make_tap()
    manager.write_nic(**{"incoming": True, **NICS[after], **other})
    (manager.RUN_DIR / "nic/web1.example.com/0.toml").unlink()
    check(call(program, "tap0"), 0)

    def without_journal(found: snapshots.Snapshot) -> snapshots.Snapshot:
        return snapshots.Snapshot({line: count for line, count in found.items() if "/state/tap0.json" not in line})

    assert snapshots.changes(without_journal(alone), without_journal(snapshots.snapshot())) == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(clean, snapshots.snapshot()) == []


@pytest.mark.parametrize("after", NICS)
@pytest.mark.parametrize("before", NICS)
def test_a_live_tap_described_anew_ends_as_if_it_had_always_been_so(uplinked: Node, before: str, after: str) -> None:
    """The guest was given another network while it ran; ifdown gives back what was there before either."""
    scene = Scene(after)
    scene.set_up()
    clean = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    alone = snapshots.snapshot()
    check(call("kvm-ifdown", "tap0"), 0)
    more = {"ip": ["192.0.2.77", "2001:db8::77"]} if NICS[before]["mode"] == "routed" else {}
    manager.write_nic(**{**NICS[before], **more})
    check(call("kvm-ifup-post", "tap0"), 0)
    manager.write_nic(**{"incoming": True, **NICS[after]})
    check(call("kvm-ifup-post", "tap0"), 0)

    def comparable(found: snapshots.Snapshot) -> snapshots.Snapshot:
        """The order of entries in the journal may differ. A tap gets its link-local address when it is opened."""
        differ = ("/state/tap0.json", "fe80::")
        return snapshots.Snapshot(
            {line: count for line, count in found.items() if not any(one in line for one in differ)}
        )

    assert snapshots.changes(comparable(alone), comparable(snapshots.snapshot())) == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(clean, snapshots.snapshot()) == []


def test_gc_leaves_what_lives_alone(uplinked: Node) -> None:
    nodes.taps(["tap0", "tap1"])
    manager.write_nic("tap0", "web1", mode="routed", ip=[GUEST_IP4])
    manager.write_nic("tap1", "web2", mode="routed", ip=[GUEST_IP6], incoming=True)
    check(call("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifup-pre", "tap1"), 0)
    before = snapshots.snapshot()
    with monitors.monitored() as monitor:
        check(hooks.hook("kvm-ifup", "gc"), 0)
        assert monitor.events() == []
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_an_unreadable_journal_is_70_with_gc_as_the_hint_and_gc_sets_it_aside(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    state = manager.RUN_DIR / "state"
    state.mkdir(parents=True)
    for content in ("", "{", "[]", '{"version": 2}', "null", '{"version": 1, "nic": {}}', "\udc80", "[" * 100000):
        (state / "tap0.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        before = snapshots.snapshot()
        for program in ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"):
            check(call(program, "tap0"), 70, "tap0.json", "`kvm-ifup gc`")
            assert snapshots.changes(before, snapshots.snapshot()) == []
        check(call("kvm-ifup", "gc"), 0)
        assert not (state / "tap0.json").exists()
        check(call("kvm-ifup-post", "tap0"), 0)
        check(call("kvm-ifdown", "tap0"), 0)
