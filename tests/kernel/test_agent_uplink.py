"""An uplink that was down, has moved or has another name: the node answers for its guests where the uplink is now."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness import agents, guests, manager, nodes, oracle, snapshots, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, GUEST_IP4, GUEST_IP6, IPS, NODE_IP4, NODE_IP6
from harness.agents import NOT_WIRED, WIRED, Agent, phase, until, wired
from harness.guests import answering, arrived, garp, incoming, rarp, witness
from harness.hooks import check, hook
from harness.nodes import Node

SECOND: dict[str, Any] = {"ip": ["192.0.2.77"], "mac": "aa:00:00:00:00:77"}


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


@pytest.fixture
def guest(uplinked: Node, agent: Agent) -> Iterator[wire.Tap]:
    """A guest that has arrived, and answers."""
    tap = arrived(uplinked, agent)
    with answering(tap):
        yield tap


@pytest.fixture
def second(uplinked: Node, agent: Agent) -> Iterator[wire.Tap]:
    """Another one."""
    tap = arrived(uplinked, agent, "tap1", **SECOND)
    with answering(tap, SECOND["mac"]):
        yield tap


def down() -> None:
    """As `ifdown eth0` does."""
    tools.ip("link set eth0 down")
    tools.ip("addr flush dev eth0")
    assert oracle.proxies() == set()
    assert tools.ask("route show default") == tools.ask("-6 route show default") == []


def up() -> None:
    """What `ifup eth0` does first."""
    tools.ip("link set eth0 up")


def addressed(dev: str = "eth0") -> None:
    """What it does then."""
    oracle.settle(dev)
    tools.ip(f"addr add {NODE_IP4}/24 dev {dev}")
    tools.ip(f"addr add {NODE_IP6}/64 dev {dev}")
    tools.ip(f"route add default via {CLIENT_IP4}")
    tools.ip(f"-6 route add default via {CLIENT_IP6}")
    while any("tentative" in one for addr in tools.ask(f"addr show dev {dev}") for one in addr["addr_info"]):
        pass  # soon over: nobody is asked


def mended(agent: Agent, tap: str = "tap0") -> int:
    """How often it has said so."""
    return agent.said().count(f"({tap}): mended")


# --- it was down ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("withdraw", [True, False])
def test_what_the_uplink_lost_is_back_before_its_default_route_is(uplinked: Node, withdraw: bool) -> None:
    with agents.configured(agent={"withdraw": withdraw}), agents.running() as agent:
        guest = arrived(uplinked, agent)
        before = snapshots.snapshot_of_kernel()
        client = uplinked.listen()
        with answering(guest):
            down()
            up()
            until(lambda: oracle.proxies("eth0") == set(IPS))
        assert tools.ask("route show default") == tools.ask("-6 route show default") == []
        client.until(guests.rounds_of(*IPS))
        addressed()
        witness(uplinked, agent)
        assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
        assert mended(agent) == 1
        # The journal knows them as before: nothing is left behind.
        check(hook("kvm-ifdown", "tap0"), 0)
        assert wired() == NOT_WIRED
        assert agent.end() == 0
    assert "\nkvm_ifup_mends_total 1\n" in (manager.RUN_DIR / "metrics.prom").read_text()


@pytest.mark.usefixtures("guest")
def test_again_and_again() -> None:
    for _ in range(5):
        down()
        up()
        until(lambda: oracle.proxies("eth0") == set(IPS))
    assert phase() == "post"


def lose_carrier(uplinked: Node) -> None:
    """For a moment. Kernels differ in whether they keep proxy neighbours then: here somebody else removes them."""
    with uplinked.client:
        tools.ip("link set eth0 down")
    until(lambda: oracle.link("eth0")["operstate"] != "UP")
    for address in oracle.proxies():
        tools.ip(f"neigh del proxy {address} dev eth0")
    with uplinked.client:
        tools.ip("link set eth0 up")


@pytest.mark.usefixtures("guest")
def test_a_carrier_that_was_lost_counts_as_well(uplinked: Node) -> None:
    lose_carrier(uplinked)
    until(lambda: oracle.proxies("eth0") == set(IPS))


@pytest.mark.usefixtures("guest", "second")
def test_where_nothing_was_lost_nothing_is_said_or_sent(uplinked: Node, agent: Agent) -> None:
    client = uplinked.listen()
    journal = agents.journal()
    agent.send(signal.SIGSTOP)
    down()
    up()
    for address in IPS:  # somebody is quicker
        tools.ip(f"neigh add proxy {address} dev eth0")
    agent.send(signal.SIGCONT)
    agent.heard("(tap1): mended")
    oracle.settle("eth0")
    said = uplinked.fence(client)
    assert [guests.announcements(said, address) for address in IPS] == [[], []]
    assert guests.announcements(said, "192.0.2.77") != []
    assert agents.journal() == journal


@pytest.mark.usefixtures("second")
def test_a_guest_that_has_not_arrived_is_left_alone(uplinked: Node, agent: Agent) -> None:
    incoming(uplinked, agent)
    down()
    up()
    agent.heard("(tap1): mended")
    assert (phase(), oracle.proxies()) == ("pre", {"192.0.2.77"})
    assert oracle.routes("tap0") == set()


@pytest.mark.usefixtures("second")
def test_a_guest_that_was_withdrawn_is_left_alone(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    uplinked.listen().send(garp())
    until(lambda: phase() == "pre")
    down()
    up()
    agent.heard("(tap1): mended")
    assert (phase(), oracle.proxies()) == ("pre", {"192.0.2.77"})


@pytest.mark.parametrize("way", ["down", "no carrier", "another device"])
def test_a_guest_that_left_meanwhile_is_not_announced_again(uplinked: Node, agent: Agent, way: str) -> None:
    guest = arrived(uplinked, agent)  # it will not answer: it runs elsewhere, and nobody could tell us
    heard = uplinked.listen()
    tools.ip(f"neigh del proxy {GUEST_IP4} dev eth0")
    until(lambda: oracle.proxies("eth0") == set(IPS))  # as long as we have heard everything, it need not be asked
    until(lambda: mended(agent))
    heard.until(guests.rounds_of(GUEST_IP4))  # all that there are of this
    if way == "down":
        down()
        client = uplinked.listen()
        up()
        addressed()
    elif way == "no carrier":
        lose_carrier(uplinked)
        oracle.settle("eth0")
        client = uplinked.listen()
    else:
        tools.ip("link del eth0")
        uplinked.uplink()
        oracle.sysctl("ipv4/conf/eth0/forwarding", 1)
        client = uplinked.listen()
    until(lambda: phase() == "pre")
    agent.heard("tap0", "does not answer here any more")
    witness(uplinked, agent)
    assert wired() == NOT_WIRED
    assert guests.announcements(uplinked.fence(client), GUEST_IP4) == []
    agent.armed(times=2)
    # It is listened for, and if it was only asleep, it is back with its first frame.
    guest.send(rarp())
    until(lambda: wired() == WIRED)


def test_who_does_not_answer_keeps_nobody_waiting(uplinked: Node, agent: Agent) -> None:
    for number in range(20):
        uplinked.guest(f"tap{number}")
        mac = f"aa:00:00:00:02:{number:02x}"
        manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=[f"192.0.2.{50 + number}"], mac=mac)
        check(hook("kvm-ifup-post", f"tap{number}"), 0)
    last = arrived(uplinked, agent, "taplast", **SECOND)
    with answering(last, SECOND["mac"]):
        witness(uplinked, agent)
        down()
        up()
        until(lambda: oracle.proxies() == {"192.0.2.77"})
        until(lambda: all(phase(f"tap{number}") == "pre" for number in range(20)))
    assert oracle.proxies() == {"192.0.2.77"}


@pytest.mark.usefixtures("second")
def test_a_tap_that_has_vanished_meanwhile_does_no_harm(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    agent.send(signal.SIGSTOP)
    down()
    tools.ip("link del tap0")
    up()
    agent.send(signal.SIGCONT)
    agent.heard("(tap1): mended")
    until(lambda: phase() is None)
    assert oracle.proxies() == {"192.0.2.77"}
    assert "cannot be mended" not in agent.said()


@pytest.mark.usefixtures("guest", "second")
def test_one_family_that_cannot_be_put_back_keeps_the_other_from_nothing(agent: Agent) -> None:
    down()
    tools.ip("link set eth0 mtu 1000")  # too small for IPv6: the device has none
    up()
    until(lambda: oracle.proxies() == {GUEST_IP4, "192.0.2.77"})
    tools.ip("link set eth0 mtu 1500")
    tools.ip("link set eth0 down")
    up()
    until(lambda: oracle.proxies() == {*IPS, "192.0.2.77"})
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "1"


@pytest.mark.usefixtures("guest", "second")
def test_whoever_is_busy_with_a_nic_is_waited_for_after_the_others(agent: Agent) -> None:
    with agents.locked("tap0"):
        down()
        up()
        until(lambda: oracle.proxies() == {"192.0.2.77"})
    until(lambda: oracle.proxies() == {*IPS, "192.0.2.77"})
    assert "cannot be mended" not in agent.said()


@pytest.mark.usefixtures("guest")
def test_an_uplink_that_is_made_anew(uplinked: Node) -> None:
    """As `ifdown eth0.100; ifup eth0.100` makes a VLAN's device."""
    tools.ip("link del eth0")
    assert oracle.proxies() == set()
    uplinked.uplink()
    until(lambda: wired() == WIRED)
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == "0"
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "1"


