"""Finds names by keys: a few of thousands, without a look at all of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Name = TypeVar("Name", bound=Hashable)


class Finder(Generic[Key, Name]):
    """Names, each by several keys. Not for two threads at once."""

    def __init__(self) -> None:
        # Nearly all keys are those of one name alone, and something for each would take more memory than all the rest.
        self._names: dict[Key, Name | dict[Name, None]] = {}

    def add(self, key: Key, name: Name) -> None:
        """From now on *name* is found by *key*."""
        there = self._names.get(key, name)
        if isinstance(there, dict):
            there[name] = None
        else:
            self._names[key] = name if there == name else {there: None, name: None}

    def remove(self, key: Key, name: Name) -> None:
        """*name* is found by *key* no longer."""
        there = self._names.get(key)
        if isinstance(there, dict):
            there.pop(name, None)
        if there in ({}, name):
            del self._names[key]

    def by(self, key: Key) -> tuple[Name, ...]:
        """The names that are found by *key*, in the order in which they came."""
        there = self._names.get(key)
        if isinstance(there, dict):
            return tuple(there)
        return () if there is None else (there,)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._names)
