"""The agent and nftables: what somebody takes from our tables is there again within a second, and that is said once."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness import agents, manager, nodes, tools, wire
from harness.addresses import GUEST_IP6
from harness.agents import Agent, until
from harness.guests import witness
from harness.nodes import Node
from tests.kernel.test_sources import FORGED, NIC, elements, from_guest, met, packet, passed, sources

WITHIN = 1.0  # seconds until it is closed again


@pytest.fixture
def guest(uplinked: Node) -> Iterator[tuple[Agent, wire.Tap, wire.Wire]]:
    """An agent, a guest that it looks after, and what the client hears."""
    with agents.running() as agent:
        met(uplinked)
        tap = uplinked.guest()
        manager.write_nic("tap0", "web1", **NIC)
        agents.through("kvm-ifup-post", "tap0")
        witness(uplinked, agent)
        time.sleep(0.5)
        yield agent, tap, uplinked.listen()


@contextmanager
def flood(tap: wire.Tap) -> Iterator[None]:
    """The guest sends forged packets all the time."""
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            from_guest(tap, packet(FORGED[0]))
            time.sleep(0.002)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("command", ["flush ruleset", "delete table inet kvm-ifup", "flush chain inet kvm-ifup strict"])
def test_rules_that_are_flushed_during_a_flood_are_back_within_a_second(
    guest: tuple[Agent, wire.Tap, wire.Wire], command: str
) -> None:
    agent, tap, client = guest
    with flood(tap):
        tools.run("nft", *command.split())
        begun = time.monotonic()
        client.until(lambda frame: FORGED[0].encode() in frame)  # it is really open
        agent.heard("tap0): mended: ", "tap0 IPv6 sources: any -> strict")
        took = time.monotonic() - begun
        assert sources(passed(tap, client, []))[-1:] in ([FORGED[0]], [])
        assert sources(passed(tap, client, map(packet, FORGED))) == []
    assert took < WITHIN
    assert agent.said().count("mended") == 1


def test_each_guest_is_closed_again_and_named_once(uplinked: Node) -> None:
    with agents.running() as agent:
        for number in range(4):
            nodes.add_tap(f"tap{number}")
            manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=[f"2001:db8::{number + 80:x}"],
                              mac=f"aa:00:00:35:ac:{number:02x}")  # fmt: skip
            agents.through("kvm-ifup-post", f"tap{number}")
        witness(uplinked, agent)
        time.sleep(0.5)
        tools.run("nft", "flush", "ruleset")
        until(lambda: len(elements("sources")) == 4, WITHIN)
        until(lambda: agent.said().count("IPv6 sources: any -> strict") == 4)
        assert len(elements("addresses")) == len(elements("dropped_address")) == 4


def quiet(seconds: float) -> bool:
    """Whether nobody changes anything in nftables for a while."""
    with subprocess.Popen(["nft", "monitor"], stdout=subprocess.PIPE, text=True) as monitor:
        time.sleep(seconds)
        monitor.terminate()
        assert monitor.stdout
        return monitor.stdout.read() == ""


def test_what_the_agent_writes_itself_does_not_wake_it_again_and_again(
    guest: tuple[Agent, wire.Tap, wire.Wire],
) -> None:
    agent, _, _ = guest
    tools.run("nft", "flush", "ruleset")
    agent.heard("tap0): mended: ")
    assert quiet(1.0)
    assert agent.said().count("mended") == 1


def test_what_others_do_to_their_own_tables_is_nothing_to_mend(guest: tuple[Agent, wire.Tap, wire.Wire]) -> None:
    agent, tap, client = guest
    for line in ("add table inet kvm-ifup2", "add table ip kvm-ifup", "add chain inet kvm-ifup2 strict",
                 "delete table ip kvm-ifup", "delete table inet kvm-ifup2"):  # fmt: skip
        tools.run("nft", *line.split())
    time.sleep(0.5)
    assert "mended" not in agent.said()
    assert sources(passed(tap, client, map(packet, [*FORGED, GUEST_IP6]))) == [GUEST_IP6]


def test_a_guest_that_is_armed_is_closed_again_too(uplinked: Node) -> None:
    with agents.running() as agent:
        met(uplinked)
        tap = uplinked.guest()
        manager.write_nic("tap0", "web1", **NIC, incoming=True)
        agents.through("kvm-ifup-pre", "tap0")
        agent.armed()
        tools.run("nft", "flush", "ruleset")
        until(lambda: len(elements("sources")) == 1, WITHIN)
        assert tap.name == "tap0"
