"""Filters of bridged NICs: in force before the tap joins its bridge, and read back as they are."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import disturb, hooks, manager, nodes, snapshots, tools
from harness.addresses import FOREIGN_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, IPS
from harness.guestframes import NIC
from harness.hooks import Result, call, check
from harness.nodes import Node
from harness.oracle import link
from harness.wire import (
    BROADCAST,
    arp_request,
    ethernet,
    icmp6,
    mac_bytes,
    packet_socket,
    router_advertisement,
    solicitation,
)
from kvmifup.core.ops import Filter
from kvmifup.node import nft as library
from kvmifup.node.filter_shape import SETS
from kvmifup.node.messages import attributes
from kvmifup.node.nfmessages import (
    NFPROTO_BRIDGE,
    NFPROTO_NETDEV,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_USERDATA,
    listed,
)
from kvmifup.node.nfnetlink import Nftables, held

pytestmark = pytest.mark.userns

LOCAL = "fe80::a800:ff:fe35:ac01"  # what GUEST_MAC gives
REASONS = ("mac", "address", "router", "dhcp", "protocol")
OTHER_IP4, OTHER_IP6 = "192.0.2.99", "2001:db8::99"


def wire(**keys: Any) -> Result:
    """Have post wire tap0."""
    manager.write_nic(mode="bridged", link="br0", **keys)
    return call("kvm-ifup-post", "tap0")


def table() -> dict[str, list[dict[str, Any]]]:
    """What nft has in our table, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in json.loads(tools.run("nft", "-j", "list", "ruleset"))["nftables"]:
        ((kind, what),) = one.items()
        found.setdefault(kind, []).append(what)
    return found


def nft(*words: str) -> str:
    """nft, as an administrator has it."""
    return tools.run("nft", *words)


@pytest.fixture
def bridged(node: Node) -> Node:
    """A node with a bridge, which has an uplink, and a tap."""
    nodes.add_bridge()
    node.uplink(master="br0")
    node.guest()
    return node


# --- frames -----------------------------------------------------------------------------------------------------


