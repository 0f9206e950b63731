"""Guests of which only Ganeti's hook has told: they are found at their QEMU, armed, asked, and then as any other."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import Iterator

import pytest

from harness import agents, guests, manager, oracle, tools, wire
from harness.addresses import GUEST_IP4, GUEST_IP6, GUEST_MAC, IPS, TAP_MAC
from harness.agents import NOT_WIRED, Agent, journal, phase, through, until, wired
from harness.guests import FRAMES, answering, rarp, witness
from harness.hooks import check, hook
from harness.manager import RUN_DIR
from harness.moving import FIRST, INSTANCE, Qemu, environment
from harness.nodes import Node

SECOND_MAC, SECOND_IP4 = "aa:00:00:35:ac:02", "192.0.2.9"
SECOND = {"MODE": "routed", "MAC": SECOND_MAC, "IP": SECOND_IP4}
BOTH = {**FIRST, "IP": ",".join(IPS)}
EXPECTED = RUN_DIR / "expected"


@pytest.fixture
def agent(uplinked: Node) -> Iterator[Agent]:
    """The node's agent."""
    with agents.running() as one:
        yield one


def expect(*nics: dict[str, str], instance: str = INSTANCE) -> None:
    """The hook tells the agent."""
    through("kvm-ifup", "expect", environ=environment(*nics, instance=instance))
    assert (EXPECTED / f"{instance}.json").exists()


@contextlib.contextmanager
def qemu(*nics: tuple[wire.Tap, str], instance: str = INSTANCE, incoming: bool = True) -> Iterator[Qemu]:
    """The guest's QEMU."""
    one = Qemu(nics, instance=instance, incoming=incoming)
    try:
        yield one
    finally:
        one.end()


def nobody_is_expected() -> bool:
    """What was told has come true, or will not."""
    return list(EXPECTED.iterdir()) == []


def by_ganeti(tap: str, ip: str, **more: str) -> None:
    """Ganeti's own call, at the end of the migration."""
    check(hook("kvm-ifup-post", environ=manager.ganeti(tap, MODE="routed", IP=ip, **more)), 0)


def announced(uplinked: Node, client: wire.Wire) -> set[str]:
    """Of the addresses that tests use, those that have been announced until now."""
    heard = uplinked.fence(client)
    return {one for one in (*IPS, SECOND_IP4, "192.0.2.77") if guests.announcements(heard, one)}


@pytest.mark.userns
@pytest.mark.parametrize("ips", [[GUEST_IP4], [GUEST_IP6], IPS])
def test_a_guest_that_ganeti_moves_is_wired_at_its_first_frame(uplinked: Node, agent: Agent, ips: list[str]) -> None:
    client = uplinked.listen()
    guest = uplinked.guest("tap0")
    expect({**FIRST, "IP": ",".join(ips)})
    with qemu((guest, GUEST_MAC)):
        agent.armed()
        assert nobody_is_expected()
        assert wired() == NOT_WIRED
        assert announced(uplinked, client) == set()
        with answering(guest):
            guest.send(rarp())
            until(lambda: wired() == (set(ips), set(ips)))
            until(lambda: phase() == "post")
        found = journal()
        assert found is not None
        assert (found["by"], found["nic"]["instance"], found["nic"]["index"]) == ("agent", INSTANCE, 0)
        client.until(guests.rounds_of(*ips, rounds=1))
        # Ganeti's own call, a second later, has nothing to do.
        if ips == [GUEST_IP4]:
            before = journal()
            for more in ({}, {"ACTION": "up", "MIGRATION_PHASE": "post"}):  # until 3.1, and from 3.2 on
                by_ganeti("tap0", GUEST_IP4, **more)
                assert wired() == (set(ips), set(ips))
                found = journal()
                assert before is not None
                assert found is not None
                assert (found["entries"], found["by"]) == (before["entries"], "agent")


