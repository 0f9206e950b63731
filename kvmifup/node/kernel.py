"""The node itself: the only place that asks and changes the kernel, and touches /proc/sys.

It reads, writes and names errors; it decides nothing. What every NIC needs goes through `kvmifup.netlink`;
pyroute2 is for policy rules of others, which can say anything, and is loaded when one of them names the tap.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterator

from kvmifup.core.errors import NotReadyError, VanishedError
from kvmifup.core.model import MAIN_TABLE, Bridge, Config, Nic, NodeFacts, Prefix, Tap, Uplink
from kvmifup.core.ops import (
    AddrGenMode,
    Announce,
    BridgeAddress,
    LinkAddress,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Neighbour,
    Op,
    OvsPort,
    PortForwarding,
    Program,
    ProxyNeighbour,
    Route,
    Rule,
    Sysctl,
    Value,
)
from kvmifup.core.signals import checkpoint
from kvmifup.inputs import tables
from kvmifup.node import announce, messages, netlink, ovs, programs
from kvmifup.node.foreign_rules import rule_of, write_foreign_rule
from kvmifup.node.messages import FAMILIES, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE, RTPROT_STATIC, Link, NetlinkError
from kvmifup.node.procfs import (
    NET_ADDR_SET,
    SYSCTL,
    content,
    device_name,
    link_local,
    setting,
    sysctl,
    sysfs_of,
    write_sysctl,
)
from kvmifup.node.programs import run_program
from kvmifup.node.refusals import forgiven, refusal, refusals

ARPHRD_ETHER = 1  # linux/if_arp.h
IFF_UP, IFF_NOARP = 0x1, 0x80  # linux/if.h
NUD_PERMANENT, NTF_PROXY = 0x80, 0x08  # linux/neighbour.h
PORT_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")  # linux/if_bridge.h
NOT_THE_GUESTS = {  # linux/rtnetlink.h, rtm_type
    2: "is this node's own address",
    3: "is a broadcast address here",
    4: "is an anycast address here",
    5: "is a multicast address here",
}
POLL = 0.005  # seconds between two looks at a port's state


class Kernel:
    """One netlink socket, what it has said since the last change, and which devices the run is about."""

    def __init__(self) -> None:
        self._netlink = netlink.Netlink()
        self._links: dict[str, Link] = {}
        self._known: dict[str, int] = {}
        self._rules: dict[tuple[int, str], list[Rule]] = {}
        self._routes: dict[tuple[int, int], list[bytes]] = {}

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def refresh(self) -> None:
        """Forget what was read: something may have changed."""
        self._links.clear()
        self._rules.clear()
        self._routes.clear()

    # --- facts ----------------------------------------------------------------------------------------

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        """What a plan for *nic* needs to know. Raises KernelError."""
        self.refresh()
        has_ipv6 = os.access(f"{SYSCTL}/net/ipv6", os.F_OK)
        facts = NodeFacts(
            tap=self._tap(nic.tap),
            bridge=self._bridge(nic) if nic.mode in ("bridged", "openvswitch") else None,
            program=programs.find(programs.DIRECTORY, nic.link) if nic.mode == "ext" and nic.link else None,
            rules=tuple(rule for f in (4, 6)[: 1 + has_ipv6] for rule in self._rules_of(f, nic.tap)),
            ipv6=has_ipv6,
        )
        if nic.mode != "routed":
            return facts
        table = MAIN_TABLE if nic.link is None else tables.number(nic.link)
        disabled = f"net/ipv6/conf/{nic.tap}/disable_ipv6"
        return NodeFacts(
            tap=facts.tap,
            table=table,
            rules=facts.rules,
            uplinks=() if table is None else tuple(self._uplinks(nic, table, config)),
            taken=() if table is None else tuple(self._taken(nic, table)),
            ipv6=has_ipv6,
            ipv6_mend=(setting(disabled, "0"),) if sysctl(disabled) not in (None, "0") else (),
        )

    def ifindex(self, dev: str) -> int | None:
        """The index of *dev*, None if there is no such device."""
        return self._netlink.index(dev)

    def _tap(self, name: str) -> Tap | None:
        try:
            link = self._link(name)
        except VanishedError:
            return None
        return Tap(ifindex=link.index, is_tap=link.kind == "tun" and link.type == ARPHRD_ETHER)

    def _is_ovs_bridge(self, name: str) -> bool:
        return ovs.has_bridge(name)

    def _ovs_port(self, name: str) -> str | None:
        return ovs.port(name)

    def _bridge(self, nic: Nic) -> Bridge | None:
        try:
            link = self._link(nic.link or "")
        except VanishedError:
            return None
        if nic.mode == "openvswitch":
            return Bridge(self._is_ovs_bridge(nic.link or ""), True, link.address or "", link.mtu, False, 0.0, False)
        is_bridge = link.kind == "bridge"
        return Bridge(
            is_bridge=is_bridge,
            up=bool(link.flags & IFF_UP),
            mac=link.address or "",
            mtu=link.mtu,
            stp=link.stp,
            forward_delay=link.forward_delay,
            adopts=is_bridge and self._adopts(nic.link or "", link, nic.tap),
        )

    def _adopts(self, name: str, bridge: Link, tap: str) -> bool:
        """Whether *bridge* has neither an address of its own nor a port other than *tap*."""
        sysfs = sysfs_of(name, bridge)
        if sysfs is None:
            # Somebody else's /sys: a bridge without carrier has no live port that it could follow.
            return not bridge.carrier
        return content(f"{sysfs}/addr_assign_type") != NET_ADDR_SET and not {*os.listdir(f"{sysfs}/brif")} - {tap}

    def _uplinks(self, nic: Nic, table: int, config: Config) -> Iterator[Uplink]:
        for family in sorted({prefix.version for prefix in nic.ip}):
            names = config.routed.uplinks
            if names is None:
                names = self._default_devices(family, table) or self._default_devices(family, MAIN_TABLE)
            yield from (self._uplink(name, family) for name in names if name != nic.tap)

    def _default_devices(self, family: int, table: int) -> tuple[str, ...]:
        return tuple(device_name(index) for index in messages.default_devices(self._routes_of(family, table)))

    def _uplink(self, name: str, family: int) -> Uplink:
        try:
            link = self._link(name)
        except VanishedError:
            return Uplink(name, family, present=False)
        needed = {f"net/ipv{family}/conf/{name}/forwarding": "1"}
        if family == 6:
            # IPv6 forwards for all devices or none (ip6_forward), and answers per device (ndisc_recv_ns).
            needed |= {"net/ipv6/conf/all/forwarding": "1", f"net/ipv6/conf/{name}/disable_ipv6": "0"}
        return Uplink(
            name,
            family,
            present=True,
            up=bool(link.flags & IFF_UP),
            arp=link.type == ARPHRD_ETHER and not link.flags & IFF_NOARP,
            mend=tuple(setting(path, value) for path, value in needed.items() if sysctl(path) != value),
            source=link_local(name) if family == 6 else None,
        )

    def _taken(self, nic: Nic, table: int) -> Iterator[tuple[str, str]]:
        """Why an address or prefix of *nic* cannot be put on it: it means something else on this node."""
        for prefix in nic.ip:
            why = None
            if prefix.prefixlen == prefix.max_prefixlen:
                why = NOT_THE_GUESTS.get(self._route_type(prefix.version, str(prefix.network_address)))
            for route in self._routes_to(prefix, table):
                dev = None if route.oif is None else device_name(route.oif)
                if dev != nic.tap:
                    out = "to a next hop" if dev is None else f"out of {dev}"
                    why = why or f"is already routed {out} in table {table}"
            if why:
                yield str(prefix), why

    def _route_type(self, family: int, address: str) -> int:
        try:
            return self._netlink.route_type(FAMILIES[family], address)
        except NetlinkError:  # no route, or an unreachable one: nobody's address
            return 0

    # --- what was read ----------------------------------------------------------------------------------

    def _link(self, name: str) -> Link:
        if name not in self._links:
            with refusals(f"reading {name}"):
                link = self._netlink.link(name)
            self._same(name, link.index)
            self._links[name] = link
        return self._links[name]

    def _same(self, name: str, index: int) -> None:
        """A name can become another device's at any moment; then what we know and want is not about it."""
        if self._known.setdefault(name, index) != index:
            raise VanishedError(f"{name} is another device now", errno=errno.ENODEV)

    def _index(self, name: str) -> int:
        """The index of *name*, asked for anew: it is still the device that this run is about."""
        index = self.ifindex(name)
        if index is None:
            raise refusal(f"reading {name}", errno.ENODEV)
        self._same(name, index)
        return index

    def _rules_of(self, family: int, iif: str) -> list[Rule]:
        """Every rule of *family* that names the incoming device *iif*."""
        if (family, iif) not in self._rules:
            with refusals("reading policy rules"):
                found = self._netlink.rules(FAMILIES[family], iif)
            self._rules[family, iif] = [rule_of(message, family, iif) for message in found]
        return self._rules[family, iif]

    def _routes_of(self, family: int, table: int) -> list[bytes]:
        if (family, table) not in self._routes:
            with refusals(f"reading table {table}"):
                self._routes[family, table] = self._netlink.routes(FAMILIES[family], table)
        return self._routes[family, table]

    def _routes_to(self, prefix: Prefix, table: int) -> list[messages.RouteEntry]:
        """The routes of *table* to exactly *prefix*."""
        return messages.routes_to(prefix, self._routes_of(prefix.version, table))

    def _routes_here(self, op: Route) -> list[messages.RouteEntry]:
        """The routes that *op* is about; of a table that nobody has read yet only what the device has in it."""
        prefix, index = ipaddress.ip_network(op.prefix), self._index(op.dev)
        routes = self._routes.get((prefix.version, op.table))
        if routes is None:
            with refusals(f"reading table {op.table}"):
                routes = self._netlink.routes(FAMILIES[prefix.version], op.table, index)
        return [route for route in messages.routes_to(prefix, routes) if route.oif == index]

    # --- ops --------------------------------------------------------------------------------------------

    def read(self, op: Op) -> Value:
        """The value that the node has now for *op*. Raises VanishedError, KernelError."""
        match op:
            case LinkAddress():
                return str(self._link(op.dev).address)
            case BridgeAddress():
                link = self._link(op.dev)
                sysfs = sysfs_of(op.dev, link)
                pinned = sysfs is not None and content(f"{sysfs}/addr_assign_type") == NET_ADDR_SET
                return str(link.address) if pinned else "not pinned"
            case AddrGenMode():
                mode = self._link(op.dev).addr_gen_mode
                # None: no IPv6 on the device at all, as below an MTU of 1280. Then nothing makes an address.
                return op.want if mode is None else mode
            case LinkMtu():
                return self._link(op.dev).mtu
            case LinkMaster():
                master = self._link(op.dev).master
                return device_name(master) if master else None
            case LinkUp():
                return bool(self._link(op.dev).flags & IFF_UP)
            case PortForwarding():
                return self._port_state(op)
            case Sysctl():
                self._index(op.dev)  # the same device still?
                value = sysctl(op.path)
                if value is None:
                    raise VanishedError(f"no sysctl {op.path}", errno=errno.ENOENT)
                return value
            case Rule():
                return any(rule.key == op.key for rule in self._rules_of(op.family, op.iif))
            case Neighbour():
                found = self._neighbour(op.dev, op.address, flags=0)
                return str(found[1]) if found and found[0] & NUD_PERMANENT else None
            case ProxyNeighbour():
                return self._neighbour(op.dev, op.address, flags=NTF_PROXY) is not None
            case OvsPort():
                return self._ovs_port(op.dev)
            case Program():
                return "unknown"
            case Route():
                return bool(self._routes_here(op))
        raise AssertionError(f"nothing to read for {op.kind}")

    def _port_state(self, op: PortForwarding) -> str:
        link = self._link(op.dev)
        if link.port_of != "bridge":
            return "not a port"
        if not link.flags & IFF_UP:
            return "down"
        if not link.carrier:
            return op.want  # nobody holds the tap yet; the port starts when somebody does
        return PORT_STATES[link.port_state or 0]

    def _neighbour(self, dev: str, address: str, flags: int) -> tuple[int, str | None] | None:
        """State and MAC of the entry, None if there is none."""
        index = self._index(dev)
        with refusals(f"reading neighbour {address} on {dev}"):
            return self._netlink.neighbour(index, address, flags)

    def write(self, op: Op) -> None:
        """Make the value that *op* wants true. Removing what is not there succeeds.

        Raises NotReadyError (a port that does not come to forward), VanishedError, PrivilegeError, KernelError.
        """
        try:
            with refusals(op.describe()):
                self._write(op)
        finally:
            self._forget(op)

    def _forget(self, op: Op) -> None:
        """Forget what writing *op* may have changed; with a link that can be anything."""
        match op:
            case Neighbour() | ProxyNeighbour() | Announce():
                pass
            case Rule():
                self._rules.clear()
            case Route() | Sysctl():  # IPv6 forwarding takes routes with it: rt6_purge_dflt_routers
                self._routes.clear()
            case _:
                self.refresh()

    def _write(self, op: Op) -> None:
        match op:
            case LinkAddress() | BridgeAddress():
                mac = messages.attribute(messages.IFLA_ADDRESS, messages.mac_bytes(op.want))
                self._netlink.set_link(self._index(op.dev), mac)
            case AddrGenMode():
                # By netlink: writing the sysctl makes an address at once, even on a device that is down.
                inet6 = messages.attribute(messages.IFLA_INET6_ADDR_GEN_MODE, bytes([op.want]))
                spec = messages.attribute(messages.IFLA_AF_SPEC, messages.attribute(socket.AF_INET6, inet6))
                self._netlink.set_link(self._index(op.dev), spec)
            case LinkMtu():
                self._netlink.set_link(self._index(op.dev), messages.number(messages.IFLA_MTU, op.want))
            case LinkMaster():
                self._write_master(op)
            case LinkUp():
                self._netlink.set_link(self._index(op.dev), flags=IFF_UP if op.want else 0, change=IFF_UP)
            case PortForwarding():
                self._await_forwarding(op)
            case Sysctl():
                self._index(op.dev)  # the same device still?
                write_sysctl(op.path, op.want)
            case Rule():
                self._write_rule(op)
            case Neighbour():
                self._write_neighbour(op)
            case ProxyNeighbour():
                self._write_proxy(op)
            case Route():
                self._write_route(op)
            case OvsPort():
                ovs.put(op.dev, op.want)
            case Program():
                run_program(op)
            case Announce():
                announce.send(op.messages)
            case _:
                raise AssertionError(f"nothing to write for {op.kind}")

    def _write_master(self, op: LinkMaster) -> None:
        index = self._index(op.dev)
        try:
            master = 0 if op.want is None else self._index(op.want)
        except VanishedError:
            # To go back to a bridge that is gone is to leave this one.
            self._netlink.set_link(index, messages.number(messages.IFLA_MASTER, 0))
            raise
        self._netlink.set_link(index, messages.number(messages.IFLA_MASTER, master))

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
            self.refresh()

    def _write_rule(self, op: Rule) -> None:
        with forgiven(errno.EEXIST if op.want else errno.ENOENT):
            if op.selectors:
                write_foreign_rule(op)
            elif op.want:
                self._netlink.put_rule(FAMILIES[op.family], op.iif, op.table, op.priority, RTPROT_STATIC)
            else:
                self._netlink.delete_rule(FAMILIES[op.family], op.iif, op.table, op.priority)

    def _write_neighbour(self, op: Neighbour) -> None:
        index = self._index(op.dev)
        if op.want is None:
            with forgiven(errno.ENOENT):
                self._netlink.delete_neighbour(index, op.address, 0)
        else:
            self._netlink.put_neighbour(index, op.address, NUD_PERMANENT, 0, op.want)

    def _write_proxy(self, op: ProxyNeighbour) -> None:
        index = self._index(op.dev)
        with forgiven(errno.EEXIST if op.want else errno.ENOENT):
            if op.want:
                self._netlink.put_neighbour(index, op.address, NUD_PERMANENT, NTF_PROXY, None)
            else:
                self._netlink.delete_neighbour(index, op.address, NTF_PROXY)

    def _write_route(self, op: Route) -> None:
        prefix = ipaddress.ip_network(op.prefix)
        if op.want:
            scope = RT_SCOPE_LINK if prefix.version == 4 else RT_SCOPE_UNIVERSE
            self._netlink.add_route(prefix, self._index(op.dev), op.table, RTPROT_STATIC, scope)
            return
        # What is there may have been made by other hands: name it as it is, or the kernel does not find it.
        for route in self._routes_here(op):
            with forgiven(errno.ESRCH):
                self._netlink.delete_route(prefix, op.table, route)
