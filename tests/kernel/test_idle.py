"""An agent that has nothing to do: what it does all the same, and that it is no more for many NICs than for few."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import manager, nodes, oracle, tools
from harness.hooks import call, check
from harness.nodes import Node
from kvmifup.agent import agent, leftovers, loop, mender, mending
from kvmifup.agent.agent import Agent
from kvmifup.agent.listening import Listener, OnlyOne
from kvmifup.agent.loop import Loop
from kvmifup.core.ops import Op, ProxyNeighbour, Sysctl
from kvmifup.inputs import devices
from kvmifup.node import drops, procfs, repeated, sockets, unheard
from kvmifup.node.messages import NTF_PROXY, RTM_GETNEIGH, NetlinkError
from kvmifup.node.netlink import Netlink
from kvmifup.node.nfmessages import Element
from kvmifup.node.nfnetlink import Nftables
from kvmifup.node.repeated import Repeated
from kvmifup.node.unheard import PROXIES, Asked, Unheard, differing, proxies_in
from kvmifup.runs import store
from kvmifup.runs.drops import STALE
from kvmifup.runs.index import Index

MANY = 12
SETTLING, REST = 400.0, 1200.0  # seconds: until all was looked at and noted; and those that are counted

# --- an agent that does nothing for long ------------------------------------------------------------------------


class Idle:
    """An agent in this process, with a clock that jumps to what is to be done next when nothing is to be done now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.skipped = 0.0
        self.said: list[str] = []
        begun = time.monotonic()
        clock = SimpleNamespace(monotonic=lambda: begun + self.skipped)  # what is done takes no time
        for module in (loop, agent):
            monkeypatch.setattr(module, "time", clock)
        wait = Loop._wait

        def skipping(one: Loop) -> float | None:
            left = wait(one)
            if left and not one.working and not one._soon:
                self.skipped += left
                return 0.0
            return left

        monkeypatch.setattr(Loop, "_wait", skipping)
        self.loop = Loop()
        self._only = OnlyOne(manager.RUN_DIR / "agent.lock")
        self._listener = Listener(manager.RUN_DIR / agent.SOCKET, self._only)
        self._agent = Agent(self.loop, self._listener, manager.RUN_DIR, self._say)

    def _say(self, line: str, *_more: object, **_named: object) -> bool:
        self.said.append(line)
        return True

    def rest(self, seconds: float) -> None:
        """Let so many seconds go by."""
        self.loop.later(seconds, self.loop.stop)
        self.loop._running = True
        self.loop.run()

    def close(self) -> None:
        """End it."""
        self._listener.remove()
        self._agent.close()
        self._only.close()


