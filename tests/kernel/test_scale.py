"""What a hook costs does not grow with the number of NICs: it reads as much among many as among few."""

from __future__ import annotations

import gc
import ipaddress
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from harness import manager, nodes, tools
from harness.hooks import call, check
from harness.nodes import Node
from harness.oracle import sysctl
from kvmifup.agent import events
from kvmifup.agent.departures import Departures
from kvmifup.agent.loop import Loop
from kvmifup.agent.runner import Runner
from kvmifup.agent.taps import TapRecord
from kvmifup.core.model import Nic
from kvmifup.core.ops import LinkMaster, Op, Value
from kvmifup.diagnosis import bridged
from kvmifup.node import messages, overview, procfs, reserved, routes, settings, sockets, standing, transport
from kvmifup.node.addresses import link_local
from kvmifup.node.kernel import Kernel
from kvmifup.node.netlink import Netlink
from kvmifup.node.overview import WholeView
from kvmifup.node.transport import Transport, split
from kvmifup.node.view import View
from kvmifup.runs import store
from kvmifup.runs.index import Index
from kvmifup.runs.journal import Journal
from kvmifup.runs.store import Store


@pytest.fixture(autouse=True)
def as_in_the_agent(uplinked: Node) -> Iterator[None]:
    """What the agent keeps of the node is kept by this process."""
    end = standing.keep()
    yield
    end()


# --- routes and rules that there may be ----------------------------------------------------------------------

ROUTES: dict[str, list[str]] = {
    "IPv4": ["route add 198.18.0.9 dev tap5", "route del 198.18.0.9"],
    "IPv6": ["-6 route add 2001:db8:1::9 dev tap5", "-6 route del 2001:db8:1::9"],
    "a prefix": ["route add 198.18.9.0/29 via 192.0.2.77", "route del 198.18.9.0/29"],
    "another device": ["route add 198.18.0.9 dev tap5", "route replace 198.18.0.9 dev tap6"],
    "another device, IPv6": ["-6 route add 2001:db8:1::9 dev tap5", "-6 route replace 2001:db8:1::9 dev tap6"],
    "two": ["route add 198.18.0.9 dev tap5 metric 7", "route add 198.18.0.9 dev tap6 metric 5"],
    "two, IPv6": ["-6 route add 2001:db8:1::9 dev tap5", "-6 route append 2001:db8:1::9 dev tap6"],
    "several hops": ["route add 198.18.0.9 nexthop dev tap5 nexthop dev tap6"],
    "several hops, IPv6": [
        "-6 route add 2001:db8:1::9 nexthop via fe80::5 dev tap5 nexthop via fe80::6 dev tap6",
        "-6 route del 2001:db8:1::9 nexthop via fe80::5 dev tap5",
        "-6 route append 2001:db8:1::9 dev tap5",
    ],
    "a nexthop object": [
        "link add name eth1 type veth peer name far1",
        "link set far1 up",
        "link set eth1 up",
        "nexthop add id 8 dev eth0",
        "route add 198.18.0.9 nhid 8",
        "nexthop replace id 8 dev eth1",
    ],
    "nowhere": ["route add blackhole 198.18.0.9", "-6 route add unreachable 2001:db8:1::9"],
    "a device that goes": ["route add 198.18.0.9 dev tap5", "link del tap5"],
    "a device that goes down": ["route add 198.18.0.9 dev tap5", "link set tap5 down", "link set tap5 up"],
    "another table": ["route add 198.18.0.9 dev tap5 table 100", "route add 198.18.0.9 dev tap6 table 1000"],
    "rules": ["rule add iif tap5 lookup 100", "-6 rule add iif tap5 lookup 100", "rule del iif tap5 lookup 100"],
    "rules in order": [
        "rule add pref 300 iif tap5 lookup 100",
        "rule add pref 200 iif tap5 lookup 101",
        "rule add pref 300 iif tap5 lookup 102",
        "rule add pref 250 iif tap5 to 198.18.0.0/24 lookup 102",
        "rule del pref 300 iif tap5 lookup 100",
        "rule add pref 300 iif tap5 lookup 100",
        "rule del pref 250",
    ],
    "rules that say the opposite": [
        "rule add pref 300 not iif tap5 lookup 100",
        "rule add pref 300 iif tap5 lookup 100",
        "rule del pref 300 not iif tap5 lookup 100",
    ],
    "rules of a device that goes": [
        "rule add pref 300 iif tap5 lookup 100",
        "-6 rule add pref 300 iif tap5 lookup 100",
        "link del tap5",
        "rule del pref 300 iif tap5 lookup 100",
        "-6 rule flush",
    ],
    "rules of all devices": [
        "rule add lookup 100",
        "rule add iif tap5 lookup 100",
        "rule flush",
        "rule add lookup main",
    ],
}


