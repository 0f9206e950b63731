"""No leftovers: what outlives a tap goes when the tap does, whoever wired it and whatever was killed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import agents, guests, hooks, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, IPS
from harness.agents import STATE, WIRED, Agent, phase, through, until, wired
from harness.guests import incoming, rarp, witness
from harness.hooks import check, hook
from harness.nodes import Node

NIC: dict[str, Any] = {"mode": "routed", "link": "100", "ip": [*IPS, "198.51.100.0/29"]}
DIRECTLY = "--run-dir=/run/kvm-ifup"


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


def without_taps(snapshot: snapshots.Snapshot) -> snapshots.Snapshot:
    """What is left when taps come and go: not the files that describe them."""
    return snapshots.Snapshot(
        {line: count for line, count in snapshot.items() if "/nic/" not in line and "/tap/" not in line}
    )


def same(before: snapshots.Snapshot) -> bool:
    """Whether the node is as it was *before*, but for NIC files."""
    return snapshots.changes(without_taps(before), without_taps(snapshots.snapshot())) == []


@pytest.mark.parametrize("after", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("how", ["through the agent", "directly"])
def test_when_a_tap_vanishes_all_that_outlives_it_does(uplinked: Node, agent: Agent, after: str, how: str) -> None:
    """Also a failed migration on its target: QEMU is gone after pre, and nobody calls anything."""
    before = snapshots.snapshot()
    nodes.add_tap()
    manager.write_nic(incoming=True, **NIC)
    check(hook(after, "tap0", *([DIRECTLY] if how == "directly" else [])), 0)
    assert len(oracle.rules()) == 2
    assert (oracle.proxies() != set()) == (after == "kvm-ifup-post")
    tools.ip("link del tap0")
    until(lambda: phase() is None)
    until(lambda: same(before))


def test_after_an_arrival_too(uplinked: Node, agent: Agent) -> None:
    before = snapshots.snapshot()
    guests.arrived(uplinked, agent, **NIC | {"ip": IPS})
    tools.ip("link del tap0")
    until(lambda: same(before))


def test_many_taps_that_vanish_at_once(uplinked: Node, agent: Agent) -> None:
    before = snapshots.snapshot()
    names = [f"tap{number}" for number in range(20)]
    for number, tap in enumerate(names):
        nodes.add_tap(tap)
        manager.write_nic(tap, f"web{number}", mode="routed", link="100", ip=[f"192.0.2.{50 + number}"])
    for process in [hooks.start("kvm-ifup-post", tap) for tap in names]:
        check(hooks.finish(process), 0)
    for tap in names:
        tools.ip(f"link set {tap} group 7")
    tools.ip("link del group 7")
    until(lambda: same(before))


def test_what_another_guest_needs_as_well_stays_until_it_is_gone_too(uplinked: Node, agent: Agent) -> None:
    before = snapshots.snapshot()
    for number, tap in enumerate(("tap0", "tap1")):
        nodes.add_tap(tap)
        manager.write_nic(tap, f"web{number}", mode="routed", ip=[f"192.0.2.{60 + number}", f"2001:db8::{60 + number}"])
        through("kvm-ifup-post", tap)
    tools.ip("link del tap0")
    until(lambda: phase("tap0") is None)
    assert oracle.proxies() == {"192.0.2.61", "2001:db8::61"}
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == "0"
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "1"
    tools.ip("link del tap1")
    until(lambda: same(before))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_port_that_leaves_its_bridge_is_not_taken_for_a_tap_that_vanishes(
    uplinked: Node, agent: Agent, when: str
) -> None:
    """Such as when restarting the node's networking detaches it."""
    nodes.add_bridge("br0")
    guest = incoming(uplinked, agent, mode="bridged", link="br0", ip=None)
    if when == "post":
        guest.send(rarp())
        until(lambda: phase() == "post")
    tools.ip("link set tap0 nomaster")
    witness(uplinked, agent)
    assert phase() == when
    through("kvm-ifup-post", "tap0")
    assert oracle.link("tap0")["master"] == "br0"


