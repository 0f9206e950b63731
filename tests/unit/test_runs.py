"""Whole runs on a node in memory: clearing up, what NICs share, and being killed at any instant."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kvmifup.core.errors import (
    JournalError,
    KernelError,
    KvmIfupError,
    LockTimeoutError,
    NoSpaceError,
    NotReadyError,
    RollbackError,
    raise_all,
)
from kvmifup.core.model import Config, ExtConfig, Nic, Phase, RoutedConfig
from kvmifup.core.ops import (
    RTPROT_STATIC,
    Announce,
    LinkMtu,
    LinkUp,
    Neighbour,
    Op,
    OvsPort,
    Program,
    ProxyNeighbour,
    Route,
    Rule,
    Sysctl,
    Value,
)
from kvmifup.runs import locks
from kvmifup.runs.arriving import PreparedArrival, arrive, arrive_wholly, prepare_arrival
from kvmifup.runs.down import down, taps_of_instance
from kvmifup.runs.draft import Draft
from kvmifup.runs.journal import Entry, Journal
from kvmifup.runs.leftovers import collect
from kvmifup.runs.moves import mend, run_post, withdraw
from kvmifup.runs.outcome import Outcome
from kvmifup.runs.session import Session
from kvmifup.runs.store import Store
from kvmifup.runs.up import up

from .nodes import FailingStore, FakeKernel, Killed, identity, on_disk
from .samples import BRIDGED, DUAL, ETH0_4, ETH0_6, ETH1_4, ETH1_6, EXT, OVS, ROUTED, nets

pytestmark = pytest.mark.usefixtures("quick_disk")

TABLED = replace(DUAL, link="100")
SECOND = replace(DUAL, tap="tap1", instance="web2.example.com", ip=nets("192.0.2.9", "2001:db8::9"))
PROXY_DELAY = Sysctl(4, "neigh", "eth0", "proxy_delay", True, "0")
PROXY_NDP = Sysctl(6, "conf", "eth0", "proxy_ndp", True, "1")
REFUSED = KernelError("refused", errno=errno.EBUSY)


class Node:
    """A kernel and a run directory, and the hooks on them."""

    def __init__(self, run_dir: Path, *taps: str) -> None:
        self.kernel = FakeKernel(*taps)
        self.run_dir = run_dir
        self.store = FailingStore(run_dir)
        self.config = Config(lock_timeout=0.0)

    def session(self, *, dry: bool = False) -> Session:
        return Session(cast(Any, self.kernel), self.store, self.run_dir, self.config, dry)

    def up(self, asked: Phase, *nics: Nic, announce: bool = False, dry: bool = False) -> list[Outcome]:
        return up(asked, nics, self.session(dry=dry), announce=announce)

    def pre(self, nic: Nic) -> list[Outcome]:
        return self.up(Phase.PRE, replace(nic, incoming=True))

    def post(self, *nics: Nic, announce: bool = False) -> list[Outcome]:
        return self.up(Phase.POST, *nics, announce=announce)

    def down(
        self, tap: str = "tap0", nic: Nic | None = None, *, instance: str | None = None, dry: bool = False
    ) -> Outcome:
        return down(tap, instance, lambda: nic, self.session(dry=dry))

    def gc(self, *, dry: bool = False) -> list[Outcome]:
        outcomes, failures = collect(self.session(dry=dry))
        raise_all(failures)
        return outcomes

    def journal(self, tap: str = "tap0") -> Journal:
        found = self.store.load(tap)
        assert found is not None
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, "tap0", "tap1")


@pytest.fixture
def nodes(tmp_path: Path) -> Callable[[], Node]:
    numbers = iter(range(1000))
    return lambda: Node(tmp_path / str(next(numbers)), "tap0", "tap1")


every_nic = pytest.mark.parametrize(
    "nic", [BRIDGED, ROUTED, TABLED, OVS, EXT], ids=["bridged", "routed", "table", "openvswitch", "ext"]
)


# --- one NIC's life -----------------------------------------------------------------------------------


@every_nic
def test_pre_post_down(nic: Nic, node: Node) -> None:
    node.pre(nic)
    assert node.journal().phase is Phase.PRE
    assert not node.kernel.of(Route) + node.kernel.of(ProxyNeighbour)
    node.post(nic)
    assert node.journal().phase is Phase.POST
    assert len(node.kernel.of(Route)) == (len(nic.ip) if nic.mode == "routed" else 0)
    node.down()
    assert node.kernel.values == {}
    assert on_disk(node.run_dir) == {}


@every_nic
@pytest.mark.parametrize("asked", [Phase.PRE, Phase.POST])
def test_the_second_run_writes_nothing(nic: Nic, asked: Phase, node: Node) -> None:
    node.up(asked, nic)
    files, writes = identity(node.run_dir), len(node.kernel.writes)
    assert writes
    outcome = node.up(asked, nic)[0]
    assert not [change for change in outcome.changes if change.needed]
    assert outcome.messages == ()
    assert len(node.kernel.writes) == writes
    assert identity(node.run_dir) == files


@every_nic
def test_pre_after_post_takes_nothing_away(nic: Nic, node: Node) -> None:
    node.post(nic)
    values, journal = dict(node.kernel.values), node.journal()
    node.pre(nic)
    assert node.kernel.values == values
    assert node.journal().phase is Phase.POST
    assert set(node.journal().entries) == set(journal.entries)
    node.down()
    assert node.kernel.values == {}


def test_pre_for_a_nic_that_is_not_incoming_goes_on_to_post(node: Node) -> None:
    outcome = node.up(Phase.PRE, ROUTED)[0]
    assert outcome.phase is Phase.POST
    assert node.kernel.of(Route)


def test_what_drifted_is_mended_and_the_first_value_remembered(node: Node) -> None:
    node.kernel.put(LinkMtu("tap0", 1400))
    node.post(BRIDGED)
    node.kernel.put(LinkMtu("tap0", 1280))  # by other hands
    node.post(BRIDGED)
    assert node.kernel.read(LinkMtu("tap0", 0)) == 9000
    node.down()
    assert node.kernel.read(LinkMtu("tap0", 0)) == 1400


def test_what_was_so_before_stays_so(node: Node) -> None:
    """kvm-ifdown undoes what we did, not what we found."""
    for op in (PROXY_DELAY, LinkUp("tap0", True), LinkMtu("tap0", 1400)):
        node.kernel.put(op)
    values = dict(node.kernel.values)
    node.post(ROUTED)
    node.down()
    assert node.kernel.values == values


@pytest.mark.parametrize("phases", [[], [Phase.POST], [Phase.PRE, Phase.POST]])
def test_what_is_about_this_guest_alone_goes_with_it_whoever_made_it(phases: list[Phase], node: Node) -> None:
    node.post(ROUTED)
    node.store.delete("tap0")  # lost
    for phase in phases:
        node.up(phase, replace(ROUTED, incoming=True))
    node.down(nic=ROUTED)
    assert [op for kind in (Route, ProxyNeighbour, Rule, Neighbour) for op in node.kernel.of(kind)] == []


def test_a_port_of_a_dead_guest_is_not_put_back(node: Node) -> None:
    """Unlike all else: Open vSwitch would give it to the next tap of that name."""
    node.kernel.put(OvsPort("tap0", "ovs7 .666"))
    node.post(OVS)
    node.down()
    assert node.kernel.values == {}


@pytest.mark.parametrize("asked", [Phase.PRE, Phase.POST])
def test_a_failed_run_puts_even_that_port_back(asked: Phase, node: Node) -> None:
    node.kernel.put(OvsPort("tap0", "ovs7 .666"))
    values = dict(node.kernel.values)
    node.kernel.before = lambda number: raise_if(number == 4, REFUSED)
    with pytest.raises(KernelError):
        node.up(asked, OVS)
    assert node.kernel.values == values


def test_a_program_is_told_the_phases_in_order(node: Node) -> None:
    node.pre(EXT)
    node.post(EXT)
    node.down()
    told = [(op.phase, op.want) for op in node.kernel.writes if isinstance(op, Program)]
    assert told == [("pre", True), ("post", True), ("post", False), ("pre", False)]


def test_a_program_hears_of_a_changed_nic(node: Node) -> None:
    node.post(EXT)
    node.post(replace(EXT, ip=nets("192.0.2.77")))
    told = [(op.phase, op.want) for op in node.kernel.writes if isinstance(op, Program)][2:]
    assert told == [("post", False), ("pre", False), ("pre", True), ("post", True)]
    node.down()
    assert node.kernel.values == {}


def test_another_time_limit_is_no_other_program(node: Node) -> None:
    node.post(EXT)
    writes = len(node.kernel.writes)
    node.config = replace(node.config, ext=ExtConfig(timeout=5.0))
    node.post(EXT)
    assert len(node.kernel.writes) == writes


def test_down_repeats_quietly(node: Node) -> None:
    node.post(ROUTED)
    node.down()
    writes = len(node.kernel.writes)
    assert node.down().changes == ()
    assert len(node.kernel.writes) == writes


def test_an_announcement_on_request(node: Node) -> None:
    first = node.post(ROUTED)[0]
    assert first.messages == (("eth0", "192.0.2.8", "192.0.2.8"),)
    files = identity(node.run_dir)
    assert node.post(ROUTED, announce=True)[0].messages == first.messages
    assert identity(node.run_dir) == files


def test_nothing_is_announced_in_pre(node: Node) -> None:
    assert node.pre(DUAL)[0].messages == ()


def test_stale_rules_go_for_good(node: Node) -> None:
    """Putting a dead NIC's rule back when this guest leaves would set a trap for the next one."""
    node.kernel.put(Rule(4, "tap0", 200, 5, RTPROT_STATIC, True))
    node.pre(ROUTED)
    node.down()
    assert node.kernel.of(Rule) == []


