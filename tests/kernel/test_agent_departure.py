"""A guest that has left: another node announces it and it is silent here; and it may come back."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from harness import agents, guests, manager, oracle, snapshots, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, FOREIGN_MAC, GUEST_IP4, GUEST_IP6, IPS, NODE_IP6, NODE_MAC
from harness.agents import NOT_WIRED, WIRED, Agent, phase, through, until, wired
from harness.guests import FRAMES, advert, answering, arrived, garp, incoming, rarp, witness
from harness.hooks import check, hook
from harness.nodes import Node
from kvmifup.agent.departures import MUTED

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
    client.send(wire.arp_request(NODE_MAC, "0.0.0.0", GUEST_IP4))  # a probe of ours, as `check --probe` sends it
    witness(uplinked, agent)
    assert heard_of(agent) == 0
    assert agent.said().count("is wanted by") == 0
    assert wired() == WIRED


NO_ANNOUNCEMENTS = {
    "a question for it": wire.arp_request(FOREIGN_MAC, CLIENT_IP4, GUEST_IP4),
    "a solicitation": wire.solicitation(FOREIGN_MAC, CLIENT_IP6, GUEST_IP6),
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


# What tells the neighbours where it is all the same (test_belief.py has all that does).
BY_THE_WAY = {
    "a question of its own": wire.arp_request(FOREIGN_MAC, GUEST_IP4, CLIENT_IP4),
    "an answer of its own": wire.arp_request(FOREIGN_MAC, GUEST_IP4, CLIENT_IP4)[:20] + b"\0\2"
    + wire.arp_request(FOREIGN_MAC, GUEST_IP4, CLIENT_IP4)[22:],
    "a solicitation of its own": wire.solicitation(FOREIGN_MAC, GUEST_IP6, CLIENT_IP6),
    "an advertisement to the node alone": advert(to=NODE_IP6),
}  # fmt: skip


@pytest.mark.parametrize("frame", BY_THE_WAY.values(), ids=BY_THE_WAY)
def test_who_speaks_in_a_guests_name_counts_as_who_announces_it(uplinked: Node, agent: Agent, frame: bytes) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest):
        client.send(frame)
        agent.heard(f"announced by {FOREIGN_MAC} on eth0", "the guest runs here")
    assert wired() == WIRED
    time.sleep(0.3)  # it is asked at times only
    client.send(frame)
    until(lambda: phase() == "pre")


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
    assert heard_of(agent) == 1


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


# --- a withdrawal that was wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("announcement", [garp(), advert()], ids=["gratuitous ARP", "unsolicited NA"])
@pytest.mark.parametrize("later", [0, 0.3])
def test_a_guest_that_answers_too_late_is_put_back_then(
    uplinked: Node, agent: Agent, announcement: bytes, later: float
) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    whole = snapshots.snapshot_of_kernel()
    client.send(announcement)
    agent.heard("withdrawn")
    time.sleep(later)
    with answering(guest, times=1):  # the first question: the next ones are not needed
        until(lambda: phase() == "post")
    assert wired() == WIRED
    assert snapshots.changes(whole, snapshots.snapshot_of_kernel()) == []
    client.until(guests.rounds_of(*IPS))


def test_a_guest_that_can_answer_only_after_a_while_is_asked_again(uplinked: Node) -> None:
    with agents.running(others={"agent.suspects.ANSWER": 0.5}) as agent:
        guest = arrived(uplinked, agent)
        with answering(guest, deaf=1.5, times=1):
            uplinked.listen().send(garp())
            agent.heard("the guest runs here")
        assert (phase(), wired(), agent.said().count("withdrawn")) == ("post", WIRED, 0)


def test_a_machine_that_can_answer_only_after_a_while_is_asked_again(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    uplinked.listen().send(garp())
    agent.heard("withdrawn")
    time.sleep(0.5)
    while wire.readable(guest.descriptor, 0):
        os.read(guest.descriptor, 65536)
    with answering(guest, times=1):
        until(lambda: agent.said().count("arrived,") == 2)
        until(lambda: phase() == "post")
    assert (wired(), agent.said().count("withdrawn")) == (WIRED, 1)


@pytest.mark.parametrize("timeout", [0, 0.5])
def test_a_withdrawn_guest_is_waited_for_as_long_as_its_tap_is_there(uplinked: Node, timeout: float) -> None:
    with agents.configured(agent={"arrival_timeout": 3600}), agents.running() as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        agents.configure(agent={"arrival_timeout": timeout})
        agent.send(signal.SIGHUP)
        agent.heard("configuration read")
        guests.withdraw(client)
        time.sleep(timeout + 0.3)
        assert hook("kvm-ifup", "show", "tap0").out.count(" left ") == 1
        guest.send(rarp())
        until(lambda: phase() == "post")
        assert wired() == WIRED
        guests.withdraw(client)
    with agents.running():  # another one, which only has the journal
        time.sleep(0.3)
        assert phase() == "pre"
        guest.send(rarp())
        until(lambda: phase() == "post")


def test_an_incoming_guest_is_still_given_up(uplinked: Node) -> None:
    with agents.configured(agent={"arrival_timeout": 0.5}), agents.running() as agent:
        guests.incoming(uplinked, agent)
        agent.heard("disarmed")


@pytest.mark.parametrize(
    ("ip", "announced", "announcement"),
    [
        (["192.0.2.7", GUEST_IP4], GUEST_IP4, garp()),
        ([GUEST_IP4, "192.0.2.7"], "192.0.2.7", garp(address="192.0.2.7")),
        (["2001:db8::7", GUEST_IP6], GUEST_IP6, advert()),
        ([GUEST_IP6, "192.0.2.7"], "192.0.2.7", advert()),
    ],
    ids=["the second", "the other", "the second of IPv6", "one of two families"],
)
def test_a_guest_is_asked_for_the_address_that_is_announced(
    uplinked: Node, agent: Agent, ip: list[str], announced: str, announcement: bytes
) -> None:
    guest = arrived(uplinked, agent, ip=ip)
    with answering(guest, only=[announced]):
        uplinked.listen().send(announcement)
        agent.heard("announced by", "the guest runs here")
    assert phase() == "post"


def test_a_slow_guest_is_not_cut_off_again_and_again(uplinked: Node) -> None:
    with agents.running(others={"agent.suspects.ANSWER": 0.01}) as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        with answering(guest, delay=0.5):
            end = time.monotonic() + 5
            while time.monotonic() < end:
                client.send(garp())
                time.sleep(0.01)
            until(lambda: phase() == "post")
        assert 1 <= agent.said().count("withdrawn") <= 3


# --- somebody else announces a guest that is here ------------------------------------------------------------


METRICS = manager.RUN_DIR / "metrics.prom"


def counted(name: str) -> float:
    """What the agent has counted, for all labels."""
    lines = [line for line in METRICS.read_text().splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def defences(frames: Sequence[bytes], address: str) -> list[bytes]:
    """The announcements of *address* that the node has sent, to all: it also answers each question."""
    own = wire.mac_bytes(NODE_MAC)
    return [frame for frame in guests.announcements(frames, address) if frame[6:12] == own and frame[0] & 1]


@pytest.mark.parametrize(
    ("address", "announcement"), [(GUEST_IP4, garp()), (GUEST_IP6, advert())], ids=["IPv4", "IPv6"]
)
@pytest.mark.parametrize("withdraw", [True, False])
def test_a_claimed_address_is_announced_again(
    uplinked: Node, address: str, announcement: bytes, withdraw: bool
) -> None:
    with agents.configured(agent={"withdraw": withdraw}), agents.running() as agent:
        guest = arrived(uplinked, agent)
        client = uplinked.listen()
        with answering(guest):
            client.send(announcement)
            seen = client.until(lambda frame: bool(defences([frame], address)))
            assert len(seen) < 50
            agent.heard(f"{address} announced by {FOREIGN_MAC} on eth0", "the guest runs here")
        assert wired() == WIRED


def test_who_asks_whether_an_address_is_free_learns_that_it_is_not(uplinked: Node, agent: Agent) -> None:
    """Before it takes it. For IPv6 the kernel says so."""
    arrived(uplinked, agent)
    client = uplinked.listen()
    client.send(wire.arp_request(FOREIGN_MAC, "0.0.0.0", GUEST_IP4))
    asked = struct.pack("!BBHI16s", 135, 0, 0, 0, ipaddress.IPv6Address(GUEST_IP6).packed)
    client.send(wire.icmp6("33:33:ff:00:00:08", FOREIGN_MAC, "::", "ff02::1:ff00:8", asked))
    address = {False: GUEST_IP4, True: GUEST_IP6}
    seen: set[str] = set()

    def both(frame: bytes) -> bool:
        seen.update(address[six] for six in address if defences([frame], address[six]))
        return len(seen) == 2

    client.until(both)
    agent.heard(f"{GUEST_IP4} is wanted by {FOREIGN_MAC} on eth0")
    client.send(wire.arp_request(FOREIGN_MAC, "0.0.0.0", "192.0.2.200"))
    witness(uplinked, agent)
    assert (wired(), agent.said().count("is wanted by")) == (WIRED, 1)


def test_many_claims_are_answered_once_and_at_last(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    client = uplinked.listen()
    with answering(guest):
        begun = time.monotonic()
        for _ in range(60):
            client.send(garp())
            time.sleep(0.03)  # the node answers each, and there is room for some hundred
        seen = uplinked.fence(client)
        assert len(defences(seen, GUEST_IP4)) == 1
        # The last word is ours, ten seconds after the first.
        client.until(lambda frame: bool(defences([frame], GUEST_IP4)))
        assert time.monotonic() - begun > 9
    # It is said once.
    assert agent.said().count("the guest runs here") == 1
    agent.end()
    assert counted("kvm_ifup_rival_announcements_total") > 30
    assert counted("kvm_ifup_defences_total") == 2
    assert counted("kvm_ifup_withdrawals_total") == 0


def test_check_names_who_claims_an_address(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", ip=["192.0.2.77"], mac="aa:00:00:00:00:77")
    check(hook("kvm-ifup", "check"), 0)
    file = manager.RUN_DIR / "rivals.json"
    with answering(guest):
        uplinked.listen().send(garp())
        until(file.exists)
    found = hook("kvm-ifup", "check", "tap0")
    assert found.code == 1
    assert f"{FOREIGN_MAC} on eth0 announces {GUEST_IP4}" in found.out
    (nic,) = json.loads(hook("kvm-ifup", "check", "tap0", "--json").out)["nics"]
    assert [FOREIGN_MAC in finding["what"] for finding in nic["findings"]] == [True]
    check(hook("kvm-ifup", "check", "tap1"), 0)
    # Not by what anybody could have written, nor by what is none.
    file.chmod(0o666)
    check(hook("kvm-ifup", "check", "tap0"), 0)
    file.chmod(0o600)
    assert hook("kvm-ifup", "check", "tap0").code == 1
    file.write_text('[{"address": 1}]')
    check(hook("kvm-ifup", "check", "tap0"), 0)


# --- prefixes, and other routes -----------------------------------------------------------------------------

PREFIX = "198.51.100.0/29"


@pytest.mark.parametrize(
    ("ip", "route"),
    [
        ([PREFIX], PREFIX),
        (["2001:db8:7::/64"], "2001:db8:7::/64"),
        ([GUEST_IP4], GUEST_IP4),
        ([GUEST_IP6, PREFIX], PREFIX),
    ],
)
def test_a_silent_guest_that_a_routing_daemon_finds_elsewhere_is_withdrawn(
    uplinked: Node, agent: Agent, ip: list[str], route: str
) -> None:
    guest = incoming(uplinked, agent, ip=ip)
    guest.send(rarp())
    until(lambda: phase() == "post")
    via = CLIENT_IP6 if ":" in route else CLIENT_IP4
    tools.ip(f"route add {route} via {via} proto static metric 50")  # an administrator's
    witness(uplinked, agent)
    time.sleep(1.2)
    assert phase() == "post"
    tools.ip(f"route del {route} via {via} proto static metric 50")
    tools.ip(f"route add {route} via {via} proto bgp metric 50")
    until(lambda: phase() == "pre")
    assert oracle.routes("tap0") == set()
    assert "routed elsewhere by protocol 186" in str((agents.journal() or {})["reason"])
    guest.send(rarp())
    until(lambda: phase() == "post")
    assert oracle.routes("tap0") == set(ip)


@pytest.mark.parametrize("ip", [[PREFIX], ["2001:db8:7::/64"]], ids=["IPv4", "IPv6"])
def test_a_guest_that_answers_keeps_its_prefix(uplinked: Node, agent: Agent, ip: list[str]) -> None:
    guest = incoming(uplinked, agent, ip=ip)
    guest.send(rarp())
    until(lambda: phase() == "post")
    witness(uplinked, agent)  # by then it knows that it has arrived
    with answering(guest):
        via = CLIENT_IP6 if ":" in ip[0] else CLIENT_IP4
        tools.ip(f"route add {ip[0]} via {via} proto bgp metric 50")
        agent.heard("routed elsewhere", "the guest runs here")
    assert oracle.routes("tap0") == set(ip)


# --- floods -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flooding(send: Callable[[bytes], object], frames: Sequence[bytes]) -> Iterator[None]:
    """A process that sends *frames* again and again, as fast as it can."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            while True:
                for frame in frames:
                    with contextlib.suppress(OSError):  # no room just now
                        send(frame)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_floods_on_uplink_and_tap_make_the_agent_deaf_for_no_second(uplinked: Node, agent: Agent) -> None:
    guest = arrived(uplinked, agent)
    silent = [arrived(uplinked, agent, f"tapf{n}", ip=[f"192.0.2.{60 + n}"], mac=f"aa:00:00:00:03:{n:02x}")
              for n in range(4)]  # fmt: skip
    assert silent
    client = uplinked.listen()
    forged = [garp(f"02:00:00:01:00:{n:02x}", f"198.18.0.{n}") for n in range(256)]
    forged += [advert(f"02:00:00:01:00:{n:02x}", f"2001:db8:9::{n:x}") for n in range(256)]
    forged += [garp(address=f"192.0.2.{60 + n}") for n in range(4)] + [garp(), advert()]
    longest = 0.0
    with flooding(client.send, forged), flooding(guest.send, [rarp(), *FRAMES.values()]):
        for number in range(12):
            other = incoming(uplinked, agent, f"tapn{number}", ip=[f"192.0.2.{100 + number}"],
                             mac=f"aa:00:00:00:04:{number:02x}")  # fmt: skip
            before = agent.taken()
            other.send(rarp(f"aa:00:00:00:04:{number:02x}"))
            until(lambda tap=f"tapn{number}": phase(tap) == "post")  # type: ignore[misc]
            longest = max(longest, agent.taken() - before)
    assert longest < 1000, "milliseconds that it had a processor meanwhile"

    def heard() -> bool:  # the flood from the uplink may have had the last word
        guest.send(rarp())
        return phase() == "post"

    until(heard)
    assert len(agent.said().splitlines()) < 300