@pytest.mark.parametrize("ips", [[GUEST_IP4], [GUEST_IP6], IPS])
def test_one_question_for_each_address_waits_for_a_guest(uplinked: Node, agent: Agent, ips: list[str]) -> None:
    guest = uplinked.guest("tap0")
    expect({**FIRST, "IP": ",".join(ips)})
    with qemu((guest, GUEST_MAC)):
        agent.armed()
        last = wire.ethernet(GUEST_MAC, TAP_MAC, wire.ETH_P_FENCE, bytes(46))
        with contextlib.closing(wire.packet_socket("tap0")) as sender:
            sender.send(last)
        seen = [frame for frame in guest.until(lambda frame: frame == last) if frame[:6] == last[:6]]
    asked = [frame for frame in seen if frame != last]
    assert sorted(frame[38:42] if frame[12:14] == b"\x08\x06" else frame[62:78] for frame in asked) == sorted(
        ipaddress.ip_address(ip).packed for ip in ips
    )


def test_an_ext_nic_for_which_ganeti_calls_pre_itself_is_not_asked(uplinked: Node) -> None:
    """Ganeti 3.2 does, with what runs: there is nothing that could be newer."""
    ext = {"MODE": "ext", "LINK": "dmz", "IP": GUEST_IP4}
    dmz: dict[str, object] = {"mode": "routed"}
    with agents.configured(**{"ext.dmz": dmz}), agents.running() as agent:
        expect({**ext, "MAC": GUEST_MAC, "IP": "192.0.2.77"})
        guest = uplinked.guest("tap0")
        environ = manager.ganeti("tap0", **ext, ACTION="up", MIGRATION_PHASE="pre")
        check(hook("kvm-ifup-pre", environ=environ), 0)
        agent.armed()
        with qemu((guest, GUEST_MAC)):
            until(nobody_is_expected)
            guest.send(rarp())
            until(lambda: wired() == ({GUEST_IP4}, {GUEST_IP4}))


@pytest.mark.parametrize("ext", [False, True])
def test_an_ext_nic_for_which_ganeti_calls_nobody_is_found_as_well(uplinked: Node, ext: bool) -> None:
    dmz: dict[str, object] = {"mode": "routed", "link": "100"}
    with agents.configured(**{"ext.dmz": dmz}), agents.running() as agent:
        expect({**FIRST, "MODE": "ext", "LINK": "dmz"} if ext else {**FIRST, "LINK": "100"})
        guest = uplinked.guest("tap0")
        with qemu((guest, GUEST_MAC)):
            agent.armed()
            assert {one["iif"] for one in tools.ask("rule") if one["table"] == "100"} == {"tap0"}
            with answering(guest):
                guest.send(rarp())
                until(lambda: GUEST_IP4 in {one["dst"] for one in tools.ask("route show table all dev tap0")})


def test_nics_are_told_apart_by_their_macs(uplinked: Node, agent: Agent) -> None:
    """QEMU has them in another order than the configuration, lacks one, and has one that was unplugged there."""
    one, two, three = (uplinked.guest(f"tap{number}") for number in range(3))
    expect(FIRST, {**SECOND, "MAC": "aa:00:00:35:ac:03", "IP": "192.0.2.10"}, SECOND)
    with qemu((one, "aa:00:00:35:ac:77"), (two, SECOND_MAC), (three, GUEST_MAC)):
        agent.armed("tap1")
        agent.armed("tap2")
        assert nobody_is_expected()
        assert phase("tap0") is None
        for tap, mac, address in (("tap1", SECOND_MAC, SECOND_IP4), ("tap2", GUEST_MAC, GUEST_IP4)):
            found = journal(tap)
            assert found is not None
            assert (found["nic"]["mac"], found["nic"]["ip"]) == (mac, [f"{address}/32"])
        with answering(two, SECOND_MAC):
            two.send(rarp(SECOND_MAC))
            until(lambda: oracle.routes("tap1") == {SECOND_IP4})
        assert oracle.routes("tap2") == set()
        with answering(three):
            three.send(rarp())
            until(lambda: oracle.routes("tap2") == {GUEST_IP4})


