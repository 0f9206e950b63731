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

LONGEST_BURST = 200  # seconds: the kernel counts them in 32 bits, by 64 ns
HEADERS = 22  # bytes before the packet: Ethernet, two VLAN tags
# The largest packet that the kernel hands on in one piece is 64 KiB (GSO_MAX_SIZE), and each of the frames that it
# becomes is counted with headers of its own.
LARGEST = 128 * 1024

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


# --- limits as ops have them: "100mbit burst 128kb" ---------------------------------------------------------


def limit(bits: int, burst: int) -> str:
    """The limit to *bits* a second, of which *burst* bytes may pass at once after a pause."""
    return f"{rate_text(bits)} burst {size_text(burst)}"


def is_limit(text: str) -> bool:
    """Whether *text* is one, and not what else may be there."""
    words = text.split(" ")
    return len(words) == 3 and words[1] == "burst" and bool(re.fullmatch(_NUMBER, words[0]))


def parts(text: str) -> tuple[int, int]:
    """The rate in bits a second, and the burst in bytes."""
    rate_of, _, burst = text.split(" ")
    return int(_value(rate_of, RATES)), int(_value(burst, SIZES))


def said_as_limit(direction: str, said: dict[str, str], mtu: int) -> str | None:
    """What *said* comes to on a tap with *mtu*; None for no limit. At least one frame passes at once."""
    if said.get(direction, OFF) == OFF:
        return None
    bits, burst = rate(said[direction]), said.get(direction + BURST)
    return limit(bits, max(size(burst) if burst else chosen_burst(direction, bits), mtu + HEADERS))


def chosen_burst(direction: str, bits: int) -> int:
    """A burst for a rate of *bits* a second, if nobody says one.

    To the guest: what passes in 10 ms, the longest that a kernel's clock ticks. A large packet passes in one piece if
    that lasts no longer than 100 ms: else the shaper takes it apart, so that others get their turn. From the guest:
    what passes in 50 ms, for what is dropped is sent again only after a round trip. A large packet must always fit,
    because policing does not take it apart.
    """
    per_second = bits // 8
    if direction == FROM_GUEST:
        return min(max(per_second // 20, LARGEST), MOST_BURST)
    return max(per_second // 100, min(per_second // 10, LARGEST))


def queue(bits: int, burst: int) -> int:
    """How many bytes may wait behind a shaper without a queue of its own: 50 ms, and no less than two large packets."""
    return max(bits // 8 // 20, burst, 2 * LARGEST)


# --- whose word counts --------------------------------------------------------------------------------------


def first_said(*ladder: Limits | None) -> Limits:
    """What counts of *ladder*: each direction as the first one says that says anything of it, with its burst."""
    found = {key: value for direction in DIRECTIONS for key, value in _of(direction, ladder)}
    return tuple((key, found[key]) for key in KEYS if key in found)


def _of(direction: str, ladder: tuple[Limits | None, ...]) -> Iterator[tuple[str, str]]:
    said = next((one for one in map(dict, (limits or () for limits in ladder)) if direction in one), {})
    yield from ((key, said[key]) for key in (direction, direction + BURST) if key in said)
