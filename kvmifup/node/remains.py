"""Whether our tables of nftables have something of a tap's name, whoever left it there.

Every hook asks, and most nodes have no such table. So the modules about tables are loaded only where there is one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmifup.node.messages import BODY, NetlinkError
from kvmifup.node.procfs import has_module
from kvmifup.node.refusals import refusals
from kvmifup.node.transport import TRIES, Transport, split

if TYPE_CHECKING:
    from kvmifup.node.nfnetlink import Nftables

NETLINK_NETFILTER, GETTABLE = 12, 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
EVERY_TABLE = bytes(4)  # struct nfgenmsg: of any family
TABLE = "kvm-ifup"  # `nft.TABLE`
INET, BRIDGE = 1, 7  # NFPROTO_*
LED = {BRIDGE: "guests", INET: "sources"}  # the map that leads a tap to the rules for its guest
# Nobody may ask: that can only be a plan. Or there is no nftables.
UNTOLD = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EPROTONOSUPPORT)


class Remains:
    """What is there of taps. Which tables there are is read once, until `clear`.

    *once*: so is what is in their maps, for who asks for all taps, and only looks.
    """

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self._maps: dict[int, Nftables] = {}  # by family; if it is read once
        self._transport: Transport | None = None
        self._tables: frozenset[int] | None = None  # families

    def close(self) -> None:
        """Close the socket."""
        if self._transport:
            self._transport.close()
            self._transport = None

    def clear(self) -> None:
        """Forget which tables there are."""
        self._tables = None

    def of(self, tap: str) -> tuple[bool, bool]:
        """Whether there is something of a filter of *tap*, and of its sources. Raises KernelError, PrivilegeError."""
        with refusals("reading the tables of nftables"):
            if self._tables is None:
                self._tables = self._read()
            return self._has(BRIDGE, tap), self._has(INET, tap)

    def _read(self) -> frozenset[int]:
        if not has_module("nf_tables"):  # to ask would load it
            return frozenset()
        try:
            self._transport = self._transport or Transport(NETLINK_NETFILTER)
            for _ in range(TRIES):
                parts, undisturbed = self._transport.dump_once(GETTABLE, EVERY_TABLE)
                if undisturbed:
                    break
        except OSError as error:
            if error.errno not in UNTOLD:
                raise
            return frozenset()
        return frozenset(one[BODY] for part in parts for one in split(part, TABLE.encode() + b"\0"))

    def _has(self, family: int, tap: str) -> bool:
        if not self._tables or family not in self._tables or not self._transport:
            return False
        from kvmifup.node.nfmessages import device_key, keyed
        from kvmifup.node.nfnetlink import Nftables, ReadOnce

        table = self._maps.get(family) or (ReadOnce if self._once else Nftables)(family, TABLE, self._transport)
        if self._once:
            self._maps[family] = table
        try:
            return table.element(LED[family], keyed(device_key(tap))) is not None
        except NetlinkError as error:
            if error.errno != errno.EINVAL:  # a map of somebody else, that has other keys
                raise
            return False
