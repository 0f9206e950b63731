"""Limits of what goes to and from a guest: rates and sizes as tc(8) writes them, and whose word counts."""

from __future__ import annotations

import re
from collections.abc import Iterator

Limits = tuple[tuple[str, str], ...]  # keys, and what is said of them, in the order of KEYS

TO_GUEST, FROM_GUEST = DIRECTIONS = ("to_guest", "from_guest")
BURST = "_burst"  # the end of the key that has the burst of a direction
KEYS = (*DIRECTIONS, *(f"{direction}{BURST}" for direction in DIRECTIONS))
OFF = "off"  # no limit, whatever comes later on the ladder

# As tc/tc_util.c has them. A bare number is bits a second, and a size in bytes; a size has steps of 1024 alone.
RATES: dict[str, float] = {
    **{"": 1, "bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12},
    **{"kibit": 2**10, "mibit": 2**20, "gibit": 2**30, "tibit": 2**40},
    **{"bps": 8, "kbps": 8 * 10**3, "mbps": 8 * 10**6, "gbps": 8 * 10**9, "tbps": 8 * 10**12},
    **{"kibps": 8 * 2**10, "mibps": 8 * 2**20, "gibps": 8 * 2**30, "tibps": 8 * 2**40},
}
SIZES: dict[str, float] = {
    **{"": 1, "b": 1, "k": 2**10, "kb": 2**10, "m": 2**20, "mb": 2**20, "g": 2**30, "gb": 2**30},
    **{"kbit": 2**10 / 8, "mbit": 2**20 / 8, "gbit": 2**30 / 8},
}
# Bits a second. With less, a burst would last longer than the kernel's 32 bits can say; tc's layouts have the most.
LEAST_RATE, MOST_RATE = 8_000, 32_000_000_000
LEAST_BURST, MOST_BURST = 2_000, 2**28  # bytes

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([A-Za-z]*)"


def rate(text: str) -> int:
    """*text* in bits a second, whole bytes: the kernel counts bytes. Raises ValueError."""
    return _within(LEAST_RATE, int(_value(text, RATES)) // 8 * 8, MOST_RATE)


def size(text: str) -> int:
    """*text* in bytes. Raises ValueError."""
    return _within(LEAST_BURST, int(_value(text, SIZES)), MOST_BURST)


def _value(text: str, units: dict[str, float]) -> float:
    found = re.fullmatch(_NUMBER, text)
    if not found or found[2].lower() not in units:
        raise ValueError
    return float(found[1]) * units[found[2].lower()]


def _within(least: int, value: int, most: int) -> int:
    if not least <= value <= most:
        raise ValueError
    return value


def rate_text(bits: int) -> str:
    """A rate as people write it: "100mbit"."""
    return _text(bits, ((10**9, "gbit"), (10**6, "mbit"), (10**3, "kbit"), (1, "bit")))


def size_text(count: int) -> str:
    """A size as people write it: "64kb"."""
    return _text(count, ((2**20, "mb"), (2**10, "kb"), (1, "b")))


def _text(value: int, units: tuple[tuple[int, str], ...]) -> str:
    return next(f"{value // step}{unit}" for step, unit in units if value % step == 0)


def first_said(*ladder: Limits | None) -> Limits:
    """What counts of *ladder*: each direction as the first one says that says anything of it, with its burst."""
    found = {key: value for direction in DIRECTIONS for key, value in _of(direction, ladder)}
    return tuple((key, found[key]) for key in KEYS if key in found)


def _of(direction: str, ladder: tuple[Limits | None, ...]) -> Iterator[tuple[str, str]]:
    said = next((one for one in map(dict, (limits or () for limits in ladder)) if direction in one), {})
    yield from ((key, said[key]) for key in (direction, direction + BURST) if key in said)
