"""The frozen data that flows between the rooms: NIC, configuration, facts about the node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from enum import IntEnum
from functools import cached_property
from ipaddress import IPv4Network, IPv6Address, IPv6Network

from kvmifup.core.ops import Rule
from kvmifup.core.rates import Limits
from kvmifup.core.records import record

Prefix = IPv4Network | IPv6Network
Message = tuple[str, str, str]  # an announcement: uplink, address, and how (as in kvmifup.core.ops.Announce)
ASK = "?"  # how: a question to the gateway whose address follows
# Sends an announcement's later rounds: the messages, and a function that says whether they are still true.
Background = Callable[[Sequence[Message], Callable[[], bool]], None]

MODES = ("bridged", "routed", "openvswitch", "ext")
MAIN_TABLE = 254  # RT_TABLE_MAIN, linux/rtnetlink.h
ENVIRONMENT, RUNTIME = "the environment", ".runtime"  # where Ganeti's NICs are described: there, or in such a file
LOCAL_TABLE = 255  # RT_TABLE_LOCAL


# The tap of a NIC that has none yet. No device can have this name, because the kernel keeps under it the settings that
# a new device gets (`sysctl_dev_name_is_allowed` in net/ipv4/devinet.c).
NOT_YET = "default"


class Phase(IntEnum):
    """How far a guest has come on this node, in order; POST includes PRE."""

    DOWN = 0
    PRE = 1
    POST = 2


@record
class Nic:
    """One NIC of one guest, as its process manager described it, and validated.

    *mac* is the guest's. *ip* has host addresses as /32 and /128. *source* says where the NIC was read from.
    *given* is what else Ganeti says of an ext NIC, for the administrator's program: its names, and values.
    *iface_id* is the NIC's name in an OVN network.
    *to_ask*: *ip* may be newer or older than the guest, so it is asked what it has before anything is announced.
    Those from *isolated* to *multicast_router* are options of its port on a bridge. *filter* is what the guest may
    send, *allow_mac* are MACs that are its own beside *mac*, *rate* limits what goes to and from it. None of all these:
    the configuration says, or nobody.
    """

    tap: str
    mac: str
    mode: str
    link: str | None = None
    ip: tuple[Prefix, ...] = ()
    vlan: str | None = None
    incoming: bool = False
    instance: str | None = None
    index: int | None = None
    source: str = ""
    isolated: bool | None = None
    hairpin: bool | None = None
    learning: bool | None = None
    multicast_router: bool | None = None
    given: tuple[tuple[str, str], ...] = ()
    to_ask: bool = False
    iface_id: str | None = None
    filter: str | None = None
    allow_mac: tuple[str, ...] | None = None
    rate: Limits | None = None

    @property
    def by_ganeti(self) -> bool:
        """Whether Ganeti describes it: such a NIC inherits what its mode has no use for, and may lack addresses."""
        return self.source == ENVIRONMENT or self.source.endswith(RUNTIME)

    @cached_property
    def prefixes(self) -> frozenset[Prefix]:
        """*ip*, to look one up: it may be one of thousands."""
        return frozenset(self.ip)

    @property
    def networks(self) -> tuple[Prefix, ...]:
        """Those of *ip* that are more than a single address."""
        return tuple(prefix for prefix in self.ip if prefix.prefixlen < prefix.max_prefixlen)

    def shares(self, other: Nic) -> Prefix | None:
        """The first of *ip* that overlaps with one of *other*'s, if both are routed; None if none does."""
        if self.mode != "routed" or other.mode != "routed":
            return None
        wide = ((mine, theirs) for theirs in other.networks for mine in self.ip)
        narrow = ((mine, theirs) for mine in self.networks for theirs in other.ip)
        same = next((prefix for prefix in self.ip if prefix in other.prefixes), None)
        return same or next((mine for mine, theirs in (*wide, *narrow) if overlap(mine, theirs)), None)

    @property
    def on_uplinks(self) -> bool:
        """Whether it needs something of an uplink, which it shares with other NICs."""
        return self.mode == "routed" or (self.mode == "bridged" and self.vlan is not None)

    @property
    def label(self) -> str:
        """How messages name the NIC: "web1.example.com/0 (tap0)"."""
        if self.instance is None:
            return self.tap
        tap = "" if self.tap == NOT_YET else f" ({self.tap})"
        return f"{self.instance}{'' if self.index is None else f'/{self.index}'}{tap}"

    @property
    def tap_mac(self) -> str:
        """The tap's own MAC: the same on every node, and higher than other ports', so that no bridge takes it over."""
        return "fe" + self.mac[2:]

    @property
    def gateway(self) -> str:
        """The tap's link-local address, by its MAC: the gateway of a routed guest with IPv6."""
        return link_local_of(self.tap_mac)


