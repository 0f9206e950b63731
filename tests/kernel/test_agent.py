"""The agent: hooks through it, arrival, departure, leftovers, restarts; and without it, dead, stuck, or another one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import netns, wire
from tests.netns import GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_MAC, Node, hook

IPS = [GUEST_IP4, GUEST_IP6]
SOCKET = netns.RUN_DIR / "agent.sock"
LOG = "/run/agent.log"
RARP = wire.ethernet(wire.BROADCAST, GUEST_MAC, 0x8035, bytes(46))


class Agent:
    """A running kvm-ifupd."""

    def __init__(self) -> None:
        self.log = open(LOG, "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            netns.command("kvm-ifupd"), env=netns.CLEAN, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        until(lambda: "ready" in self.said() or self.process.poll() is not None)

    def said(self) -> str:
        """All that it has said."""
        self.log.seek(0)
        return self.log.read()

    def end(self, number: int = signal.SIGTERM) -> None:
        """Stop it, and wait until it has."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(netns.PATIENCE)
        self.log.close()


def until(true: Callable[[], object], patience: float = 20.0) -> None:
    """Wait for something that takes a moment."""
    end = time.monotonic() + patience
    while not true():
        if time.monotonic() > end:
            pytest.fail("what was waited for does not happen; the agent said: " + Path(LOG).read_text())
        time.sleep(0.005)


@contextlib.contextmanager
def running() -> Iterator[Agent]:
    """An agent that ends with the block."""
    agent = Agent()
    try:
        yield agent
    finally:
        agent.end()


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with running() as one:
        yield one


def through(program: str, *argv: str) -> None:
    """Run a hook and see that the agent did it."""
    result = hook(program, *argv, "-v")
    assert result.code == 0, result.err
    assert "without the agent" not in result.err


def armed(agent: Agent, tap: str = "tap0") -> bool:
    """Whether it has said so."""
    return f"({tap}): armed" in agent.said()


def test_post_at_the_guests_first_frame(uplinked: Node, agent: Agent) -> None:
    guest = uplinked.guest()
    client = uplinked.listen()
    netns.write_nic(mode="routed", ip=IPS, incoming=True)
    through("kvm-ifup-pre", "tap0")
    until(lambda: armed(agent))
    assert (netns.proxies(), netns.routes("tap0")) == (set(), set())
    guest.send(RARP)
    client.until(lambda frame: bool((arp := wire.arp(frame)) and (arp.sender, arp.mac) == (GUEST_IP4, NODE_MAC)))
    assert (netns.proxies(), netns.routes("tap0")) == (set(IPS), set(IPS))
    netns.ip("link del tap0")
    until(lambda: netns.proxies() == set())
