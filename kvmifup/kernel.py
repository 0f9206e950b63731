"""The node itself: the only place that speaks netlink and touches /proc/sys.

It reads, writes and names errors; it decides nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from kvmifup import announce, ovs, programs, tables
from kvmifup.errors import KernelError, NotReadyError, PrivilegeError, ProgramError, VanishedError
from kvmifup.model import MAIN_TABLE, Bridge, Config, Nic, NodeFacts, Tap, Uplink
from kvmifup.ops import (
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
    Selectors,
    Sysctl,
    Value,
)
from kvmifup.signals import checkpoint

ARPHRD_ETHER = 1  # linux/if_arp.h
IFF_UP, IFF_NOARP = 0x1, 0x80  # linux/if.h
NUD_PERMANENT, NTF_PROXY = 0x80, 0x08  # linux/neighbour.h
RTM_F_FIB_MATCH = 0x2000  # linux/rtnetlink.h
RTPROT_STATIC, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE = 4, 253, 0
FR_ACT_TO_TBL, FIB_RULE_INVERT = 1, 0x2  # linux/fib_rules.h
# Of a rule's header: field, value in a plain rule, bits that belong to the rule. The other flags tell of
# the moment, such as that the device is gone.
RULE_FIELDS = (
    ("src_len", 0, 0xFF),
    ("dst_len", 0, 0xFF),
    ("tos", 0, 0xFF),
    ("action", FR_ACT_TO_TBL, 0xFF),
    ("flags", 0, FIB_RULE_INVERT),
)
NO_PREFIX_LENGTH = 0xFFFFFFFF  # an unset FRA_SUPPRESS_PREFIXLEN
NET_ADDR_SET = "3"  # linux/netdevice.h, in /sys/class/net/DEV/addr_assign_type
PORT_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")  # linux/if_bridge.h
NOT_THE_GUESTS = {  # linux/rtnetlink.h, rtm_type
    2: "is this node's own address",
    3: "is a broadcast address here",
    4: "is an anycast address here",
    5: "is a multicast address here",
}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
POLL = 0.005  # seconds between two looks at a port's state

SYSCTL = Path("/proc/sys")
SYS_NET = Path("/sys/class/net")


class Kernel:
    """One netlink socket, what it has said since the last change, and which devices the run is about."""

    def __init__(self) -> None:
        try:
            # Without groups=0, 0.9 subscribes to every event on the node and never reads them.
            self._netlink: Any = IPRoute(groups=0, strict_check=True)
        except TypeError:  # 0.7: subscribes to nothing, and knows no such argument
            self._netlink = IPRoute(strict_check=True)
        self._links: dict[str, Any] = {}
        self._known: dict[str, int] = {}
        self._rules: dict[int, list[Rule]] = {}
        self._routes: dict[tuple[int, int], list[Any]] = {}

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
        has_ipv6 = (SYSCTL / "net/ipv6").is_dir()
        facts = NodeFacts(
            tap=self._tap(nic.tap),
            bridge=self._bridge(nic) if nic.mode in ("bridged", "openvswitch") else None,
            program=programs.find(programs.DIRECTORY, nic.link) if nic.mode == "ext" and nic.link else None,
            rules=tuple(rule for f in (4, 6)[: 1 + has_ipv6] for rule in self._rules_of(f) if rule.iif == nic.tap),
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
        try:
            return socket.if_nametoindex(dev)
        except OSError:
            return None

    def _tap(self, name: str) -> Tap | None:
        try:
            link = self._link(name)
        except VanishedError:
            return None
        return Tap(ifindex=link["index"], is_tap=kind(link) == "tun" and link["ifi_type"] == ARPHRD_ETHER)

    def _bridge(self, nic: Nic) -> Bridge | None:
        try:
            link = self._link(nic.link or "")
        except VanishedError:
            return None
        if nic.mode == "openvswitch":
            is_bridge = ovs.has_bridge(nic.link or "")
            return Bridge(is_bridge, True, link.get_attr("IFLA_ADDRESS"), link.get_attr("IFLA_MTU"), False, 0.0, False)
        data = nested(link, "IFLA_LINKINFO", "IFLA_INFO_DATA")
        is_bridge = kind(link) == "bridge"
        return Bridge(
            is_bridge=is_bridge,
            up=bool(link["flags"] & IFF_UP),
            mac=link.get_attr("IFLA_ADDRESS") or "",
            mtu=link.get_attr("IFLA_MTU"),
            stp=is_bridge and bool(data.get_attr("IFLA_BR_STP_STATE")),
            forward_delay=data.get_attr("IFLA_BR_FORWARD_DELAY") / 100 if is_bridge else 0.0,
            adopts=is_bridge and self._adopts(link, nic.tap),
        )

    def _adopts(self, bridge: Any, tap: str) -> bool:
        """Whether *bridge* has neither an address of its own nor a port other than *tap*."""
        sysfs = sysfs_of(bridge)
        if sysfs is None:
            # Somebody else's /sys: a bridge without carrier has no live port that it could follow.
            return not bridge.get_attr("IFLA_CARRIER")
        pinned = (sysfs / "addr_assign_type").read_text().strip() == NET_ADDR_SET
        return not pinned and not {port.name for port in (sysfs / "brif").iterdir()} - {tap}

    def _uplinks(self, nic: Nic, table: int, config: Config) -> Iterator[Uplink]:
        for family in sorted({prefix.version for prefix in nic.ip}):
            names = config.routed.uplinks
            if names is None:
                names = self._default_devices(family, table) or self._default_devices(family, MAIN_TABLE)
            yield from (self._uplink(name, family) for name in names if name != nic.tap)

    def _default_devices(self, family: int, table: int) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for route in self._routes_of(family, table):
            if route["dst_len"] == 0 and route["type"] == 1:
                hops = route.get_attr("RTA_MULTIPATH") or ()
                for index in (route.get_attr("RTA_OIF"), *(hop["oif"] for hop in hops)):
                    if index:
                        found[device_name(index)] = None
        return tuple(found)

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
            up=bool(link["flags"] & IFF_UP),
            arp=link["ifi_type"] == ARPHRD_ETHER and not link["flags"] & IFF_NOARP,
            mend=tuple(setting(path, value) for path, value in needed.items() if sysctl(path) != value),
            source=link_local(name) if family == 6 else None,
        )

    def _taken(self, nic: Nic, table: int) -> Iterator[tuple[str, str]]:
        """Why an address or prefix of *nic* cannot be put on it: it means something else on this node."""
        for prefix in nic.ip:
            why = None
            if prefix.prefixlen == prefix.max_prefixlen:
                why = NOT_THE_GUESTS.get(self._route_type(prefix.version, str(prefix.network_address)))
            for route in self._routes_of(prefix.version, table):
                dev = route.get_attr("RTA_OIF")
                if same_prefix(route, prefix) and (dev is None or device_name(dev) != nic.tap):
                    out = "to a next hop" if dev is None else f"out of {device_name(dev)}"
                    why = why or f"is already routed {out} in table {table}"
            if why:
                yield str(prefix), why

    def _route_type(self, family: int, address: str) -> int:
        try:
            found = self._netlink.route("get", dst=address, family=FAMILIES[family], flags=RTM_F_FIB_MATCH)
        except NetlinkError:  # no route, or an unreachable one: nobody's address
            return 0
        return int(found[0]["type"])

    # --- what was read ----------------------------------------------------------------------------------

    def _link(self, name: str) -> Any:
        if name not in self._links:
            with refusals(f"reading {name}"):
                link = self._netlink.link("get", ifname=name)[0]
            # A name can become another device's at any moment; then what we know and want is not about it.
            if self._known.setdefault(name, link["index"]) != link["index"]:
                raise VanishedError(f"{name} is another device now", errno=errno.ENODEV)
            self._links[name] = link
        return self._links[name]

    def _index(self, name: str) -> int:
        return int(self._link(name)["index"])

    def _rules_of(self, family: int) -> list[Rule]:
        """Every rule of *family* that names an incoming device."""
        if family not in self._rules:
            with refusals("reading policy rules"):
                dump = self._netlink.rule("dump", family=FAMILIES[family])
            self._rules[family] = [rule_of(message, family) for message in dump if message.get_attr("FRA_IIFNAME")]
        return self._rules[family]

    def _routes_of(self, family: int, table: int) -> list[Any]:
        if (family, table) not in self._routes:
            try:
                dump = self._netlink.route("dump", family=FAMILIES[family], table=table)
            except NetlinkError as error:
                if error.code != errno.ENOENT:  # a table that was never used
                    raise refusal(f"reading table {table}", error.code) from None
                dump = ()
            self._routes[family, table] = list(dump)
        return self._routes[family, table]

    # --- ops --------------------------------------------------------------------------------------------

    def read(self, op: Op) -> Value:
        """The value that the node has now for *op*. Raises VanishedError, KernelError."""
        match op:
            case LinkAddress():
                return str(self._link(op.dev).get_attr("IFLA_ADDRESS"))
            case BridgeAddress():
                link = self._link(op.dev)
                sysfs = sysfs_of(link)
                pinned = sysfs is not None and (sysfs / "addr_assign_type").read_text().strip() == NET_ADDR_SET
                return str(link.get_attr("IFLA_ADDRESS")) if pinned else "not pinned"
            case AddrGenMode():
                modes = nested(self._link(op.dev), "IFLA_AF_SPEC", "AF_INET6").get_attr("IFLA_INET6_ADDR_GEN_MODE")
                # None: no IPv6 on the device at all, as below an MTU of 1280. Then nothing makes an address.
                return op.want if modes is None else int(modes)
            case LinkMtu():
                return int(self._link(op.dev).get_attr("IFLA_MTU"))
            case LinkMaster():
                master = self._link(op.dev).get_attr("IFLA_MASTER")
                return device_name(master) if master else None
            case LinkUp():
                return bool(self._link(op.dev)["flags"] & IFF_UP)
            case PortForwarding():
                return self._port_state(op)
            case Sysctl():
                self._index(op.dev)  # the same device still?
                value = sysctl(op.path)
                if value is None:
                    raise VanishedError(f"no sysctl {op.path}", errno=errno.ENOENT)
                return value
            case Rule():
                return any(rule.key == op.key for rule in self._rules_of(op.family))
            case Neighbour():
                found = self._neighbour(op.dev, op.address, flags=0)
                return str(found.get_attr("NDA_LLADDR")) if found and found["state"] & NUD_PERMANENT else None
            case ProxyNeighbour():
                return self._neighbour(op.dev, op.address, flags=NTF_PROXY) is not None
            case OvsPort():
                return ovs.port(op.dev)
            case Program():
                return "unknown"
            case Route():
                prefix, index = ipaddress.ip_network(op.prefix), self._index(op.dev)
                routes = self._routes_of(prefix.version, op.table)
                return any(same_prefix(route, prefix) and route.get_attr("RTA_OIF") == index for route in routes)
        raise AssertionError(f"nothing to read for {op.kind}")

    def _port_state(self, op: PortForwarding) -> str:
        link = self._link(op.dev)
        if nested(link, "IFLA_LINKINFO").get_attr("IFLA_INFO_SLAVE_KIND") != "bridge":
            return "not a port"
        if not link["flags"] & IFF_UP:
            return "down"
        if not link.get_attr("IFLA_CARRIER"):
            return op.want  # nobody holds the tap yet; the port starts when somebody does
        return PORT_STATES[nested(link, "IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA").get_attr("IFLA_BRPORT_STATE")]

    def _neighbour(self, dev: str, address: str, flags: int) -> Any:
        """The entry, None if there is none."""
        arguments = {"dst": address, "ifindex": self._index(dev), "family": family_of(address)}
        try:
            return self._netlink.neigh("get", flags=flags, **arguments)[0]
        except NetlinkError as error:
            if error.code == errno.ENOENT:
                return None
            raise refusal(f"reading neighbour {address} on {dev}", error.code) from None

    def write(self, op: Op) -> None:
        """Make the value that *op* wants true. Removing what is not there succeeds.

        Raises NotReadyError (a port that does not come to forward), VanishedError, PrivilegeError, KernelError.
        """
        try:
            with refusals(op.describe()):
                self._write(op)
        finally:
            self.refresh()

    def _write(self, op: Op) -> None:
        match op:
            case LinkAddress() | BridgeAddress():
                self._netlink.link("set", index=self._index(op.dev), address=op.want)
            case AddrGenMode():
                # By netlink: writing the sysctl makes an address at once, even on a device that is down.
                inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", op.want)]}
                spec = {"attrs": [("AF_INET6", inet6)]}
                self._netlink.link("set", index=self._index(op.dev), IFLA_AF_SPEC=spec)
            case LinkMtu():
                self._netlink.link("set", index=self._index(op.dev), mtu=op.want)
            case LinkMaster():
                self._write_master(op)
            case LinkUp():
                self._netlink.link("set", index=self._index(op.dev), state="up" if op.want else "down")
            case PortForwarding():
                self._await_forwarding(op)
            case Sysctl():
                self._index(op.dev)  # the same device still?
                (SYSCTL / op.path).write_text(op.want)
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
            self._netlink.link("set", index=index, master=0)
            raise
        self._netlink.link("set", index=index, master=master)

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
        arguments: dict[str, Any] = {
            "family": FAMILIES[op.family],
            "iifname": op.iif,
            "table": op.table,
            "priority": op.priority,
            **({"protocol": RTPROT_STATIC} if not op.selectors and op.want else {}),
            **dict(op.selectors),
        }
        with forgiven(errno.EEXIST if op.want else errno.ENOENT):
            self._netlink.rule("add" if op.want else "del", **arguments)

    def _write_neighbour(self, op: Neighbour) -> None:
        arguments = {"dst": op.address, "ifindex": self._index(op.dev), "family": family_of(op.address)}
        if op.want is None:
            with forgiven(errno.ENOENT):
                self._netlink.neigh("del", **arguments)
        else:
            self._netlink.neigh("replace", lladdr=op.want, state=NUD_PERMANENT, **arguments)

    def _write_proxy(self, op: ProxyNeighbour) -> None:
        arguments = {"dst": op.address, "ifindex": self._index(op.dev), "family": family_of(op.address)}
        with forgiven(errno.EEXIST if op.want else errno.ENOENT):
            self._netlink.neigh("add" if op.want else "del", flags=NTF_PROXY, **arguments)

    def _write_route(self, op: Route) -> None:
        prefix = ipaddress.ip_network(op.prefix)
        arguments = {
            "dst": op.prefix,
            "oif": self._index(op.dev),
            "table": op.table,
            "family": FAMILIES[prefix.version],
        }
        if op.want:
            scope = RT_SCOPE_LINK if prefix.version == 4 else RT_SCOPE_UNIVERSE
            self._netlink.route("add", proto=RTPROT_STATIC, scope=scope, **arguments)
            return
        # What is there may have been made by other hands: name it as it is, or the kernel does not find it.
        for route in self._routes_of(prefix.version, op.table):
            if same_prefix(route, prefix) and route.get_attr("RTA_OIF") == arguments["oif"]:
                with forgiven(errno.ESRCH):
                    self._netlink.route(
                        "del",
                        proto=route["proto"],
                        scope=route["scope"],
                        priority=route.get_attr("RTA_PRIORITY"),
                        **arguments,
                    )


def run_program(op: Program) -> None:
    """Run an administrator's program for its phase, or to undo pre. Raises ProgramError."""
    if not op.want and op.phase == "post":
        return  # undoing pre comes next, and tells the program to take everything down
    environ = dict(op.environment) | {"KVM_IFUP_PHASE": op.phase if op.want else "down"}
    result = programs.run((op.program,), environ, op.timeout)
    if result.code:
        said = result.complaint or "it says nothing"
        raise ProgramError(f"{op.program} failed with exit code {result.code}: {said}", untouched=True)


