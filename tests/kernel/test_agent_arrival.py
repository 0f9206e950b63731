"""post at a guest's first frame: whose frames count, what is done then, and nothing of it before."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from harness import agents, guests, hooks, manager, monitors, nodes, oracle, snapshots, tools, wire
from harness.addresses import CLIENT_IP4, CLIENT_IP6, GUEST_IP4, GUEST_IP6, GUEST_MAC, IPS, NODE_MAC
from harness.agents import NOT_WIRED, WIRED, Agent, journal, phase, through, until, wired
from harness.guests import FRAMES, incoming, rarp, witness
from harness.hooks import check, hook
from harness.manager import RUN_DIR
from harness.nodes import Node


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


@pytest.mark.userns
@pytest.mark.parametrize("kind", FRAMES)
def test_any_frame_of_the_guests_runs_post_and_nothing_of_post_is_there_before(
    uplinked: Node, agent: Agent, kind: str
) -> None:
    client = uplinked.listen()
    began = time.time()
    guest = incoming(uplinked, agent)
    assert wired() == NOT_WIRED
    assert phase() == "pre"
    for address in IPS:
        assert guests.announcements(uplinked.fence(client), address) == []
    guest.send(FRAMES[kind])
    heard = client.until(lambda frame: bool(guests.announcements([frame], GUEST_IP4)))
    # The journal is last, so that after a crash all is undone that was not committed.
    assert wired() == WIRED
    heard += client.until(guests.rounds_of(*IPS, rounds=4))
    (claim,) = {arp for frame in heard if (arp := wire.arp(frame)) and arp.sender == arp.target == GUEST_IP4}
    assert claim == wire.Arp(wire.BROADCAST, 1, NODE_MAC, GUEST_IP4, GUEST_IP4)
    claims = [na for frame in heard if (na := wire.advertisement(frame)) and na.target == GUEST_IP6]
    assert {(na.mac, na.override, na.destination) for na in claims} == {(NODE_MAC, True, "ff02::1")}
    journal = agents.journal()
    assert journal is not None
    assert (journal["phase"], journal["by"], journal["reason"]) == ("post", "agent", kind)
    assert began <= journal["since"] <= time.time()


def test_five_rounds_and_no_more(uplinked: Node, agent: Agent) -> None:
    client = uplinked.listen()
    incoming(uplinked, agent).send(rarp())
    heard = client.until(guests.rounds_of(*IPS))
    witness(uplinked, agent)
    heard += uplinked.fence(client)
    assert [len(guests.announcements(heard, address)) for address in IPS] == [5, 5]


def test_what_goes_into_the_tap_and_what_comes_from_another_mac_does_not_count(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent)
    with wire.packet_socket("tap0") as into:
        for frame in FRAMES.values():
            into.send(frame)
    guest.send(rarp("aa:00:00:00:00:77"))
    guest.send(wire.ethernet(GUEST_MAC, "aa:00:00:35:ac:02", 0x0800, bytes(46)))
    guest.send(wire.ethernet(GUEST_MAC, "aa:01:00:35:ac:01", 0x0800, bytes(46)))
    witness(uplinked, agent)
    assert wired() == NOT_WIRED
    guest.send(rarp())
    until(lambda: wired() == WIRED)


def test_what_a_bridge_floods_into_the_tap_does_not_count(uplinked: Node, agent: Agent) -> None:
    """The guest, which still runs elsewhere, is heard on the bridge."""
    nodes.add_bridge("br0")
    guest = incoming(uplinked, agent, mode="bridged", link="br0", ip=None)
    nodes.add_tap("tap1")
    other = wire.attach("tap1")
    tools.ip("link set tap1 master br0 up")
    until(lambda: tools.ask("bridge -j link show dev tap1")[0]["state"] == "forwarding")
    other.send(rarp())
    guest.until(lambda frame: frame[6:12] == wire.mac_bytes(GUEST_MAC))
    witness(uplinked, agent)
    assert phase() == "pre"
    guest.send(rarp())
    until(lambda: phase() == "post")
    other.close()


def test_a_bridged_guest_arrives_too(uplinked: Node, agent: Agent) -> None:
    """The bridge takes a port's frames; the agent hears them all the same."""
    nodes.add_bridge("br0")
    guest = incoming(uplinked, agent, mode="bridged", link="br0", ip=None)
    before = snapshots.snapshot_of_kernel()
    guest.send(rarp())
    until(lambda: phase() == "post")
    agent.heard("tap0", "arrived")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    journal = agents.journal()
    assert journal is not None
    assert (journal["by"], journal["reason"]) == ("agent", "RARP")


