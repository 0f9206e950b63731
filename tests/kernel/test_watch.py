"""`kvm-ifup watch` shows a migration as it happens, and the agent counts it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from harness import hooks, manager, nodes, tools, wire
from harness.addresses import GUEST_MAC, IPS
from harness.agents import Agent, running, until
from harness.hooks import check, hook
from harness.nodes import Node

METRICS = manager.RUN_DIR / "metrics.prom"
RARP = wire.ethernet(wire.BROADCAST, GUEST_MAC, 0x8035, bytes(46))


class Watcher:
    """A running `kvm-ifup watch`."""

    def __init__(self, *argv: str) -> None:
        self.out = Path("/run/watch.out")
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                hooks.command("kvm-ifup", "watch", *argv), env=tools.CLEAN, stdin=subprocess.DEVNULL, stdout=out
            )
        until(lambda: list((manager.RUN_DIR / "watch").glob("*.sock")))

    def said(self) -> str:
        """All so far."""
        return self.out.read_text()

    def end(self) -> int:
        """Interrupt it, as a person does."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(tools.PATIENCE)


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    with running() as one:
        yield one


def arrive(node: Node, agent: Agent) -> None:
    """A routed guest comes, runs here, and goes."""
    guest = node.guest()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    check(hook("kvm-ifup-pre", "tap0"), 0)
    agent.armed()
    guest.send(RARP)
    agent.heard("arrived")
    check(hook("kvm-ifup-post", "tap0"), 0)
    check(hook("kvm-ifdown", "tap0"), 0)


def test_a_migration_is_shown_as_it_happens(uplinked: Node, agent: Agent) -> None:
    watcher = Watcher()
    arrive(uplinked, agent)
    until(lambda: "kvm-ifdown: " in watcher.said())
    assert watcher.end() == 0
    said = watcher.said()
    events = [line.split("  ", 1)[1] for line in said.splitlines() if re.match(r"\d\d:\d\d:\d\d\.\d{3}  ", line)]
    order = [
        r"kvm-ifup-pre: .*\(tap0\): routed, pre, \d+ changed in .* ms, by hook",
        r"kvm-ifupd: .*\(tap0\): armed",
        r"kvm-ifupd: .*\(tap0\): routed, post, \d+ changed in .* ms, by agent",
        r"kvm-ifupd: .*\(tap0\): arrived, first frame RARP; wired .* ms after it",
        r"kvm-ifup-post: .*\(tap0\): routed, post, 0 changed",
        r"kvm-ifdown: .*\(tap0\): routed, down, \d+ changed",
    ]
    for pattern in order:
        while events and not re.fullmatch(pattern, events[0].strip()) and not re.match(pattern, events[0]):
            events.pop(0)
        assert events, f"{pattern} is missing, or late: {said}"
    assert re.search(r"^ +\d+\.\d\d ms  route 192\.0\.2\.8/32 dev tap0 table 254: absent -> present$", said, re.M)
    assert list((manager.RUN_DIR / "watch").iterdir()) == []


def test_a_round_of_announcements_names_each_address_once(uplinked: Node, agent: Agent) -> None:
    """A gateway is asked in the guest's name, too: that is one more frame, and no other address."""
    watcher = Watcher()
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS)
    check(hook("kvm-ifup-post", "tap0"), 0)
    until(lambda: "round 2 of 5: " in watcher.said())
    assert watcher.end() == 0
    (line,) = [line for line in watcher.said().splitlines() if "round 2 of 5: " in line]
    assert sorted(line.partition("round 2 of 5: ")[2].split(", ")) == sorted(f"{one} on eth0" for one in IPS)


@pytest.mark.parametrize("there", [True, False])
def test_a_person_is_told_that_it_watches_and_whether_there_is_an_agent(uplinked: Node, there: bool) -> None:
    with running() if there else nullcontext():
        process = hooks.start("kvm-ifup", "watch", "-v")
        assert process.stderr is not None
        _, line = process.stderr.readline(), process.stderr.readline()  # the first: not by the agent
        process.send_signal(signal.SIGINT)
        assert (process.wait(tools.PATIENCE), process.stderr.read()) == (0, "")
    what = "what hooks and the agent do" if there else "what hooks do; the agent is not there"
    assert line == f"watching {what}; an interrupt ends it\n"


def test_as_json(uplinked: Node, agent: Agent) -> None:
    watcher = Watcher("--json")
    arrive(uplinked, agent)
    until(lambda: '"kvm-ifdown"' in watcher.said())
    assert watcher.end() == 0
    events = [json.loads(line) for line in watcher.said().splitlines()]
    assert all({"at", "program", "nic", "what"} <= event.keys() for event in events)
    (post,) = [event for event in events if event.get("phase") == "post" and event["by"] == "agent"]
    assert any(op["what"].startswith("proxy neighbour 192.0.2.8") and op["seconds"] > 0 for op in post["ops"])


def test_a_failure_is_shown(uplinked: Node) -> None:
    watcher = Watcher()
    nodes.add_tap()
    manager.write_nic(mode="bridged", link="br9")
    check(hook("kvm-ifup-post", "tap0"), 69)
    until(lambda: "code 69" in watcher.said())
    assert "br9" in watcher.said()
    assert watcher.end() == 0


def samples() -> dict[str, float]:
    """What the agent has counted."""
    lines = [line.rsplit(" ", 1) for line in METRICS.read_text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_the_agent_counts(uplinked: Node, agent: Agent) -> None:
    arrive(uplinked, agent)
    manager.write_nic(mode="bridged", link="br9")
    check(hook("kvm-ifup-post", "tap0"), 69)
    assert agent.end() == 0
    found = samples()
    assert found['kvm_ifup_runs_total{program="kvm-ifup-pre",code="0"}'] == 1
    assert found['kvm_ifup_runs_total{program="kvm-ifup-post",code="0"}'] == 1
    assert found['kvm_ifup_runs_total{program="kvm-ifup-post",code="69"}'] == 1
    assert found['kvm_ifup_run_seconds_count{program="kvm-ifdown"}'] == 1
    assert found['kvm_ifup_arrivals_total{frame="RARP"}'] == 1
    assert found["kvm_ifup_arrival_seconds_count"] == 1
    assert 0 < found["kvm_ifup_arrival_seconds_sum"] < 60
    assert (found["kvm_ifup_armed"], found['kvm_ifup_nics{phase="post"}']) == (0, 0)
    assert METRICS.stat().st_mode & 0o777 == 0o644


def test_leftovers_are_counted(uplinked: Node, agent: Agent) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=IPS)
    check(hook("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    agent.heard("cleared up")
    assert agent.end() == 0
    assert samples()["kvm_ifup_leftovers_total"] >= 4
