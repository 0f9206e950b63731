"""nftables' own trace of what one tap's guest sends, as long as somebody looks.

The rules that ask for it are in tables of their own that belong to our socket (NFT_TABLE_F_OWNER): the kernel removes
them when the socket is closed, also when we are killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kvmifup.core.errors import NotReadyError
from kvmifup.inputs import devices
from kvmifup.node import programs
from kvmifup.node.nfmessages import (
    NFPROTO_BRIDGE,
    NFPROTO_INET,
    NFT_MSG_NEWTABLE,
    NFT_TABLE_F_OWNER,
    NFTA_TABLE_FLAGS,
    big,
    create,
    device_key,
    expression,
    made_rule,
    valued,
)
from kvmifup.node.nfnetlink import Nftables
from kvmifup.node.refusals import refusals
from kvmifup.node.source_rules import IIFNAME, base_chain, compare, meta

FIRST = -1000  # before every other rule
NFTRACE = 12  # NFT_META_NFTRACE
CHAIN = "prerouting"


@contextmanager
def traced(tap: str) -> Iterator[Iterator[str]]:
    """What nft says of each packet that comes in on *tap*, line by line; "" from time to time while it says nothing.

    Raises NotReadyError if there is no such device, KernelError, PrivilegeError, and ProgramError without nft.
    """
    if devices.index_of(tap) is None:
        raise NotReadyError(f"no such device: {tap}", hint="`kvm-ifup show` has the taps of guests")
    name = f"kvm-ifup-trace-{os.getpid()}"
    with ExitStack() as stack:
        lines = stack.enter_context(programs.following(("nft", "monitor", "trace")))
        for family in (NFPROTO_INET, NFPROTO_BRIDGE):
            table = Nftables(family, name)
            stack.callback(table.close)
            on = expression("immediate", big(1, 1) + valued(2, b"\1"))
            on += expression("meta", big(2, NFTRACE) + big(3, 1))
            with refusals(f"tracing {tap}"):
                table.change(
                    [
                        create(NFT_MSG_NEWTABLE, big(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER)),
                        base_chain(CHAIN, FIRST),
                        made_rule(CHAIN, meta(IIFNAME) + compare(device_key(tap)) + on),
                    ]
                )
        yield lines