def test_the_managers_own_post_is_then_a_no_op_and_silent_on_the_wire(uplinked: Node, agent: Agent) -> None:
    guests.arrived(uplinked, agent)
    client = uplinked.listen()
    state = snapshots.snapshot()
    with monitors.monitored() as monitor:
        result = hook("kvm-ifup-post", "tap0", "--json")
        assert result.code == 0
        assert result.needed == []
        assert monitor.events() == []
    witness(uplinked, agent)  # the agent's own second look has been by then
    witness(uplinked, agent)
    assert guests.announcements(uplinked.fence(client), GUEST_IP4) == []
    assert [line for line in snapshots.changes(state, snapshots.snapshot()) if "tapw" not in line] == []


def test_a_pre_that_the_agent_has_not_run_arms_too(uplinked: Node, agent: Agent) -> None:
    guest = uplinked.guest()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    result = hook("kvm-ifup-pre", "tap0", "--run-dir=/run/kvm-ifup", "-v")
    assert "done without the agent" in result.err
    agent.armed()
    guest.send(rarp())
    until(lambda: wired() == WIRED)


@pytest.mark.parametrize("how", ["through the agent", "directly"])
def test_ifdown_disarms(uplinked: Node, agent: Agent, how: str) -> None:
    guest = uplinked.guest()
    before = snapshots.snapshot_of_kernel()
    manager.write_nic(mode="routed", ip=IPS, incoming=True)
    through("kvm-ifup-pre", "tap0")
    agent.armed()
    check(hook("kvm-ifdown", "tap0", *(["--run-dir=/run/kvm-ifup"] if how == "directly" else [])), 0)
    tools.ip("link set tap0 up")
    guest.send(rarp())
    witness(uplinked, agent)
    tools.ip("link set tap0 down")
    assert wired() == NOT_WIRED
    assert [line for line in snapshots.changes(before, snapshots.snapshot_of_kernel()) if "tapw" not in line] == []


def test_after_the_time_limit_a_frame_does_nothing_and_post_does_all(uplinked: Node) -> None:
    with agents.configured(agent={"arrival_timeout": 1.5}), agents.running() as agent:
        guest = uplinked.guest()
        manager.write_nic(mode="routed", ip=IPS, incoming=True)
        through("kvm-ifup-pre", "tap0")
        agent.heard("tap0", "disarmed")
        agents.configure(agent={"arrival_timeout": 3600})
        agent.send(signal.SIGHUP)
        agent.heard("configuration")
        guest.send(rarp())
        witness(uplinked, agent)
        assert wired() == NOT_WIRED
        through("kvm-ifup-post", "tap0")
        assert wired() == WIRED


def test_a_time_limit_of_nothing_never_arms(uplinked: Node) -> None:
    with agents.configured(agent={"arrival_timeout": 0}), agents.running() as agent:
        guest = uplinked.guest()
        manager.write_nic(mode="routed", ip=IPS, incoming=True)
        through("kvm-ifup-pre", "tap0")
        guest.send(rarp())
        through("kvm-ifup", "gc")
        assert wired() == NOT_WIRED
        assert "armed" not in agent.said()


def test_a_burst_is_one_arrival(uplinked: Node, agent: Agent) -> None:
    """What QEMU has kept back while the guest was stopped comes all at once."""
    guest = incoming(uplinked, agent)
    client = uplinked.listen()
    for _ in range(200):
        for frame in FRAMES.values():
            guest.send(frame)
    heard = client.until(guests.rounds_of(*IPS))
    witness(uplinked, agent)
    heard += uplinked.fence(client)
    assert wired() == WIRED
    assert [len(guests.announcements(heard, address)) for address in IPS] == [5, 5]
    assert agent.said().count("(tap0): arrived") == 1


def test_guests_that_arrive_at_once_are_each_wired_to_their_own_tap(uplinked: Node, agent: Agent) -> None:
    guests = []
    for number in range(5):
        mac = f"aa:00:00:35:ac:{number:02x}"
        guests.append((incoming(uplinked, agent, f"tap{number}", mac=mac, ip=[f"192.0.2.{40 + number}"]), mac))
    for guest, mac in guests:
        guest.send(rarp(mac))
    until(lambda: oracle.proxies() == {f"192.0.2.{40 + number}" for number in range(5)})
    until(lambda: all(phase(f"tap{number}") == "post" for number in range(5)))
    for number in range(5):
        assert oracle.routes(f"tap{number}") == {f"192.0.2.{40 + number}"}
        through("kvm-ifdown", f"tap{number}")
    assert oracle.proxies() == set()