def found() -> list[object]:
    """What a run finds of the routes and rules that `ROUTES` are about."""
    view = View()
    prefixes = [ipaddress.ip_network(one) for one in ("198.18.0.9", "198.18.9.0/29", "2001:db8:1::9")]
    routes = [view.routes_to(prefix, table) for prefix in prefixes for table in (254, 100, 1000)]
    rules = [
        [messages.rule_identity(one) for one in view.rule_messages(family, name)]
        for family in (4, 6)
        for name in ("tap5", "tap6")
    ]
    view.close()
    return [*routes, *rules]


def without_what_is_kept(what: Callable[[], list[object]]) -> list[object]:
    """The same as a hook without the agent does it: it looks."""
    held, standing._kept[:] = standing._kept[:], []
    try:
        return what()
    finally:
        standing._kept[:] = held


@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("late", [False, True], ids=["read before", "read after"])
def test_routes_and_rules_are_what_a_look_finds(kind: str, late: bool) -> None:
    nodes.taps(["tap5", "tap6"])
    for name in ("tap5", "tap6"):
        tools.ip(f"link set {name} up")
    seen = []
    for line in (*ROUTES[kind], ROUTES[kind][0]):
        if not late:
            found()
        subprocess.run(["ip", *line.split()], check=False, capture_output=True)  # once more may fail
        seen.append(found())
        assert seen[-1] == without_what_is_kept(found)
    assert any(any(one) for one in seen)


