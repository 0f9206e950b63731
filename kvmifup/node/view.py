"""What a run has read of the node so far: the kernel is asked again only after something may have changed."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kvmifup.core.errors import VanishedError
from kvmifup.core.model import MAIN_TABLE, Prefix, Uplink
from kvmifup.core.ops import (
    Announce,
    Filter,
    Neighbour,
    Op,
    OvsPort,
    ProxyNeighbour,
    Route,
    Rule,
    Sources,
    Sysctl,
    UplinkGuard,
    UplinkVlans,
)
from kvmifup.node import messages, nexthops, ovs, standing
from kvmifup.node.addresses import addresses, link_local
from kvmifup.node.messages import ARPHRD_ETHER, FAMILIES, IFF_NOARP, IFF_UP, Link, NetlinkError
from kvmifup.node.netlink import Netlink
from kvmifup.node.nexthops import Hop
from kvmifup.node.ovs import Switch
from kvmifup.node.ports import Ports
from kvmifup.node.procfs import assignment, device_name, has_ipv6, read_file, sysctl
from kvmifup.node.refusals import refusal, refusals
from kvmifup.node.remains import Remains
from kvmifup.node.routes import RouteEntry, by_prefix, network, route_of, routes_to

if TYPE_CHECKING:
    from kvmifup.node.filters import AllFilters
    from kvmifup.node.limits import Limits
    from kvmifup.node.sources import SourceTable

FEW = 16  # prefixes to look for in a table, until it is quicker to sort the table by them


class RoutesOut:
    """The routes out of devices, each device and table read once; who writes one notes it.

    To read them again after each of the thousands of routes that a NIC may have takes the square of that time.
    """

    def __init__(self) -> None:
        # By family, table and the index of the device; then by destination and prefix length.
        self._known: dict[tuple[int, int, int], dict[tuple[bytes, int], list[RouteEntry]]] = {}

    def clear(self) -> None:
        """Forget them."""
        self._known.clear()

    def to(self, prefix: Prefix, table: int, index: int, netlink: Netlink) -> list[RouteEntry]:
        """The routes in *table* to exactly *prefix* out of the device *index*. Raises NetlinkError."""
        key = (prefix.version, table, index)
        if key not in self._known:
            found = map(route_of, netlink.routes(FAMILIES[prefix.version], table, index))
            known: dict[tuple[bytes, int], list[RouteEntry]] = {}
            for entry, destination in found:
                if entry.oif == index:
                    known.setdefault(destination, []).append(entry)
            self._known[key] = known
        return self._known[key].get((prefix.network_address.packed, prefix.prefixlen), [])

    def known(self, prefix: Prefix, table: int, index: int) -> list[RouteEntry]:
        """The same, as far as they have been read."""
        known = self._known.get((prefix.version, table, index), {})
        return known.get((prefix.network_address.packed, prefix.prefixlen), [])

    def note(self, prefix: Prefix, table: int, index: int, routes: list[RouteEntry]) -> None:
        """Those to *prefix* are *routes* now; it matters only if they have been read."""
        known = self._known.get((prefix.version, table, index))
        if known is not None:
            known[prefix.network_address.packed, prefix.prefixlen] = routes


class View:
    """A netlink socket, what it has told since the last change, and which devices this run is about.

    What asks the kernel raises VanishedError for a device that is not there, and KernelError for any other refusal.
    """

    ALONE = 4  # prefixes for which a table is searched, until it is quicker to read it
    sysctl = staticmethod(sysctl)

    def __init__(self) -> None:
        self.netlink = Netlink()
        self._indices: dict[str, int] = {}  # of every device that was looked at; never forgotten
        self._links: dict[str, Link] = {}
        self._rules: dict[tuple[int, str], list[bytes]] = {}
        self._routes: dict[tuple[int, int], list[bytes]] = {}  # by family and table
        self._searched: dict[tuple[int, int], int] = {}  # how often, since it was read
        self._routes_by_prefix: dict[tuple[int, int], dict[tuple[bytes, int], list[bytes]]] = {}
        self.routes_out = RoutesOut()
        self._routes_to: dict[tuple[Prefix, int], list[RouteEntry]] = {}  # by prefix and table
        self._defaults: dict[int, list[bytes]] = {}  # default routes in every table, by family
        self._default_hops: dict[tuple[int, int], list[Hop]] = {}
        self._of_tables: tuple[dict[Any, Any], ...] = (
            self._routes,
            self._searched,
            self._routes_by_prefix,
            self._routes_to,
            self._defaults,
            self._default_hops,
        )
        self._uplinks: dict[tuple[str, int], Uplink] = {}
        self.ports = Ports(self.netlink)
        self.limits: Limits | None = None  # `limits_of`
        self._switch: Switch | None = None
        self.sources: SourceTable | None = None  # `sources_of`
        self.filters: AllFilters | None = None  # `kernel.filters_seen`
        self.remains = Remains()
        # What is asked for every NIC, and what a `WholeView` asks for once.
        self.read_file: Callable[[str], str | None] = read_file
        self.device_name: Callable[[int], str] = device_name
        self.has_ipv6: Callable[[], bool] = has_ipv6
        self.has_switch: Callable[[], bool] = ovs.is_there
        self.reserved: dict[tuple[int, str], Any] = {}  # by family, and where it is from: `kvmifup.node.reserved`

    def close(self) -> None:
        """Close the sockets."""
        self.netlink.close()
        self.remains.close()
        if self.sources:
            self.sources.close()

    def refresh(self) -> None:
        """Forget what was read, because something may have changed."""
        self._links.clear()
        self._rules.clear()
        self._uplinks.clear()
        self.ports.clear()
        if self.limits:
            self.limits.clear()
        self._switch = None
        self.remains.clear()
        if self.sources:
            self.sources.clear()
        self.reserved.clear()
        for known in self._of_tables:
            known.clear()
        self.routes_out.clear()

    def forget(self, op: Op) -> None:
        """Forget what writing *op* may have changed. Changing a link can change anything."""
        match op:
            case Neighbour() | ProxyNeighbour() | Filter() | Announce() | Sources() | UplinkGuard():
                pass
            case Rule():
                self._rules.clear()
            case UplinkVlans():
                self.ports.clear()
            case Route():  # those out of its device are kept right by who writes them
                for known in self._of_tables:
                    known.clear()
            case Sysctl():  # turning IPv6 forwarding on removes routes: rt6_purge_dflt_routers
                for known in self._of_tables:
                    known.clear()
                self.routes_out.clear()
            case OvsPort():
                self.refresh()
            case _:
                # The switch's database and nftables say the same as before.
                switch, right = self._switch, self.sources and self.sources.right
                self.refresh()
                self._switch = switch
                if self.sources:
                    self.sources.right = right or None

    # --- devices ------------------------------------------------------------------------------------------

    def ifindex(self, dev: str) -> int | None:
        """The index that *dev* has now, None if there is no such device."""
        return self.netlink.index(dev)

    def index(self, dev: str) -> int:
        """The index that *dev* has now. Raises VanishedError, also if it is not the device any more that it was."""
        index = self.ifindex(dev)
        if index is None:
            raise refusal(f"reading {dev}", errno.ENODEV)
        self._check_same(dev, index)
        return index

    def link(self, dev: str) -> Link:
        """The device *dev*. Raises VanishedError, also if it is not the device any more that it was."""
        if dev not in self._links:
            with refusals(f"reading {dev}"):
                link = self.netlink.link(dev)
            self._check_same(dev, link.index)
            self._links[dev] = link
        return self._links[dev]

    def _check_same(self, dev: str, index: int) -> None:
        """Raise VanishedError if *dev* has become another device, which can happen at any moment.

        What this run has read and wants to write is not about that one.
        """
        if self._indices.setdefault(dev, index) != index:
            raise VanishedError(f"{dev} is another device now", errno=errno.ENODEV)

    def addresses(self, dev: str) -> tuple[str, ...]:
        """The IPv6 addresses of *dev*, with their prefix lengths."""
        index = self.index(dev)
        with refusals(f"reading the addresses of {dev}"):
            return tuple(address for _, address in addresses(self.netlink.transport, socket.AF_INET6, index))

    def uplink(self, dev: str, family: int) -> Uplink:
        """The uplink *dev* for *family*, 4 or 6; also if there is no such device."""
        if (dev, family) not in self._uplinks:
            self._uplinks[dev, family] = read_uplink(self, dev, family)
        return self._uplinks[dev, family]

    # --- rules, routes, neighbours ------------------------------------------------------------------------

    def rules(self, family: int, iif: str) -> list[Rule]:
        """The policy rules of *family*, 4 or 6, that say `iif IIF lookup TABLE` and nothing more."""
        found = map(messages.plain_rule, self.rule_messages(family, iif))
        return [Rule(family, iif, *plain, want=True) for plain in found if plain]

    def rule_messages(self, family: int, iif: str) -> list[bytes]:
        """Every policy rule of *family*, 4 or 6, that names the incoming device *iif*, as whole messages, in order."""
        if (family, iif) not in self._rules:
            with refusals("reading policy rules"):
                self._rules[family, iif] = standing.rules(FAMILIES[family], iif, self.netlink)
        return self._rules[family, iif]

    def routes(self, family: int, table: int) -> list[bytes]:
        """Every route of *family*, 4 or 6, in *table*, as whole messages."""
        if (family, table) not in self._routes:
            with refusals(f"reading table {table}"):
                self._routes[family, table] = self.netlink.routes(FAMILIES[family], table)
        return self._routes[family, table]

    def routes_to(self, prefix: Prefix, table: int) -> list[RouteEntry]:
        """The routes in *table* to exactly *prefix*."""
        if (prefix, table) in self._routes_to:
            return self._routes_to[prefix, table]
        key, raw = (prefix.version, table), prefix.network_address.packed
        if self.ALONE and key not in self._routes and (only := self._routes_out_of_one(prefix, table)) is not None:
            self._routes_to[prefix, table] = only
            return only
        self._searched[key] = self._searched.get(key, 0) + 1
        if key not in self._routes and self._searched[key] <= self.ALONE:
            with refusals(f"reading table {table}"):
                routes = self.netlink.routes(FAMILIES[prefix.version], table, wanted=raw)
        else:
            routes = self.routes(*key)
        if self._searched[key] > FEW:
            if key not in self._routes_by_prefix:
                self._routes_by_prefix[key] = by_prefix(routes)
            routes = self._routes_by_prefix[key].get((raw, prefix.prefixlen), [])
        found = self._routes_to[prefix, table] = routes_to(prefix, routes)
        return found

    def _routes_out_of_one(self, prefix: Prefix, table: int) -> list[RouteEntry] | None:
        """As `routes_to`, if it is known that all of them lead out of one device at most; else None."""
        to = (prefix.network_address.packed, prefix.prefixlen)
        with refusals(f"reading table {table}"):
            devices = standing.leading(FAMILIES[prefix.version], table, to, self.netlink)
            if devices is None or len(devices) > 1 or standing.ELSEWHERE in devices:
                return None
            try:
                return [one for index in devices for one in self.routes_out.to(prefix, table, index, self.netlink)]
            except NetlinkError as error:
                if error.errno != errno.ENODEV:  # and with a device go its routes
                    raise
                return []

    def routes_of(self, op: Route) -> list[RouteEntry]:
        """The routes that *op* is about: to its prefix, out of its device.

        If nobody has searched the table for it yet, the kernel is asked only for the routes out of that device.
        """
        prefix, index = network(op.prefix), self.index(op.dev)
        if (prefix, op.table) in self._routes_to or (prefix.version, op.table) in self._routes:
            return [route for route in self.routes_to(prefix, op.table) if route.oif == index]
        with refusals(f"reading table {op.table}"):
            return self.routes_out.to(prefix, op.table, index, self.netlink)

    def default_hops(self, family: int, table: int) -> list[Hop]:
        """The next hops of the default routes of *family*, 4 or 6, in *table*, or in every one."""
        if (family, table) not in self._default_hops:
            with refusals(f"reading table {table}"):
                if family not in self._defaults:
                    self._defaults[family] = standing.defaults(FAMILIES[family], self.netlink)
                found = self._defaults[family]
                routes = [one for one in found if table in (standing.EVERY_TABLE, nexthops.table_of(one))]
                self._default_hops[family, table] = nexthops.hops(routes, self.netlink.transport)
        return self._default_hops[family, table]

    def route_type(self, family: int, address: str) -> int:
        """The type (RTN_*) of the route to *address*; 0 if there is none, or it is unreachable."""
        try:
            return self.netlink.route_type(FAMILIES[family], address)
        except NetlinkError:
            return 0

    def neighbour(self, dev: str, address: str, flags: int) -> tuple[int, str | None] | None:
        """State (NUD_*) and MAC of a neighbour entry, with *flags* NTF_PROXY of a proxy one; None if there is none."""
        index = self.index(dev)
        with refusals(f"reading neighbour {address} on {dev}"):
            return self.netlink.neighbour(index, address, flags)

    # --- Open vSwitch -------------------------------------------------------------------------------------

    def switch(self) -> Switch:
        """What Open vSwitch has. Raises NotReadyError."""
        if self._switch is None:
            self._switch = ovs.read()
        return self._switch


def sources_of(view: View) -> SourceTable:
    """The table about routed guests' sources; only they need its modules."""
    if view.sources is None:
        from kvmifup.node.sources import SourceTable

        view.sources = SourceTable()
    return view.sources