# --- errors -------------------------------------------------------------------------------------------


class refusals:  # noqa: N801 (a context manager reads as a function)
    """Turn what netlink and /proc/sys raise inside into our errors about *what*."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, NetlinkError):
            raise refusal(self.what, error.code) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise refusal(self.what, errno.ENODEV if error.errno == errno.ENOENT else error.errno) from None


class forgiven:  # noqa: N801
    """Let the netlink error *code* pass: what was asked for is already so."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        return isinstance(error, NetlinkError) and error.code == self.code


def refusal(what: str, number: int) -> KernelError | PrivilegeError:
    """The error for errno *number*."""
    if number in (errno.ENODEV, errno.ENXIO):
        return VanishedError(f"{what}: the device is not there", errno=number)
    if number in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{what}: not permitted", hint="this takes root (CAP_NET_ADMIN)")
    return KernelError(f"{what}: {os.strerror(number)}", errno=number)


# --- reading messages -----------------------------------------------------------------------------------


class _Nothing:
    """Stands in for a nested attribute that is absent."""

    def get_attr(self, _name: str) -> None:
        return None


def nested(message: Any, *names: str) -> Any:
    """The attribute at the end of *names*; something that has no attributes when one is missing."""
    for name in names:
        message = message.get_attr(name) or _Nothing()
    return message


