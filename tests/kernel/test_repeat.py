"""The second run writes nothing; kvm-ifdown gives back what was there."""

from __future__ import annotations

import pytest

from harness import disturb, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, TAP_MAC
from harness.disturb import disturbed
from harness.hooks import call, check, hook
from harness.monitors import monitored
from harness.nodes import Node
from tests.kernel.staging import NICS, Scene, scenes

JOURNAL = manager.RUN_DIR / "state/tap0.json"


def identity() -> tuple[int, int] | None:
    """What changes whenever the journal is written, even with the same content."""
    return (JOURNAL.stat().st_ino, JOURNAL.stat().st_mtime_ns) if JOURNAL.exists() else None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("kvm-ifup-pre", "kvm-ifup-pre"),
        ("kvm-ifup-post", "kvm-ifup-post"),
        ("kvm-ifup-post", "kvm-ifup-pre"),
        ("kvm-ifdown", "kvm-ifdown"),
    ],
)
@pytest.mark.parametrize("nic", NICS)
def test_the_second_run_writes_nothing(uplinked: Node, nic: str, first: str, second: str) -> None:
    """`ip monitor all` is silent, the journal's file is untouched, no sysctl is written."""
    Scene(nic).set_up()
    check(call("kvm-ifup-post", "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    if first == "kvm-ifdown":
        check(call("kvm-ifup-post", "tap0"), 0)
    check(call(first, "tap0"), 0)
    before, journal = snapshots.snapshot(), identity()
    assert (journal is None) == (first == "kvm-ifdown")
    with monitored() as monitor:
        check(hook(second, "tap0"), 0)
        assert monitor.events() == []
    assert identity() == journal
    with disturbed() as written:
        check(call(second, "tap0"), 0)
    assert written == []
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert identity() == journal


@pytest.mark.parametrize("nic", NICS)
def test_pre_after_post_takes_nothing_away_and_the_next_post_is_a_no_op(uplinked: Node, nic: str) -> None:
    Scene(nic).set_up()
    check(call("kvm-ifup-post", "tap0"), 0)
    before = snapshots.snapshot()
    for program in ("kvm-ifup-pre", "kvm-ifup-post"):
        with disturbed() as written:
            check(call(program, "tap0"), 0)
        assert written == []
        assert snapshots.changes(before, snapshots.snapshot()) == []


def test_what_somebody_took_away_is_put_back_by_post_and_given_back_by_ifdown(uplinked: Node) -> None:
    Scene("routed, table").set_up()
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    wired = snapshots.snapshot()
    for damage in (
        f"route del {GUEST_IP4} table 100",
        f"-6 route del {GUEST_IP6} table 100",
        f"neigh del proxy {GUEST_IP4} dev eth0",
        f"neigh del proxy {GUEST_IP6} dev eth0",
        f"neigh del {GUEST_IP4} dev tap0",
        "rule del iif tap0",
        "-6 rule del iif tap0",
        "link set tap0 address 02:00:00:00:00:99",
    ):
        tools.ip(damage)
        check(call("kvm-ifup-post", "tap0"), 0)
        assert snapshots.changes(wired, snapshots.snapshot()) == [], damage
    oracle.sysctl("ipv4/conf/tap0/proxy_arp", 0)
    oracle.sysctl("ipv4/neigh/eth0/proxy_delay", 55)
    tools.ip("link set tap0 down")  # takes routes and neighbours with it
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


# --- kvm-ifdown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("scene", scenes(), ids=str)
def test_ifdown_gives_back_the_snapshot(uplinked: Node, scene: Scene, program: str) -> None:
    Scene(scene.nic, scene.tap).set_up()
    before = snapshots.snapshot()
    scene.prepare()
    check(call(program, "tap0"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("scene", scenes(elsewhere=False), ids=str)
def test_ifdown_tolerates_a_tap_that_has_vanished(uplinked: Node, scene: Scene) -> None:
    scene.set_up()
    check(call("kvm-ifdown", "tap0"), 0)
    tools.ip("link del tap0")
    without = snapshots.snapshot()
    scene.make_tap()
    scene.prepare()
    check(call(scene.program, "tap0"), 0)
    tools.ip("link del tap0")
    for _ in range(2):
        check(call("kvm-ifdown", "tap0"), 0)
        assert snapshots.changes(without, snapshots.snapshot()) == []


def test_ifdown_tolerates_an_uplink_and_a_bridge_that_have_vanished(uplinked: Node) -> None:
    scene = Scene("routed, table")
    scene.set_up()
    before = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del eth0")
    check(call("kvm-ifdown", "tap0"), 0)
    left = [line for line in snapshots.changes(before, snapshots.snapshot()) if "eth0" not in line]
    assert left == []
    manager.write_nic(**NICS["bridged"])
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del br0")
    check(call("kvm-ifdown", "tap0"), 0)
    assert oracle.link("tap0")["address"] != TAP_MAC


@pytest.mark.parametrize("nic", ["routed, table", "routed"])
@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("facts", ["file", "environment"])
def test_without_a_journal_ifdown_unwires_a_nic_that_is_described(
    uplinked: Node, nic: str, alive: bool, facts: str
) -> None:
    """A shell script wired it; nothing that serves other guests is touched."""
    Scene(nic).set_up()
    nodes.add_tap("tap1")
    tools.ip("link set tap0 up")
    tools.ip(f"neigh add proxy {GUEST_IP4} dev eth0")
    tools.ip(f"neigh add proxy {GUEST_IP6} dev eth0")
    table = NICS[nic].get("link", "main")
    before_wiring = [
        f"route add {GUEST_IP4} dev tap0 table {table}",
        f"-6 route add {GUEST_IP6} dev tap0 table {table}",
    ]
    for command in (*before_wiring, "rule add iif tap0 lookup 100", "-6 rule add iif tap0 lookup 100"):
        tools.ip(command)
    tools.ip("neigh add proxy 192.0.2.200 dev eth0")
    tools.ip("rule add iif tap1 lookup 100")
    environ = None
    if facts == "environment":
        (manager.RUN_DIR / "tap/tap0").unlink()
        (manager.RUN_DIR / "nic/web1.example.com/0.toml").unlink()
        link = {"LINK": "100"} if "link" in NICS[nic] else {}
        environ = manager.ganeti(MODE="routed", IP=f"{GUEST_IP4},{GUEST_IP6}", ACTION="down", **link)
    if not alive:
        tools.ip("link del tap0")
    for _ in range(2):
        check(call("kvm-ifdown", "tap0", environ=environ), 0)
        if alive:
            assert oracle.routes("tap0") == set()
        assert oracle.proxies() == {"192.0.2.200"}
        assert oracle.rules() == []
        assert oracle.rules("tap1") != []
        assert not JOURNAL.exists()


@pytest.mark.parametrize("number", range(1, 7))
def test_without_a_journal_ifdown_that_fails_half_way_changes_nothing(uplinked: Node, number: int) -> None:
    Scene("routed, table").set_up()
    tools.ip("link set tap0 up")
    for command in (
        f"neigh add proxy {GUEST_IP4} dev eth0",
        f"neigh add proxy {GUEST_IP6} dev eth0",
        f"route add {GUEST_IP4} dev tap0 table 100 proto static scope link",
        f"-6 route add {GUEST_IP6} dev tap0 table 100 proto static metric 1",
        "rule add iif tap0 lookup 100",
        "-6 rule add iif tap0 lookup 100",
    ):
        tools.ip(command)
    before = snapshots.snapshot()
    with disturbed(after=disturb.refuse(number)):
        check(call("kvm-ifdown", "tap0"), 71, "injected")
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize("alive", [True, False])
def test_with_neither_journal_nor_description_ifdown_has_nothing_to_do(uplinked: Node, alive: bool) -> None:
    if alive:
        nodes.add_tap()
    before = snapshots.snapshot()
    check(hook("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_ifdown_of_one_tap_does_not_stumble_over_another_guests_broken_file(uplinked: Node) -> None:
    """It has nothing to undo, and says so by its exit code."""
    nodes.add_tap()
    manager.write_nic("tap1", "broken", mode="no such mode")
    check(call("kvm-ifdown", "tap0"), 0)


@pytest.mark.sweep
@pytest.mark.parametrize("scene", [Scene("bridged", "elsewhere"), Scene("routed, table")], ids=str)
def test_an_ifdown_that_cannot_undo_everything_is_70_and_can_be_completed(uplinked: Node, scene: Scene) -> None:
    """It goes on past the failure, so only one thing is left."""
    Scene(scene.nic, scene.tap).set_up()
    before = snapshots.snapshot()
    for number in range(1, 40):
        for remedy in (("kvm-ifup", "gc"), ("kvm-ifdown", "tap0")):
            check(call(scene.program, "tap0"), 0)
            with disturbed(before=disturb.refuse(number)) as written:
                result = call("kvm-ifdown", "tap0")
            if result and len(written) >= number:  # it could not leave its bridge first, and was moved all the same
                assert snapshots.changes(before, snapshots.snapshot()) == []
                continue
            if result:
                assert number > 4
                return
            check(result, 70, f"injected at write {number}", "could not put back")
            assert len(written) >= number
            check(call(*remedy), 0)
            assert snapshots.changes(before, snapshots.snapshot()) == [], f"{remedy} after write {number}"
