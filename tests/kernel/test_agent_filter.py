"""The agent and nftables: what somebody takes from our tables is there again at once, and that is said once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from harness import agents, disturb, hooks, manager, nodes, oracle, tools, wire
from harness.addresses import CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC
from harness.agents import Agent, until
from harness.guests import witness
from harness.hooks import call, check
from harness.nodes import Node
from kvmifup.inputs import config
from kvmifup.runs.arriving import prepare_arrival
from kvmifup.runs.moves import restrict
from kvmifup.runs.session import opened
from tests.kernel.test_sources import FORGED, NIC, elements, from_guest, met, packet, passed, sources
from tests.kernel.test_watch import METRICS, Watcher


@pytest.fixture
def guest(uplinked: Node) -> Iterator[tuple[Agent, wire.Tap, wire.Wire]]:
    """An agent, a guest that it looks after, and what the client hears."""
    with agents.running() as agent:
        met(uplinked)
        tap = uplinked.guest()
        manager.write_nic("tap0", "web1", **NIC)
        agents.through("kvm-ifup-post", "tap0")
        witness(uplinked, agent)
        until(agent.rests)
        yield agent, tap, uplinked.listen()


@contextmanager
def flood(tap: wire.Tap) -> Iterator[None]:
    """The guest sends forged packets all the time."""
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            from_guest(tap, packet(FORGED[0]))
            time.sleep(0.002)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("command", ["flush ruleset", "delete table inet kvm-ifup", "flush chain inet kvm-ifup strict"])
def test_rules_that_are_flushed_during_a_flood_are_back_at_once(
    guest: tuple[Agent, wire.Tap, wire.Wire], command: str
) -> None:
    agent, tap, client = guest
    with flood(tap):
        agent.send(signal.SIGSTOP)
        tools.run("nft", *command.split())
        client.until(lambda frame: FORGED[0].encode() in frame)  # it is really open
        agent.send(signal.SIGCONT)
        # Sooner than at the next look at everything: the kernel has told it.
        agent.heard("tap0): mended: ", "tap0 IPv6 sources: any -> strict")
        assert sources(passed(tap, client, []))[-1:] in ([FORGED[0]], [])
        assert sources(passed(tap, client, map(packet, FORGED))) == []
    assert agent.said().count("mended") == 1


def test_each_guest_is_closed_again_and_named_once(uplinked: Node) -> None:
    with agents.running() as agent:
        for number in range(4):
            nodes.add_tap(f"tap{number}")
            manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=[f"2001:db8::{number + 80:x}"],
                              mac=f"aa:00:00:35:ac:{number:02x}")  # fmt: skip
            agents.through("kvm-ifup-post", f"tap{number}")
        witness(uplinked, agent)
        until(agent.rests)
        tools.run("nft", "flush", "ruleset")
        until(lambda: len(elements("sources")) == 4)
        until(lambda: agent.said().count("IPv6 sources: any -> strict") == 4)
        assert len(elements("addresses")) == len(elements("dropped_address")) == 4


def quiet(seconds: float) -> bool:
    """Whether nobody changes anything in nftables for a while."""
    with subprocess.Popen(["nft", "monitor"], stdout=subprocess.PIPE, text=True) as monitor:
        time.sleep(seconds)
        monitor.terminate()
        assert monitor.stdout
        return monitor.stdout.read() == ""


def test_what_the_agent_writes_itself_does_not_wake_it_again_and_again(
    guest: tuple[Agent, wire.Tap, wire.Wire],
) -> None:
    agent, _, _ = guest
    tools.run("nft", "flush", "ruleset")
    agent.heard("tap0): mended: ")
    assert quiet(1.0)
    assert agent.said().count("mended") == 1


def test_what_others_do_to_their_own_tables_is_nothing_to_mend(guest: tuple[Agent, wire.Tap, wire.Wire]) -> None:
    agent, tap, client = guest
    for line in ("add table inet kvm-ifup2", "add table ip kvm-ifup", "add chain inet kvm-ifup2 strict",
                 "delete table ip kvm-ifup", "delete table inet kvm-ifup2"):  # fmt: skip
        tools.run("nft", *line.split())
    time.sleep(0.5)
    assert "mended" not in agent.said()
    assert sources(passed(tap, client, map(packet, [*FORGED, GUEST_IP6]))) == [GUEST_IP6]


def test_a_guest_that_is_armed_is_closed_again_too(uplinked: Node) -> None:
    with agents.running() as agent:
        met(uplinked)
        tap = uplinked.guest()
        manager.write_nic("tap0", "web1", **NIC, incoming=True)
        agents.through("kvm-ifup-pre", "tap0")
        agent.armed()
        tools.run("nft", "flush", "ruleset")
        until(lambda: len(elements("sources")) == 1)
        assert tap.name == "tap0"


@pytest.mark.parametrize(
    "command",
    ["flush ruleset", "flush table bridge kvm-ifup", "delete table netdev kvm-ifup", "of one guest", "opened"],
)
def test_a_bridged_guests_filter_is_put_back_as_well(uplinked: Node, command: str) -> None:
    nodes.add_bridge()
    with agents.running() as agent:
        for number in range(2):
            nodes.add_tap(f"tap{number}")
            manager.write_nic(f"tap{number}", f"web{number}", mode="bridged", link="br0", ip=[f"192.0.2.{80 + number}"],
                              filter="address", mac=f"aa:00:00:35:ac:0{number}")  # fmt: skip
            agents.through("kvm-ifup-post", f"tap{number}")
        witness(uplinked, agent)
        until(agent.rests)
        before = bridge_table()
        if command == "of one guest":
            tools.run("nft", "flush set bridge kvm-ifup inner_macs;flush chain netdev kvm-ifup nic-tap0;"
                             "delete chain netdev kvm-ifup nic-tap0")  # fmt: skip
        elif command == "opened":  # with its comment, so that it looks right
            (rule,) = re.findall(r"vmap @guests comment (.*) # handle (.*)", nft_chain("prerouting"))
            tools.run("nft", f"replace rule bridge kvm-ifup prerouting handle {rule[1]} accept comment {rule[0]}")
        else:
            tools.run("nft", *command.split())
        until(lambda: bridge_table() == before)
        until(lambda: "tap0): mended: " in agent.said())


def nft_chain(name: str) -> str:
    """A chain of the table for bridged guests, with handles."""
    return tools.run("nft", "-a", "list", "chain", "bridge", "kvm-ifup", name)


MANY, ROUTED = 60, 30


@contextmanager
def transactions() -> Iterator[Callable[[], int]]:
    """Counts those in which others than nft change nftables."""
    with subprocess.Popen(["nft", "monitor"], stdout=subprocess.PIPE, text=True) as monitor:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(iter(monitor.stdout.readline, "")))  # type: ignore[union-attr]
        reader.start()
        while not lines:  # it listens
            tools.run("nft", "add", "table", "ip", "heard")
            tools.run("nft", "delete", "table", "ip", "heard")
            time.sleep(0.05)

        def counted() -> int:
            tools.run("nft", "add", "table", "ip", "last")
            until(lambda: any(" table ip last" in line for line in lines))
            by = [line for line in lines if line.startswith("# new generation")]
            return sum(not line.rstrip().endswith("(nft)") for line in by)

        try:
            yield counted
        finally:
            monitor.terminate()
            reader.join()


def test_many_bridged_guests_are_closed_again_in_a_few_transactions(node: Node) -> None:
    nodes.add_bridge()
    node.uplink(master="br0")
    with agents.running() as agent:
        guests = [node.guest(f"tap{number}") for number in range(MANY)]
        macs = [f"aa:00:00:35:ad:{number:02x}" for number in range(MANY)]
        for number, mac in enumerate(macs):
            manager.write_nic(f"tap{number}", "web1", number, mode="bridged", link="br0", mac=mac, filter="address",
                              ip=[f"192.0.2.{100 + number}"])  # fmt: skip
        agents.through("kvm-ifup-post", "--instance", "web1")
        until(agent.rests)
        before, client = bridge_table(), node.listen()
        forged = [wire.arp_request(CLIENT_MAC, f"192.0.2.{100 + number}", "192.0.2.1") for number in range(MANY)]
        with transactions() as counted:
            agent.send(signal.SIGSTOP)
            tools.run("nft", "flush", "ruleset")
            guests[-1].send(forged[-1])
            client.until(lambda frame: frame == forged[-1])  # they are really open
            agent.send(signal.SIGCONT)
            until(lambda: agent.said().count("mended: ") == MANY)
            assert 0 < counted() <= 4  # what they share, with one of them; a note of that; the others; and one to spare
        tools.run("nft", "delete", "table", "ip", "last")
        assert bridge_table() == before
        for guest, frame, mac in zip(guests, forged, macs, strict=True):
            guest.send(frame)
            guest.send(wire.arp_request(mac, "192.0.2.66", "192.0.2.1"))
        guests[-1].send(right := wire.arp_request(macs[-1], f"192.0.2.{99 + MANY}", "192.0.2.1"))
        heard = client.until(lambda frame: frame == right)
        assert [frame for frame in heard[:-1] if frame[12:14] == b"\x08\x06"] == []


def test_many_routed_guests_are_closed_again_in_a_few_transactions(uplinked: Node) -> None:
    with agents.running() as agent:
        met(uplinked)
        tap = uplinked.guest()
        manager.write_nic("tap0", "web1", 0, **NIC)
        for number in range(1, ROUTED):
            nodes.add_tap(f"tap{number}")
            manager.write_nic(f"tap{number}", "web1", number, mode="routed", ip=[f"2001:db8:7::{number:x}"],
                              mac=f"aa:00:00:35:ad:{number:02x}")  # fmt: skip
        agents.through("kvm-ifup-post", "--instance", "web1")
        witness(uplinked, agent)
        until(agent.rests)
        client = uplinked.listen()
        with transactions() as counted:
            agent.send(signal.SIGSTOP)
            tools.run("nft", "flush", "ruleset")
            from_guest(tap, packet(FORGED[0]))
            client.until(lambda frame: FORGED[0].encode() in frame)
            agent.send(signal.SIGCONT)
            until(lambda: agent.said().count("IPv6 sources: any -> strict") == ROUTED)
            assert 0 < counted() <= 2
        assert len(elements("sources")) == len(elements("dropped_address")) == ROUTED
        client = uplinked.listen()  # the buffer of the other one may be full of announcements
        assert sources(passed(tap, client, map(packet, FORGED))) == []


def test_one_that_cannot_be_mended_holds_up_nobody_else(node: Node) -> None:
    for bridge in ("br0", "br1"):
        nodes.add_bridge(bridge)
    with agents.running() as agent:
        for number in range(8):
            nodes.add_tap(f"tap{number}")
            manager.write_nic(f"tap{number}", "web1", number, mode="bridged", link="br1" if number == 3 else "br0",
                              ip=[f"192.0.2.{80 + number}"], filter="mac", mac=f"aa:00:00:35:ac:0{number}")  # fmt: skip
        agents.through("kvm-ifup-post", "--instance", "web1")
        tools.ip("link del br1")
        agent.heard("tap3", "cannot be mended")
        until(agent.rests)
        with transactions() as counted:
            agent.send(signal.SIGSTOP)
            tools.run("nft", "flush", "ruleset")
            agent.send(signal.SIGHUP)  # it looks at all of them, as after more events than it has room for
            agent.send(signal.SIGCONT)
            until(lambda: agent.said().count("): mended: ") == 8)  # nor does it stay open itself
            assert 0 < counted() <= 4


def filtered(many: int) -> None:
    """So many filtered NICs of web1 on one bridge."""
    nodes.add_bridge()
    nodes.add_port("br0")
    for number in range(many):
        nodes.add_tap(f"tap{number}")
        manager.write_nic(f"tap{number}", "web1", number, mode="bridged", link="br0", ip=[f"192.0.2.{80 + number}"],
                          filter="mac", mac=f"aa:00:00:35:ac:0{number}")  # fmt: skip


def test_one_that_goes_meanwhile_keeps_nobody_else_open(node: Node) -> None:
    with agents.running() as agent:
        filtered(8)
        agents.through("kvm-ifup-post", "--instance", "web1")
        until(agent.rests)
        agent.send(signal.SIGSTOP)
        tools.run("nft", "flush", "ruleset")
        tools.ip("link del tap3")
        agent.send(signal.SIGCONT)
        until(lambda: agent.said().count("mended: ") == 7)
        guests = json.loads(tools.run("nft", "-j", "list", "map", "bridge", "kvm-ifup", "guests"))["nftables"]
        (found,) = [one["map"]["elem"] for one in guests if "map" in one]
        assert sorted(name for name, _ in found) == [f"tap{number}" for number in range(8) if number != 3]
        assert agents.journal("tap3") is None


@pytest.mark.parametrize("wrong", ["chmod 666 {}", "truncate -s 9 {}"], ids=["anybody's", "unreadable"])
def test_one_whose_journal_is_wrong_has_the_others_closed_at_once(node: Node, wrong: str) -> None:
    with agents.running() as agent:
        filtered(8)
        agents.through("kvm-ifup-post", "--instance", "web1")
        until(agent.rests)
        with transactions() as counted:
            agent.send(signal.SIGSTOP)
            tools.run("sh", "-c", wrong.format(agents.STATE / "tap3.json"))
            tools.run("nft", "flush", "ruleset")
            agent.send(signal.SIGCONT)
            until(lambda: agent.said().count("mended: ") == 7)
            assert 0 < counted() <= 4
        tools.run("nft", "delete", "table", "ip", "last")


def test_a_tap_that_drags_down_its_bridge_leaves_alone_who_is_open(node: Node) -> None:
    devices = ["br0", "tap0", "tap1", "tap2"]
    with agents.running() as agent:
        filtered(3)
        agents.through("kvm-ifup-post", "--instance", "web1")
        until(agent.rests)
        before = bridge_table()
        agent.send(signal.SIGSTOP)
        tools.run("nft", "flush", "ruleset")
        tools.ip("link set tap1 mtu 1400")
        assert oracle.link("br0")["mtu"] == 1400
        agent.send(signal.SIGCONT)
        until(lambda: bridge_table() == before)
        until(lambda: [oracle.link(dev)["mtu"] for dev in devices] == [1500] * 4)
        until(agent.rests)
        assert [oracle.link(dev)["mtu"] for dev in devices] == [1500] * 4


def test_guests_that_may_have_left_are_closed_before_they_are_asked(uplinked: Node) -> None:
    """And what draws their traffic here is put back only once they have answered."""
    ever = {"agent.suspects.ANSWER": 1e6, "agent.suspects.LONGEST": 1e6, "agent.mender.ASKED": 1e6}
    with agents.running(others=ever) as agent:
        met(uplinked)
        uplinked.guest()
        manager.write_nic("tap0", "web1", **NIC)
        agents.through("kvm-ifup-post", "tap0")
        witness(uplinked, agent)
        until(agent.rests)
        before = elements("sources")
        assert len(before) == 1
        agent.send(signal.SIGSTOP)
        tools.ip("link set eth0 down")
        tools.ip("link set eth0 up")
        assert oracle.proxies() == set()  # they have gone with it
        tools.run("nft", "flush", "ruleset")
        agent.send(signal.SIGCONT)
        until(lambda: elements("sources") == before)


def test_while_a_guest_is_open_nothing_is_prepared_for_its_arrival(node: Node) -> None:
    """If the arrival fails, it is undone; and who has been closed meanwhile would be opened by that."""
    filtered(1)
    manager.write_nic("tap0", "web1", mode="bridged", link="br0", ip=["192.0.2.80"], filter="mac",
                      mac="aa:00:00:35:ac:00", incoming=True)  # fmt: skip
    check(call("kvm-ifup-pre", "tap0"), 0)
    tools.run("nft", "flush", "ruleset")
    with opened(manager.RUN_DIR, config.load(None), by="agent") as session:
        assert prepare_arrival("tap0", session) is None
        assert [change.needed for change in restrict(["tap0"], session)[0].changes] == [True]
        assert prepare_arrival("tap0", session)


@pytest.mark.parametrize("how", ["killed", "refused"])
def test_who_has_been_closed_again_stays_so_when_that_is_cut_short(node: Node, how: str) -> None:
    """Whoever clears up after a killed run finds nothing to undo."""
    filtered(2)
    check(call("kvm-ifup-post", "--instance", "web1"), 0)
    before, journals = bridge_table(), [agents.journal(f"tap{number}") for number in range(2)]
    tools.run("nft", "flush", "ruleset")
    stop = disturb.kill if how == "killed" else disturb.refuse
    pid = os.fork()
    if pid == 0:
        with disturb.disturbed(after=stop(2)), opened(manager.RUN_DIR, config.load(None), by="agent") as session:
            try:
                restrict(["tap0", "tap1"], session)
            finally:
                os._exit(7)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended == (-signal.SIGKILL if how == "killed" else 7)
    assert bridge_table() == before
    for remedy in (["kvm-ifup", "gc"], ["kvm-ifup-post", "--instance", "web1"]):
        check(call(*remedy), 0)
        assert bridge_table() == before
    assert [agents.journal(f"tap{number}") for number in range(2)] == journals


def bridge_table() -> list[str]:
    """The table for bridged guests, in any order; the sets count on."""
    found = json.loads(tools.run("nft", "-j", "list", "ruleset"))["nftables"]
    text = [re.sub(r'"handle": \d+|"(packets|bytes)": \d+', "", json.dumps(one)) for one in found]
    return sorted(one for one in text if '"family": "inet"' not in one)


# --- what was dropped ------------------------------------------------------------------------------------------------


def metric(reason: str) -> int:
    """What the agent has counted for the guest."""
    found = re.search(
        rf'^kvm_ifup_dropped_packets_total{{tap="tap0",instance="web1",reason="{reason}"}} (\d+)$',
        METRICS.read_text(),
        re.MULTILINE,
    )
    return int(found[1]) if found else 0


def shown() -> dict[str, int]:
    """What `kvm-ifup show --json` says."""
    (one,) = json.loads(call("kvm-ifup", "show", "--json").out)
    assert isinstance(one["dropped"], dict)
    return one["dropped"]


def a_guest(node: Node) -> tuple[wire.Tap, wire.Wire]:
    """One without an agent."""
    met(node)
    tap = node.guest()
    manager.write_nic("tap0", "web1", **NIC)
    check(call("kvm-ifup-post", "tap0"), 0)
    return tap, node.listen()


def the_agent_counts() -> None:
    """An agent runs until it has counted what was dropped: it writes its metrics when it ends, too."""
    noted = METRICS.with_name("drops.json")
    noted.unlink(missing_ok=True)
    with agents.running():
        until(noted.exists)


def test_what_is_dropped_is_counted_shown_and_kept_when_addresses_change(uplinked: Node) -> None:
    tap, client = a_guest(uplinked)
    assert shown() == {}
    passed(tap, client, map(packet, FORGED))
    assert shown() == {"address": len(FORGED)}
    assert f"dropped of what it sent: {len(FORGED)} (address)" in call("kvm-ifup", "show").out
    manager.write_nic("tap0", "web1", **{**NIC, "ip": [GUEST_IP6]})
    check(call("kvm-ifup-post", "tap0"), 0)
    assert shown() == {"address": len(FORGED)}
    the_agent_counts()
    assert metric("address") == len(FORGED)
    check(call("kvm-ifdown", "tap0"), 0)
    with agents.running() as agent:
        time.sleep(0.5)
        assert agent.process.poll() is None
    assert metric("address") == 0


def test_what_a_bridged_guest_sends_is_counted_by_reason(uplinked: Node) -> None:
    nodes.add_bridge()
    tap = uplinked.guest()
    manager.write_nic("tap0", "web1", mode="bridged", link="br0", ip=[GUEST_IP4], filter="address")
    check(call("kvm-ifup-post", "tap0"), 0)
    tap.send(wire.arp_request("02:00:00:00:00:66", GUEST_IP4, "192.0.2.1"))
    tap.send(wire.arp_request(GUEST_MAC, "192.0.2.66", "192.0.2.1"))
    tap.send(wire.arp_request(GUEST_MAC, "192.0.2.67", "192.0.2.1"))
    tap.send(wire.router_advertisement(GUEST_MAC, "fe80::a800:ff:fe35:ac01"))
    until(lambda: shown() == {"mac": 1, "address": 3} or shown() == {"mac": 1, "address": 2, "router": 1})
    the_agent_counts()
    assert metric("mac") == 1


def test_check_names_a_guest_of_which_much_is_dropped_and_does_not_fail(uplinked: Node) -> None:
    tap, client = a_guest(uplinked)
    passed(tap, client, map(packet, FORGED[:5]))
    few = call("kvm-ifup", "check")
    assert (few.code, "dropped" in few.out) == (0, False)
    passed(tap, client, [packet(FORGED[0])] * 2000)
    many = call("kvm-ifup", "check")
    assert many.code == 0
    assert re.search(r"\d+ packets a second from the guest are dropped \(address\), 2005 so far", many.out)
    assert "not in ip of its NIC" in many.out


@pytest.mark.parametrize(("ago", "noted", "named"), [(20, 2000, False), (20, 0, True), (1, 0, True), (90, 0, True)])
def test_what_the_agent_has_noted_tells_what_happens_now(uplinked: Node, ago: float, noted: int, named: bool) -> None:
    """Many that were dropped in the past are no news; but a note that is too fresh or too old tells nothing."""
    tap, client = a_guest(uplinked)
    passed(tap, client, [packet(FORGED[0])] * 2000)
    counts = {"tap0": {"address": noted}}
    note = manager.RUN_DIR / "drops.json"
    note.write_text(json.dumps({"at": time.monotonic() - ago, "counts": counts}))
    note.chmod(0o600)
    assert ("packets a second" in call("kvm-ifup", "check").out) is named


def test_watch_shows_it_live(uplinked: Node) -> None:
    tap, client = a_guest(uplinked)
    watcher = Watcher()
    check(call("kvm-ifup-post", "tap0"), 0)
    until(lambda: "kvm-ifup-post: " in watcher.said())  # it has looked what was dropped before, so that this is no news
    passed(tap, client, map(packet, FORGED))
    told = re.compile(r"nftables: tap0: dropped of what its guest sent: (\d+) \(address\)")
    until(lambda: sum(map(int, told.findall(watcher.said()))) == len(FORGED))  # perhaps in two pieces
    assert watcher.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_trace_shows_each_packet_of_one_guest_and_is_off_again(uplinked: Node, number: int) -> None:
    tap, client = a_guest(uplinked)
    out = nodes.scratch() / "trace"
    with out.open("w") as file:
        tracer = subprocess.Popen(hooks.command("kvm-ifup", "watch", "--trace", "tap0"), env=tools.CLEAN, stdout=file)
    until(lambda: "kvm-ifup-trace" in tools.run("nft", "list", "tables"))
    verdict = "rule iifname @dropped_address drop (verdict drop)"
    until(lambda: passed(tap, client, [packet(FORGED[0])]) == [] and verdict in out.read_text())
    said = out.read_text()
    assert f"ip6 saddr {FORGED[0]}" in said
    assert 'iif "tap0"' in said
    assert 'iif "eth0"' not in said
    tracer.send_signal(number)
    assert tracer.wait(tools.PATIENCE) == (0 if number == signal.SIGINT else -number)
    assert "kvm-ifup-trace" not in tools.run("nft", "list", "tables")


def test_a_trace_of_what_is_not_there_is_refused(uplinked: Node) -> None:
    assert uplinked.taps == []
    check(call("kvm-ifup", "watch", "--trace", "tap7"), 69, "no such device: tap7")