@pytest.mark.parametrize("change", ["add", "del"])
def test_a_rule_that_changes_while_all_are_read_is_known_as_it_is(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read has the change already, and then the kernel tells of it."""
    nodes.add_tap("tap5")
    rule = "pref 300 iif tap5 lookup 100"
    if change == "del":
        tools.ip(f"rule add {rule}")
    read, reads = Netlink.rules_by_iif, itertools.count()

    def reading(via: Netlink, family: int) -> dict[str, list[bytes]]:
        if next(reads) == 0:
            tools.ip(f"rule {change} {rule}")
        return read(via, family)

    monkeypatch.setattr(Netlink, "rules_by_iif", reading)
    for _ in range(2):
        seen = found()
        assert seen == without_what_is_kept(found)
        assert any(seen) == (change == "add")


def test_more_changes_than_the_socket_holds_hide_no_route() -> None:
    nodes.taps(["tap5", "tap6"])
    tools.ip("link set tap5 up")
    assert not any(found())
    lines = "".join(f"link set lo mtu {65536 - number % 2}\n" for number in range(3000))
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)
    for line in ("route add 198.18.0.9 dev tap5", "rule add iif tap6 lookup 100"):
        tools.ip(line)
    assert found() == without_what_is_kept(found)
    assert any(found())


def test_of_a_table_with_very_many_routes_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "MANY", 20)
    nodes.taps(["tap5", "tap6"])
    tools.ip("link set tap5 up")
    found()
    for number in range(40):  # first while it is kept, then as it is read
        tools.ip(f"route add 198.18.3.{number} dev tap5")
        if number % 10 == 0:
            tools.ip("route replace 198.18.0.9 dev tap5")
            assert found() == without_what_is_kept(found)
            tools.ip("route del 198.18.0.9")


def test_changes_that_come_together_are_heard_of_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the loop goes round meanwhile: each time it wakes up, a hook's thread has to wait."""
    monkeypatch.setattr(events, "MOMENT", 3600.0)
    nodes.add_tap("tap5")
    heard: list[frozenset[events.Thing]] = []
    rounds = iter(range(20))
    loop = Loop()
    node = events.NodeEvents(loop, heard.append)

    def change() -> None:
        number = next(rounds, None)
        if number is None:
            loop.stop()
        else:
            tools.ip(f"link set tap5 mtu {1400 + number}")
            loop.soon(change)

    loop.soon(change)
    loop.run()
    assert heard == []
    node.catch_up()  # as whoever needs to know does
    assert len(heard) == 1
    assert ("name", "tap5") in heard[0]
    node.socket.close()
    loop.close()


@pytest.mark.parametrize(
    ("added", "learnt"),
    [
        ("route add 198.18.0.9 dev tap5 proto bird", [("198.18.0.9/32", 12)]),
        ("-6 route add 2001:db8:1::9 dev tap5 proto zebra", [("2001:db8:1::9/128", 11)]),
        ("route add 198.18.0.9 dev tap5 proto static", []),
        ("route add 198.18.0.9 dev tap5", []),
        ("-6 route add 2001:db8:1::9 dev tap5 proto kernel", []),
    ],
)
def test_only_for_routes_of_daemons_is_the_loop_woken_up(added: str, learnt: list[tuple[str, int]]) -> None:
    nodes.add_tap("tap5")
    tools.ip("link set tap5 up")
    heard: list[tuple[str, int]] = []
    loop = Loop()
    routes = events.RouteEvents(loop, lambda prefix, protocol, _index: heard.append((prefix, protocol)))
    tools.ip(added)
    assert routes.read() is bool(learnt)
    assert heard == learnt
    routes.socket.close()
    loop.close()


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([], None),
        (["addr add 2001:db8:7::1/64 dev tap5 nodad"], None),
        (["addr add 2001:db8:7::1/64 dev tap5 nodad", "addr add fe80::5/64 dev tap5 nodad"], "fe80::5"),
        (["addr add fe80::5/64 dev tap6 nodad"], None),
        (["addr add fe80::5/64 dev tap5"], None),  # tentative
    ],
)
def test_the_link_local_address_of_one_device_is_asked_for(lines: list[str], wanted: str | None) -> None:
    nodes.taps(["tap5", "tap6"])
    for name in ("tap5", "tap6"):
        sysctl(f"ipv6/conf/{name}/accept_dad", 1)
        sysctl(f"ipv6/conf/{name}/dad_transmits", 1)
        tools.ip(f"link set {name} addrgenmode none")
    for line in lines:
        tools.ip(line)
    view = View()
    assert link_local(view.netlink.transport, view.index("tap5")) == wanted
    index = view.index("tap5")
    tools.ip("link del tap5")
    assert link_local(view.netlink.transport, index) is None
    view.close()


# --- how much is read ------------------------------------------------------------------------------------------

KINDS = {
    "bridged": {"MODE": "bridged", "LINK": "br0"},
    "routed": {"MODE": "routed", "IP": "198.18.{n}.9,2001:db8:1::{n}"},
    "with a table": {"MODE": "routed", "LINK": "100", "IP": "198.18.{n}.9"},
}
NAMES = list(KINDS)
HOOKS = {"pre": "kvm-ifup-pre", "post": "kvm-ifup-post", "again": "kvm-ifup-post", "down": "kvm-ifdown"}
FILTERED = {"MODE": "bridged", "LINK": "br0", "IP": "198.18.{n}.9", "TAGS": "kvm-ifup:filter:address"}


def run(program: str, kind: str, number: int) -> None:
    """A hook for the NIC with that number, as Ganeti calls it."""
    more = {name: value.replace("{n}", str(number)) for name, value in {**KINDS, "filtered": FILTERED}[kind].items()}
    more |= {"INSTANCE": f"web{number}", "MAC": f"aa:00:00:35:00:{number:02x}"}
    check(call(program, environ=manager.ganeti(f"tap{number}", **more)), 0)


