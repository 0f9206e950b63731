"""`kvm-ifup check` names what others have done to a NIC, and why; --repair puts it right, and goes no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness import manager, nodes, oracle, snapshots, tools
from harness.addresses import CLIENT_IP4, CLIENT_MAC, GUEST_IP4, GUEST_IP6
from harness.hooks import Result, call, check
from harness.nodes import Node
from harness.oracle import sysctl
from harness.wire import packet_socket
from tests.kernel.checking import BRIDGED, ROUTED, TABLE, found, text, wire
from tests.kernel.staging import NICS


@pytest.mark.parametrize("program", ["kvm-ifup-pre", "kvm-ifup-post"])
@pytest.mark.parametrize("nic", NICS)
def test_nothing_is_wrong_after_a_hook(node: Node, nic: str, program: str) -> None:
    wire(node, nic, program)
    before = snapshots.snapshot()
    assert found() == (0, [])
    assert found("tap0") == found("web1.example.com") == (0, [])
    assert snapshots.changes(before, snapshots.snapshot()) == []
    said = call("kvm-ifup", "check", "tap0")
    assert said.out.startswith(f"web1.example.com/0 (tap0): {NICS[nic]['mode']}, {program[9:]} since 20")
    assert said.out.endswith(" (hook): right\n")


def default_route_to_another_device(_node: Node) -> None:
    tools.ip("link add eth1 type veth peer name other")
    tools.ip("link set eth1 up")
    tools.ip("link set other up")
    tools.ip("addr add 203.0.113.11/24 dev eth1")
    for family in (4, 6):
        sysctl(f"ipv{family}/conf/eth1/forwarding", 1)
    tools.ip("route replace default via 203.0.113.1 dev eth1")
    tools.ip("-6 route replace default dev eth1")


def do(*lines: str) -> Callable[[Node], None]:
    """A fault planted with `ip` commands."""

    def plant(_node: Node) -> None:
        for line in lines:
            tools.ip(line)

    return plant


def change(path: str, value: int) -> Callable[[Node], None]:
    """A fault planted with a sysctl."""

    def plant(_node: Node) -> None:
        sysctl(path, value)

    return plant


def loop(node: Node) -> None:
    """STP hears of the same, better bridge on tap0 and on a cheaper port: it blocks tap0."""
    tools.ip("link add near type veth peer name far")
    tools.ip("link set far up")
    tools.ip("link set near master br0 up")
    tools.ip("link set br0 type bridge stp_state 1 forward_delay 200")
    tools.ip("link set tap0 type bridge_slave cost 200")
    root = bytes.fromhex("0000 020000000001")
    times = bytes.fromhex("0000 1400 0200 0200")  # message age, max age, hello time, forward delay, in 1/256 s
    bpdu = bytes(5) + root + bytes(4) + root + b"\x80\x01" + times  # IEEE 802.1D, section 9.3.1
    frame = bytes.fromhex("0180c2000000 020000000001 0026 424203") + bpdu
    oracle.settle("far")
    while tools.ask("bridge -j link show dev tap0")[0]["state"] != "blocking":
        with packet_socket("far") as sender:
            sender.send(frame.ljust(60, b"\0"))
        node.taps[0].send(frame.ljust(60, b"\0"))


def never_forwards(_node: Node) -> None:
    tools.run("bridge", "link", "set", "dev", "tap0", "state", "learning")


FAULTS: dict[str, tuple[str, Callable[[Node], None], tuple[str, ...]]] = {
    "off its bridge": (BRIDGED, do("link set tap0 nomaster"), ("tap0 bridge: none -> br0", "restarting the network")),
    "another bridge": (BRIDGED, do("link set tap0 master br1"), ("tap0 bridge: br1 -> br0", "moved it")),
    "blocking": (BRIDGED, loop, ("tap0 port state: blocking -> forwarding", "STP has found a loop")),
    "learning": (BRIDGED, never_forwards, ("tap0 port state: learning -> forwarding", "look again in a moment")),
    "MTU": (BRIDGED, do("link set tap0 mtu 1400"), ("tap0 MTU: 1400 -> 9000", "smaller than the bridge's")),
    "tap down": (BRIDGED, do("link set tap0 down"), ("tap0 state: down -> up", "set it down")),
    "routed tap down": (
        ROUTED,
        do("link set tap0 down"),
        ("tap0 state: down -> up", f"route {GUEST_IP4}/32 dev tap0 table 254: absent", "went when the tap went down"),
    ),
    "route gone": (
        ROUTED,
        do(f"route del {GUEST_IP4} dev tap0"),
        (f"route {GUEST_IP4}/32 dev tap0 table 254: absent -> present", "a routing daemon"),
    ),
    "route elsewhere": (
        ROUTED,
        do(f"route del {GUEST_IP4} dev tap0", f"route add {GUEST_IP4} dev eth0"),
        (f"{GUEST_IP4}/32 is already routed out of eth0 in table 254", "given to somebody else"),
    ),
    "uplink changed": (ROUTED, default_route_to_another_device, ("uplink: eth0 -> eth1", "default route has moved")),
    "no default route": (
        ROUTED,
        do("route del default", "-6 route del default"),
        ("there is no default route, so no uplink is known; what was done on the last one stays",),
    ),
    "forwarding off": (
        ROUTED,
        change("ipv4/conf/eth0/forwarding", 0),
        ("IPv4 forwarding is off on uplink eth0", "dropped", "sysctl -w net.ipv4.conf.eth0.forwarding=1"),
    ),
    "rp_filter changed": (
        ROUTED,
        change("ipv4/conf/tap0/rp_filter", 0),
        ("sysctl net/ipv4/conf/tap0/rp_filter: 0 -> 1", "somebody has made it off; configured is strict"),
    ),
    "rp_filter drops": (
        TABLE,
        do("rule del iif eth0 lookup 100"),
        (f"what comes in on eth0 for {GUEST_IP4} does not go out of tap0", "ip rule add iif eth0 lookup 100"),
    ),
    "proxy entry gone": (
        ROUTED,
        do(f"neigh del proxy {GUEST_IP4} dev eth0"),
        (f"proxy neighbour {GUEST_IP4} dev eth0: absent -> present", "nobody answers for the guest"),
    ),
    "stale rule": (
        ROUTED,
        do("rule add iif tap0 lookup 200 priority 5"),
        ("rule v4 5: iif tap0", "lookup 200: present -> absent", "it is not ours"),
    ),
    "rule gone": (
        TABLE,
        do("rule del iif tap0 lookup 100"),
        ("rule v4 10000: iif tap0 lookup 100: absent -> present", "deleted it"),
    ),
}
# What no repetition of a hook mends.
NOT_OURS = {"blocking", "learning", "route elsewhere", "forwarding off", "rp_filter drops", "no default route"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_repaired(node: Node, fault: str) -> None:
    nic, plant, words = FAULTS[fault]
    wire(node, nic)
    right, proxied = snapshots.snapshot_of_kernel(), oracle.proxies()
    plant(node)
    code, findings = found()
    assert code == 1
    for word in words:
        assert word in text(findings)
    assert "post" in call("kvm-ifup", "check").out
    repaired = call("kvm-ifup", "check", "--repair", "tap0")
    if fault in NOT_OURS:
        assert repaired.code == 1
        assert oracle.proxies() >= proxied
        return
    assert (repaired.code, repaired.err) == (0, "")
    assert "repaired: web1.example.com/0 (tap0): " in repaired.out
    assert repaired.out.endswith(": right\n")
    assert found() == (0, [])
    if fault != "uplink changed":
        assert [one for one in snapshots.changes(right, snapshots.snapshot_of_kernel()) if "br1" not in one] == []
    else:
        assert oracle.proxies("eth0") == set()
        assert oracle.proxies("eth1") == {GUEST_IP4, GUEST_IP6}


def test_rp_filter_of_all_devices(node: Node) -> None:
    node.uplink()
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    settings = manager.configuration(routed={"rp_filter": "off"})
    check(call("kvm-ifup-post", "tap0", settings), 0)
    assert call("kvm-ifup", "check", settings).code == 0
    sysctl("ipv4/conf/all/rp_filter", 1)
    result = call("kvm-ifup", "check", settings)
    assert result.code == 1
    assert "rp_filter on tap0 is strict in effect, not off" in result.out


def test_a_strict_reverse_path_filter_that_drops(node: Node) -> None:
    wire(node, ROUTED)
    tools.ip(f"route add {GUEST_IP4} dev eth0 table 50")
    tools.ip("rule add priority 50 lookup 50")
    code, findings = found()
    assert code == 1
    assert f"what the guest sends from {GUEST_IP4} to eth0 is dropped: reverse path filter on tap0" in text(findings)


# --- who else answers -------------------------------------------------------------------------------------


def test_another_node_that_answers(node: Node) -> None:
    wire(node, ROUTED)
    assert found("--probe") == (0, [])
    with node.client:
        tools.ip(f"addr add {GUEST_IP4}/32 dev eth0")
        tools.ip(f"addr add {GUEST_IP6}/128 dev eth0 nodad")
    code, findings = found("--probe")
    assert code == 1
    for address in (GUEST_IP4, GUEST_IP6):
        assert f"{CLIENT_MAC} on eth0 answers for {address}, too" in text(findings)


def test_another_node_that_stands_in(node: Node) -> None:
    """As a node does that the guest has left without kvm-ifdown: late, and not for a question without a sender."""
    wire(node, ROUTED, ip=[GUEST_IP4])
    with node.client:
        tools.ip("link add behind type veth peer name far")
        tools.ip("link set behind up")
        tools.ip("link set far up")
        tools.ip(f"route add {GUEST_IP4} dev behind")
        tools.ip(f"neigh add proxy {GUEST_IP4} dev eth0")
        sysctl("ipv4/conf/eth0/forwarding", 1)
    code, findings = found("--probe")
    assert code == 1
    assert f"{CLIENT_MAC} on eth0 answers for {GUEST_IP4}, too" in text(findings)


def test_before_its_arrival_a_guest_answers_elsewhere(node: Node) -> None:
    wire(node, ROUTED, "kvm-ifup-pre")
    with node.client:
        tools.ip(f"addr add {GUEST_IP4}/32 dev eth0")
    code, findings = found("--probe")
    assert code == 0
    assert [one["wrong"] for one in findings] == [False]
    assert findings[0]["why"] == "the guest runs there"


# --- what a repair does not do ------------------------------------------------------------------------------


@pytest.mark.parametrize("nic", NICS)
def test_a_repair_of_pre_stays_pre(node: Node, nic: str) -> None:
    wire(node, nic, "kvm-ifup-pre", incoming=True)
    right = snapshots.snapshot_of_kernel()
    # The manager may already say that the guest is not expected any more.
    manager.write_nic(**{**NICS[nic], "incoming": False})
    tools.ip("link set tap0 down")
    result = call("kvm-ifup", "check", "--repair")
    assert result.code == 0, result.out
    assert ", pre since" in result.out
    assert snapshots.changes(right, snapshots.snapshot_of_kernel()) == []
    assert oracle.proxies() == set()


def test_a_nic_that_nothing_has_wired(node: Node) -> None:
    nodes.add_bridge()
    manager.write_nic(mode="bridged", link="br0")
    assert found() == (0, [])
    nodes.add_tap()
    code, findings = found("--repair")
    assert code == 1
    assert "nothing has wired it" in text(findings)
    assert oracle.link("tap0").get("master") is None


def test_a_dead_nic_and_a_broken_journal(uplinked: Node) -> None:
    nodes.add_tap()
    manager.write_nic(mode="routed", ip=[GUEST_IP4])
    check(call("kvm-ifup-post", "tap0"), 0)
    tools.ip("link del tap0")
    code, findings = found()
    assert code == 1
    assert "its tap is gone" in text(findings)
    (manager.RUN_DIR / "state/tap0.json").write_text("{")
    code, findings = found("--repair")
    assert code == 1
    assert "cannot be read" in text(findings)


def test_a_file_that_says_otherwise_since(node: Node) -> None:
    wire(node, BRIDGED)
    manager.write_nic(mode="bridged", link="br1")
    code, findings = found()
    assert code == 1
    assert "described otherwise since: link" in text(findings)
    assert call("kvm-ifup", "check", "--repair").code == 0
    assert oracle.link("tap0")["master"] == "br1"


def test_an_unknown_name(node: Node) -> None:
    check(call("kvm-ifup", "check", "nobody"), 65, "nobody", "kvm-ifup show")


def announced(node: Node, run: Callable[[], Result]) -> int:
    """How many gratuitous ARP frames *run* sends."""
    wire_tap = node.listen()
    check(run(), 0)
    return sum(frame[12:14] == b"\x08\x06" and frame[28:32] == frame[38:42] for frame in node.fence(wire_tap))


def test_a_repair_announces_what_it_has_mended_and_nothing_else(node: Node) -> None:
    wire(node, ROUTED, ip=[GUEST_IP4])
    assert announced(node, lambda: call("kvm-ifup", "check", "--repair")) == 0
    tools.ip(f"route del {GUEST_IP4} dev tap0")
    assert announced(node, lambda: call("kvm-ifup", "check", "--repair")) == 1
    assert CLIENT_IP4 not in oracle.proxies()
