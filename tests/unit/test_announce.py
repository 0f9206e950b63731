"""The frames, byte for byte, and the child process that repeats them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.node import frames
from kvmifup.node.announce import NotSent
from kvmifup.runs import announcing

UPLINK_MAC = bytes.fromhex("0200 5e10 0001")

GARP = bytes.fromhex(
    "ffffffffffff 02005e100001 0806"  # Ethernet: to all, from the uplink, ARP
    "0001 0800 06 04 0001"  # Ethernet, IPv4, lengths, request
    "02005e100001 c0000208"  # sender: the uplink's MAC, 192.0.2.8
    "000000000000 c0000208"  # target: unknown, the same address
    "000000000000000000000000000000000000"  # padding
)
NA = bytes.fromhex(
    "333300000001 02005e100001 86dd"  # Ethernet: to all nodes, from the uplink, IPv6
    "60000000 0020 3a ff"  # version 6, 32 bytes of ICMPv6, hop limit 255
    "fe800000000000000000000000000001"  # from the uplink's own address
    "ff020000000000000000000000000001"  # to all nodes
    "88 00 ca4b 20000000"  # neighbour advertisement, checksum, Override alone
    "20010db8000000000000000000000008"  # target
    "02 01 02005e100001"  # option: target's link-layer address
)


def test_gratuitous_arp() -> None:
    frame = frames.gratuitous_arp(UPLINK_MAC, "192.0.2.8")
    assert frame == GARP
    assert len(frame) == 60


def test_unsolicited_na() -> None:
    frame = frames.unsolicited_na(UPLINK_MAC, "2001:db8::8", "fe80::1")
    assert frame == NA
    assert len(frame) == 86


def ones_complement(data: bytes) -> int:
    """The sum of RFC 1071 in one go: 2**16 is 1 modulo 65535, so the number is congruent to its digits' sum."""
    return int.from_bytes(data, "big") % 0xFFFF


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=6).map(str), st.ip_addresses(v=6).map(str))
def test_every_na_sums_up(mac: bytes, address: str, source: str) -> None:
    frame = frames.unsolicited_na(mac, address, source)
    assert len(frame) == 86
    header, icmp = frame[14:54], frame[54:]
    pseudo = header[8:40] + len(icmp).to_bytes(4, "big") + b"\0\0\0\x3a"
    assert ones_complement(pseudo + icmp) == 0
    assert icmp[-6:] == mac


@given(st.binary(max_size=60).filter(lambda data: len(data) % 2 == 0))
def test_checksum(data: bytes) -> None:
    checksum = frames.internet_checksum(data)
    assert 0 <= checksum <= 0xFFFF
    assert ones_complement(data + checksum.to_bytes(2, "big")) == 0


def test_qemus_schedule() -> None:
    assert announcing.SCHEDULE == (0.0, 0.05, 0.2, 0.45, 0.8)


# --- the repeating child ------------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Repeat with no pauses; returns a line for every round that the child sent."""
    log = tmp_path / "log"
    log.touch()
    messages = [("eth0", "192.0.2.8", "192.0.2.8")]

    def send(sent: object) -> list[NotSent]:
        assert sent == messages
        with log.open("a") as file:
            file.write(f"{[str(Path(f'/proc/self/fd/{n}').readlink()) for n in (0, 1, 2)]}\n")
        return []

    def complain(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    def run(still_true: Callable[[], bool], sender: Callable[[object], list[NotSent]] = send) -> list[str]:
        monkeypatch.setattr(announcing, "SCHEDULE", (0.0, 0.0, 0.0, 0.0))
        monkeypatch.setattr(announcing, "send", sender)
        announcing.repeat_detached(messages, still_true, complain)
        _, status = os.waitpid(-1, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return log.read_text().splitlines()

    return run


def test_all_later_rounds_are_sent_by_a_child_that_holds_nothing_open(rounds: Callable[..., list[str]]) -> None:
    assert rounds(lambda: True) == [str(["/dev/null"] * 3)] * 3


def test_no_round_is_sent_once_the_guest_has_left(rounds: Callable[..., list[str]]) -> None:
    remaining = [True, False]
    assert len(rounds(lambda: remaining.pop(0))) == 1


def test_a_round_that_is_not_sent_is_told_and_the_next_one_follows(rounds: Callable[..., list[str]]) -> None:
    def fail(_sent: object) -> list[NotSent]:
        return [NotSent("eth0", "192.0.2.8", errno.ENOBUFS), NotSent("eth0", "192.0.2.9", errno.ENOBUFS)]

    line = "192.0.2.8 and 1 more not announced on eth0: No buffer space available"
    assert rounds(lambda: True, fail) == [line] * 3
