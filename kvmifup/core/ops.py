"""The ops: everything that can be done to a node. Each names its target and the value that it wants there.

An op is data: it can be compared, printed, stored in the journal, and turned into the op that undoes it.
`kvmifup.node.kernel` reads and writes the node's value for an op; `kvmifup.phases` decides which ops a NIC needs.
A value is a string, a number or a boolean; None and False mean that something is absent.

Large because the set of ops is closed, and is easier to see in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from operator import attrgetter
from typing import ClassVar

from kvmifup.core import bridgeport
from kvmifup.core.records import field_names, record
from kvmifup.core.text import listed
from kvmifup.core.vlans import ids, tagged

Value = str | int | bool | None
RTPROT_STATIC = 4  # linux/rtnetlink.h: the protocol of what we make

EVERYWHERE = "all"  # in the place of a device: a sysctl that counts for all of them


@record
class Op:
    """What all ops have in common; `KINDS` has all subclasses by their `kind`.

    `undoable`: there is a value to go back to. An op without one is never journalled.
    `after_change`: the op is done only if an earlier op of the same run has changed something that is not `private`.
    `readable`: the node can be asked for the value. If not, the journal tells what was done.
    `waits`: writing the value can take long.
    `moves`: it says where something is: in one `place`, or nowhere (None). That leaves where it is before anything else
    is changed, and comes to the new place in its turn; undone, it comes back when all else is as it was.
    `of_place`: it is true of the place where something is (`moves`), so it is put back when that is there again.
    `lost_with`: what takes the value away when it is done to the same device, as `disturbs` names it.
    `gone_with`: the kinds of ops that, when they are undone, undo this one as well.
    `restricts`: all that it does is to keep a guest from what it must not do. So it may come before all else, and for
    several guests at once.
    `leaves`: the value when the guest has gone, for what is about this guest alone. It does not matter who made it:
    it may have been another script, or an earlier run whose journal is lost. Empty: the value that we found.
    """

    kind: ClassVar[str]
    undoable: ClassVar[bool] = True
    after_change: ClassVar[bool] = False
    readable: ClassVar[bool] = True
    waits: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    of_place: ClassVar[bool] = False
    lost_with: ClassVar[frozenset[str]] = frozenset()
    gone_with: ClassVar[frozenset[str]] = frozenset()
    restricts: ClassVar[bool] = False
    leaves: ClassVar[tuple[Value, ...]] = ()

    @property
    def outlives_tap(self) -> bool:
        """Whether the effect stays on the node when the tap is gone, so that somebody has to undo it."""
        return False

    @property
    def shared(self) -> bool:
        """Whether several NICs may want the same value, so that it is put back only when the last of them leaves."""
        return False

    @property
    def private(self) -> bool:
        """Whether it is only between the guest and its node, and nothing changes for others who send to the guest."""
        return self.restricts

    @property
    def key(self) -> tuple[object, ...]:
        """What the op is about, without the value wanted: two ops with equal keys are about the same thing."""
        key: tuple[object, ...] = identity(self.__class__)(self)  # type: ignore[arg-type]
        return key

    @property
    def wanted(self) -> Value:
        """The value that the node is to have."""
        want: Value = getattr(self, "want")  # noqa: B009 (declared by each subclass with its own type)
        return want

    def place(self, value: Value) -> Value:
        """The place that *value* names, for an op that `moves`."""
        return value

    def disturbs(self, now: Value) -> frozenset[str]:
        """What writing the op does to its device, if the value there is *now*: the names that `lost_with` knows."""
        return frozenset({self.kind})

    def before_us(self, found: Value) -> Value:
        """The value to leave behind when the guest has gone, if *found* was there when it came."""
        return self.leaves[0] if self.leaves else found

    def left(self, prior: Value) -> Value:
        """The value once an op of `gone_with` has been undone, if *prior* was there before us."""
        return prior

    def turned(self, want: Value) -> Op:
        """The same op with *want* as the value wanted: this is how an undo is expressed."""
        return dataclasses.replace(self, want=want)  # type: ignore[call-arg]

    def subject(self) -> str:
        """What the op is about, for people: "tap0 MTU"."""
        raise NotImplementedError

    def say(self, value: Value) -> str:
        """A value of this op, for people."""
        if value is None or value is False:
            return "absent"
        return "present" if value is True else str(value)

    def describe(self) -> str:
        """The op in one line, without the value that is there now."""
        return f"{self.subject()}: {self.say(self.wanted)}"


@cache
def identity(kind: type[Op]) -> Callable[[Op], tuple[object, ...]]:
    """What takes the key from an op of that *kind*. (The key is not kept: an agent has thousands of ops.)"""
    said = (name for name in field_names(kind) if name not in {"want", "among", "timeout", "force"})
    return attrgetter("kind", *said)


DOWN = "down"  # what an op does to a device that it sets down for a moment


@record
class LinkAddress(Op):
    """The hardware address of *dev*."""

    kind = "link-address"
    dev: str
    want: str

    def subject(self) -> str:
        return f"{self.dev} MAC"


@record
class BridgeAddress(Op):
    """The hardware address of the bridge *dev*, set so that it does not change any more.

    A bridge whose address nobody has set takes the lowest address among its ports
    (`br_stp_recalculate_bridge_id`). One without ports would take the tap's, and all zeros when the tap leaves.
    To set the address that the bridge has prevents that. This cannot be undone, and does no harm.
    """

    kind = "bridge-address"
    undoable = False
    dev: str
    want: str

    def subject(self) -> str:
        return f"{self.dev} MAC, pinned"


@record
class AddrGenMode(Op):
    """How *dev* makes its IPv6 link-local address: IN6_ADDR_GEN_MODE_* of linux/if_link.h, a number.

    None while the device has no IPv6 at all, as with an MTU below 1280.
    """

    kind = "addr-gen-mode"
    dev: str
    want: int | None

    def subject(self) -> str:
        return f"{self.dev} addrgenmode"

    def say(self, value: Value) -> str:
        names = ("eui64", "none", "stable_secret", "random")
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else super().say(value)


@record
class Address(Op):
    """The IPv6 address *address*, with its prefix length, on *dev*."""

    kind = "address"
    gone_with = frozenset({"link-up"})  # addrconf_ifdown in net/ipv6/addrconf.c
    dev: str
    address: str
    want: bool

    def subject(self) -> str:
        return f"{self.dev} address {self.address}"


@record
class LinkMtu(Op):
    """The MTU of *dev*, in bytes."""

    kind = "link-mtu"
    dev: str
    want: int

    def subject(self) -> str:
        return f"{self.dev} MTU"


@record
class LinkMaster(Op):
    """The bridge that *dev* is a port of, None for none: as `kvmifup.core.bridgeport` has it.

    Wanted is "BRIDGE", or "BRIDGE VLANS" if the port has exactly these. Without VLANs they are the bridge's affair, or
    another's. What is found on another bridge, and so goes with it, is all said, to be put back.

    A device joins while it is down, and stays so: a port that joins is in the VLAN for new ports, and no option is in
    force. `LinkUp` comes when all is. Only a text that says everything sets the device up itself.

    It leaves first, or its MTU and MAC, when they are changed, would become those of the bridge that it is still on.
    """

    kind = "link-master"
    moves = True
    dev: str
    want: str | None

    @property
    def vlans(self) -> str:
        """The VLANs of the port; empty if they are not said."""
        return bridgeport.vlans_of(self.want or "")

    def place(self, value: Value) -> Value:
        return bridgeport.bridge_of(value) if isinstance(value, str) else value

    def disturbs(self, now: Value) -> frozenset[str]:
        if self.place(now) == self.place(self.want):
            return frozenset()
        return frozenset({self.kind, DOWN} if self.want else {self.kind})

    def subject(self) -> str:
        return f"{self.dev} bridge"

    def say(self, value: Value) -> str:
        return str(value or "none").removesuffix(f" {bridgeport.UP}")


@record
class UplinkVlans(Op):
    """Which of the VLANs *among* the port *dev* of *bridge* has, as text (`kvmifup.core.vlans`). NICs share them.

    What the uplink has beside them is not ours. Each NIC asks for its own; they are counted one by one.
    """

    kind = "uplink-vlans"
    outlives_tap = True
    shared = True
    bridge: str
    dev: str
    among: str
    want: str

    @cached_property
    def vids(self) -> frozenset[int]:
        """*among*, as numbers."""
        return ids(self.among)

    def of(self, vids: Iterable[int]) -> UplinkVlans:
        """The same for *vids* alone, all of them wanted."""
        text = tagged(vids)
        return dataclasses.replace(self, among=text, want=text)

    def subject(self) -> str:
        return f"{self.dev} VLANs"


@record
class Filter(Op):
    """What the guest behind the tap *dev* may send onto its bridge, as `kvmifup.core.filters` has it; None: anything.

    It is in nftables, by the name of the tap. So it stays when the tap goes, and then applies to the next one.
    """

    kind = "filter"
    outlives_tap = True
    restricts = True
    leaves = (None,)
    dev: str
    want: str | None

    def subject(self) -> str:
        return f"{self.dev} filter"

    def say(self, value: Value) -> str:
        if value is None:
            return "off"
        return " ".join(listed(word.split(","), between=",") for word in str(value).split(" "))


@record
class LinkUp(Op):
    """Whether *dev* is administratively up."""

    kind = "link-up"
    lost_with = frozenset({DOWN})
    dev: str
    want: bool

    def subject(self) -> str:
        return f"{self.dev} state"

    def say(self, value: Value) -> str:
        return "up" if value else "down"


@record
class PortForwarding(Op):
    """The state of the bridge port *dev*. Writing it means to wait for it, at most *timeout* seconds."""

    kind = "port-forwarding"
    waits = True
    lost_with = frozenset({"link-master"})  # a port of another bridge starts anew
    undoable = False
    dev: str
    timeout: float
    want: str = "forwarding"

    def subject(self) -> str:
        return f"{self.dev} port state"


# What a NIC can say of the port of its bridge: the kernel's numbers for false and true, and for a new port.
PORT_OPTIONS = {"isolated": (0, 1, 0), "hairpin": (0, 1, 0), "learning": (0, 1, 1), "multicast_router": (1, 2, 1)}


@record
class PortOption(Op):
    """The *option* (`PORT_OPTIONS`) of the bridge port *dev*, as the kernel's number; None while it is no port."""

    kind = "port-option"
    of_place = True
    lost_with = frozenset({"link-master"})  # a port of another bridge starts anew
    gone_with = frozenset({"link-master"})
    dev: str
    option: str
    want: int | None

    def left(self, prior: Value) -> Value:
        return None if prior is None else PORT_OPTIONS[self.option][2]

    def subject(self) -> str:
        return f"{self.dev} {self.option}"

    def say(self, value: Value) -> str:
        if value is None:
            return "absent"
        off, on, _ = PORT_OPTIONS[self.option]
        # With 1 the bridge finds a multicast router by itself; with 0 there is none.
        return {on: "on", off: "off"}.get(int(value), "never")


@record
class Rate(Op):
    """How much *dev* lets pass in a *direction*, to_guest or from_guest: "100mbit burst 128kb"; None for any amount."""

    kind = "rate"
    leaves = (None,)
    lost_with = frozenset({"ovs-port"})  # iface_configure_qos in Open vSwitch's vswitchd/bridge.c
    dev: str
    direction: str
    want: str | None

    def subject(self) -> str:
        return f"{self.dev} limit {self.direction.replace('_', ' ')}"

    def say(self, value: Value) -> str:
        return str(value or "none")


@record
class Sysctl(Op):
    """The sysctl `net.ipv{family}.{group}.{dev}.{name}`; *group* is conf or neigh. NICs share those of an uplink.

    None: the tap has no such sysctl, because it has no IPv6 at all.
    """

    kind = "sysctl"
    family: int
    group: str
    dev: str
    name: str
    on_uplink: bool
    want: str | None

    @property
    def outlives_tap(self) -> bool:
        return self.on_uplink

    @property
    def shared(self) -> bool:
        return self.on_uplink

    @property
    def private(self) -> bool:
        return not self.on_uplink

    @property
    def everywhere(self) -> bool:
        """Whether it is no device's, but counts for all of them."""
        return self.dev == EVERYWHERE

    @property
    def path(self) -> str:
        """The file below /proc/sys; with slashes, because a device's name may contain dots."""
        return f"net/ipv{self.family}/{self.group}/{self.dev}/{self.name}"

    def subject(self) -> str:
        return f"sysctl {self.path}"


@record
class Rule(Op):
    """The policy rule `iif TAP lookup TABLE`, which says nothing more; *protocol* (RTPROT_*) tells who has made it.

    A rule refers to the tap by its name. So it stays when the tap goes, and then applies to the next tap of that name.
    """

    kind = "rule"
    outlives_tap = True
    leaves = (False,)
    family: int
    iif: str
    table: int
    priority: int
    protocol: int
    want: bool

    def subject(self) -> str:
        return f"rule v{self.family} {self.priority}: iif {self.iif} lookup {self.table}"


@record
class Sources(Op):
    """The IPv6 addresses and prefixes from which the guest on *dev* may send: "strict 2001:db8::1"; None for any.

    Before them stands how: "strict", or "loose" if everything else to which there is a route may be its source, too.
    It refers to the tap by its name, so it stays when the tap goes.
    """

    kind = "sources"
    outlives_tap = True
    restricts = True
    leaves = (None,)
    dev: str
    want: str | None

    def subject(self) -> str:
        return f"{self.dev} IPv6 sources"

    def say(self, value: Value) -> str:
        if value is None:
            return "any"
        how, *sources = str(value).split()
        return " ".join((how, *([listed(sources, between=" ")] if sources else [])))


@record
class UplinkGuard(Op):
    """Whether what comes in on the uplink *dev* from the guest's *prefix* is dropped."""

    kind = "uplink-guard"
    outlives_tap = True
    shared = True  # as with a proxy neighbour
    leaves = (False,)
    dev: str
    prefix: str
    want: bool

    def subject(self) -> str:
        return f"guard against {self.prefix} on {self.dev}"