class Reading:
    """Counts what is read: requests, the messages of dumps by kind, journals, and looks at all journals.

    And all that is called meanwhile, as Python tells: functions, and what is built in, so all system calls, too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self._patch = monkeypatch
        self._count(Transport, "send")
        self._count(Store, "stamps")
        self._count(Store, "read")
        parts = Transport.parts

        def counted(transport: Transport, kind: int, body: bytes) -> Iterator[bytes]:
            for part in parts(transport, kind, body):
                self.counts[f"messages of {kind}"] += len(list(split(part)))
                yield part

        monkeypatch.setattr(Transport, "parts", counted)

    def _count(self, owner: type, name: str) -> None:
        before = getattr(owner, name)

        def counting(*given: object, **named: object) -> object:
            self.counts[name] += 1
            return before(*given, **named)

        self._patch.setattr(owner, name, counting)

    def of(self, kind: str) -> dict[str, Counter[str]]:
        """What it takes to wire a NIC, once more, and to take it down."""
        taken = {}
        for what, program in HOOKS.items():
            self.counts.clear()
            sys.setprofile(self._called)
            try:
                run(program, kind, 99)
            finally:
                sys.setprofile(None)
            taken[what] = Counter(self.counts)
        return taken

    def _called(self, _frame: FrameType, event: str, _what: object) -> None:
        self.counts["calls"] += event in ("call", "c_call")


def test_a_hook_among_many_reads_as_much_as_among_few(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index()
    monkeypatch.setattr(store, "index_of", lambda _directory: index)
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    nodes.add_tap("tap99")
    for kind in KINDS:  # from now on what is to be kept is kept
        run("kvm-ifup-post", kind, 99)
        run("kvm-ifdown", kind, 99)
    reading = Reading(monkeypatch)
    counts = []
    for numbers in (range(4), range(4, 40)):
        for number in numbers:
            nodes.add_tap(f"tap{number}")
            run("kvm-ifup-post", NAMES[number % len(NAMES)], number)
        time.sleep(0.05)  # what has only just been written is read once more: a second write could have the same time
        journals = Store(manager.RUN_DIR)
        journals.heed(journals.stamps())  # as the agent does when a journal has changed
        for _ in range(2):  # what is looked up in a journal for the first time makes it easier to look up
            found = {kind: reading.of(kind) for kind in KINDS}
        counts.append(found)
    few, many = counts
    for kind in KINDS:
        for what in few[kind]:
            assert many[kind][what] == few[kind][what], (kind, what)
            assert few[kind][what]["send"] > 0
            assert few[kind][what]["calls"] > 1000
            assert few[kind][what]["stamps"] == 0
            assert few[kind][what]["read"] == (what != "pre")


@pytest.mark.parametrize("kind", [*KINDS, "filtered"])
def test_a_hook_makes_no_netlink_socket_once_there_are_some(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To close one after something was removed from nftables takes longer than all else that kvm-ifdown does."""
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    nodes.add_tap("tap99")
    made: list[socket.socket] = []
    before = transport.opened

    def opened(protocol: int) -> socket.socket:
        made.append(before(protocol))
        return made[-1]

    monkeypatch.setattr(transport, "opened", opened)
    for program in ("kvm-ifup-post", "kvm-ifdown"):
        run(program, kind, 99)
    assert made
    made.clear()
    for program in ("kvm-ifup-post", "kvm-ifup-post", "kvm-ifdown", "kvm-ifdown"):
        run(program, kind, 99)
    assert made == []