def test_a_failed_run_leaves_the_rule_of_others(node: Node) -> None:
    node.kernel.put(Rule(4, "tap0", 200, 5, RTPROT_STATIC, True))
    node.kernel.after = lambda number: raise_if(number == 3, REFUSED)
    with pytest.raises(KernelError):
        node.pre(ROUTED)
    assert node.kernel.of(Rule)


def raise_if(condition: bool, error: BaseException) -> None:
    if condition:
        raise error


@pytest.mark.parametrize("phase", [Phase.PRE, Phase.POST])
def test_a_refusal_names_the_nic_and_touches_nothing(phase: Phase, node: Node) -> None:
    node.kernel.bridges.clear()
    with pytest.raises(NotReadyError, match="br0") as caught:
        node.up(phase, BRIDGED)
    assert caught.value.where == "web1.example.com/0 (tap0)"
    assert node.kernel.writes == []
    assert on_disk(node.run_dir) == {}


@pytest.mark.parametrize("command", ["pre", "post", "down", "gc"])
def test_a_dry_run_changes_nothing(command: str, node: Node) -> None:
    node.post(TABLED)
    node.kernel.replace_tap("tap0")
    files, writes = identity(node.run_dir), len(node.kernel.writes)
    locked = identity(node.run_dir / "lock")
    outcomes = {
        "pre": lambda: node.up(Phase.PRE, TABLED, dry=True),
        "post": lambda: node.up(Phase.POST, TABLED, dry=True),
        "down": lambda: [node.down(dry=True)],
        "gc": lambda: node.gc(dry=True),
    }[command]()
    assert [change for outcome in outcomes for change in (*outcome.undone, *outcome.changes) if change.needed]
    assert len(node.kernel.writes) == writes
    assert identity(node.run_dir) == files
    assert identity(node.run_dir / "lock") == locked


def test_a_dry_run_makes_no_directory(tmp_path: Path) -> None:
    fresh = Node(tmp_path / "run", "tap0")
    fresh.up(Phase.POST, ROUTED, dry=True)
    assert not (tmp_path / "run").exists()


