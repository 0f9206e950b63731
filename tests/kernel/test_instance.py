"""--instance: all NICs of a guest in one run, all or none."""

from __future__ import annotations

import itertools

import pytest

from harness import disturb, hooks, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6
from harness.hooks import call, check, hook
from harness.nodes import Node

GUEST = "web1.example.com"


@pytest.fixture
def two(uplinked: Node) -> Node:
    """A guest with a bridged NIC on tap0 and a routed one on tap1."""
    nodes.add_bridge(mtu=9000)
    nodes.taps(["tap0", "tap1"])
    manager.write_nic("tap0", GUEST, 0, mode="bridged", link="br0", incoming=True)
    manager.write_nic("tap1", GUEST, 1, mode="routed", link="100", ip=[GUEST_IP4, GUEST_IP6], incoming=True)
    return uplinked


def test_all_nics_are_wired_in_one_run_and_taken_down_in_one(two: Node) -> None:
    before = snapshots.snapshot()
    check(hook("kvm-ifup-pre", "--instance", GUEST), 0)
    assert oracle.link("tap0")["master"] == "br0"
    assert oracle.routes("tap1", "100") == set()
    check(hook("kvm-ifup-post", "--instance", GUEST), 0)
    assert oracle.routes("tap1", "100") == {GUEST_IP4, GUEST_IP6}
    check(hook("kvm-ifdown", "--instance", GUEST), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_when_the_second_nic_is_refused_the_first_is_not_wired(two: Node) -> None:
    tools.ip("link del tap1")
    before = snapshots.snapshot()
    check(hook("kvm-ifup-post", "--instance", GUEST), 69, "web1.example.com/1 (tap1)")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.sweep
@pytest.mark.parametrize("when", ["before", "after"])
def test_when_the_second_nic_fails_at_any_op_the_first_is_rolled_back_as_well(two: Node, when: str) -> None:
    before = snapshots.snapshot()
    for number in itertools.count(1):
        with disturb.disturbed(**{when: disturb.refuse(number)}) as written:
            result = call("kvm-ifup-post", "--instance", GUEST)
        if result:
            break
        check(result, 71, "injected")
        assert snapshots.changes(before, snapshots.snapshot()) == [], f"{when} write {number}: {written[number - 1]}"
    assert number > 20


def outside_journals(before: snapshots.Snapshot, now: snapshots.Snapshot) -> list[str]:
    """What differs, but for the journals: these say who has called."""
    return [one for one in snapshots.changes(before, now) if "/run/kvm-ifup/state/" not in one]


@pytest.mark.sweep
def test_kill_9_at_any_op_then_gc_leaves_each_nic_as_before_or_as_after(two: Node) -> None:
    """The bridged one may have to wait for its bridge, so it is done by itself, before the other."""
    stages = [snapshots.snapshot()]
    for argv in (["tap0"], ["--instance", GUEST]):
        check(call("kvm-ifup-post", *argv), 0)
        stages.append(snapshots.snapshot())
    check(call("kvm-ifdown", "--instance", GUEST), 0)
    reached = []
    for number in itertools.count(1):
        with disturb.disturbed(after=disturb.kill(number)):
            code = hooks.call_in_child("kvm-ifup-post", "--instance", GUEST)
        if code == 0:
            break
        check(call("kvm-ifup", "gc"), 0)
        now = snapshots.snapshot()
        (stage,) = [at for at, one in enumerate(stages) if outside_journals(one, now) == []]
        reached.append(stage)
        if stage:
            missing = {tap for tap, _, _ in call("kvm-ifup-post", "--instance", GUEST, "--json").needed}
            assert missing == ({"tap1"} if stage == 1 else set()), f"after write {number}"
            check(call("kvm-ifdown", "--instance", GUEST), 0)
            assert snapshots.changes(stages[0], snapshots.snapshot()) == [], f"after write {number}"
    assert reached == sorted(reached)
    assert set(reached) == {0, 1, 2}  # only the announcements were left at the end
    assert len(reached) > 20


def test_two_nics_with_one_address_are_refused_before_anything_is_touched(uplinked: Node) -> None:
    nodes.taps(["tap0", "tap1"])
    for index in (0, 1):
        manager.write_nic(f"tap{index}", GUEST, index, mode="routed", ip=[GUEST_IP4], link=f"{100 + index}")
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "--instance", GUEST), 65, "192.0.2.8/32")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, 65) for name in ("nosuch", "../web1.example.com", ".", "a/b", "x\ny")),
        pytest.param("é" * 200, 65, id="too long"),
        pytest.param("", 64, id="empty"),
    ],
)
def test_an_instance_that_is_not_there_or_no_name_is_refused(two: Node, name: str, code: int) -> None:
    before = snapshots.snapshot()
    for program in ("kvm-ifup-pre", "kvm-ifup-post"):
        check(call(program, "--instance", name), code)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_ifdown_of_an_instance_whose_files_are_gone_goes_by_the_journals(two: Node) -> None:
    check(call("kvm-ifup-post", "--instance", GUEST), 0)
    for index in (0, 1):
        (manager.RUN_DIR / f"nic/{GUEST}/{index}.toml").unlink()
        (manager.RUN_DIR / f"tap/tap{index}").unlink()
    check(call("kvm-ifdown", "--instance", GUEST), 0)
    assert "master" not in oracle.link("tap0")
    assert oracle.routes("tap1", "100") == set()
    assert oracle.proxies() == set()


def test_ifdown_of_an_instance_nobody_knows_has_nothing_to_do(two: Node) -> None:
    check(call("kvm-ifdown", "--instance", "nosuch"), 0)


def test_the_shared_sysctls_of_two_nics_in_one_run_go_back_when_both_have_left(uplinked: Node) -> None:
    nodes.taps(["tap0", "tap1"])
    for index in (0, 1):
        manager.write_nic(
            f"tap{index}", GUEST, index, mode="routed", ip=[f"192.0.2.{70 + index}", f"2001:db8::7{index}"]
        )
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "--instance", GUEST), 0)
    check(call("kvm-ifdown", "tap1"), 0)
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "1"
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []
