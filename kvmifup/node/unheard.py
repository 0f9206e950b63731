"""What changes without a word from the kernel: proxy neighbours and most sysctls. One dump, and small reads.

Of neighbours the kernel tells, but not of proxy entries (`neigh_add` and `neigh_delete` in net/core/neighbour.c); of
sysctls it tells those few that routing daemons want to know (RTM_NEWNETCONF).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence

from kvmifup.core.ops import Op, ProxyNeighbour, Sysctl
from kvmifup.node.messages import BODY, NDA_DST, NDMSG, NTF_PROXY, RTM_GETNEIGH, address_of, attributes
from kvmifup.node.netlink import Netlink, spec
from kvmifup.node.procfs import sysctl
from kvmifup.node.refusals import forgiven
from kvmifup.node.repeated import Repeated
from kvmifup.node.settings import Settings, named, settings_of
from kvmifup.node.transport import split

IN_NETCONF = frozenset({"forwarding", "rp_filter", "proxy_arp", "proxy_ndp"})  # RTM_NEWNETCONF tells of these sysctls
PROXIES = NDMSG.pack(0, 0, 0, NTF_PROXY, 0)  # of both families, on all devices

Asked = Sequence[tuple[str, tuple[Op, ...]]]  # ops that are to be true, all of which are `is_unheard`; by name of a tap


def is_unheard(op: Op) -> bool:
    """Whether the kernel tells nobody when the value of *op* changes, so that one has to look."""
    return isinstance(op, ProxyNeighbour) or (isinstance(op, Sysctl) and op.name not in IN_NETCONF)


class Unheard:
    """Looks whether what is asked for is true now. Not for two threads at once.

    There may be thousands of proxy neighbours. While the dump of all of them is the same as at the last look, and the
    question, too, so is the answer.
    """

    def __init__(self) -> None:
        self._dumps = Repeated(socket.NETLINK_ROUTE)
        self._asked: Asked = ()
        self._uplinks: tuple[str, ...] = ()  # of the proxy neighbours that are asked for
        self._settings: tuple[str, ...] = ()  # the sysctls, each once
        self._seen: object = None  # of what the answer was found
        self._untrue: frozenset[str] = frozenset()

    def close(self) -> None:
        """Close the socket."""
        self._dumps.close()

    def untrue(self, asked: Asked) -> tuple[frozenset[str], int]:
        """The names of which something that is *asked* for is not true; and how many ops had to be compared for that.

        It may name one of which all is true, if there were other changes meanwhile. Who asks the same, asks with the
        same object. Raises NetlinkError, and other OSErrors.
        """
        if asked is not self._asked:
            ops = [op for _, every in asked for op in every]
            self._uplinks = tuple(sorted({op.dev for op in ops if isinstance(op, ProxyNeighbour)}))
            self._settings = tuple(sorted({op.path for op in ops if isinstance(op, Sysctl)}))
            self._asked, self._seen = asked, None
        dump = self._dumps.dump(RTM_GETNEIGH, PROXIES) if self._uplinks else b""
        indices, values = indices_of(self._uplinks), {path: sysctl(path) for path in self._settings}
        # 64 bits with a key of this process's own, so nobody can make another dump that has the same.
        seen = hash(dump), indices, values
        if seen == self._seen:
            return self._untrue, 0
        proxies = proxies_in(dump)

        def is_true(op: Op) -> bool:
            if isinstance(op, ProxyNeighbour):
                return (indices[op.dev], op.address) in proxies
            return not isinstance(op, Sysctl) or values[op.path] == op.want

        self._untrue = frozenset(name for name, every in asked if not all(map(is_true, every)))
        self._seen = seen
        return self._untrue, sum(len(every) for _, every in asked)


def differing(asked: Iterable[tuple[str, tuple[Sysctl, ...]]]) -> set[str]:
    """The taps of which one of the sysctls that are *asked* for is not as it is to be. Raises OSError.

    One request for each tap, and small reads for what is not in the answer to it.
    """
    netlink = Netlink()
    try:
        return {tap for tap, ops in asked if ops and not all_true(ops, settings_at(tap, netlink))}
    finally:
        netlink.close()


def settings_at(dev: str, netlink: Netlink) -> Settings | None:
    """The settings of *dev*; None if there is no such device."""
    with forgiven(errno.ENODEV):
        return settings_of(spec(dev, netlink.transport))
    return None


def all_true(ops: Iterable[Sysctl], settings: Settings | None) -> bool:
    """Whether all *ops*, which are about the device that has these *settings*, are true."""
    if settings is None:
        return False
    for op in ops:
        value = named(settings, f"ipv{op.family}", op.name) if op.group == "conf" else None
        if (sysctl(op.path) if value is None else value) != op.want:
            return False
    return True


def indices_of(devices: Iterable[str]) -> dict[str, int]:
    """The indices of *devices*, 0 for one that is not there. Raises OSError."""
    netlink = Netlink()
    try:
        return {dev: netlink.index(dev) or 0 for dev in devices}
    finally:
        netlink.close()


def proxies_in(dump: bytes) -> set[tuple[int, str]]:
    """Index and address of each entry that a *dump* of neighbours tells of."""
    found = set()
    for message in split(dump):
        index = NDMSG.unpack_from(message, BODY)[1]
        found.add((index, address_of(attributes(message, BODY + NDMSG.size).get(NDA_DST, b""))))
    return found
