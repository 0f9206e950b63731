"""Whose is it? What is about this guest alone goes with it, whoever made it; what says anything more is somebody's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from harness import agents, guests, manager, nodes, oracle, snapshots, tools
from harness.addresses import CLIENT_IP4, CLIENT_IP6, GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_IP4
from harness.disturb import disturbed, kill, refuse
from harness.hooks import call, call_in_child, check
from harness.nodes import Node

PREFIX4, PREFIX6 = "198.51.100.0/29", "2001:db8:1::/64"
HOSTS = {GUEST_IP4, GUEST_IP6}
EVERYTHING = [GUEST_IP4, GUEST_IP6, PREFIX4, PREFIX6]
ROUTED: dict[str, Any] = {"mode": "routed", "link": "100", "ip": EVERYTHING}


def by_script(*, protocol: str = "boot") -> None:
    """tap0 as a shell script wires it."""
    for words in (
        "link set tap0 up",
        f"-4 rule add iif tap0 lookup 100 priority 10000 protocol {protocol}",
        f"-6 rule add iif tap0 lookup 100 priority 10000 protocol {protocol}",
        *(f"route add {address} dev tap0 table 100 proto {protocol}" for address in (GUEST_IP4, PREFIX4)),
        *(f"-6 route add {address} dev tap0 table 100 proto {protocol}" for address in (GUEST_IP6, PREFIX6)),
        *(f"neigh add proxy {address} dev eth0" for address in HOSTS),
        *(f"neigh add {address} lladdr {GUEST_MAC} nud permanent dev tap0" for address in HOSTS),
    ):
        tools.ip(words)


def forget() -> None:
    """The state of all NICs is lost."""
    shutil.rmtree(manager.RUN_DIR / "state")


def left() -> tuple[object, ...]:
    """What there is of the guest: rules, routes, proxies, permanent neighbours."""
    taps = {one["ifname"] for one in tools.ask("link")} & {"tap0"}
    return (oracle.rules(), *[(oracle.routes(tap), oracle.neighbours(tap)) for tap in taps], oracle.proxies())


NOTHING: tuple[object, ...] = ([], (set(), {}), set())


# --- already so when we came ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["boot", "static"])
@pytest.mark.parametrize("phases", [["post"], ["pre", "post"], ["post", "post"]], ids="-".join)
def test_what_another_script_has_wired_goes_with_the_guest(uplinked: Node, protocol: str, phases: list[str]) -> None:
    nodes.add_tap()
    manager.write_nic(**ROUTED, incoming=True)
    by_script(protocol=protocol)
    settings = oracle.sysctl("ipv4/neigh/eth0/proxy_delay")
    for phase in phases:
        check(call(f"kvm-ifup-{phase}", "tap0"), 0)
    assert oracle.rules() == [(4, 10000, "100"), (6, 10000, "100")]
    assert oracle.proxies() == HOSTS
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert left() == NOTHING
    assert oracle.sysctl("ipv4/neigh/eth0/proxy_delay") == settings


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("nic", [ROUTED, {**ROUTED, "link": None}], ids=["table", "main"])
def test_a_guest_whose_journal_is_lost_is_unwired_all_the_same(
    uplinked: Node, nic: dict[str, Any], again: bool
) -> None:
    nodes.add_tap()
    manager.write_nic(**nic)
    check(call("kvm-ifup-post", "tap0"), 0)
    forget()
    as_found = snapshots.snapshot_of_kernel()
    if again:
        assert call("kvm-ifup-post", "tap0", "--json").needed == []
        assert snapshots.changes(as_found, snapshots.snapshot_of_kernel()) == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert left() == NOTHING
    # What the tap and the uplink were like before, nobody knows any more.
    differ = {line[2:].split(":")[0] for line in snapshots.changes(as_found, snapshots.snapshot_of_kernel())}
    differ = {line for line in differ if not line.startswith("nft ")}  # sets there are called after addresses
    assert not any("/proc/sys" in line or "address" in line for line in differ), differ


@pytest.mark.parametrize("clear", [("kvm-ifup", "gc"), ("kvm-ifdown", "tap0")], ids=" ".join)
def test_what_was_there_before_a_guest_that_died_is_cleared_up(uplinked: Node, clear: tuple[str, ...]) -> None:
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    by_script(protocol="static")
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    check(call(*clear), 0)
    assert left() == ([], set())


@pytest.mark.parametrize("lost", [True, False])
def test_a_guest_that_leaves_takes_the_scripts_route_and_proxies_along(uplinked: Node, lost: bool) -> None:
    uplinked.guest()
    manager.write_nic(**ROUTED)
    if lost:
        check(call("kvm-ifup-post", "tap0"), 0)
        forget()
    else:
        by_script()
    check(call("kvm-ifup-post", "tap0"), 0)
    client = uplinked.listen()

    def withdrawn() -> bool:
        client.send(guests.garp())
        return agents.phase() == "pre"

    with agents.running():
        agents.until(withdrawn)
    assert (oracle.routes("tap0"), oracle.proxies()) == (set(), set())
    assert oracle.rules() == [(4, 10000, "100"), (6, 10000, "100")], "what may be true on two nodes stays"


def test_a_rollback_leaves_what_was_already_so(uplinked: Node) -> None:
    """A failure puts back what was read, not what is to be there when the guest has gone."""
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    by_script(protocol="static")
    tools.ip(f"neigh del proxy {GUEST_IP6} dev eth0")
    tools.ip("neigh flush dev tap0 nud permanent")  # they go when the tap gets its MAC
    before = snapshots.snapshot()
    for number in range(1, 4):
        with disturbed(before=refuse(number)):
            check(call("kvm-ifup-post", "tap0"), 71, "injected")
        assert snapshots.changes(before, snapshots.snapshot()) == []


# Of a script's, or of a person's: `ip` has words for more than we would make.
THEIRS = [
    "metric 5",
    "proto boot",
    "proto 99 metric 5 mtu 1400",
    "src {own} realms 7",
    "tos 0x10",
    "via {next} onlink",
    "from {other}",
]
NEXT = {4: {"own": NODE_IP4, "next": "192.0.2.77"}, 6: {"other": "2001:db8:99::/48", "next": "fe80::77"}}


def theirs(family: int, words: str) -> bool:
    """Have a route to the guest, out of its tap, that says *words*; returns whether there can be one of this family."""
    only = {"{own}": 4, "tos": 4, "from": 6}
    if any(word in words and family != one for word, one in only.items()):
        return False
    address = GUEST_IP4 if family == 4 else GUEST_IP6
    tools.ip(f"-{family} route add {address} dev tap0 {words.format(**NEXT[family])}")
    return True


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("words", THEIRS)
def test_a_route_of_others_comes_back_as_it_was(uplinked: Node, words: str, family: int) -> None:
    """A failure puts it back, whether it is overruled or taken away."""
    nodes.add_tap()
    tools.ip("link set tap0 up")
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    if not theirs(family, words):
        return
    before = routes()
    for program in ("kvm-ifup-post", "kvm-ifdown"):
        done = []
        for number in range(1, 40):
            with disturbed(after=refuse(number)) as written:
                result = call(program, "tap0")
            if len(written) < number or written[number - 1].kind == "announce":  # which can fail
                break
            done.append(written[number - 1].kind)
            check(result, 71, "injected")
            assert routes() == before
        assert "route" in done
        check(call("kvm-ifdown", "tap0"), 0)
        assert oracle.routes("tap0") == set()
        assert theirs(family, words)
        assert routes() == before


def routes() -> list[str]:
    """All routes out of tap0, in the kernel's order, with all that `ip` says of them."""
    shown = [tools.run("ip", f"-{family}", "route", "show", "table", "all", "dev", "tap0") for family in (4, 6)]
    return [line for text in shown for line in text.splitlines() if "table local" not in line and "fe80" not in line]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("words", ["tos 0x10", "via {next} onlink", "metric 5", "metric 5 mtu 1400"])
