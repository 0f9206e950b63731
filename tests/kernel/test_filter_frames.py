"""Filters: a table of frames, right and forged, sent from the guest's end of its tap; judged beyond the bridge."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from harness import guestframes, manager, nodes, oracle, tools, wire
from harness.addresses import CLIENT_MAC, GUEST_IP4, GUEST_IP6, GUEST_MAC, NODE_IP4, TAP_MAC
from harness.attacker import far_end
from harness.guestframes import NIC, Sent
from harness.hooks import call, check
from harness.nodes import Node

TABLE = guestframes.table()
FORWARDED = "0xfff8"  # the groups of 802.1D that a bridge can be told to forward
REASONS = ("mac", "address", "router", "dhcp", "protocol")
MTU = 9000
ETH_P_802_2 = 4  # linux/if_ether.h: a frame with a length
SECOND_MAC, VIRTUAL_MAC = "aa:00:00:35:ac:02", "00:00:5e:00:01:07"


def wired(node: Node, how: str, **more: Any) -> wire.Tap:
    """A bridged guest with a filter, on a bridge whose other port leads to the client."""
    nodes.add_bridge(mtu=MTU, options=f"mcast_snooping 0 group_fwd_mask {FORWARDED}")
    if (oracle.SYSCTL / "bridge").exists():  # else a kernel with br_netfilter drops what is no proper IP packet
        for family in ("ip", "ip6"):
            oracle.sysctl(f"bridge/bridge-nf-call-{family}tables", 0)
    node.uplink(master="br0")
    tools.ip(f"link set eth0 mtu {MTU}")
    with node.client:
        tools.ip(f"link set eth0 mtu {MTU}")
    guest = node.guest()
    manager.write_nic(mode="bridged", link="br0", filter=how, **{**NIC, **more})
    check(call("kvm-ifup-post", "tap0"), 0)
    return guest


def learnt(dev: str) -> set[str]:
    """The MACs that the bridge believes to be behind a port."""
    return {
        one["mac"] for one in tools.ask(f"bridge -j fdb show br br0 brport {dev}") if one.get("state") != "permanent"
    }


def judged(node: Node, guest: wire.Tap, frames: Iterable[Sent]) -> dict[str, bool]:
    """What the guest sends comes to the client, or not."""
    end = far_end(node)
    try:
        sent = list(frames)
        passed = end.passed(guest, [one.frame for one in sent])
    finally:
        end.close()
    return {one.name: one.frame in passed for one in sent}


def wrong(found: dict[str, bool], how: str) -> dict[str, bool]:
    """Those of the table that came though they must not, or the other way."""
    expected = {one.name: one.passes(how) for one in TABLE}
    return {name: came for name, came in found.items() if expected[name] not in (None, came)}


def test_the_table_has_what_it_must() -> None:
    names = " ".join(one.name for one in TABLE)
    words = (
        "ARP RARP InARP NS NA RS RA redirect MLD IGMP DHCP DHCPv6 STP LLC PPPoE LLDP MPLS jumbo half fragment options"
    )
    for word in (*words.split(), "VID 0", "two tags", "802.1ad"):
        assert word in names
    assert len(TABLE) >= 60
    for how in ("mac", "address"):
        assert min([one.passes(how) for one in TABLE].count(answer) for answer in (True, False)) >= 60


def test_without_a_filter_each_frame_of_the_table_comes_and_forged_macs_count(node: Node) -> None:
    """The judge sees them all: what does not come with a filter has been dropped by it."""
    guest = wired(node, "off")
    assert wrong(judged(node, guest, TABLE), "off") == {}
    assert len([mac for mac in learnt("tap0") if mac.startswith("02:f")]) >= 40


@pytest.mark.parametrize("how", ["mac", "address"])
def test_each_frame_of_the_table_passes_or_does_not_and_no_table_moves(node: Node, how: str) -> None:
    guest = wired(node, how)
    with node.client, wire.packet_socket("eth0") as client:
        client.send(wire.arp_request(CLIENT_MAC, "192.0.2.1", "192.0.2.1"))
    assert wrong(judged(node, guest, TABLE), how) == {}
    assert learnt("tap0") == {GUEST_MAC}
    assert CLIENT_MAC in learnt("eth0")
    assert oracle.link("tap0")["address"] == TAP_MAC


def counted() -> Counter[str]:
    """How many frames of the guest were dropped so far, by reason."""
    found: Counter[str] = Counter()
    for one in json.loads(tools.run("nft", "-j", "list", "ruleset"))["nftables"]:
        if one.get("set", {}).get("name", "").startswith("dropped_"):
            (element,) = one["set"]["elem"]
            found[one["set"]["name"].removeprefix("dropped_")] = element["elem"]["counter"]["packets"]
    return found


def plain(frame: bytes) -> bool:
    """Whether there are neither options of IPv4 nor extension headers of IPv6."""
    if frame[12:14] == b"\x08\0":
        return frame[14:15] == b"\x45"
    return frame[12:14] != b"\x86\xdd" or frame[20] not in (0, 43, 44, 51, 60)


@pytest.mark.parametrize("how", ["mac", "address"])
@pytest.mark.parametrize("words", ["VID 0 twice", "two tags", "802.1ad and 802.1Q"])
def test_inside_two_tags_it_is_dropped_for_the_same_reason(node: Node, how: str, words: str) -> None:
    """But what has headers before it: nobody can look behind these there. (What is not whole is dropped anyway.)"""
    guest = wired(node, how)
    every = [one for one in guestframes.bare() if "half" not in one.name]
    seen = [one.frame for one in every if one.passes(how) is not None and plain(one.frame)]
    closed = [one.frame for one in every if one.passes(how) and not guestframes.in_two(one).passes(how)]
    tags = guestframes.TAGS[words]
    end = far_end(node)
    counts = []
    for frames in (seen, [guestframes.tagged(one, *tags) for one in seen],
                   [guestframes.tagged(one, *tags) for one in closed]):  # fmt: skip
        before = counted()
        end.passed(guest, frames)
        counts.append(counted() - before)
    end.close()
    assert counts[0] == counts[1]
    assert sorted(counts[0]) == (["mac", "protocol"] if how == "mac" else sorted(REASONS))
    assert counts[2] == Counter(protocol=len(closed))
    assert closed


@pytest.mark.parametrize("how", ["mac", "address"])
@pytest.mark.parametrize("stp", [0, 1])
def test_frames_that_end_at_the_bridge_move_no_table_either(node: Node, how: str, stp: int) -> None:
    """LLDP, EAPOL and BPDUs of a bridge with STP are not forwarded, so they pass none of its hooks for that."""
    guest = wired(node, how)
    tools.ip(f"link set br0 type bridge group_fwd_mask 0 stp_state {stp}")
    for number in range(16):
        for kind, inside in ((0x88CC, bytes(46)), (38, guestframes.LLC_BPDU)):
            frame = wire.ethernet(
                f"01:80:c2:00:00:{number:02x}", f"02:f2:00:{kind >> 8:02x}:00:{number:02x}", kind, inside
            )
            guest.send(frame)
            guest.send(guestframes.tagged(frame, (guestframes.VLAN, 7)))
    guest.send(wire.arp_request(GUEST_MAC, GUEST_IP4, "192.0.2.254"))
    assert learnt("tap0") - {GUEST_MAC} == set()


@pytest.mark.parametrize(("how", "passes"), [("mac", True), ("address", False)])
def test_only_a_guest_that_may_be_a_bridge_takes_part_in_the_nodes_stp(node: Node, how: str, passes: bool) -> None:
    """A socket for one protocol has what has passed. (The kernel's own STP hears the host's network alone.)"""
    guest = wired(node, how)
    tools.ip("link set br0 type bridge stp_state 1")
    frame = wire.ethernet(guestframes.BPDU, GUEST_MAC, 38, guestframes.LLC_BPDU)
    with wire.packet_socket("tap0", ETH_P_802_2) as stp:
        judged(node, guest, [Sent("BPDU", frame, None, None)])
        stp.setblocking(False)
        found = []
        with contextlib.suppress(BlockingIOError):
            found.append(stp.recv(100))
    assert found == ([frame] if passes else [])


@pytest.mark.parametrize("how", ["mac", "address"])
def test_rules_that_were_saved_and_loaded_again_let_nothing_forged_pass(node: Node, how: str) -> None:
    """nft lists some of them in words that mean less. What is right may be dropped then, inside tags."""
    guest = wired(node, how)
    listed = tools.run("nft", "list", "ruleset")
    tools.run("nft", "flush ruleset")
    Path("/run/ruleset").write_text(listed)
    tools.run("nft", "-f", "/run/ruleset")
    found = judged(node, guest, TABLE)
    assert found["ARP request"]
    assert [one.name for one in TABLE if one.passes(how) is False and found[one.name]] == []


@pytest.mark.parametrize("to", [guestframes.LLDP, guestframes.EAPOL, "01:80:c2:00:00:00"])
def test_no_packet_comes_to_the_node_around_its_bridge(node: Node, to: str) -> None:
    """What is sent to such a group is the node's own, as from the tap itself."""
    guest = wired(node, "address")
    tools.ip("link set br0 type bridge group_fwd_mask 0 stp_state 1")
    tools.ip(f"addr add {NODE_IP4}/24 dev br0")
    oracle.sysctl("ipv4/conf/all/rp_filter", 0)
    oracle.sysctl("ipv4/conf/tap0/rp_filter", 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard:
        heard.bind((NODE_IP4, 9))
        packet = guestframes.ip4("203.0.113.9", NODE_IP4, 17, guestframes.udp(9, 9, b"forged"))
        own = oracle.link("br0")["address"]
        guest.send(wire.mac_bytes(to) + packet[6:])
        guest.send(wire.mac_bytes(own) + packet[6:])
        guest.send(wire.mac_bytes(own) + guestframes.ip4(GUEST_IP4, NODE_IP4, 17, guestframes.udp(9, 9, b"right"))[6:])
        heard.settimeout(wire.PATIENCE)
        assert heard.recv(100) == b"right"


@pytest.mark.parametrize(("ips", "closed"), [([GUEST_IP4], 6), ([GUEST_IP6], 4)])
def test_a_family_of_which_no_address_is_listed_is_closed(node: Node, ips: list[str], closed: int) -> None:
    guest = wired(node, "address", ip=ips)
    prefixes = (guestframes.IN_PREFIX4, guestframes.IN_PREFIX6)
    found = {
        name: came
        for name, came in judged(node, guest, (one for one in TABLE if one.address)).items()
        if "prefix" not in name
    }
    assert prefixes
    fours = {name: came for name, came in found.items() if _is_of(name, 4)}
    sixes = {name: came for name, came in found.items() if _is_of(name, 6)}
    assert set(fours.values()) == {closed == 6}, fours
    assert set(sixes.values()) == {closed == 4}, sixes
    assert found["QEMU's RARP"]


def _is_of(name: str, family: int) -> bool:
    """Whether a frame of the table is of one family: ARP is IPv4's."""
    (frame,) = [one.frame for one in TABLE if one.name == name]
    while frame[12:14] in (b"\x81\0", b"\x88\xa8"):
        frame = frame[:12] + frame[16:]
    return frame[12:14] in ((b"\x08\0", b"\x08\x06") if family == 4 else (b"\x86\xdd",))


def test_each_tap_has_its_own_facts_whatever_the_others_are_called(node: Node) -> None:
    """Two NICs of one guest, on taps with names that begin alike: what is right for one is not for the other."""
    guest = wired(node, "address", ip=[GUEST_IP4, GUEST_IP6])
    second = node.guest("tap01")
    manager.write_nic(
        "tap01", index=1, mac=SECOND_MAC, mode="bridged", link="br0", filter="address", ip=["192.0.2.9"]
    )  # fmt: skip
    check(call("kvm-ifup-post", "tap01"), 0)
    of_second = wire.arp_request(SECOND_MAC, "192.0.2.9", "192.0.2.254")
    mixed = wire.arp_request(SECOND_MAC, GUEST_IP4, "192.0.2.254")
    end = far_end(node)
    for frame in (*(one.frame for one in TABLE), mixed, of_second):
        second.send(frame)
    came = end.passed(guest, [of_second, mixed])
    end.close()
    assert came & {*(one.frame for one in TABLE), mixed, of_second} == {of_second}
    assert learnt("tap01") == {SECOND_MAC}


def test_a_mac_that_is_allowed_is_as_good_as_the_guests_and_no_other_is(node: Node) -> None:
    guest = wired(node, "address", allow_mac=[VIRTUAL_MAC])
    right = [
        guestframes.sent_by(VIRTUAL_MAC, guestframes.arp(mac=VIRTUAL_MAC, op=2)),
        guestframes.sent_by(VIRTUAL_MAC, guestframes.reverse(sender=VIRTUAL_MAC, target=VIRTUAL_MAC)),
        guestframes.sent_by(VIRTUAL_MAC, guestframes.nd(guestframes.NA, guestframes.option(2, VIRTUAL_MAC))),
        guestframes.nd(guestframes.NA, guestframes.option(2, VIRTUAL_MAC)),
        guestframes.arp(mac=VIRTUAL_MAC),
        guestframes.arp(),
    ]
    forged = [
        guestframes.sent_by(SECOND_MAC, guestframes.arp(mac=VIRTUAL_MAC)),
        guestframes.sent_by(VIRTUAL_MAC, guestframes.arp(mac=SECOND_MAC)),
        guestframes.sent_by(VIRTUAL_MAC, guestframes.reverse(sender=SECOND_MAC, target=VIRTUAL_MAC)),
        guestframes.sent_by(VIRTUAL_MAC, guestframes.nd(guestframes.NA, guestframes.option(2, SECOND_MAC))),
        guestframes.sent_by(VIRTUAL_MAC, guestframes.arp(mac=VIRTUAL_MAC, sender=guestframes.OTHER_IP4)),
    ]
    end = far_end(node)
    came = end.passed(guest, [*right, *forged])
    end.close()
    assert came & {*right, *forged} == set(right)
    assert learnt("tap0") == {GUEST_MAC, VIRTUAL_MAC}
