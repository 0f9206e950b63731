"""TOML as data. tomli is loaded when there is some to read: a hook that finds all in its environment needs none."""

from __future__ import annotations

import re
from typing import Any

# A line that says nothing, but may begin a table. (TOML allows no control characters in a comment, except tabs.)
LINE = r"[ \t]*(?:\[([A-Za-z0-9_-]+)\][ \t]*)?(?:#[^\x00-\x08\n-\x1f\x7f]*)?"


def loads(text: str) -> dict[str, Any]:
    """What the TOML *text* says. Raises ValueError for what is none, and RecursionError."""
    found = tables(text)
    if found is not None:
        return found
    import tomli

    return tomli.loads(text)


def tables(text: str) -> dict[str, Any] | None:
    """The tables of *text* if all of them are empty, as in the configuration that is installed; None if not.

    To load tomli and to have it read that takes a tenth of a hook that no agent runs.
    """
    found: dict[str, Any] = {}
    for line in text.split("\n"):
        one = re.fullmatch(LINE, line)
        if one is None or one[1] in found:  # a table may be there once
            return None
        if one[1]:
            found[one[1]] = {}
    return found
