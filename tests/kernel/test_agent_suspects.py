"""A guest that may have left is asked: a slow one is not cut off for it, and one that has left is withdrawn at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest

from harness import agents, guests, hooks, manager, oracle, tools, wire
from harness.addresses import GUEST_IP4, GUEST_IP6, IPS
from harness.agents import NOT_WIRED, WIRED, Agent, phase, until, wired
from harness.guests import advert, answering, arrived, garp, rarp, witness
from harness.nodes import Node
from kvmifup.agent import suspects
from kvmifup.agent.loop import Loop
from kvmifup.agent.rivals import Heard
from kvmifup.agent.runner import Runner
from kvmifup.agent.suspects import Suspects
from kvmifup.core.model import Nic

FORGED = {"gratuitous ARP": garp(), "unsolicited NA": advert()}
EVER = 600.0  # seconds: longer than any test waits
PREFIXES = ["198.51.100.0/29"]


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_guest_that_is_slow_is_here_as_long_as_its_machine_takes_frames(uplinked: Node, forged: bytes) -> None:
    with agents.running(others={"agent.suspects.ANSWER": 0.5}) as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        with answering(guest, late=1.5):
            client.send(forged)
            agent.heard("the guest runs here")
        assert (phase(), wired()) == ("post", WIRED)
        assert "withdrawn" not in agent.said()


def take(guest: wire.Tap) -> None:
    """The guest's machine takes all that there is for it, and then nothing any more."""
    while wire.readable(guest.descriptor, 0.2):
        os.read(guest.descriptor, 65536)


@pytest.mark.parametrize("takes", [0, 1])
def test_a_machine_that_stands_still_has_left(uplinked: Node, takes: int) -> None:
    """QEMU takes one frame then, and keeps it. It is not asked a third time, as one whose machine runs would be."""
    with agents.running(others={"agent.suspects.TAKES": EVER}) as agent:
        guest = arrived(uplinked, agent)
        take(guest)
        uplinked.listen().send(garp())
        for _ in range(takes):
            os.read(guest.descriptor, 65536)
        until(lambda: phase() == "pre")
        assert wired() == NOT_WIRED


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_who_was_late_has_more_time_the_next_time(uplinked: Node, forged: bytes) -> None:
    """Here the whole machine is held up, for as long as it likes: who was late once has nearly for ever then."""
    with agents.running(others={"agent.suspects.SLOWER": EVER, "agent.suspects.LONGEST": EVER}) as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        with answering(guest, delay=0.3, times=1):
            client.send(forged)
            agent.heard("withdrawn")
            until(lambda: phase() == "post")
        witness(uplinked, agent)  # by then it listens to what is said of the guest again
        take(guest)
        client.send(forged)
        assert wire.readable(guest.descriptor, wire.PATIENCE), "it is asked"
        witness(uplinked, agent)
        assert (phase(), wired()) == ("post", WIRED)
        with answering(guest):
            client.send(forged)
            agent.heard("the guest runs here")
        assert agent.said().count("withdrawn") == 1


def test_who_was_late_does_not_have_more_time_for_ever(uplinked: Node, agent: Agent) -> None:
    """It is withdrawn if it really leaves."""
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest, delay=0.7, times=1):
        client.send(garp())
        agent.heard("withdrawn")
        until(lambda: phase() == "post")
    guests.withdraw(client)
    until(lambda: agent.said().count("withdrawn") == 2)


def test_who_is_back_from_another_node_was_not_late(uplinked: Node) -> None:
    """So it has no more time than before: if it had, it would be for ever here."""
    with agents.running(others={"agent.suspects.SLOWER": EVER, "agent.suspects.LONGEST": EVER}) as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        for _ in range(3):
            guests.withdraw(client)
            guest.send(rarp())
            until(lambda: phase() == "post")


@pytest.mark.parametrize("ip", [[GUEST_IP4], [GUEST_IP6], PREFIXES], ids=["IPv4", "IPv6", "prefix"])
def test_a_guest_that_never_answers_has_left_whatever_its_machine_does(
    uplinked: Node, ip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=ip)
    hooks.check(hooks.call("kvm-ifup-post", "tap0"), 0)
    # What a busy machine does not take in time does not count, so there is time.
    for name, seconds in (("LONGEST", 1.2), ("ANSWER", 0.5), ("PATIENT", 0.5), ("TAKES", 0.5)):
        monkeypatch.setattr(suspects, name, seconds)
    loop = Loop()
    runner = Runner(manager.RUN_DIR, lambda *_: True)
    journal = runner.store.load("tap0")
    assert journal
    one = Suspects(loop, runner, withdrawn=lambda _tap: loop.stop(), here=lambda *_: None)
    asked: list[str] = []
    ask = suspects.ask

    def counted(nic: Nic, about: str = "") -> bool:
        asked.append(about)
        return ask(nic, about)

    monkeypatch.setattr(suspects, "ask", counted)
    with answering(guest, only=[]):
        loop.soon(partial(one.suspect, journal.nic, Heard(ip[0].partition("/")[0], "is elsewhere")))
        loop.later(60, loop.stop)
        loop.run()
    assert phase() == "pre"
    assert len(asked) > 2, "a machine that runs has more time"
    one.close()
    loop.close()


def may_have_left(node: Node, why: str) -> None:
    """Somebody announces the guest, or may have done so without being heard."""
    if why == "announced":
        node.listen().send(garp())
    else:
        tools.ip("link set eth0 down")
        tools.ip("link set eth0 up")


@pytest.mark.parametrize("why", ["announced", "unheard"])
def test_who_speaks_before_it_is_withdrawn_is_not(uplinked: Node, why: str) -> None:
    """Somebody works on its tap for a while. There is one way to be withdrawn, whatever the reason."""
    with agents.running(others={"agent.suspects.BUSY": EVER}) as agent:
        guest = arrived(uplinked, agent)
        with agents.locked("tap0"):
            may_have_left(uplinked, why)
            until(lambda: agent.holds(agents.lock_file("tap0")))
            guest.send(rarp())
        until(lambda: not agent.holds(agents.lock_file("tap0")))
        until(lambda: oracle.proxies() == set(IPS))
        witness(uplinked, agent)
        assert phase() == "post"
        assert "withdrawn" not in agent.said()


def test_who_speaks_between_two_tries_to_withdraw_it_is_not(uplinked: Node) -> None:
    with agents.running(others={"agent.suspects.BUSY": 0.01}) as agent:
        guest = arrived(uplinked, agent)
        with agents.locked("tap0"):
            uplinked.listen().send(garp())
            until(lambda: agent.holds(agents.lock_file("tap0")))
            until(lambda: not agent.holds(agents.lock_file("tap0")))
            guest.send(rarp())
        agent.heard("the guest runs here")
        assert (phase(), wired()) == ("post", WIRED)
        assert "withdrawn" not in agent.said()


@pytest.mark.parametrize("why", ["announced", "unheard"])
def test_whoever_works_on_a_tap_delays_only_that(uplinked: Node, agent: Agent, why: str) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", ip=["192.0.2.77"], mac="aa:00:00:00:00:77")
    with agents.locked("tap0"):
        may_have_left(uplinked, why)
        if why == "announced":
            until(lambda: agent.holds(agents.lock_file("tap0")))
            uplinked.listen().send(garp(address="192.0.2.77"))
        until(lambda: phase("tap1") == "pre")
        assert phase() == "post"
    until(lambda: phase() == "pre")
    assert wired() == NOT_WIRED
