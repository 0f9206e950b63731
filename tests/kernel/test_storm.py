"""Many guests at once: the agent does the work of all who come, and what it does for each is about that one."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Sequence

import pytest

from harness import agents, guests, hooks, manager, nodes, oracle, snapshots, tools, wire
from harness.nodes import Node
from kvmifup.agent.runner import Runner
from kvmifup.node import standing
from kvmifup.node.messages import FAMILIES, RTM_NEWNEIGH, RTM_NEWROUTE
from kvmifup.node.netlink import Netlink
from kvmifup.node.nexthops import hops
from kvmifup.node.transport import Transport
from kvmifup.runs.arriving import arrive, prepare_arrival

ARMED, AT_ONCE = range(24), range(100, 124)


def mac(number: int) -> str:
    """The MAC of a guest."""
    return f"aa:00:00:35:{number >> 8:02x}:{number & 255:02x}"


def describe(numbers: Sequence[int], *, incoming: bool) -> None:
    """Taps and NIC files of that many guests, each with an address of either family."""
    lines = "".join(f"tuntap add tap{number} mode tap\n" for number in numbers)
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)
    for number in numbers:
        ips = [f"198.18.0.{number}", f"2001:db8:1::{number}"]
        manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=ips, mac=mac(number), incoming=incoming)


def all_at_once(program: str, numbers: Sequence[int]) -> list[hooks.Result]:
    """A hook for each, started side by side."""
    started = [hooks.start(program, f"tap{number}", "-v") for number in numbers]
    return [hooks.finish(one) for one in started]


def counted(metric: str, **labels: str) -> int:
    """What the agent has counted, once it has ended."""
    which = ",".join(f'{key}="{value}"' for key, value in labels.items())
    text = (manager.RUN_DIR / "metrics.prom").read_text()
    found = re.search(rf"^{metric}{{{which}}} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def test_the_agent_serves_all_who_come_at_once_beside_many_that_are_armed(uplinked: Node) -> None:
    before = snapshots.snapshot_of_kernel()
    with agents.running() as agent:
        describe(ARMED, incoming=True)
        for number in ARMED:
            agents.through("kvm-ifup-pre", f"tap{number}")
        agents.until(lambda: agent.said().count(": armed") >= len(ARMED))
        describe(AT_ONCE, incoming=False)
        for result in all_at_once("kvm-ifup-post", AT_ONCE):
            assert result.code == 0, result.err
            assert "without the agent" not in result.err
        for number in AT_ONCE:
            assert oracle.routes(f"tap{number}") == {f"198.18.0.{number}", f"2001:db8:1::{number}"}
        # And those that are armed still wait for their guests.
        last = f"tap{ARMED[-1]}"
        with contextlib.closing(wire.attach(last)) as guest:
            guest.send(guests.rarp(mac(ARMED[-1])))
            agents.until(lambda: oracle.routes(last) != set())
        for result in all_at_once("kvm-ifdown", [*ARMED, *AT_ONCE]):
            assert result.code == 0, result.err
            assert "without the agent" not in result.err
        for number in (*ARMED, *AT_ONCE):
            tools.ip(f"link del tap{number}")
    for program, many in (("pre", ARMED), ("post", AT_ONCE)):
        assert counted("kvm_ifup_runs_total", program=f"kvm-ifup-{program}", code="0") == len(many)
    assert counted("kvm_ifup_runs_total", program="kvm-ifdown", code="0") == len(ARMED) + len(AT_ONCE)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


def test_at_an_arrival_the_kernel_is_told_of_each_address_and_asked_for_nothing(
    uplinked: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has changed since it was prepared is seen all the same."""
    guests.incoming(uplinked)
    runner = Runner(manager.RUN_DIR, lambda *_: True)
    with runner.session() as session:
        first, prepared = (prepare_arrival("tap0", session) for _ in range(2))
    assert first
    assert prepared
    requests: list[int] = []
    send = Transport.send

    def sending(self: Transport, kind: int, flags: int, body: bytes) -> int:
        requests.append(kind)
        return send(self, kind, flags, body)

    monkeypatch.setattr(Transport, "send", sending)
    oracle.sysctl("ipv4/neigh/eth0/proxy_delay", 40)
    with runner.session("RARP") as session:
        assert arrive(first, session) is None
    oracle.sysctl("ipv4/neigh/eth0/proxy_delay", 0)
    assert requests == []
    with runner.session("RARP") as session:
        arriving = arrive(prepared, session)
        assert arriving
        assert agents.wired() == agents.WIRED
        assert agents.phase() == "…"
        arriving.finish()
    assert agents.phase() == "post"
    assert requests == [RTM_NEWROUTE, RTM_NEWROUTE, RTM_NEWNEIGH, RTM_NEWNEIGH]


