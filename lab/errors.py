"""The one error the lab raises: what went wrong, and what to do about it."""

from __future__ import annotations


class LabError(Exception):
    """Something could not be built, started or measured; `str()` is one sentence and a hint."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what} ({hint})")
        self.what = what
        self.hint = hint