def test_two_guests_arrive_at_once(uplinked: Node, agent: Agent) -> None:
    one, two = uplinked.guest("tap0"), uplinked.guest("tap1")
    expect(FIRST)
    expect(SECOND, instance="web2")
    with qemu((two, SECOND_MAC), instance="web2"), qemu((one, GUEST_MAC)):
        agent.armed("tap0")
        agent.armed("tap1")
        with answering(one), answering(two, SECOND_MAC):
            two.send(rarp(SECOND_MAC))
            one.send(rarp())
            until(lambda: (oracle.routes("tap0"), oracle.routes("tap1")) == ({GUEST_IP4}, {SECOND_IP4}))


@pytest.mark.parametrize("has", [GUEST_IP4, GUEST_IP6])
def test_an_address_that_the_guest_does_not_have_yet_is_left_to_ganeti(uplinked: Node, agent: Agent, has: str) -> None:
    """The configuration was changed while it ran, and the change is pending until it is restarted."""
    client = uplinked.listen()
    guest = uplinked.guest("tap0")
    expect({**FIRST, "IP": "192.0.2.77"})
    with qemu((guest, GUEST_MAC)), agent.when_armed(), answering(guest, only=[has]):
        guest.send(rarp())
        witness(uplinked, agent)
        assert (wired(), phase()) == (NOT_WIRED, "pre")
        by_ganeti("tap0", has)
        until(lambda: wired() == ({has}, {has}))
        assert announced(uplinked, client) == {has}


@pytest.mark.sweep
def test_a_pending_address_is_never_announced_whenever_the_guest_says_what(uplinked: Node, agent: Agent) -> None:
    """Twenty times: with every kind of first frame, before its answer and after it, with pauses and without."""
    client = uplinked.listen()
    frames = [*FRAMES.values(), wire.arp_request(GUEST_MAC, GUEST_IP4, GUEST_IP4)]
    for number in range(20):
        guest = uplinked.guest("tap0")
        expect({**FIRST, "IP": "192.0.2.77"})
        with qemu((guest, GUEST_MAC)):
            agent.armed("tap0", number + 1)
            with answering(guest, only=[GUEST_IP4], delay=0.02 * (number % 4)):
                for frame in frames[number % 5 :]:
                    guest.send(frame)
                    time.sleep(0.01 * (number % 3))
                by_ganeti("tap0", GUEST_IP4)
                assert wired() == ({GUEST_IP4}, {GUEST_IP4})
        guest.close()
        tools.ip("link del tap0")
        until(lambda: phase() is None)
    assert announced(uplinked, client) == {GUEST_IP4}


@pytest.mark.parametrize("more", ["192.0.2.77", GUEST_IP6, "198.51.100.0/29"])
def test_of_several_addresses_those_count_that_it_answers_for(uplinked: Node, agent: Agent, more: str) -> None:
    client = uplinked.listen()
    guest = uplinked.guest("tap0")
    expect({**FIRST, "IP": f"{more},{GUEST_IP4}"})
    with qemu((guest, GUEST_MAC)), agent.when_armed(), answering(guest, only=[GUEST_IP4]):
        guest.send(rarp())
        until(lambda: wired() == ({GUEST_IP4}, {GUEST_IP4}))
        witness(uplinked, agent)
        assert announced(uplinked, client) == {GUEST_IP4}
        by_ganeti("tap0", f"{more},{GUEST_IP4}")
        assert oracle.routes("tap0") == {more, GUEST_IP4}


def test_a_guest_that_is_slow_to_answer_is_asked_again(uplinked: Node) -> None:
    with agents.running(others={"agent.late.LATEST": 60.0}) as agent:
        guest = uplinked.guest("tap0")
        expect(BOTH)
        with qemu((guest, GUEST_MAC)):
            agent.armed()
            with answering(guest, deaf=0.3):
                guest.send(rarp())
                until(lambda: wired() == (set(IPS), set(IPS)))


