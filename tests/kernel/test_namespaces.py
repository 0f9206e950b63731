"""Two network namespaces that see one /run: what is wired in one is nobody's business in the other."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import agents, manager, nodes, oracle, snapshots, tools
from harness.addresses import GUEST_IP4, IPS
from harness.agents import STATE, phase, until, wired
from harness.guests import witness
from harness.hooks import call, check, hook
from harness.namespaces import Namespace
from harness.nodes import Node
from harness.oracle import sysctl

pytestmark = pytest.mark.userns  # enters and compares namespaces

NIC: dict[str, Any] = {"mode": "routed", "link": "100", "ip": IPS}
PROXY_DELAY = "ipv4/neigh/eth0/proxy_delay"


def number() -> str:
    """The namespace that this process is in, as lsns shows it."""
    return str(Path("/proc/self/ns/net").stat().st_ino)


@pytest.fixture
def other(uplinked: Node) -> Iterator[Namespace]:
    """A second namespace, with an uplink of its own. Here, tap0 is there and described, and not yet wired."""
    nodes.add_tap()
    manager.write_nic(**NIC)
    second = Namespace()
    with second:
        nodes.quieten()
        tools.ip("link set lo up")
        client = Namespace()
        Node(client).uplink()
    yield second
    client.close()
    second.close()


def wire(tap: str = "tap0") -> None:
    """Have *tap* wired where this process is."""
    check(hook("kvm-ifup-post", tap), 0)


def wire_in(other: Namespace, **nic: Any) -> None:
    """A guest on tap1, wired in *other*."""
    manager.write_nic("tap1", "web2", **{**NIC, "mac": "aa:00:00:00:00:01", "ip": ["192.0.2.9", "2001:db8::9"], **nic})
    with other:
        nodes.add_tap("tap1")
        check(hook("kvm-ifup-post", "tap1"), 0)


@pytest.mark.parametrize("option", [(), ("--plan",), ("--json",)])
def test_gc_says_how_many_it_leaves_alone_and_where_they_belong(other: Namespace, option: tuple[str, ...]) -> None:
    wire()
    here, before = number(), snapshots.snapshot()
    with other:
        result = hook("kvm-ifup", "gc", *option)
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert f"network namespace {here} left alone: 1" in result.err
    assert snapshots.changes(before, snapshots.snapshot()) == []
    assert wired()[0] == set(IPS)
    check(hook("kvm-ifup", "gc", *option), 0)


def test_gc_clears_up_where_the_tap_was(other: Namespace) -> None:
    """Nowhere else, dead or alive."""
    tools.ip("link del tap0")
    without = snapshots.snapshot()
    nodes.add_tap()
    wire()
    tools.ip("link del tap0")
    dead = snapshots.snapshot()
    with other:
        assert "left alone: 1" in call("kvm-ifup", "gc").err
    assert snapshots.changes(dead, snapshots.snapshot()) == []
    check(call("kvm-ifup", "gc"), 0)
    assert snapshots.changes(without, snapshots.snapshot()) == []


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post", "kvm-ifdown"])
@pytest.mark.parametrize("there", ["a tap of that name", "none"])
@pytest.mark.parametrize("how", ["tap", "instance", "environment", "nothing"])
def test_a_hook_for_a_tap_that_is_wired_elsewhere_is_69_and_nothing_changes(
    other: Namespace, program: str, there: str, how: str
) -> None:
    wire()
    argv, environ = ("tap0",), {}
    if how == "instance":
        argv = ("--instance", "web1.example.com")  # type: ignore[assignment]
    elif how == "environment":
        environ = manager.ganeti(MODE="routed", LINK="100", IP=GUEST_IP4)
    elif how == "nothing":
        (manager.RUN_DIR / "nic/web1.example.com/0.toml").unlink()
        (manager.RUN_DIR / "tap/tap0").unlink()
    here, before = number(), snapshots.snapshot()
    with other:
        if there != "none":
            nodes.add_tap()
        elsewhere = snapshots.snapshot()
        for more in ((), ("--plan",)):
            result = call(program, *argv, *more, environ=environ)
            check(result, 69, "tap0", f"network namespace {here}", f"this is {number()}", "run it there")
        assert snapshots.changes(elsewhere, snapshots.snapshot()) == []
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_once_its_journal_is_gone_the_name_is_free(other: Namespace) -> None:
    """What the message says of a namespace that exists no more."""
    wire()
    (STATE / "tap0.json").unlink()
    with other:
        nodes.add_tap()
        wire()
        assert wired()[0] == set(IPS)


def test_an_address_is_no_conflict_and_an_uplinks_value_not_shared(other: Namespace) -> None:
    """Each namespace has its own eth0; what was there before any of us differs."""
    sysctl(PROXY_DELAY, 33)
    before = snapshots.snapshot_of_kernel()
    with other:
        sysctl(PROXY_DELAY, 44)
        untouched = snapshots.snapshot_of_kernel()
    wire()
    wire_in(other, ip=IPS)
    assert sysctl(PROXY_DELAY) == "0"
    assert wired()[0] == set(IPS)
    with other:
        assert sysctl(PROXY_DELAY) == "0"
        assert oracle.proxies() == set(IPS)
    check(hook("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    with other:
        assert sysctl(PROXY_DELAY) == "0"
        assert oracle.proxies() == set(IPS)
        check(hook("kvm-ifdown", "tap1"), 0)
        tools.ip("link del tap1")
        assert snapshots.changes(untouched, snapshots.snapshot_of_kernel()) == []


def test_instances_are_those_of_this_namespace(other: Namespace) -> None:
    """The journal alone gives a guest its taps, once its NIC files are gone."""
    manager.write_nic("tap1", "web1.example.com", 1, mode="routed", ip=["192.0.2.9"])
    with other:
        nodes.add_tap("tap1")
        check(hook("kvm-ifup-post", "tap1"), 0)
    wire()
    for index in (0, 1):
        (manager.RUN_DIR / f"nic/web1.example.com/{index}.toml").unlink()
    check(hook("kvm-ifdown", "--instance", "web1.example.com"), 0)
    assert wired() == agents.NOT_WIRED
    with other:
        assert oracle.proxies() == {"192.0.2.9"}


def test_show_and_check_are_about_this_namespace(other: Namespace) -> None:
    for family in (4, 6):
        tools.ip(f"-{family} rule add iif eth0 lookup 100")  # as the administrator of a table has to
    wire()
    wire_in(other)
    for command in (("show",), ("check", "-v"), ("show", "--json"), ("check", "--json")):
        result = call("kvm-ifup", *command)
        check(result, 0)
        assert "tap0" in result.out
        assert "tap1" not in result.out
    with other:
        there = number()
        result = call("kvm-ifup", "show")
        assert "tap1" in result.out
        assert "tap0" not in result.out
    for name in ("tap1", "web2"):
        shown = call("kvm-ifup", "show", name)
        check(shown, 0)
        assert f"network namespace {there}" in shown.out
        assert "its tap is gone" not in shown.out
        checked = call("kvm-ifup", "check", name, "--repair")
        assert (checked.code, checked.err) == (1, "")
        assert f"network namespace {there}" in checked.out
    with other:
        assert oracle.proxies() == {"192.0.2.9", "2001:db8::9"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_agent_looks_after_its_own_namespace(uplinked: Node, other: Namespace, how: signal.Signals) -> None:
    """Neither when it starts nor when a journal appears or changes does it touch another's."""
    with agents.running() as agent:
        wire_in(other, incoming=True)
        with other:
            before = snapshots.snapshot()
        witness(uplinked, agent)
        wire()
        with other:
            check(hook("kvm-ifup-post", "tap1", "--announce"), 0)
        witness(uplinked, agent)
        assert "tap1" not in agent.said()
        agent.end(how)
    with agents.running() as agent:
        witness(uplinked, agent)
        tools.ip("link del tap0")
        until(lambda: phase("tap0") is None)
        assert oracle.proxies() == set()
        assert "web2" not in agent.said()
    with other:
        assert phase("tap1") == "post"
        assert [line for line in snapshots.changes(before, snapshots.snapshot()) if "/run/kvm-ifup/" not in line] == []


def test_an_agent_elsewhere_leaves_this_namespace_alone(uplinked: Node, other: Namespace) -> None:
    wire()
    wire_in(other)
    before = snapshots.snapshot()
    with other, agents.running():
        tools.ip("link del tap1")  # and it looks at all journals by then
        until(lambda: phase("tap1") is None)
    changes = snapshots.changes(before, snapshots.snapshot())
    assert [line for line in changes if "/state/tap1" not in line and "agent.lock" not in line] == []
    assert phase() == "post"
