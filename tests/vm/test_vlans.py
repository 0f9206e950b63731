"""VLANs on bridges that keep them apart: what `bridge -j vlan` says, and which frames pass."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from harness import agents, disturb, hooks, manager, tools
from harness.addresses import GUEST_MAC
from harness.agents import Agent
from harness.hooks import call, check
from harness.nodes import Node, add_bridge
from harness.oracle import link
from harness.tools import ask, ip
from harness.wire import BROADCAST, Tap, ethernet, packet_socket
from kvmifup.core.ops import LinkMaster, LinkUp, Op
from kvmifup.node.kernel import Kernel
from kvmifup.node.messages import RTM_DELLINK, RTM_SETLINK
from kvmifup.node.ports import Ports
from kvmifup.node.transport import Transport

Vlans = dict[int, set[str]]

PVID, UNTAGGED = "PVID", "Egress Untagged"
ACCESS = {PVID, UNTAGGED}
OTHER_MAC = "02:00:00:00:00:99"
ETH_P_TEST = 0x88B5  # local experimental
UPLINKS = {"link.br0": {"uplinks": ["eth0"]}}


def bridge_vlans(dev: str) -> Vlans:
    """The VLANs of a port, with their flags, as `bridge` has them."""
    return flags_of([one for port in ask(f"bridge -j vlan show dev {dev}") for one in port["vlans"]])


def flags_of(vlans: list[dict[str, Any]]) -> Vlans:
    """`bridge`'s list as a dictionary, without its ranges."""
    ranges = [(range(one["vlan"], one.get("vlanEnd", one["vlan"]) + 1), one.get("flags", [])) for one in vlans]
    return {vid: set(flags) for vids, flags in ranges for vid in vids}


def all_vlans() -> dict[str, Vlans]:
    """Those of all ports that are in one."""
    return {port["ifname"]: flags_of(port["vlans"]) for port in ask("bridge -j vlan show")}


def add_vlan(dev: str, vid: str, *flags: str) -> None:
    tools.run("bridge", "vlan", "add", "dev", dev, "vid", vid, *flags)


def filtering(pvid: int = 1, name: str = "br0") -> None:
    """A bridge that keeps VLANs apart."""
    add_bridge(name, options=f"vlan_filtering 1 vlan_default_pvid {pvid}")


def add_bond(name: str = "bond0", bridge: str = "br0") -> None:
    """A port that leads out of the node, as far as anybody can see."""
    ip(f"link add {name} type bond")
    ip(f"link add name {name}-up type veth peer name {name}-far")
    ip(f"link set {name}-far up")
    ip(f"link set {name}-up master {name}")  # which sets it up
    ip(f"link set {name} master {bridge} up")


def tagged(*vids: int) -> Vlans:
    return {vid: set() for vid in vids}


def described(node: Node, vlan: str, pvid: int = 1) -> None:
    """A guest on a bridge that filters VLANs, with *vlan* in its NIC file, and a bond that leads out of the node."""
    filtering(pvid)
    node.guest()
    add_bond()
    manager.write_nic(mode="bridged", link="br0", vlan=vlan)


def wired(node: Node, vlan: str, pvid: int = 1) -> None:
    """The same guest, wired."""
    described(node, vlan, pvid)
    check(call("kvm-ifup-post", "tap0"), 0)


# --- what was asked for -----------------------------------------------------------------------------------------

ASKED = {
    ".100": {100: ACCESS},
    "100": {100: ACCESS},
    ":100:200": tagged(100, 200),
    ".1:100": {1: ACCESS, **tagged(100)},
    ".100:200-202:7": {100: ACCESS, **tagged(7, 200, 201, 202)},
    ":1-4094": tagged(*range(1, 4095)),
}


@pytest.mark.parametrize(("pvid", "notations"), [(1, list(ASKED)), (0, [".1:100", ":100:200"])])
def test_tap_and_uplink_have_just_what_was_asked_for(node: Node, pvid: int, notations: list[str]) -> None:
    filtering(pvid)
    node.guest()
    add_bond()
    ip("link add name veth0 type veth peer name far0")
    ip("link set veth0 master br0 up")
    before = all_vlans()
    new = {1: ACCESS} if pvid else {}
    assert before.get("veth0", {}) == before.get("bond0", {}) == new
    for vlan in notations:
        wanted = ASKED[vlan]
        manager.write_nic(mode="bridged", link="br0", vlan=vlan)
        check(call("kvm-ifup-post", "tap0"), 0)
        found = all_vlans()
        assert found["tap0"] == wanted, vlan
        assert found["bond0"] == tagged(*wanted) | new, vlan
        assert found.get("veth0", {}) == new, vlan
    assert "UP" in link("tap0")["flags"]
    again = call("kvm-ifup-post", "tap0", "--json")
    assert (again.code, again.needed) == (0, [])
    check(call("kvm-ifdown", "tap0"), 0)
    assert all_vlans() == before
    assert "master" not in link("tap0")


