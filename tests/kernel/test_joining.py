"""A tap that joins a bridge: no frame passes before what restricts it is in force, wherever it was before."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from harness import disturb, hooks, manager, nodes, snapshots, tools
from harness.hooks import call, check
from harness.nodes import Node
from harness.oracle import link
from harness.wire import BROADCAST, Tap, ethernet
from tests.kernel.test_port_options import NEW, port

STRANGER_MAC = "02:00:00:00:00:99"
ETH_P_TEST = 0x88B5
ROUNDS = 50


@pytest.fixture
def bridges(node: Node) -> Node:
    """A node with two bridges, each with another isolated guest on it."""
    for number, bridge in enumerate(("br0", "br1")):
        nodes.add_bridge(bridge)
        other = node.guest(f"tap{8 + number}")
        os.set_blocking(other.descriptor, False)
        tools.ip(f"link set {other.name} master {bridge} up")
        tools.run("bridge", "link", "set", "dev", other.name, "isolated", "on")
    return node


def described(bridge: str, **more: Any) -> None:
    """The NIC file of an isolated guest."""
    manager.write_nic(mode="bridged", link=bridge, isolated=True, **more)


@contextlib.contextmanager
def flooding(*senders: Callable[[], object]) -> Iterator[list[int]]:
    """Meanwhile everybody sends as fast as he can; yields how often each of them has done so."""
    over = threading.Event()
    counts = [0] * len(senders)

    def flood(number: int) -> None:
        while not over.wait(0.0001):
            with contextlib.suppress(OSError):  # a tap that is down takes nothing, and a full queue neither
                senders[number]()
                counts[number] += 1

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(len(senders))]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        over.set()
        for thread in threads:
            thread.join()


def heard(tap: Tap, source: str) -> int:
    """How many frames of *source* have reached the guest behind *tap*."""
    found = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            frame = os.read(tap.descriptor, 2048)
            found += frame[6:14] == bytes.fromhex(source.replace(":", "")) + struct.pack("!H", ETH_P_TEST)
    return found


def frame(source: str) -> bytes:
    return ethernet(BROADCAST, source, ETH_P_TEST, bytes(46))


GUEST = "aa:00:00:35:ac:01"


@pytest.mark.parametrize("way", ["between bridges", "from nowhere, up", "undone"])
def test_no_frame_passes_between_isolated_guests_while_one_of_them_joins(bridges: Node, way: str) -> None:
    guest = bridges.guest()
    os.set_blocking(guest.descriptor, False)
    others = bridges.taps[:2]
    senders = [lambda tap=tap: tap.send(frame(STRANGER_MAC)) for tap in others]
    if way == "undone":
        tools.ip("link set tap0 up master br1")
        tools.run("bridge", "link", "set", "dev", "tap0", "isolated", "on")
    with flooding(lambda: guest.send(frame(GUEST)), *senders) as counts:
        for number in range(ROUNDS):
            if way == "from nowhere, up":
                tools.ip("link set tap0 nomaster up")
            described("br1" if way == "between bridges" and number % 2 else "br0")
            check(call("kvm-ifup-post", "tap0"), 0)
            assert port()["isolated"]
            if way == "undone":
                check(call("kvm-ifdown", "tap0"), 0)
                assert link("tap0")["master"] == "br1"
                assert port()["isolated"]
            got = [heard(tap, GUEST) for tap in others]
            assert (got, heard(guest, STRANGER_MAC)) == ([0, 0], 0), f"round {number}"
    assert min(counts) > ROUNDS
    # Or nothing could have passed: whoever is not isolated is heard.
    tools.run("bridge", "link", "set", "dev", "tap0", "isolated", "off")
    guest.send(frame(GUEST))
    assert sum(heard(tap, GUEST) for tap in others) == 1


# What a tap may have on a bridge before us. All of it goes when it leaves.
FOREIGN = [
    "isolated on",
    "learning off flood off",
    "hairpin on mcast_router 0",
    "guard on root_block on fastleave on",
    "mcast_flood off bcast_flood off neigh_suppress on mcast_to_unicast on",
]
NICS: dict[str, dict[str, Any]] = {
    "bridged": {"mode": "bridged", "link": "br0"},
    "bridged, isolated": {"mode": "bridged", "link": "br0", "isolated": True},
    "routed": {"mode": "routed", "ip": ["192.0.2.8", "2001:db8::8"]},
}


def elsewhere(options: str, nic: str, state: str = "up") -> snapshots.Snapshot:
    """tap0 is on a bridge of somebody else's, with *options*."""
    for bridge in ("br0", "br1"):
        nodes.add_bridge(bridge)
    nodes.add_tap()
    tools.ip(f"link set tap0 {state} master br1")
    tools.run("bridge", "link", "set", "dev", "tap0", *options.split())
    manager.write_nic(**NICS[nic])
    return snapshots.snapshot()


