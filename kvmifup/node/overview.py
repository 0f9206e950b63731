"""The whole node at once, for commands that only look: one dump of each kind, however many NICs there are."""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Mapping
from functools import cache, cached_property

from kvmifup.core.errors import KernelError
from kvmifup.core.model import LOCAL_TABLE, MAIN_TABLE, Config, Nic, NodeFacts, Prefix
from kvmifup.core.ops import Route
from kvmifup.core.records import record
from kvmifup.node import messages, ovs
from kvmifup.node.addresses import addresses, link_local
from kvmifup.node.guests import Qemu, sign_of
from kvmifup.node.kernel import PORT_STATES, Kernel
from kvmifup.node.limits import AllQueues, Limits
from kvmifup.node.messages import (
    FAMILIES,
    IFF_UP,
    LEADING_NOWHERE,
    NTF_PROXY,
    NUD_NOARP,
    NUD_PERMANENT,
    Link,
    NetlinkError,
)
from kvmifup.node.ports import AllPorts
from kvmifup.node.procfs import SYSCTL, device_name, has_ipv6, read_file
from kvmifup.node.refusals import refusal, refusals
from kvmifup.node.remains import Remains
from kvmifup.node.routes import RouteEntry, connected, default_type, local_addresses, network
from kvmifup.node.settings import Settings, named, settings_of
from kvmifup.node.sources import SourceTable
from kvmifup.node.view import View

EVERY_DEVICE = ("all", "default")  # in the place of a device, in the path of a sysctl
MAIN_PRIORITY = 32766  # of the rule that looks up main (net/ipv4/fib_rules.c)


@record
class Port:
    """A port of a bridge; *tap*: it is a tap, a guest's or another program's."""

    tap: bool
    up: bool
    carrier: bool
    forwarding: bool


class WholeView(View):
    """A view that answers out of dumps. It never forgets them, so it does not notice what happens later."""

    ALONE = 0  # there are many to ask for

    def __init__(self) -> None:
        super().__init__()
        with refusals("reading devices"):
            self._links = self.netlink.links()
        self.ports = AllPorts(self.netlink, self._links)
        self.limits = Limits(AllQueues(self.netlink))
        self.remains, self.sources = Remains(once=True), SourceTable(once=True)
        self.read_file = cache(read_file)
        self.has_ipv6, self.has_switch = cache(has_ipv6), cache(ovs.is_there)
        names = {link.index: link.name for link in self._links.values()}
        self.device_name = lambda index: names.get(index) or device_name(index)
        self._settings: dict[str, Settings] = {}  # by device
        self._rules_by_iif: dict[int, dict[str, list[bytes]]] = {}
        self._addresses: dict[int, list[str]] | None = None
        self._neighbours: dict[int, dict[tuple[int, str], tuple[int, str | None]]] = {}
        self._learnt: dict[int, dict[str, str | None]] | None = None  # by device and address

    @property
    def links(self) -> Mapping[str, Link]:
        """Every device, by name."""
        return self._links

    def sysctl(self, path: str) -> str | None:
        """As `procfs.sysctl`."""
        _net, family, what, dev, name = path.split("/")
        if what == "conf" and dev not in EVERY_DEVICE and dev in self._links and self._links[dev].name == dev:
            if dev not in self._settings:
                self._settings[dev] = settings_of(self._links[dev].spec)
            if (value := named(self._settings[dev], family, name)) is not None:
                return value
        return self.read_file(f"{SYSCTL}/{path}")

    def refresh(self) -> None:
        """Do nothing: everything is from one moment."""

    def ifindex(self, dev: str) -> int | None:
        """As `View.ifindex`."""
        return self._links[dev].index if dev in self._links else None

    def link(self, dev: str) -> Link:
        """As `View.link`."""
        if dev not in self._links:
            raise refusal(f"reading {dev}", errno.ENODEV)
        return self._links[dev]

    def addresses(self, dev: str) -> tuple[str, ...]:
        """As `View.addresses`."""
        if self._addresses is None:
            self._addresses = {}
            with refusals("reading addresses"):
                for index, address in addresses(self.netlink.transport, FAMILIES[6]):
                    self._addresses.setdefault(index, []).append(address)
        return tuple(self._addresses.get(self.index(dev), ()))

    def rule_messages(self, family: int, iif: str) -> list[bytes]:
        """As `View.rule_messages`."""
        if family not in self._rules_by_iif:
            with refusals("reading policy rules"):
                self._rules_by_iif[family] = self.netlink.rules_by_iif(FAMILIES[family])
        return self._rules_by_iif[family].get(iif, [])

    def routes_of(self, op: Route) -> list[RouteEntry]:
        """As `View.routes_of`."""
        index = self.index(op.dev)
        return [route for route in self.routes_to(network(op.prefix), op.table) if route.oif == index]

    def neighbour(self, dev: str, address: str, flags: int) -> tuple[int, str | None] | None:
        """As `View.neighbour`."""
        if flags not in self._neighbours:
            with refusals("reading neighbours"):
                self._neighbours[flags] = self.netlink.neighbours(flags)
        return self._neighbours[flags].get((self.index(dev), address))

    def learnt(self, dev: str) -> dict[str, str | None]:
        """The MACs of neighbours on *dev* that nobody has put there, by address."""
        if self._learnt is None:
            self.neighbour(dev, "", 0)  # reads all of them
            self._learnt = {}
            for (where, address), (state, mac) in self._neighbours[0].items():
                if mac and not state & (NUD_PERMANENT | NUD_NOARP):
                    self._learnt.setdefault(where, {})[address] = mac
        return self._learnt.get(self.index(dev), {})


