"""Names are found by what they have to do with, and nothing is left of those that have gone."""

from __future__ import annotations

from itertools import permutations

import pytest

from kvmifup.core.finder import Finder

NAMES = ("tap0", "tap1", "tap2")


@pytest.mark.parametrize("order", [*permutations(NAMES)])
def test_names_are_found_by_their_keys_in_whatever_order_they_go(order: tuple[str, ...]) -> None:
    finder: Finder[str, str] = Finder()
    there: list[str] = []
    for name in NAMES:
        for _ in range(2):  # once more changes nothing
            finder.add("all", name)
            finder.add(name, name)
        there.append(name)
        assert finder.by("all") == tuple(there)
    for name in order:
        assert finder.by(name) == (name,)
        finder.remove("all", "another")
        for _ in range(2):
            finder.remove("all", name)
            finder.remove(name, name)
        there.remove(name)
        assert (finder.by("all"), finder.by(name)) == (tuple(there), ())
        assert len(finder) == len(there) + bool(there)
