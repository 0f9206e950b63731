"""Make text that others wrote fit for a message."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """*text* on one line, without anything that could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shown(value: object, limit: int = 80) -> str:
    """*value* quoted for a message: one line, printable ASCII, at most *limit* characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 4] + "...'"


def as_told(error: Exception, limit: int = 80) -> str:
    """The message of an error that a library raised, cut to *limit* characters."""
    text = str(error)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(words: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """*words* with commas, or what is *between* them; of more than *most* the first, and how many more there are."""
    more = len(words) - most
    return f"{between.join(words[:most])} and {more} more" if more > 0 else between.join(words)
