"""What changes without a word from the kernel: proxy neighbours and most sysctls. One dump, and small reads."""

from __future__ import annotations

from collections.abc import Collection

from kvmifup.core.ops import Op, ProxyNeighbour, Sysctl
from kvmifup.node.messages import NTF_PROXY
from kvmifup.node.netlink import Netlink
from kvmifup.node.procfs import sysctl


def untrue(ops: Collection[Op]) -> set[Op]:
    """Those of *ops*, which are `unheard`, that are not true now. Raises NetlinkError."""
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
