"""The closed set of things that can be done to a node, each naming its target and the value wanted.

An op is data: it can be compared, printed, stored in the journal and turned round. What it takes to
read or write the kernel's value for it is `kvmifup.kernel`'s business; which ops a NIC needs is
`kvmifup.phases`'. A value is a string, a number or a boolean, and None or False where absence is meant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

Value = str | int | bool | None
Selectors = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True)
class Op:
    """What all ops share; only the subclasses in `KINDS` exist.

    `outlives_tap`: the effect stays when the tap disappears, so somebody has to undo it.
    `undoable`: there is a value to go back to; an op that is not is never journalled.
    `after_change`: the op is only worth doing when an earlier one in the same run changed something.
    `waits`: doing it can take long.
    `readable`: the node can be asked for the value; where it cannot, the journal tells what was done.
    """

    kind: ClassVar[str]
    undoable: ClassVar[bool] = True
    after_change: ClassVar[bool] = False
    readable: ClassVar[bool] = True
    waits: ClassVar[bool] = False

    @property
    def outlives_tap(self) -> bool:
        """Whether the effect stays on the node when the tap is gone."""
        return False

    @property
    def shared(self) -> bool:
        """Whether several NICs may want this very value, so that the last one to leave puts it back."""
        return False

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What the op is about, without the value wanted: two ops with one key concern one thing."""
        return (self.kind, *(getattr(self, name) for name in field_names(self) if name not in _NOT_IDENTITY))

    @property
    def wanted(self) -> Value:
        """The value that makes a further run a no-op."""
        want: Value = getattr(self, "want")  # noqa: B009 (declared by each subclass with its own type)
        return want

    def before_us(self, found: Value) -> Value:
        """What to leave when the guest has gone, if *found* was there when it came."""
        return found

    def turned(self, want: Value) -> Op:
        """The same op with another value wanted: how an undo is expressed."""
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


def field_names(data: object) -> tuple[str, ...]:
    """The names of the fields of a dataclass, without the time that `dataclasses.fields` takes."""
    names: tuple[str, ...] = type(data).__match_args__  # type: ignore[attr-defined]
    return names


_NOT_IDENTITY = frozenset({"want", "timeout", "force"})


@dataclass(frozen=True)
class LinkAddress(Op):
    """The hardware address of *dev*."""

    kind = "link-address"
    dev: str
    want: str

    def subject(self) -> str:
        return f"{self.dev} MAC"


@dataclass(frozen=True)
class BridgeAddress(Op):
    """The hardware address of the bridge *dev*, pinned.

    A bridge whose address nobody set takes the lowest address among its ports
    (`br_stp_recalculate_bridge_id`), so one without ports would take the tap's, and all zeros when the
    tap leaves. Setting the address that it has stops that. It cannot be unset, and does no harm.
    """

    kind = "bridge-address"
    undoable = False
    dev: str
    want: str

    def subject(self) -> str:
        return f"{self.dev} MAC, pinned"


@dataclass(frozen=True)
class AddrGenMode(Op):
    """How *dev* makes its IPv6 link-local address: a number, IN6_ADDR_GEN_MODE_* of linux/if_link.h."""

    kind = "addr-gen-mode"
    dev: str
    want: int

    def subject(self) -> str:
        return f"{self.dev} addrgenmode"

    def say(self, value: Value) -> str:
        names = ("eui64", "none", "stable_secret", "random")
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else super().say(value)


@dataclass(frozen=True)
class LinkMtu(Op):
    """The MTU of *dev*, in bytes."""

    kind = "link-mtu"
    dev: str
    want: int

    def subject(self) -> str:
        return f"{self.dev} MTU"


@dataclass(frozen=True)
class LinkMaster(Op):
    """The bridge that *dev* is a port of; None for none."""

    kind = "link-master"
    dev: str
    want: str | None

    def subject(self) -> str:
        return f"{self.dev} bridge"

    def say(self, value: Value) -> str:
        return str(value or "none")


@dataclass(frozen=True)
class LinkUp(Op):
    """Whether *dev* is administratively up."""

    kind = "link-up"
    dev: str
    want: bool

    def subject(self) -> str:
        return f"{self.dev} state"

    def say(self, value: Value) -> str:
        return "up" if value else "down"


@dataclass(frozen=True)
class PortForwarding(Op):
    """The bridge port *dev* really forwards; doing it means waiting, at most *timeout* seconds."""

    kind = "port-forwarding"
    waits = True
    undoable = False
    dev: str
    timeout: float
    want: str = "forwarding"

    def subject(self) -> str:
        return f"{self.dev} port state"


