"""Addresses that no guest can have: the node's own, its default gateways', and those that are a network's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Interface, ip_address, ip_network

from kvmifup.core.errors import VanishedError
from kvmifup.core.model import LOCAL_TABLE, Prefix
from kvmifup.core.records import record
from kvmifup.node import standing
from kvmifup.node.messages import FAMILIES, RTN_ANYCAST, RTN_BROADCAST, RTN_LOCAL, RTN_MULTICAST
from kvmifup.node.refusals import refusals
from kvmifup.node.routes import route_of
from kvmifup.node.view import View

LINK_LOCAL = "fe80:"  # never a guest's: `kvmifup.inputs.values` refuses it

OWN = "this node's own address"
# What an address is whose route is of this type.
KINDS = {
    RTN_LOCAL: OWN,
    RTN_BROADCAST: "a broadcast address here",
    RTN_ANYCAST: "an anycast address here",
    RTN_MULTICAST: "a multicast address here",
}


@record
class Reserved:
    """The address *network*, or all in it, which is from *first* to *last*, and what it is.

    *alone*: a prefix may have it inside.
    """

    first: int
    last: int
    network: str
    what: str
    alone: bool = False


def why_not(prefix: Prefix, view: View) -> str | None:
    """Why *prefix* cannot be a guest's; None if nothing here keeps it from being one. Raises KernelError."""
    first, last = int(prefix.network_address), int(prefix.broadcast_address)
    common = reserved(prefix.version, view)
    if first == last:
        what = what_it_is(prefix, view) or next((one.what for one in common if one.first <= first <= one.last), None)
        return what and f"is {what}"
    for one in (*common, *local(prefix.version, view)):
        if first <= one.last and one.first <= last and not one.alone:
            covers = first <= one.first and one.last <= last
            return f"{'covers' if covers else 'is within'} {one.network}, {one.what}"
    return None


def what_it_is(host: Prefix, view: View) -> str | None:
    """What the kernel takes a single address for, if not for a guest's."""
    number = int(host.network_address)
    # It knows which route comes first. A view of the whole node asks only if there is more than one.
    if view.ALONE or any(one.first <= number <= one.last for one in local(host.version, view)):
        return KINDS.get(view.route_type(host.version, str(host.network_address)))
    return None


def reserved(family: int, view: View) -> tuple[Reserved, ...]:
    """What is reserved here, of *family*, 4 or 6; read once until *view* is refreshed."""
    if (family, "") not in view.reserved:
        with refusals("reading addresses"):
            view.reserved[family, ""] = (*of_devices(family, view), *gateways(family, view))
    found: tuple[Reserved, ...] = view.reserved[family, ""]
    return found


def one_address(address: str, what: str, *, alone: bool = False) -> Reserved:
    """*address*, and nothing else."""
    number = int(ip_address(address))
    return Reserved(number, number, address, what, alone)


def local(family: int, view: View) -> tuple[Reserved, ...]:
    """What the table local has of *family*: also what is this node's own without being an address of a device.

    A node has entries for each of its devices there, so that this takes long. Read once until *view* is refreshed.
    """
    if (family, "local") not in view.reserved:
        found = {}
        for message in view.routes(family, LOCAL_TABLE):
            entry, (raw, length) = route_of(message)
            network = ip_network((raw or bytes(4 if family == 4 else 16), length))
            if entry.type in KINDS and not (network.is_link_local or network.is_multicast or network.is_loopback):
                first, last = int(network.network_address), int(network.broadcast_address)
                name = str(network) if first < last else str(network.network_address)
                found[network] = Reserved(first, last, name, KINDS[entry.type])
        view.reserved[family, "local"] = tuple(found.values())
    table: tuple[Reserved, ...] = view.reserved[family, "local"]
    return table


def of_devices(family: int, view: View) -> tuple[Reserved, ...]:
    """The node's own addresses, also on devices that are down, and what their IPv4 networks reserve."""
    return of_addresses(family, tuple(text for _, text in standing.own_addresses(FAMILIES[family], view.netlink)))


@lru_cache(maxsize=16)
def of_addresses(family: int, addresses: tuple[str, ...]) -> tuple[Reserved, ...]:
    """The same for these *addresses*, each with its prefix length. Hooks ask again and again about the same ones."""
    return tuple(one for text in addresses for one in of_address(family, text))


def of_address(family: int, text: str) -> Iterator[Reserved]:
    """The same for one of them; nothing if it is link-local."""
    address = text.partition("/")[0]
    if address.startswith(LINK_LOCAL):
        return
    yield one_address(address, OWN)
    if family == 4:
        network = IPv4Interface(text).network
        if network.prefixlen < 31:  # RFC 3021: a network of two has neither
            yield one_address(str(network.broadcast_address), f"the broadcast address of {network} here")
            yield one_address(str(network.network_address), f"the address of the network {network} here", alone=True)


def gateways(family: int, view: View) -> Iterator[Reserved]:
    """The gateways of the default routes in every table. A gateway behind a tap is a guest, and may be this one.

    An IPv4 route may have one of IPv6 (`via inet6`).
    """
    for version in (4, 6) if family == 6 else (4,):
        for hop in view.default_hops(version, standing.EVERY_TABLE):
            if not hop.gateway or (":" in hop.gateway) != (family == 6):
                continue
            dev = view.device_name(hop.index)
            if not is_tap(dev, view):
                yield one_address(hop.gateway, f"the gateway of a default route on {dev}")


def is_tap(dev: str, view: View) -> bool:
    """Whether the device *dev* is a tap; not if it has gone."""
    try:
        return view.link(dev).is_tap
    except VanishedError:
        return False
