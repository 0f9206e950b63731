"""Reads and writes the node's value for each op; it decides nothing.

The errors of netlink, /proc and /sys come out as those of `kvmifup.core.errors`.

Large because it has a case for each op, and these are easier to see in one place.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kvmifup.core import bridgeport
from kvmifup.core.errors import KernelError, NotReadyError, VanishedError
from kvmifup.core.model import Config, Nic, NodeFacts
from kvmifup.core.ops import (
    PORT_OPTIONS,
    Address,
    AddrGenMode,
    Announce,
    BridgeAddress,
    Filter,
    LinkAddress,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Neighbour,
    Op,
    OvsPort,
    PortForwarding,
    PortOption,
    Program,
    ProxyNeighbour,
    Rate,
    Route,
    Rule,
    Sources,
    Sysctl,
    UplinkGuard,
    UplinkVlans,
    Value,
)
from kvmifup.core.signals import checkpoint
from kvmifup.core.vlans import text_of
from kvmifup.inputs import devices
from kvmifup.node import addresses, announce, guests, messages, ovs, programs
from kvmifup.node.facts import facts_for
from kvmifup.node.messages import (
    FAMILIES,
    IFF_UP,
    NTF_PROXY,
    NUD_PERMANENT,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RTN_UNICAST,
    RTPROT_STATIC,
    NetlinkError,
)
from kvmifup.node.ports import exactly, present, share
from kvmifup.node.procfs import address_is_set, sysfs_of, write_sysctl
from kvmifup.node.refusals import forgiven, refusals
from kvmifup.node.routes import RouteEntry, network, route_entry
from kvmifup.node.view import View, limits_of, sources_of

if TYPE_CHECKING:
    from kvmifup.node.filters import AllFilters, Filters
    from kvmifup.node.netlink import Netlink

PORT_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")  # BR_STATE_*, linux/if_bridge.h
BEST_IPV6 = 1  # the priority of our routes: 0 stands for 1024 there, and routing daemons use less
FIRST, BETWEEN = "first: ", "; "  # of routes of others: they come before those out of other devices; between two
POLL = 0.005  # seconds between two looks at a port's state


class Kernel:
    """The node for one run, seen through a `View`. Not for two threads at once."""

    def __init__(self, view: View | None = None) -> None:
        self._view = view or View()
        self._netlink = self._view.netlink

    def close(self) -> None:
        """Close the netlink socket."""
        self._view.close()

    def refresh(self) -> None:
        """Forget what was read, because something may have changed."""
        self._view.refresh()

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """What a plan for *nic* needs to know. Raises KernelError, NotReadyError, ConfigError."""
        return facts_for(nic, config, self._view)

    def ifindex(self, dev: str) -> int | None:
        """The index of *dev*, None if there is no such device."""
        return self._view.ifindex(dev)

    def device(self, index: int) -> str | None:
        """The name that the device with *index* has now, None if there is none. Raises OSError."""
        return devices.name_of(index)

    def sign_of(self, tap: str) -> str:
        """How it is known that the guest on *tap* runs here by now; "" if nothing shows it. It looks at all processes.

        Raises VanishedError, KernelError.
        """
        return guests.sign_of(tap, self._view.link(tap), guests.behind_taps().get(tap))

    # --- reading ----------------------------------------------------------------------------------------

    def read(self, op: Op) -> Value:
        """The value that the node has now for *op*.

        Raises VanishedError, KernelError; NotReadyError and ProgramError for a port of Open vSwitch.
        """
        match op:
            case LinkAddress():
                return str(self._view.link(op.dev).address)
            case BridgeAddress():
                link = self._view.link(op.dev)
                read = self._view.read_file
                sysfs = sysfs_of(op.dev, link, read)
                return str(link.address) if sysfs and address_is_set(sysfs, read) else "not pinned"
            case AddrGenMode():
                return self._view.link(op.dev).addr_gen_mode
            case Address():
                return op.address in self._view.addresses(op.dev)
            case LinkMtu():
                return self._view.link(op.dev).mtu
            case LinkMaster():
                return self._read_master(op)
            case UplinkVlans():
                return present(op, self._view.ports.vlans(self._trunk(op)))
            case Filter():
                return filters_seen(self._view).read(op.dev)
            case LinkUp():
                return bool(self._view.link(op.dev).flags & IFF_UP)
            case PortOption():
                return self._view.link(op.dev).port_options.get(op.option)
            case PortForwarding():
                return self._port_state(op)
            case Rate():
                with refusals(f"reading the limits of {op.dev}"):
                    return limits_of(self._view).read(op, self._view.index(op.dev))
            case Sysctl():
                if not op.everywhere:
                    self._view.index(op.dev)  # is it still the same device?
                value = self._view.sysctl(op.path)
                if value is None and op.on_uplink:
                    raise VanishedError(f"no sysctl {op.path}", errno=errno.ENOENT)
                return value
            case Rule():
                return any(rule.key == op.key for rule in self._view.rules(op.family, op.iif))
            case Sources():
                with refusals(f"reading {op.subject()}"):
                    return sources_of(self._view).read(op.dev)
            case UplinkGuard():
                with refusals(f"reading {op.subject()}"):
                    return sources_of(self._view).read_guard(op.dev, op.prefix)
            case Neighbour():
                found = self._view.neighbour(op.dev, op.address, flags=0)
                return str(found[1]) if found and found[0] & NUD_PERMANENT else None
            case ProxyNeighbour():
                return self._view.neighbour(op.dev, op.address, flags=NTF_PROXY) is not None
            case OvsPort():
                return self._view.switch().ports.get(op.dev)
            case Program():
                return "unknown"
            case Route():
                return routes_for(op, self._view)
        raise AssertionError(f"nothing to read for {op.kind}")

    def _read_master(self, op: LinkMaster) -> str | None:
        link = self._view.link(op.dev)
        # A switch is the master of its ports, too: `OvsPort` is about those.
        if not link.master or link.port_of == "openvswitch":
            return None
        bridge, want = self._view.device_name(link.master), op.want or ""
        if link.port_of != "bridge":
            return bridge
        here = bridgeport.bridge_of(want) == bridge
        vlans, options = "", link.port_options
        # On the bridge that it is to be on, what is not said is somebody else's affair.
        if (op.vlans or not here) and self._view.link(bridge).filters:
            with refusals(f"reading the VLANs of {op.dev}"):
                vlans = text_of(self._view.ports.vlans(link.index))
        said = bridgeport.options_of(want) if here else bridgeport.NEW
        found = {name: options[name] for name in said if name in options and (here or options[name] != said[name])}
        up = bool(link.flags & IFF_UP) and (bridgeport.says_up(want) or not here)
        return bridgeport.text_of(bridge, vlans, found, up=up)

    def _trunk(self, op: UplinkVlans) -> int:
        """The index of the uplink. Raises VanishedError if it is no port of its bridge any more."""
        link = self._view.link(op.dev)
        if link.port_of != "bridge" or not link.master or self._view.device_name(link.master) != op.bridge:
            raise VanishedError(f"{op.dev} is no port of {op.bridge} any more", errno=errno.ENODEV)
        return link.index

    def _port_state(self, op: PortForwarding) -> str:
        link = self._view.link(op.dev)
        if link.port_of != "bridge":
            return "not a port"
        if not link.flags & IFF_UP:
            return "down"
        if not link.carrier:
            return op.want  # nobody has opened the tap yet; the port starts when somebody does
        return PORT_STATES[link.port_state or 0]

    # --- writing ----------------------------------------------------------------------------------------

    def write(self, op: Op) -> None:
        """Make the value that *op* wants true. Removing what is not there succeeds.

        Raises NotReadyError (a port that does not forward in time), VanishedError, PrivilegeError, KernelError,
        ProgramError.
        """
        try:
            with refusals(op.describe):
                self._write(op)
        finally:
            self._view.forget(op)

    def write_all(self, ops: Sequence[Op]) -> None:
        """The same of several, in one transaction of each table that they are in."""
        rest = [op for op in ops if not isinstance(op, Filter | Sources)]
        try:
            if here := [op for op in ops if isinstance(op, Filter)]:
                filters_of(self._netlink).write_all(here)
            if wanted := {op.dev: op.want for op in ops if isinstance(op, Sources)}:
                with refusals("restricting guests' IPv6 sources"):
                    sources_of(self._view).write_all(wanted)
        finally:
            for op in ops:
                self._view.forget(op)
        for op in rest:
            self.write(op)

    def _write(self, op: Op) -> None:
        match op:
            case LinkAddress() | BridgeAddress():
                mac = messages.attribute(messages.IFLA_ADDRESS, messages.mac_bytes(op.want))
                self._netlink.set_link(self._view.index(op.dev), mac)
            case AddrGenMode():
                if op.want is None or self._view.link(op.dev).addr_gen_mode is None:
                    return  # the device has no IPv6
                # By netlink, because writing the sysctl makes an address at once, even on a device that is down.
                inet6 = messages.attribute(messages.IFLA_INET6_ADDR_GEN_MODE, bytes([op.want]))
                spec = messages.attribute(messages.IFLA_AF_SPEC, messages.attribute(socket.AF_INET6, inet6))
                self._netlink.set_link(self._view.index(op.dev), spec)
            case Address():
                addresses.write(self._netlink.transport, self._view.index(op.dev), op.address, there=op.want)
            case LinkMtu():
                self._netlink.set_link(self._view.index(op.dev), messages.number(messages.IFLA_MTU, op.want))
            case LinkMaster():
                self._write_master(op)
            case UplinkVlans():
                index = self._trunk(op)
                self._view.ports.clear()
                self._view.ports.change(index, *share(op, self._view.ports.vlans(index)))
            case Filter():
                filters_of(self._netlink).write(op)
            case LinkUp():
                self._netlink.set_link(self._view.index(op.dev), flags=IFF_UP if op.want else 0, change=IFF_UP)
            case PortOption():
                write_port_option(op, self._view)
            case PortForwarding():
                self._await_forwarding(op)
            case Rate():
                limits_of(self._view).write(op, self._view.index(op.dev))
            case Sysctl():
                if not op.everywhere:
                    self._view.index(op.dev)  # is it still the same device?
                if op.want is not None:
                    # What a tap without IPv6 does not have, needs no setting.
                    with suppress(*(() if op.on_uplink else (FileNotFoundError,))):
                        write_sysctl(op.path, op.want)
            case Rule():
                self._write_rule(op)
            case Sources():
                sources_of(self._view).write(op.dev, op.want)
            case UplinkGuard():
                sources_of(self._view).write_guard(op.dev, op.prefix, op.want)
            case Neighbour():
                self._write_neighbour(op)
            case ProxyNeighbour():
                self._write_proxy(op)
            case Route():
                self._write_route(op)
            case OvsPort():
                ovs.put(op.dev, op.want, self._view.switch().ports.get(op.dev))
            case Program():
                programs.run_for_phase(op)
            case Announce():
                if lost := announce.send(op.messages):
                    raise KernelError(announce.say(lost), errno=lost[0].errno)
            case _:
                raise AssertionError(f"nothing to write for {op.kind}")

    def _write_master(self, op: LinkMaster) -> None:
        index = self._view.index(op.dev)
        link, bridge = self._view.link(op.dev), op.place(op.want)
        try:
            master = 0 if bridge is None else self._view.index(str(bridge))
        except VanishedError:
            # The bridge to go back to is gone: what is left to do is to leave this one.
            self._netlink.set_link(index, messages.number(messages.IFLA_MASTER, 0))
            raise
        if link.master != master:
            if bridge is not None and link.flags & IFF_UP:
                # What restricts it is not in force when it joins (nbp_vlan_init in net/bridge/br_vlan.c, new_nbp).
                self._netlink.set_link(index, change=IFF_UP)
            self._netlink.set_link(index, messages.number(messages.IFLA_MASTER, master))
        if op.vlans:
            ports = self._view.ports
            ports.clear()
            ports.change(index, *exactly(op, ports.vlans(index)))
        options = bridgeport.options_of(op.want or "")
        if options:
            kinds = messages.IFLA_BRPORT
            attrs = (messages.attribute(kinds[name], bytes([value])) for name, value in options.items())
            self._netlink.set_port(index, b"".join(attrs))
        if bridgeport.says_up(op.want or ""):
            self._netlink.set_link(index, flags=IFF_UP, change=IFF_UP)

    def _await_forwarding(self, op: PortForwarding) -> None:
        deadline = time.monotonic() + op.timeout
        while (state := self._port_state(op)) != op.want:
            if time.monotonic() >= deadline:
                raise NotReadyError(
                    f"{op.dev} does not forward {op.timeout:g} s after it joined its bridge: it is {state}",
                    hint="look at the bridge's STP (`bridge -d link`)",
                )
            checkpoint()
            time.sleep(POLL)
            self._view.refresh()

    def _write_rule(self, op: Rule) -> None:
        with forgiven(errno.ENOENT):
            rule = (FAMILIES[op.family], op.iif, op.table, op.priority, op.protocol)
            if op.want:
                self._netlink.put_rule(*rule)
            else:
                self._netlink.delete_rule(*rule, among=self._view.rule_messages(op.family, op.iif))

    def _write_neighbour(self, op: Neighbour) -> None:
        index = self._view.index(op.dev)
        if op.want is None:
            with forgiven(errno.ENOENT):
                self._netlink.delete_neighbour(index, op.address, 0)
        else:
            self._netlink.put_neighbour(index, op.address, NUD_PERMANENT, 0, op.want)

    def _write_proxy(self, op: ProxyNeighbour) -> None:
        index = self._view.index(op.dev)
        with forgiven(errno.EEXIST if op.want else errno.ENOENT):
            if op.want:
                self._netlink.put_neighbour(index, op.address, NUD_PERMANENT, NTF_PROXY, None)
            else:
                self._netlink.delete_neighbour(index, op.address, NTF_PROXY)

    def _write_route(self, op: Route) -> None:
        prefix, index = network(op.prefix), self._view.index(op.dev)
        now = []
        try:
            if op.want is True:
                entry = ours(op, index)
                try:
                    self._netlink.add_route(prefix, op.table, entry)
                except NetlinkError as error:
                    if error.errno != errno.EEXIST:
                        raise
                    # It is there, and another one comes before it.
                    self._netlink.delete_route(prefix, op.table, entry)
                    self._netlink.add_route(prefix, op.table, entry)
                now = [entry, *(one for one in self._view.routes_out.known(prefix, op.table, index) if one != entry)]
            else:
                # Others may have made the route: the kernel finds it only if it is named as it is.
                for route in self._view.routes_of(op):
                    with forgiven(errno.ESRCH):
                        self._netlink.delete_route(prefix, op.table, route)
            if isinstance(op.want, str):
                first = op.want.startswith(FIRST)
                now = [route_entry(one, index) for one in op.want.removeprefix(FIRST).split(BETWEEN)]
                for route in reversed(now) if first else now:
                    self._netlink.add_route(prefix, op.table, route, last=not first)
        except OSError:
            self._view.refresh()  # it may be half done
            raise
        self._view.routes_out.note(prefix, op.table, index, now)


def filters_of(netlink: Netlink) -> Filters:
    """The filters, which few NICs have: their modules are loaded when they are needed."""
    from kvmifup.node.filters import of_namespace

    return of_namespace(netlink.transport.socket)


def filters_seen(view: View) -> Filters | AllFilters:
    """The same to be read through *view*; of a view of the whole node all at once."""
    if view.ALONE:
        return filters_of(view.netlink)
    if view.filters is None:
        from kvmifup.node.filters import AllFilters

        view.filters = AllFilters(filters_of(view.netlink))
    return view.filters


def ours(op: Route, index: int) -> RouteEntry:
    """The route that we make for *op*, out of the device *index*."""
    scope, priority = (RT_SCOPE_UNIVERSE, BEST_IPV6) if ":" in op.prefix else (RT_SCOPE_LINK, None)
    return RouteEntry(RTPROT_STATIC, scope, RTN_UNICAST, index, priority)


def write_port_option(op: PortOption, view: View) -> None:
    """Set an option of a port; None is what a new port has. Raises VanishedError if it is no port any more."""
    if view.link(op.dev).port_of != "bridge":
        if op.want is None:
            return  # it went with the port
        raise VanishedError(f"{op.dev} is no port of a bridge", errno=errno.EOPNOTSUPP)
    value = PORT_OPTIONS[op.option][2] if op.want is None else op.want
    view.netlink.set_port(view.index(op.dev), messages.attribute(messages.IFLA_BRPORT[op.option], bytes([value])))


def routes_for(op: Route, view: View) -> bool | str:
    """What there is of the route that *op* is about, as `Route` has it."""
    own = view.routes_of(op)
    if not own:
        return False
    index = own[0].oif or 0
    if own == [ours(op, index)] and not op.want:  # in which place it is, matters only if it is to be there
        return True
    first = leads(op, index, view)
    if first and op.want is True:
        return True
    return f"{FIRST if first else ''}{BETWEEN.join(route.as_text() for route in own)}"


def leads(op: Route, index: int, view: View) -> bool:
    """Whether all packets to the prefix of *op* take a route of its own, out of the device *index*."""
    prefix = network(op.prefix)
    # A routing daemon may have one as well. Of equal ones IPv4 takes the first.
    every = [route for route in view.routes_to(prefix, op.table) if route.for_all]
    order = [((route.priority or 0, prefix.version == 6 and route.oif != index), route) for route in every]
    taken = min(order, key=lambda one: one[0])[1] if order else None
    return taken is not None and taken.oif == index and taken.direct
