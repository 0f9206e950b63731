"""A guest that may have left is asked: a slow one is not cut off for it, and one that has left is withdrawn at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

import pytest

from harness import agents, hooks, manager, oracle, tools, wire
from harness.addresses import GUEST_IP4, GUEST_IP6, IPS
from harness.agents import NOT_WIRED, WIRED, Agent, phase, until, wired
from harness.guests import advert, answering, arrived, garp, rarp, witness
from harness.nodes import Node
from kvmifup.agent import suspects
from kvmifup.agent.loop import Loop
from kvmifup.agent.rivals import Heard
from kvmifup.agent.runner import Runner
from kvmifup.agent.suspects import Suspects

FORGED = {"gratuitous ARP": garp(), "unsolicited NA": advert()}
PREFIXES = ["198.51.100.0/29"]


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_guest_that_is_slow_is_here_as_long_as_its_machine_takes_frames(
    uplinked: Node, agent: Agent, forged: bytes
) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest, late=1.0):
        client.send(forged)
        agent.heard("the guest runs here")
    assert (phase(), wired()) == ("post", WIRED)
    assert "withdrawn" not in agent.said()


@pytest.mark.parametrize("takes", [0, 1])
def test_a_machine_that_stands_still_has_left(uplinked: Node, agent: Agent, takes: int) -> None:
    """QEMU takes one frame then, and keeps it."""
    guest = arrived(uplinked, agent)
    while wire.readable(guest.descriptor, 0.2):
        os.read(guest.descriptor, 65536)
    uplinked.listen().send(garp())
    begun = time.monotonic()
    for _ in range(takes):
        os.read(guest.descriptor, 65536)
    until(lambda: phase() == "pre")
    assert time.monotonic() - begun < 0.8
    assert wired() == NOT_WIRED


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_who_was_late_has_more_time_the_next_time(uplinked: Node, agent: Agent, forged: bytes) -> None:
    """Here the whole machine is held up."""
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest, delay=0.7, times=1):
        client.send(forged)
        until(lambda: phase() == "pre")
        until(lambda: phase() == "post")
    time.sleep(0.5)
    for _ in range(2):
        while wire.readable(guest.descriptor, 0):
            os.read(guest.descriptor, 65536)
        with answering(guest, delay=0.7, times=1):
            client.send(forged)
            time.sleep(1.0)
            assert (phase(), wired()) == ("post", WIRED)
    assert agent.said().count("withdrawn") == 1
    # But not for ever: it is withdrawn if it really leaves.
    client.send(forged)
    until(lambda: phase() == "pre", 4.0)


def test_who_is_back_from_another_node_was_not_late(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    for _ in range(3):
        client.send(garp())
        begun = time.monotonic()
        until(lambda: phase() == "pre")
        assert time.monotonic() - begun < 0.5
        time.sleep(0.7)
        guest.send(rarp())
        until(lambda: phase() == "post")
        time.sleep(0.5)


@pytest.mark.parametrize("ip", [[GUEST_IP4], [GUEST_IP6], PREFIXES], ids=["IPv4", "IPv6", "prefix"])
def test_a_guest_that_never_answers_has_left_whatever_its_machine_does(
    uplinked: Node, ip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=ip)
    hooks.check(hooks.call("kvm-ifup-post", "tap0"), 0)
    for name, seconds in (("LONGEST", 0.6), ("PATIENT", 0.1), ("TAKES", 0.1)):
        monkeypatch.setattr(suspects, name, seconds)
    loop = Loop()
    runner = Runner(manager.RUN_DIR, lambda *_: True)
    journal = runner.store.load("tap0")
    assert journal
    one = Suspects(loop, runner, withdrawn=lambda _tap: loop.stop(), here=lambda *_: None)
    begun = time.monotonic()
    with answering(guest, only=[]):
        loop.soon(partial(one.suspect, journal.nic, Heard(ip[0].partition("/")[0], "is elsewhere")))
        loop.later(10, loop.stop)
        loop.run()
    assert 0.6 <= time.monotonic() - begun < 5
    assert phase() == "pre"
    one.close()
    loop.close()


@pytest.mark.parametrize("why", ["announced", "unheard"])
def test_who_speaks_before_it_is_withdrawn_is_not(uplinked: Node, agent: Agent, why: str) -> None:
    """Somebody works on its tap for a while. There is one way to be withdrawn, whatever the reason."""
    guest = arrived(uplinked, agent)
    with agents.locked("tap0"):
        if why == "announced":
            uplinked.listen().send(garp())
        else:
            tools.ip("link set eth0 down")
            tools.ip("link set eth0 up")
        time.sleep(1.5)
        guest.send(rarp())
    until(lambda: oracle.proxies() == set(IPS))
    witness(uplinked, agent)
    assert phase() == "post"
    assert "withdrawn" not in agent.said()


@pytest.mark.parametrize("why", ["announced", "unheard"])
def test_whoever_works_on_a_tap_delays_only_that(uplinked: Node, agent: Agent, why: str) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", ip=["192.0.2.77"], mac="aa:00:00:00:00:77")
    with agents.locked("tap0"):
        if why == "announced":
            client = uplinked.listen()
            client.send(garp())
            time.sleep(0.2)
            client.send(garp(address="192.0.2.77"))
        else:
            tools.ip("link set eth0 down")
            tools.ip("link set eth0 up")
        until(lambda: phase("tap1") == "pre", 4.0)
        assert phase() == "post"
    until(lambda: phase() == "pre", 4.0)
    assert wired() == NOT_WIRED
