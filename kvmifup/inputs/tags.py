"""What Ganeti's tags say of a NIC: "kvm-ifup:filter:address", on the guest or on the network of the NIC."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvmifup.core import rates
from kvmifup.core.errors import NicError
from kvmifup.core.text import listed, shown
from kvmifup.inputs.values import LADDER, nearest

OURS = "kvm-ifup:"  # how a tag begins that is for us; Ganeti allows no "=" in one (VALID_TAG_RE in lib/objects.py)
FLAGS = {"true": True, "false": False}
EXAMPLES = {"filter": "filter:address", "allow_mac": "allow_mac:00:00:5e:00:01:05", "rate": "rate:to_guest:100mbit"}


def options(mode: str, *tags: Iterable[str]) -> dict[str, Any]:
    """What *tags* say of the keys of the ladder, those of the guest before those of the network.

    A guest's tags are those of all its NICs: what means nothing in *mode* is left out. Raises NicError for a tag that
    begins like one of ours, and is none, in every mode.
    """
    said = [of_one(some) for some in tags]
    found = {key: value for one in reversed(said) for key, value in one.items()}
    if "rate" in found:
        found["rate"] = rates.first_said(*(one.get("rate") for one in said))
    return {key: value for key, value in found.items() if mode in LADDER[key][0]}


def of_one(tags: Iterable[str]) -> dict[str, Any]:
    """What the *tags* of one thing say, with the values as `Nic` has them. Raises NicError."""
    said: dict[str, dict[str, str]] = {}  # keys, and the tags about each with what they say of it
    for tag in tags:
        if tag.startswith(OURS):
            key, _, text = tag.removeprefix(OURS).replace("=", ":").partition(":")
            if key not in LADDER:
                raise NicError(f"unknown tag {shown(tag)}", hint=nearest(key, tuple(LADDER)))
            said.setdefault(key, {})[tag] = text
    found = {}
    for key, texts in said.items():
        try:
            found[key] = LADDER[key][1](key, of_texts(key, list(texts.values())))
        except NicError as error:
            hint = f"like {OURS}{EXAMPLES.get(key, f'{key}:true')}"
            raise NicError(f"tag {listed([*map(shown, texts)])}: {error}", hint=hint) from None
    return found


def of_texts(key: str, said: list[str]) -> object:
    """The value of *key*, as TOML has it, that is *said* in one text or more. Raises NicError."""
    if key == "allow_mac":
        return said
    if key == "rate":
        return one_each([text.partition(":")[::2] for text in said])
    return one_each([(key, FLAGS.get(text, text)) for text in said])[key]


def one_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """*pairs*, if none contradicts another. Raises NicError."""
    found = dict(pairs)
    for key, value in pairs:
        if found[key] != value:
            raise NicError(f"{key} is both {value} and {found[key]}")
    return found