def kind(link: Any) -> str | None:
    """The kind of a link: "bridge", "tun", ..., None for hardware."""
    found: str | None = nested(link, "IFLA_LINKINFO").get_attr("IFLA_INFO_KIND")
    return found


def rule_of(message: Any, family: int) -> Rule:
    """The policy rule in a netlink message, with all that tells it from `iif X lookup T`."""
    selectors: dict[str, str | int] = {}
    for field, plain, mask in RULE_FIELDS:
        if message[field] & mask != plain:
            selectors[field] = message[field] & mask
    for name, value in message["attrs"]:
        known = name in ("FRA_TABLE", "FRA_PRIORITY", "FRA_IIFNAME", "FRA_PROTOCOL")
        unset = name == "FRA_SUPPRESS_PREFIXLEN" and value == NO_PREFIX_LENGTH
        if not known and not unset and isinstance(value, str | int):
            selectors[name.removeprefix("FRA_").lower()] = value
    # A rule of ours is known by its target alone; a foreign one keeps who made it, to be put back whole.
    protocol = message.get_attr("FRA_PROTOCOL")
    if protocol not in (None, RTPROT_STATIC):
        selectors["protocol"] = protocol
    return Rule(
        family=family,
        iif=message.get_attr("FRA_IIFNAME"),
        table=message.get_attr("FRA_TABLE") or message["table"],
        priority=message.get_attr("FRA_PRIORITY") or 0,
        selectors=as_selectors(selectors),
        want=True,
    )


