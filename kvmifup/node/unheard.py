"""What changes without a word from the kernel: proxy neighbours and most sysctls. One dump, and small reads."""

from __future__ import annotations

from collections.abc import Sequence

from kvmifup.core.ops import Op, ProxyNeighbour, Sysctl
from kvmifup.node.messages import NTF_PROXY
from kvmifup.node.netlink import Netlink
from kvmifup.node.procfs import sysctl

IN_NETCONF = frozenset({"forwarding", "rp_filter", "proxy_arp", "proxy_ndp"})  # RTM_NEWNETCONF tells of these sysctls


def is_unheard(op: Op) -> bool:
    """Whether the kernel tells nobody when the value of *op* changes, so that one has to look."""
    return isinstance(op, ProxyNeighbour) or (isinstance(op, Sysctl) and op.name not in IN_NETCONF)


def untrue(asked: Sequence[tuple[str, Op]]) -> set[str]:
    """The names of those ops *asked* for, all of which are `is_unheard`, that are not true now. Raises NetlinkError."""
    netlink = Netlink()
    try:
        uplinks = {op.dev for _, op in asked if isinstance(op, ProxyNeighbour)}
        proxies = netlink.neighbours(NTF_PROXY).keys() if uplinks else set()
        indices = {dev: netlink.index(dev) or 0 for dev in uplinks}
    finally:
        netlink.close()
    values: dict[str, str | None] = {}
    found = set()
    for name, op in asked:
        if isinstance(op, ProxyNeighbour):
            true = (indices[op.dev], op.address) in proxies
        elif isinstance(op, Sysctl):
            path = op.path
            if path not in values:
                values[path] = sysctl(path)
            true = values[path] == op.want
        if not true:
            found.add(name)
    return found
