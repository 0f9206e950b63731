"""What the kernel reports of nftables: somebody has changed one of our tables.

Who changes other tables is not heard of. libnftables has no events, and what exactly has changed does not matter: the
planner looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvmifup.agent.events import ANYTHING, NetlinkMessage, Subscription, Thing
from kvmifup.agent.loop import Loop
from kvmifup.core.ops import Op
from kvmifup.node import messages
from kvmifup.node.nfmessages import (
    IFNAMSIZ,
    NETLINK_NETFILTER,
    NFGENMSG,
    NFNL_SUBSYS_NFTABLES,
    NFNLGRP_NFTABLES,
    NFPROTO_BRIDGE,
    NFPROTO_INET,
    NFPROTO_NETDEV,
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWSETELEM,
    NFTA_CHAIN_NAME,
    NFTA_RULE_CHAIN,
    NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_TABLE,
    keys_of,
    listed,
)
from kvmifup.node.nft import TABLE

NAME = TABLE.encode() + b"\0"
OF_A_NIC = b"nic-"  # so the name of a chain begins that is about one tap
# The tables that an op is in, by `Op.kind`.
FAMILIES = {
    "sources": (NFPROTO_INET,),
    "uplink-guard": (NFPROTO_INET,),
    "filter": (NFPROTO_BRIDGE, NFPROTO_NETDEV),
}


class RulesetEvents(Subscription):
    """Calls *changed* with what has changed in our tables: ("nft", family, device), or "" for what NICs share."""

    def __init__(self, loop: Loop, changed: Callable[[frozenset[Thing]], None]) -> None:
        def heard(found: list[NetlinkMessage]) -> None:
            if things := frozenset(touched(found)):
                changed(things)

        lost = frozenset({ANYTHING})
        super().__init__(loop, (NFNLGRP_NFTABLES,), heard, lambda: changed(lost), NETLINK_NETFILTER)


def touched(found: list[NetlinkMessage]) -> Iterator[Thing]:
    """What *found* is about, if it is about our tables."""
    for one in found:
        if one.kind >> 8 != NFNL_SUBSYS_NFTABLES or NAME not in one.body:
            continue
        attributes = messages.attributes(one.body, NFGENMSG.size)
        if attributes.get(NFTA_TABLE) != NAME:
            continue
        family = one.body[0]
        if one.kind & 0xFF in (NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM):
            for element in listed(attributes.get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")):
                key, _ = keys_of(messages.attributes(element))
                yield "nft", family, messages.text(key[:IFNAMSIZ])
        else:
            named = (attributes.get(kind, b"") for kind in (NFTA_RULE_CHAIN, NFTA_CHAIN_NAME))  # text where it is one
            names = [value for value in named if value.startswith(OF_A_NIC)]
            yield "nft", family, messages.text(names[0][len(OF_A_NIC) :]) if names else ""


def relied_on(op: Op, dev: str) -> Iterator[Thing]:
    """What *op*, which is about the device *dev*, relies on in our tables."""
    for family in FAMILIES.get(op.kind, ()):
        yield "nft", family, dev
        yield "nft", family, ""
