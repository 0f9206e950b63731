"""How many NICs the agent looks at in one go: a share of them, and never very many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmifup.agent.announcements import Announcements
from kvmifup.agent.loop import Loop
from kvmifup.agent.mending import A_TURN, MOST, PUT_OFF, SHARE, TURNS, Mending, share
from kvmifup.agent.runner import Runner


class NoTaps:
    """A node without NICs, which counts how often somebody looks for those that are due."""

    def __init__(self) -> None:
        self.looks = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def names(self) -> list[str]:
        """Of none."""
        return []

    def named(self, _names: object) -> list[Any]:
        """None of them."""
        self.looks += 1
        return []


def test_a_look_is_put_off_only_so_often(loop: Loop, tmp_path: Path) -> None:
    taps = NoTaps()
    runner = Runner(tmp_path, lambda *_: True)
    watching: Any = taps
    mending = Mending(loop, runner, watching, Announcements(loop, runner), lambda _nic: None, lambda: None)
    for _ in range(2):
        for _ in range(PUT_OFF):
            mending.look(later=True)
        assert taps.looks == 0
        mending.look(later=True)
        assert taps.looks == 1
        taps.looks = 0
    mending.look(later=True)
    mending.look()
    assert taps.looks == 1
    mending.look()
    assert taps.looks == 2


@pytest.mark.parametrize(("turns", "most"), [(SHARE, MOST), (TURNS, A_TURN)])
@pytest.mark.parametrize("many", [0, 1, 2, 30, 64, 65, 2000])
def test_each_has_its_turn_and_few_have_it_together(many: int, turns: int, most: int) -> None:
    names = [f"tap{number}" for number in range(many)]
    seen: list[str] = []
    for turn in range(7, 7 + max(turns, -(-many // most))):
        found = share(names, turn, turns, most)
        assert len(found) <= most
        assert len(found) <= -(-many // turns)
        seen += found
    assert sorted(seen) == sorted(names)  # each once