def udp(source: str, sport: int, dport: int, mac: str = GUEST_MAC) -> bytes:
    """A datagram of IPv4; br_netfilter wants the header's checksum right."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address("192.0.2.255").packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", total) + header[12:]
    return ethernet(BROADCAST, mac, 0x0800, header + struct.pack("!HHHH", sport, dport, 8, 0))


def advertisement(target: str, mac: str = GUEST_MAC, source: str = GUEST_IP6) -> bytes:
    """A neighbour advertisement with the option that tells a MAC."""
    body = struct.pack("!BBHI16sBB6s", 136, 0, 0, 0, ipaddress.ip_address(target).packed, 2, 1, mac_bytes(mac))
    return icmp6("33:33:00:00:00:01", GUEST_MAC, source, "ff02::1", body)


def rarp(mac: str) -> bytes:
    """What QEMU sends when a guest has arrived, with *mac* inside."""
    one = mac_bytes(mac) + bytes(4)
    return ethernet(BROADCAST, GUEST_MAC, 0x8035, struct.pack("!HHBBH", 1, 0x800, 6, 4, 3) + one + one + bytes(18))


def tagged(frame: bytes, vid: int, kind: int = 0x8100) -> bytes:
    """The frame in a VLAN."""
    return frame[:12] + struct.pack("!HH", kind, vid) + frame[12:]


ARP = arp_request(GUEST_MAC, GUEST_IP4, "192.0.2.1")
FORGED_ARP = ethernet(BROADCAST, GUEST_MAC, 0x0806, ARP[14:22] + mac_bytes(FOREIGN_MAC) + ARP[28:])
RIGHT = {
    "UDP": udp(GUEST_IP4, 1000, 1000),
    "DHCP": udp("0.0.0.0", 68, 67),
    "ARP": ARP,
    "a probe": arp_request(GUEST_MAC, "0.0.0.0", GUEST_IP4),
    "an announcement": rarp(GUEST_MAC),
    "NS": solicitation(GUEST_MAC, GUEST_IP6, "2001:db8::1"),
    "NA": advertisement(GUEST_IP6),
    "NA of the link-local address": advertisement(LOCAL, source=LOCAL),
}
WRONG_MAC = {
    "another MAC": (udp(GUEST_IP4, 1000, 1000, FOREIGN_MAC), "mac"),
    "ARP with another MAC": (FORGED_ARP, "mac"),
    "the announcement of another": (rarp(FOREIGN_MAC), "mac"),
    "NA with another MAC": (advertisement(GUEST_IP6, FOREIGN_MAC), "mac"),
}
WRONG_ADDRESS = {
    "another address": (udp(OTHER_IP4, 1000, 1000), "address"),
    "no address": (udp("0.0.0.0", 1000, 1000), "address"),
    "a DHCP server": (udp(GUEST_IP4, 67, 68), "dhcp"),
    "ARP of another address": (arp_request(GUEST_MAC, OTHER_IP4, "192.0.2.1"), "address"),
    "RA": (router_advertisement(GUEST_MAC, LOCAL), "router"),
    "NS of another address": (solicitation(GUEST_MAC, OTHER_IP6, "2001:db8::1"), "address"),
    "NA of another address": (advertisement(OTHER_IP6), "address"),
    "another protocol": (ethernet(BROADCAST, GUEST_MAC, 0x88B6, bytes(46)), "protocol"),
}
TAGS: dict[str, Callable[[bytes], bytes]] = {
    "bare": lambda frame: frame,
    "VID 0": lambda frame: tagged(frame, 0),
    "VID 5": lambda frame: tagged(frame, 5),
    "802.1ad": lambda frame: tagged(frame, 5, 0x88A8),
    "VID 0 twice": lambda frame: tagged(tagged(frame, 0), 0),
    "802.1Q in 802.1Q": lambda frame: tagged(tagged(frame, 6), 5),
    "802.1Q in 802.1ad": lambda frame: tagged(tagged(frame, 6), 5, 0x88A8),
    "802.1ad in 802.1Q": lambda frame: tagged(tagged(frame, 6, 0x88A8), 5),
}


def dropped() -> dict[str, int]:
    """How many frames of tap0 were dropped, by reason."""
    found = {}
    for one in table()["set"]:
        if one["name"].startswith("dropped_"):
            (element,) = one["elem"]
            found[one["name"].removeprefix("dropped_")] = element["elem"]["counter"]["packets"]
    return found


def passing(node: Node, frames: dict[str, bytes]) -> set[str]:
    """The names of those *frames* of the guest that come out of the uplink."""
    with node.client:
        far = packet_socket("eth0")
        far.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: tells the tag
    names = set()
    for name, frame in frames.items():
        node.taps[0].send(frame)
        node.taps[0].send(FENCE)
        while True:
            data, ancillary, _, origin = far.recvmsg(2048, 64)
            if origin[2] == socket.PACKET_OUTGOING:
                continue
            if data == FENCE:
                break
            if ancillary:
                status, *_, tci, kind = struct.unpack("=IIIHHHH", ancillary[0][2])  # struct tpacket_auxdata
                data = tagged(data, tci, kind) if status & 0x10 else data  # TP_STATUS_VLAN_VALID
            if data == frame:
                names.add(name)
    far.close()
    return names


# What may always pass, so that all that was sent before it has been judged.
FENCE = arp_request(GUEST_MAC, GUEST_IP4, "192.0.2.254")


@pytest.mark.parametrize("kind", ["mac", "address"])
@pytest.mark.parametrize("tag", TAGS)
def test_what_is_the_guests_passes_and_nothing_else(bridged: Node, tag: str, kind: str) -> None:
    check(wire(ip=IPS, filter=kind), 0)
    wrong, right = dict(WRONG_MAC), dict(RIGHT)
    if kind == "address":
        wrong |= WRONG_ADDRESS
    else:
        right |= {name: frame for name, (frame, _) in WRONG_ADDRESS.items()}
    every = right | {name: frame for name, (frame, _) in wrong.items()}
    assert passing(bridged, {name: TAGS[tag](frame) for name, frame in every.items()}) == right.keys()
    assert dropped() == {reason: sum(why == reason for _, why in wrong.values()) for reason in REASONS}


def learnt() -> set[str]:
    """The MACs that the bridge believes to be behind tap0."""
    found = tools.ask("bridge -j fdb show br br0")
    return {one["mac"] for one in found if one["ifname"] == "tap0" and one.get("state") != "permanent"}


@pytest.mark.parametrize("kind", ["mac", "address"])
@pytest.mark.parametrize("stp", [0, 1])
def test_no_forged_mac_moves_the_bridges_table(bridged: Node, kind: str, stp: int) -> None:
    """A frame to a reserved address as well, which the bridge does not show to its own hooks."""
    check(wire(ip=IPS, filter=kind), 0)
    tools.ip(f"link set br0 type bridge stp_state {stp}")
    for frame, _ in WRONG_MAC.values():
        bridged.taps[0].send(frame)
    body = b"\x42\x42\x03" + bytes(43)
    for last in range(16):
        for frame_kind in (0x88CC, 38):  # LLDP; and a length, as STP has it
            bridged.taps[0].send(ethernet(f"01:80:c2:00:00:{last:02x}", FOREIGN_MAC, frame_kind, body))
    assert FOREIGN_MAC not in learnt()
    tools.ip("link set br0 type bridge stp_state 0")
    assert passing(bridged, {"ARP": ARP}) == {"ARP"}
    assert learnt() == {GUEST_MAC}


# --- before it joins, and while it changes ----------------------------------------------------------------------


def elements(name: str) -> list[Any]:
    """What is in one of our sets."""
    every = table().get("set", []) + table().get("map", [])
    return next((one.get("elem", []) for one in every if one["name"] == name), [])


@pytest.mark.parametrize("kind", ["mac", "address"])
def test_it_is_in_force_before_the_tap_joins_its_bridge(bridged: Node, kind: str) -> None:
    manager.write_nic(mode="bridged", link="br0", ip=IPS, filter=kind, incoming=True)
    seen = []

    def look(_number: int, op: Any) -> None:
        if type(op).__name__ in ("LinkMaster", "LinkUp"):
            seen.append([["tap0", {"goto": {"target": kind}}]] == elements("guests"))

    with disturb.disturbed(before=look):
        check(call("kvm-ifup-pre", "tap0"), 0)
    assert seen == [True, True]


def test_down_takes_the_tap_off_its_bridge_first(bridged: Node) -> None:
    check(wire(ip=IPS, filter="address"), 0)
    seen = []

    def look(_number: int, op: Any) -> None:
        if type(op).__name__ == "Filter":
            seen.append("master" in link("tap0"))

    with disturb.disturbed(before=look):
        check(call("kvm-ifdown", "tap0"), 0)
    assert seen == [False]
    assert nft("list", "ruleset") == ""


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, bytes], set[str]]] = {
    "another address": (
        {"ip": [GUEST_IP4], "filter": "address"},
        {"ip": [GUEST_IP4, OTHER_IP4], "filter": "address"},
        {"old": udp(GUEST_IP4, 1, 1), "new": udp(OTHER_IP4, 1, 1)},
        {"old", "new"},
    ),
    "an address less": (
        {"ip": [GUEST_IP4, OTHER_IP4], "filter": "address"},
        {"ip": [GUEST_IP4], "filter": "address"},
        {"old": udp(GUEST_IP4, 1, 1), "gone": udp(OTHER_IP4, 1, 1)},
        {"old"},
    ),
    "a prefix around it": (
        {"ip": [GUEST_IP4], "filter": "address"},
        {"ip": ["192.0.2.0/28"], "filter": "address"},
        {"old": udp(GUEST_IP4, 1, 1), "in it": udp("192.0.2.15", 1, 1), "outside": udp("192.0.2.16", 1, 1)},
        {"old", "in it"},
    ),
    "no IPv6": (
        {"ip": IPS, "filter": "address"},
        {"ip": [GUEST_IP4], "filter": "address"},
        {"old": udp(GUEST_IP4, 1, 1), "NS": RIGHT["NS"], "of the link": advertisement(LOCAL, source=LOCAL)},
        {"old"},
    ),
    "another MAC": (
        {"ip": [GUEST_IP4], "filter": "address"},
        {"ip": [GUEST_IP4], "filter": "address", "allow_mac": [FOREIGN_MAC]},
        {"own": udp(GUEST_IP4, 1, 1), "allowed": udp(GUEST_IP4, 1, 1, FOREIGN_MAC), "announced": rarp(FOREIGN_MAC)},
        {"own", "allowed", "announced"},
    ),
    "only MACs": (
        {"ip": [GUEST_IP4], "filter": "address"},
        {"ip": [GUEST_IP4], "filter": "mac"},
        {"any": udp(OTHER_IP4, 1, 1), "forged": udp(GUEST_IP4, 1, 1, FOREIGN_MAC)},
        {"any"},
    ),
    "off": (
        {"ip": [GUEST_IP4], "filter": "address"},
        {"ip": [GUEST_IP4], "filter": "off"},
        {"any": udp(OTHER_IP4, 1, 1), "forged": udp(GUEST_IP4, 1, 1, FOREIGN_MAC)},
        {"any", "forged"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_on_a_running_nic_is_what_is_wired_anew(bridged: Node, name: str) -> None:
    """And what is counted goes on, unless there is no filter any more."""
    before, after, frames, right = CHANGES[name]
    check(wire(**before), 0)
    assert passing(bridged, {"forged": WRONG_MAC["another MAC"][0]}) == set()
    check(wire(**after), 0)
    assert passing(bridged, frames) == right
    if name != "off":
        assert dropped()["mac"] >= 1
    changed = snapshots.snapshot_of_kernel()
    check(call("kvm-ifdown", "tap0"), 0)
    check(wire(**after), 0)
    assert snapshots.changes(changed, snapshots.snapshot_of_kernel()) == []


def add_filtered(tap: str, number: int) -> None:
    """A further tap, and the NIC file of its guest."""
    nodes.add_tap(tap)
    mac, address = f"aa:00:00:35:ad:{number:02x}", f"192.0.2.{100 + number}"
    manager.write_nic(tap, f"web{number}", mode="bridged", link="br0", mac=mac, ip=[address], filter="address")


def test_guests_share_the_rules(bridged: Node) -> None:
    """1 and 20 have as many; but each tap needs a chain of its own, with one rule."""
    check(wire(ip=IPS, filter="address"), 0)
    shared = table()["rule"]
    for number in range(1, 20):
        add_filtered(f"tap{number}", number)
        check(call("kvm-ifup-post", f"tap{number}"), 0)
    own = [one for one in table()["rule"] if one["chain"].startswith("nic-")]
    assert len(table()["rule"]) - len(own) == len(shared) - 1
    assert sorted(one["chain"] for one in own) == sorted(f"nic-tap{number}" for number in range(20))
    assert {one["family"] for one in own} == {"netdev"}
    assert len({json.dumps(one["expr"]) for one in own}) == 1
    assert len(elements("guests")) == 20
    check(call("kvm-ifdown", "tap7"), 0)
    assert len(elements("guests")) == 19
    assert "tap7" not in nft("list", "ruleset")
    assert passing(bridged, {"own": RIGHT["UDP"], "another's": udp("192.0.2.101", 1, 1)}) == {"own"}


def as_in_the_kernel() -> set[tuple[str, bytes]]:
    """Our two tables as the kernel tells them, without what it numbers: elements of sets, and rules."""
    found = set()
    for family, names in ((NFPROTO_BRIDGE, SETS), (NFPROTO_NETDEV, ["port_macs"])):
        asked = Nftables(family, "kvm-ifup")
        for name in names:
            found |= {(name, one) for message in asked.messages(name) for one in listed(held(message))}
        for rule in map(attributes, asked.rules()):
            said = {kind: rule.get(kind, b"") for kind in (NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA)}
            found.add(("rule", repr(said).encode()))
        asked.close()
    return found


def rules_in(chain: str) -> list[tuple[str, str]]:
    """The handle and the comment of each rule of *chain*."""
    found = json.loads(tools.run("nft", "-j", "list", "chain", *chain.split()))["nftables"]
    return [(str(one["rule"]["handle"]), one["rule"]["comment"]) for one in found if "rule" in one]


@pytest.mark.parametrize(
    "chain",
    [
        "bridge kvm-ifup prerouting", "bridge kvm-ifup address", "bridge kvm-ifup four_source",
        "bridge kvm-ifup drop_protocol", "netdev kvm-ifup reserved", "netdev kvm-ifup nic-tap0",
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", [0, -1])
def test_a_rule_that_keeps_its_comment_and_does_something_else_is_noticed(
    bridged: Node, chain: str, which: int
) -> None:
    check(wire(ip=IPS, filter="address"), 0)
    before = tools.run("nft", "list", "chain", *chain.split())
    handle, comment = rules_in(chain)[which]
    nft(f'replace rule {chain} handle {handle} accept comment "{comment}"')
    assert (handle, comment) in rules_in(chain)
    assert filter_now() == "not whole"
    check(call("kvm-ifup-post", "tap0"), 0)
    assert tools.run("nft", "list", "chain", *chain.split()) == before
    assert filter_now() == "right"
    assert call("kvm-ifup-post", "tap0", "--json").needed == []


def filter_now() -> str:
    """What `kvm-ifup show --json` says of the filter of tap0."""
    (nic,) = json.loads(call("kvm-ifup", "show", "tap0", "--json").out)
    (found,) = [str(op["now"]) for op in nic["missing"] if op["op"] == "filter"] or ["right"]
    return "not whole" if "(not whole: " in found else found


def test_rules_that_were_saved_and_loaded_again_are_made_anew(bridged: Node) -> None:
    """nft lists some of them in words that mean less."""
    check(wire(ip=IPS, filter="address"), 0)
    saved = Path("/run/saved")
    saved.write_text(tools.run("nft", "list", "ruleset"))
    nft(f"flush ruleset; include {json.dumps(str(saved))}")
    assert filter_now() == "not whole"
    check(call("kvm-ifup-post", "tap0"), 0)
    assert filter_now() == "right"


@pytest.mark.parametrize("gone", ["flush chain {}", "flush chain {}; delete chain {}"])
def test_without_a_note_of_what_was_made_the_comments_alone_count(bridged: Node, gone: str) -> None:
    """So they do when somebody has typed what `kvm-ifup plan` prints."""
    check(wire(ip=IPS, filter="address"), 0)
    nft(gone.replace("{}", "bridge kvm-ifup made"))
    assert filter_now() == "right"
    assert call("kvm-ifup-post", "tap0", "--json").needed == []


@pytest.mark.parametrize("how", ["mac", "address"])
def test_a_nic_is_wired_as_nft_wires_it_by_the_printed_commands(bridged: Node, how: str) -> None:
    """To the last byte: what we tell the kernel ourselves is what nft makes of the text."""
    add_filtered("tap1", 1)
    check(call("kvm-ifup-post", "tap1"), 0)
    manager.write_nic(mode="bridged", link="br0", filter=how, **{**NIC, "allow_mac": [FOREIGN_MAC]})
    commands = [line for line in hooks.printed(call("kvm-ifup", "plan", "post", "tap0").out) if line.startswith("nft ")]
    before = as_in_the_kernel()
    check(call("kvm-ifup-post", "tap0"), 0)
    ours = as_in_the_kernel()
    check(call("kvm-ifdown", "tap0"), 0)
    assert as_in_the_kernel() == before
    for line in commands:
        tools.run(*shlex.split(line))
    assert as_in_the_kernel() == ours
    assert len(ours - before) >= 13


def test_the_twentieth_nic_takes_no_more_requests_than_the_third(
    bridged: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has just made the second knows what there is, and needs no libnftables.

    Others may change their own tables all the time.
    """
    asked: list[str] = []

    def counted(name: str) -> None:
        real = getattr(Nftables, name)

        def ask(self: Nftables, *words: Any, **more: Any) -> Any:
            asked.append(name)
            return real(self, *words, **more)

        monkeypatch.setattr(Nftables, name, ask)

    check(wire(ip=IPS, filter="address"), 0)
    monkeypatch.setattr(library, "context", lambda: pytest.fail("libnftables is needed once more"))
    for name in ("_get", "_dump", "change", "generation"):
        counted(name)
    found = []
    for number in range(1, 20):
        add_filtered(f"tap{number}", number)
        asked.clear()
        for program in ("kvm-ifup-post", "kvm-ifup-post", "kvm-ifdown", "kvm-ifup-post"):
            check(call(program, f"tap{number}"), 0)
            asked.append("")
            nft(f"add table inet theirs{number}; add set inet theirs{number} kvm-ifup {{ type ifname; }}")
        found.append(" ".join(asked))
    assert found[-1] == found[1]
    assert "_dump" not in found[-1]
    assert found[-1].count("change") == 3


