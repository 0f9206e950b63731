"""Sets of VLANs as text: Ganeti's notation, with ranges.

".100" is untagged, ":200" and ":300-399" are tagged. A port of a bridge can be in a VLAN in two more ways, which nobody
asks for, but which are found and put back: "~5" goes out untagged while what comes in untagged is in another VLAN, and
"!5" is where untagged frames come in, and goes out tagged. A text here has no VLAN twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

MAX_VLAN = 4094
NONE = "none"  # no VLAN at all

# Of a VLAN of a port: linux/if_bridge.h, BRIDGE_VLAN_INFO_*
PVID, UNTAGGED = 0x2, 0x4
SIGNS = {PVID | UNTAGGED: ".", 0: ":", UNTAGGED: "~", PVID: "!"}
_FLAGS = {sign: flags for flags, sign in SIGNS.items()}
_PART = r"([.:~!])([0-9]+)(?:-([0-9]+))?"


def parts(text: str) -> Iterator[tuple[str, int, int]]:
    """The parts of *text*: a sign, the first and the last VLAN."""
    for sign, first, last in re.findall(_PART, text):
        yield sign, int(first), int(last or first)


def flags_of(text: str) -> dict[int, int]:
    """The VLANs of *text*, each with how the port is in it: PVID, UNTAGGED."""
    return {vid: _FLAGS[sign] for sign, first, last in parts(text) for vid in range(first, last + 1)}


def ids(text: str) -> frozenset[int]:
    """The VLANs of *text*, however a port is in them."""
    return frozenset(vid for _, first, last in parts(text) for vid in range(first, last + 1))


def ranges(vids: Iterable[int]) -> list[tuple[int, int]]:
    """*vids* in order, as first and last of each run of neighbours."""
    found: list[tuple[int, int]] = []
    for vid in sorted(vids):
        if found and found[-1][1] == vid - 1:
            found[-1] = found[-1][0], vid
        else:
            found.append((vid, vid))
    return found


def text_of(flags: Mapping[int, int]) -> str:
    """The reverse of `flags_of`, the same for equal sets; `NONE` for none."""
    words = [
        f"{sign}{first}" if first == last else f"{sign}{first}-{last}"
        for kind, sign in SIGNS.items()
        for first, last in ranges(vid for vid, how in flags.items() if how == kind)
    ]
    return "".join(words) or NONE


def tagged(vids: Iterable[int]) -> str:
    """*vids*, all of them tagged, as text."""
    return text_of(dict.fromkeys(vids, 0))


def canonical(text: str) -> str:
    """*text* in the one way that equal sets are written."""
    return text_of(flags_of(text))
