"""The pictures say what was measured, and what a reader must know of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import by_hand, hook, results, summary
from bench import filter as filter_
from lab import demo, plot
from lab.cases import CASES, Result
from lab.observe import Gap
from tests.docs.pages import ROOT, readme
from tests.ganeti import demo as ganeti_demo

ARRIVED = 10.0


def picture(name: str) -> str:
    """The text of a picture in docs/."""
    return (ROOT / f"docs/{name}.svg").read_text(encoding="utf-8")


def result(*silence: Gap) -> Result:
    return Result(CASES[0], 8.0, ARRIVED, 60.0, silence, 0.0, 0, (), (), (), ())


def test_the_difference_is_of_all_parts_together() -> None:
    split = result((9.95, 10.05), (10.05, 10.2))
    assert round(split.silence_ms) == 250
    assert round(split.difference_ms) == 190
    assert plot.silence(split) == "250 ms in 2 parts"
    assert plot.silence(result((9.95, 10.05))) == "100 ms"
    assert " 250 ms in 2 parts |" in demo.table([split])


def test_the_picture_of_hooks_says_the_best_and_the_worst_case() -> None:
    times = {hook.GANETI: [10.0], hook.SHELL: [20.0], hook.BATCHES: [5.0], hook.AGENT: [8.0], hook.ALONE: [90.0]}
    rows = {f"{kind}: {who}": values for kind in hook.GANETIS for who, values in times.items()}
    rows |= {f"routed: {hook.ALONE}": [50.0], f"bridged: {hook.AGENT}": [1.0, 12.0, 99.0], hook.BARE: [4.0]}
    rows["bridged with a VLAN: " + hook.AGENT] = [15.0]  # Ganeti's script has nothing to compare it to
    assert hook.title(rows).endswith(" 0.8 to 1.2 times as long as Ganeti's own script with the agent, 5 to 9 without")
    assert hook.note(rows).splitlines() == [
        f"2 to 3.8 times as long as {hook.BARE} with the agent, 12 to 22 without",
        f"0.4 to 0.6 times as long as {hook.SHELL} with the agent, 2.5 to 4.5 without",
        f"1.6 to 2.4 times as long as {hook.BATCHES} with the agent, 10 to 18 without",
        "bridged with a VLAN: 1.25 times as long as without, with the agent",
    ]


def test_the_picture_of_hooks_in_docs_says_both() -> None:
    ours, alone = (
        rf"[\d.]+ to [\d.]+ {what}" for what in ("times as long as Ganeti's own script with the agent", "without")
    )
    title = f"A hook takes {ours}, {alone}"
    assert re.search(title, picture("bench-hook"))


def test_the_readme_quotes_the_ratios_of_the_pictures() -> None:
    text = readme("The agent").text
    assert [line for line in summary.lines(ROOT / "docs") if line not in text] == []
    measured = text[text.index("Measured with") : text.index("All that it needs to know")]
    assert not re.search(r"\d (ms|s|MB)\b", measured)


def test_commands_in_batches_are_the_same_commands_in_the_same_order() -> None:
    found = [
        ["ip", "link", "set", "dev", "a", "up"],
        ["sysctl", "-w", "net/a=1"],
        ["sysctl", "-w", "net/b=2"],
        ["ip", "-6", "route", "add", "2001:db8::1", "dev", "a"],
        ["ip", "-6", "route", "add", "2001:db8::2", "dev", "a"],
        ["bridge", "link", "show", "dev", "a"],
        ["ovs-vsctl", "--may-exist", "add-port", "b", "a b"],
    ]
    assert by_hand.in_batches(found) == [
        *("ip -batch - <<'END'", "link set dev a up", "END"),
        "sysctl -w net/a=1 net/b=2",
        *("ip -6 -batch - <<'END'", "route add 2001:db8::1 dev a", "route add 2001:db8::2 dev a", "END"),
        *("bridge -batch - <<'END'", "link show dev a", "END"),
        "ovs-vsctl --may-exist add-port b 'a b'",
    ]
    assert by_hand.one_by_one(found)[-1] == "ovs-vsctl --may-exist add-port b 'a b'"


def test_two_runs_are_compared_by_their_medians(tmp_path: Path) -> None:
    one, other = tmp_path / "before.json", tmp_path / "after.json"
    results.write(one, {"hook: a": [1.0, 2.0, 9.0], "hook: gone": [1.0]})
    results.write(other, {"hook: a": [1.0], "hook: new": [1.0]})
    heading, line, *rest = results.comparison(one, other).splitlines()
    assert heading.split() == ["before", "after", "ratio"]
    assert line.split() == ["hook:", "a", "2.00", "1.00", "0.50"]
    assert rest == [f"only in {one}: hook: gone", f"only in {other}: hook: new"]


def test_the_picture_of_filters_shows_every_kind_with_one_nic_and_with_many() -> None:
    text = picture("bench-filter")
    assert [label for label in filter_.labels() if f">{label}<" not in text] == []


@pytest.mark.parametrize("name", ["migration", "frames"])
def test_the_pictures_show_every_case(name: str) -> None:
    assert [case.title for case in CASES if f">{case.title}<" not in picture(name)] == []


def test_the_picture_of_ganeti_shows_every_case() -> None:
    text = picture("ganeti")
    assert [case.title for case in ganeti_demo.CASES if f">{case.title}<" not in text] == []
    assert "answers ARP" not in text  # which nobody has looked at


@pytest.mark.parametrize("name", ["migration", "frames", "bench-migration", "ganeti"])
def test_emulated_cpus_are_marked(name: str) -> None:
    assert "emulated CPUs" in picture(name)


@pytest.mark.parametrize("name", ["migration", "frames"])
def test_the_coloured_areas_are_explained_in_the_picture(name: str) -> None:
    assert plot.SILENT.lower() in picture(name)
    assert ">client without reply<" in picture(name)


def test_the_frames_are_drawn_with_what_their_coloured_areas_are(tmp_path: Path) -> None:
    png, svg = plot.save_frames([result((ARRIVED - 0.01, ARRIVED + 0.05))], tmp_path)
    assert ">client without reply<" in svg.read_text(encoding="utf-8")
    assert png.stat().st_size > 0


def test_what_happens_two_seconds_before_is_explained_in_the_picture() -> None:
    assert "QEMU holds the guest up" in picture("migration")


def test_the_table_in_the_readme_is_the_picture() -> None:
    drawn = re.findall(r"guest down (.+?)  ·  no reply for (.+?)  ·  (one|TWO) node", picture("migration"))
    rows = re.findall(r"^\| (?!case|-)[^|]+ \| (.+?) \| (.+?) \| (.+?) \|$", readme("What the phases do").text, re.M)
    assert [(down, silent, nodes.strip("*").split()[0].lower()) for down, silent, nodes in rows] == [
        (down, silent, nodes.lower()) for down, silent, nodes in drawn
    ]
