"""What the filter of a bridged NIC lets its guest send: the facts, and their one text.

The text is "KIND MAC,… PREFIX,…"; KIND is mac or address. It is the value of `kvmifup.core.ops.Filter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network

from kvmifup.core.records import record

Prefix = IPv4Network | IPv6Network
KEPT = 512  # results of functions that are called with the same over and over again, in the agent
REASONS = ("mac", "address", "router", "dhcp", "protocol")  # why something is dropped
BROKEN = " (not whole: "  # then what is wrong with what was found, and ")"


@record
class Facts:
    """The MACs of a guest, and with the kind "address" the *prefixes* that are its; all of it sorted, each once."""

    kind: str
    macs: tuple[str, ...]
    prefixes: tuple[Prefix, ...] = ()

    @property
    def text(self) -> str:
        """The canonical text."""
        words = (self.kind, ",".join(self.macs), ",".join(said(one) for one in self.prefixes))
        return " ".join(word for word in words if word)

    def of_family(self, version: int) -> tuple[Prefix, ...]:
        """The prefixes of IPv4 or IPv6; a family without any is closed."""
        return tuple(one for one in self.prefixes if one.version == version)

    @property
    def everything(self) -> tuple[Prefix, ...]:
        """*prefixes*, and the link-local addresses that the MACs give, if IPv6 is open."""
        extra = link_locals(self.macs) if self.of_family(6) else ()
        return (*self.prefixes, *(one for one in extra if one not in self.prefixes))


def facts(kind: str, macs: Iterable[str], prefixes: Iterable[Prefix]) -> Facts:
    """The facts in their one form: sorted, without what is in another prefix, or follows from a MAC anyway."""
    return _facts(kind, tuple(macs), tuple(prefixes))


@lru_cache(KEPT)
def _facts(kind: str, macs: tuple[str, ...], prefixes: tuple[Prefix, ...]) -> Facts:
    own = tuple(sorted(set(macs)))
    if kind != "address":
        return Facts(kind, own)
    every = sorted(set(prefixes), key=lambda one: (one.version, one.network_address.packed, one.prefixlen))
    found = [one for one in every if not any(inside(one, other) for other in every if other != one)]
    derived = link_locals(own)
    if any(one.version == 6 and one not in derived for one in found):
        found = [one for one in found if one not in derived]
    return Facts(kind, own, tuple(found))


@lru_cache(KEPT)
def parsed(text: str) -> Facts:
    """The facts in *text*, which is canonical."""
    kind, macs, prefixes = (*text.split(" "), "")[:3]
    return Facts(kind, tuple(macs.split(",")), tuple(ip_network(one) for one in prefixes.split(",") if one))


def inside(one: Prefix, other: Prefix) -> bool:
    """Whether all of *one* is in *other*."""
    if one.version != other.version or one.prefixlen < other.prefixlen:
        return False
    return int(one.network_address) & int(other.netmask) == int(other.network_address)


def said(prefix: Prefix) -> str:
    """A prefix, or the bare address."""
    return str(prefix.network_address) if prefix.prefixlen == prefix.max_prefixlen else str(prefix)


def link_locals(macs: Iterable[str]) -> tuple[IPv6Network, ...]:
    """The link-local addresses that *macs* give (RFC 4291, appendix A)."""
    found = []
    for mac in macs:
        raw = bytes.fromhex(mac.replace(":", ""))
        interface = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
        found.append(IPv6Network(IPv6Address(b"\xfe\x80" + bytes(6) + interface)))
    return tuple(found)
