"""Which taps rely on what: a change on the node is about few of them, and nobody should look through thousands."""

from __future__ import annotations

from collections.abc import Iterable

from kvmifup.agent.events import Thing


class Reliance:
    """Taps, by name, and the things that each relies on."""

    def __init__(self) -> None:
        self._things: dict[str, frozenset[Thing]] = {}
        # Nearly all things are one tap's alone, and a set takes four times as much memory.
        self._taps: dict[Thing, set[str] | tuple[str]] = {}

    def note(self, tap: str, things: frozenset[Thing]) -> None:
        """From now on *tap* relies on *things*, and nothing else."""
        self.forget(tap)
        self._things[tap] = things
        for thing in things:
            there = self._taps.get(thing)
            if isinstance(there, set):
                there.add(tap)
            else:
                self._taps[thing] = {*there, tap} if there else (tap,)

    def forget(self, tap: str) -> None:
        """*tap* relies on nothing any more."""
        for thing in self._things.pop(tap, ()):
            there = self._taps[thing]
            if isinstance(there, set) and len(there) > 1:
                there.discard(tap)
            else:
                del self._taps[thing]

    def on(self, things: Iterable[Thing]) -> set[str]:
        """The taps that rely on one of *things*."""
        return {tap for thing in things for tap in self._taps.get(thing, ())}
