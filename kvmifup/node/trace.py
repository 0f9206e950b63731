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
from kvmifup.node.elements import (
    NEWCHAIN,
    NEWRULE,
    NEWTABLE,
    NFPROTO_BRIDGE,
    NFPROTO_INET,
    VALUE,
    Nfnetlink,
    big,
    create,
    nested,
    text,
)
from kvmifup.node.messages import attribute
from kvmifup.node.refusals import refusals
from kvmifup.node.source_rules import IIFNAME, NF_ACCEPT, expression, meta
from kvmifup.node.sources import name_of

FIRST = -1000  # before every other rule
NFTRACE = 12  # NFT_META_NFTRACE
OWNED = 2  # NFT_TABLE_F_OWNER, linux/netfilter/nf_tables.h
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
            table = Nfnetlink(family, name)
            stack.callback(table.close)
            hook = nested(4, big(1, 0) + big(2, FIRST))  # NF_INET_PRE_ROUTING, NF_BR_PRE_ROUTING
            one = expression("cmp", big(1, 1) + big(2, 0) + nested(3, attribute(VALUE, name_of(tap))))
            on = expression("immediate", big(1, 1) + nested(2, attribute(VALUE, b"\1")))
            on += expression("meta", big(2, NFTRACE) + big(3, 1))
            with refusals(f"tracing {tap}"):
                table.change(
                    [
                        create(NEWTABLE, big(2, OWNED)),
                        create(NEWCHAIN, text(3, CHAIN) + text(7, "filter") + big(5, NF_ACCEPT) + hook),
                        create(NEWRULE, text(2, CHAIN) + nested(4, meta(IIFNAME) + one + on)),
                    ]
                )
        yield lines
