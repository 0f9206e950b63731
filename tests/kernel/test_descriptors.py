"""An agent without descriptors or memory: hooks do their work themselves, no journal is lost, and it recovers."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import agents, manager, nodes, oracle, tools
from harness.addresses import GUEST_IP4
from harness.agents import STATE, Agent, phase, through, until
from harness.guests import answering, arrived, garp, incoming, rarp, rounds_of
from harness.hooks import check, finish, hook, start
from harness.nodes import Node


def wired_and_announced(node: Node) -> None:
    """post for tap0, and all of its announcements are out."""
    client = node.listen()
    through("kvm-ifup-post", "tap0")
    client.until(rounds_of(GUEST_IP4))


@contextlib.contextmanager
def short(agent: Agent, left: int = 0) -> Iterator[None]:
    """The agent can open *left* more descriptors than it has."""
    pid = agent.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = [number for number in range(len(used) + left + 1) if number not in used]
    limit = free[left] if len(free) > left else len(used) + left
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("left", range(8))
def test_hooks_do_it_themselves_at_once_and_the_agent_recovers(uplinked: Node, left: int) -> None:
    """Whether there are none for the connection, or too few for the work."""
    nodes.add_tap()
    nodes.add_tap("tap1")
    manager.write_nic(mode="routed", link="100", ip=[GUEST_IP4])
    manager.write_nic("tap1", "web2", mode="routed", link="100", ip=["192.0.2.9"], mac="aa:00:00:35:ac:02")
    with agents.running() as agent:
        wired_and_announced(uplinked)
        with short(agent, left):
            for program, found in (("kvm-ifup-post", {"192.0.2.9"}), ("kvm-ifdown", set())):
                result = hook(program, "tap1", "-v")
                assert result.code == 0, result.err
                if "without the agent" in result.err:  # it was told, and has not waited for a sign of life
                    assert "descriptors" in result.err
                assert oracle.routes("tap1", "100") == found
            if left == 0:
                agent.heard("no descriptors")
        through("kvm-ifup-post", "tap1")
        through("kvm-ifdown", "tap1")
        through("kvm-ifdown", "tap0")
        assert agent.said().count("no descriptors") <= 1
    assert oracle.routes("tap0", "100") == oracle.proxies() == set()


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_good_journal_is_never_set_aside(uplinked: Node, left: int) -> None:
    """Its tap goes while nothing can be read; later, everything is cleared up."""
    nodes.add_tap()
    manager.write_nic(mode="routed", link="100", ip=[GUEST_IP4])
    with agents.configured(agent={"idle_exit": 0.3}), agents.running() as agent:
        wired_and_announced(uplinked)
        with short(agent, left):
            tools.ip("link del tap0")
            time.sleep(1.0)
            assert [path.name for path in STATE.iterdir() if path.suffix != ".json"] == []
        until(lambda: list(STATE.iterdir()) == [])
        assert oracle.proxies() == set()
        assert agent.process.poll() is None


def test_a_guest_that_is_expected_during_a_shortage_is_armed_when_it_is_over(uplinked: Node) -> None:
    """Nothing else changes then: the agent itself tries again."""
    for left in range(4):
        tap = f"tap{left}"
        guest = uplinked.guest(tap)
        manager.write_nic(tap, f"web{left}", mode="routed", ip=[f"192.0.2.{50 + left}"], incoming=True)
        with agents.running() as agent:
            with short(agent, left):
                check(hook("kvm-ifup-pre", tap), 0)
                time.sleep(0.3)
            agent.armed(tap)
            guest.send(rarp())
            until(lambda tap=tap: phase(tap) == "post")  # type: ignore[misc]
            assert agent.said().count("cannot listen") <= 1
            check(hook("kvm-ifdown", tap), 0)


def limited(agent: Agent, more: int) -> None:
    """The agent gets *more* bytes of address space than it has, and no more."""
    pages = int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.prlimit(agent.process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("more", [2 << 20, 10 << 20, 80 << 20])
def test_with_no_memory_for_another_thread_it_goes_on(uplinked: Node, more: int) -> None:
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="routed", link="100", ip=["192.0.2.9"], mac="aa:00:00:35:ac:02")
    with agents.running() as agent:
        guest = incoming(uplinked, agent)
        limited(agent, more)
        for program, found in (("kvm-ifup-post", {"192.0.2.9"}), ("kvm-ifdown", set())):
            for one in [start(program, "tap1") for _ in range(4)]:
                check(finish(one), 0)
            assert oracle.routes("tap1", "100") == found
        assert agent.process.poll() is None
        guest.send(rarp())
        until(lambda: phase() == "post")
        assert "unexpected" not in agent.said()


def test_a_guest_that_arrives_after_a_shortage_is_wired(uplinked: Node) -> None:
    with agents.running() as agent:
        guest = incoming(uplinked, agent)
        with short(agent):
            check(hook("kvm-ifup", "gc"), 0)
        guest.send(rarp())
        until(lambda: phase() == "post")


@pytest.mark.parametrize("left", [0, 2])
def test_a_guest_that_arrives_during_a_shortage_is_wired_when_it_is_over(uplinked: Node, left: int) -> None:
    """Also if it has nothing more to say: it is asked."""
    with agents.running() as agent:
        guest = incoming(uplinked, agent)
        with short(agent, left), answering(guest):
            guest.send(rarp())
            time.sleep(0.5)
        until(lambda: phase() == "post" or "not arrived" in agent.said())
        with answering(guest):
            until(lambda: phase() == "post")


@pytest.mark.parametrize("left", [0, 2])
def test_a_guest_that_leaves_during_a_shortage_is_withdrawn_when_it_is_over(uplinked: Node, left: int) -> None:
    """And one that is here stays, though it could not be asked."""
    with agents.running() as agent:
        arrived(uplinked, agent)
        here = arrived(uplinked, agent, "tap1", ip=["192.0.2.77"], mac="aa:00:00:00:00:77")
        client = uplinked.listen()
        with answering(here, "aa:00:00:00:00:77"):
            with short(agent, left):
                client.send(garp())
                client.send(garp(address="192.0.2.77"))
                time.sleep(0.5)
            until(lambda: phase() == "pre")
            agent.heard("192.0.2.77", "the guest runs here")
        assert phase("tap1") == "post"
