"""Text of others, made fit for a message."""

from __future__ import annotations


def printable(text: str) -> str:
    """*text* on one line, without anything that could steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shown(value: object, limit: int = 80) -> str:
    """*value* quoted for a message: one line, printable ASCII, at most *limit* characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 4] + "...'"


def as_told(error: Exception, limit: int = 80) -> str:
    """What a parser of somebody else's says, cut to *limit* characters."""
    text = str(error)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
