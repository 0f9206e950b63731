"""TOML as data. tomli is loaded when there is some to read: a hook that finds all in its environment needs none."""

from __future__ import annotations

from typing import Any


def loads(text: str) -> dict[str, Any]:
    """What the TOML *text* says. Raises ValueError for what is none, and RecursionError."""
    import tomli

    return tomli.loads(text)
