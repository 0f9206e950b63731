"""A guest that has left: another node announces it and it is silent here; and it may come back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from harness import agents, guests, oracle, snapshots, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, FOREIGN_MAC, GUEST_IP4, GUEST_IP6, IPS, NODE_IP6, NODE_MAC
from harness.agents import NOT_WIRED, WIRED, Agent, phase, through, until, wired
from harness.guests import advert, answering, arrived, garp, rarp, witness
from harness.hooks import check, hook
from harness.nodes import Node

NIC: dict[str, Any] = {"mode": "routed", "link": "100", "ip": IPS}


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


def heard_of(agent: Agent) -> int:
    """How often it has asked a guest since somebody else announced it."""
    return agent.said().count("announced by")


@pytest.mark.parametrize("announcement", [garp(), advert()], ids=["gratuitous ARP", "unsolicited NA"])
def test_a_silent_guest_announced_elsewhere_is_withdrawn_until_it_speaks(
    uplinked: Node, agent: Agent, announcement: bytes
) -> None:
    guest = arrived(uplinked, agent, **NIC)
    client = uplinked.listen()
    in_post, tap = agents.journal(), snapshots.snapshot_of_kernel()
    rules = oracle.rules()
    client.send(announcement)
    until(lambda: phase() == "pre")
    assert wired() == NOT_WIRED
    # Whatever may be true on two nodes stays.
    assert oracle.rules() == rules != []
    gone = [line for line in snapshots.changes(tap, snapshots.snapshot_of_kernel()) if "/tap0/" in line]
    assert gone == []
    journal = agents.journal()
    assert journal is not None
    assert in_post is not None
    assert journal["by"] == "agent"
    assert "announced by 02:00:00:00:00:0b on eth0" in journal["reason"]
    assert journal["since"] > in_post["since"]
    agent.armed(times=2)
    assert guests.announcements(uplinked.fence(client), GUEST_IP4) == []
    guest.send(rarp())
    client.until(guests.rounds_of(*IPS))
    until(lambda: phase() == "post")
    assert wired() == WIRED
    assert snapshots.changes(tap, snapshots.snapshot_of_kernel()) == []
    check(hook("kvm-ifdown", "tap0"), 0)
    assert (wired(), oracle.rules()) == (NOT_WIRED, [])


@pytest.mark.parametrize("announcement", [garp(), advert()], ids=["gratuitous ARP", "unsolicited NA"])
@pytest.mark.parametrize("ip", [IPS, [GUEST_IP4], [GUEST_IP6]], ids=["both", "IPv4", "IPv6"])
def test_a_guest_that_answers_keeps_everything(
    uplinked: Node, agent: Agent, announcement: bytes, ip: list[str]
) -> None:
    if (GUEST_IP4 if announcement[12:14] == b"\x08\x06" else GUEST_IP6) not in ip:
        announcement = garp() if ip == [GUEST_IP4] else advert()
    guest = arrived(uplinked, agent, ip=ip)
    client = uplinked.listen()
    before = snapshots.snapshot()
    with answering(guest):
        client.send(announcement)
        agent.heard("announced by", "the guest runs here")
    assert snapshots.changes(before, snapshots.snapshot()) == []


def test_withdrawing_puts_the_uplinks_journalled_sysctls_back_only_at_the_end(uplinked: Node, agent: Agent) -> None:
    clean = snapshots.snapshot_of_kernel()
    arrived(uplinked, agent)
    uplinked.listen().send(garp())
    until(lambda: phase() == "pre")
    check(hook("kvm-ifdown", "tap0"), 0)
    tools.ip("link del tap0")
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []


def test_a_guest_that_was_withdrawn_and_vanishes_leaves_nothing(uplinked: Node, agent: Agent) -> None:
    clean = snapshots.snapshot_of_kernel()
    arrived(uplinked, agent, **NIC)
    uplinked.listen().send(garp())
    until(lambda: phase() == "pre")
    tools.ip("link del tap0")
    until(lambda: phase() is None)
    assert snapshots.changes(clean, snapshots.snapshot_of_kernel()) == []


def test_a_node_that_was_told_not_to_withdraw_does_not(uplinked: Node) -> None:
    with agents.configured(agent={"withdraw": False}), agents.running() as agent:
        arrived(uplinked, agent)
        client = uplinked.listen()
        before = snapshots.snapshot()
        for frame in (garp(), advert()):
            client.send(frame)
        witness(uplinked, agent)
        assert [line for line in snapshots.changes(before, snapshots.snapshot()) if "tapw" not in line] == []
        # Until it is told otherwise.
        agents.configure(agent={"withdraw": True})
        agent.send(signal.SIGHUP)
        agent.heard("configuration read")
        client.send(garp())
        until(lambda: phase() == "pre")


def test_our_own_announcements_never_count(uplinked: Node, agent: Agent) -> None:
    """Neither those that go out, nor those that come back, as from another uplink on the same segment."""
    arrived(uplinked, agent)
    client = uplinked.listen()
    for _ in range(2):
        through("kvm-ifup-post", "tap0", "--announce")
        client.until(guests.rounds_of(*IPS))
    client.send(garp(NODE_MAC))
    client.send(advert(NODE_MAC))
    witness(uplinked, agent)
    assert heard_of(agent) == 0
    assert wired() == WIRED


NO_ANNOUNCEMENTS = {
    "a question for it": wire.arp_request(FOREIGN_MAC, CLIENT_IP4, GUEST_IP4),
    "a question of its own": wire.arp_request(FOREIGN_MAC, GUEST_IP4, CLIENT_IP4),
    "a solicitation": wire.solicitation(FOREIGN_MAC, CLIENT_IP6, GUEST_IP6),
    "an advertisement to the node alone": advert(to=NODE_IP6),
    "RARP": rarp(),
    "another address": garp(address="192.0.2.200"),
    "another IPv6 address": advert(address="2001:db8::200"),
}


def ignored(address4: str, address6: str) -> dict[str, bytes]:
    """What claims these addresses, but no kernel takes for true."""
    arp, na = garp(address=address4), advert(address=address6)
    return {
        "an advertisement that does not override": advert(address=address6, override=False),
        "a short frame": arp[:20],
        "ARP in a VLAN": tagged(arp, 5),
        "an advertisement in a VLAN": tagged(na, 5),
        "ARP in a VLAN in a VLAN": tagged(tagged(arp, 7), 5),
        "ARP in a VLAN in none": tagged(tagged(arp, 7), 0),
        "ARP to another machine": wire.mac_bytes("02:00:00:00:00:77") + arp[6:],
        "an advertisement to another machine": wire.mac_bytes("02:00:00:00:00:77") + na[6:],
        "ARP that is neither question nor answer": arp[:20] + b"\0\3" + arp[22:],
        "ARP of addresses of another size": arp[:18] + b"\x08\x04" + arp[20:],
        "an advertisement from off the segment": na[:21] + b"\x40" + na[22:],
        "an advertisement with a wrong checksum": na[:56] + b"\0\0" + na[58:],
        "an advertisement that is cut off": na[:-4],
        "an advertisement that is empty": na[:18] + b"\0\0" + na[20:],
    }


def tagged(frame: bytes, vid: int) -> bytes:
    """*frame* with a VLAN tag."""
    return frame[:12] + b"\x81\0" + vid.to_bytes(2, "big") + frame[12:]


def test_what_announces_nothing_or_nobody_here_does_not_matter(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    client = uplinked.listen()
    for frame in [*NO_ANNOUNCEMENTS.values(), *ignored(GUEST_IP4, GUEST_IP6).values()]:
        client.send(frame)
    witness(uplinked, agent)
    assert heard_of(agent) == 0
    assert wired() == WIRED


def test_the_kernel_ignores_the_same(uplinked: Node) -> None:
    """So the last test is right about what it takes for no announcement."""
    known = {"192.0.2.99": "02:00:00:00:00:99", "2001:db8::99": "02:00:00:00:00:99"}
    client = uplinked.listen()

    def cached(frame: bytes) -> dict[str, str]:
        for address, mac in known.items():
            tools.ip(f"neigh replace {address} lladdr {mac} dev eth0 nud stale")
        client.send(frame)
        uplinked.fence(client)
        found = tools.ask("neigh show dev eth0")
        return {one["dst"]: one.get("lladdr", "") for one in found if one["dst"] in known}

    believed = [name for name, frame in ignored(*known).items() if cached(frame) != known]
    assert believed == []
    for frame in (garp(address="192.0.2.99"), tagged(garp(address="192.0.2.99"), 0), advert(address="2001:db8::99")):
        assert FOREIGN_MAC in cached(frame).values()


@pytest.mark.parametrize("announcement", [garp(), advert()], ids=["gratuitous ARP", "unsolicited NA"])
def test_an_announcement_with_a_priority_and_no_vlan_counts(uplinked: Node, agent: Agent, announcement: bytes) -> None:
    arrived(uplinked, agent)
    uplinked.listen().send(tagged(announcement, 0))
    until(lambda: phase() == "pre")


def test_thousands_of_announcements_of_others_hold_up_nobody(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest):
        for number in range(5000):
            address = f"198.18.{number // 256}.{number % 256}"
            client.send(garp(address=address))
            client.send(advert(address=f"2001:db8:9::{number:x}"))
            if number % 1000 == 0:
                client.send(garp())
        witness(uplinked, agent)
    assert wired() == WIRED


def test_thousands_of_the_guests_own_announcements_are_asked_about_at_times(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest):
        for _ in range(3000):
            client.send(garp())
        agent.heard("the guest runs here")
        witness(uplinked, agent)
    assert wired() == WIRED
    assert heard_of(agent) < 300


def test_an_uplink_that_went_down_and_up_is_listened_to_again(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    tools.ip("link set eth0 down")
    through("kvm-ifup", "gc")
    tools.ip("link set eth0 up")
    oracle.settle("eth0")
    client = uplinked.listen()

    guests.withdraw(client)


def test_an_uplink_that_was_made_anew_is_listened_to(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    tools.ip("link set eth0 down")
    tools.ip("link del eth0")
    uplinked.uplink()
    for family in (4, 6):
        oracle.sysctl(f"ipv{family}/conf/eth0/forwarding", 1)
    through("kvm-ifup-post", "tap0")
    assert wired() == WIRED
    client = uplinked.listen()

    guests.withdraw(client)


def test_only_the_guest_that_is_announced_is_withdrawn(uplinked: Node, agent: Agent) -> None:
    arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", ip=["192.0.2.77"], mac="aa:00:00:00:00:77")
    uplinked.listen().send(garp())
    until(lambda: phase() == "pre")
    assert phase("tap1") == "post"
    assert oracle.proxies() == {"192.0.2.77"}


def test_to_and_fro(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    whole = snapshots.snapshot_of_kernel()

    for _ in range(5):
        guests.withdraw(client)
        assert wired() == NOT_WIRED

        def back() -> bool:
            guest.send(rarp())
            return phase() == "post"

        until(back)
        assert snapshots.changes(whole, snapshots.snapshot_of_kernel()) == []


def test_a_withdrawn_guest_is_not_wired_by_the_second_look_at_its_arrival(uplinked: Node, agent: Agent) -> None:
    guest = guests.incoming(uplinked, agent)
    client = uplinked.listen()
    guest.send(rarp())
    until(lambda: phase() == "post")

    guests.withdraw(client)
    for _ in range(4):  # the second look is due within this time
        witness(uplinked, agent)
    assert (phase(), wired()) == ("pre", NOT_WIRED)
