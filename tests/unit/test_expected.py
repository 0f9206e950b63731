"""Who is expected, on disk, and what a guest answers for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvmifup.agent.answers import Answers
from kvmifup.core.model import NOT_YET
from kvmifup.node import frames
from kvmifup.node.messages import packed
from kvmifup.runs import expected

from .samples import DUAL, MAC, ROUTED, nets

COMING = replace(ROUTED, tap=NOT_YET, incoming=True)
OTHER = bytes.fromhex("020000000077")
OWN = bytes.fromhex(MAC.replace(":", ""))
TAP = bytes.fromhex("fe" + MAC.replace(":", "")[2:])


def arp(address: str, mac: bytes = OWN) -> bytes:
    """The guest announces *address*."""
    return frames.gratuitous_arp(mac, address)


def na(address: str) -> bytes:
    """The guest answers for *address*, to who has asked."""
    raw = packed(address)
    return frames.neighbour_message(136, TAP, OWN, raw, packed("fe80::1"), raw, 0x60000000)


# --- on disk --------------------------------------------------------------------------------------------


def test_what_is_told_can_be_read_by_others(tmp_path: Path) -> None:
    told = expected.told("web1.example.com", [COMING, replace(COMING, index=1, ip=nets("2001:db8::8"))])
    expected.put(tmp_path, told)
    assert expected.found(tmp_path) == [told]
    assert told.nics[0].label == "web1.example.com/0"
    expected.forget(tmp_path, told)
    assert expected.found(tmp_path) == []
    expected.forget(tmp_path, told)


def test_what_is_told_again_takes_the_place_and_is_not_forgotten_with_the_first(tmp_path: Path) -> None:
    first = expected.told("web1.example.com", [COMING])
    second = replace(expected.told("web1.example.com", [COMING]), uptime=first.uptime + 1)
    expected.put(tmp_path, first)
    expected.put(tmp_path, second)
    expected.put(tmp_path, expected.told("web1.example.org", [COMING]))
    expected.forget(tmp_path, first)
    assert [one.instance for one in expected.found(tmp_path)] == ["web1.example.com", "web1.example.org"]
    assert expected.found(tmp_path)[0] == second


def test_without_the_agent_who_never_came_is_forgotten_when_another_is_told_of(tmp_path: Path) -> None:
    for name in ("web1", "web2"):
        expected.put(tmp_path, replace(expected.told(name, [COMING]), boot="another"), 60)
    expected.put(tmp_path, expected.told("web3", [COMING]), 60)
    assert [one.instance for one in expected.found(tmp_path)] == ["web3"]


def test_what_was_told_before_the_node_was_started_is_older_than_anything(tmp_path: Path) -> None:
    now = expected.told("web1", [COMING])
    assert now.age < 60
    assert replace(now, boot="another").age > 1e9


@pytest.mark.parametrize("spoil", ["half", "list", "version", "nic", "mode"])
def test_what_makes_no_sense_is_passed_over(tmp_path: Path, spoil: str) -> None:
    expected.put(tmp_path, expected.told("web1", [COMING]))
    expected.put(tmp_path, expected.told("web2", [COMING]))
    path = expected.place(tmp_path, "web1")
    text = path.read_text()
    data = json.loads(text)
    match spoil:
        case "half":
            path.write_text(text[:40])
        case "list":
            path.write_text("[]")
        case "version":
            path.write_text(json.dumps(data | {"version": 99, "nics": [{"new": 1}]}))
        case "nic":
            path.write_text(json.dumps(data | {"nics": [{"new": 1}]}))
        case _:
            path.chmod(0o666)
    assert [one.instance for one in expected.found(tmp_path) if one.nics] == ["web2"]


# --- what a guest answers for -----------------------------------------------------------------------------


def test_a_guest_has_answered_when_it_has_for_each_address() -> None:
    answers = Answers(DUAL)
    for frame, sent in ((bytes(12) + b"\x80\x35" + bytes(46), 1.0), (arp("192.0.2.8"), 2.0)):
        answers.take(frame, sent)
        assert not answers.complete
    answers.take(na("2001:db8::8"), 3.0)
    assert answers.complete
    assert answers.whole
    assert answers.first == ("RARP", 1.0)


def test_other_addresses_and_other_macs_do_not_count() -> None:
    answers = Answers(DUAL)
    for frame in (arp("192.0.2.9"), arp("192.0.2.8", OTHER), na("2001:db8::9")):
        answers.take(frame, 1.0)
    assert answers.given == set()


def test_nobody_can_be_asked_for_a_prefix() -> None:
    answers = Answers(replace(ROUTED, ip=nets("192.0.2.8", "198.51.100.0/29")))
    answers.take(arp("192.0.2.8"), 1.0)
    assert (answers.complete, answers.whole) == (True, False)
    answers = Answers(replace(ROUTED, ip=nets("198.51.100.0/29")))
    answers.take(arp("192.0.2.8"), 1.0)
    assert not answers.complete