def test_two_nics_share_a_vlan_and_one_was_there_before(node: Node) -> None:
    filtering()
    node.guest("tap0")
    node.guest("tap1")
    node.uplink(master="br0")
    config = manager.configuration(**UPLINKS)
    add_vlan("eth0", "300")
    add_vlan("eth0", "400", "pvid", "untagged")
    before = all_vlans()
    manager.write_nic("tap0", "web1", mode="bridged", link="br0", vlan=".100:200:300:400")
    manager.write_nic("tap1", "web2", mode="bridged", link="br0", vlan=".200:300", mac=OTHER_MAC)
    check(call("kvm-ifup-post", "tap0", config), 0)
    check(call("kvm-ifup-post", "tap1", config), 0)
    assert bridge_vlans("eth0") == before["eth0"] | tagged(100, 200)
    check(call("kvm-ifdown", "tap0", config), 0)
    assert bridge_vlans("eth0") == before["eth0"] | tagged(200)
    ip("link del tap1")
    check(call("kvm-ifup", "gc", config), 0)
    assert all_vlans() == {dev: vlans for dev, vlans in before.items() if dev != "tap1"}


def test_a_vlan_that_is_taken_away_leaves_the_port_as_a_new_one(node: Node) -> None:
    wired(node, ":100", 7)
    manager.write_nic(mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert bridge_vlans("tap0") == bridge_vlans("bond0") == {7: ACCESS}
    add_vlan("tap0", "8")  # without a vlan of ours from the beginning, it would be somebody else's affair
    check(call("kvm-ifup-post", "tap0"), 0)
    assert bridge_vlans("tap0") == {7: ACCESS}


# --- which ports lead out of the node, and refusals ---------------------------------------------------------------


def test_vlans_of_bonds_lead_out_and_nothing_else_does_by_guess(node: Node) -> None:
    filtering()
    node.guest("tap0")
    node.guest("tap9")
    ip("link add bond0 type bond")
    for dev in ("bond0.5", "veth0.5"):
        if dev == "veth0.5":
            ip("link add name veth0 type veth peer name far0")
        ip(f"link add link {dev[:5]} name {dev} type vlan id 5")
        ip(f"link set {dev[:5]} up")
    ip("link add dummy0 type dummy")
    others = ("veth0.5", "dummy0", "tap9")
    for dev in ("bond0.5", *others):
        ip(f"link set {dev} master br0 up")
    manager.write_nic(mode="bridged", link="br0", vlan=".100")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert bridge_vlans("bond0.5") == {1: ACCESS, 100: set()}
    for dev in others:
        assert bridge_vlans(dev) == {1: ACCESS}, dev


def test_what_cannot_be_right_is_refused_and_nothing_is_touched(node: Node) -> None:
    add_bridge("br0")
    node.guest("tap0")
    node.guest("tap9")
    manager.write_nic(mode="bridged", link="br0", vlan=":99-101")
    off = call("kvm-ifup-pre", "tap0")
    check(off, 69, "does not filter VLANs", "`ip link set br0 type bridge vlan_filtering 1`")
    ip("link set br0 type bridge vlan_filtering 1")  # the hint
    ip("link set tap9 master br0")
    ip("link add bond0 type bond")
    ip("link set bond0 master br0")
    ip("link add link bond0 name guests.100 type vlan id 100")
    ip("link add link bond0 name other.7 type vlan id 7")
    check(call("kvm-ifup-pre", "tap0"), 69, "VLAN 100 on bond0 belongs to guests.100", "`ip link del guests.100`")
    for name, words in (("tap9", "is a tap"), ("lo", "is no port of br0"), ("eth7", "is no port of br0")):
        config = manager.configuration(**{"link.br0": {"uplinks": [name]}})
        check(call("kvm-ifup-pre", "tap0", config), 69, f"uplink {name} {words}")
    assert "master" not in link("tap0")
    assert bridge_vlans("bond0") == {1: ACCESS}
    ip("link del guests.100")
    check(call("kvm-ifup-pre", "tap0"), 0)
    assert bridge_vlans("tap0") == tagged(99, 100, 101)


# --- crashes, failures, repair ------------------------------------------------------------------------------------


def kill_at(kind: str, times: int) -> disturb.Disturbance:
    """A disturbance: the run is killed when it has written an op of this *kind* so many *times*."""
    met = count(1)

    def strike(_number: int, op: Any) -> None:
        if type(op).__name__ == kind and next(met) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def killed_while_the_tap_is_down_to_join() -> int:
    """Kill a hook between two requests of one write; returns how it ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ports, "change", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return hooks.call_in_child("kvm-ifup-post", "tap0")


@pytest.mark.parametrize("was", [None, "br1"], ids=["new", "running on another bridge"])
def test_a_run_that_is_killed_is_undone(node: Node, was: str | None) -> None:
    filtering()
    filtering(name="br1")
    node.guest("tap0")
    add_bond()
    if was:
        ip(f"link set tap0 master {was} up")
        add_vlan("tap0", "500")
    add_vlan("bond0", "200")
    manager.write_nic(mode="bridged", link="br0", vlan=".100:200")

    def state() -> object:
        return all_vlans(), link("tap0")["flags"], link("tap0").get("master")

    before = state()
    for kind, times in (("LinkMaster", 1), ("LinkMaster", 2), ("UplinkVlans", 1), ("LinkUp", 1)):
        if was or times == 1:  # a new one is on no bridge that it could leave
            with disturb.disturbed(after=kill_at(kind, times)):
                assert hooks.call_in_child("kvm-ifup-post", "tap0") == -signal.SIGKILL
            check(call("kvm-ifup", "gc"), 0)
            assert state() == before, f"{kind}, {times}"
    assert killed_while_the_tap_is_down_to_join() == -signal.SIGKILL
    check(call("kvm-ifup", "gc"), 0)
    assert state() == before
    check(call("kvm-ifup-post", "tap0"), 0)
    assert bridge_vlans("tap0") == {100: ACCESS, 200: set()}
    check(call("kvm-ifdown", "tap0"), 0)
    assert state() == before


def test_a_change_that_fails_puts_the_old_vlans_back_and_the_port_stays_up(node: Node) -> None:
    wired(node, ".100:200")
    before = all_vlans()
    manager.write_nic(mode="bridged", link="br0", vlan=":200:300")
    for number in count(1):
        with disturb.disturbed(after=disturb.refuse(number)):
            result = call("kvm-ifup-post", "tap0")
        if result.code == 0:
            break
        assert (all_vlans(), result.code) == (before, 71), f"write {number}"
    assert number > 2
    assert bridge_vlans("tap0") == tagged(200, 300)
    assert bridge_vlans("bond0") == {1: ACCESS, **tagged(200, 300)}


def test_what_others_change_is_shown_explained_repaired_and_mended(node: Node) -> None:
    wired(node, ".100:200-299")
    before = all_vlans()

    def spoil() -> None:
        add_vlan("tap0", "7")
        tools.run("bridge", "vlan", "del", "dev", "tap0", "vid", "250")
        tools.run("bridge", "vlan", "del", "dev", "bond0", "vid", "100")

    spoil()
    shown = call("kvm-ifup", "check", "tap0")
    assert shown.code != 0
    assert "tap0 bridge" in shown.out
    assert "bond0 VLANs" in shown.out
    planned = call("kvm-ifup", "plan", "post", "tap0").out
    for command in ("bridge vlan del dev tap0 vid 7", "bridge vlan add dev tap0 vid 250",
                    "bridge vlan add dev bond0 vid 100"):  # fmt: skip
        assert command in planned
    assert call("kvm-ifup", "check", "--repair", "tap0").code == 0
    assert all_vlans() == before
    agent = Agent().ready()
    try:
        spoil()
        agent.heard("mended", "bond0 VLANs")
        end = time.monotonic() + 60
        while all_vlans() != before:
            assert time.monotonic() < end, all_vlans()
    finally:
        agent.end()


def test_an_uplink_that_joins_or_comes_back_gets_the_vlans_from_the_agent(node: Node) -> None:
    filtering()
    node.guest()
    node.guest("tap1")
    manager.write_nic(mode="bridged", link="br0", vlan=".100:200")
    manager.write_nic("tap1", "web2", mode="bridged", link="br0", vlan=".300", mac=OTHER_MAC)
    for tap in ("tap0", "tap1"):
        check(call("kvm-ifup-post", tap), 0)
    wanted = {1: ACCESS, **tagged(100, 200, 300)}
    with agents.running():
        add_bond()
        agents.until(lambda: bridge_vlans("bond0") == wanted)
        ip("link set bond0 nomaster")
        ip("link set bond0 master br0")
        agents.until(lambda: bridge_vlans("bond0") == wanted)
        assert bridge_vlans("tap0") == {100: ACCESS, **tagged(200)}


@pytest.mark.parametrize("vlan", [".100:200-299", ":1:100"])
def test_the_printed_commands_make_what_the_hook_makes(node: Node, vlan: str) -> None:
    described(node, vlan)
    for line in hooks.printed(call("kvm-ifup", "plan", "post", "tap0").out):
        tools.run(*line.split())
    by_hand = all_vlans()
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    check(call("kvm-ifdown", "tap0"), 0)
    check(call("kvm-ifup-post", "tap0"), 0)
    assert all_vlans() == by_hand


# --- frames -------------------------------------------------------------------------------------------------------


def frame(source: str, number: int, vid: int | None = None) -> bytes:
    """A broadcast that carries *number*, in VLAN *vid*."""
    whole = ethernet(BROADCAST, source, ETH_P_TEST, struct.pack("!I", number) + bytes(42))
    return whole if vid is None else whole[:12] + struct.pack("!HH", 0x8100, vid) + whole[12:]


def said_by(source: str, data: bytes) -> tuple[int | None, int] | None:
    """VLAN and number of a `frame` of *source*; None for any other frame."""
    vid = None
    if data[12:14] == b"\x81\0":
        vid, data = struct.unpack("!H", data[14:16])[0] & 0xFFF, data[:12] + data[16:]
    mine = data[6:12] == bytes.fromhex(source.replace(":", "")) and data[12:14] == struct.pack("!H", ETH_P_TEST)
    return (vid, struct.unpack("!I", data[14:18])[0]) if mine else None


def with_tag(opened: socket.socket) -> bytes:
    """The next frame, with the tag that the kernel has put aside."""
    data, ancillary, *_ = opened.recvmsg(2048, 256)
    for level, kind, value in ancillary:
        if (level, kind) == (263, 8):  # SOL_PACKET, PACKET_AUXDATA
            status, _len, _snap, _mac, _net, tci, _tpid = struct.unpack("=IIIHHHH", value)
            if status & 0x10:  # TP_STATUS_VLAN_VALID
                return data[:12] + struct.pack("!HH", 0x8100, tci) + data[12:]
    return data


def listening(dev: str) -> socket.socket:
    """A socket for all frames on *dev* with their tags, and room for many."""
    made = packet_socket(dev)
    made.setsockopt(263, 8, 1)  # PACKET_AUXDATA
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    return made


def heard(ear: socket.socket) -> list[tuple[int | None, int]]:
    """VLAN and number of the guest's frames that have come by now."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            if one := said_by(GUEST_MAC, with_tag(ear)):
                found.append(one)
    return found


@contextlib.contextmanager
def repeating(what: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, do *what* again and again."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            what()
            time.sleep(0.001)  # else it takes all the time that there is

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def read_all(tap: Tap) -> list[bytes]:
    """What has reached the guest by now."""
    found = []
    waiting = select.poll()
    waiting.register(tap.descriptor, select.POLLIN)
    while waiting.poll(0):
        found.append(os.read(tap.descriptor, 2048))
    return found


@pytest.mark.parametrize("mode", ["new", "running"])
def test_no_frame_of_a_foreign_vlan_passes_while_guests_are_attached(node: Node, mode: str) -> None:
    """In 100 attachments of a tap that is down, and 100 of one that is up, under traffic from both sides.

    Two of each are whole hooks; the others are only what they write, because Python is so slow in here.
    """
    filtering()
    filtering(name="br1")
    guest = node.guest()
    node.uplink(master="br0")
    config = manager.configuration(**UPLINKS)
    manager.write_nic(mode="bridged", link="br0", vlan=".100")
    ip("link set eth0 up")
    with node.client:
        far, ear = packet_socket("eth0"), listening("eth0")
    inside: set[int | None] = set()
    outside: set[int | None] = set()

    def traffic() -> None:
        for vid in (None, 1, 100, 300):
            far.send(frame(OTHER_MAC, 0, vid))
            with contextlib.suppress(OSError):  # the tap is down
                guest.send(frame(GUEST_MAC, 0, vid))

    def take() -> None:
        found = [said_by(OTHER_MAC, data) for data in read_all(guest)]
        inside.update(one[0] for one in found if one)
        outside.update(vid for vid, _ in heard(ear))

    kernel = Kernel()

    def write(*ops: Op) -> None:
        for op in ops:
            kernel.refresh()
            kernel.write(op)

    with far, ear, repeating(traffic), contextlib.closing(kernel):
        for _ in range(2):
            if mode == "running":
                ip("link set tap0 up")
            check(call("kvm-ifup-post", "tap0", config), 0)
            take()
            assert bridge_vlans("tap0") == {100: ACCESS}
            check(call("kvm-ifdown", "tap0", config), 0)
            ip("link set tap0 down")
        add_vlan("eth0", "100")
        for number in range(100):
            write(*([LinkUp("tap0", True)] if mode == "running" else []))
            write(LinkMaster("tap0", "br0 .100"), LinkUp("tap0", True))
            if number % 10 == 0:
                take()
            write(LinkMaster("tap0", None), LinkUp("tap0", False))
        take()
    assert inside == {None}  # VLAN 100, untagged: far sends the others tagged, and untagged in VLAN 1
    assert outside == {100}


def test_a_change_of_vlans_loses_no_frame_of_a_vlan_that_stays(node: Node) -> None:
    """In either direction, while the rest of the VLANs change five times."""
    filtering()
    guest = node.guest()
    node.uplink(master="br0")
    config = manager.configuration(**UPLINKS)
    manager.write_nic(mode="bridged", link="br0", vlan=".100:200:300-399")
    check(call("kvm-ifup-post", "tap0", config), 0)
    with node.client:
        far, ear = packet_socket("eth0"), listening("eth0")
    numbers = count()
    sent: list[int] = []
    inside: list[tuple[int | None, int]] = []
    outside: list[tuple[int | None, int]] = []

    def traffic() -> None:
        number = next(numbers)
        far.send(frame(OTHER_MAC, number, 200))
        guest.send(frame(GUEST_MAC, number, 200))
        sent.append(number)
        inside.extend(filter(None, (said_by(OTHER_MAC, data) for data in read_all(guest))))
        outside.extend(heard(ear))

    with far, ear:
        with repeating(traffic):
            for vlan in (":200:300", ".100:200:300-399", ":200-4094", ":200", ".7:200:100"):
                manager.write_nic(mode="bridged", link="br0", vlan=vlan)
                check(call("kvm-ifup-post", "tap0", config), 0)
        traffic()
    assert len(sent) > 100
    assert inside == outside == [(200, number) for number in sent]
    assert bridge_vlans("tap0") == {7: ACCESS, **tagged(100, 200)}


# --- how much is said ---------------------------------------------------------------------------------------------


def test_all_vlans_are_set_in_two_requests(node: Node) -> None:
    """One for those that the port is to have, one for those that it is not to have, however many there are."""
    filtering()
    node.guest()
    tools.run("ip", "link", "set", "tap0", "master", "br0")
    requests: list[tuple[int, int]] = []
    send = Transport.send

    def count_it(transport: Transport, kind: int, flags: int, body: bytes) -> int:
        if kind in (RTM_SETLINK, RTM_DELLINK):
            requests.append((kind, len(body)))
        return send(transport, kind, flags, body)

    with pytest.MonkeyPatch.context() as patch, contextlib.closing(Kernel()) as kernel:
        patch.setattr(Transport, "send", count_it)
        kernel.write(LinkMaster("tap0", "br0 :2-4094"))
        assert [kind for kind, _ in requests] == [RTM_SETLINK, RTM_DELLINK]
        assert sum(length for _, length in requests) < 200  # a range is two numbers
        assert bridge_vlans("tap0") == tagged(*range(2, 4095))
        requests.clear()
        kernel.refresh()
        kernel.write(LinkMaster("tap0", "br0 .1:2-4094"))
        assert [kind for kind, _ in requests] == [RTM_SETLINK]
    assert bridge_vlans("tap0") == {1: ACCESS, **tagged(*range(2, 4095))}
