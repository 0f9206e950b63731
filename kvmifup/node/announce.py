"""Tell an uplink's neighbours where an address is now: gratuitous ARP, unsolicited NA, and questions to gateways."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from kvmifup.core.model import ASK, Message
from kvmifup.core.records import record
from kvmifup.node.frames import gratuitous_arp, unsolicited_na, who_has
from kvmifup.node.sockets import GONE, mac_of, sender

KEPT = 4096  # frames: they are sent in several rounds, and made before the first


@record
class NotSent:
    """*address* could not be announced on the uplink *dev*, for the reason *errno*."""

    dev: str
    address: str
    errno: int

    @property
    def gone(self) -> bool:
        """Whether the uplink is not there any more, so that another round makes no sense."""
        return self.errno in GONE


def send(messages: Sequence[Message]) -> list[NotSent]:
    """Announce each of *messages* once, from its uplink's MAC; returns those that could not be sent.

    Each is for itself: an uplink that is down, or whose queue is full, does not keep the others from being sent.
    """
    try:
        via = sender.socket()
    except OSError as error:
        return [NotSent(dev, address, error.errno or errno.EIO) for dev, address, _ in messages]
    lost: list[NotSent] = []
    macs: dict[str, bytes] = {}
    for dev, address, how in messages:
        try:
            if dev not in macs:
                macs[dev] = mac_of(via, dev)
            via.sendto(frame(macs[dev], address, how), (dev, 0))
        except OSError as error:
            lost.append(NotSent(dev, address, error.errno or errno.EIO))
    return lost


def make_ready(messages: Sequence[Message]) -> None:
    """Have the frames of *messages* made, as they are now, so that `send` need not make them."""
    with suppress(OSError):
        via = sender.socket()
        for dev, address, how in messages:
            frame(mac_of(via, dev), address, how)


@lru_cache(KEPT)
def frame(mac: bytes, address: str, how: str) -> bytes:
    """The frame that says that *address* is at *mac*; *how* as in `Announce`."""
    if how.startswith(ASK):
        return who_has(mac, how.removeprefix(ASK), [address])
    return unsolicited_na(mac, address, how) if ":" in address else gratuitous_arp(mac, address)


def say(lost: Sequence[NotSent]) -> str:
    """What could not be sent, and why, in one clause."""
    reasons: dict[tuple[str, int], dict[str, None]] = {}  # an address is told in more than one way
    for one in lost:
        reasons.setdefault((one.dev, one.errno), {})[one.address] = None
    return "; ".join(
        f"{and_more(tuple(addresses))} not announced on {dev}: {os.strerror(number)}"
        for (dev, number), addresses in reasons.items()
    )


def and_more(names: Sequence[str]) -> str:
    """The first of *names*, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
