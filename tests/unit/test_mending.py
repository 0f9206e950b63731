"""How many NICs the agent looks at in one go: a share of them, and never very many."""

from __future__ import annotations

import pytest

from kvmifup.agent.mending import A_TURN, MOST, SHARE, TURNS, share


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