def test_who_is_announced_elsewhere_on_an_uplink_made_anew_is_withdrawn(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    with answering(guest):
        tools.ip("link del eth0")
        uplinked.uplink()
        until(lambda: wired() == WIRED)
    guests.withdraw(uplinked.listen())


def test_many_guests(uplinked: Node, agent: Agent) -> None:
    addresses = {f"tap{number}": f"192.0.2.{50 + number}" for number in range(20)}
    for number, (tap, address) in enumerate(addresses.items()):
        nodes.add_tap(tap)
        manager.write_nic(tap, f"web{number}", mode="routed", ip=[address])
        check(hook("kvm-ifup-post", tap), 0)
    witness(uplinked, agent)
    tools.run("sh", "-c", "ip neigh show proxy | sed 's/ *proxy//; s/^/neigh del proxy /' | ip -batch -")
    assert oracle.proxies() == set()
    until(lambda: oracle.proxies() == set(addresses.values()))


@pytest.mark.usefixtures("guest")
def test_events_that_were_lost_are_made_up_for(agent: Agent) -> None:
    agent.send(signal.SIGSTOP)
    tools.run("sh", "-c", "yes 'link set dev lo mtu 65535\nlink set dev lo mtu 65536' | head -4000 | ip -batch -")
    down()
    up()
    agent.send(signal.SIGCONT)
    until(lambda: oracle.proxies("eth0") == set(IPS))


# --- it is another one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ip", [[GUEST_IP4], [GUEST_IP6], IPS], ids=["IPv4", "IPv6", "both"])
def test_a_default_route_that_comes_after_post(uplinked: Node, ip: list[str]) -> None:
    """From DHCP, a router advertisement or a routing daemon."""
    tools.ip("route del default")
    tools.ip("-6 route del default")
    with agents.running():
        arrived_without_uplink(uplinked, ip)
        assert oracle.proxies() == set()
        client = uplinked.listen()
        tools.ip(f"route add default via {CLIENT_IP4}")
        tools.ip(f"-6 route add default via {CLIENT_IP6}")
        until(lambda: oracle.proxies("eth0") == set(ip))
        client.until(guests.rounds_of(*ip))


def arrived_without_uplink(uplinked: Node, ip: list[str]) -> None:
    """A guest that has been started on a node without an uplink."""
    uplinked.guest()
    manager.write_nic("tap0", "web1", mode="routed", ip=ip)
    check(hook("kvm-ifup-post", "tap0"), 0)


def second_uplink() -> None:
    """A second device to the outside."""
    tools.ip("link add eth1 type veth peer name peer1")
    tools.ip("link set peer1 up")
    tools.ip("link set eth1 up")
    tools.ip("addr add 198.51.100.2/24 dev eth1")
    tools.ip("addr add 2001:db8:1::2/64 dev eth1 nodad")
    for family in (4, 6):
        oracle.sysctl(f"ipv{family}/conf/eth1/forwarding", 1)
    until(lambda: [oracle.link(dev)["operstate"] for dev in ("eth1", "peer1")] == ["UP", "UP"])


def move_at_once() -> None:
    """Both default routes lead out of eth1 now."""
    tools.ip("route replace default via 198.51.100.1")
    tools.ip("-6 route del default")
    tools.ip("-6 route add default via 2001:db8:1::1")


def move_with_a_pause() -> None:
    """There is none meanwhile."""
    tools.ip("route del default")
    tools.ip("-6 route del default")
    time.sleep(1)
    tools.ip("route add default via 198.51.100.1")
    tools.ip("-6 route add default via 2001:db8:1::1")


@pytest.mark.parametrize("move", [move_at_once, move_with_a_pause])
def test_a_default_route_that_moves_takes_the_proxies_with_it(
    uplinked: Node, agent: Agent, move: Callable[[], None]
) -> None:
    second_uplink()
    clean = snapshots.snapshot_of_kernel()
    arrived(uplinked, agent)
    with wire.packet_socket("peer1") as there:
        seen = wire.Wire(there, "peer1")
        move()
        until(lambda: (oracle.proxies("eth0"), oracle.proxies("eth1")) == (set(), set(IPS)))
        seen.until(guests.rounds_of(*IPS))
    agent.heard("tap0", "mended", "eth1")
    # The old uplink's settings are as they were, and kvm-ifdown cleans up the new one.
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == "80"
    check(hook("kvm-ifdown", "tap0"), 0)
    tools.ip("link del tap0")
    tools.ip(f"route replace default via {CLIENT_IP4}")
    tools.ip("-6 route del default")
    tools.ip(f"-6 route add default via {CLIENT_IP6}")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []


def test_one_family_may_come_back_elsewhere_before_the_other(uplinked: Node, agent: Agent) -> None:
    """What was on the other's uplink stays, and nobody calls that wrong. The log names what leads traffic here."""
    second_uplink()
    arrived(uplinked, agent)
    tools.ip("route del default")
    tools.ip("-6 route del default")
    time.sleep(1)
    tools.ip("route add default via 198.51.100.1")
    until(lambda: (oracle.proxies("eth0"), oracle.proxies("eth1")) == ({IPS[1]}, {IPS[0]}))
    agent.heard("tap0", "mended: proxy neighbour 192.0.2.8 dev eth1")
    assert "uplink: " not in hook("kvm-ifup", "check", "tap0").out


@pytest.mark.parametrize("compatible", [0, 1])
def test_a_nexthop_object_that_changes_takes_the_proxies_with_it(uplinked: Node, agent: Agent, compatible: int) -> None:
    """The routes that lead through it do not change: nothing is said of them."""
    second_uplink()
    oracle.sysctl("ipv4/nexthop_compat_mode", compatible)
    for number, gateway in ((7, CLIENT_IP4), (8, CLIENT_IP6)):
        tools.ip(f"nexthop add id {number} via {gateway} dev eth0")
    tools.ip("route replace default nhid 7")
    tools.ip("-6 route del default")
    tools.ip("-6 route add default nhid 8")
    arrived(uplinked, agent)
    assert oracle.proxies("eth0") == set(IPS)
    tools.ip("nexthop replace id 7 via 198.51.100.1 dev eth1")
    tools.ip("nexthop replace id 8 via 2001:db8:1::1 dev eth1")
    until(lambda: (oracle.proxies("eth0"), oracle.proxies("eth1")) == (set(), set(IPS)))


def test_who_is_announced_elsewhere_on_the_new_uplink_is_withdrawn(uplinked: Node, agent: Agent) -> None:
    second_uplink()
    arrived(uplinked, agent)
    move_at_once()
    until(lambda: oracle.proxies("eth1") == set(IPS))
    with wire.packet_socket("peer1") as there:
        guests.withdraw(wire.Wire(there, "peer1"))


@pytest.mark.parametrize("family", [4, 6])
def test_where_one_familys_default_route_goes_nothing_is_removed(uplinked: Node, agent: Agent, family: int) -> None:
    arrived(uplinked, agent)
    before = snapshots.snapshot_of_kernel()
    tools.ip(f"-{family} route del default")
    witness(uplinked, agent)
    changed = [line for line in snapshots.changes(before, snapshots.snapshot_of_kernel()) if "default" not in line]
    assert changed == []
    for command in ("show", "check"):
        result = hook("kvm-ifup", command, "tap0")
        assert result.code == 0, result
    # And what goes missing meanwhile is put back.
    address = GUEST_IP4 if family == 4 else GUEST_IP6
    tools.ip(f"neigh del proxy {address} dev eth0")
    until(lambda: oracle.proxies("eth0") == set(IPS))


@pytest.mark.parametrize("way", ["while it is up", "while it is down"])
def test_an_uplink_that_is_renamed(uplinked: Node, agent: Agent, way: str) -> None:
    clean = snapshots.snapshot_of_kernel()
    guest = arrived(uplinked, agent)
    with answering(guest):
        if way == "while it is down":
            down()
        tools.ip("link set eth0 name wan0")
        if way == "while it is down":
            tools.ip("link set wan0 up")
            addressed("wan0")
        agent.heard("tap0", "mended", "eth0 is wan0 now")
        until(lambda: oracle.proxies("wan0") == set(IPS))
    found = agents.journal()
    assert found is not None
    assert {entry["dev"] for entry in found["entries"] if entry["op"] == "proxy-neighbour"} == {"wan0"}
    # It listens there, and clears up there.
    guests.withdraw(uplinked.listen())
    agent.armed(times=2)
    guest.send(rarp())
    until(lambda: oracle.proxies("wan0") == set(IPS))
    check(hook("kvm-ifdown", "tap0"), 0)
    assert oracle.proxies() == set()
    tools.ip("link del tap0")
    tools.ip("link set wan0 name eth0")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []


def test_kvm_ifdown_without_an_agent_finds_what_is_on_a_renamed_uplink(uplinked: Node) -> None:
    clean = snapshots.snapshot_of_kernel()
    uplinked.guest()
    manager.write_nic("tap0", "web1", mode="routed", ip=IPS)
    check(hook("kvm-ifup-post", "tap0"), 0)
    tools.ip("link set eth0 name wan0")
    assert oracle.proxies("wan0") == set(IPS)
    check(hook("kvm-ifup-post", "tap0"), 0)
    check(hook("kvm-ifdown", "tap0"), 0)
    assert oracle.proxies() == set()
    tools.ip("link del tap0")
    tools.ip("link set wan0 name eth0")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []
