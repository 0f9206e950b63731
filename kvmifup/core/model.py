"""The frozen data that flows between the rooms: NIC, configuration, facts about the node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network

from kvmifup.core.ops import Rule

Prefix = IPv4Network | IPv6Network
Message = tuple[str, str, str]  # an announcement: uplink, address, source (as in kvmifup.core.ops.Announce)
# Sends the later rounds of an announcement: what, and whether it is still true.
Background = Callable[[Sequence[Message], Callable[[], bool]], None]

MODES = ("bridged", "routed", "openvswitch", "ext")
MAIN_TABLE = 254  # RT_TABLE_MAIN, linux/rtnetlink.h
LOCAL_TABLE = 255  # RT_TABLE_LOCAL


class Phase(IntEnum):
    """The moments of a guest's life on this node, in order; post includes pre."""

    DOWN = 0
    PRE = 1
    POST = 2


@dataclass(frozen=True)
class Nic:
    """One NIC of one guest, as its process manager described it; validated.

    *mac* is the guest's. *ip* holds host addresses as /32 and /128. *source* says where this was read.
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

    @property
    def label(self) -> str:
        """How messages name the NIC: "web1.example.com/0 (tap0)"."""
        if self.instance is None:
            return self.tap
        return f"{self.instance}{'' if self.index is None else f'/{self.index}'} ({self.tap})"

    @property
    def tap_mac(self) -> str:
        """The tap's own MAC: the same on every node, and never the lowest on a bridge."""
        return "fe" + self.mac[2:]


@dataclass(frozen=True)
class BridgedConfig:
    """`[bridged]`: *forwarding_timeout* is how many seconds a port may take to forward."""

    forwarding_timeout: float = 5.0


@dataclass(frozen=True)
class RoutedConfig:
    """`[routed]`; *uplinks* None means the devices of the default routes."""

    uplinks: tuple[str, ...] | None = None
    rule_priority: int = 10000
    rp_filter: str = "strict"


@dataclass(frozen=True)
class ExtNetwork:
    """`[ext.NAME]`: a NIC in mode ext with link NAME is wired in this mode, with this link."""

    mode: str
    link: str | None


@dataclass(frozen=True)
class ExtConfig:
    """`[ext]`: *timeout* is how many seconds a program may take; *networks* are the names that need none."""

    timeout: float = 30.0
    networks: tuple[tuple[str, ExtNetwork], ...] = ()


@dataclass(frozen=True)
class AgentConfig:
    """`[agent]`: for how many seconds it waits for a guest to arrive; whether it takes a guest's traffic off this
    node when another one announces the guest; after how many idle seconds it exits, 0 for never.
    """

    arrival_timeout: float = 3600.0
    withdraw: bool = True
    idle_exit: float = 300.0


@dataclass(frozen=True)
class Config:
    """The administrator's settings; the defaults are right for a plain node. Times are in seconds."""

    lock_timeout: float = 10.0
    bridged: BridgedConfig = BridgedConfig()
    routed: RoutedConfig = RoutedConfig()
    ext: ExtConfig = ExtConfig()
    agent: AgentConfig = AgentConfig()


@dataclass(frozen=True)
class Tap:
    """The tap as the kernel has it; *is_tap* is false for any other device of that name."""

    ifindex: int
    is_tap: bool


@dataclass(frozen=True)
class Bridge:
    """The bridge, Linux's or Open vSwitch's, that a NIC's `link` names. *forward_delay* is in seconds.

    *adopts*: the bridge would take over the tap's MAC (it has no other port and no address of its own).
    """

    is_bridge: bool
    up: bool
    mac: str
    mtu: int
    stp: bool
    forward_delay: float
    adopts: bool


@dataclass(frozen=True)
class Uplink:
    """One uplink for one address family (4 or 6).

    *arp* is false on a device that has no neighbours to resolve (point-to-point, tunnel).
    *mend* lists the sysctl settings that it takes for the node to forward what comes in there.
    *source* is the address that an NA is sent from there: its link-local one, None if it has none.
    """

    name: str
    family: int
    present: bool
    up: bool = False
    arp: bool = False
    mend: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class NodeFacts:
    """What a plan needs to know of the node, read once, before anything is touched.

    *table* is the number that `link` stands for, None when no such name is known. *rules* are all policy
    rules that name the tap. *taken* says of a prefix or address why it cannot be the guest's.
    *program* is what wires an ext NIC. *ipv6*: the kernel has IPv6 at all; *ipv6_mend*: the sysctl settings that
    it takes to have it on the tap.
    """

    tap: Tap | None
    bridge: Bridge | None = None
    table: int | None = MAIN_TABLE
    rules: tuple[Rule, ...] = ()
    uplinks: tuple[Uplink, ...] = ()
    taken: tuple[tuple[str, str], ...] = ()
    program: str | None = None
    ipv6: bool = True
    ipv6_mend: tuple[str, ...] = ()
