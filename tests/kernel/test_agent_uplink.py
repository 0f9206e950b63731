"""An uplink that was down: the kernel has forgotten for whom the node answers there, and the agent has not."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from harness import agents, guests, manager, nodes, oracle, snapshots, tools
from harness.addresses import CLIENT_IP4, CLIENT_IP6, IPS, NODE_IP4, NODE_IP6
from harness.agents import NOT_WIRED, WIRED, Agent, phase, until, wired
from harness.guests import arrived, garp, incoming, witness
from harness.hooks import check, hook
from harness.nodes import Node

SECOND = {"ip": ["192.0.2.77"], "mac": "aa:00:00:00:00:77"}


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


def down() -> None:
    """As `ifdown eth0` does."""
    tools.ip("link set eth0 down")
    tools.ip("addr flush dev eth0")
    assert oracle.proxies() == set()
    assert tools.ask("route show default") == tools.ask("-6 route show default") == []


def up() -> None:
    """What `ifup eth0` does first."""
    tools.ip("link set eth0 up")


def addressed() -> None:
    """What it does then."""
    oracle.settle("eth0")
    tools.ip(f"addr add {NODE_IP4}/24 dev eth0")
    tools.ip(f"addr add {NODE_IP6}/64 dev eth0")
    tools.ip(f"route add default via {CLIENT_IP4}")
    tools.ip(f"-6 route add default via {CLIENT_IP6}")
    until(lambda: not any("tentative" in one for addr in tools.ask("addr show dev eth0") for one in addr["addr_info"]))


def put_back(agent: Agent) -> int:
    """How often it has said so."""
    return agent.said().count("proxy entries put back")


@pytest.mark.parametrize("withdraw", [True, False])
def test_what_the_uplink_lost_is_back_before_its_default_route_is(uplinked: Node, withdraw: bool) -> None:
    with agents.configured(agent={"withdraw": withdraw}), agents.running() as agent:
        arrived(uplinked, agent)
        before = snapshots.snapshot_of_kernel()
        client = uplinked.listen()
        down()
        up()
        until(lambda: oracle.proxies("eth0") == set(IPS))
        assert tools.ask("route show default") == tools.ask("-6 route show default") == []
        client.until(guests.rounds_of(*IPS))
        addressed()
        witness(uplinked, agent)
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
        assert put_back(agent) == 1
        # The journal knows them as before: nothing is left behind.
        check(hook("kvm-ifdown", "tap0"), 0)
        assert wired() == NOT_WIRED
        assert agent.end() == 0
    assert "\nkvm_ifup_restorations_total 1\n" in (manager.RUN_DIR / "metrics.prom").read_text()


def test_again_and_again(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    for _ in range(5):
        down()
        up()
        until(lambda: oracle.proxies("eth0") == set(IPS))
    assert phase() == "post"


def test_a_carrier_that_was_lost_counts_as_well(uplinked: Node, agent: Agent) -> None:
    """Kernels differ in whether they keep proxy neighbours then: here somebody else removes them."""
    arrived(uplinked, agent)
    with uplinked.client:
        tools.ip("link set eth0 down")
    until(lambda: oracle.link("eth0")["operstate"] != "UP")
    for address in oracle.proxies():
        tools.ip(f"neigh del proxy {address} dev eth0")
    with uplinked.client:
        tools.ip("link set eth0 up")
    until(lambda: oracle.proxies("eth0") == set(IPS))


def test_where_nothing_was_lost_nothing_is_said_or_sent(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", **SECOND)
    client = uplinked.listen()
    journal = agents.journal()
    agent.send(signal.SIGSTOP)
    down()
    up()
    for address in IPS:  # somebody is quicker
        tools.ip(f"neigh add proxy {address} dev eth0")
    agent.send(signal.SIGCONT)
    agent.heard("put back for 1 NIC")
    oracle.settle("eth0")
    said = uplinked.fence(client)
    assert [guests.announcements(said, address) for address in IPS] == [[], []]
    assert guests.announcements(said, "192.0.2.77") != []
    assert agents.journal() == journal


def test_a_guest_that_has_not_arrived_is_left_alone(uplinked: Node, agent: Agent) -> None:
    incoming(uplinked, agent)
    arrived(uplinked, agent, "tap1", **SECOND)
    down()
    up()
    agent.heard("put back for 1 NIC")
    assert (phase(), oracle.proxies()) == ("pre", {"192.0.2.77"})
    assert oracle.routes("tap0") == set()


def test_a_guest_that_was_withdrawn_is_left_alone(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", **SECOND)
    uplinked.listen().send(garp())
    until(lambda: phase() == "pre")
    down()
    up()
    agent.heard("put back for 1 NIC")
    assert (phase(), oracle.proxies()) == ("pre", {"192.0.2.77"})


def test_a_tap_that_has_vanished_meanwhile_does_no_harm(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", **SECOND)
    agent.send(signal.SIGSTOP)
    down()
    tools.ip("link del tap0")
    up()
    agent.send(signal.SIGCONT)
    agent.heard("put back for 1 NIC")
    until(lambda: phase() is None)
    assert oracle.proxies() == {"192.0.2.77"}
    assert "not put back" not in agent.said()


def test_a_failure_is_said_keeps_nobody_from_theirs_and_is_tried_again(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", **SECOND)
    down()
    tools.ip("link set eth0 mtu 1000")  # too small for IPv6: the device has none
    up()
    agent.heard("not put back on eth0", "tap0")
    until(lambda: oracle.proxies() == {"192.0.2.77"})
    tools.ip("link set eth0 mtu 1500")
    until(lambda: oracle.proxies() == {*IPS, "192.0.2.77"})
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "1"
    assert agent.said().count("not put back") == 1


def test_whoever_is_busy_with_a_nic_is_waited_for_after_the_others(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", **SECOND)
    with agents.locked("tap0"):
        down()
        up()
        until(lambda: oracle.proxies() == {"192.0.2.77"})
    until(lambda: oracle.proxies() == {*IPS, "192.0.2.77"})
    assert "not put back" not in agent.said()


def test_an_uplink_that_is_made_anew(uplinked: Node, agent: Agent) -> None:
    """As `ifdown eth0.100; ifup eth0.100` makes a VLAN's device."""
    arrived(uplinked, agent)
    tools.ip("link del eth0")
    assert oracle.proxies() == set()
    uplinked.uplink()
    until(lambda: wired() == WIRED)
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == "0"
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "1"
    client = uplinked.listen()

    guests.withdraw(client)


def test_many_guests(uplinked: Node, agent: Agent) -> None:
    addresses = {f"tap{number}": f"192.0.2.{50 + number}" for number in range(20)}
    for number, (tap, address) in enumerate(addresses.items()):
        nodes.add_tap(tap)
        manager.write_nic(tap, f"web{number}", mode="routed", ip=[address])
        check(hook("kvm-ifup-post", tap), 0)
    witness(uplinked, agent)
    down()
    up()
    until(lambda: oracle.proxies() == set(addresses.values()))
    agent.heard("put back for 20 NICs")


def test_events_that_were_lost_are_made_up_for(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    agent.send(signal.SIGSTOP)
    tools.run("sh", "-c", "yes 'link set dev lo mtu 65535\nlink set dev lo mtu 65536' | head -4000 | ip -batch -")
    down()
    up()
    agent.send(signal.SIGCONT)
    until(lambda: oracle.proxies("eth0") == set(IPS))