def test_a_tap_that_moves_to_another_namespace_is_gone_from_this_one(uplinked: Node, agent: Agent) -> None:
    before = snapshots.snapshot()
    nodes.add_tap()
    manager.write_nic(**NIC)
    through("kvm-ifup-post", "tap0")
    tools.ip(f"link set tap0 netns {uplinked.client.path}")
    until(lambda: same(before))


def test_a_run_that_was_killed_is_undone_and_one_that_runs_is_not(uplinked: Node, agent: Agent) -> None:
    """Both learn; one was killed, and its lock is free."""
    nodes.add_bridge("br0", options="stp_state 1 forward_delay 200")
    for tap, mac in (("tap0", "aa:00:00:00:00:01"), ("tap1", "aa:00:00:00:00:02")):
        uplinked.guest(tap)
        manager.write_nic(tap, tap, mode="bridged", link="br0", incoming=True, mac=mac)
    before = oracle.link("tap0")
    started = {}
    for tap in ("tap1", "tap0"):  # the last one learns for some seconds yet
        started[tap] = hooks.start("kvm-ifup-pre", tap, DIRECTLY)
        until(lambda tap=tap: "master" in oracle.link(tap))  # type: ignore[misc]
    started["tap0"].kill()
    hooks.finish(started["tap0"])
    check(hooks.finish(started["tap1"]), 0)
    until(lambda: phase("tap0") is None)
    after = oracle.link("tap0")
    assert [after.get(key) for key in ("master", "address", "flags")] == [
        before.get(key) for key in ("master", "address", "flags")
    ]
    assert phase("tap1") == "pre"
    assert oracle.link("tap1")["master"] == "br0"


def test_a_run_that_takes_long_and_is_killed_then_is_undone_too(uplinked: Node) -> None:
    """It outlived every look that the agent had at it."""
    with agents.configured(bridged={"forwarding_timeout": 600}), agents.running() as agent:
        nodes.add_bridge("br0", options="stp_state 1 forward_delay 1500")
        uplinked.guest()
        manager.write_nic(mode="bridged", link="br0", incoming=True)
        before = snapshots.snapshot()
        running = hooks.start("kvm-ifup-pre", "tap0", DIRECTLY)
        until(lambda: "master" in oracle.link("tap0"))
        for _ in range(10):
            witness(uplinked, agent)
        assert running.poll() is None
        assert oracle.link("tap0")["master"] == "br0"
        running.kill()
        hooks.finish(running)
        until(lambda: phase("tap0") is None)
        assert snapshots.changes(without_taps(before), without_taps(snapshots.snapshot())) == []
        assert "another run has held" not in agent.said()


def test_what_vanishes_while_no_agent_runs_is_cleared_up_by_the_next(uplinked: Node) -> None:
    with agents.running() as first:
        before = snapshots.snapshot()
        guests.arrived(uplinked, first, **NIC | {"ip": IPS})
        incoming(uplinked, first, "tap1", mode="routed", link="101", ip=["192.0.2.99"], mac="aa:00:00:00:00:99")
        first.end(signal.SIGKILL)
    tools.ip("link del tap0")
    tools.ip("link del tap1")
    assert oracle.proxies() == set(IPS)
    with agents.running():
        until(lambda: same(before))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among others"])
def test_a_tap_that_gets_another_name_is_nobodys_any_more(uplinked: Node, agent: Agent, alone: bool) -> None:
    """Whoever comes with the old name is another guest."""
    before = snapshots.snapshot()
    for name, address in [("tap0", "192.0.2.50"), ("tap1", "192.0.2.51")][: 1 if alone else 2]:
        nodes.add_tap(name)
        manager.write_nic(name, f"web-{name}", mode="routed", link="100", ip=[address])
        through("kvm-ifup-post", name)
    tools.run("sh", "-c", "ip link set tap0 down; ip link set tap0 name old0")
    until(lambda: phase() is None)
    assert oracle.proxies() == (set() if alone else {"192.0.2.51"})
    for name in ("old0", "tap1")[: 1 if alone else 2]:
        tools.ip(f"link del {name}")
    until(lambda: same(before))


