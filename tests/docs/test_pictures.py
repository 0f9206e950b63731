"""The pictures say what was measured, and what a reader must know of it."""

from __future__ import annotations

import re

import pytest

from bench import hook
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


def test_the_picture_of_hooks_says_how_long_they_take_without_the_agent() -> None:
    times = {hook.GANETI: [10.0], hook.AGENT: [8.0], hook.ALONE: [90.0]}
    rows = {f"{kind}: {who}": values for kind in hook.KINDS for who, values in times.items()}
    rows[f"routed: {hook.ALONE}"] = [50.0]
    assert hook.title(rows).endswith(": 0.8 to 0.8 with the agent, 5 to 9 without")


def test_the_picture_of_hooks_in_docs_says_both() -> None:
    title = r"A hook's time, in times of Ganeti's own script: [\d.]+ to [\d.]+ with the agent, [\d.]+ to [\d.]+ without"
    assert re.search(title, picture("bench-hook"))


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


def test_what_happens_two_seconds_before_is_explained_in_the_picture() -> None:
    assert "QEMU holds the guest up" in picture("migration")


def test_the_table_in_the_readme_is_the_picture() -> None:
    drawn = re.findall(r"guest down (.+?)  ·  no reply for (.+?)  ·  (one|TWO) node", picture("migration"))
    rows = re.findall(r"^\| (?!case|-)[^|]+ \| (.+?) \| (.+?) \| (.+?) \|$", readme("What the phases do").text, re.M)
    assert [(down, silent, nodes.strip("*").split()[0].lower()) for down, silent, nodes in rows] == [
        (down, silent, nodes.lower()) for down, silent, nodes in drawn
    ]
