"""What Ganeti's tags say of a NIC: "kvm-ifup:isolated:true", on the guest or on the network of the NIC."""

from __future__ import annotations

from collections.abc import Iterable

from kvmifup.core.errors import NicError
from kvmifup.core.ops import PORT_OPTIONS
from kvmifup.core.text import shown
from kvmifup.inputs.values import nearest

OURS = "kvm-ifup:"  # how a tag begins that is for us; Ganeti allows no "=" in one (VALID_TAG_RE in lib/objects.py)
MODES = ("bridged", "ext")  # a guest's tags are those of all its NICs: on others they mean nothing
SAID = {"true": True, "false": False}


def options(mode: str, *tags: Iterable[str]) -> dict[str, bool]:
    """The options of a bridge port that *tags* say, those of the guest before those of the network.

    None for a NIC of another *mode*. Raises NicError for a tag that begins like one of ours, and is none.
    """
    found: dict[str, bool] = {}
    for some in tags if mode in MODES else ():
        said: dict[str, bool] = {}
        for tag in some:
            if tag.startswith(OURS):
                option, _, value = tag.removeprefix(OURS).partition(":")
                if option not in PORT_OPTIONS:
                    raise NicError(f"unknown tag {shown(tag)}", hint=nearest(option, tuple(PORT_OPTIONS)))
                if value not in SAID or said.get(option, SAID[value]) != SAID[value]:
                    raise NicError(f"tag {shown(tag)}: {option} must be true or false", hint=f"{OURS}{option}:true")
                said[option] = SAID[value]
        found = said | found
    return found