# --- the NIC changes ----------------------------------------------------------------------------------


def test_addresses_that_are_no_longer_wanted_go(node: Node) -> None:
    node.post(replace(ROUTED, ip=nets("192.0.2.8", "192.0.2.10", "198.51.100.0/29")))
    node.post(replace(ROUTED, ip=nets("192.0.2.8", "192.0.2.11")))
    assert {op.prefix for op in node.kernel.of(Route) if isinstance(op, Route)} == {"192.0.2.8/32", "192.0.2.11/32"}
    proxied = {op.address for op in node.kernel.of(ProxyNeighbour) if isinstance(op, ProxyNeighbour)}
    assert proxied == {"192.0.2.8", "192.0.2.11"}
    node.down()
    assert node.kernel.values == {}


def test_another_mode(node: Node) -> None:
    node.post(TABLED)
    node.post(BRIDGED)
    fresh = Node(node.run_dir / "other")
    fresh.post(BRIDGED)
    assert node.kernel.values == fresh.kernel.values
    node.down()
    assert node.kernel.values == {}


def test_a_failing_change_of_addresses_keeps_the_old_ones(node: Node) -> None:
    node.post(ROUTED)
    values, files, writes = dict(node.kernel.values), on_disk(node.run_dir), len(node.kernel.writes)
    changed = replace(ROUTED, ip=nets("192.0.2.10"))
    node.kernel.after = lambda number: raise_if(number == writes + 4, REFUSED)
    with pytest.raises(KernelError):
        node.post(changed)
    assert node.kernel.values == values
    assert on_disk(node.run_dir) == files


def test_what_is_shared_stays_when_only_this_nic_needs_it_no_longer(node: Node) -> None:
    node.post(DUAL)
    node.post(SECOND)
    node.post(ROUTED)  # the first one loses its IPv6 address
    assert node.kernel.read(PROXY_NDP) == "1", "the second guest still needs it"
    node.down("tap0")
    node.down("tap1")
    assert node.kernel.values == {}


def test_an_uplink_that_is_gone_needs_no_clearing_up(node: Node) -> None:
    node.post(DUAL)
    node.kernel.remove_uplink("eth0")
    node.kernel.uplinks = (ETH1_4, ETH1_6)
    node.post(DUAL)
    assert {op.dev for op in node.kernel.of(ProxyNeighbour) if isinstance(op, ProxyNeighbour)} == {"eth1"}
    node.down()
    assert node.kernel.values == {}


def test_where_the_node_answers_stays_while_no_default_route_tells_the_uplinks(node: Node) -> None:
    node.post(DUAL)
    values, files = dict(node.kernel.values), on_disk(node.run_dir)
    node.kernel.uplinks = (ETH0_4,)
    node.post(DUAL)
    node.kernel.uplinks = ()
    node.pre(DUAL)
    node.post(DUAL)
    assert (node.kernel.values, on_disk(node.run_dir)) == (values, files)
    node.down()
    assert node.kernel.values == {}


@pytest.mark.parametrize("nic", [replace(DUAL, ip=nets("192.0.2.10")), replace(DUAL, ip=nets("192.0.2.8/31")), BRIDGED])
def test_without_one_what_the_nic_is_not_to_have_any_more_goes_all_the_same(nic: Nic, node: Node) -> None:
    node.post(DUAL)
    node.kernel.uplinks = ()
    node.post(nic)
    assert node.kernel.of(ProxyNeighbour) == []
    assert node.kernel.values.get(PROXY_NDP.key) is None
    node.down()
    assert node.kernel.values == {}


def test_no_uplinks_because_the_administrator_wants_none(node: Node) -> None:
    node.post(DUAL)
    node.config = replace(node.config, routed=RoutedConfig(uplinks=()))
    node.post(DUAL)
    assert node.kernel.of(ProxyNeighbour) == []
    assert {op.dev for op in node.kernel.of(Sysctl) if isinstance(op, Sysctl)} == {"tap0"}


# --- what was lost ----------------------------------------------------------------------------


def lose(node: Node, *lost: Op) -> None:
    """The kernel has forgotten *lost*, or all that it answers for."""
    for op in lost or node.kernel.of(ProxyNeighbour):
        del node.kernel.values[op.key]


def mended(node: Node, most: Phase = Phase.POST) -> Outcome | None:
    """The agent has noticed."""
    return mend("tap0", most, node.session())


@pytest.mark.parametrize("seen", [True, False])
def test_what_was_lost_is_put_back_and_announced_also_without_a_default_route(node: Node, seen: bool) -> None:
    node.post(DUAL)
    values = dict(node.kernel.values)
    lose(node, PROXY_NDP, *node.kernel.of(ProxyNeighbour))
    node.kernel.seen = seen
    before = len(node.kernel.writes)
    outcome = mended(node)
    assert outcome is not None
    assert outcome.messages == (("eth0", "192.0.2.8", "192.0.2.8"), ("eth0", "2001:db8::8", "fe80::1"))
    kinds = [op.kind for op in node.kernel.writes[before:]]
    assert kinds == ["proxy-neighbour", "sysctl", "proxy-neighbour", "announce"]
    assert node.kernel.values == values
    # Once more: nothing to do, and nothing is written.
    files = identity(node.run_dir)
    again = mended(node)
    assert again is not None
    assert not any(change.needed for change in again.changes)
    assert identity(node.run_dir) == files
    node.down()
    assert node.kernel.values == {}


