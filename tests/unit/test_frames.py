"""What counts as an announcement, and what a guest is asked."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import guests, wire
from kvmifup.core.model import Nic
from kvmifup.node import frames, sockets

MAC, OTHER = "aa:00:00:35:ac:01", "02:00:00:00:00:0b"
ARP = frames.gratuitous_arp(bytes.fromhex(OTHER.replace(":", "")), "192.0.2.8")
NA = frames.unsolicited_na(bytes.fromhex(OTHER.replace(":", "")), "2001:db8::8", "fe80::b")


def nic(*ip: str) -> Nic:
    """A guest with these addresses."""
    return Nic("tap0", MAC, "routed", ip=tuple(ipaddress.ip_network(one) for one in ip))


def test_our_own_kind_of_announcement_is_understood() -> None:
    assert frames.announcement_in(ARP) == ("192.0.2.8", OTHER)
    assert frames.announcement_in(NA) == ("2001:db8::8", OTHER)


def test_so_is_an_arp_reply_with_sender_and_target_alike() -> None:
    assert frames.announcement_in(ARP[:20] + b"\0\2" + ARP[22:]) == ("192.0.2.8", OTHER)


def test_and_an_arp_message_that_another_mac_has_sent() -> None:
    assert frames.announcement_in(ARP[:6] + b"\x02\0\0\0\0\x0c" + ARP[12:]) == ("192.0.2.8", OTHER)


def advertisement(**changed: object) -> bytes:
    """An unsolicited advertisement as another node sends it, but for what is *changed*; its checksum is right."""
    one: dict[str, object] = {
        "code": 0,
        "flags": 0x20000000,
        "target": "2001:db8::8",
        "options": b"\2\1" + wire.mac_bytes(OTHER),
        "source": "fe80::b",
        "to": "ff02::1",
        **changed,
    }
    target = ipaddress.IPv6Address(str(one["target"])).packed
    body = struct.pack("!BBHI16s", 136, one["code"], 0, one["flags"], target) + bytes(one["options"])  # type: ignore[call-overload]
    return wire.icmp6("33:33:00:00:00:01", OTHER, str(one["source"]), str(one["to"]), body)


def test_a_probe_is_a_question_of_nobodys() -> None:
    probe = wire.arp_request(OTHER, "0.0.0.0", "192.0.2.8")
    assert frames.probe_in(probe) == ("192.0.2.8", OTHER)
    assert frames.announcement_in(probe) is None
    assert heard(probe)
    for frame in (ARP, NA, probe[:20] + b"\0\2" + probe[22:], probe[:22] + bytes(6) + probe[28:], b""):
        assert frames.probe_in(frame) is None


def test_what_is_after_an_advertisement_does_not_belong_to_it() -> None:
    assert frames.announcement_in(advertisement() + b"\0\0\0\0") == ("2001:db8::8", OTHER)


def test_the_mac_is_the_one_that_the_option_says() -> None:
    other_options = b"\x0e\1" + bytes(6) + b"\2\1\2\0\0\0\0\x0c"
    assert frames.announcement_in(advertisement(options=other_options)) == ("2001:db8::8", "02:00:00:00:00:0c")


# What one neighbour's kernel changes its cache for, though not that of everybody who gets it. The rest is tried on a
# kernel (tests/kernel/test_belief.py).
BELIEVED = {
    "NS that asks another": wire.solicitation(OTHER, "2001:db8::8", "2001:db8::99"),
    "NA to another": advertisement(to="fe80::1"),
    "NA to the group of another": advertisement(to="ff02::1:ff00:99"),
    "NA to the site's routers": advertisement(to="ff05::2"),
}


@pytest.mark.parametrize("frame", BELIEVED.values(), ids=BELIEVED)
def test_what_one_of_the_neighbours_believes_counts(frame: bytes) -> None:
    assert frames.announcement_in(frame) == ("2001:db8::8", OTHER)
    assert heard(frame)


# What no kernel changes its caches for, each but for one thing like what it does.
IGNORED = {
    "ARP of nobody": wire.arp_request(OTHER, "0.0.0.0", "192.0.2.9"),
    "ARP for a group": wire.arp_request(OTHER, "192.0.2.8", "224.0.0.9"),
    "ARP for a loopback address": wire.arp_request(OTHER, "192.0.2.8", "127.0.0.1"),
    "ARP of other hardware": ARP[:14] + b"\0\7" + ARP[16:],
    "ARP of another protocol": ARP[:16] + b"\x86\xdd" + ARP[18:],
    "ARP of other hardware lengths": ARP[:18] + b"\x08\x04" + ARP[20:],
    "ARP of other protocol lengths": ARP[:18] + b"\x06\x10" + ARP[20:],
    "ARP that is neither request nor reply": ARP[:20] + b"\0\3" + ARP[22:],
    "ARP behind a VLAN tag": ARP[:12] + b"\x81\0\0\5" + ARP[12:],
    "NA from off the segment": NA[:21] + b"\x40" + NA[22:],
    "NA that is UDP": NA[:20] + b"\x11" + NA[21:],
    "NA in a fragment": NA[:20] + b"\x2c" + NA[21:],
    "NA of another version": NA[:14] + b"\x40" + NA[15:],
    "NA with a wrong checksum": NA[:56] + b"\0\0" + NA[58:],
    "NA that is shorter than it says": NA[:-1],
    "NA with a code": advertisement(code=1),
    "NA that does not override": advertisement(flags=0),
    "NA that answers all": advertisement(flags=0x60000000),
    "NA to a group of the node's own": advertisement(to="ff01::1"),
    "NA to a group that nobody is in": advertisement(to="ff0e::1"),
    "NA from ::1": advertisement(source="::1"),
    "NA with a header that is no option": NA[:20] + b"\x2b" + NA[21:54] + bytes([58, 0, 0, 0, 0, 0, 0, 0]) + NA[54:],
    "NA with options without an end": NA[:20] + b"\x3c" + NA[21:54] + bytes([58, 9, 1, 4, 0, 0, 0, 0]) + NA[54:],
    "NS about its sender": wire.solicitation(OTHER, "2001:db8::8", "2001:db8::8"),
    "NS of nobody": wire.solicitation(OTHER, "::", "2001:db8::8"),
    "RS of nobody": wire.icmp6("33:33:00:00:00:02", OTHER, "::", "ff02::2", b"\x85" + bytes(7)),
    "RS without a MAC": wire.icmp6("33:33:00:00:00:02", OTHER, "2001:db8::8", "ff02::2", b"\x85" + bytes(7)),
    "NA from a group": advertisement(source="ff02::1"),
    "NA about a group": advertisement(target="ff02::8"),
    "NA without a MAC": advertisement(options=b""),
    "NA with a MAC of another size": advertisement(options=b"\2\2" + bytes(14)),
    "NA with an option without an end": advertisement(options=b"\2\1" + bytes(6) + b"\x0e\2" + bytes(6)),
    "NA with an empty option": advertisement(options=b"\x0e\0" + bytes(6)),
    "NA with half an option": advertisement(options=b"\2\1" + bytes(4)),
    "RA": wire.router_advertisement(OTHER, "fe80::b"),
    "nothing": b"",
}


@pytest.mark.parametrize("frame", IGNORED.values(), ids=IGNORED)
def test_what_moves_no_address_is_none(frame: bytes) -> None:
    assert frames.announcement_in(frame) is None


@given(st.binary(max_size=128))
def test_no_frame_is_too_strange(frame: bytes) -> None:
    for head in (b"", ARP[:14], NA[:14], NA[:56]):
        frames.announcement_in(head + frame)


@given(st.integers(0, len(NA) - 1))
def test_no_frame_is_too_short(length: int) -> None:
    for read in (frames.announcement_in, frames.answer_in):
        assert read(ARP[: min(length, 41)]) is None
        assert read(NA[:length]) is None


@given(st.integers(0, len(NA) - 1), st.integers(0, 255))
def test_one_wrong_byte_in_an_advertisement_moves_no_other_address(at: int, byte: int) -> None:
    assert frames.announcement_in(NA[:at] + bytes([byte]) + NA[at + 1 :]) in (None, ("2001:db8::8", OTHER))


def test_the_names_of_frames() -> None:
    kinds = (0x0800, 0x0806, 0x8035, 0x86DD, 0x8100)
    names = [frames.name_of(bytes(12) + struct.pack("!H", kind)) for kind in kinds]
    assert names == ["IPv4", "ARP", "RARP", "IPv6", "ethertype 0x8100"]


def test_a_guest_is_asked_in_each_family_once() -> None:
    arp, ndp = frames.questions(nic("192.0.2.0/29", "192.0.2.8", "2001:db8::/64", "2001:db8::8"))
    assert len(arp) == 60
    assert wire.arp(arp) == wire.Arp(MAC, 1, "fe:00:00:35:ac:01", "0.0.0.0", "192.0.2.8")
    assert (ndp[:6].hex(":"), ndp[6:12].hex(":")) == (MAC, "fe:00:00:35:ac:01")
    assert ndp[20:22] == bytes([58, 255])
    assert ndp[54] == 135
    assert socket.inet_ntop(socket.AF_INET6, ndp[22:38]) == "fe80::fc00:ff:fe35:ac01"
    assert socket.inet_ntop(socket.AF_INET6, ndp[38:54]) == "2001:db8::8" == str(ipaddress.IPv6Address(ndp[62:78]))
    assert ndp[78:] == b"\x01\x01" + bytes.fromhex("fe000035ac01")
    pseudo = ndp[22:54] + struct.pack("!I3xB", len(ndp) - 54, 58) + ndp[54:]
    assert wire.ones_sum(pseudo) == 0xFFFF


@pytest.mark.parametrize(
    ("ip", "asked"),
    [
        ((), []),
        (("192.0.2.8",), ["192.0.2.8"]),
        (("2001:db8::8", "192.0.2.9", "192.0.2.8"), ["192.0.2.8", "2001:db8::8", "192.0.2.9"]),
        (("198.51.100.0/24", "192.0.2.7"), ["192.0.2.7"]),
        # Who has only prefixes is asked for what it most likely has.
        (("192.0.2.0/30",), ["192.0.2.1", "192.0.2.2", "fe80::a800:ff:fe35:ac01", "echo"]),
        (("192.0.2.0/31", "2001:db8::/64"), ["192.0.2.0", "192.0.2.1", "fe80::a800:ff:fe35:ac01", "echo"]),
        (("2001:db8::/64",), ["fe80::a800:ff:fe35:ac01", "echo"]),
    ],
)
def test_what_a_guest_is_asked(ip: tuple[str, ...], asked: list[str]) -> None:
    def what(frame: bytes) -> str:
        if arp := wire.arp(frame):
            return arp.target
        assert frame[20:22] == bytes([58, 255])
        assert frame[54] in (135, 128)
        return "echo" if frame[54] == 128 else str(ipaddress.IPv6Address(frame[62:78]))

    assert [what(frame) for frame in frames.questions(nic(*ip), "192.0.2.8")] == asked


def test_a_guest_with_thousands_of_addresses_is_asked_for_some_and_what_matters() -> None:
    every = tuple(str(one) for one in ipaddress.ip_network("10.0.0.0/20"))
    asked = [wire.arp(frame) for frame in frames.questions(nic(*every), every[-1])]
    assert len(asked) == frames.QUESTIONS
    assert asked[0] is not None
    assert asked[0].target == every[-1]
    assert len(frames.questions(nic("10.0.0.0/8"))) <= frames.QUESTIONS + 1


# --- the filters, as the kernel would run them -----------------------------------------------------------


def passes(program: list[sockets.Instruction], frame: bytes, kind: int = socket.PACKET_HOST, dev: int = 3) -> bool:
    """Classic BPF (linux/filter.h), as much as there is of it here; reading past the end drops the frame."""
    accumulator = index = at = 0
    while True:
        code, true, false, operand = program[at]
        at += 1
        sizes = {sockets.LOAD_WORD: 4, sockets.LOAD_HALF: 2, sockets.LOAD_BYTE: 1}
        if code in sizes:
            if operand == sockets.PACKET_TYPE:
                accumulator = kind
            elif operand == sockets.INTERFACE:
                accumulator = dev
            elif operand + sizes[code] > len(frame):
                return False
            else:
                accumulator = int.from_bytes(frame[operand : operand + sizes[code]], "big")
        elif code == sockets.LOAD_BYTE_FROM_X:
            if operand + index >= len(frame):
                return False
            accumulator = frame[operand + index]
        elif code == sockets.SHIFT_LEFT:
            accumulator = accumulator << operand & 0xFFFFFFFF
        elif code == sockets.JUMP:
            at += operand
        elif code == sockets.TO_X:
            index = accumulator
        elif code == sockets.IF_EQUAL:
            at += true if accumulator == operand else false
        elif code == sockets.IF_GREATER:
            at += true if accumulator > operand else false
        elif code == sockets.IF_AT_LEAST:
            at += true if accumulator >= operand else false
        else:
            assert code == sockets.RETURN
            return operand > 0


@given(st.binary(min_size=12, max_size=12), st.binary(max_size=60))
def test_of_a_tap_only_the_guests_own_frames_pass(addresses: bytes, rest: bytes) -> None:
    program = sockets.from_the_guest(MAC)
    guest = bytes.fromhex(MAC.replace(":", ""))
    own = addresses[:6] + guest + rest
    assert passes(program, own)
    assert not passes(program, own, socket.PACKET_OUTGOING)
    assert passes(program, addresses + rest) == (addresses[6:] == guest)
    for at in range(6):
        other = guest[:at] + bytes([guest[at] ^ 1]) + guest[at + 1 :]
        assert not passes(program, addresses[:6] + other + rest)


GUESTS = ["192.0.2.8", "198.51.100.1", "2001:db8::8", "2001:db8:7::5:1"]
PROGRAMS = {b"\x08\x06": sockets.about(4, GUESTS[:2]), b"\x86\xdd": sockets.about(6, GUESTS[2:])}


def heard(frame: bytes) -> bool:
    """Whether a socket on an uplink gets it: there is one for each of two ethertypes, which see nothing of ours."""
    program = PROGRAMS.get(frame[12:14])
    return program is not None and passes(program, frame)


@pytest.mark.parametrize("frame", [ARP, NA], ids=["ARP", "NA"])
def test_announcements_pass(frame: bytes) -> None:
    assert heard(frame)


def test_of_a_neighbour_only_what_is_for_this_node_passes() -> None:
    program = sockets.for_this_node(3, sockets.about(4, GUESTS[:2]))
    kinds = (socket.PACKET_HOST, socket.PACKET_BROADCAST, socket.PACKET_MULTICAST)
    assert all(passes(program, ARP, kind) for kind in kinds)
    assert not any(passes(program, ARP, kind) for kind in range(max(kinds) + 1, 8))
    assert not passes(program, ARP, dev=4)  # a VLAN's device on it
    assert not passes(program, wire.arp_request(OTHER, "192.0.2.9", "192.0.2.8"))


@given(st.binary(max_size=100))
def test_the_filter_lets_everything_pass_that_announces_something(frame: bytes) -> None:
    for head in (b"", ARP[:28], NA[:20], NA[:54]):
        whole = head + frame
        if (found := frames.announcement_in(whole)) and found[0] in GUESTS:
            assert heard(whole)


@pytest.mark.parametrize(
    "frame",
    [
        wire.arp_request(OTHER, "192.0.2.9", "192.0.2.8"),
        wire.arp_request(OTHER, "192.0.2.9", "192.0.2.9"),
        wire.arp_request(OTHER, "0.0.0.0", "192.0.2.9"),
        wire.solicitation(OTHER, "2001:db8::1", "2001:db8::8"),
        advertisement(target="2001:db8::9"),
        NA[:20] + b"\0" + NA[21:54] + bytes([58, 0, 5, 2, 0, 0, 1, 0]) + b"\x8f" + NA[55:],
        wire.ethernet(wire.BROADCAST, OTHER, 0x0800, bytes(46)),
        wire.ethernet(wire.BROADCAST, OTHER, 0x8035, bytes(46)),
    ],
    ids=["ARP request", "gratuitous ARP", "ARP probe", "solicitation", "advertisement", "report", "IPv4", "RARP"],
)
def test_what_an_uplink_is_full_of_does_not_pass(frame: bytes) -> None:
    assert not heard(frame)


@given(st.sets(st.integers(0, 0xFFFFFFFF) | st.integers(0xC0000200, 0xC00003FF), max_size=400))
def test_however_many_addresses_there_are_a_filter_lets_all_pass_and_few_others(numbers: set[int]) -> None:
    addresses = [str(ipaddress.IPv4Address(number)) for number in numbers]
    program = sockets.about(4, addresses)
    assert len(program) < 140
    for address in addresses:
        # Without a sender it is the one that is asked for that counts.
        concerns = address != "0.0.0.0" or "192.0.2.1" in addresses
        assert passes(program, wire.arp_request(OTHER, address, "192.0.2.1")) == concerns
    for number in {number ^ 1 for number in numbers} - {0}:  # who says so without asking a filter says the same
        other = str(ipaddress.IPv4Address(number))
        passed = passes(program, wire.arp_request(OTHER, other, "192.0.2.1"))
        assert passed == sockets.passes(other, sockets.endings(addresses))
    few = sorted(numbers)[: sockets.RANGES]
    program = sockets.about(4, [str(ipaddress.IPv4Address(number)) for number in few])
    for number in {number + by for number in few for by in (-1, 1) if 0 < number + by <= 0xFFFFFFFF}:
        frame = wire.arp_request(OTHER, str(ipaddress.IPv4Address(number)), "192.0.2.1")
        assert passes(program, frame) == (number in few)


@pytest.mark.parametrize("source", ["192.0.2.8", "2001:db8::8"])
def test_a_packet_tells_from_which_address_its_machine_has_sent_it(source: str) -> None:
    for hops in (64, 128, 255):
        assert frames.sender_in(guests.packet(source, hops)) == source
    for hops in (0, 1, 63, 127, 254):
        assert frames.sender_in(guests.packet(source, hops)) is None


def test_a_packet_that_no_kernel_would_take_tells_nothing() -> None:
    packet = guests.packet("192.0.2.8")
    assert frames.sender_in(packet[:26] + b"\xc0\x00\x02\x09" + packet[30:]) is None  # its checksum is wrong
    tagged = packet[:12] + b"\x81\x00\x00\x64" + packet[12:]
    for one in (packet[:33], guests.packet("2001:db8::8")[:53], ARP, guests.rarp(), tagged):
        assert frames.sender_in(one) is None


@given(st.binary(min_size=14, max_size=sockets.SNAP))
def test_whatever_a_guest_sends_can_be_looked_at(frame: bytes) -> None:
    found = frames.sender_in(frame)
    assert found is None or ipaddress.ip_address(found)
