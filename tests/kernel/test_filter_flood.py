"""Filters while a guest floods: at no moment does its tap forward without them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from harness import attacker, disturb, guestframes, hooks, manager, nodes, tools, wire
from harness.addresses import IPS
from harness.agents import running, until
from harness.guestframes import OTHER_IP4, OTHER_IP6, OTHER_MAC
from harness.hooks import call, check
from harness.nodes import Node

# None of them is right by any filter.
FORGED = [
    guestframes.sent_by("02:f3:00:00:00:01", guestframes.arp()),
    guestframes.arp(mac=OTHER_MAC),
    guestframes.arp(mac=OTHER_MAC, sender=OTHER_IP4, op=2),
    guestframes.nd(guestframes.NA, guestframes.YOURS_TOO, about=OTHER_IP6),
    guestframes.tagged(guestframes.arp(mac=OTHER_MAC), (guestframes.VLAN, 0)),
    guestframes.tagged(guestframes.arp(mac=OTHER_MAC), (guestframes.VLAN, 0), (guestframes.VLAN, 0)),
    guestframes.sent_by("02:f3:00:00:00:02", guestframes.ip4(OTHER_IP4, "255.255.255.255", 17, guestframes.udp(9, 9))),
]  # fmt: skip
ATTACHMENTS = 100


@contextlib.contextmanager
def flood(guest: wire.Tap, frames: Sequence[bytes] = FORGED) -> Iterator[None]:
    """The guest sends *frames* again and again, as often as it can without taking a whole core."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for frame in frames:
                    with contextlib.suppress(OSError):  # the tap is down
                        os.write(guest.descriptor, frame)
                time.sleep(0.0005)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Watched:
    """A node whose guest is described but not wired, and the judge at the client."""

    def __init__(self, node: Node, **nic: Any) -> None:
        nodes.add_bridge()
        node.uplink(master="br0")
        self.guest = node.guest()
        manager.write_nic(**{"mode": "bridged", "link": "br0", "filter": "address", "ip": IPS, **nic})
        self.end = attacker.far_end(node)
        self._marks = itertools.count(200)

    def seen(self, *rights: bytes) -> set[bytes]:
        """All frames that have come to the client up to the last of *rights*, which the guest is allowed to send."""
        found = set[bytes]()
        while not found.issuperset(rights):
            frame = self.end.next()
            assert frame is not None, "what is right does not come"
            found.add(frame)
        return found

    def forged(self) -> list[str]:
        """What of the flood has come to the client so far: before what the guest sends now, which is right."""
        right = guestframes.arp(target=f"192.0.2.{next(self._marks)}")
        self.guest.send(right)
        return sorted(frame.hex() for frame in self.seen(right) & set(FORGED))


@pytest.fixture
def watched(node: Node) -> Iterator[Watched]:
    made = Watched(node)
    yield made
    made.end.close()


def moved() -> set[str]:
    """Forged MACs that the bridge believes in."""
    return {one["mac"] for one in tools.ask("bridge -j fdb show br br0") if one["mac"].startswith("02:f3")}


def test_the_flood_would_come_to_the_client(watched: Watched) -> None:
    tools.ip("link set tap0 master br0 up")
    with flood(watched.guest):
        until(lambda: len(moved()) == 2)
    assert len(watched.forged()) == len(FORGED)  # one of the two is the last of them


def test_a_hundred_times_wired_and_unwired_and_no_forged_frame_gets_out(watched: Watched) -> None:
    """Every tenth time the tap itself goes and comes back, as with a new guest."""
    with flood(watched.guest):
        for _ in range(ATTACHMENTS):
            check(call("kvm-ifup-post", "tap0"), 0)
            assert moved() == set()
            check(call("kvm-ifdown", "tap0"), 0)
        check(call("kvm-ifup-post", "tap0"), 0)
    assert moved() == set()
    assert watched.forged() == []


def test_new_addresses_under_a_flood_let_nothing_out_and_drop_nothing_else(watched: Watched) -> None:
    check(call("kvm-ifup-post", "tap0"), 0)
    rights = [guestframes.arp(target=f"192.0.2.{number}") for number in range(100, 120)]
    with flood(watched.guest):
        for number, right in enumerate(rights):
            more = ["203.0.113.7", "2001:db8::77"] if number % 2 else []
            manager.write_nic(mode="bridged", link="br0", filter="address", ip=[*IPS, *more])
            watched.guest.send(right)
            check(call("kvm-ifup-post", "tap0"), 0)
    assert moved() == set()
    assert watched.seen(*rights) & set(FORGED) == set()
    assert watched.forged() == []


@pytest.mark.sweep
@pytest.mark.parametrize("program", ["kvm-ifup-post", "kvm-ifdown"])
def test_killed_at_any_write_no_tap_forwards_without_its_filter(watched: Watched, program: str) -> None:
    number = 0
    with flood(watched.guest):
        while True:
            number += 1
            if program == "kvm-ifdown":
                check(call("kvm-ifup-post", "tap0"), 0)
            for when in ("before", "after"):
                with disturb.disturbed(**{when: disturb.kill(number)}):
                    code = hooks.call_in_child(program, "tap0")
                assert moved() == set(), f"killed {when} write {number}"
            if code != -signal.SIGKILL:
                break
            check(call("kvm-ifup", "gc"), 0)
            assert moved() == set()
    assert number > 4
    check(call("kvm-ifup-post", "tap0"), 0)
    assert watched.forged() == []


def flush() -> None:
    """Somebody clears the firewall."""
    tools.run("nft", "flush", "ruleset")


def test_without_the_agent_check_says_that_the_filter_is_gone(watched: Watched) -> None:
    check(call("kvm-ifup-post", "tap0"), 0)
    assert call("kvm-ifup", "check", "tap0").code == 0
    flush()
    found = call("kvm-ifup", "check", "tap0")
    assert found.code == 1
    assert "filter" in found.out
    check(call("kvm-ifup-post", "tap0"), 0)
    assert call("kvm-ifup", "check", "tap0").code == 0
    with flood(watched.guest):
        time.sleep(0.02)
    assert watched.forged() == []


def test_with_the_agent_a_filter_that_somebody_flushed_is_back_at_once(watched: Watched) -> None:
    """Sooner than at the next look at everything: the kernel has told it."""
    with running():
        check(hooks.hook("kvm-ifup-post", "tap0"), 0)
        with flood(watched.guest):
            time.sleep(0.1)
            assert watched.forged() == []
            flush()
            until(lambda: "tap0" in tools.run("nft", "list", "ruleset"))
            watched.forged()  # what came meanwhile
            time.sleep(0.1)
            assert watched.forged() == []