# --- what has changed since pre --------------------------------------------------------------------------


def test_a_shared_sysctl_changed_since_pre_is_set_again(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent)
    oracle.sysctl("ipv4/neigh/eth0/proxy_delay", 40)
    oracle.sysctl("ipv6/conf/eth0/proxy_ndp", 1)
    guest.send(rarp())
    until(lambda: phase() == "post")
    assert wired() == WIRED
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == "0"
    through("kvm-ifdown", "tap0")
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == "80"
    assert oracle.sysctl("ipv6/conf/eth0/proxy_ndp") == "0"


def test_what_is_noted_for_an_arrival_says_nothing_when_the_agent_is_killed(uplinked: Node) -> None:
    with agents.running() as first:
        guest = incoming(uplinked, first)
        noted = [path.name for path in (RUN_DIR / "armed").iterdir()]
        assert noted == ["tap0.new"]
        before = journal()
        first.end(signal.SIGKILL)
    check(hook("kvm-ifup", "gc"), 0)
    assert (journal(), wired()) == (before, NOT_WIRED)
    with agents.running() as second:
        second.armed()
        guest.send(rarp())
        until(lambda: phase() == "post")
        assert wired() == WIRED
        through("kvm-ifdown", "tap0")
    assert list((RUN_DIR / "armed").iterdir()) == []


def other_uplink() -> None:
    """eth1, ready to be one."""
    tools.ip("link add eth1 type veth peer name far1")
    for dev in ("eth1", "far1"):
        tools.ip(f"link set {dev} up")
    tools.ip("addr add 198.51.100.1/24 dev eth1")
    tools.ip("addr add 2001:db8:1::1/64 dev eth1")
    for family in (4, 6):
        oracle.sysctl(f"ipv{family}/conf/eth1/forwarding", 1)
    oracle.settle("eth1")


def move_default_routes() -> None:
    """The node's way out is eth1 now."""
    tools.ip("route replace default via 198.51.100.2 dev eth1")
    tools.ip("-6 route del default")
    tools.ip("-6 route add default via 2001:db8:1::2 dev eth1")


def test_a_default_route_that_has_moved_since_pre_takes_the_proxies_along(uplinked: Node, agent: Agent) -> None:
    """At the very first frame after it has moved: nothing is answered for, nor announced, on the old uplink."""
    other_uplink()
    guest = incoming(uplinked, agent)
    client = uplinked.listen()
    move_default_routes()
    guest.send(rarp())
    until(lambda: phase() == "post")
    assert oracle.proxies("eth1") == set(IPS)
    assert oracle.proxies("eth0") == set()
    journal = agents.journal()
    assert journal is not None
    assert "eth0" not in {entry.get("dev") for entry in journal["entries"]}
    assert guests.announcements(uplinked.fence(client), GUEST_IP4) == []


def test_what_was_prepared_is_prepared_anew_and_still_right_after_a_while(uplinked: Node, agent: Agent) -> None:
    other_uplink()
    guest = incoming(uplinked, agent)
    for _ in range(3):
        move_default_routes()
        tools.ip(f"route replace default via {CLIENT_IP4} dev eth0")
        tools.ip("-6 route del default")
        tools.ip(f"-6 route add default via {CLIENT_IP6} dev eth0")
    witness(uplinked, agent)
    witness(uplinked, agent)
    guest.send(rarp())
    until(lambda: phase() == "post")
    assert oracle.proxies("eth0") == set(IPS)
    assert oracle.proxies("eth1") == set()


def test_a_new_tap_of_the_same_name_is_not_wired_by_the_old_ones_plan(uplinked: Node, agent: Agent) -> None:
    incoming(uplinked, agent)
    tools.ip("link del tap0")
    guest = uplinked.guest()
    tools.ip("link set tap0 up")
    guest.send(rarp())
    until(lambda: phase() is None)
    witness(uplinked, agent)
    assert wired() == NOT_WIRED
    assert oracle.rules() == []


