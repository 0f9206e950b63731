"""The whole node at once: one dump of each kind, however many NICs are asked about."""

from __future__ import annotations

import errno
import ipaddress
import os

from kvmifup.core.model import LOCAL_TABLE, MAIN_TABLE, Prefix, Uplink
from kvmifup.core.ops import Route, Rule
from kvmifup.node import messages, ovs
from kvmifup.node.foreign_rules import rule_of
from kvmifup.node.kernel import Kernel
from kvmifup.node.messages import FAMILIES, Link
from kvmifup.node.procfs import content, device_name, link_local, sysctl, sysfs_of
from kvmifup.node.refusals import refusal, refusals

# --- the whole node at once -----------------------------------------------------------------------------


class Overview(Kernel):
    """The node as it was at the first look: one dump of each kind, however many NICs are asked about.

    For reading only; nothing that happens later is noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        with refusals("reading devices"):
            self._links = self._netlink.links()
        self._named: dict[int, dict[str, list[bytes]]] = {}
        self._prefixes: dict[tuple[int, int], dict[tuple[bytes, int], list[bytes]]] = {}
        self._neighbours: dict[int, dict[tuple[int, str], tuple[int, str | None]]] = {}
        self._defaults: dict[tuple[int, int], tuple[str, ...]] = {}
        self._seen: dict[tuple[str, int], Uplink] = {}
        self._switch: tuple[frozenset[str], dict[str, str]] | None = None

    def refresh(self) -> None:
        """Nothing: it is one look."""

    def ifindex(self, dev: str) -> int | None:
        """The index of *dev*, None if there is no such device."""
        return self._links[dev].index if dev in self._links else None

    def _link(self, name: str) -> Link:
        if name not in self._links:
            raise refusal(f"reading {name}", errno.ENODEV)
        return self._links[name]

    def _rules_of(self, family: int, iif: str) -> list[Rule]:
        if family not in self._named:
            with refusals("reading policy rules"):
                self._named[family] = self._netlink.rules_by_iif(FAMILIES[family])
        return [rule_of(message, family, iif) for message in self._named[family].get(iif, ())]

    def _routes_to(self, prefix: Prefix, table: int) -> list[messages.RouteEntry]:
        key = (prefix.version, table)
        if key not in self._prefixes:
            self._prefixes[key] = messages.by_prefix(self._routes_of(*key))
        same = self._prefixes[key].get((prefix.network_address.packed, prefix.prefixlen), [])
        return messages.routes_to(prefix, same)

    def _routes_here(self, op: Route) -> list[messages.RouteEntry]:
        index = self._index(op.dev)
        return [route for route in self._routes_to(ipaddress.ip_network(op.prefix), op.table) if route.oif == index]

    def _route_type(self, family: int, address: str) -> int:
        # Without a question for each address: what the node itself has is in the table local.
        return next((route.type for route in self._routes_to(ipaddress.ip_network(address), LOCAL_TABLE)), 0)

    def _default_devices(self, family: int, table: int) -> tuple[str, ...]:
        if (family, table) not in self._defaults:
            self._defaults[family, table] = super()._default_devices(family, table)
        return self._defaults[family, table]

    def _uplink(self, name: str, family: int) -> Uplink:
        if (name, family) not in self._seen:
            self._seen[name, family] = super()._uplink(name, family)
        return self._seen[name, family]

    def _neighbour(self, dev: str, address: str, flags: int) -> tuple[int, str | None] | None:
        if flags not in self._neighbours:
            with refusals("reading neighbours"):
                self._neighbours[flags] = self._netlink.neighbours(flags)
        return self._neighbours[flags].get((self._index(dev), address))

    def _ovs(self) -> tuple[frozenset[str], dict[str, str]]:
        self._switch = self._switch or ovs.everything()
        return self._switch

    def _is_ovs_bridge(self, name: str) -> bool:
        return name in self._ovs()[0]

    def _ovs_port(self, name: str) -> str | None:
        return self._ovs()[1].get(name)

    # --- what only people ask -----------------------------------------------------------------------------

    def setting(self, path: str) -> str | None:
        """The value of a sysctl, None when there is no such."""
        return sysctl(path)

    def gateway(self, family: int, dev: str) -> str | None:
        """The next hop of a default route out of *dev* in main: somebody who sends from there."""
        return messages.gateway(self._routes_of(family, MAIN_TABLE), self._index(dev))

    def addresses(self, dev: str) -> list[str]:
        """The addresses of this node's own on *dev*: IPv4, and IPv6 of link scope."""
        found = messages.local_addresses(self._routes_of(4, LOCAL_TABLE), self._index(dev))
        return [*found, *filter(None, [link_local(dev)])]

    def way(self, source: str, destination: str, iif: str) -> str | None:
        """The device out of which a packet would go that comes in on *iif*, None if it would be dropped there.

        Dropped because *source* is not to be expected there (reverse path filter); KernelError for any other reason.
        """
        with refusals(f"reading the route to {destination}"):
            index = self._netlink.way(source, destination, self._index(iif))
        return None if index is None else device_name(index)

    def vlans(self, bridge: str) -> tuple[bool, int]:
        """Whether *bridge* filters VLANs, and in which VLAN it puts new ports, 0 for none."""
        sysfs = sysfs_of(bridge, self._link(bridge))
        if sysfs is None or not os.access(f"{sysfs}/bridge/vlan_filtering", os.R_OK):
            return False, 0
        return content(f"{sysfs}/bridge/vlan_filtering") == "1", int(content(f"{sysfs}/bridge/default_pvid") or 0)
