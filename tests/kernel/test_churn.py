"""What is there all the time is found, however much others add and remove meanwhile: real churn, real dumps."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import nodes, tools
from harness.nodes import Node
from harness.tools import CLEAN
from kvmifup.node import messages, transport
from kvmifup.node.netlink import Netlink

MANY = 900  # of each: the kernel sends so many in several parts
LOOKS = 60


@contextlib.contextmanager
def churn(family: int, line: Callable[[int, str], str]) -> Iterator[None]:
    """Things come and go, MANY of them at any time: *line* gives the command for number and verb."""
    Path("/run/all").write_text("".join(f"{line(n, 'add')}\n" for n in range(MANY)))
    Path("/run/turns").write_text("".join(f"{line(n, 'del')}\n{line(n, 'add')}\n" for n in range(MANY)))
    tools.ip(f"-{family} -batch /run/all")
    process = subprocess.Popen(
        ["sh", "-c", f"while :; do ip -{family} -force -batch /run/turns; done"],
        env=CLEAN,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def rt(uplinked: Node) -> Iterator[Netlink]:
    """A netlink socket on a node with an uplink and two taps that are up."""
    assert uplinked
    nodes.taps(["tap0", "tap1"])
    tools.ip("link set tap0 up")
    tools.ip("link set tap1 up")
    one = Netlink()
    yield one
    one.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_policy_rule_is_never_overlooked(rt: Netlink, family: int) -> None:
    """The one that a dump leaves out is where one of its parts ends, so there is one everywhere."""
    names = {f"always{n}" for n in range(MANY)}
    lines = [f"rule add iif {name} lookup 100 priority {n}\n" for n, name in enumerate(sorted(names), 1000)]
    Path("/run/always").write_text("".join(lines))
    tools.ip(f"-{family} -batch /run/always")
    with churn(family, lambda n, verb: f"rule {verb} iif other{n} lookup 100 priority {n % 50 + 1}"):
        missing = [names - rt.rules_by_iif(messages.FAMILIES[family]).keys() for _ in range(LOOKS)]
    assert [one for one in missing if one] == []


@pytest.mark.parametrize("family", [4, 6])
def test_a_route_is_never_overlooked(rt: Netlink, family: int) -> None:
    last, net = ("198.51.100.8", "198.18.{}.{}/32") if family == 4 else ("2001:db8:9::8", "2001:db8:1::{:x}:{:x}/128")
    tools.ip(f"-{family} route add {last} dev tap0 table 100")
    raw = messages.packed(last)
    with churn(family, lambda n, verb: f"route {verb} {net.format(n >> 8, n & 255)} dev tap1 table 100"):
        for _ in range(LOOKS):
            assert len([one for one in rt.routes(messages.FAMILIES[family], 100) if raw in one]) == 1


def test_a_neighbour_is_never_overlooked(rt: Netlink) -> None:
    tools.ip("neigh add 198.51.100.8 lladdr 02:00:00:00:00:07 dev tap0 nud permanent")
    index = rt.index("tap0")

    def line(n: int, verb: str) -> str:
        return f"neigh {verb} 198.18.{n >> 8}.{n & 255} lladdr 02:00:00:00:00:08 dev tap1 nud permanent"

    with churn(4, line):
        for _ in range(LOOKS // 3):
            assert rt.neighbours(0)[index or 0, "198.51.100.8"] == (0x80, "02:00:00:00:00:07")


def test_a_dump_in_one_part_is_asked_for_once(rt: Netlink, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    send = transport.Transport.send

    def count(self: transport.Transport, kind: int, flags: int, body: bytes) -> int:
        asked.append(kind)
        return send(self, kind, flags, body)

    rt.link("lo")
    monkeypatch.setattr(transport.Transport, "send", count)
    assert len(rt.links()) == 4
    assert rt.rules(socket.AF_INET, "tap0") == []
    assert rt.routes(socket.AF_INET6, 254) != []
    assert len(asked) == 3
