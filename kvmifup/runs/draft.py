"""A journal that is written, but is not yet the one that counts."""

from __future__ import annotations

import os
from collections.abc import Hashable, Set
from contextlib import suppress

from kvmifup.core.records import record
from kvmifup.runs.index import Stamp, stamp_of
from kvmifup.runs.journal import Journal

ARMED = "armed"  # the directory of those that wait for a guest


@record
class Draft:
    """A journal that is written into *file*, with its text and its *stamp*, but is not yet the one that counts.

    *names*: those by which the index finds it, so that nobody need find them when it is put in its place.
    """

    journal: Journal
    names: Set[Hashable]
    text: str
    file: str
    stamp: Stamp

    def is_there(self) -> bool:
        """Whether the file still is as it was written."""
        with suppress(OSError):
            return stamp_of(os.lstat(self.file)) == self.stamp
        return False