class Overview(Kernel):
    """The node as it was at the first look, for reading only, and what only diagnosis asks of it."""

    def __init__(self) -> None:
        self._whole = WholeView()
        super().__init__(self._whole)
        # What is asked for each of thousands of addresses, and takes a search through a table.
        self._gateways: dict[tuple[int, str], str | None] = {}
        self._connected: dict[tuple[int, str], list[Prefix]] = {}
        self._default_types: dict[tuple[int, int], str | None] = {}
        self._local: dict[int, dict[int | None, list[str]]] = {}  # addresses, by family and device
        self._facts: tuple[Nic, Config, NodeFacts] | None = None  # those that were asked for last

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """As `Kernel.facts`; several questions about one NIC come after each other."""
        if self._facts is None or self._facts[:2] != (nic, config):
            self._facts = nic, config, super().facts(nic, config)
        return self._facts[2]

    def setting(self, path: str) -> str | None:
        """The value of the sysctl *path*, which has slashes; None if there is no such sysctl."""
        return self._whole.read_file(f"{SYSCTL}/{path}")

    def gateway(self, family: int, dev: str) -> str | None:
        """The next hop of a default route of *family*, 4 or 6, out of *dev* in the table main; None without one."""
        if (family, dev) not in self._gateways:
            index = self._view.index(dev)
            found = (hop.gateway for hop in self._view.default_hops(family, MAIN_TABLE) if hop.index == index)
            self._gateways[family, dev] = next(filter(None, found), None)
        return self._gateways[family, dev]

    def default_type(self, family: int, table: int) -> str | None:
        """The type of the default route in *table* that counts, as `ip route` calls it, if packets do not take it."""
        if (family, table) not in self._default_types:
            found = default_type(self._view.routes(family, table))
            self._default_types[family, table] = LEADING_NOWHERE.get(found)
        return self._default_types[family, table]

    def later_rules(self, family: int, iif: str, priority: int) -> list[int]:
        """The priorities of rules of others that come after *priority* and before main's, for what comes from *iif*."""
        rules = [message for name in ("", iif) for message in self._view.rule_messages(family, name)]
        found = {number for rule in rules if (number := messages.rule_priority(rule)) is not None}
        return sorted(number for number in found if priority < number < MAIN_PRIORITY)

    def connected(self, family: int, dev: str) -> list[Prefix]:
        """The networks whose addresses are neighbours on *dev*, as the table main has them."""
        if (family, dev) not in self._connected:
            routes = self._view.routes(family, MAIN_TABLE)
            self._connected[family, dev] = connected(routes, self._view.index(dev))
        return self._connected[family, dev]

    def has_addresses(self, dev: str) -> bool:
        """Whether the node itself has addresses on *dev*, other than IPv6 ones of link scope."""
        index = self._view.index(dev)
        found = [one for family in (4, 6) for one in self._own(family).get(index, ())]
        return any(not ipaddress.ip_address(one).is_link_local for one in found)

    def _own(self, family: int) -> dict[int | None, list[str]]:
        if family not in self._local:
            self._local[family] = local_addresses(self._view.routes(family, LOCAL_TABLE))
        return self._local[family]

    def ports(self, bridge: str) -> dict[str, Port]:
        """The ports of *bridge*, by name. Raises VanishedError."""
        return self._ports.get(self._view.index(bridge), {})

    @cached_property
    def _ports(self) -> dict[int, dict[str, Port]]:
        """By the bridge's index."""
        found: dict[int, dict[str, Port]] = {}
        for name, link in self._whole.links.items():
            if link.master:
                found.setdefault(link.master, {})[name] = Port(
                    tap=link.kind == "tun",
                    up=bool(link.flags & IFF_UP),
                    carrier=link.carrier,
                    forwarding=link.port_state == PORT_STATES.index("forwarding"),
                )
        return found

    def neighbours(self, dev: str) -> dict[str, str | None]:
        """The MACs that the node has learnt on *dev*, by address; not what somebody has put there."""
        return self._whole.learnt(dev)

    def addresses(self, dev: str) -> list[str]:
        """The node's own addresses on *dev*: every IPv4 one, and an IPv6 one of link scope."""
        index = self._view.index(dev)
        return [*self._own(4).get(index, ()), *filter(None, [link_local(self._netlink.transport, index)])]

    def is_proxied(self, address: str, dev: str) -> bool:
        """Whether the node has a proxy entry for *address* on *dev*."""
        return self._view.neighbour(dev, address, NTF_PROXY) is not None

    def is_up(self, dev: str) -> bool:
        """Whether the device *dev* is set up. Raises VanishedError."""
        return bool(self._view.link(dev).flags & IFF_UP)

    def is_tap(self, dev: str) -> bool:
        """Whether the device *dev* is a tap. Raises VanishedError."""
        return self._view.link(dev).is_tap

    def sign_given(self, tap: str, qemu: Qemu | None) -> str:
        """As `sign_of`; *qemu* is who is behind *tap*. Raises VanishedError."""
        return sign_of(tap, self._view.link(tap), qemu)

    @cached_property
    def macs(self) -> dict[str, list[str]]:
        """The MACs of the node's devices, each with the names of those."""
        found: dict[str, list[str]] = {}
        for name, link in self._whole.links.items():
            if link.address:
                found.setdefault(link.address, []).append(name)
        return found

    def way(self, source: str, destination: str, iif: str) -> str | None:
        """The device by which a packet leaves that comes in on *iif*; None if the reverse path filter drops it.

        Raises KernelError if it is dropped for any other reason, such as no route.
        """
        try:
            index = self._netlink.way(source, destination, self._view.index(iif))
        except NetlinkError as error:  # also EACCES, which is the answer of a "prohibit"
            number = error.errno or 0
            raise KernelError(f"reading the route to {destination}: {os.strerror(number)}", errno=number) from None
        return None if index is None else self._view.device_name(index)

    def vlans(self, bridge: str) -> tuple[bool, int]:
        """Whether *bridge* filters VLANs, and in which VLAN it puts new ports, 0 for none."""
        link = self._view.link(bridge)
        return link.filters, link.default_pvid
