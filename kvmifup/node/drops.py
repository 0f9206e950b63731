"""How many packets of each guest our tables of nftables have dropped, and why."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from kvmifup.core.filters import REASONS
from kvmifup.node.messages import attributes, text
from kvmifup.node.nfmessages import (
    NETLINK_NETFILTER,
    NFGENMSG,
    NFPROTO_BRIDGE,
    NFPROTO_INET,
    NFT_MSG_GETSETELEM,
    NFTA_COUNTER_PACKETS,
    NFTA_EXPR_DATA,
    NFTA_SET_ELEM_EXPR,
    NFTA_SET_ELEM_EXPRESSIONS,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_TABLE,
    Element,
    big_of,
    keys_of,
    listed,
    named,
)
from kvmifup.node.nfnetlink import Nftables, kind
from kvmifup.node.nft import TABLE
from kvmifup.node.repeated import Repeated

Counts = Mapping[str, Mapping[str, int]]  # packets, by tap and reason
# Each reason has a set `dropped_REASON` of taps, whose elements count, in the tables that know the reason.
FAMILIES = {NFPROTO_BRIDGE: REASONS, NFPROTO_INET: ("address",)}


def counted() -> Counts:
    """What has been dropped so far, of each guest of which something was; nothing where that cannot be read."""
    return looked()[0]


def looked() -> tuple[Counts, bool]:
    """The same; and whether all could be read."""
    found: dict[str, dict[str, int]] = {}
    whole = True
    for family, reasons in FAMILIES.items():
        table = Nftables(family, TABLE)
        try:
            for reason in reasons if table.itself() is not None else ():
                for element in table.elements(f"dropped_{reason}"):
                    tap = text(keys_of(element)[0]) or ""
                    if packets := packets_of(element):
                        of_tap = found.setdefault(tap, {})
                        of_tap[reason] = of_tap.get(reason, 0) + packets
        except OSError:
            whole = False
        table.close()
    return found, whole


class Counting:
    """Counts again and again, for the agent. Not for two threads at once.

    The kernel tells nobody that something is dropped, and a guest of which nothing is has elements, too. So what the
    sets say is only taken apart if it is not what they said the last time.
    """

    def __init__(self) -> None:
        self._dumps = Repeated(NETLINK_NETFILTER)
        self._seen: int | None = None  # of what was counted
        self._counts: Counts = {}
        self.size = 0  # bytes that the sets took at the last time

    def close(self) -> None:
        """Close the socket."""
        self._dumps.close()

    def counted(self) -> Counts:
        """As the function of that name; the same object while nothing has changed."""
        dumps = tuple(map(self._dump, FAMILIES))
        self.size, seen = sum(map(len, dumps)), hash(dumps)
        if seen != self._seen:
            self._counts, whole = looked()  # which is no older than what was seen
            self._seen = seen if whole else None
        return self._counts

    def _dump(self, family: int) -> bytes:
        """What all the sets of the table of *family* say; nothing after one that cannot be read."""
        table = NFGENMSG.pack(family, 0, 0) + named(NFTA_TABLE, TABLE)
        found = b""
        with suppress(OSError):
            for reason in FAMILIES[family]:
                found += self._dumps.dump(
                    kind(NFT_MSG_GETSETELEM), table + named(NFTA_SET_ELEM_LIST_SET, f"dropped_{reason}")
                )
        return found


def packets_of(element: Element) -> int:
    """What the counter of *element* has counted; a newer kernel lists it among several expressions."""
    one = element.get(NFTA_SET_ELEM_EXPR) or next(listed(element.get(NFTA_SET_ELEM_EXPRESSIONS, b"")), b"")
    return big_of(attributes(attributes(one).get(NFTA_EXPR_DATA, b"")).get(NFTA_COUNTER_PACKETS))


def since(earlier: Counts, now: Counts) -> Counts:
    """What was dropped between two looks."""
    found = {tap: grown(earlier.get(tap, {}), reasons) for tap, reasons in now.items()}
    return {tap: more for tap, more in found.items() if more}


def grown(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """By how much the counts of one guest have grown, by reason; what was counted anew meanwhile counts whole."""
    more = {why: n - before.get(why, 0) if n >= before.get(why, 0) else n for why, n in now.items()}
    return {why: n for why, n in more.items() if n}
