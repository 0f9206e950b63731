"""Which taps rely on what: a change on the node is about few of them, and nobody should look through thousands."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvmifup.agent.events import Thing
from kvmifup.core.finder import Finder


class Reliance:
    """Taps, by name, and the things that each relies on."""

    def __init__(self) -> None:
        self._things: dict[str, Collection[Thing]] = {}
        self._taps: Finder[Thing, str] = Finder()

    def note(self, tap: str, things: Collection[Thing]) -> None:
        """From now on *tap* relies on *things*, and nothing else."""
        self.forget(tap)
        self._things[tap] = things
        for thing in things:
            self._taps.add(thing, tap)

    def forget(self, tap: str) -> None:
        """*tap* relies on nothing any more."""
        for thing in self._things.pop(tap, ()):
            self._taps.remove(thing, tap)

    def on(self, things: Iterable[Thing]) -> set[str]:
        """The taps that rely on one of *things*."""
        return {tap for thing in things for tap in self._taps.by(thing)}
