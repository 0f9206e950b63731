"""What the agent keeps in memory of guests that have come and gone: nothing."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import agents, guests, manager, nodes, tools
from harness.agents import Agent, phase, through, until
from harness.nodes import Node

GUESTS = 3  # of each kind one, that come and go between two looks
FOUND = Path("/run/objects.json")
# The agent, which counts when SIGUSR1 comes: its objects by their type, and what each of their attributes holds.
# What is cached it forgets before: there is only so much of it. And the journals that have gone a moment ago, which it
# would write again if somebody had removed the whole directory: it does so at its next look.
COUNTING = f"""
import collections, functools, gc, json, os, signal, sys

def size(held):
    if isinstance(held, dict):
        return len(held) + sum(map(size, held.values()))
    return len(held) + sum(map(size, held)) if isinstance(held, (list, tuple, set, frozenset, collections.deque)) else 0

def count(_number, _frame):
    gc.unfreeze()
    gc.collect()
    for one in gc.get_objects():
        if isinstance(one, functools._lru_cache_wrapper):
            one.cache_clear()
        if type(one).__qualname__ == "Taps":
            one._missing.clear()
    found = collections.Counter()
    for one in gc.get_objects():
        if type(one).__module__.startswith("kvmifup.") and not isinstance(one, type):
            name = type(one).__qualname__
            found[name] += 1
            for attribute, held in getattr(one, "__dict__", {{}}).items():
                found[name + "." + attribute] += size(held)
    with open("{FOUND}.new", "w") as out:
        json.dump(found, out)
    os.rename("{FOUND}.new", "{FOUND}")

signal.signal(signal.SIGUSR1, count)
_, changed, *sys.argv = sys.argv[sys.argv.index("-I") + 1 :]
sys.argv.insert(0, "-c")
exec(changed)
"""
# Timers that have been cancelled go in time; of kinds of lines in the log, and of sockets, so many are kept.
COME_AND_GO = {"Timer", "Loop._timers", "Log._kinds", "Allowance", "Spare._sockets"}


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    script = Path("/run/counting.py")
    script.write_text(COUNTING)
    # What a look from time to time has found is remembered until the next one.
    others = {"agent.mending.PERIOD": 3600.0, "agent.mending.EVERYTHING": 36000.0}
    with agents.running(within=[sys.executable, str(script)], others=others) as running:
        yield running


def objects(agent: Agent) -> Counter[str]:
    """How many there are, once the agent has nothing more to do."""
    until(agent.rests)
    FOUND.unlink(missing_ok=True)
    agent.send(signal.SIGUSR1)
    until(FOUND.exists)
    return Counter(json.loads(FOUND.read_text()))


def come_and_go(node: Node, agent: Agent, first: int) -> None:
    """Guests of each kind, from number *first* on: they are wired or arrive, and are taken down or just go."""
    for number in range(first, first + GUESTS):
        comes(node, agent, number)
    until(agent.rests)
    for number in range(first, first + GUESTS):
        goes(number)


def comes(node: Node, agent: Agent, number: int) -> None:
    """A guest of one kind, by its number."""
    tap, mac = f"tap{number}", f"aa:00:00:00:02:{number:02x}"
    ip = [f"198.18.0.{number}", f"2001:db8:1::{number}"]
    if number % 3 == 0:
        guests.incoming(node, agent, tap, ip=ip, mac=mac).send(guests.rarp(mac))
        until(lambda: phase(tap) == "post")
        return
    more = {"MODE": "bridged", "LINK": "br0"} if number % 3 == 1 else {"MODE": "routed", "IP": ",".join(ip)}
    nodes.add_tap(tap)
    through("kvm-ifup-post", tap, environ=manager.ganeti(tap, INSTANCE=f"web{number}", MAC=mac, **more))


def goes(number: int) -> None:
    """It is taken down, or just goes."""
    tap = f"tap{number}"
    if number % 2:
        through("kvm-ifdown", tap)
    tools.ip(f"link del {tap}")
    until(lambda: phase(tap) is None)


def test_of_guests_that_have_come_and_gone_nothing_is_left(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge()
    come_and_go(uplinked, agent, 10)  # what is loaded meanwhile stays, and what there is one of
    before = objects(agent)
    come_and_go(uplinked, agent, 10 + GUESTS)
    after = objects(agent)
    assert before["Agent"] == 1
    assert before["Finder._names"] > 10
    more = {name: (before[name], after[name]) for name in after if after[name] > before[name]}
    assert more.keys() <= COME_AND_GO, more