@pytest.mark.parametrize("unready", [{"up": False}, {"mend": ("net.ipv6.conf.eth1.disable_ipv6=0",)}])
def test_an_uplink_that_is_not_ready_keeps_the_others_from_nothing(node: Node, unready: dict[str, Any]) -> None:
    node.kernel.uplinks = (ETH0_4, ETH1_4, ETH0_6, ETH1_6)
    node.post(DUAL)
    lose(node)
    node.kernel.uplinks = (ETH0_4, replace(ETH1_4, **unready), ETH0_6, replace(ETH1_6, **unready))
    mended(node)
    proxied = {(op.dev, op.address) for op in node.kernel.of(ProxyNeighbour) if isinstance(op, ProxyNeighbour)}
    assert proxied == {("eth0", "192.0.2.8"), ("eth0", "2001:db8::8")}
    assert {entry.op.dev for entry in node.journal().entries if isinstance(entry.op, ProxyNeighbour)} == {
        "eth0",
        "eth1",
    }
    node.kernel.uplinks = (ETH0_4, ETH1_4, ETH0_6, ETH1_6)
    mended(node)
    assert len(node.kernel.of(ProxyNeighbour)) == 4
    node.down()
    assert node.kernel.values == {}


def test_only_the_phase_that_was_reached_is_made_true_again(node: Node) -> None:
    assert mended(node) is None
    node.pre(TABLED)
    (rule,) = (op for op in node.kernel.of(Rule) if isinstance(op, Rule) and op.family == 4)
    lose(node, rule)
    mended(node)
    assert rule in node.kernel.of(Rule)
    assert not node.kernel.of(Route) + node.kernel.of(ProxyNeighbour)
    node.post(TABLED)
    withdraw("tap0", node.session(), (node.journal().ifindex, TABLED.mac), lambda: True)
    mended(node)
    assert not node.kernel.of(Route) + node.kernel.of(ProxyNeighbour)
    node.post(TABLED)
    whole = dict(node.kernel.values)
    lose(node, rule, *node.kernel.of(Route))
    mended(node, Phase.PRE)
    assert (rule in node.kernel.of(Rule), node.kernel.of(Route)) == (True, [])
    assert node.journal().phase is Phase.POST
    mended(node)
    assert node.kernel.values == whole
    node.kernel.replace_tap("tap0")
    assert mended(node) is None


def test_who_is_heard_once_the_tap_is_ours_is_not_withdrawn(node: Node) -> None:
    node.post(TABLED)
    whole, journal = dict(node.kernel.values), node.journal()
    guest = (journal.ifindex, TABLED.mac)
    assert withdraw("tap0", node.session(), guest, lambda: False) is None
    assert (node.kernel.values, node.journal()) == (whole, journal)
    assert withdraw("tap0", node.session(), guest, lambda: True)
    assert not node.kernel.of(Route) + node.kernel.of(ProxyNeighbour)


def test_what_is_on_a_renamed_uplink_goes_with_it(node: Node) -> None:
    node.kernel.indexes["eth0"] = 2
    node.post(DUAL)
    node.post(SECOND)
    node.kernel.rename("eth0", "wan0")
    values = dict(node.kernel.values)
    writes = len(node.kernel.writes)
    for tap in ("tap0", "tap1"):
        mend(tap, Phase.POST, node.session())
        assert node.journal(tap).devices == (("wan0", 2),)
    assert (node.kernel.values, len(node.kernel.writes)) == (values, writes)
    node.down("tap0")
    node.down("tap1")
    assert node.kernel.values == {}


def test_what_is_on_a_configured_uplink_that_is_renamed_stays(node: Node) -> None:
    node.config = replace(node.config, routed=RoutedConfig(uplinks=("eth0",)))
    node.kernel.indexes["eth0"] = 2
    node.post(DUAL)
    node.kernel.rename("eth0", "wan0")
    node.kernel.uplinks = (replace(ETH0_4, present=False, up=False), replace(ETH0_6, present=False, up=False))
    values = dict(node.kernel.values)
    mended(node)
    assert node.kernel.values == values
    node.down()
    assert node.kernel.values == {}


def test_what_is_on_a_renamed_uplink_is_undone_also_if_nobody_has_noticed(node: Node) -> None:
    node.kernel.indexes["eth0"] = 2
    node.post(DUAL)
    node.kernel.rename("eth0", "wan0")
    node.down()
    assert node.kernel.values == {}


def test_a_mend_that_fails_or_is_killed_leaves_what_the_next_run_mends(nodes: Callable[[], Node]) -> None:
    step = 0
    killed = True
    while killed:
        node = nodes()
        node.post(DUAL)
        whole = dict(node.kernel.values)
        lose(node)
        killed = killed_at(step, node, lambda: mended(node))  # noqa: B023 (called at once)
        node.post(DUAL)
        assert node.kernel.values == whole, f"step {step}"
        node.down()
        assert node.kernel.values == {}, f"step {step}"
        step += 1
    assert step > 4


# --- what NICs share ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["tap0", "tap1"])
@pytest.mark.parametrize("together", [True, False])
def test_the_last_to_leave_puts_a_shared_value_back(first: str, together: bool, node: Node) -> None:
    if together:
        node.post(DUAL, SECOND)
    else:
        node.post(DUAL)
        node.post(SECOND)
    last = {"tap0": "tap1", "tap1": "tap0"}[first]
    node.down(first)
    assert node.kernel.read(PROXY_DELAY) == "0"
    assert node.kernel.read(PROXY_NDP) == "1"
    assert len(node.kernel.of(ProxyNeighbour)) == 2
    node.down(last)
    assert node.kernel.values == {}


def test_a_dead_nic_holds_no_shared_value(node: Node) -> None:
    node.post(DUAL)
    node.post(SECOND)
    node.kernel.remove_tap("tap1")
    node.down("tap0")
    assert node.kernel.read(PROXY_DELAY) == "80"


def test_a_second_nic_learns_the_value_from_before_the_first(node: Node) -> None:
    node.kernel.put(replace(PROXY_DELAY, want="33"))
    node.post(ROUTED)
    node.post(SECOND)
    node.post(SECOND)
    assert node.journal("tap1").prior(PROXY_DELAY.key) == Entry(PROXY_DELAY, "33")


@pytest.mark.parametrize("asked", [Phase.PRE, Phase.POST])
def test_an_address_of_another_live_tap_is_refused(asked: Phase, node: Node) -> None:
    node.pre(ROUTED)
    rival = replace(SECOND, ip=nets("192.0.2.9", "192.0.2.8"), incoming=True)
    with pytest.raises(NotReadyError, match=r"192\.0\.2\.8/32 is already on web1\.example\.com/0 \(tap0\)") as caught:
        node.up(asked, rival)
    assert caught.value.code == 69
    assert caught.value.where == rival.label
    node.kernel.remove_tap("tap0")
    node.up(asked, rival)