OURS = "bridge kvm-ifup macs { tap0 . 02:00:00:00:00:77 }"
THEIRS = "add table inet theirs; add set inet theirs kvm-ifup { type inet_service; }; "
MANY = "add element inet theirs kvm-ifup {{ {} }}"
AMID = {
    "alone": [f"add element {OURS}"],
    "in one transaction": [THEIRS + f"add element {OURS}"],
    "before theirs": [f"add element {OURS}", THEIRS],
    "after theirs": [THEIRS, f"add element {OURS}"],
    "among more than the kernel can tell": [
        THEIRS, *(MANY.format(", ".join(map(str, range(at, at + 3000)))) for at in range(1, 15000, 3000)),
        f"add element {OURS}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", AMID)
def test_a_change_of_ours_is_seen_whatever_others_change_about_it(bridged: Node, how: str) -> None:
    check(wire(ip=IPS, filter="address"), 0)
    assert call("kvm-ifup-post", "tap0", "--json").needed == []
    for _ in range(2):
        for line in AMID[how]:
            nft(line)
        mended = call("kvm-ifup-post", "tap0", "--json").needed
        assert len(mended) == 1
        assert passing(bridged, {"own": ARP, "forged": udp(GUEST_IP4, 1, 1, "02:00:00:00:00:77")}) == {"own"}
        assert call("kvm-ifup-post", "tap0", "--json").needed == []


def test_a_tap_that_is_made_anew_has_its_chain_again(bridged: Node) -> None:
    """It may go where the device goes, of which the ruleset tells nothing, and kvm-ifdown was not called."""
    for gone in (["link del tap0"], ["link set tap0 down", "link set tap0 name old0"], ["link del tap0"]):
        check(wire(ip=IPS, filter="address"), 0)
        bridged.taps[0].send(ethernet("01:80:c2:00:00:0e", FOREIGN_MAC, 0x88CC, bytes(46)))
        assert passing(bridged, {"own": RIGHT["UDP"], "forged": WRONG_MAC["another MAC"][0]}) == {"own"}
        assert learnt() == {GUEST_MAC}
        assert 'hook ingress device "tap0"' in nft("list", "chain", "netdev", "kvm-ifup", "nic-tap0")
        assert call("kvm-ifup-post", "tap0", "--json").needed == []
        for words in gone:
            tools.ip(words)
        bridged.taps.clear()
        bridged.guest()


DAMAGE = {
    "no MACs": "flush set bridge kvm-ifup macs",
    "not led to its chain": "flush map bridge kvm-ifup guests",
    "no numbers": "flush set bridge kvm-ifup inner_macs; flush set bridge kvm-ifup inner_hosts6",
    "no chain of its own": "flush chain netdev kvm-ifup nic-tap0; delete chain netdev kvm-ifup nic-tap0",
    "no MACs on the tap": "flush set netdev kvm-ifup port_macs",
    "no rule for taps": "flush chain netdev kvm-ifup reserved",
    "nothing at all": "flush ruleset",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_failure_after_a_damaged_filter_was_mended_opens_nothing(bridged: Node, name: str) -> None:
    check(wire(ip=IPS, filter="mac" if name == "no MACs on the tap" else "address"), 0)  # only there it has them
    nft(DAMAGE[name])
    tools.ip("link set tap0 nomaster down")
    with disturb.disturbed(before=disturb.refuse(2)) as written:
        failed = call("kvm-ifup-post", "tap0")
    assert isinstance(written[0], Filter)
    check(failed, 71)
    assert "could not put back" not in failed.err
    tap = link("tap0")
    assert ("master" in tap, "UP" in tap["flags"]) == (False, False)
    check(call("kvm-ifup-post", "tap0"), 0)
    assert passing(bridged, {"own": RIGHT["UDP"], "forged": WRONG_MAC["another MAC"][0]}) == {"own"}


# --- lost journals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["down", "next", "routed", "again"])
def test_a_filter_whose_journal_is_lost_meets_no_other_guest(bridged: Node, how: str) -> None:
    add_filtered("tap1", 1)
    check(call("kvm-ifup-post", "tap1"), 0)
    check(wire(ip=IPS, filter="address"), 0)
    (manager.RUN_DIR / "state/tap0.json").unlink()
    if how != "again":
        tools.ip("link del tap0")
        bridged.taps.clear()
        bridged.guest()
    if how == "down":
        manager.write_nic(mode="bridged", link="br0")
        check(call("kvm-ifdown", "tap0"), 0)
    elif how == "routed":
        manager.write_nic(mode="routed", ip=[OTHER_IP4])
        check(call("kvm-ifup-post", "tap0"), 0)
    else:
        check(wire(mac=FOREIGN_MAC), 0)
        assert passing(bridged, {"own": RIGHT["UDP"], "other": udp(OTHER_IP4, 1, 1, FOREIGN_MAC)}) == {"own", "other"}
        assert call("kvm-ifup-post", "tap0", "--json").needed == []
    assert [key for key, _ in elements("guests")] == ["tap1"]
    assert "nic-tap0" not in nft("list", "ruleset")


def as_an_older_version(*taps: str) -> None:
    """No sets of numbers, and a rule of its own on each tap, in tables that are not empty."""
    script = [f"flush table bridge kvm-ifup; add rule bridge kvm-ifup address iifname {{ {', '.join(taps)} }} drop"]
    script += [f"delete set bridge kvm-ifup {name}" for name in SETS if name.startswith("inner_")]
    script += ["add rule bridge kvm-ifup prerouting iifname vmap @guests"]
    script += ["delete table netdev kvm-ifup; add table netdev kvm-ifup"]
    for tap in taps:
        hook = f"type filter hook ingress device {tap} priority -500; policy accept;"
        script += [f"add chain netdev kvm-ifup nic-{tap} {{ {hook} }}"]
        script += [f"add rule netdev kvm-ifup nic-{tap} ether daddr 01:80:c2:00:00:0e ether saddr != {{ {OWN} }} drop"]
    nft("; ".join(script))


OWN = f"{GUEST_MAC}, {FOREIGN_MAC}"


def test_tables_of_an_older_version_are_taken_over_for_all_nics_at_once(bridged: Node) -> None:
    """Those of other NICs too, as far as the shared rules judge by them: nothing that is right is dropped meanwhile."""
    check(wire(ip=IPS, filter="address"), 0)
    add_filtered("tap1", 1)
    check(call("kvm-ifup-post", "tap1"), 0)
    before = elements("inner_macs"), elements("inner_hosts4")
    assert "tap0" in str(before)
    as_an_older_version("tap0", "tap1")
    check(call("kvm-ifup-post", "tap1"), 0)
    assert (elements("inner_macs"), elements("inner_hosts4")) == before
    forged = {name: frame for name, (frame, _) in (WRONG_MAC | WRONG_ADDRESS).items()}
    assert passing(bridged, RIGHT | forged) == RIGHT.keys()
    check(call("kvm-ifup", "check", "--repair"), 0)
    check(call("kvm-ifup", "check"), 0)
    for tap in ("tap0", "tap1"):
        check(call("kvm-ifdown", tap), 0)
    assert nft("list", "ruleset") == ""


def test_what_an_older_version_has_wired_is_removed(bridged: Node) -> None:
    check(wire(ip=IPS, filter="address"), 0)
    as_an_older_version("tap0")
    check(call("kvm-ifdown", "tap0"), 0)
    assert nft("list", "ruleset") == ""


# --- failures -----------------------------------------------------------------------------------------------------

FOREIGN = {
    "another chain": "add table bridge kvm-ifup; add chain bridge kvm-ifup input",
    "a set of that name": "add table bridge kvm-ifup; add set bridge kvm-ifup macs { type ether_addr; }",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_table_of_somebody_else_is_left_alone(bridged: Node, what: str) -> None:
    nft(FOREIGN[what])
    before = snapshots.snapshot_of_kernel()
    check(wire(ip=IPS, filter="address"), 69, "is not ours", "nft delete table bridge kvm-ifup")
    assert snapshots.changes(before, snapshots.snapshot_of_kernel()) == []
    assert "master" not in link("tap0")


def test_without_libnftables_a_filter_is_refused(bridged: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nftables", None)
    check(wire(ip=IPS, filter="address"), 69, "libnftables", "python3-nftables")
    assert "master" not in link("tap0")
    assert "UP" not in link("tap0")["flags"]
    check(wire(ip=IPS, filter="off"), 0)


def test_two_at_once_are_both_filtered(bridged: Node) -> None:
    taps = [f"tap{number}" for number in range(1, 9)]
    for number, tap in enumerate(taps, 1):
        add_filtered(tap, number)
    running = [hooks.start("kvm-ifup-post", tap) for tap in taps]
    assert [hooks.finish(one).code for one in running] == [0] * len(taps)
    assert sorted(key for key, _ in elements("guests")) == taps
    check(call("kvm-ifup", "check"), 0)
    running = [hooks.start("kvm-ifdown", tap) for tap in taps]
    assert [hooks.finish(one).code for one in running] == [0] * len(taps)
    assert nft("list", "ruleset") == ""