def test_a_route_that_does_not_lead_to_the_guest_is_not_its_route(uplinked: Node, words: str, family: int) -> None:
    """It is for some packets only, or to a neighbour that nobody is."""
    nodes.add_tap()
    tools.ip("link set tap0 up")
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    if not theirs(family, words):
        return
    address, client = (GUEST_IP4, CLIENT_IP4) if family == 4 else (GUEST_IP6, CLIENT_IP6)
    check(call("kvm-ifup-post", "tap0"), 0)
    (way,) = tools.ask(f"-{family} route get {address} from {client} iif eth0")
    assert (way.get("dev"), way.get("gateway")) == ("tap0", None)
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    check(call("kvm-ifup", "check"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert routes() == []


def test_a_killed_run_puts_a_route_of_others_back_as_it_was(uplinked: Node) -> None:
    nodes.add_tap()
    tools.ip("link set tap0 up")
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    assert theirs(4, "proto 99 metric 5 mtu 1400")
    before = routes()
    for number in range(1, 20):
        with disturbed(after=kill(number)):
            code = call_in_child("kvm-ifdown", "tap0")
        planned = call("kvm-ifup", "plan", "post", "tap0")
        check(planned, 0)
        check(call("kvm-ifup", "gc"), 0)
        if code == 0:
            break
        assert routes() == before
    assert routes() == []
    assert number > 1


# --- rules that say more ----------------------------------------------------------------------------------------

OTHERS_RULES = [
    "from 198.51.100.0/24 lookup 100",
    "to 203.0.113.0/24 blackhole",
    "to 203.0.113.9 lookup 100 priority 10000",
    "prohibit",
    "unreachable",
    "nop",
    "goto 32767",
    "tos 0x10 lookup 100",
    "fwmark 0x10 lookup 100",
    "fwmark 0x10/0xff lookup 100 priority 10000",
    "oif eth0 lookup 100",
    "not lookup 100",
    "not lookup 100 priority 10000",
    "lookup 100 suppress_prefixlength 0",
    "lookup 100 suppress_prefixlength 0 priority 10000 protocol static",
    "lookup 100 suppress_ifgroup 1",
    "lookup 100 protocol zebra",
    "lookup 100 protocol 99 priority 10000",
    "lookup 100 protocol dhcp",
    "lookup 100 protocol kernel",
    "ipproto tcp lookup 100",
    "ipproto tcp sport 1024-2048 dport 80 lookup 100",
    "uidrange 0-0 lookup 100",
    "tun_id 7 lookup 100",
    "l3mdev",
]


def add_rule(words: str, family: int = 4) -> None:
    """A rule about what comes from tap0."""
    if family == 6:
        words = words.replace("198.51.100.0/24", "2001:db8:1::/48").replace("203.0.113.0/24", "2001:db8:2::/48")
        words = words.replace("203.0.113.9", "2001:db8:2::9")
    word = "not " if words.startswith("not ") else ""
    tools.ip(f"-{family} rule add {word}iif tap0 {words.removeprefix('not ')}")


def others(family: int) -> list[dict[str, Any]]:
    """All rules but those that lead from tap0 to a table and say nothing more; in any order."""
    every = [
        one for one in tools.ask(f"-{family} rule") if one.keys() - {"priority", "src", "iif", "table", "protocol"}
    ]
    plain = {"priority", "src", "iif", "table"}
    more = [one for one in tools.ask(f"-{family} -d rule") if one.keys() <= {*plain, "protocol"} and "iif" in one]
    return sorted([*every, *(one for one in more if one.get("protocol") not in (None, "boot", "static"))], key=str)


@pytest.mark.pyroute2
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("words", OTHERS_RULES)
def test_a_rule_that_says_more_stays_whatever_is_done(uplinked: Node, words: str, family: int) -> None:
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    add_rule(words, family)
    rule = others(family)
    assert len(rule) == 1
    as_it_was = snapshots.snapshot_of_kernel()
    check(call("kvm-ifup-post", "tap0"), 0)
    assert others(family) == rule
    assert oracle.rules().count((family, 10000, "100")) == (2 if "priority 10000" in words else 1)
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(as_it_was, snapshots.snapshot_of_kernel()) == []
    check(call("kvm-ifup-post", "tap0"), 0)
    forget()
    check(call("kvm-ifdown", "tap0"), 0)
    assert others(family) == rule, "without a journal"
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    check(call("kvm-ifup", "gc"), 0)
    shown = [{**one, "iif_detached": None, "protocol": None} for one in others(family)]
    assert shown == [{**one, "iif_detached": None, "protocol": None} for one in rule]


@pytest.mark.pyroute2
@pytest.mark.parametrize("mode", ["bridged", "routed"])
def test_a_plain_rule_goes_and_one_that_says_more_stays_in_each_mode(uplinked: Node, mode: str) -> None:
    nodes.add_bridge("br0")
    nodes.add_tap()
    manager.write_nic(**(ROUTED if mode == "routed" else {"mode": "bridged", "link": "br0"}))
    add_rule("lookup 200 priority 77")
    add_rule("to 203.0.113.9 lookup 200 priority 77")
    add_rule("lookup 200 priority 78 protocol bgp")
    check(call("kvm-ifup-post", "tap0"), 0)
    rules = [one for one in tools.ask("-4 rule") if one["priority"] in (77, 78)]
    assert [(one["priority"], one.get("dst")) for one in rules] == [(77, "203.0.113.9"), (78, None)]


# --- routes of routing daemons ----------------------------------------------------------------------------------

DAEMONS = ["zebra", "bird", "bgp", "ospf", "babel", "isis", "eigrp", "99"]


def fabric(protocol: str, more: str = "") -> None:
    """A routing daemon has learnt where the guest runs: elsewhere."""
    tools.ip(f"route add {GUEST_IP4} via {CLIENT_IP4} proto {protocol} {more}")
    tools.ip(f"-6 route add {GUEST_IP6} via {CLIENT_IP6} proto {protocol} {more}")


def leads_to(address: str) -> str:
    """The device by which the node reaches *address*."""
    (route,) = tools.ask(f"route get {address}")
    return str(route["dev"])


def ways() -> list[str]:
    """The devices by which the node reaches the guest."""
    return [leads_to(GUEST_IP4), leads_to(GUEST_IP6)]


@pytest.mark.parametrize(
    ("protocol", "metric"),
    [
        *((protocol, "") for protocol in DAEMONS),
        *(("bgp", f"metric {metric}") for metric in (20, 32, 1024, 4294967295)),
    ],
)
def test_a_guest_moves_in_a_routed_fabric(uplinked: Node, protocol: str, metric: str) -> None:
    """The route of a daemon is where it runs now; when it runs here, ours counts, and the daemon's stays."""
    nodes.add_tap()
    tools.ip("link set tap0 up")
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6], incoming=True)
    fabric(protocol, metric)
    before = snapshots.snapshot_of_kernel()
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert ways() == ["eth0", "eth0"]
    check(call("kvm-ifup-post", "tap0"), 0)
    assert ways() == ["tap0", "tap0"]
    wired = snapshots.snapshot()
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    assert snapshots.changes(wired, snapshots.snapshot()) == []
    check(call("kvm-ifup", "check"), 0)
    check(call("kvm-ifdown", "tap0"), 0)
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []


def add_multipath() -> None:
    tools.ip(f"route add {GUEST_IP4} proto bgp nexthop via {CLIENT_IP4} nexthop via 192.0.2.3")
    tools.ip(f"-6 route add {GUEST_IP6} proto bgp metric 20 nexthop via {CLIENT_IP6} nexthop via 2001:db8::3")


LATER: dict[str, Callable[[], object]] = {
    "several next hops": add_multipath,
    "appended": lambda: [
        tools.ip(f"route append {GUEST_IP4} via {CLIENT_IP4} proto bgp"),
        tools.ip(f"-6 route append {GUEST_IP6} via {CLIENT_IP6} proto bgp metric 20"),
    ],
    "with a metric": lambda: fabric("zebra", "metric 20"),
}


@pytest.mark.parametrize("how", LATER)
def test_a_daemons_route_that_comes_while_the_guest_is_here_changes_nothing(uplinked: Node, how: str) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    if how != "several next hops":
        LATER[how]()
        assert ways() == ["tap0", "tap0"]
        assert call("kvm-ifup-post", "tap0", "--json").needed == []
    check(call("kvm-ifdown", "tap0"), 0)
    if how == "several next hops":
        LATER[how]()
        check(call("kvm-ifup-post", "tap0"), 0)
        assert ways() == ["tap0", "tap0"]
        check(call("kvm-ifdown", "tap0"), 0)
    assert ways() == ["eth0", "eth0"]