def limits_of(view: View) -> Limits:
    """The limits of taps; only guests that have one need its modules."""
    if view.limits is None:
        from kvmifup.node.limits import Limits, Queues

        view.limits = Limits(Queues(view.netlink))
    return view.limits


def default_devices(view: View, family: int, table: int) -> list[str]:
    """The devices that the default routes of *family*, 4 or 6, in *table* lead out of, each once."""
    return [view.device_name(index) for index in dict.fromkeys(hop.index for hop in view.default_hops(family, table))]


def keeping_routes(devices: Iterable[str]) -> dict[str, str]:
    """The settings that are needed before IPv6 forwarding is turned on anywhere; default routes lead out of *devices*.

    Without them the kernel drops the default routes that it has learnt from router advertisements, and ignores those
    that come later (rt6_purge_dflt_routers, ipv6_accept_ra).
    """
    paths = [f"net/ipv6/conf/{dev}/accept_ra" for dev in devices]
    return {path: "2" for path in paths if sysctl(path) == "1"}


def read_uplink(view: View, dev: str, family: int) -> Uplink:
    """The uplink *dev* for *family*, 4 or 6, through *view*."""
    try:
        link = view.link(dev)
    except VanishedError:
        return Uplink(dev, family, present=False)
    dev = link.name  # it may have been an alternative one, which neither /proc nor a proxy neighbour knows
    needed = {f"net/ipv{family}/conf/{dev}/forwarding": "1"}
    if family == 6:
        # IPv6 forwards for all devices or none (ip6_forward), and answers per device (ndisc_recv_ns).
        needed |= {"net/ipv6/conf/all/forwarding": "1", f"net/ipv6/conf/{dev}/disable_ipv6": "0"}
    needed = {path: value for path, value in needed.items() if view.sysctl(path) != value}
    if family == 6 and any(path.endswith("/forwarding") for path in needed):
        needed = keeping_routes(default_devices(view, 6, MAIN_TABLE)) | needed
    source = None
    if family == 6:
        with refusals(f"reading the addresses of {dev}"):
            source = link_local(view.netlink.transport, link.index)
    return Uplink(
        dev,
        family,
        present=True,
        up=bool(link.flags & IFF_UP),
        arp=link.type == ARPHRD_ETHER and not link.flags & IFF_NOARP,
        is_tap=link.is_tap,
        mend=tuple(assignment(path, value) for path, value in needed.items()),
        source=source,
    )