def link_local_of(mac: str) -> str:
    """The link-local address that *mac* gives."""
    return eui64(b"\xfe\x80" + bytes(6), mac)


def eui64(prefix: bytes, mac: str) -> str:
    """The address that *mac* gives below the eight bytes of *prefix* (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return str(IPv6Address(prefix + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]))


def overlap(one: Prefix, other: Prefix) -> bool:
    """Whether an address is in both."""
    if one.version != other.version:
        return False
    longer, shorter = sorted((one, other), key=lambda prefix: prefix.prefixlen, reverse=True)
    return int(longer.network_address) & int(shorter.netmask) == int(shorter.network_address)


@record
class TapConfig:
    """What is set for taps of each mode, as in `Nic`; `[openvswitch]` has nothing else."""

    _: KW_ONLY
    rate: Limits | None = None


@record
class PortConfig(TapConfig):
    """What is set for the ports of bridges, as in `Nic`."""

    _: KW_ONLY
    filter: str | None = None
    allow_mac: tuple[str, ...] | None = None
    isolated: bool | None = None
    hairpin: bool | None = None
    learning: bool | None = None
    multicast_router: bool | None = None


@record
class BridgedConfig(PortConfig):
    """`[bridged]`: a port may take *forwarding_timeout* seconds until it forwards."""

    forwarding_timeout: float = 5.0


@record
class LinkConfig(PortConfig):
    """`[link.NAME]`, for NICs with this link; *uplinks* None means those that are found among the bridge's ports."""

    uplinks: tuple[str, ...] | None = None


@record
class RoutedConfig(TapConfig):
    """`[routed]`; *uplinks* None means the devices of the default routes.

    *rp_filter* None: nobody has asked for it. *guard_uplinks*: what comes in on an uplink from a guest's address is
    dropped.
    """

    uplinks: tuple[str, ...] | None = None
    rule_priority: int = 10000
    rp_filter: str | None = None
    guard_uplinks: bool = False

    @property
    def reverse_path(self) -> str:
        """*rp_filter*, or what it is by default."""
        return self.rp_filter or "strict"


@record
class ExtNetwork:
    """`[ext.NAME]`: a NIC in mode ext with link NAME is wired in this mode, with this link."""

    mode: str
    link: str | None


@record
class ExtConfig:
    """`[ext]`: a program may take *timeout* seconds; *networks* are those that are wired without a program."""

    timeout: float = 30.0
    networks: tuple[tuple[str, ExtNetwork], ...] = ()


@record
class AgentConfig:
    """`[agent]`: it waits *arrival_timeout* seconds for a guest, and exits after *idle_exit* idle seconds, 0 for never.

    *withdraw*: it removes a guest's route and proxy entries when another node announces the guest.
    *mend*: it puts back what the node has lost of what is wired.
    """

    arrival_timeout: float = 3600.0
    withdraw: bool = True
    mend: bool = True
    idle_exit: float = 300.0


@record
class Config:
    """The administrator's settings; the defaults are right for a plain node. Times are in seconds."""

    lock_timeout: float = 10.0
    bridged: BridgedConfig = BridgedConfig()
    routed: RoutedConfig = RoutedConfig()
    openvswitch: TapConfig = TapConfig()
    ext: ExtConfig = ExtConfig()
    agent: AgentConfig = AgentConfig()
    link: tuple[tuple[str, LinkConfig], ...] = ()

    def of_link(self, name: str | None) -> LinkConfig:
        """What is set for NICs with the link *name*."""
        return dict(self.link).get(name or "", LinkConfig())