def as_selectors(selectors: dict[str, str | int]) -> Selectors:
    """In one order, so that equal rules compare equal."""
    return tuple(sorted(selectors.items()))


def same_prefix(route: Any, prefix: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    """Whether *route* is for exactly *prefix*."""
    return bool(route["dst_len"] == prefix.prefixlen and route.get_attr("RTA_DST") == str(prefix.network_address))


def device_name(index: int) -> str:
    """The name of the device *index*; "#7" for one that is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"#{index}"


def family_of(address: str) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def sysctl(path: str) -> str | None:
    """The value of a sysctl, None when there is no such."""
    try:
        return (SYSCTL / path).read_text().strip()
    except OSError:
        return None


def setting(path: str, value: str) -> str:
    """What `sysctl -w` takes to set *path*; with slashes where a device's name has a dot."""
    return f"{path if '.' in path else path.replace('/', '.')}={value}"


def sysfs_of(link: Any) -> Path | None:
    """The device's directory in /sys, None when /sys shows another network namespace."""
    place = SYS_NET / link.get_attr("IFLA_IFNAME")
    try:
        same = (place / "ifindex").read_text().strip() == str(link["index"])
        return place if same and (place / "address").read_text().strip() == link.get_attr("IFLA_ADDRESS") else None
    except OSError:
        return None


def link_local(dev: str) -> str | None:
    """A link-local address of *dev* that may be sent from; None if it has none."""
    tentative, link_scope = 0x40, 0x20  # linux/if_addr.h, net/ipv6.h
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        address, _index, _length, scope, flags, name = line.split()
        if name == dev and int(scope, 16) == link_scope and not int(flags, 16) & tentative:
            return str(ipaddress.IPv6Address(bytes.fromhex(address)))
    return None