def test_a_dead_nic_whose_lock_is_held_is_cleared_up_later(uplinked: Node, agent: Agent) -> None:
    before = snapshots.snapshot()
    guests.arrived(uplinked, agent)
    with agents.locked("tap0"):
        tools.ip("link del tap0")
        until(lambda: agent.holds(agents.lock_file("tap0")))
        assert oracle.proxies() == set(IPS)
    until(lambda: same(before))


@pytest.mark.parametrize("how", ["by hand", "with the run directory's other content"])
def test_a_state_directory_that_was_removed_and_made_anew_is_watched(uplinked: Node, agent: Agent, how: str) -> None:
    """Whoever does so has given up what the journals knew; the next guests are looked after."""
    guests.arrived(uplinked, agent)
    for _ in range(2):
        shutil.rmtree(STATE)
        if how != "by hand":
            for path in ("nic", "tap", "lock"):
                shutil.rmtree(manager.RUN_DIR / path)
        guest = uplinked.guest("tap1")
        manager.write_nic("tap1", mode="routed", ip=["192.0.2.44"], mac="aa:00:00:00:00:44", incoming=True)
        before = agent.armings("tap1")
        check(hook("kvm-ifup-pre", "tap1", DIRECTLY), 0)
        agent.armed("tap1", before + 1)
        guest.send(rarp("aa:00:00:00:00:44"))
        until(lambda: phase("tap1") == "post")
        tools.ip("link del tap1")
        until(lambda: "192.0.2.44" not in oracle.proxies())
        until(lambda: phase("tap1") is None)


def test_an_unreadable_journal_is_set_aside_at_the_start_and_hinders_nothing(
    uplinked: Node,
) -> None:
    nodes.add_tap("tap5")
    STATE.mkdir(parents=True)
    (STATE / "tap5.json").write_text("{")
    with agents.running() as agent:
        agent.heard("tap5", "cannot be read")
        until(lambda: not (STATE / "tap5.json").exists())
        (STATE / "tap6.new").write_text("[]")
        (STATE / "tap6.new").rename(STATE / "tap6.json")
        agent.heard("tap6", "cannot be read")
        guest = incoming(uplinked, agent)
        guest.send(rarp())
        until(lambda: wired() == WIRED)
        through("kvm-ifdown", "tap0")
        assert agent.said().count("tap6: ") == 1


def test_what_cannot_be_put_back_is_said_and_the_agent_lives(uplinked: Node, agent: Agent) -> None:
    """The uplink is gone as well: what was on it went with it."""
    guests.arrived(uplinked, agent)
    tools.ip("link del eth0")
    tools.ip("link del tap0")
    until(lambda: phase() is None)
    assert oracle.proxies() == set()
    check(hook("kvm-ifup", "gc"), 0)
    assert not list(Path(STATE).glob("*.json"))


def test_a_storm_of_devices_loses_nothing(uplinked: Node, agent: Agent) -> None:
    """More events than a netlink socket holds, while the agent does not listen."""
    before = snapshots.snapshot()
    guests.arrived(uplinked, agent)
    agent.send(signal.SIGSTOP)
    try:
        tools.ip("link del tap0")
        script = "\n".join(f"link set eth0 txqueuelen {1000 + number % 2}" for number in range(4000))
        Path("/run/storm").write_text(script)
        tools.run("ip", "-batch", "/run/storm")
        tools.ip("link set eth0 txqueuelen 1000")
    finally:
        agent.send(signal.SIGCONT)
    until(lambda: same(before))
    guest = incoming(uplinked, agent)
    guest.send(rarp())
    until(lambda: wired() == WIRED)
    assert oracle.proxies() == {GUEST_IP4, GUEST_IP6}
