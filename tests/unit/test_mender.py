"""How often the same thing is put right."""

from __future__ import annotations

import pytest

from kvmifup.agent.mender import Breakages

ROUTE, RULE = ("route", "192.0.2.8"), ("rule", 4)


def test_the_first_few_times_are_at_once_then_less_and_less_often() -> None:
    breakages = Breakages()
    now, waits = 1000.0, []
    for _ in range(14):
        waits.append(breakages.wait("tap0", [ROUTE], now))
        now += max(waits[-1], 0.1)
        breakages.mended("tap0", [ROUTE], now)
    assert all(wait <= 0 for wait in waits[:4])
    assert waits[4:8] == pytest.approx([2, 4, 8, 16])
    assert waits[-1] == pytest.approx(300)


def test_mending_tells_how_long_it_will_be_left_alone() -> None:
    breakages = Breakages()
    assert [breakages.mended("tap0", [ROUTE], 1000.0) for _ in range(6)] == [0, 0, 0, 2, 4, 8]


def test_what_stays_whole_for_a_while_counts_from_the_beginning() -> None:
    breakages = Breakages()
    for number in range(6):
        breakages.mended("tap0", [ROUTE], 1000.0 + number)
    assert breakages.wait("tap0", [ROUTE], 1006.0) > 0
    assert breakages.mended("tap0", [ROUTE], 1100.0) == 0
    assert breakages.wait("tap0", [ROUTE], 1100.0) <= 0


def test_something_else_and_another_tap_are_not_held_back() -> None:
    breakages = Breakages()
    for _ in range(6):
        breakages.mended("tap0", [ROUTE], 1000.0)
    assert breakages.wait("tap0", [ROUTE], 1000.0) > 0
    assert breakages.wait("tap0", [ROUTE, RULE], 1000.0) <= 0
    assert breakages.wait("tap1", [ROUTE], 1000.0) <= 0
    breakages.forget("tap0")
    assert breakages.wait("tap0", [ROUTE], 1000.0) <= 0