@pytest.fixture
def idle(uplinked: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Idle]:
    """The node's agent."""
    index = Index()
    monkeypatch.setattr(store, "index_of", lambda _directory: index)
    manager.RUN_DIR.mkdir(exist_ok=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    with closing(Idle(monkeypatch)) as one:
        yield one
    for number, handler in before.items():
        signal.signal(number, handler)


def wired(numbers: range) -> None:
    """So many routed guests."""
    for number in numbers:
        nodes.add_tap(f"tap{number}")
        given = {"MODE": "routed", "IP": f"192.0.2.{100 + number},2001:db8::{100 + number}"}
        given |= {"INSTANCE": f"web{number}", "MAC": f"aa:00:00:35:00:{number:02x}"}
        check(call("kvm-ifup-post", environ=manager.ganeti(f"tap{number}", **given)), 0)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the kernel is asked for something meanwhile."""
    counts: Counter[str] = Counter()

    def counting(owner: object, name: str) -> None:
        before: Callable[..., object] = getattr(owner, name)

        def call_it(*given: object, **named: object) -> object:
            counts[name] += 1
            return before(*given, **named)

        patch.setattr(owner, name, call_it)

    with monkeypatch.context() as patch:
        for name in ("open", "stat", "lstat", "scandir", "listdir", "rename"):
            counting(os, name)
        for name in ("__init__", "send", "recv"):
            counting(socket.socket, name)
        counting(fcntl, "ioctl")
        yield counts


def test_an_agent_at_rest_asks_as_little_about_many_nics_as_about_one(
    idle: Idle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the looks at a share of them, of which there are so many at most: here it is one at a time."""
    for name in ("SHARE", "MOST", "TURNS"):
        monkeypatch.setattr(mending, name, 1)
    found = []
    for numbers in (range(1), range(1, MANY)):
        wired(numbers)
        idle.rest(SETTLING)
        with counted(monkeypatch) as counts:
            idle.rest(REST)
        found.append(counts)
    few, many = found
    assert few["send"] > REST / mending.PERIOD
    assert few["scandir"] == 0  # no look at all journals
    assert few["rename"] == 0  # nothing is written that is there already
    # There may be a turn more or less in that time.
    assert {name: times for name, times in many.items() if abs(times - few[name]) > 4 + few[name] / 50} == {}


def test_after_a_long_rest_what_is_lost_is_still_noticed(idle: Idle) -> None:
    """Not by an event: of neither does the kernel say a word."""
    wired(range(MANY))
    idle.rest(REST)
    proxies, delay = oracle.proxies(), Path("/proc/sys/net/ipv4/neigh/eth0/proxy_delay")
    assert {"192.0.2.107", "2001:db8::107"} < proxies
    for line in ("neigh del proxy 192.0.2.107 dev eth0", "-6 neigh del proxy 2001:db8::111 dev eth0"):
        tools.ip(line)
        idle.rest(2 * mending.PERIOD)
        assert oracle.proxies() == proxies
    delay.write_text("80")
    idle.rest(2 * mending.PERIOD)
    assert delay.read_text() == "0\n"
    assert sum("mended: " in line for line in idle.said) >= 2


def test_what_could_not_be_done_is_tried_again_and_nothing_else(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(range(2))
    (manager.RUN_DIR / "state" / "tap1.json").write_text("{")  # a person with an editor
    idle.rest(1.0)
    read: list[str] = []
    before = store.Store.read

    def reading(one: store.Store, tap: str) -> object:
        read.append(tap)
        return before(one, tap)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "read", reading)
        idle.rest(3.5 * agent.RETRY)
    assert read.count("tap1") >= 3
    assert set(read) == {"tap1"}


@contextmanager
def without_descriptors(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """*name* of *owner* has no descriptor for what it does meanwhile. Gives what it was called with, each time."""
    failures: list[object] = []

    def fail(*given: object, **named: object) -> None:
        failures.append((given, named))
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield failures
    assert failures


def test_a_dead_nic_that_could_not_be_cleared_up_is_tried_again(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(range(2))
    idle.rest(SETTLING)
    with without_descriptors(leftovers, "collect", monkeypatch) as failures:
        tools.ip("link del tap1")
        idle.rest(1.0)
        idle.rest(agent.RETRY)
    assert len(failures) == 2
    assert {"192.0.2.100", "192.0.2.101"} < oracle.proxies()
    idle.rest(agent.RETRY)
    assert oracle.proxies() == {"192.0.2.100", "2001:db8::100"}


def test_a_nic_that_was_not_seen_to_go_is_cleared_up_later(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(range(2))
    idle.rest(1.0)
    with without_descriptors(devices, "no_longer", monkeypatch):
        tools.run("sh", "-c", "ip link set tap1 down; ip link set tap1 name old1")
        for _ in range(2):  # it hears of it, and looks
            idle.rest(1.0)
    assert {"192.0.2.100", "192.0.2.101"} < oracle.proxies()
    idle.rest(agent.RETRY)
    assert oracle.proxies() == {"192.0.2.100", "2001:db8::100"}


def test_a_nic_that_was_seen_to_go_stays_dead_when_nobody_can_be_asked(
    idle: Idle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptors are used up while it is cleared up."""
    wired(range(2))
    idle.rest(SETTLING)

    def fail(*_given: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:

        def fail_from_now_on(*_given: object) -> None:
            patch.setattr(devices, "index_of", fail)
            patch.setattr(devices, "no_longer", fail)
            fail()

        patch.setattr(leftovers, "collect", fail_from_now_on)
        monkeypatch.setattr(leftovers.Leftovers, "devices_changed", lambda _one, _things: None)
        tools.ip("link del tap1")
        idle.rest(1.0)
    assert {"192.0.2.100", "192.0.2.101"} < oracle.proxies()
    idle.rest(agent.RETRY)
    assert oracle.proxies() == {"192.0.2.100", "2001:db8::100"}


def test_nics_at_which_nobody_could_look_are_looked_at_again(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sooner than it would be their turn."""
    wired(range(2))
    idle.rest(1.0)
    with without_descriptors(mender, "opened", monkeypatch):
        tools.ip("route del 192.0.2.101 dev tap1")
        for _ in range(2):
            idle.rest(1.0)
    assert oracle.routes("tap1") == {"2001:db8::101"}
    idle.rest(2 * mending.PERIOD)
    assert oracle.routes("tap1") == {"192.0.2.101", "2001:db8::101"}


def test_where_nobody_could_listen_it_is_tried_again(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nobody would hear that a guest is on another node now."""
    before = len(oracle.packet_sockets("eth0"))
    with without_descriptors(sockets, "uplink_listener", monkeypatch):
        wired(range(1))
        idle.rest(1.0)
    assert len(oracle.packet_sockets("eth0")) == before
    idle.rest(agent.RETRY)
    assert len(oracle.packet_sockets("eth0")) == before + 2, "for IPv4 and IPv6"


def dropped(tap: str, packets: int) -> None:
    """So many have been by now, as the kernel would have counted on; nft has no word for that."""
    tools.run("nft", f"delete element inet kvm-ifup dropped_address {{ {tap} }}")
    tools.run("nft", f"add element inet kvm-ifup dropped_address {{ {tap} counter packets {packets} bytes 9 }}")


def test_what_was_dropped_and_could_not_be_read_is_read_the_next_time(
    uplinked: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(range(1))
    dropped("tap0", 5)
    with closing(drops.Counting()) as counting:
        with without_descriptors(Nftables, "elements", monkeypatch):
            assert counting.counted() == {}
        for _ in range(2):
            assert counting.counted() == {"tap0": {"address": 5}}


def test_what_was_dropped_is_taken_apart_when_it_has_changed(uplinked: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    plain = drops.packets_of

    def packets_of(element: Element) -> int:
        looks.append(element)
        return plain(element)

    monkeypatch.setattr(drops, "packets_of", packets_of)
    with closing(drops.Counting()) as counting:
        assert counting.counted() == {}  # there is no table yet
        wired(range(3))
        assert counting.counted() == {}
        assert len(looks) == 3
        for packets in (5, 7):
            dropped("tap1", packets)
            found = counting.counted()
            assert found == {"tap1": {"address": packets}}
            looks.clear()
            assert counting.counted() is found
            assert looks == []
        tools.run("nft", "delete table inet kvm-ifup")
        assert counting.counted() == {}


def test_the_note_of_what_was_dropped_is_never_old(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nothing more is: `kvm-ifup check` tells a rate by it."""
    wired(range(1))
    dropped("tap0", 5)
    written: list[float] = []
    monkeypatch.setattr(agent, "save_drops", lambda _run_dir, _counts: written.append(idle.skipped))
    idle.rest(REST)
    assert len(written) > 1
    assert max(later - one for one, later in pairwise(written)) < STALE
    assert len(written) <= REST / agent.COUNT / 2


# --- proxy neighbours, and settings ------------------------------------------------------------------------------


def proxies(lines: str) -> None:
    """Add or remove very many."""
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)


@pytest.mark.parametrize("many", [0, 1, 700])
def test_a_dump_has_all_proxy_neighbours_and_is_the_same_again(uplinked: Node, many: int) -> None:
    """700 take more than one part."""
    added = [f"198.18.{number // 200}.{number % 200 + 1}" for number in range(many)]
    added += [f"2001:db8:7::{number + 1:x}" for number in range(many)]
    index = socket.if_nametoindex("eth0")
    proxies("".join(f"neigh add proxy {address} dev eth0\n" for address in added))
    netlink = Netlink()
    with closing(Repeated(socket.NETLINK_ROUTE)) as dumps:
        for _ in range(3):
            dump = dumps.dump(RTM_GETNEIGH, PROXIES)
            assert proxies_in(dump) == {(index, address) for address in added} == netlink.neighbours(NTF_PROXY).keys()
        assert dumps.dump(RTM_GETNEIGH, PROXIES) == dump
        if added:
            tools.ip(f"neigh del proxy {added[-1]} dev eth0")
            assert proxies_in(dumps.dump(RTM_GETNEIGH, PROXIES)) == {(index, address) for address in added[:-1]}
            tools.ip(f"neigh add proxy {added[-1]} dev eth0")
            assert proxies_in(dumps.dump(RTM_GETNEIGH, PROXIES)) == proxies_in(dump)
    netlink.close()


def test_a_refusal_is_an_error_and_the_next_dump_is_one_again(uplinked: Node) -> None:
    tools.ip("neigh add proxy 198.18.0.1 dev eth0")
    with closing(Repeated(socket.NETLINK_ROUTE)) as dumps:
        dump = dumps.dump(RTM_GETNEIGH, PROXIES)
        for _ in range(2):
            with pytest.raises(NetlinkError):
                dumps.dump(RTM_GETNEIGH, b"\0")
            assert dumps.dump(RTM_GETNEIGH, PROXIES) == dump


def test_what_is_left_of_a_dump_that_failed_is_not_taken_for_the_next(
    uplinked: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxies("".join(f"neigh add proxy 198.18.1.{number} dev eth0\n" for number in range(1, 200)))
    with closing(Repeated(socket.NETLINK_ROUTE)) as dumps:
        whole = proxies_in(dumps.dump(RTM_GETNEIGH, PROXIES))

        def fail(_part: bytes) -> bool:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(repeated, "is_end", fail)
            with pytest.raises(MemoryError):
                dumps.dump(RTM_GETNEIGH, PROXIES)
        tools.ip("neigh del proxy 198.18.1.7 dev eth0")
        assert proxies_in(dumps.dump(RTM_GETNEIGH, PROXIES)) == whole - {(socket.if_nametoindex("eth0"), "198.18.1.7")}


DELAY = Sysctl(4, "neigh", "eth0", "proxy_delay", True, "0")
ASKED: list[tuple[str, tuple[Op, ...]]] = [
    ("tap1", (ProxyNeighbour("eth0", "198.18.0.1", True), DELAY)),
    ("tap2", (ProxyNeighbour("eth0", "198.18.0.2", True), ProxyNeighbour("eth0", "2001:db8:7::2", True), DELAY)),
    ("tap3", (ProxyNeighbour("eth0", "198.18.0.3", True),)),
]
# What somebody does, the taps that are not as they are to be then, and what puts it back.
UNHEARD = {
    "a proxy": ("ip neigh del proxy 198.18.0.1 dev eth0", {"tap1"}, "ip neigh add proxy 198.18.0.1 dev eth0"),
    "IPv6": ("ip neigh del proxy 2001:db8:7::2 dev eth0", {"tap2"}, "ip neigh add proxy 2001:db8:7::2 dev eth0"),
    "in the place of another": (
        "ip neigh del proxy 198.18.0.3 dev eth0; ip neigh add proxy 198.18.0.4 dev eth0",
        {"tap3"},
        "ip neigh del proxy 198.18.0.4 dev eth0; ip neigh add proxy 198.18.0.3 dev eth0",
    ),
    "on another device": (
        "ip neigh del proxy 198.18.0.3 dev eth0; ip neigh add proxy 198.18.0.3 dev lo",
        {"tap3"},
        "ip neigh del proxy 198.18.0.3 dev lo; ip neigh add proxy 198.18.0.3 dev eth0",
    ),
    "a setting": (
        "sysctl -qw net.ipv4.neigh.eth0.proxy_delay=80",
        {"tap1", "tap2"},
        "sysctl -qw net.ipv4.neigh.eth0.proxy_delay=0",
    ),
    "the device's name": (
        "ip link set eth0 down; ip link set eth0 name eth9",
        {"tap1", "tap2", "tap3"},
        "ip link set eth9 name eth0; ip link set eth0 up; "
        + "; ".join(
            f"ip neigh replace proxy {op.address} dev eth0"
            for _, every in ASKED
            for op in every
            if isinstance(op, ProxyNeighbour)
        ),
    ),
    "others' proxies": ("ip neigh add proxy 198.18.0.9 dev eth0", set(), "ip neigh del proxy 198.18.0.9 dev eth0"),
}


def found(looking: Unheard, asked: Asked) -> tuple[set[str], int]:
    """The taps of which something is not true, and how many ops were compared."""
    names, compared = looking.untrue(asked)
    return set(names), compared


@pytest.mark.parametrize("what", UNHEARD)
def test_it_is_compared_once_and_again_when_it_is_not_the_same(uplinked: Node, what: str) -> None:
    for _, every in ASKED:
        for op in every:
            if isinstance(op, ProxyNeighbour):
                tools.ip(f"neigh add proxy {op.address} dev eth0")
    tools.run("sysctl", "-qw", "net.ipv4.neigh.eth0.proxy_delay=0")
    broken, taps, whole = UNHEARD[what]
    with closing(Unheard()) as looking:
        assert found(looking, ASKED) == (set(), 6)
        assert [found(looking, ASKED) for _ in range(3)] == [(set(), 0)] * 3
        for _ in range(2):
            tools.run("sh", "-c", broken)
            assert found(looking, ASKED) == (taps, 6)
            assert found(looking, ASKED) == (taps, 0)
            tools.run("sh", "-c", whole)
            assert found(looking, ASKED) == (set(), 6)
        assert found(looking, ASKED[:1]) == (set(), 2)
        assert found(looking, []) == (set(), 0)


OWN = {
    "net/ipv4/conf/tap0/send_redirects": ("0", "1"),
    "net/ipv4/conf/tap0/arp_ignore": ("8", "0"),
    "net/ipv6/conf/tap0/accept_ra": ("0", "2"),
    "net/ipv4/neigh/tap0/proxy_delay": ("0", "80"),
    "net/ipv6/neigh/tap0/proxy_delay": ("0", "80"),
}


@pytest.mark.parametrize("path", OWN)
def test_a_taps_own_settings_are_seen_by_one_request_and_few_reads(
    uplinked: Node, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.add_tap()
    ops = []
    for one, (wanted, _) in OWN.items():
        Path("/proc/sys", one).write_text(wanted)
        _net, family, group, _tap, name = one.split("/")
        ops.append(Sysctl(int(family[-1]), group, "tap0", name, False, wanted))
    read: list[str] = []

    def sysctl(which: str) -> str | None:
        read.append(which)
        return procfs.sysctl(which)

    monkeypatch.setattr(unheard, "sysctl", sysctl)
    asked = [("tap0", tuple(ops)), ("tap9", ())]
    assert differing(asked) == set()
    assert read == [one for one in OWN if "/neigh/" in one]
    Path("/proc/sys", path).write_text(OWN[path][1])
    assert differing(asked) == {"tap0"}
    tools.ip("link del tap0")
    assert differing(asked) == {"tap0"}