@record
class Tap:
    """The device with the tap's name; *is_tap* is false if it is not a tap. *mtu* is in bytes.

    *addresses* are its IPv6 ones, with their prefix lengths. *idle*: it is up, and nobody has opened it. It gets its
    link-local address when somebody does.
    """

    ifindex: int
    is_tap: bool
    mtu: int = 1500
    addresses: tuple[str, ...] = ()
    idle: bool = False


@record
class Bridge:
    """The bridge, Linux's or Open vSwitch's, that a NIC's `link` names. *forward_delay* is in seconds, *mtu* in bytes.

    *adopts*: the bridge would take over the tap's MAC, because it has no MAC of its own and no port with a lower one.
    *name* is the device's, if `link` is an alternative one.
    *is_bridge*: it is a bridge, and not another device of that name. *up*: ports of it work.
    *part_of*: the VLAN of another bridge that it stands for: "ovs0 .300", as `OvsPort` has it.
    *filters*: it keeps VLANs apart. *new_port* are the VLANs of a port that has just joined (`kvmifup.core.vlans`).
    *trunks* are the ports on which the VLANs of its guests leave the node; they are looked for only if a NIC has VLANs.
    *keeps*: the port's VLANs are ours, also if the NIC has none any more.
    *snoops*: it sends multicast only to those who have asked for it.
    """

    is_bridge: bool
    up: bool
    mac: str
    mtu: int
    stp: bool
    forward_delay: float
    adopts: bool
    part_of: str | None = None
    name: str | None = None
    filters: bool = False
    new_port: str = ""
    trunks: tuple[Trunk, ...] = ()
    keeps: bool = False
    snoops: bool = False


@record
class Trunk:
    """A port of a bridge that leads to other nodes. *used* has the VLANs of devices on it, as text: "eth0.100".

    *is_port* and *is_tap* are what it is in truth, if somebody has configured it.
    """

    name: str
    is_port: bool = True
    is_tap: bool = False
    used: tuple[tuple[int, str], ...] = ()


@record
class Uplink:
    """One uplink for one address family (4 or 6).

    *arp* is false on a device that has no neighbours to resolve (point-to-point, tunnel).
    *is_tap*: it is a tap. Its other end is a guest, or a virtual private network: never an uplink.
    *mend* lists the sysctl settings that are missing for the node to forward what comes in there.
    *source* is the uplink's link-local address, from which an NA is sent; None if it has none, and for IPv4.
    *gateways* are the addresses, of this family, of the next hops of default routes there.
    """

    name: str
    family: int
    present: bool
    up: bool = False
    arp: bool = False
    is_tap: bool = False
    mend: tuple[str, ...] = ()
    source: str | None = None
    gateways: tuple[str, ...] = ()


@record
class NodeFacts:
    """What a plan needs to know of the node, read once, before anything is touched.

    *table* is the number that `link` stands for, None if no such name is known. *rules* are the policy
    rules that lead what comes from the tap to a table, and say nothing more. *taken* has each address or prefix that
    cannot be the guest's, and why. *program* is the path of the program that wires an ext NIC.
    *port* is the Open vSwitch port of the tap's name. *filtered*: our table of filters has something of that name;
    *judged*: that of sources has.
    *unguarded* says why sources cannot be judged by nftables, None if they can.
    *ipv6*: the kernel has IPv6 at all. *ipv6_mend* lists the sysctl settings that are missing for the tap to have IPv6.
    """

    tap: Tap | None
    bridge: Bridge | None = None
    table: int | None = MAIN_TABLE
    rules: tuple[Rule, ...] = ()
    uplinks: tuple[Uplink, ...] = ()
    taken: tuple[tuple[str, str], ...] = ()
    program: str | None = None
    port: str | None = None
    filtered: bool = False
    judged: bool = False
    unguarded: str | None = None
    ipv6: bool = True
    ipv6_mend: tuple[str, ...] = ()
