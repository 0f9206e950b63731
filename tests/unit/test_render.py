"""What people and programs get to read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmifup.core.errors import BugError, NotReadyError
from kvmifup.core.model import Phase
from kvmifup.core.ops import (
    KINDS,
    RTPROT_STATIC,
    AddrGenMode,
    Announce,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Op,
    OvsPort,
    Route,
    Rule,
)
from kvmifup.core.text import printable
from kvmifup.runs.apply import Change
from kvmifup.runs.outcome import Outcome
from kvmifup.tell import render

from .samples import BRIDGED
from .strategies import journalled_ops

MTU = Change(LinkMtu("tap0", 9000), 1500, True)
UP = Change(LinkUp("tap0", True), True, False)
STALE = Change(Rule(4, "tap0", 100, 5, RTPROT_STATIC, False), True, True)
ANNOUNCE = Announce((("eth0", "192.0.2.8", "192.0.2.8"),), False)
OUTCOME = Outcome(BRIDGED.label, BRIDGED, "tap0", Phase.PRE, (STALE,), (MTU, UP), ("it rains",))
NOTHING = Outcome("tap1", None, "tap1", Phase.DOWN)


def test_the_plan() -> None:
    assert list(render.plan_lines([OUTCOME, NOTHING])) == [
        "web1.example.com/0 (tap0): bridged, pre",
        "  undo   rule v4 5: iif tap0 lookup 100: present -> absent",
        "  do     tap0 MTU: 1500 -> 9000",
        "  right  tap0 state: up",
        "tap1: down",
        "  nothing to do",
    ]


def test_verbose() -> None:
    assert list(render.verbose_lines([OUTCOME])) == [
        "web1.example.com/0 (tap0): bridged, pre: 2 changed",
        "  rule v4 5: iif tap0 lookup 100: present -> absent",
        "  tap0 MTU: 1500 -> 9000",
        "web1.example.com/0 (tap0): it rains",
    ]


@pytest.mark.parametrize(
    ("needed", "line"),
    [(True, "announce 192.0.2.8 on eth0"), (False, "announce 192.0.2.8 on eth0 (only after a change)")],
)
def test_an_announcement(needed: bool, line: str) -> None:
    assert render.transition(Change(ANNOUNCE, None, needed)) == line


@pytest.mark.parametrize(
    ("op", "line"),
    [
        (AddrGenMode("tap0", 1), "tap0 addrgenmode: none"),
        (AddrGenMode("tap0", 9), "tap0 addrgenmode: 9"),
        (LinkMaster("tap0", None), "tap0 bridge: none"),
        (LinkUp("tap0", False), "tap0 state: down"),
        (OvsPort("tap0", None), "Open vSwitch port tap0: absent"),
        (Route("192.0.2.8/32", "tap0", 254, False), "route 192.0.2.8/32 dev tap0 table 254: absent"),
        (
            Rule(4, "tap0", 100, 5, 3, True),
            "rule v4 5: iif tap0 lookup 100: present",
        ),
    ],
)
def test_values_that_the_golden_plans_lack(op: Op, line: str) -> None:
    assert op.describe() == line


def test_json() -> None:
    first, second = json.loads(render.as_json([OUTCOME, NOTHING]))
    assert first == {
        "tap": "tap0",
        "instance": "web1.example.com",
        "index": 0,
        "mode": "bridged",
        "phase": "pre",
        "undone": [
            {"op": "rule", "about": "rule v4 5: iif tap0 lookup 100", "now": True, "want": False, "needed": True}
        ],
        "ops": [
            {"op": "link-mtu", "about": "tap0 MTU", "now": 1500, "want": 9000, "needed": True},
            {"op": "link-up", "about": "tap0 state", "now": True, "want": True, "needed": False},
        ],
        "remarks": ["it rains"],
    }
    assert (second["instance"], second["mode"], second["ops"]) == (None, None, [])


@given(journalled_ops)
def test_every_op_has_json(op: Op) -> None:
    outcome = Outcome("x", None, "tap0", Phase.PRE, (), (Change(op, op.wanted, False),))
    assert json.loads(render.as_json([outcome]))[0]["ops"][0]["op"] in KINDS


def test_the_error_line() -> None:
    error = NotReadyError("no such bridge: br0", hint="make it").at("web1/0 (tap0)")
    assert render.error_line("kvm-ifup-pre", error) == "kvm-ifup-pre: web1/0 (tap0): no such bridge: br0 (make it)"
    assert render.error_line("kvm-ifdown", BugError("oops")) == "kvm-ifdown: oops"
    assert render.sentence(error) == "web1/0 (tap0): no such bridge: br0 (make it)"


def test_the_error_object() -> None:
    error = NotReadyError("no such bridge: br0", hint="make it").at("web1/0 (tap0)")
    assert json.loads(render.errors_object([error])) == {
        "error": "NotReadyError",
        "code": 69,
        "where": "web1/0 (tap0)",
        "cause": "no such bridge: br0",
        "hint": "make it",
    }


# --- tables that are too wide ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "web-production-cluster-north.eu{:02}",
        "guest-of-the-team-{:02}.department.example.com",
        "{:02}-guest-of-the-team-x",
    ],
)
@pytest.mark.parametrize("size", [10, 16, 20])
def test_long_names_are_cut_so_that_they_can_be_told_apart(form: str, size: int) -> None:
    names = [form.format(number) for number in range(20)]
    cells = render.clipped(["INSTANCE", "db1", *names], size)
    assert cells[:2] == ["INSTANCE", "db1"]
    assert len(set(cells)) == len(cells)
    assert max(map(len, cells)) <= size
    assert all(".." in cell and cell[:2] == name[:2] for cell, name in zip(cells[2:], names, strict=True))


def test_what_can_be_told_apart_by_its_beginning_keeps_that() -> None:
    assert render.clipped(["averylongbridge", "br0"], 10) == ["averylon..", "br0"]
    assert render.clipped(["192.0.2.8 2001:db8::8", "192.0.2.9"], 12) == ["192.0.2.8 ..", "192.0.2.9"]


@given(st.lists(st.text("ab.", min_size=1, max_size=30), min_size=1, max_size=6), st.integers(2, 12))
def test_a_cell_is_never_longer_than_its_column(column: list[str], size: int) -> None:
    assert all(len(cell) <= size for cell in render.clipped(column, size))


@pytest.mark.parametrize("width", range(10, 60))
def test_what_is_left_out_leaves_its_room_to_names(width: int) -> None:
    rows = [["NAME", "NUMBER", "STATE"], ["a" * 30, "7" * 10, "yes"]]
    table = render.table(rows, width, {"NAME": 8}, ("NUMBER",))
    lines = [render.GAP.join(row) for row in table]
    assert {len(line) for line in lines} == {min(max(width, 11), 49)}  # 11: the headings of what cannot be left out


any_text = st.text(st.characters()) | st.text("\n\r\t\x1b\x85\u2028\u202e\udcffé", max_size=10)


@given(any_text, any_text, any_text)
def test_an_error_is_one_printable_line(cause: str, hint: str, where: str) -> None:
    line = render.error_line("kvm-ifup", NotReadyError(cause, hint=hint, where=where))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode("utf-8")  # as a terminal or a log needs it


def test_printable_leaves_readable_text_alone() -> None:
    assert printable("tap0: où? (192.0.2.8)") == "tap0: où? (192.0.2.8)"
    assert printable("a\nb\x1b[2J\udcff") == "a\\nb\\x1b[2J\\udcff"