def test_an_address_is_free_once_its_nic_is_down(node: Node) -> None:
    node.post(ROUTED)
    node.down("tap0")
    node.post(replace(SECOND, ip=ROUTED.ip))


def test_bridged_nics_claim_nothing(node: Node) -> None:
    node.post(replace(BRIDGED, ip=ROUTED.ip))
    node.post(replace(ROUTED, tap="tap1"))


def test_several_nics_all_or_none(node: Node) -> None:
    total = len(Node(node.run_dir / "other", "tap0", "tap1").up(Phase.POST, DUAL, SECOND, dry=True))
    assert total == 2
    node.kernel.indexes.pop("tap1")
    with pytest.raises(NotReadyError, match="tap1"):
        node.post(DUAL, SECOND)
    assert node.kernel.writes == []


def test_the_taps_of_an_instance_come_from_journals_too(node: Node) -> None:
    node.post(ROUTED)
    node.post(SECOND)
    assert taps_of_instance("web1.example.com", node.session()) == ["tap0"]
    assert taps_of_instance("web1.example", node.session()) == []


# --- dead NICs and killed runs ------------------------------------------------------------------------


def test_a_new_guest_on_the_name_of_a_dead_one_inherits_nothing(node: Node) -> None:
    node.post(TABLED)
    node.kernel.replace_tap("tap0")
    assert node.kernel.of(Rule), "this is what a dead NIC leaves behind"
    outcome = node.post(BRIDGED)[0]
    assert [change.op for change in outcome.undone if isinstance(change.op, Rule)]
    fresh = Node(node.run_dir / "other", "tap0")
    fresh.post(BRIDGED)
    assert node.kernel.values == fresh.kernel.values
    assert node.journal().ifindex == node.kernel.ifindex("tap0")


def test_down_for_a_dead_nic_leaves_the_next_one_alone(node: Node) -> None:
    node.post(TABLED)
    node.kernel.replace_tap("tap0")
    node.kernel.put(LinkMtu("tap0", 1400))
    node.kernel.put(LinkUp("tap0", True))
    values = {
        key: value for key, value in node.kernel.values.items() if getattr(node.kernel.known[key], "dev", 0) == "tap0"
    }
    node.down()
    assert node.kernel.values == values


def test_gc_clears_up_after_the_dead_and_leaves_the_living(node: Node) -> None:
    node.post(TABLED)
    node.post(SECOND)
    before = on_disk(node.run_dir)
    assert node.gc() == []
    assert on_disk(node.run_dir) == before
    node.kernel.remove_tap("tap0")
    assert [outcome.tap for outcome in node.gc()] == ["tap0"]
    assert on_disk(node.run_dir).keys() == {"tap1.json"}
    alone = Node(node.run_dir / "other", "tap0", "tap1")
    alone.post(SECOND)
    assert node.kernel.values == alone.kernel.values


def test_gc_goes_on_past_a_failure(node: Node) -> None:
    node.post(TABLED)
    node.post(replace(SECOND, link="100"))
    node.kernel.indexes.clear()
    node.kernel.before = lambda _number: raise_if(getattr(node.kernel.writes[-1], "iif", "") == "tap0", REFUSED)
    with pytest.raises(RollbackError, match="refused") as caught:
        node.gc()
    assert caught.value.where.endswith("(tap0)")
    assert on_disk(node.run_dir).keys() == {"tap0.json"}
    assert {rule.iif for rule in node.kernel.of(Rule) if isinstance(rule, Rule)} == {"tap0"}
    node.kernel.before = lambda _number: None
    node.gc()
    assert {key for key in node.kernel.values if key[0] in ("rule", "proxy-neighbour")} == set()
    assert on_disk(node.run_dir) == {}


def killed_at(step: int, node: Node, what: Callable[[], object]) -> bool:
    """Do *what*, but kill it before change number *step* of node or disk; false when it ended before that."""
    count = 0

    def tick(_number: int) -> None:
        nonlocal count
        count += 1
        if count > step:  # and ever after, whatever its own `except` wants to put back
            raise Killed

    for place in (node.kernel, node.store):
        place.before = tick
    try:
        what()
    except (Killed, KvmIfupError):
        assert count > step
    for place in (node.kernel, node.store):
        place.before = lambda _number: None
    return count > step


@pytest.mark.parametrize("nic", [BRIDGED, TABLED, OVS, EXT], ids=["bridged", "routed", "openvswitch", "ext"])
@pytest.mark.parametrize("next_run", ["gc", "post", "down"])
def test_killed_at_any_instant(nic: Nic, next_run: str, nodes: Callable[[], Node]) -> None:
    """The next run finds the node as before or as after, never between."""
    after_post = nodes()
    after_post.post(SECOND)
    before = dict(after_post.kernel.values)
    after_post.post(nic)
    whole = dict(after_post.kernel.values)
    step = 0
    while True:
        node = nodes()
        node.post(SECOND)  # a neighbour whose values must not suffer
        killed = killed_at(step, node, lambda: node.post(nic))  # noqa: B023 (called at once)
        made_whole(node, nic, next_run, before, whole, step)
        if not killed:
            break
        step += 1
    assert step > 3, "there were instants to be killed at"


def made_whole(
    node: Node, nic: Nic, next_run: str, before: dict[Any, Value], whole: dict[Any, Value], step: int
) -> None:
    """After a kill at *step* the *next_run* leaves *nic* as *before* or as a *whole*, and down leaves nothing."""
    if next_run == "gc":
        node.gc()
        assert node.kernel.values in (before, whole), f"step {step}"
    elif next_run == "post":
        node.post(nic)
        assert node.kernel.values == whole, f"step {step}"
    node.down()
    node.down("tap1")
    assert node.kernel.values == {}, f"step {step}"