FLOODS = {
    "gratuitous ARP": garp(),
    "questions": wire.arp_request(FOREIGN_MAC, GUEST_IP4, CLIENT_IP4),
    "advertisements": advert(),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_what_too_much_is_said_of_one_guest_hides_no_other(uplinked: Node, agent: Agent, flood: bytes) -> None:
    guest = arrived(uplinked, agent)
    arrived(uplinked, agent, "tap1", ip=["192.0.2.77", "2001:db8::77"], mac="aa:00:00:00:00:77")
    client = uplinked.listen()
    begun = time.monotonic()
    with answering(guest):
        for number in range(10000):
            client.send(flood)
            if number % 100 == 0:
                # As much as it can bear, so that nothing is lost for want of room.
                until(lambda: not any(oracle.packet_sockets("eth0")))
            if number == 5000:
                client.send(garp(address="192.0.2.77"))
                client.send(advert(address="2001:db8::77"))
        until(lambda: phase("tap1") == "pre")
        assert (phase(), wired()) == ("post", WIRED)
        muted = (time.monotonic() - begun) / MUTED + 1  # how often, at most
    time.sleep(0.5)
    guests.withdraw(client)  # it goes on listening
    agent.end()
    assert 1 <= counted("kvm_ifup_rival_announcements_total") < 200 * muted
