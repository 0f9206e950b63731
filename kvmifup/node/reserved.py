"""Addresses that no guest can have: the node's own, its default gateways', and those that are a network's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, ip_address

from kvmifup.core.errors import VanishedError
from kvmifup.core.model import Prefix
from kvmifup.node import standing
from kvmifup.node.messages import FAMILIES
from kvmifup.node.procfs import device_name
from kvmifup.node.refusals import refusals
from kvmifup.node.view import View

LINK_LOCAL = "fe80:"  # never a guest's: `kvmifup.inputs.values` refuses it


@dataclass(frozen=True)
class Reserved:
    """An address, as a number, of *family*, and what it is. *alone*: a prefix may have it inside."""

    family: int
    number: int
    address: str
    what: str
    alone: bool = False


def why_not(prefix: Prefix, view: View) -> str | None:
    """Why *prefix* cannot be a guest's; None if nothing here keeps it from being one. Raises KernelError."""
    first, last = int(prefix.network_address), int(prefix.broadcast_address)
    for one in reserved(prefix.version, view):
        if first <= one.number <= last and one.family == prefix.version:
            if first == last:
                return f"is {one.what}"
            if not one.alone:
                return f"covers {one.address}, {one.what}"
    return None


def reserved(family: int, view: View) -> tuple[Reserved, ...]:
    """What is reserved here, of *family*, 4 or 6; read once until *view* is refreshed."""
    if family not in view.reserved:
        with refusals("reading addresses"):
            view.reserved[family] = (*of_devices(family, view), *gateways(family, view))
    found: tuple[Reserved, ...] = view.reserved[family]
    return found


def of_devices(family: int, view: View) -> Iterator[Reserved]:
    """The node's own addresses, also on devices that are down, and what their IPv4 networks reserve."""
    for _, text in standing.own_addresses(FAMILIES[family], view.netlink):
        address = text.partition("/")[0]
        if address.startswith(LINK_LOCAL):
            continue
        yield Reserved(family, int(ip_address(address)), address, "this node's own address")
        if family == 4:
            network = IPv4Interface(text).network
            if network.prefixlen < 31:  # RFC 3021: a network of two has neither
                last, first = network.broadcast_address, network.network_address
                yield Reserved(4, int(last), str(last), f"the broadcast address of {network} here")
                yield Reserved(4, int(first), str(first), f"the address of the network {network} here", alone=True)


def gateways(family: int, view: View) -> Iterator[Reserved]:
    """The gateways of the default routes in every table. A gateway behind a tap is a guest, and may be this one.

    An IPv4 route may have one of IPv6 (`via inet6`).
    """
    for version in (4, 6) if family == 6 else (4,):
        for hop in view.default_hops(version, standing.EVERY_TABLE):
            if hop.gateway and (":" in hop.gateway) == (family == 6) and not behind_a_tap(hop.index, view):
                what = f"the gateway of a default route on {device_name(hop.index)}"
                yield Reserved(family, int(ip_address(hop.gateway)), hop.gateway, what)


def behind_a_tap(index: int, view: View) -> bool:
    """Whether the device *index* is a tap."""
    try:
        return view.link(device_name(index)).is_tap
    except VanishedError:
        return False
