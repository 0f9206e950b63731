"""A port of a Linux bridge as text, as the journal has it: "BRIDGE VLANS NAME=VALUE up".

"br0", "br0 .100:200 isolated=1 up": the bridge; the VLANs, as in `kvmifup.core.vlans`; options (`NEW`), in order; and
whether the device is up. What a text leaves out, it does not say.
"""

from __future__ import annotations

from collections.abc import Mapping

# The kernel's numbers for a new port (new_nbp in net/bridge/br_if.c), by `bridge`'s names, multicast_router apart.
NEW = {
    "isolated": 0,
    "hairpin": 0,
    "learning": 1,
    "multicast_router": 1,
    "guard": 0,
    "root_block": 0,
    "fastleave": 0,
    "flood": 1,
    "mcast_flood": 1,
    "bcast_flood": 1,
    "mcast_to_unicast": 0,
    "neigh_suppress": 0,
    "locked": 0,
}
UP = "up"


def text_of(bridge: str, vlans: str = "", options: Mapping[str, int] | None = None, *, up: bool = False) -> str:
    """The text that says just this."""
    said = (f"{name}={value}" for name, value in sorted((options or {}).items()))
    return " ".join((bridge, *([vlans] if vlans else ()), *said, *([UP] if up else ())))


def bridge_of(text: str) -> str:
    """The bridge."""
    return text.partition(" ")[0]


def vlans_of(text: str) -> str:
    """The VLANs; empty if they are not said."""
    return next((word for word in text.split(" ")[1:] if "=" not in word and word != UP), "")


def options_of(text: str) -> dict[str, int]:
    """The options that are said."""
    words = (word.partition("=") for word in text.split(" ")[1:] if "=" in word)
    return {name: int(value) for name, _, value in words}


def says_up(text: str) -> bool:
    """Whether it says that the device is up."""
    return text.split(" ")[1:][-1:] == [UP]
