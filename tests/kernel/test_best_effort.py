"""Announcing is best effort: what keeps a frame from going out is told, and changes nothing else."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from harness import agents, guests, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, GUEST_IP6, IPS
from harness.hooks import call, check, hook, wait_for_children
from harness.nodes import Node
from kvmifup.commands import main
from kvmifup.runs import announcing
from kvmifup.tell import syslog

ROUTED: dict[str, Any] = {"mode": "routed", "ip": [GUEST_IP4, GUEST_IP6]}


def shape(dev: str) -> None:
    """A shaper whose queue holds nothing: whatever is to go out of *dev* is dropped, and the sender told (ENOBUFS)."""
    tools.run("tc", "qdisc", "replace", "dev", dev, "root", "tbf", "rate", "8bit", "burst", "1", "limit", "1")


def forbid(dev: str) -> None:
    """A rule of the firewall: nothing may go out of *dev*."""
    rules = f"table netdev guard {{ chain out {{ type filter hook egress device {dev} priority 0; policy drop; }}; }}"
    tools.run("sh", "-c", f"echo '{rules}' | nft -f -")


def unplugged(dev: str) -> None:
    """*dev* is down (ENETDOWN)."""
    tools.ip(f"link set {dev} down")


HINDRANCES: dict[str, Callable[[str], None]] = {"shaper": shape, "firewall": forbid}


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_post_succeeds_though_nothing_can_be_announced(uplinked: Node, hindrance: str) -> None:
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    HINDRANCES[hindrance]("eth0")
    result = call("kvm-ifup-post", "-v", "tap0")
    assert result.code == 0, result.err
    assert "not announced on eth0: " in result.err
    assert (oracle.routes("tap0"), oracle.proxies()) == ({GUEST_IP4, GUEST_IP6}, {GUEST_IP4, GUEST_IP6})
    wired = snapshots.snapshot()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert snapshots.changes(wired, snapshots.snapshot()) == []


def test_an_uplink_that_takes_nothing_does_not_keep_the_others_from_it(uplinked: Node) -> None:
    tools.ip("link add eth1 type veth peer name far")
    tools.ip("link set eth1 up")
    tools.ip("link set far up")
    for family in (4, 6):
        oracle.sysctl(f"ipv{family}/conf/eth1/forwarding", 1)
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    shape("eth1")
    client = uplinked.listen()
    result = call("kvm-ifup-post", "-v", "tap0", manager.configuration(routed={"uplinks": ["eth1", "eth0"]}))
    assert result.code == 0
    assert "not announced on eth1" in result.err
    assert "not announced on eth0" not in result.err
    heard = uplinked.fence(client)
    assert [len(guests.announcements(heard, address)) for address in (GUEST_IP4, GUEST_IP6)] == [1, 1]


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_each_round_is_for_itself(uplinked: Node, hindrance: str) -> None:
    """The first one is lost; the queue has room again before the later ones."""
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    HINDRANCES[hindrance]("eth0")
    client = uplinked.listen()
    check(hook("kvm-ifup-post", "tap0"), 0)
    if hindrance == "shaper":
        tools.run("tc", "qdisc", "del", "dev", "eth0", "root")
    else:
        tools.run("nft", "delete", "table", "netdev", "guard")
    wait_for_children()
    rounds = len(guests.announcements(uplinked.fence(client), GUEST_IP4))
    assert 1 <= rounds <= 4


def test_the_log_is_told_of_each_round(uplinked: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    shape("eth0")
    monkeypatch.setattr(syslog, "SOCKET", "/run/log")
    later = partial(announcing.repeat_detached, complain=partial(syslog.write, "kvm-ifup-post", syslog.WARNING))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind("/run/log")
        assert main.main("kvm-ifup-post", ["tap0"], {}, io.StringIO(), io.StringIO(), later) == 0
        wait_for_children()
        log.setblocking(False)
        said = []
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(log.recv(4096).decode())
    lines = [line for line in said if "192.0.2.8 and 1 more not announced on eth0: No buffer space" in line]
    assert len(lines) == len(announcing.SCHEDULE), said


def test_a_guest_that_arrives_is_wired_though_nothing_can_be_announced(uplinked: Node) -> None:
    with agents.running() as agent:
        guest = guests.incoming(uplinked, agent, **ROUTED)
        shape("eth0")
        guest.send(guests.rarp())
        agents.until(lambda: agents.phase() == "post")
        assert oracle.routes("tap0") == oracle.proxies() == {GUEST_IP4, GUEST_IP6}
        agents.until(lambda: "not announced on eth0: No buffer space available" in agent.said())


# --- the tap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hinder", [shape, forbid, unplugged], ids=["shaper", "firewall", "down"])
def test_a_guest_that_cannot_be_asked_and_is_silent_has_left(uplinked: Node, hinder: Callable[[str], None]) -> None:
    """What keeps the question out of the tap does not say that the tap is gone. (That of a guest that left is full.)"""
    with agents.running() as agent:
        guests.arrived(uplinked, agent, mode="routed", link="100", ip=IPS)
        hinder("tap0")
        client = uplinked.listen()
        agents.until(lambda: agents.phase() == "post")
        client.send(guests.garp())
        agents.until(lambda: agents.phase() == "pre")
        assert oracle.proxies() == set()