@pytest.mark.parametrize("kind", [*KINDS, "filtered"])
def test_what_a_hook_finds_it_reads_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write a setting takes no look at it, and to undo what a journal knows no second one."""
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    nodes.add_tap("tap99")
    counts: Counter[object] = Counter()
    read, read_file = Kernel.read, procfs.read_file

    def counted(kernel: Kernel, op: Op) -> Value:
        counts[op.key] += 1
        return read(kernel, op)

    def counted_file(path: str, *, whole: bool = False) -> str | None:
        counts[path] += path.startswith(procfs.SYSCTL)
        return read_file(path, whole=whole)

    monkeypatch.setattr(Kernel, "read", counted)
    monkeypatch.setattr(procfs, "read_file", counted_file)
    looked = 0
    for program in ("kvm-ifup-post", "kvm-ifup-post", "kvm-ifdown", "kvm-ifdown"):
        counts.clear()
        run(program, kind, 99)
        # Where it was, once before it leaves, and once when it is its turn.
        counts[LinkMaster("tap99", None).key] -= program == "kvm-ifdown"
        assert [what for what, times in counts.items() if times > 1] == []
        looked += len(counts)
    assert looked > 30


def test_what_the_nodes_addresses_reserve_is_worked_out_when_they_have_changed() -> None:
    nodes.add_tap("tap99")

    def worked_out(code: int) -> int:
        before = reserved.of_addresses.cache_info().misses
        check(call("kvm-ifup-post", environ=manager.ganeti("tap99", MODE="routed", IP="198.18.9.9")), code)
        return reserved.of_addresses.cache_info().misses - before

    tools.ip("addr add 198.18.9.1/24 dev eth0")  # no other test has this one
    assert worked_out(0) == 1
    assert worked_out(0) == 0
    tools.ip("addr add 198.18.9.9/32 dev lo")
    assert worked_out(69) == 1
    tools.ip("addr del 198.18.9.9/32 dev lo")
    assert worked_out(0) == 0


@pytest.mark.parametrize("start", ["198.18.0.0", "2001:db8:1::"])
def test_who_is_near_to_others_is_heard_without_listening_anew(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make a filter for all addresses takes longer, the more there are, and a guest comes with each hook."""
    made: list[int] = []
    attach = sockets.attach

    def counted(to: socket.socket, program: list[sockets.Instruction]) -> None:
        made.append(len(program))
        attach(to, program)

    loop = Loop()
    runner = Runner(manager.RUN_DIR, lambda *_said: True)
    departures = Departures(loop, runner, withdrawn=lambda _tap: None, answered=lambda _tap: None)
    which = ("eth0", 6 if ":" in start else 4)
    monkeypatch.setattr(sockets, "attach", counted)

    def come(numbers: Iterable[int]) -> None:
        for number in numbers:
            nic = Nic("tap5", "aa:00:00:00:02:05", "routed", ip=())
            tap = TapRecord(loop, Journal(nic, 5, namespace=1), ())
            tap.places = (("eth0", str(ipaddress.ip_address(start) + number)),)
            departures.found(tap)
        departures.renew()

    come(range(2, 400, 2))
    assert len(made) == 1
    come([5, 6, 11])
    assert len(made) == 1
    come([4000])
    assert len(made) == 2
    assert departures._about[which][0] == departures._wanted[which]
    departures.close()
    loop.close()


# --- looking at all of them ------------------------------------------------------------------------------------


def wired(numbers: range) -> None:
    """So many NICs, of each kind in turn."""
    for number in numbers:
        nodes.add_tap(f"tap{number}")
        run("kvm-ifup-post", NAMES[number % len(NAMES)], number)


