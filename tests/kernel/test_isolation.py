"""The tests' own safety: never on the host, never silently without what they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import namespaces, nodes, oracle, snapshots, tools
from harness.nodes import Node

pytestmark = pytest.mark.userns  # the tests' own namespaces are made in another way


def test_a_run_in_the_namespace_it_was_started_in_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_started_in", namespaces.netns_id())
    with pytest.raises(pytest.exit.Exception, match="namespace of the host") as ending:
        namespaces.guard()
    assert ending.value.returncode


def test_each_test_has_a_node_that_nothing_has_been_in(node: Node) -> None:
    assert [one["ifname"] for one in tools.ask("link")] == ["lo"]
    assert [place.name for place in Path("/sys/class/net").iterdir()] == ["lo"]
    assert list(Path("/run").iterdir()) == []


def test_without_a_usable_tun_device_a_test_fails_and_is_not_skipped(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "TUN", "/dev/net/no-such-device")
    with pytest.raises(pytest.fail.Exception, match="cannot be opened"):
        nodes.add_tap()


def test_a_difference_between_two_looks_is_told(uplinked: Node) -> None:
    """Each kind of thing that a hook can change is in the snapshot."""
    nodes.add_bridge()
    nodes.add_tap()
    for command, word in (
        ("link set tap0 mtu 1400", "mtu"),
        ("link set tap0 master br0", "master"),
        ("link set tap0 up", "UP"),
        ("link set tap0 addrgenmode none", "inet6_addr_gen_mode"),
        ("addr add 203.0.113.1/24 dev tap0", "203.0.113.1"),
        ("route add 203.0.113.64/32 dev tap0 table 7777", "203.0.113.64"),
        ("-6 rule add iif tap0 lookup 7777", "7777"),
        ("neigh add 203.0.113.2 lladdr 02:00:00:00:00:77 dev tap0", "203.0.113.2"),
        ("neigh add proxy 203.0.113.3 dev eth0", "203.0.113.3"),
    ):
        before = snapshots.snapshot()
        tools.ip(command)
        assert any(word in line for line in snapshots.changes(before, snapshots.snapshot())), command
    before = snapshots.snapshot()
    oracle.sysctl("ipv4/neigh/eth0/proxy_delay", 40)
    assert snapshots.changes(before, snapshots.snapshot()) == [
        "- /proc/sys/net/ipv4/neigh/eth0/proxy_delay:80",
        "+ /proc/sys/net/ipv4/neigh/eth0/proxy_delay:40",
    ]