def armed(node: Node) -> PreparedArrival:
    """What is prepared for a guest that is to come, beside one that is there."""
    node.post(SECOND)
    node.pre(TABLED)
    prepared = prepare_arrival("tap0", node.session())
    assert prepared is not None
    return prepared


@pytest.mark.parametrize("next_run", ["gc", "post", "down"])
def test_an_arrival_that_is_killed_at_any_instant(next_run: str, nodes: Callable[[], Node]) -> None:
    """Also before its first frame: what is noted for it while it is armed says nothing."""
    at_home = nodes()
    arrive_wholly(armed(at_home), at_home.session())
    whole = dict(at_home.kernel.values)
    step, killed = -1, True
    while killed:
        node = nodes()
        prepared = armed(node)
        before = dict(node.kernel.values)
        assert prepared.job.noted
        assert Path(prepared.job.noted.file).read_text() == prepared.job.noted.text
        killed = step < 0 or killed_at(step, node, lambda: arrive_wholly(prepared, node.session()))  # noqa: B023
        made_whole(node, TABLED, next_run, before, whole, step)
        assert list((node.run_dir / "armed").iterdir()) == []
        step += 1
    assert step > 3, "there were instants to be killed at"


@pytest.mark.parametrize("how", ["as it was", "gone", "written to", "replaced", "never written"])
def test_what_is_noted_for_an_arrival_counts_only_as_it_was_written(
    how: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = node.store.draft

    def without_space(journal: Journal, *directory: str) -> Draft:
        raise_if(bool(directory), NoSpaceError("full", errno=errno.ENOSPC))
        return real(journal, *directory)

    if how == "never written":
        monkeypatch.setattr(node.store, "draft", without_space)
    prepared = armed(node)
    file = node.run_dir / "armed/tap0.new"
    assert (prepared.job.noted is not None) == file.exists() == (how != "never written")
    if how == "gone":
        file.unlink()
    elif how == "written to":
        file.write_text("{half")
    elif how == "replaced":
        file.with_suffix(".other").write_text(file.read_text().replace("tap0", "tap1"))
        file.with_suffix(".other").rename(file)
    seen: list[tuple[Op, ...]] = []  # what the journal says is pending, at each write but the announcement

    def note(_number: int) -> None:
        if not node.kernel.writes[-1].after_change:
            seen.append(tuple(one.op for one in node.journal().pending))

    node.kernel.before = note
    assert arrive_wholly(prepared, node.session())
    needed = tuple(change.op for change in prepared.job.needed if change.op.undoable)
    assert seen
    assert set(seen) == {needed}
    assert node.journal().phase is Phase.POST


def test_who_is_announced_and_not_noted_yet_keeps_the_lock_of_its_tap_alone(node: Node) -> None:
    """Others may change what taps share meanwhile: what they read claims the same as afterwards."""
    prepared = armed(node)
    session = node.session()
    arriving = arrive(prepared, session)
    assert arriving
    needed = {change.op for change in prepared.job.needed if change.op.undoable}
    assert {entry.op for entry in node.journal().pending} == needed
    assert isinstance(node.kernel.writes[-1], Announce)
    with pytest.raises(LockTimeoutError), locks.hold(node.run_dir, [locks.of_tap("tap0")], 0):
        pass
    with locks.hold(node.run_dir, [locks.UPLINK], 0):
        pass
    node.down("tap1")  # what the two share stays
    assert (node.kernel.read(PROXY_DELAY), node.kernel.read(PROXY_NDP)) == ("0", "1")
    assert arriving.finish() == node.store.stamp("tap0")
    assert (node.journal().phase, node.journal().pending) == (Phase.POST, ())
    assert node.journal() == arriving.journal
    node.down()
    assert node.kernel.values == {}


def test_an_arrival_that_cannot_be_noted_is_undone_with_what_is_shared_locked(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = armed(node)
    before = dict(node.kernel.values)
    arriving = arrive(prepared, node.session())
    assert arriving
    assert node.kernel.values != before
    full = NoSpaceError("full", errno=errno.ENOSPC)
    monkeypatch.setattr(node.store, "draft", lambda *_: raise_if(True, full))
    undone: list[Op] = []

    def locked(_number: int) -> None:
        undone.append(node.kernel.writes[-1])
        with pytest.raises(LockTimeoutError), locks.hold(node.run_dir, [locks.UPLINK], 0):
            pass

    node.kernel.before = locked
    with pytest.raises(NoSpaceError) as raised:
        arriving.finish()
    assert raised.value.undone
    assert undone
    assert node.kernel.values == before
    assert (node.journal().phase, node.journal().pending) == (Phase.PRE, ())
    with locks.hold(node.run_dir, [locks.of_tap("tap0"), locks.UPLINK], 0):
        pass


def test_a_neighbour_of_a_killed_run_knows_what_was_there_before_both(nodes: Callable[[], Node]) -> None:
    step, killed = 0, True
    while killed:
        node = nodes()
        killed = killed_at(step, node, lambda: node.post(ROUTED))  # noqa: B023
        node.post(SECOND)
        node.gc()
        assert (node.kernel.read(PROXY_DELAY), node.kernel.read(PROXY_NDP)) == ("0", "1"), f"step {step}"
        node.down("tap1")
        node.down("tap0")
        assert node.kernel.values == {}, f"step {step}"
        step += 1
    assert step > 8


def test_killed_while_going_down(nodes: Callable[[], Node]) -> None:
    step, killed = 0, True
    while killed:
        node = nodes()
        node.post(TABLED)
        killed = killed_at(step, node, lambda: node.down())  # noqa: B023
        node.down()
        assert node.kernel.values == {}, f"step {step}"
        step += 1
    assert step > 3, "there were instants to be killed at"


def pending_mtu(node: Node) -> Journal:
    """A run on a live, wired tap was killed when it had changed the MTU."""
    node.post(BRIDGED)
    journal = replace(node.journal(), pending=(Entry(LinkMtu("tap0", 1280), 9000),))
    node.store.save(journal)
    node.kernel.put(LinkMtu("tap0", 1280))
    return journal


def refuse_mtu(node: Node) -> None:
    node.kernel.before = lambda _number: raise_if(isinstance(node.kernel.writes[-1], LinkMtu), REFUSED)


def test_gc_undoes_a_killed_run_and_keeps_what_was_done_before(node: Node) -> None:
    journal = pending_mtu(node)
    node.gc()
    assert node.kernel.read(LinkMtu("tap0", 0)) == 9000
    assert node.journal() == replace(journal, pending=())


@pytest.mark.parametrize("command", ["gc", "post"])
def test_what_cannot_be_undone_yet_is_tried_again(command: str, node: Node) -> None:
    journal = pending_mtu(node)
    refuse_mtu(node)
    with pytest.raises(RollbackError, match="refused"):
        node.gc() if command == "gc" else node.post(BRIDGED)
    assert node.journal() == journal, "both what was done and what is to be undone"
    node.kernel.before = lambda _number: None
    node.gc()
    assert node.kernel.read(LinkMtu("tap0", 0)) == 9000
    node.down()
    assert node.kernel.values == {}


@pytest.mark.parametrize("again", ["gc", "down"])
def test_a_down_that_could_not_undo_all_is_tried_again(again: str, node: Node) -> None:
    """As its hint says."""
    node.post(BRIDGED)
    refuse_mtu(node)
    with pytest.raises(RollbackError) as caught:
        node.down()
    assert "kvm-ifup gc" in caught.value.hint
    assert node.kernel.undoable() == {LinkMtu("tap0", 0).key: 9000}, "all else was undone"
    node.kernel.before = lambda _number: None
    node.gc() if again == "gc" else node.down()
    assert node.kernel.values == {}
    assert on_disk(node.run_dir) == {}


def unreadable(node: Node, kind: type[Op], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers for ops of *kind*, as when ovsdb-server is not running."""
    read = node.kernel.read

    def refuse(op: Op) -> Value:
        raise_if(isinstance(op, kind), REFUSED)
        return read(op)

    monkeypatch.setattr(node.kernel, "read", refuse)


@pytest.mark.parametrize("command", ["down", "gc"])
def test_what_cannot_be_read_keeps_nothing_else_from_being_undone(
    command: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.post(replace(OVS, tap="tap1"))
    if command == "gc":
        node.kernel.indexes.clear()
    unreadable(node, OvsPort, monkeypatch)
    node.kernel.put(Rule(4, "tap1", 100, 5, RTPROT_STATIC, True))
    node.store.save(
        replace(
            node.journal("tap1"),
            entries=(Entry(Rule(4, "tap1", 100, 5, RTPROT_STATIC, True), False), *node.journal("tap1").entries),
        )
    )
    with pytest.raises(RollbackError, match="refused"):
        node.gc() if command == "gc" else node.down("tap1")
    assert [rule for rule in node.kernel.of(Rule) if isinstance(rule, Rule) and rule.iif == "tap1"] == []
    assert [entry.op.kind for entry in node.journal("tap1").pending] == ["ovs-port"]


# --- down without a journal ---------------------------------------------------------------------------


def test_down_for_an_unknown_tap_does_nothing(node: Node) -> None:
    node.kernel.put(Rule(4, "tap0", 100, 5, RTPROT_STATIC, True))
    assert node.down().changes == ()
    assert node.kernel.writes == []


@pytest.mark.parametrize("there", [True, False])
def test_down_without_a_journal_withdraws_a_known_nic(there: bool, node: Node) -> None:
    node.kernel.put(Rule(4, "tap0", 100, 5, RTPROT_STATIC, True))
    node.kernel.put(LinkUp("tap0", True))
    for prefix in ("192.0.2.8/32", "2001:db8::8/128"):
        node.kernel.put(ProxyNeighbour("eth0", prefix.partition("/")[0], True))
        node.kernel.put(Route(prefix, "tap0", 100, True))
    if not there:
        node.kernel.remove_tap("tap0")
    node.down(nic=TABLED)
    assert node.kernel.values == ({LinkUp("tap0", True).key: True} if there else {})
    assert on_disk(node.run_dir) == {}


def test_down_without_a_journal_leaves_the_rivals_proxy_entries(node: Node) -> None:
    node.post(SECOND)
    values = dict(node.kernel.values)
    node.down(nic=replace(ROUTED, ip=SECOND.ip))
    assert node.kernel.values == values


# --- unreadable journals ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}'])
@pytest.mark.parametrize("command", ["post", "down"])
def test_ones_own_unreadable_journal(text: str, command: str, node: Node) -> None:
    node.post(ROUTED)
    node.store.path("tap0").write_text(text)
    writes = len(node.kernel.writes)
    with pytest.raises(JournalError) as caught:
        node.post(ROUTED) if command == "post" else node.down()
    assert caught.value.code == 70
    assert "kvm-ifup gc" in caught.value.hint
    assert len(node.kernel.writes) == writes
    outcome = node.gc()[0]
    assert "cannot be read" in outcome.remarks[0]
    assert str(node.run_dir / "state" / "tap0.unreadable") in outcome.remarks[0]
    node.post(ROUTED)


@pytest.mark.parametrize("what", ["garbage", "directory"])
def test_the_unreadable_journal_of_another_tap_does_not_disturb(what: str, node: Node) -> None:
    place = node.store.path("tap1")
    if what == "directory":
        place.mkdir(parents=True)
    else:
        place.parent.mkdir(parents=True)
        # It mentions all that a run looks for.
        place.write_text('"eth0" "192.0.2.8/32" "2001:db8::8/128" "web1.example.com"')
    node.post(DUAL)
    assert taps_of_instance("web1.example.com", node.session()) == ["tap0"]
    node.down()
    assert node.kernel.values == {}


def test_a_dry_gc_leaves_an_unreadable_journal_where_it_is(node: Node) -> None:
    node.post(ROUTED)
    node.store.path("tap0").write_text("{")
    assert "cannot be read" in node.gc(dry=True)[0].remarks[0]
    assert on_disk(node.run_dir).keys() == {"tap0.json"}


# --- locks --------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The locks that were taken since the last call, in their order."""
    names: list[str] = []
    monkeypatch.setattr(locks, "_wait", lambda _descriptor, name, *_: names.append(name))

    def since() -> list[str]:
        found, names[:] = names[:], []
        return found

    return since


def test_which_locks(node: Node, taken: Callable[[], list[str]]) -> None:
    node.post(BRIDGED)
    assert taken() == ["tap.tap0"]
    node.post(ROUTED, SECOND)
    assert taken() == ["tap.tap0", "tap.tap1", "uplink"]
    node.post(BRIDGED)
    assert taken() == ["tap.tap0", "uplink"], "there is a routed NIC to clear up after"
    node.post(BRIDGED)
    assert taken() == ["tap.tap0"]


@every_nic
def test_which_locks_it_takes_to_undo_something(nic: Nic, node: Node, taken: Callable[[], list[str]]) -> None:
    """A program may take long: every routed guest would wait for it."""
    expected = ["tap.tap0", "uplink"] if nic.mode == "routed" else ["tap.tap0"]
    node.pre(nic)
    taken()
    prepare_arrival("tap0", node.session())
    assert taken() == expected
    run_post("tap0", lambda _journal: True, node.session())
    assert taken() == expected
    node.gc()
    assert taken() == ["tap.tap0"], "there is nothing to clear up"
    node.down()
    assert taken() == expected
    node.down(nic=nic)
    assert taken() == expected, "without a journal, the NIC's description decides"
    node.down()
    assert taken() == ["tap.tap0"]
    node.post(nic)
    taken()
    node.kernel.remove_tap("tap0")
    node.gc()
    assert taken() == expected


@pytest.mark.parametrize("part", ["entries", "pending"])
def test_what_taps_share_takes_its_lock_whatever_the_nic_has_become(
    part: str, node: Node, taken: Callable[[], list[str]]
) -> None:
    """A run that was to make a routed NIC of it was killed."""
    shared: dict[str, Any] = {part: (Entry(PROXY_DELAY, "80"),)}
    journal = Journal(BRIDGED, node.kernel.indexes["tap0"], Phase.POST, namespace=node.store.namespace)
    node.store.save(replace(journal, **shared))
    node.down()
    assert taken() == ["tap.tap0", "uplink"]


@pytest.mark.parametrize(
    ("held", "command"),
    [(held, command) for held in (locks.of_tap("tap0"), locks.UPLINK) for command in ("post", "down")],
)
def test_another_run_holds_a_lock(held: str, command: str, node: Node) -> None:
    node.post(ROUTED)
    writes = len(node.kernel.writes)
    with locks.hold(node.run_dir, [held], 0.0), pytest.raises(LockTimeoutError) as caught:
        node.post(ROUTED) if command == "post" else node.down()
    assert caught.value.code == 75
    assert held in str(caught.value)
    assert len(node.kernel.writes) == writes
    node.down()


def test_bridged_nics_do_not_wait_for_each_other(node: Node) -> None:
    with locks.hold(node.run_dir, [locks.UPLINK, locks.of_tap("tap1")], 0.0):
        node.post(BRIDGED)


def test_configured_uplinks_are_used(node: Node) -> None:
    node.kernel.uplinks += (ETH1_4, ETH1_6)
    node.config = replace(node.config, routed=RoutedConfig(uplinks=("eth1",)))
    node.post(DUAL)
    shared: list[Op] = [op for op in node.kernel.of(Sysctl) if op.shared]
    assert {getattr(op, "dev", "") for op in shared} == {"eth1", "all"}


def test_whether_a_guest_has_its_addresses_here(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmifup.runs.store.devices.index_of", lambda name: node.kernel.indexes.get(name))
    store = Store(node.run_dir)
    assert not store.has_here("tap0", {"192.0.2.8"})
    node.pre(ROUTED)
    assert not store.has_here("tap0", {"192.0.2.8"})
    node.post(ROUTED)
    assert store.has_here("tap0", {"192.0.2.8"})
    assert not store.has_here("tap0", {"192.0.2.8", "192.0.2.9"}), "not this address"
    node.kernel.replace_tap("tap0")
    assert not store.has_here("tap0", {"192.0.2.8"}), "another tap"
    store.path("tap0").write_text("{")
    assert not store.has_here("tap0", {"192.0.2.8"})

    def read(*_: object) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("kvmifup.runs.store.trust.read", read)
    with pytest.raises(KernelError):  # nobody knows
        store.has_here("tap0", {"192.0.2.8"})


@pytest.mark.parametrize("dry", [False, True])
def test_a_tap_that_is_another_guests_by_now_is_left_alone(dry: bool, node: Node) -> None:
    """A manager that is late names the guest that had the tap before."""
    node.post(ROUTED)
    values = dict(node.kernel.values)
    outcome = node.down(instance="web9.example.com", dry=dry)
    assert outcome.changes == ()
    assert str(ROUTED.instance) in outcome.remarks[0]
    assert node.kernel.values == values
    node.kernel.remove_tap("tap0")
    assert node.down(instance="web9.example.com").changes, "what a dead guest left is anybody's to clear up"


def test_a_guest_that_returns_on_another_tap_keeps_what_its_dead_tap_left(node: Node) -> None:
    """Clearing up after the old tap must not silence the new one."""
    node.post(DUAL)
    node.kernel.remove_tap("tap0")
    back = replace(DUAL, tap="tap1")
    node.post(back)
    node.gc()
    assert sorted(on_disk(node.run_dir)) == ["tap1.json"]
    assert len(node.kernel.of(ProxyNeighbour)) == 2
    assert (node.kernel.read(PROXY_DELAY), node.kernel.read(PROXY_NDP)) == ("0", "1")
    node.down("tap1")
    assert node.kernel.values == {}
