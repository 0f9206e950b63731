"""What changes without a word from the kernel: proxy neighbours and most sysctls. One dump, and small reads."""

from __future__ import annotations

from collections.abc import Collection

from kvmifup.core.ops import Op, ProxyNeighbour, Sysctl
from kvmifup.node.messages import NTF_PROXY
from kvmifup.node.netlink import Netlink
from kvmifup.node.procfs import sysctl

IN_NETCONF = frozenset({"forwarding", "rp_filter", "proxy_arp", "proxy_ndp"})  # RTM_NEWNETCONF tells of these sysctls


def is_unheard(op: Op) -> bool:
    """Whether the kernel tells nobody when the value of *op* changes, so that one has to look."""
    return isinstance(op, ProxyNeighbour) or (isinstance(op, Sysctl) and op.name not in IN_NETCONF)


def untrue(ops: Collection[Op]) -> set[Op]:
    """Those of *ops*, all of which are `is_unheard`, that are not true now. Raises NetlinkError."""
    netlink = Netlink()
    try:
        proxies = netlink.neighbours(NTF_PROXY) if any(isinstance(op, ProxyNeighbour) for op in ops) else {}
        indices = {op.dev: netlink.index(op.dev) or 0 for op in ops if isinstance(op, ProxyNeighbour)}
    finally:
        netlink.close()
    found = set()
    for op in ops:
        if isinstance(op, ProxyNeighbour):
            true = (indices[op.dev], op.address) in proxies
        else:
            true = not isinstance(op, Sysctl) or sysctl(op.path) == op.want
        if not true:
            found.add(op)
    return found