def test_without_an_agent_all_who_come_at_once_succeed_as_well(uplinked: Node) -> None:
    describe(AT_ONCE[:12], incoming=False)
    for result in all_at_once("kvm-ifup-post", AT_ONCE[:12]):
        assert result.code == 0, result.err
    for number in AT_ONCE[:12]:
        assert oracle.routes(f"tap{number}") == {f"198.18.0.{number}", f"2001:db8:1::{number}"}


# --- what is kept of the node -------------------------------------------------------------------------------

CHANGES = {
    "another default route": ["route add default via 192.0.2.99 metric 7"],
    "another one of IPv6": ["-6 route add default via 2001:db8::99 metric 7"],
    "one in another table": ["route add default via 192.0.2.99 table 77"],
    "one of IPv6 in another table": ["-6 route add default via 2001:db8::99 table 77"],
    "none any more": ["route del default", "-6 route del default"],
    "an address": ["addr add 203.0.113.9/24 dev eth0", "-6 addr add 2001:db8:7::9/64 dev eth0"],
    "one on lo": ["addr add 203.0.113.9/32 dev lo", "-6 addr add 2001:db8:7::9/128 dev lo"],
    "addresses that go": ["addr flush dev eth0 scope global"],
    "an uplink that goes down": ["link set eth0 down"],
    "an uplink that is renamed": ["link set eth0 down", "link set eth0 name wan0", "link set wan0 up"],
    "an uplink that is gone": ["link del eth0"],
    "a nexthop object": ["nexthop add id 7 via 192.0.2.99 dev eth0", "route replace default nhid 7"],
    "an object that is replaced": [
        "nexthop add id 7 via 192.0.2.99 dev eth0",
        "route replace default nhid 7",
        "nexthop replace id 7 via 192.0.2.98 dev eth0",
    ],
    "a second device": [
        "link add name eth1 type veth peer name far1",
        "addr add 203.0.113.9/24 dev eth1",
        "link set eth1 up",
        "route add default via 203.0.113.1 dev eth1 metric 9 onlink",
    ],
}


def kept(netlink: Netlink) -> tuple[set[str], set[str]]:
    """The addresses that the node has, and the gateways of its default routes, as they are kept."""
    addresses, gateways = set(), set()
    for family in FAMILIES.values():
        addresses |= {address for _, address in standing.own_addresses(family, netlink)}
        found = hops(standing.defaults(family, netlink), netlink.transport)
        gateways |= {hop.gateway for hop in found if hop.gateway}
    return addresses, gateways


def there() -> tuple[set[str], set[str]]:
    """The same, as `ip` tells it."""
    every = [one for link in tools.ask("addr show") for one in link["addr_info"]]
    addresses = {
        f"{one['local']}/{one['prefixlen']}" for one in every if (one["family"], one["scope"]) != ("inet6", "link")
    }
    routes = [*tools.ask("route show table all default"), *tools.ask("-6 route show table all default")]
    gateways = {route["gateway"] for route in routes if "gateway" in route}
    return addresses, gateways


@pytest.fixture
def netlink(uplinked: Node) -> Netlink:
    """Something to ask through, while what has been read is kept."""
    return Netlink()


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_of_the_node_is_what_there_is(netlink: Netlink, change: str) -> None:
    end = standing.keep()
    try:
        assert kept(netlink) == there()
        begun = there()
        for line in CHANGES[change]:
            tools.ip(line)
            assert kept(netlink) == there()
        assert there() != begun
    finally:
        end()
    assert kept(netlink)[1] == there()[1]


def test_more_changes_than_the_socket_holds_are_not_missed(netlink: Netlink) -> None:
    end = standing.keep()
    try:
        kept(netlink)
        lines = "".join(f"link set lo mtu {65536 - number % 2}\n" for number in range(3000))
        subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)
        tools.ip("route replace default via 192.0.2.99")
        assert kept(netlink) == there()
        assert "192.0.2.99" in kept(netlink)[1]
    finally:
        end()


def test_what_is_about_guests_alone_does_not_have_it_read_anew(
    netlink: Netlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps: list[int] = []
    dump = Transport.dump

    def counting(self: Transport, kind: int, *more: object) -> list[bytes]:
        dumps.append(kind)
        return dump(self, kind, *more)  # type: ignore[arg-type]

    end = standing.keep()
    try:
        before = kept(netlink)
        monkeypatch.setattr(Transport, "dump", counting)
        nodes.add_tap("tap5")
        for line in (
            "link set tap5 up", "route add 198.18.0.5 dev tap5", "-6 route add 2001:db8:1::5 dev tap5",
            "rule add iif tap5 lookup 100", "neigh add proxy 198.18.0.5 dev eth0", "link del tap5",
        ):  # fmt: skip
            tools.ip(line)
            assert kept(netlink) == before
        assert dumps == []
        tools.ip("route replace default via 192.0.2.99")
        assert kept(netlink) == there()
        assert dumps != []
    finally:
        end()
