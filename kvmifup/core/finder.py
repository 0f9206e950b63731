"""Finds names by what they have to do with: few of thousands, without a look at all of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Finder(Generic[Key]):
    """Names, each by several keys. Not for two threads at once."""

    def __init__(self) -> None:
        # Nearly all keys are those of one name alone, and something for each would take more memory than all the rest.
        self._names: dict[Key, str | dict[str, None]] = {}

    def add(self, key: Key, name: str) -> None:
        """From now on *name* is found by *key*."""
        there = self._names.get(key, name)
        if isinstance(there, dict):
            there[name] = None
        else:
            self._names[key] = name if there == name else {there: None, name: None}

    def remove(self, key: Key, name: str) -> None:
        """*name* is found by *key* no longer."""
        there = self._names.get(key)
        if isinstance(there, dict):
            there.pop(name, None)
        if not there or there == name:
            self._names.pop(key, None)

    def by(self, key: Key) -> tuple[str, ...]:
        """The names that are found by *key*, in the order in which they came."""
        there = self._names.get(key, ())
        return (there,) if isinstance(there, str) else tuple(there)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._names)