def test_a_new_tap_of_the_same_name_for_another_guest(uplinked: Node, agent: Agent) -> None:
    """The next guest on the name waits for its own frame, whatever happened there a moment ago."""
    for _ in range(3):
        guests.arrived(uplinked, agent)
        tools.ip("link del tap0")
        mac, address = "aa:00:00:00:00:55", "192.0.2.55"
        guest = incoming(uplinked, None, mac=mac, ip=[address])
        guest.send(rarp())  # not its own
        # The second look at the first guest's arrival is due within this time.
        for _ in range(3):
            witness(uplinked, agent)
        assert (phase(), wired()) == ("pre", NOT_WIRED)
        guest.send(rarp(mac))
        until(lambda: phase() == "post")
        assert wired() == ({"192.0.2.55"}, {"192.0.2.55"})
        tools.ip("link del tap0")
        until(lambda: phase() is None)


def test_a_guest_that_leaves_right_after_its_arrival_is_not_wired_again(uplinked: Node, agent: Agent) -> None:
    """kvm-ifdown and pre on the same tap; the agent's second look at the arrival comes after that."""
    guest = incoming(uplinked, agent)
    guest.send(rarp())
    until(lambda: phase() == "post")
    check(hook("kvm-ifdown", "tap0"), 0)
    check(hook("kvm-ifup-pre", "tap0"), 0)
    client = uplinked.listen()
    heard: list[bytes] = []
    end = time.monotonic() + 1.5  # the second look is due after 1 s
    while time.monotonic() < end:
        witness(uplinked, agent)
    heard += uplinked.fence(client)
    assert (phase(), wired()) == ("pre", NOT_WIRED)
    assert guests.announcements(heard, GUEST_IP4) == []


@pytest.mark.parametrize("family", [4, 6])
def test_an_arrival_that_fails_says_why_and_a_later_frame_tries_again(
    uplinked: Node, agent: Agent, family: int
) -> None:
    guest = incoming(uplinked, agent)
    client = uplinked.listen()
    pre = snapshots.snapshot_of_kernel()
    oracle.sysctl(f"ipv{family}/conf/eth0/forwarding", 0)
    off = snapshots.snapshot_of_kernel()
    guest.send(rarp())
    agent.heard("tap0", f"IPv{family} forwarding is off on uplink eth0", "sysctl -w")
    assert wired() == NOT_WIRED
    assert snapshots.changes(off, snapshots.snapshot_of_kernel()) == []
    assert guests.announcements(uplinked.fence(client), GUEST_IP4) == []
    oracle.sysctl(f"ipv{family}/conf/eth0/forwarding", 1)
    assert snapshots.changes(pre, snapshots.snapshot_of_kernel()) == []

    def tried() -> bool:
        guest.send(rarp())
        return phase() == "post"

    until(tried)
    assert wired() == WIRED


def test_an_arrival_whose_journal_cannot_be_completed_is_undone_and_tried_again(uplinked: Node, agent: Agent) -> None:
    """It is announced by then; what is left to undo is undone by whoever clears up after killed runs."""
    guest = incoming(uplinked, agent)
    until(agent.rests)  # what pre itself has changed may have it prepared once more
    client = uplinked.listen()
    before = snapshots.snapshot_of_kernel()
    in_the_way = RUN_DIR / "state/tap0.new"
    in_the_way.mkdir()
    guest.send(rarp())
    agent.heard("not arrived")
    assert wired() == NOT_WIRED
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert len(guests.announcements(uplinked.fence(client), GUEST_IP4)) == 1, "no more rounds of what is not true"
    in_the_way.rmdir()

    def tried() -> bool:
        guest.send(rarp())
        return phase() == "post"

    until(tried)
    assert wired() == WIRED
    through("kvm-ifdown", "tap0")
    assert oracle.proxies() == set()


def test_guests_that_come_while_the_agent_is_stopped_are_all_announced_at_once(uplinked: Node, agent: Agent) -> None:
    """Each is announced before any journal is completed: the first of them does not have the others wait."""
    macs = [f"aa:00:00:35:ac:{number:02x}" for number in range(5)]
    addresses = [f"192.0.2.{40 + number}" for number in range(5)]
    taps = [
        incoming(uplinked, agent, f"tap{number}", mac=mac, ip=[address])
        for number, (mac, address) in enumerate(zip(macs, addresses, strict=True))
    ]
    until(agent.rests)  # all is prepared by then
    client = uplinked.listen()
    agent.send(signal.SIGSTOP)
    for tap, mac in zip(taps, macs, strict=True):
        tap.send(rarp(mac))
    with monitors.renamed_in(agents.STATE) as names:
        agent.send(signal.SIGCONT)
        client.until(guests.rounds_of(*addresses, rounds=1))
        until(lambda: all(phase(f"tap{number}") == "post" for number in range(5)))
        put = names()
    journals = {f"tap{number}.json" for number in range(5)}
    assert (set(put[:5]), set(put[5:])) == (journals, journals)