def test_a_daemon_that_replaces_our_route_is_overruled_by_the_next_run(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip(f"route replace {GUEST_IP4} via {CLIENT_IP4} proto bird")
    tools.ip(f"-6 route replace {GUEST_IP6} via {CLIENT_IP6} proto bird metric 1")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert ways()[0] == "tap0"
    check(call("kvm-ifdown", "tap0"), 0)
    assert ways() == ["eth0", "eth0"]


def test_a_scripts_route_behind_a_daemons_is_overruled_too(uplinked: Node) -> None:
    nodes.add_tap()
    tools.ip("link set tap0 up")
    tools.ip(f"route add {GUEST_IP4} dev tap0 metric 100")
    tools.ip(f"-6 route add {GUEST_IP6} dev tap0")
    fabric("bgp", "metric 20")
    assert ways() == ["eth0", "eth0"]
    manager.write_nic(mode="routed", ip=[GUEST_IP4, GUEST_IP6])
    check(call("kvm-ifup-post", "tap0"), 0)
    assert ways() == ["tap0", "tap0"]
    check(call("kvm-ifdown", "tap0"), 0)
    assert ways() == ["eth0", "eth0"]
    assert oracle.routes("tap0") == set()


def test_a_daemons_route_to_a_prefix_in_the_nics_table_is_no_obstacle(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(**ROUTED)
    for prefix in (PREFIX4, PREFIX6):
        family, via = (6, CLIENT_IP6) if ":" in prefix else (4, CLIENT_IP4)
        tools.ip(f"-{family} route add {prefix} via {via} table 100 proto bgp metric 20")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert oracle.routes("tap0", "100") == set(EVERYTHING)
    assert oracle.routes("eth0", "100") == {PREFIX4, PREFIX6}


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize(
    "route",
    [
        f"{GUEST_IP4} via {CLIENT_IP4} proto {protocol}" for protocol in ("kernel", "boot", "static", "ra", "dhcp")
    ] + [f"blackhole {GUEST_IP4} proto bgp", f"unreachable {GUEST_IP4} proto zebra"],
)  # fmt: skip
@pytest.mark.parametrize("family", [4, 6])
def test_a_route_of_the_nodes_own_to_elsewhere_is_refused(
    uplinked: Node, program: str, route: str, family: int
) -> None:
    nodes.add_tap()
    address = GUEST_IP4 if family == 4 else GUEST_IP6
    words = route if family == 4 else route.replace(GUEST_IP4, GUEST_IP6).replace(CLIENT_IP4, CLIENT_IP6)
    tools.ip(f"-{family} route add {words}")
    manager.write_nic(mode="routed", ip=[address], incoming=True)
    before = snapshots.snapshot()
    check(call(program, "tap0"), 69, address, "leads nowhere" if route[0] in "bu" else "already routed")
    assert snapshots.changes(before, snapshots.snapshot()) == []
