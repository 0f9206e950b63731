"""Migrations of a real guest with an agent on each node and nobody calling any hook after QEMU has started."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from harness.addresses import GUEST_IP4, GUEST_IP6
from lab import cases, guest, observe
from lab.agent import Agent, agent
from lab.hooks import TAP, Hooks
from lab.nodes import NODE_MAC, Mode, Namespace, network

from .moves import CRAWL, Moved, names_guest, says, tap_forwards, wiring

KILLS = 50


class Attended(Moved):
    """A guest that is about to move between nodes that have agents."""

    def __init__(self, moved: Moved, agents: dict[str, Agent]) -> None:
        super().__init__(moved.on, moved.before)
        self.agents = agents


def attended(mode: Mode, scripts: Hooks, image: guest.Image) -> Iterator[Attended]:
    with network(mode) as net:
        before = wiring(net.a)
        with (
            agent(net.a, scripts) as a,
            agent(net.b, scripts) as b,
            cases.stage(net, scripts, image, print) as on,
        ):
            yield Attended(Moved(on, before), {"a": a, "b": b})


@pytest.fixture
def bridged(scripts: Hooks, image: guest.Image) -> Iterator[Attended]:
    yield from attended("bridged", scripts, image)


@pytest.fixture
def routed(scripts: Hooks, image: guest.Image) -> Iterator[Attended]:
    yield from attended("routed", scripts, image)


def until(true: Callable[[], bool], moved: Attended, seconds: float = 60.0) -> None:
    """Waits for what the agents do by themselves; with their words, fails when they do not."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            pytest.fail("\n".join(f"{name}: {one.said()}" for name, one in moved.agents.items()))
        time.sleep(0.02)


def test_routed_guest_is_wired_where_it_arrives_and_withdrawn_where_it_left(routed: Attended) -> None:
    on, net = routed.on, routed.on.net
    fresh = wiring(net.b)
    on.observer.probe(True)
    with on.target("kvm-ifup-pre", incoming=True) as target:
        assert not names_guest(net.b), "pre must install neither route nor proxy entry"
        migrated = on.source.wait_migrated(target, on.source.order_migration(target))
        until(lambda: names_guest(net.b) and not names_guest(net.a), routed)
        found = wiring(net.b)
        for address in (GUEST_IP4, GUEST_IP6):
            assert [r["dev"] for r in found["routes"] if r["dst"] == address] == [TAP]
            assert [p["dev"] for p in found["proxies"] if p["dst"] == address] == ["eth0"]

        def told(record: observe.Record) -> bool:
            return says(record, "garp", NODE_MAC["b"]) and says(record, "unsolicited-na", NODE_MAC["b"])

        on.observer.wait("node b has announced the guest", told, 60, target.must_run)
        on.observer.wait_for_replies(time.monotonic(), 90, target.must_run)
        record = on.observer.record()
        assert {node for p in record.probes if p.sent < migrated.resumed for node in p.answered} == {"a"}
        on.hooks.run("kvm-ifup-post", net.b)
        assert wiring(net.b) == found, "what a manager calls later finds nothing to do"
        on.source.quit()
        until(lambda: wiring(net.a) == routed.before, routed)
    until(lambda: wiring(net.b) == fresh, routed)


def test_bridged_guest_is_checked_where_it_arrives(bridged: Attended) -> None:
    on, net = bridged.on, bridged.on.net
    with on.target("kvm-ifup-pre", incoming=True) as target:
        assert tap_forwards(net.b)
        on.source.wait_migrated(target, on.source.order_migration(target))
        until(lambda: "arrived" in bridged.agents["b"].said(), bridged)
        assert tap_forwards(net.b)
        on.source.quit()
        until(lambda: wiring(net.a) == bridged.before, bridged)


@pytest.mark.parametrize("ending", ["killed", "cancelled"])
def test_failed_migration_leaves_the_target_clean_with_nobody_calling(ending: str, routed: Attended) -> None:
    on, net = routed.on, routed.on.net
    fresh = wiring(net.b)
    here = wiring(net.a)
    with on.target("kvm-ifup-pre", incoming=True) as target:
        on.source.order_migration(target, CRAWL)
        on.source.wait_event("MIGRATION", status="active")
        if ending == "cancelled":
            on.source.command("migrate_cancel")
        target.kill()
        on.source.wait_event("MIGRATION", status="failed" if ending == "killed" else "cancelled")
        until(lambda: wiring(net.b) == fresh and not journals(routed, "b"), routed)
    assert wiring(net.a) == here, "the guest goes on as it was"
    on.observer.wait_for_replies(time.monotonic(), 90, on.source.must_run)


def journals(moved: Attended, node: str) -> list[str]:
    """The journals on a node."""
    where = {"a": moved.on.net.a, "b": moved.on.net.b}[node]
    return where.run("find", "/run/kvm-ifup/state", "-name", "*.json").split()


def clean(moved: Attended, node: Namespace, empty: dict[str, Any]) -> bool:
    """True when nothing of a guest is left on `node`."""
    return wiring(node) == empty and not journals(moved, node.name)


def test_agents_killed_at_any_time_lose_no_guest_and_leave_nothing(routed: Attended) -> None:
    """The guest goes to and fro; meanwhile the agents are killed and started anew, again and again."""
    chance = random.Random(20)
    on, net = routed.on, routed.on.net
    empty = {"a": routed.before, "b": wiring(net.b)}
    kills = 0

    def kill_one(nodes: str) -> None:
        nonlocal kills
        time.sleep(chance.uniform(0.0, 0.1))
        one = routed.agents[chance.choice(nodes)]
        one.kill()
        kills += 1
        time.sleep(chance.uniform(0.0, 0.05))
        one.start()

    with contextlib.ExitStack() as guests:
        source, here, there = on.source, net.a, net.b
        while kills < KILLS:
            target = guests.enter_context(on.target("kvm-ifup-pre", incoming=True, node=there))
            source.order_migration(target)
            while target.status() != "running":
                kill_one("ab")
            kill_one(there.name)  # it may not have been heard yet, and the next agent must find out
            until(partial(names_guest, there), routed)
            kill_one(here.name)
            source.quit()
            until(partial(clean, routed, here, empty[here.name]), routed)
            on.observer.wait_for_replies(time.monotonic(), 90, target.must_run)
            source, here, there = target, there, here