@record
class Neighbour(Op):
    """The MAC in the permanent neighbour entry for *address* on *dev*; None for no permanent entry."""

    kind = "neighbour"
    leaves = (None,)
    lost_with = frozenset({"link-address"})  # neigh_changeaddr in net/core/neighbour.c
    dev: str
    address: str
    want: str | None

    def subject(self) -> str:
        return f"neighbour {self.address} dev {self.dev}"


@record
class Route(Op):
    """The route in *table* to *prefix* out of *dev*, without a next hop, and before all others to *prefix*.

    A text says what others have made out of *dev*, so that it can be put back as it was (`Kernel.read`).
    """

    kind = "route"
    leaves = (False,)
    prefix: str
    dev: str
    table: int
    want: bool | str

    def subject(self) -> str:
        return f"route {self.prefix} dev {self.dev} table {self.table}"


@record
class ProxyNeighbour(Op):
    """The proxy neighbour entry, which makes the node answer ARP or NDP for *address* on the uplink *dev*."""

    kind = "proxy-neighbour"
    outlives_tap = True
    shared = True  # a guest's new tap may need the entry when its old tap is cleared up after
    leaves = (False,)
    dev: str
    address: str
    want: bool

    def subject(self) -> str:
        return f"proxy neighbour {self.address} dev {self.dev}"


@record
class OvsPort(Op):
    """The Open vSwitch port *dev*, as `kvmifup.core.ovsport` has it: "BRIDGE VLANS NAME=VALUE"; None for no port.

    The port is in Open vSwitch's database. So it stays when the tap goes, and takes the next tap of that name.
    """

    kind = "ovs-port"
    outlives_tap = True
    leaves = (None,)
    waits = True
    dev: str
    want: str | None

    def subject(self) -> str:
        return f"Open vSwitch port {self.dev}"


@record
class Program(Op):
    """Whether the administrator's *program* has been run for *phase*, pre or post, with *environment*.

    To undo pre, the program is run with KVM_IFUP_PHASE=down, which undoes post as well. *timeout* is in seconds.
    """

    kind = "program"
    outlives_tap = True
    waits = True
    readable = False
    program: str
    phase: str
    environment: tuple[tuple[str, str], ...]
    timeout: float
    want: bool

    def subject(self) -> str:
        return f"{self.program} {self.phase}"

    def say(self, value: Value) -> str:
        return "done" if value else "not done"


@record
class Announce(Op):
    """Tell the uplinks' neighbours where addresses are now, by gratuitous ARP and unsolicited NA.

    Each of *messages* is (uplink, address, how). That is the source address of an NA; for ARP it is the address itself.
    Or it is "?" and a gateway, which is asked for in the guest's name: some routers ignore what they have not asked
    for, but take the sender's MAC out of a question. *force*: also if nothing has changed.
    """

    kind = "announce"
    undoable = False
    after_change = True
    messages: tuple[tuple[str, str, str], ...]
    force: bool
    want: bool = True

    def subject(self) -> str:
        return "announce " + listed(list(dict.fromkeys(f"{address} on {dev}" for dev, address, _ in self.messages)))

    def describe(self) -> str:
        return self.subject()


KINDS: dict[str, type[Op]] = {
    cls.kind: cls
    for cls in (
        LinkAddress,
        BridgeAddress,
        AddrGenMode,
        Address,
        LinkMtu,
        LinkMaster,
        UplinkVlans,
        Filter,
        LinkUp,
        PortOption,
        PortForwarding,
        Rate,
        Sysctl,
        Rule,
        Sources,
        UplinkGuard,
        Neighbour,
        Route,
        ProxyNeighbour,
        OvsPort,
        Program,
        Announce,
    )
}