@pytest.mark.pyroute2
def test_show_asks_the_kernel_as_little_about_many_nics_as_about_few(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    reading = Reading(monkeypatch)
    sent = []
    for numbers in (range(6), range(6, 42)):
        wired(numbers)
        reading.counts.clear()
        shown = json.loads(call("kvm-ifup", "show", "--json").out)
        assert [nic["wired"] for nic in shown] == [True] * numbers.stop
        sent.append(reading.counts["send"])
    few, many = sent
    assert few > 0
    assert many - few <= 2  # where there are few, a table need not be read


def test_of_filters_show_asks_the_kernel_as_little_about_many_as_about_few(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.add_bridge()
    reading = Reading(monkeypatch)
    sent = []
    for numbers in (range(4), range(4, 24)):
        for number in numbers:
            nodes.add_tap(f"tap{number}")
            run("kvm-ifup-post", "filtered", number)
        for wanted in (True, False):
            reading.counts.clear()
            shown = json.loads(call("kvm-ifup", "show", "--json").out)
            assert [nic["wired"] for nic in shown] == [True, wanted] + [True] * (numbers.stop - 2)
            sent.append(reading.counts["send"])
            # Also what is not whole.
            tools.run("nft", "add" if not wanted else "delete", "element", "bridge", "kvm-ifup", "macs",
                      '{ "tap1" . aa:00:00:35:00:01 }')  # fmt: skip
    assert min(sent) > 0
    assert max(sent) - min(sent) <= 2


def test_what_check_looks_through_grows_with_the_nics_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    counts: Counter[str] = Counter()
    parse, twins = messages.attributes, bridged.is_twin

    def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
        counts["messages"] += 1
        return parse(data, offset)

    def is_twin(*given: Any) -> bool:
        counts["twins"] += 1
        return twins(*given)

    for module in (messages, routes, overview):
        monkeypatch.setattr(module, "attributes", attributes, raising=False)
    monkeypatch.setattr(bridged, "is_twin", is_twin)
    each = []
    for numbers in (range(6), range(6, 48)):
        wired(numbers)
        counts.clear()
        assert len(json.loads(call("kvm-ifup", "check", "--json").out)["nics"]) == numbers.stop
        assert counts["twins"] == numbers.stop // len(KINDS)  # each bridged one looks at itself
        each.append(counts["messages"] / numbers.stop)
    few, many = each
    assert 0 < many <= few


@pytest.mark.parametrize("value", ["0", "1", "2"])
@pytest.mark.parametrize(("family", "name"), settings.PLACES)
def test_a_dump_of_devices_has_their_settings_as_they_are(family: str, name: str, value: str) -> None:
    nodes.taps(["tap5", "tap.6"])
    path = f"net/{family}/conf/tap.6/{name}"
    Path("/proc/sys", path).write_text(value)
    for place in (path, f"net/{family}/conf/tap5/{name}", f"net/{family}/conf/all/{name}"):
        view = WholeView()
        assert view.sysctl(place) == Path("/proc/sys", place).read_text().strip()
        view.close()
    assert WholeView().sysctl(path) in (value, "1")  # of some, any number means yes


class Asked:
    """Counts the files that are opened, by path, and what takes a socket; as a new process, which knows no journal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: Counter[str] = Counter()
        self.sockets = 0
        self._patch = monkeypatch
        before, socket_of, name_of = os.open, socket.socket, socket.if_indextoname

        def opening(path: str, *given: Any, **named: Any) -> int:
            self.opened[os.fspath(path)] += 1
            return before(path, *given, **named)

        class Counted(socket_of):  # type: ignore[valid-type,misc]
            def __init__(inner, *given: Any, **named: Any) -> None:  # noqa: N805
                self.sockets += 1
                super().__init__(*given, **named)

        def naming(index: int) -> str:
            self.sockets += 1  # the C library makes one
            return name_of(index)

        monkeypatch.setattr(os, "open", opening)
        monkeypatch.setattr(socket, "socket", Counted)
        monkeypatch.setattr(socket, "if_indextoname", naming)

    def by(self, *argv: str) -> tuple[Counter[str], int]:
        """What *argv* takes."""
        index = Index()
        self._patch.setattr(store, "index_of", lambda _directory: index)
        self.opened.clear()
        self.sockets = 0
        assert call("kvm-ifup", *argv, "--json").out
        return Counter(self.opened), self.sockets


@pytest.mark.pyroute2
@pytest.mark.parametrize("verb", ["show", "check"])
def test_who_looks_at_all_opens_each_file_once_and_no_socket_for_each(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    wired(range(6))
    asked = Asked(monkeypatch)
    opened, few = asked.by(verb)
    journals = [f"{manager.RUN_DIR}/state/tap{number}.json" for number in range(6)]
    assert [opened[path] for path in journals] == [1] * 6
    ours = (str(manager.RUN_DIR), "/proc/sys/", "/sys/class/net/")
    assert {path: times for path, times in opened.items() if times > 1 and path.startswith(ours)} == {}
    of_each = {path.rpartition("/")[2] for path in opened if "/tap1/" in path}
    assert of_each == {"proxy_delay"}  # no dump has it
    wired(range(6, 24))
    assert asked.by(verb)[1] <= few + 2  # what does not come in one part is asked for once more, on another socket
    assert few > 0


# --- what is left of it in memory ------------------------------------------------------------------------------


def left_for_the_collector(what: Callable[[], object]) -> Counter[str]:
    """Our objects that are in use no longer after *what* was done, and that only the garbage collector finds."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        what()
        gc.collect()
        return Counter(type(one).__qualname__ for one in gc.garbage if type(one).__module__.startswith("kvmifup."))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.pyroute2
@pytest.mark.parametrize("kind", [*KINDS, "filtered"])
def test_what_a_run_has_read_goes_with_it(kind: str) -> None:
    """An agent makes many runs until the garbage collector comes by, and one that looks reads the whole node."""
    nodes.add_bridge()
    tools.ip("route add default via 192.0.2.1 table 100")
    nodes.add_tap("tap99")

    def runs() -> None:
        for program in ("kvm-ifup-pre", "kvm-ifup-post", "kvm-ifup-post"):
            run(program, kind, 99)
        for verb in ("show", "check"):
            assert "tap99" in call("kvm-ifup", verb, "--json").out
        run("kvm-ifdown", kind, 99)

    runs()  # what is loaded meanwhile stays
    assert left_for_the_collector(runs) == {}