def test_what_the_guest_announces_by_itself_is_an_answer(uplinked: Node, agent: Agent) -> None:
    guest = uplinked.guest("tap0")
    expect(FIRST)
    with qemu((guest, GUEST_MAC)):
        agent.armed()
        guest.send(wire.arp_request(GUEST_MAC, "192.0.2.77", "192.0.2.77"))
        witness(uplinked, agent)
        assert wired() == NOT_WIRED
        guest.send(wire.arp_request(GUEST_MAC, GUEST_IP4, GUEST_IP4))
        until(lambda: wired() == ({GUEST_IP4}, {GUEST_IP4}))


HOPS = {"sent by the guest": 64, "passed on by the guest": 63}


@pytest.mark.parametrize("how", [*HOPS, "of another address"])
@pytest.mark.parametrize("ip", IPS)
def test_a_packet_that_the_guest_has_sent_from_an_address_shows_that_it_has_it(
    uplinked: Node, agent: Agent, ip: str, how: str
) -> None:
    """Nobody answers here: a guest that is busy sends what it has to send before it does."""
    guest = uplinked.guest("tap0")
    expect({**FIRST, "IP": ip})
    with qemu((guest, GUEST_MAC)), agent.when_armed():
        other = "2001:db8::77" if ":" in ip else "192.0.2.77"
        guest.send(guests.packet(other if how == "of another address" else ip, HOPS.get(how, 64)))
        if how == "sent by the guest":
            until(lambda: wired() == ({ip}, {ip}))
        else:
            witness(uplinked, agent)
            assert wired() == NOT_WIRED


@pytest.mark.parametrize("first", IPS)
def test_an_address_is_wired_at_once_and_those_answered_for_later_follow(
    uplinked: Node, agent: Agent, first: str
) -> None:
    client = uplinked.listen()
    guest = uplinked.guest("tap0")
    expect(BOTH)
    (second,) = {*IPS} - {first}
    with qemu((guest, GUEST_MAC)), agent.when_armed():
        guest.send(guests.packet(first))
        until(lambda: wired() == ({first}, {first}))
        assert announced(uplinked, client) == {first}
        with answering(guest, only=[second]):
            until(lambda: wired() == (set(IPS), set(IPS)))
            client.until(guests.rounds_of(*IPS, rounds=1))
    agent.heard("as well: wired")
    assert oracle.neighbours() == dict.fromkeys(IPS, GUEST_MAC)


def test_what_somebody_else_has_said_meanwhile_is_not_changed_by_a_late_answer(uplinked: Node, agent: Agent) -> None:
    guest = uplinked.guest("tap0")
    expect(BOTH)
    with qemu((guest, GUEST_MAC)), agent.when_armed():
        guest.send(guests.packet(GUEST_IP4))
        until(lambda: phase() == "post")
        by_ganeti("tap0", f"{GUEST_IP4},{SECOND_IP4}")
        guest.send(guests.packet(GUEST_IP6))
        witness(uplinked, agent)
        assert wired() == ({GUEST_IP4, SECOND_IP4}, {GUEST_IP4, SECOND_IP4})


def test_a_migration_that_is_cancelled_leaves_nothing_and_can_be_ordered_again(uplinked: Node, agent: Agent) -> None:
    for number in range(2):
        guest = uplinked.guest("tap0")
        expect(FIRST)
        expect(FIRST)  # ordered twice
        with qemu((guest, GUEST_MAC)):
            agent.armed("tap0", number + 1)
            if number:
                with answering(guest):
                    guest.send(rarp())
                    until(lambda: phase() == "post")
        if not number:
            guest.close()
            tools.ip("link del tap0")
            until(lambda: phase() is None)
            assert nobody_is_expected()
    assert oracle.routes("tap0") == {GUEST_IP4}