@pytest.mark.parametrize(
    ("options", "nic"), [(one, "bridged") for one in FOREIGN] + [(FOREIGN[0], nic) for nic in list(NICS)[1:]]
)
def test_down_puts_a_tap_back_on_its_bridge_with_all_that_it_had(uplinked: Node, options: str, nic: str) -> None:
    before = elsewhere(options, nic)
    check(call("kvm-ifup-post", "tap0"), 0)
    assert nic == "routed" or port() == {**NEW, "mcast_router": 2, "isolated": "isolated" in nic}
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot()) == []


@pytest.mark.parametrize(("nic", "state"), [*((nic, "up") for nic in NICS), ("bridged", "down")])
def test_a_failure_puts_it_back_and_lets_nothing_pass_meanwhile(uplinked: Node, nic: str, state: str) -> None:
    before = elsewhere("isolated on learning off", nic, state)
    opened = []

    def look(_number: int, op: Any) -> None:
        now = link("tap0")
        if now.get("master") == "br1" and "UP" in now["flags"] and not port()["isolated"]:
            opened.append(op)

    for number in count(1, 3):
        refuse = disturb.refuse(number)
        with disturb.disturbed(before=refuse, after=look):
            code = call("kvm-ifup-post", "tap0").code
        if code == 0:
            break
        assert (code, opened) == (71, [])
        assert snapshots.changes(before, snapshots.snapshot()) == [], f"write {number}"
    assert number > 8


@pytest.mark.parametrize("nic", NICS)
def test_a_killed_move_is_undone_with_all_that_the_tap_had(uplinked: Node, nic: str) -> None:
    before = elsewhere("isolated on flood off", nic)
    for kind in ("LinkMaster", "LinkAddress", "LinkUp"):

        def kill(_number: int, op: Any, kind: str = kind) -> None:
            if type(op).__name__ == kind:
                disturb.kill(1)(1, op)

        with disturb.disturbed(after=kill):
            code = hooks.call_in_child("kvm-ifup-post", "tap0")
        assert code == -9 or (kind, nic) == ("LinkUp", "routed")  # it has stayed up
        check(call("kvm-ifup", "gc") if code else call("kvm-ifdown", "tap0"), 0)
        assert snapshots.changes(before, snapshots.snapshot()) == [], kind


def test_a_tap_that_was_up_on_no_bridge_is_up_again_after_a_failure(node: Node) -> None:
    """It is set down to join; the write that sets it up again is never reached."""
    nodes.add_bridge()
    nodes.add_tap()
    tools.ip("link set tap0 up")
    described("br0")
    before = snapshots.snapshot()

    def refuse(_number: int, op: Any) -> None:
        if type(op).__name__ == "PortOption":
            disturb.refuse(1)(1, op)

    with disturb.disturbed(before=refuse):
        assert call("kvm-ifup-post", "tap0").code == 71
    assert [one for one in snapshots.changes(before, snapshots.snapshot()) if "br0" not in one] == []


def test_a_tap_that_joins_is_never_up_before_its_options_are_set(node: Node) -> None:
    """As the kernel itself tells of it."""
    nodes.add_bridge()
    nodes.add_bridge("br1")
    node.guest()
    described("br1")
    check(call("kvm-ifup-post", "tap0"), 0)
    described("br0", hairpin=True, learning=False)
    seen = []

    def look(_number: int, op: Any) -> None:
        now = link("tap0")
        if now.get("master") == "br0" and "UP" in now["flags"]:
            seen.append(port())

    with disturb.disturbed(after=look):
        check(call("kvm-ifup-post", "tap0"), 0)
    wanted = {"isolated": True, "hairpin": True, "learning": False, "mcast_router": 2}
    assert seen
    assert all(one == wanted for one in seen)


def test_check_does_not_call_what_is_only_done_once_more_a_difference(node: Node) -> None:
    nodes.add_bridge()
    node.guest()
    described("br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link set tap0 nomaster")
    said = call("kvm-ifup", "check")
    assert said.code == 1
    assert "tap0 bridge: none -> br0" in said.out
    assert "tap0 state" not in said.out
    assert "tap0 state: up (once more)" in call("kvm-ifup-post", "tap0", "--plan").out