def test_an_address_that_is_the_nodes_own_by_now_is_not_taken(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent)
    tools.ip(f"addr add {GUEST_IP4}/32 dev lo")
    guest.send(rarp())
    agent.heard("tap0", GUEST_IP4, "is this node's own address")
    assert wired() == NOT_WIRED


def test_a_tap_that_went_down_and_up_stays_armed(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent)
    tools.ip("link set tap0 down")
    witness(uplinked, agent)
    tools.ip("link set tap0 up")
    guest.send(rarp())
    until(lambda: phase() == "post")
    # The entries and addresses that the kernel drops on a device that goes down are ours to put back.
    assert wired() == WIRED
    until(lambda: oracle.neighbours() == dict.fromkeys(IPS, GUEST_MAC))


# --- hooks that wait ------------------------------------------------------------------------------------


def test_a_hook_that_waits_for_a_lock_holds_up_no_arrival(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent)
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="bridged", link="br0", incoming=True)
    nodes.add_bridge("br0")
    with agents.locked("tap1"):
        waiting = hooks.start("kvm-ifup-pre", "tap1")
        until(lambda: agent.holds(agents.lock_file("tap1")))
        guest.send(rarp())
        until(lambda: wired() == WIRED)
        assert waiting.poll() is None
    check(hooks.finish(waiting), 0)


def test_more_waiting_hooks_than_threads_hold_up_no_arming_and_no_arrival(uplinked: Node, agent: Agent) -> None:
    nodes.add_bridge("br0")
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="bridged", link="br0", incoming=True)
    with agents.locked("tap1"):
        waiting = [hooks.start("kvm-ifup-pre", "tap1") for _ in range(70)]
        until(lambda: agent.holds(agents.lock_file("tap1")))
        guest = uplinked.guest()
        manager.write_nic(mode="routed", ip=IPS, incoming=True)
        check(hook("kvm-ifup-pre", "tap0", "--run-dir=/run/kvm-ifup"), 0)
        agent.armed()
        guest.send(rarp())
        until(lambda: wired() == WIRED)
        for process in waiting:
            process.kill()
    for process in waiting:
        hooks.finish(process)


def test_a_tap_that_somebody_works_on_holds_up_the_arming_of_no_other(uplinked: Node) -> None:
    """At the agent's start one tap's lock is held, and stays held."""
    nodes.add_bridge("br0")
    incoming(uplinked, None, "tap1", mode="bridged", link="br0", ip=None, mac="aa:00:00:00:00:01")
    guest = incoming(uplinked)
    with agents.configured() as etc:
        (etc / "config.toml").write_text("lock_timeout = 600\n")
        with agents.locked("tap1"), agents.running():
            guest.send(rarp())

            def tried() -> bool:
                guest.send(rarp())
                return phase() == "post"

            until(tried)  # sooner than a lock is given up
            assert wired() == WIRED


def test_a_bridge_that_learns_holds_up_no_arrival(uplinked: Node) -> None:
    nodes.add_bridge("br0", options="stp_state 1 forward_delay 400")
    with agents.configured(bridged={"forwarding_timeout": 60}), agents.running() as agent:
        guest = incoming(uplinked, agent)
        uplinked.guest("tap1")
        manager.write_nic("tap1", "web2", mode="bridged", link="br0", incoming=True)
        waiting = hooks.start("kvm-ifup-pre", "tap1")
        until(lambda: "master" in oracle.link("tap1"))
        guest.send(rarp())
        until(lambda: wired() == WIRED)
        assert waiting.poll() is None
        check(hooks.finish(waiting), 0)
    (port,) = tools.ask("bridge -j link show dev tap1")
    assert port["state"] == "forwarding"


def test_a_lock_that_is_held_when_the_guest_arrives_delays_only_itself(uplinked: Node, agent: Agent) -> None:
    guest = incoming(uplinked, agent)
    with agents.locked("tap0"):
        guest.send(rarp())
        until(lambda: agent.holds(agents.lock_file("tap0")))
        witness(uplinked, agent)
        assert wired() == NOT_WIRED
    until(lambda: phase() == "post")
    assert wired() == WIRED
