"""VLANs of guests on what they share: each counts for itself, over all NICs, and what was there before stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from kvmifup.core.errors import KernelError, NotReadyError
from kvmifup.core.model import Config, LinkConfig, Nic, Phase, Trunk
from kvmifup.core.ops import LinkMaster, LinkUp, Op, UplinkVlans
from kvmifup.core.vlans import NONE, ids
from kvmifup.diagnosis import by_hand
from kvmifup.node import ports
from kvmifup.node.messages import IFLA_AF_SPEC, attributes
from kvmifup.runs.apply import Change

from .nodes import Killed
from .samples import BRIDGED, FILTERING, OVS, ROUTED
from .test_runs import Node

pytestmark = pytest.mark.usefixtures("quick_disk")

EVERY = UplinkVlans("br0", "eth0", ":1-4094", ":1-4094")
FIRST = replace(BRIDGED, vlan=".100:200")
SECOND = replace(BRIDGED, tap="tap1", mac="aa:00:00:35:ac:02", instance="web2.example.com", vlan=".300:200")


@pytest.fixture
def nodes(tmp_path: Path) -> Callable[[], Node]:
    numbers = count()

    def make() -> Node:
        made = Node(tmp_path / str(next(numbers)), "tap0", "tap1")
        made.kernel.indexes["eth0"] = 99
        made.kernel.bridges["br0"] = replace(FILTERING, trunks=(Trunk("eth0"),))
        return made

    return make


@pytest.fixture
def node(nodes: Callable[[], Node]) -> Node:
    return nodes()


def uplink(node: Node) -> str:
    """The VLANs of eth0."""
    return str(node.kernel.read(EVERY))


def there(node: Node, vlans: str) -> None:
    """Somebody has put eth0 into *vlans*."""
    node.kernel.put(EVERY.turned(vlans))


# --- counted over NICs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["tap0", "tap1"])
def test_a_vlan_goes_when_the_last_nic_that_needs_it_goes(first: str, node: Node) -> None:
    node.post(FIRST)
    node.post(SECOND)
    assert uplink(node) == ":100:200:300"
    node.down(first)
    assert uplink(node) == (":200:300" if first == "tap0" else ":100:200")
    node.down("tap1" if first == "tap0" else "tap0")
    assert uplink(node) == NONE
    assert node.kernel.undoable() == {}


@pytest.mark.parametrize("before", [":200", ":100:200:300", ":1-4094"])
@pytest.mark.parametrize("leave", [("tap0", "tap1"), ("tap1", "tap0")])
def test_a_vlan_that_was_there_before_us_stays(before: str, leave: tuple[str, str], node: Node) -> None:
    there(node, before)
    node.post(FIRST)
    node.post(SECOND)
    for tap in leave:
        node.down(tap)
    assert uplink(node) == before


def test_ranges_that_overlap_are_counted_one_by_one(node: Node) -> None:
    there(node, ":150")
    node.post(replace(FIRST, vlan=":100-199"))
    node.post(replace(SECOND, vlan=":120-299"))
    assert uplink(node) == ":100-299"
    node.down("tap0")
    assert uplink(node) == ":120-299"
    node.down("tap1")
    assert uplink(node) == ":150"


@pytest.mark.parametrize("nic", [FIRST, SECOND, replace(FIRST, vlan=":1-4094")], ids=["one", "other", "all"])
def test_the_second_run_writes_nothing(nic: Nic, node: Node) -> None:
    node.post(nic)
    node.kernel.writes.clear()
    (outcome,) = node.post(nic)
    assert not [change for change in outcome.changes if change.needed]
    assert node.kernel.writes == []


@pytest.mark.parametrize(
    ("vlan", "left"),
    [(".100", ":100:200:300"), (".100:400", ":100:200:300:400"), (".300", ":200:300"), (None, ":200:300")],
)
def test_a_changed_nic_gives_up_what_nobody_else_needs(vlan: str | None, left: str, node: Node) -> None:
    node.post(FIRST)
    node.post(SECOND)
    node.post(replace(FIRST, vlan=vlan))
    assert uplink(node) == left
    node.kernel.writes.clear()
    node.post(replace(FIRST, vlan=vlan))
    assert node.kernel.writes == []
    node.down("tap0")
    node.down("tap1")
    assert node.kernel.undoable() == {}


def test_what_a_changed_nic_gives_up_stays_if_it_was_there_before_us(node: Node) -> None:
    there(node, ":100")
    node.post(FIRST)
    node.post(replace(FIRST, vlan=".500"))
    assert uplink(node) == ":100:500"
    node.down()
    assert uplink(node) == ":100"


@pytest.mark.parametrize("vlan", [".100", ":300"])
def test_without_a_vlan_again_the_port_is_as_a_new_one(vlan: str, node: Node) -> None:
    node.post(replace(FIRST, vlan=vlan))
    node.post(BRIDGED)
    assert node.kernel.read(LinkMaster("tap0", "br0 .1")) == "br0 .1"
    assert uplink(node) == NONE


def test_a_port_without_vlans_is_left_as_somebody_has_made_it(node: Node) -> None:
    node.post(BRIDGED)
    node.kernel.put(LinkMaster("tap0", "br0 .7"))
    (outcome,) = node.post(BRIDGED)
    assert not [change for change in outcome.changes if change.needed]
    assert node.kernel.read(LinkMaster("tap0", "br0 .7")) == "br0 .7"


def test_another_uplink_takes_over(node: Node) -> None:
    node.post(FIRST)
    node.kernel.indexes["bond0"] = 100
    node.kernel.bridges["br0"] = replace(FILTERING, trunks=(Trunk("bond0"),))
    node.post(FIRST)
    assert uplink(node) == NONE
    assert node.kernel.read(replace(EVERY, dev="bond0")) == ":100:200"


def test_a_dead_nic_holds_no_vlan_and_gc_takes_it_away(node: Node) -> None:
    node.post(FIRST)
    node.post(SECOND)
    node.kernel.remove_tap("tap0")
    node.gc()
    assert uplink(node) == ":200:300"
    node.kernel.remove_tap("tap1")
    node.gc()
    assert uplink(node) == NONE


def test_a_second_nic_knows_what_a_dead_one_has_made(node: Node) -> None:
    there(node, ":200")
    node.post(FIRST)
    node.kernel.remove_tap("tap0")
    node.post(replace(SECOND, vlan=".100:200"))
    node.gc()
    assert uplink(node) == ":100:200"
    node.down("tap1")
    assert uplink(node) == ":200"


# --- failures and crashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbour", [None, SECOND], ids=["alone", "with another"])
@pytest.mark.parametrize("earlier", [None, replace(FIRST, vlan=":200:500"), BRIDGED], ids=["new", "changed", "no vlan"])
@pytest.mark.parametrize("kind", [Killed(), KernelError("refused", errno=5)], ids=["killed", "refused"])
def test_a_run_that_ends_at_any_write_leaves_what_was_there(
    kind: BaseException, earlier: Nic | None, neighbour: Nic | None, nodes: Callable[[], Node]
) -> None:
    for number in count():
        node = nodes()
        there(node, ":500:600")
        for nic in filter(None, (neighbour, earlier)):
            node.post(nic)
        before = node.kernel.undoable()

        def strike(at: int, number: int = number + len(node.kernel.writes)) -> None:
            if at == number:
                raise kind

        node.kernel.after = strike
        try:
            node.post(FIRST)
        except (Killed, KernelError):
            pass
        else:
            assert number >= 2
            break
        finally:
            node.kernel.after = lambda _number: None
        node.gc()
        assert node.kernel.undoable() == before, f"write {number}"
        node.post(FIRST)
        for tap in ("tap0", "tap1"):
            node.down(tap)
        assert uplink(node) == ":500:600", f"write {number}"


@pytest.mark.parametrize("nic", [ROUTED, replace(BRIDGED, link="br1"), replace(OVS, vlan=None)], ids=lambda n: n.mode)
def test_a_port_that_cannot_go_elsewhere_comes_back_into_its_vlans(nic: Nic, node: Node) -> None:
    node.kernel.bridges["br1"] = FILTERING
    node.post(FIRST)
    before = node.kernel.undoable()
    for number in range(40):

        def refuse(at: int, number: int = number) -> None:
            if at == number:
                raise KernelError("refused", errno=5)

        node.kernel.after = refuse
        node.kernel.writes.clear()
        try:
            node.post(nic)
        except KernelError:
            assert node.kernel.undoable() == before, f"write {number}"
        else:
            break
    assert node.kernel.read(LinkMaster("tap0", None)) != "br0 .100:200"


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        (Trunk("eth0", is_tap=True), "uplink eth0 is a tap"),
        (Trunk("eth7", is_port=False), "uplink eth7 is no port of br0"),
        (Trunk("eth0", used=((7, "v7"), (200, "eth0.200"))), "VLAN 200 on eth0 belongs to eth0.200"),
    ],
)
def test_an_uplink_that_cannot_carry_the_vlans_is_refused(trunk: Trunk, words: str, node: Node) -> None:
    node.kernel.bridges["br0"] = replace(FILTERING, trunks=(trunk,))
    for phase in (Phase.PRE, Phase.POST):
        with pytest.raises(NotReadyError, match=words) as caught:
            node.up(phase, FIRST)
        assert caught.value.hint
    assert node.kernel.writes == []


def test_a_vlan_device_of_another_vlan_is_no_obstacle(node: Node) -> None:
    node.kernel.bridges["br0"] = replace(FILTERING, trunks=(Trunk("eth0", used=((7, "v7"),)),))
    node.post(FIRST)
    assert uplink(node) == ":100:200"


@pytest.mark.parametrize(("links", "said"), [((), True), ((("br0", LinkConfig(uplinks=())),), False)])
def test_vlans_that_do_not_leave_the_node_are_a_remark_unless_that_is_meant(
    links: tuple[tuple[str, LinkConfig], ...], said: bool, node: Node
) -> None:
    node.config = replace(Config(lock_timeout=0.0), link=links)
    node.kernel.bridges["br0"] = replace(FILTERING, trunks=())
    (outcome,) = node.post(FIRST)
    assert any("do not leave this node" in remark for remark in outcome.remarks) is said


# --- a port that joins is down ------------------------------------------------------------------------------------


def test_a_running_tap_that_joins_is_set_up_again_also_after_a_crash(node: Node) -> None:
    node.kernel.put(LinkUp("tap0", True))
    (outcome,) = node.post(FIRST)
    (up,) = [change for change in outcome.changes if isinstance(change.op, LinkUp)]
    assert (up.needed, up.now) == (True, True)  # so it is in the journal while the tap may be down


def test_a_running_port_whose_vlans_change_stays_up(node: Node) -> None:
    node.post(FIRST)
    node.kernel.writes.clear()
    node.post(replace(FIRST, vlan=".100:300"))
    assert [type(op).__name__ for op in node.kernel.writes] == ["UplinkVlans", "LinkMaster", "UplinkVlans"]
    assert all(op.wanted is not None for op in node.kernel.writes)


# --- requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vids", [range(1, 4095), range(2, 4095, 2), [5], [5, 6], []])
@pytest.mark.parametrize("flags", [0, 4])
def test_a_request_says_each_vlan_once_and_neighbours_as_a_range(vids: list[int], flags: int) -> None:
    said: list[int] = []
    data = ports.infos(vids, flags)
    begun = 0
    for offset in range(0, len(data), 8):
        (kind, value), *_ = attributes(data[offset : offset + 8]).items()
        assert kind == ports.IFLA_BRIDGE_VLAN_INFO
        how, vid = ports.VLAN_INFO.unpack(value)
        assert how & ~(ports.RANGE_BEGIN | ports.RANGE_END) == flags
        if how & ports.RANGE_BEGIN:
            begun = vid
        elif how & ports.RANGE_END:
            said += range(begun, vid + 1)
        else:
            said.append(vid)
    assert said == list(vids)
    assert len(data) < 1 << 16  # what one attribute can hold
    assert IFLA_AF_SPEC == 26


def test_the_pvid_is_never_a_range() -> None:
    (found,) = attributes(ports.added({100: 6})).values()
    assert ports.VLAN_INFO.unpack(found) == (6, 100)


@pytest.mark.parametrize(
    ("op", "now", "lines"),
    [
        (
            LinkMaster("tap0", "br0 .100:200-299"),
            None,
            [
                "ip link set dev tap0 down",
                "ip link set dev tap0 master br0",
                "bridge vlan del dev tap0 vid 1-4094",
                "bridge vlan add dev tap0 vid 100 pvid untagged",
                "bridge vlan add dev tap0 vid 200-299",
            ],
        ),
        (
            LinkMaster("tap0", "br0 .100:300"),
            "br0 .100:200-299",
            ["bridge vlan add dev tap0 vid 300", "bridge vlan del dev tap0 vid 200-299"],
        ),
        (UplinkVlans("br0", "eth0", ":100-102", ":100-102"), ":101", [
            "bridge vlan add dev eth0 vid 100",
            "bridge vlan add dev eth0 vid 102",
        ]),
        (UplinkVlans("br0", "eth0", ":100-102", NONE), ":100-102", ["bridge vlan del dev eth0 vid 100-102"]),
        (LinkMaster("tap0", "br0"), None, ["ip link set dev tap0 down", "ip link set dev tap0 master br0"]),
    ],
)  # fmt: skip
def test_the_commands_that_do_it_by_hand(op: Op, now: str | None, lines: list[str]) -> None:
    assert by_hand.lines(Change(op, now, True)) == lines


def test_what_goes_out_untagged_on_an_uplink_is_not_ours() -> None:
    op = UplinkVlans("br0", "eth0", ":1:100:200", ":100")
    flags = {1: 6, 100: 6, 200: 0, 300: 0}
    assert ports.present(op, flags) == ":100:200"
    wanted, unwanted = ports.share(op, flags)
    assert (dict(wanted), list(unwanted)) == ({100: 6}, [200])
    assert ids(ports.present(replace(op, want=NONE), flags)) == {200}