@pytest.mark.parametrize("moment", ["before the hook", "after the hook", "after QEMU", "once more after pre"])
def test_an_agent_that_starts_in_the_middle_knows_who_is_expected(uplinked: Node, moment: str) -> None:
    with contextlib.ExitStack() as stack:
        if moment == "before the hook":
            stack.enter_context(agents.running())
        check(hook("kvm-ifup", "expect", environ=environment(FIRST)), 0)
        guest = uplinked.guest("tap0")
        if moment == "after the hook":
            stack.enter_context(agents.running())
        stack.enter_context(qemu((guest, GUEST_MAC)))
        if moment == "once more after pre":
            with agents.running() as first:
                first.armed()
            assert phase() == "pre"
        if moment in ("after QEMU", "once more after pre"):
            stack.enter_context(agents.running())
        until(lambda: phase() == "pre")
        stack.enter_context(answering(guest, only=[GUEST_IP4]))
        guest.send(rarp())
        until(lambda: wired() == ({GUEST_IP4}, {GUEST_IP4}))


def test_without_the_agent_nothing_changes_until_ganeti_calls(uplinked: Node) -> None:
    guest = uplinked.guest("tap0")
    check(hook("kvm-ifup", "expect", environ=environment(FIRST)), 0)
    with qemu((guest, GUEST_MAC)):
        assert (phase(), wired()) == (None, NOT_WIRED)
        by_ganeti("tap0", GUEST_IP4)
        assert wired() == ({GUEST_IP4}, {GUEST_IP4})


def test_who_never_comes_is_not_waited_for_without_end(uplinked: Node) -> None:
    with agents.configured(agent={"arrival_timeout": 1}), agents.running() as agent:
        expect(FIRST)
        agent.heard(INSTANCE, "expected no longer")
        until(nobody_is_expected)
        guest = uplinked.guest("tap0")
        with qemu((guest, GUEST_MAC)):
            witness(uplinked, agent)
            assert phase() is None


def test_what_ganeti_itself_wires_is_left_alone(uplinked: Node, agent: Agent) -> None:
    """A guest that is started here after all, one that its scripts have wired by now, and NICs in other modes."""
    one, two = uplinked.guest("tap0"), uplinked.guest("tap1")
    expect(FIRST, {"MODE": "routed", "MAC": SECOND_MAC, "IP": SECOND_IP4, "NAME": "ganeti:communication:web1"})
    with qemu((one, GUEST_MAC), (two, SECOND_MAC), incoming=False):
        until(nobody_is_expected)
        assert (phase("tap0"), phase("tap1")) == (None, None)
    by_ganeti("tap0", GUEST_IP4)
    before = journal("tap0")
    expect(SECOND, {**FIRST, "IP": "192.0.2.77"})
    with qemu((one, GUEST_MAC), (two, SECOND_MAC)):
        agent.armed("tap1")
        assert nobody_is_expected()
        assert journal("tap0") == before


def test_its_unit_lets_it_see_which_taps_a_qemu_has(uplinked: Node) -> None:
    """QEMU runs as root, with everything that root may do; the agent may do less, and so it could not look into it."""
    unit = (tools.ROOT / "integration/systemd/kvm-ifupd.service").read_text()
    (names,) = re.findall("^CapabilityBoundingSet=(.*)$", unit, re.M)
    bounds = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names.split())])
    with agents.running(within=["setpriv", "--bounding-set", bounds]) as agent:
        expect(FIRST)
        with qemu((uplinked.guest("tap0"), GUEST_MAC)):
            agent.armed()


@pytest.mark.parametrize("incoming", [True, False])
def test_an_old_pid_file_may_have_another_guests_number(uplinked: Node, agent: Agent, incoming: bool) -> None:
    other, guest = uplinked.guest("tap0"), uplinked.guest("tap1")
    with qemu((other, SECOND_MAC), incoming=incoming):
        expect(FIRST)
        witness(uplinked, agent)
        assert not nobody_is_expected()
        assert phase("tap0") is None
        with qemu((guest, GUEST_MAC)):
            agent.armed("tap1")
            assert nobody_is_expected()


def test_a_node_that_has_become_unfit_meanwhile_is_tried_again(uplinked: Node, agent: Agent) -> None:
    expect(FIRST)
    tools.run("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0")
    guest = uplinked.guest("tap0")
    with qemu((guest, GUEST_MAC)):
        agent.heard("not prepared for its arrival", "forwarding is off")
        tools.run("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=1")
        agent.armed()
        assert agent.said().count("not prepared for its arrival") == 1
