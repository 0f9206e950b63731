"""`kvm-ifup show` and `check` on terminals and in pipes: everything fits, what is wrong stands out, no name is cut."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
import termios

import pytest

from harness import agents, hooks, manager, nodes, tools
from harness.hooks import call, check
from harness.manager import RUN_DIR
from harness.nodes import Node

NUMBER = 20
LONG = "a-rather-long-name-of-a-guest-{}.in-some-department.example.com"
HEADINGS = ["INSTANCE", "NIC", "TAP", "MODE", "LINK", "ADDRESSES", "PHASE", "SINCE", "BY", "WIRED"]
RED = "\033[31m"


class Terminal(io.StringIO):
    """A terminal to write to."""

    def isatty(self) -> bool:
        return True


def printed(*argv: str, columns: int | None = None, **environ: str) -> str:
    """What is printed on a terminal of so many columns, without colours if it is not told otherwise."""
    from kvmifup.commands import main

    out = Terminal()
    main.main("kvm-ifup", argv, {"COLUMNS": str(columns or ""), "NO_COLOR": "1", **environ}, out, io.StringIO())
    return out.getvalue()


@pytest.fixture
def crowded(uplinked: Node) -> Node:
    """Guests with long names on taps with long names; those with numbers 7 and 11 have lost their route."""
    for number in range(NUMBER):
        tap = f"tap-of-bytes-{number:02}"
        nodes.add_tap(tap)
        ips = [f"2001:db8:1234:5678:9abc:def0:1234:{number:x}", f"198.18.0.{number}"]
        manager.write_nic(tap, LONG.format(number), 1000 + number, mode="routed", link="100", ip=ips)
        check(call("kvm-ifup-post", tap), 0)
    for family in ("-4", "-6"):
        tools.ip(f"{family} rule add iif eth0 lookup 100")
    for number in (7, 11):
        tools.ip(f"route del 198.18.0.{number} table 100")
    return uplinked


# --- show ----------------------------------------------------------------------------------------------------


def test_a_pipe_gets_every_name_whole(crowded: Node) -> None:
    headings, *rows = call("kvm-ifup", "show").out.splitlines()
    rows, below = rows[:NUMBER], rows[NUMBER:]
    assert headings.split() == HEADINGS
    assert len(below) == 2  # what is wrong
    for number, row in enumerate(sorted(rows, key=lambda row: int(row.split()[1]))):
        assert row.split()[:5] == [
            LONG.format(number),
            str(1000 + number),
            f"tap-of-bytes-{number:02}",
            "routed",
            "100",
        ]
        assert f"2001:db8:1234:5678:9abc:def0:1234:{number:x} +1" in row.replace(":0 +1", ":0 +1")
        assert ".." not in row
    listed = call("kvm-ifup", "nic", "list").out
    assert all(LONG.format(number) in listed for number in range(NUMBER))


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 200])
def test_a_terminal_gets_what_fits_and_always_who_and_whether(crowded: Node, columns: int) -> None:
    headings, *rows = printed("show", columns=columns).splitlines()[: 1 + NUMBER]
    assert max(map(len, (headings, *rows))) <= columns
    named = headings.split()
    assert {"INSTANCE", "TAP", "PHASE", "WIRED"} <= set(named)
    assert named == [heading for heading in HEADINGS if heading in named]
    assert named == HEADINGS or columns < 120
    assert [row.split()[-1] for row in rows].count("NO") == 2
    assert all(row.split()[named.index("TAP")].startswith("tap-of-bytes-") for row in rows)
    assert len({row.split()[0] for row in rows}) == NUMBER or columns < 80  # each guest can be told from the others


@pytest.mark.parametrize("columns", [80, 100])
def test_nic_list_fits_a_terminal_too(crowded: Node, columns: int) -> None:
    assert max(map(len, printed("nic", "list", columns=columns).splitlines())) <= columns


def test_short_names_need_no_hundred_columns(uplinked: Node) -> None:
    nodes.add_bridge()
    nodes.add_tap("tap0")
    manager.write_nic("tap0", "web1", mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    assert printed("show", columns=80) == call("kvm-ifup", "show").out
    assert printed("show", columns=80).splitlines()[0].split() == HEADINGS


@pytest.mark.parametrize("through", ["the agent", "itself"])
@pytest.mark.parametrize("columns", [80, 100])
def test_the_width_is_that_of_the_real_terminal(crowded: Node, columns: int, through: str) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with agents.running():
        more = [] if through == "the agent" else [f"--run-dir={RUN_DIR}"]
        process = hooks.start("kvm-ifup", "show", LONG.format(3), *more, stdout=theirs)
        assert process.wait(tools.PATIENCE) == 0
    text = re.sub("\033\\[[0-9]*m", "", os.read(ours, 10000).decode())
    os.close(ours)
    os.close(theirs)
    assert columns - 12 < max(map(len, text.splitlines())) <= columns


def test_what_is_wrong_is_red_as_a_whole_and_in_capitals(crowded: Node) -> None:
    rows = printed("show", columns=100, NO_COLOR="").splitlines()[1:]
    assert sum(row.startswith(f"\033[1m{RED}") for row in rows) == sum("NO" in row for row in rows) == 2
    assert sum("\033[32myes" in row for row in rows) == NUMBER - 2
    for environ in ({"NO_COLOR": "1"}, {"NO_COLOR": "", "TERM": "dumb"}):
        assert "\033" not in printed("show", columns=100, **environ)


def test_only_those_that_are_wrong(crowded: Node) -> None:
    rows = call("kvm-ifup", "show", "--wrong").out.splitlines()[1:3]
    assert [row.split()[0] for row in rows] == [LONG.format(11), LONG.format(7)]
    as_json = json.loads(call("kvm-ifup", "show", "--wrong", "--json").out)
    assert [one["wired"] for one in as_json] == [False, False]
    assert call("kvm-ifup", "show", "--wrong", LONG.format(3)).out == "nothing is wrong with 1 NIC\n"
    check(call("kvm-ifup", "check", "--repair"), 0)
    assert call("kvm-ifup", "show", "--wrong").out == f"nothing is wrong with {NUMBER} NICs\n"


def test_what_is_wrong_in_other_ways_counts_too(crowded: Node) -> None:
    (RUN_DIR / "nic" / LONG.format(1) / "0.toml").write_text("tap = 1")  # a file that cannot be read
    tools.ip("link del tap-of-bytes-02")
    nodes.add_tap("tap77")
    manager.write_nic("tap77", "nobody", mode="routed", ip=["198.18.7.7"])  # its tap is there, but not wired
    rows = [row.split() for row in call("kvm-ifup", "show", "--wrong").out.splitlines()[1:6]]
    assert all(row[-1] == "NO" for row in rows)
    assert {row[0] for row in rows} == {
        f"nic/{LONG.format(1)}/0.toml", LONG.format(2), LONG.format(7), LONG.format(11), "nobody",
    }  # fmt: skip


def test_a_line_below_the_table_for_each_that_is_wrong_names_it_once(crowded: Node) -> None:
    tools.ip("link del tap-of-bytes-02")
    (RUN_DIR / "nic" / LONG.format(1) / "0.toml").write_text("tap = 1")
    below = call("kvm-ifup", "show").out.splitlines()[1 + NUMBER + 1 :]
    named = [f"{LONG.format(number)}/{1000 + number}" for number in (11, 2, 7)]
    (file, *others) = sorted(below, key=lambda line: not line.startswith("/"))
    assert file.startswith(f"{RUN_DIR}/nic/{LONG.format(1)}/")
    assert [line.count(name) for line, name in zip(others, named, strict=True)] == [1, 1, 1]
    assert others[0].endswith("absent -> present (`kvm-ifup check tap-of-bytes-11` says why)")
    assert "its tap is gone" in others[1]


# --- check ---------------------------------------------------------------------------------------------------


def test_check_has_what_is_wrong_first_and_one_count_of_the_rest(crowded: Node) -> None:
    result = call("kvm-ifup", "check")
    lines = result.out.splitlines()
    assert result.code == 1
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.partition("/")[0] for head in heads[:-1]] == [LONG.format(11), LONG.format(7)]
    assert heads[-1] == lines[-1] == f"{NUMBER - 2} right, 2 wrong; `kvm-ifup check --repair` repeats the hook"
    every = [line for line in call("kvm-ifup", "check", "-v").out.splitlines() if not line.startswith(" ")]
    assert [line.endswith(": wrong") for line in every[:-1]] == [True, True] + [False] * (NUMBER - 2)
    assert sum(line.endswith(": right") for line in every) == NUMBER - 2


def test_check_of_one(crowded: Node) -> None:
    right = call("kvm-ifup", "check", "tap-of-bytes-03").out
    assert right.endswith(": right\n")
    assert right.count("\n") == 1
    last = call("kvm-ifup", "check", LONG.format(7)).out.splitlines()[-1]
    assert last == f"0 right, 1 wrong; `kvm-ifup check {LONG.format(7)} --repair` repeats the hook"


def test_after_a_repair_its_nics_are_named_and_the_rest_is_counted(crowded: Node) -> None:
    result = call("kvm-ifup", "check", "--repair")
    lines = result.out.splitlines()
    assert result.code == 0
    assert sum(line.startswith("repaired: ") and " route " in line for line in lines) == 2
    told = [line for line in lines if not line.startswith("repaired: ")]
    assert [line.rpartition(": ")[2] for line in told] == ["right", "right", f"{NUMBER} right, 0 wrong"]
    assert call("kvm-ifup", "check").out == f"{NUMBER} right, 0 wrong\n"


def test_what_no_hook_mends_is_not_promised(crowded: Node) -> None:
    tools.ip("link del tap-of-bytes-02")
    last = call("kvm-ifup", "check").out.splitlines()[-1]
    assert last == f"{NUMBER - 3} right, 3 wrong; `kvm-ifup check --repair` repeats the hook for 2 of them"
    assert call("kvm-ifup", "check", LONG.format(2)).out.splitlines()[-1] == "0 right, 1 wrong"


def test_what_has_to_be_done_before_a_repair_is_not_called_a_repair(uplinked: Node) -> None:
    nodes.add_bridge()
    nodes.add_tap("tap0")
    manager.write_nic("tap0", "web1", mode="bridged", link="br0")
    check(call("kvm-ifup-post", "tap0"), 0)
    manager.write_nic("tap0", "web1", mode="bridged", link="br9")
    last = call("kvm-ifup", "check").out.splitlines()[-1]
    assert last == '0 right, 1 wrong; do what "mend" says, then `kvm-ifup check --repair`'
    assert call("kvm-ifup", "check", "--repair").code == 1  # so it is
    nodes.add_bridge("br9")
    assert call("kvm-ifup", "check").out.splitlines()[-1].endswith("`kvm-ifup check --repair` repeats the hook")
    assert call("kvm-ifup", "check", "--repair").code == 0


def test_what_is_not_wired_yet_is_neither_right_nor_wrong(crowded: Node) -> None:
    for number in (77, 78):
        manager.write_nic(f"tap{number}", f"web{number}", mode="routed", ip=[f"198.18.7.{number}"])
    assert call("kvm-ifup", "check").out.splitlines()[-1].startswith(f"{NUMBER - 2} right, 2 wrong, 2 not wired; ")
    result = call("kvm-ifup", "check", "web77")
    assert result.code == 0
    assert result.out == "web77/0 (tap77): routed, not wired: there is no tap77; its QEMU makes it when it starts\n"
    assert json.loads(call("kvm-ifup", "check", "--json", "web77").out)["nics"][0]["wired"] is None


def test_what_is_to_be_said_of_many_is_said_once(uplinked: Node) -> None:
    nodes.add_bridge()
    nodes.add_bridge("br1")
    for number in range(6):
        nodes.add_tap(f"tap{number}")
        mac = f"aa:00:00:35:ac:0{number}"
        manager.write_nic(f"tap{number}", f"web{number}", mac=mac, mode="bridged", link=f"br{number % 2}")
        check(call("kvm-ifup-post", f"tap{number}"), 0)
    out = call("kvm-ifup", "check").out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        "web0/0 (tap0) and 2 more: right", "web1/0 (tap1) and 2 more: right", "6 right, 0 wrong",
    ]  # fmt: skip
    assert out.count("has no port but guests' taps") == 2
    assert call("kvm-ifup", "check", "-v").out.count("has no port but guests' taps") == 6


def test_check_of_nothing_says_so(node: Node) -> None:
    result = call("kvm-ifup", "check")
    assert (result.code, result.out) == (0, f"nothing to check: there is no journal and no NIC file in {RUN_DIR}\n")


def test_check_of_the_node_has_what_is_wrong_first(crowded: Node) -> None:
    tools.ip("link set eth0 down")
    found = json.loads(call("kvm-ifup", "check", "--node", "--json").out)["findings"]
    lines = call("kvm-ifup", "check", "--node").out.splitlines()
    said = [line.strip() for line in lines if re.match(r"  \S", line)]
    assert said == [one["what"] for one in sorted(found, key=lambda one: not one["wrong"])]
