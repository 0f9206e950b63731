"""Thousands of addresses on one NIC, thousands of NICs: what a command takes grows with them, not with their square.

The limits are of processor time, and generous: what took the square of it needed many times as much.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import agents, disturb, guests, hooks, manager, nodes, oracle
from harness.addresses import CLIENT_IP4, GUEST_IP4, GUEST_MAC, IPS, NODE_IP4, NODE_MAC
from harness.hooks import call, check, hook
from harness.nodes import Node
from harness.tools import ask, ip
from tests.kernel.test_watch import Watcher

MANY = 2000
SECONDS = 3.0  # of processor time, for what takes about 0.6
STATE = manager.RUN_DIR / "state"


def ipv4(number: int, first: int = 0) -> list[str]:
    """Addresses that nobody has."""
    return [f"198.18.{one >> 8}.{one & 255}" for one in range(first, first + number)]


def ipv6(number: int) -> list[str]:
    """The same."""
    return [f"2001:db8:1234:5678:9abc:def0:1234:{one:x}" for one in range(1, number + 1)]


KINDS: dict[str, dict[str, Any]] = {
    "IPv4 and IPv6": {"ip": [*ipv4(MANY // 2), *ipv6(MANY // 2)]},
    "IPv6": {"ip": ipv6(MANY)},
    "prefixes": {"ip": [f"10.{one >> 8}.{one & 255}.0/24" for one in range(MANY)]},
    "a table": {"ip": ipv4(MANY), "link": "100"},
}


def slowness() -> float:
    """How many times as long this machine takes, just now, as the one on which `SECONDS` was set."""
    begun = time.process_time()
    sum(number * number for number in range(500_000))
    return max(1.0, (time.process_time() - begun) / 0.04)


@contextmanager
def quick(seconds: float = SECONDS) -> Iterator[None]:
    """What is done in this process does not take longer."""
    slower = slowness()
    begun = time.process_time()
    yield
    taken = time.process_time() - begun
    assert taken < seconds * max(slower, slowness())


def hosts(kind: str) -> list[str]:
    """The single addresses of a kind."""
    return [one for one in KINDS[kind]["ip"] if "/" not in one]


@pytest.mark.parametrize("kind", KINDS)
def test_each_command_on_thousands_of_addresses(uplinked: Node, kind: str) -> None:
    uplinked.guest()
    wanted = KINDS[kind]
    for link in filter(None, [wanted.get("link")]):  # so that check has nothing to say
        ip(f"rule add iif eth0 lookup {link}")
        ip(f"route add default via {CLIENT_IP4} table {link}")
    manager.write_nic(mode="routed", **wanted)
    steps = (
        ("kvm-ifup-pre", "tap0"),
        ("kvm-ifup-post", "tap0"),
        ("kvm-ifup", "show"),
        ("kvm-ifup", "check"),
        ("kvm-ifup", "plan", "down", "tap0"),
    )
    for step in steps:
        with quick():
            check(call(*step), 0)
    table = wanted.get("link")
    assert len(oracle.routes("tap0", table)) == MANY
    assert oracle.proxies() == set(hosts(kind))
    assert set(oracle.neighbours()) >= set(hosts(kind))
    with quick():
        check(call("kvm-ifdown", "tap0"), 0)
    assert (oracle.routes("tap0", table), oracle.proxies()) == (set(), set())
    with quick():
        check(call("kvm-ifdown", "tap0"), 0)


def test_half_of_thousands_of_addresses_go_and_come_back(uplinked: Node) -> None:
    uplinked.guest()
    everything = KINDS["IPv4 and IPv6"]["ip"]
    for wanted in (everything, everything[: MANY // 2], everything):
        manager.write_nic(mode="routed", ip=wanted)
        with quick():
            check(call("kvm-ifup-post", "tap0"), 0)
        assert oracle.proxies() == set(wanted)
        assert len(oracle.routes("tap0")) == len(wanted)


def test_thousands_of_addresses_whose_routes_and_proxies_are_lost_are_put_back(uplinked: Node) -> None:
    uplinked.guest()
    wanted = KINDS["IPv4 and IPv6"]["ip"]
    manager.write_nic(mode="routed", ip=wanted)
    check(call("kvm-ifup-post", "tap0"), 0)
    ip("link set tap0 down")
    ip("link set tap0 up")
    assert len(oracle.routes("tap0")) < MANY
    with quick():
        assert call("kvm-ifup", "check").code == 1
    with quick(2 * SECONDS):  # it looks, does, and looks again
        check(call("kvm-ifup", "check", "--repair"), 0)
    assert len(oracle.routes("tap0")) == MANY


def test_thousands_of_addresses_without_a_default_route_keep_what_they_have(uplinked: Node) -> None:
    uplinked.guest()
    wanted = KINDS["IPv4 and IPv6"]["ip"]
    manager.write_nic(mode="routed", ip=wanted)
    check(call("kvm-ifup-post", "tap0"), 0)
    ip("route del default")
    ip("-6 route del default")
    with quick():
        check(call("kvm-ifup-post", "tap0"), 0)
    with quick():
        call("kvm-ifup", "show")
    assert oracle.proxies() == set(wanted)


def test_a_new_tap_takes_over_thousands_of_addresses_from_a_dead_one(uplinked: Node) -> None:
    wanted = KINDS["IPv4 and IPv6"]["ip"]
    for tap in ("tap0", "tap1"):
        nodes.add_tap(tap)
        manager.write_nic(tap, mode="routed", ip=wanted)
        with quick():
            check(call("kvm-ifup-post", tap), 0)
        if tap == "tap0":
            ip("link del tap0")
    with quick():
        check(call("kvm-ifdown", "tap0"), 0)  # what is the new one's stays
    assert oracle.proxies() == set(wanted)
    assert len(oracle.routes("tap1")) == MANY
    manager.write_nic("tap2", "web2", mode="routed", ip=wanted)
    nodes.add_tap("tap2")
    with quick():
        check(call("kvm-ifup-post", "tap2"), 69, "is already on")


def test_a_failure_at_the_last_of_thousands_puts_all_back(uplinked: Node) -> None:
    uplinked.guest()
    manager.write_nic(mode="routed", **KINDS["IPv4 and IPv6"])
    with quick(), disturb.disturbed(disturb.refuse(3 * MANY)):
        check(call("kvm-ifup-post", "tap0"), 71)
    assert (oracle.routes("tap0"), oracle.proxies()) == (set(), set())
    assert not list(STATE.glob("*.json"))


def test_what_was_killed_at_the_last_of_thousands_is_undone(uplinked: Node) -> None:
    uplinked.guest()
    manager.write_nic(mode="routed", **KINDS["IPv4 and IPv6"])
    with disturb.disturbed(disturb.kill(3 * MANY)):
        assert hooks.call_in_child("kvm-ifup-post", "tap0") < 0
    assert len(oracle.proxies()) > MANY // 2
    with quick():
        check(call("kvm-ifup", "gc"), 0)
    assert (oracle.routes("tap0"), oracle.proxies()) == (set(), set())


def test_two_nics_of_a_guest_with_thousands_of_addresses(uplinked: Node) -> None:
    for index in (0, 1):
        uplinked.guest(f"tap{index}")
        wanted = ipv4(MANY // 2, index * MANY)
        manager.write_nic(f"tap{index}", index=index, mode="routed", ip=wanted)
    with quick():
        check(call("kvm-ifup-post", "--instance", "web1.example.com"), 0)
    assert len(oracle.proxies()) == MANY
    with quick():
        check(call("kvm-ifdown", "--instance", "web1.example.com"), 0)
    assert oracle.proxies() == set()


def test_a_nic_file_with_thousands_of_long_addresses_is_put_and_listed(uplinked: Node) -> None:
    addresses = ", ".join(f'"{one}"' for one in ipv6(2 * MANY))
    file = nodes.scratch() / "nic.toml"
    file.write_text(f'tap = "tap0"\nmac = "{GUEST_MAC}"\nmode = "routed"\nip = [{addresses}]\n')
    with quick():
        check(call("kvm-ifup", "nic", "put", "web1", "0", str(file)), 0)
    with quick():
        check(call("kvm-ifup", "nic", "list"), 0)


# --- thousands of NICs ---------------------------------------------------------------------------------------


def dead_nics(number: int) -> None:
    """As many journals of taps that are gone, made from that of tap0."""
    text = (STATE / "tap0.json").read_text()
    for one, address in enumerate(ipv4(number), 1):
        journal = json.loads(text.replace(GUEST_IP4, address))
        journal["ifindex"] = 100_000 + one
        journal["nic"] |= {"tap": f"dead{one}", "instance": f"dead{one}"}
        for entry in journal["entries"]:
            for key in ("dev", "iif"):
                if entry.get(key) == "tap0":
                    entry[key] = f"dead{one}"
        (STATE / f"dead{one}.json").write_text(json.dumps(journal))
        (STATE / f"dead{one}.json").chmod(0o600)


@pytest.fixture
def one_among_the_dead(uplinked: Node) -> Node:
    """One NIC that lives, and the journals of many that died at once."""
    nodes.add_tap("tap0")
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    dead_nics(MANY // 2)
    return uplinked


@pytest.mark.parametrize("survivor", ["lives", "has died, too"])
def test_thousands_that_have_died_at_once_are_cleared_up(one_among_the_dead: Node, survivor: str) -> None:
    delay = "ipv4/neigh/eth0/proxy_delay"
    assert oracle.sysctl(delay) == "0"
    if survivor != "lives":
        ip("link del tap0")
    with quick(2 * SECONDS):
        check(call("kvm-ifup", "gc", "--plan"), 0)
    with quick(2 * SECONDS):
        check(call("kvm-ifup", "gc"), 0)
    assert oracle.sysctl(delay) == ("0" if survivor == "lives" else "80")
    assert oracle.proxies() == ({GUEST_IP4} if survivor == "lives" else set())
    assert [path.stem for path in STATE.glob("*.json")] == (["tap0"] if survivor == "lives" else [])


def test_a_hook_among_thousands(one_among_the_dead: Node) -> None:
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="routed", ip=["192.0.2.9"])
    for program in ("kvm-ifup-post", "kvm-ifup-post", "kvm-ifdown"):
        with quick():
            check(call(program, "tap1"), 0)


def test_the_journals_of_thousands_are_read_before_the_lock_is_taken(
    one_among_the_dead: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmifup.runs import locks, store
    from kvmifup.runs.index import Index

    read: list[str] = []
    held: list[str] = []
    original, hold = store.Store.read, locks.hold

    def counting(self: store.Store, tap: str) -> Any:
        read.append(tap)
        return original(self, tap)

    @contextmanager
    def noticing(run_dir: Path, names: list[str], timeout: float) -> Iterator[None]:
        with hold(run_dir, names, timeout):
            held.extend(names)
            read.clear()
            yield

    monkeypatch.setattr(store.Store, "read", counting)
    monkeypatch.setattr(locks, "hold", noticing)
    monkeypatch.setattr(store, "index_of", lambda _directory: Index())
    time.sleep(0.1)  # what has only just been written is read once more: a second write could have the same time
    nodes.add_tap("tap1")
    manager.write_nic("tap1", "web2", mode="routed", ip=["192.0.2.9"])
    check(call("kvm-ifup-post", "tap1"), 0)
    assert held == ["tap.tap1", "uplink"]
    assert set(read) <= {"tap1"}


# --- others meanwhile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["kvm-ifup-post", "kvm-ifdown"])
def test_nobody_else_is_turned_away_meanwhile(uplinked: Node, program: str) -> None:
    uplinked.guest()
    nodes.add_tap("tap1")
    manager.write_nic(mode="routed", **KINDS["IPv4 and IPv6"])
    manager.write_nic("tap1", "web2", mode="routed", ip=[GUEST_IP4])
    if program == "kvm-ifdown":
        check(hook("kvm-ifup-post", "tap0"), 0)
    slow = hooks.start(program, "tap0")
    answers = []
    while slow.poll() is None:
        answers += [hook("kvm-ifup-post", "tap1").code, hook("kvm-ifdown", "tap1").code]
    check(hooks.finish(slow), 0)
    assert set(answers) == {0}


# --- the agent -----------------------------------------------------------------------------------------------


def test_a_guest_with_thousands_of_addresses_arrives_and_others_beside_it(uplinked: Node) -> None:
    with agents.running() as agent:
        small = guests.incoming(uplinked, agent, "tap1", instance="web2", ip=IPS)
        large = guests.incoming(uplinked, agent, "tap0", ip=[*ipv4(MANY), *ipv6(MANY)])
        time.sleep(0.5)  # until what the first has prepared is right again
        large.send(guests.rarp())
        small.send(guests.rarp())
        agent.heard("(tap1): arrived")
        agent.heard("(tap0): arrived")
        assert oracle.proxies() >= {*ipv4(MANY), *ipv6(MANY), *IPS}
        with guests.answering(large), guests.answering(small):
            ip("link set eth0 down")
            ip("link set eth0 up")
            agents.until(lambda: oracle.proxies() >= {*ipv4(MANY), *ipv6(MANY), *IPS})
        ip("link del tap0")
        agents.until(lambda: oracle.proxies() == set(IPS))
        used = sum(map(int, Path(f"/proc/{agent.process.pid}/stat").read_text().split()[13:15])) / 100
        assert used < 6 * SECONDS * slowness()


def test_who_watches_sees_a_run_on_thousands_of_addresses(uplinked: Node) -> None:
    uplinked.guest()
    manager.write_nic(mode="routed", **KINDS["IPv4 and IPv6"])
    watcher = Watcher()
    check(hook("kvm-ifup-post", "tap0"), 0)
    agents.until(lambda: "changed" in watcher.said())
    watcher.end()
    assert "and 5" in watcher.said()
    assert max(map(len, watcher.said().splitlines())) < 400


# --- the probe -----------------------------------------------------------------------------------------------


@pytest.fixture
def answered_twice(uplinked: Node) -> Node:
    """The node answers for many addresses, and so does the client."""
    uplinked.guest()
    addresses = [*ipv4(MANY // 4), *ipv6(MANY // 4)]
    manager.write_nic(mode="routed", ip=addresses)
    check(call("kvm-ifup-post", "tap0"), 0)
    batch = nodes.scratch() / "addresses"
    batch.write_text("".join(f"addr add {one} dev eth0{' nodad' * (':' in one)}\n" for one in addresses))
    shown = [info for one in ask("-6 addr show dev eth0") for info in one["addr_info"]]
    (link_local,) = [info["local"] for info in shown if info["scope"] == "link"]
    with uplinked.client:
        ip(f"-batch {batch}")
        # It answers nobody whom it cannot enter into the kernel's table of neighbours. That is one for all namespaces,
        # and those who asked in the tests before fill it; permanent entries always have room (neigh_alloc).
        for address in (NODE_IP4, link_local):
            ip(f"neigh replace {address} lladdr {NODE_MAC} dev eth0 nud permanent")
    return uplinked


def doubly_answered() -> int:
    """For how many addresses the probe hears the client."""
    (nic,) = json.loads(call("kvm-ifup", "check", "--probe", "--json").out)["nics"]
    return sum("answers for" in finding["what"] for finding in nic["findings"])


def test_the_probe_hears_who_answers_for_each_of_many(answered_twice: Node) -> None:
    assert doubly_answered() == MANY // 2


def test_the_probe_in_a_process_with_many_descriptors(answered_twice: Node) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert doubly_answered() == MANY // 2
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