@dataclass(frozen=True)
class Sysctl(Op):
    """`net.ipv{family}.{group}.{dev}.{name}`; *group* is conf or neigh. On an uplink it is shared."""

    kind = "sysctl"
    family: int
    group: str
    dev: str
    name: str
    on_uplink: bool
    want: str

    @property
    def outlives_tap(self) -> bool:
        return self.on_uplink

    @property
    def shared(self) -> bool:
        return self.on_uplink

    @property
    def path(self) -> str:
        """Below /proc/sys; with slashes, because a device's name may contain dots."""
        return f"net/ipv{self.family}/{self.group}/{self.dev}/{self.name}"

    def subject(self) -> str:
        return f"sysctl {self.path}"


@dataclass(frozen=True)
class Rule(Op):
    """The policy rule `iif TAP lookup TABLE`; *selectors* are further attributes of a foreign rule.

    It names the tap by name, outlives it, and binds again to the next tap of that name.
    """

    kind = "rule"
    family: int
    iif: str
    table: int
    priority: int
    selectors: Selectors
    want: bool

    @property
    def outlives_tap(self) -> bool:
        return True

    def subject(self) -> str:
        more = "".join(f" {name} {value}" for name, value in self.selectors)
        return f"rule v{self.family} {self.priority}: iif {self.iif}{more} lookup {self.table}"


@dataclass(frozen=True)
class Neighbour(Op):
    """The permanent neighbour entry *address* → MAC on *dev*; None when there is no permanent one."""

    kind = "neighbour"
    dev: str
    address: str
    want: str | None

    def subject(self) -> str:
        return f"neighbour {self.address} dev {self.dev}"


@dataclass(frozen=True)
class Route(Op):
    """The route to *prefix* out of *dev*, on link, in *table*."""

    kind = "route"
    prefix: str
    dev: str
    table: int
    want: bool

    def subject(self) -> str:
        return f"route {self.prefix} dev {self.dev} table {self.table}"


@dataclass(frozen=True)
class ProxyNeighbour(Op):
    """The entry that makes the node answer ARP or NDP for *address* on the uplink *dev*."""

    kind = "proxy-neighbour"
    dev: str
    address: str
    want: bool

    @property
    def outlives_tap(self) -> bool:
        return True

    @property
    def shared(self) -> bool:
        return True  # a guest's new tap needs it still when its old one is cleared up after

    def subject(self) -> str:
        return f"proxy neighbour {self.address} dev {self.dev}"


@dataclass(frozen=True)
class OvsPort(Op):
    """The Open vSwitch port *dev*: "BRIDGE" or "BRIDGE VLANS" in Ganeti's notation, None for no port.

    It is in Open vSwitch's database, outlives the tap, and takes the next tap of that name.
    """

    kind = "ovs-port"
    waits = True
    dev: str
    want: str | None

    @property
    def outlives_tap(self) -> bool:
        return True

    def before_us(self, _found: Value) -> Value:
        return None  # a port that was there before the guest was a dead guest's

    def subject(self) -> str:
        return f"Open vSwitch port {self.dev}"


@dataclass(frozen=True)
class Program(Op):
    """The administrator's *program* has been run for *phase*, pre or post, with *environment*.

    Undoing pre runs it with KVM_IFUP_PHASE=down, which undoes post as well. *timeout* is in seconds.
    """

    kind = "program"
    waits = True
    readable = False
    program: str
    phase: str
    environment: tuple[tuple[str, str], ...]
    timeout: float
    want: bool

    @property
    def outlives_tap(self) -> bool:
        return True

    def subject(self) -> str:
        return f"{self.program} {self.phase}"

    def say(self, value: Value) -> str:
        return "done" if value else "not done"


@dataclass(frozen=True)
class Announce(Op):
    """Tell the uplinks' neighbours where the addresses are: gratuitous ARP, unsolicited NA.

    *messages*: (uplink, address, source) each, where source is the IPv6 source address of an NA and the
    address itself for ARP. *force*: also when nothing changed.
    """

    kind = "announce"
    undoable = False
    after_change = True
    messages: tuple[tuple[str, str, str], ...]
    force: bool
    want: bool = True

    def subject(self) -> str:
        return "announce " + ", ".join(f"{address} on {dev}" for dev, address, _ in self.messages)

    def describe(self) -> str:
        return self.subject()


KINDS: dict[str, type[Op]] = {
    cls.kind: cls
    for cls in (
        LinkAddress,
        BridgeAddress,
        AddrGenMode,
        LinkMtu,
        LinkMaster,
        LinkUp,
        PortForwarding,
        Sysctl,
        Rule,
        Neighbour,
        Route,
        ProxyNeighbour,
        OvsPort,
        Program,
        Announce,
    )
}
