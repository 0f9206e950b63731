"""The names of routing tables, as iproute2 has them."""

from __future__ import annotations

import re
from pathlib import Path

from kvmifup.inputs import trust

# In the order in which iproute2 looks (lib/rt_names.c): the administrator's first.
BUILT_IN = {"default": 253, "main": 254, "local": 255}  # known without any file, as in lib/rt_names.c
_NUMBER = r"0x[0-9a-fA-F]+|0|[1-9][0-9]*"
PLACES = ("/etc/iproute2", "/usr/share/iproute2", "/usr/lib/iproute2")


def number(name: str, places: tuple[str, ...] = PLACES) -> int | None:
    """The table that *name* stands for: a number stands for itself, an unknown name for None."""
    if name.isascii() and name.isdigit():
        return int(name)
    for place in places:
        for file in (Path(place, "rt_tables"), *trust.listed(Path(place, "rt_tables.d"), ".conf")):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                trust.need_answer(error)
                continue
            for line in text.splitlines():
                fields = line.split("#", 1)[0].split()
                if len(fields) >= 2 and fields[1] == name and re.fullmatch(_NUMBER, fields[0]):
                    return int(fields[0], 0)
    return BUILT_IN.get(name)
