"""A node in memory, in the place of `kvmifup.node.kernel.Kernel`; it fails, or dies, where a test says so."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvmifup.core.errors import VanishedError
from kvmifup.core.model import MAIN_TABLE, Bridge, Config, Nic, NodeFacts, Tap, Uplink
from kvmifup.core.ops import (
    Address,
    AddrGenMode,
    BridgeAddress,
    LinkAddress,
    LinkMaster,
    LinkMtu,
    LinkUp,
    Op,
    PortForwarding,
    Program,
    ProxyNeighbour,
    Route,
    Rule,
    Sysctl,
    UplinkGuard,
    UplinkVlans,
    Value,
)
from kvmifup.core.vlans import NONE, ids, tagged
from kvmifup.inputs import tables
from kvmifup.runs.draft import Draft
from kvmifup.runs.store import Store

from .samples import BRIDGE, ETH0_4, ETH0_6

Key = tuple[object, ...]


def untouched(op: Op) -> Value:
    """The value that a fresh node has for *op*."""
    match op:
        case LinkAddress():
            return "3e:00:00:00:00:01"
        case BridgeAddress():
            return "not pinned"
        case AddrGenMode():
            return 0
        case LinkMtu():
            return 1500
        case Sysctl():
            return "80" if op.group == "neigh" else "0"
        case Address() | LinkUp() | Rule() | Route() | ProxyNeighbour() | Program() | UplinkGuard():
            return False
        case UplinkVlans():
            return NONE
        case _:
            return None


class Killed(BaseException):
    """Stands in for kill -9: from here on the run reaches neither the node nor the disk."""


class MemoryNode:
    """Op keys to values, without those that are as on a fresh node; so two nodes in one state are equal.

    `before` and `after` are called with the number of the write, counted from 0, around its effect.
    """

    def __init__(self) -> None:
        self.values: dict[Key, Value] = {}
        self.known: dict[Key, Op] = {}
        self.writes: list[Op] = []  # those attempted
        self.reads: list[Op] = []
        self.together: list[list[Op]] = []  # those that were written at once
        self.before: Callable[[int], None] = lambda _number: None
        self.after: Callable[[int], None] = lambda _number: None
        self.absent: set[str] = set()  # devices

    def read(self, op: Op) -> Value:
        self.reads.append(op)
        self._need_device(op)
        if not op.readable:
            return "unknown"
        if isinstance(op, PortForwarding):
            return op.want if self.read(LinkUp(op.dev, True)) else "down"
        found = self.values.get(op.key, untouched(op))
        if isinstance(op, UplinkVlans):
            return tagged(op.vids & ids(str(found)))
        return op.want if isinstance(op, LinkMaster) and op.want == op.place(found) else found

    def write(self, op: Op) -> None:
        number = len(self.writes)
        self.writes.append(op)
        self.before(number)
        self._need_device(op)
        if not (op.after_change or isinstance(op, PortForwarding)):
            self.put(op)
        self.after(number)

    def write_all(self, ops: Sequence[Op]) -> None:
        self.together.append(list(ops))
        for op in ops:
            self.write(op)

    def put(self, op: Op) -> None:
        """Make *op* true by other hands."""
        self.known[op.key] = op
        found = self.values.pop(op.key, None)
        if isinstance(op, UplinkVlans):
            op = op.of(ids(str(found)) - op.vids | ids(op.want))
        if isinstance(op, LinkMaster) and op.want and not op.vlans:
            op = op.turned(f"{op.want} .1")  # as the kernel does with a new port
        if op.wanted != untouched(op):
            self.values[op.key] = op.wanted

    def of(self, kind: type[Op]) -> list[Op]:
        """The ops of *kind* that are true now."""
        return [self.known[key].turned(value) for key, value in self.values.items() if key[0] == kind.kind]

    def undoable(self) -> dict[Key, Value]:
        """The values that there is a way back from."""
        return {key: value for key, value in self.values.items() if self.known[key].undoable}

    def _need_device(self, op: Op) -> None:
        if getattr(op, "dev", None) in self.absent:
            raise VanishedError(f"{op.subject()}: the device is not there", errno=errno.ENODEV)


class FakeKernel(MemoryNode):
    """All of `Kernel` that a run uses. Uplinks are shared by all NICs, as on a node."""

    def __init__(self, *taps: str) -> None:
        super().__init__()
        self.indexes = {tap: 7 + number for number, tap in enumerate(taps or ("tap0",))}
        self.uplinks: tuple[Uplink, ...] = (ETH0_4, ETH0_6)
        self.seen = True  # whether a default route tells the uplinks
        self.bridges: dict[str, Bridge] = {"br0": BRIDGE, "ovs0": BRIDGE}

    def sign_of(self, tap: str) -> str:
        return ""

    def facts(self, nic: Nic, config: Config) -> NodeFacts:
        families = {prefix.version for prefix in nic.ip}
        names = config.routed.uplinks
        return NodeFacts(
            tap=Tap(self.indexes[nic.tap], is_tap=True) if nic.tap in self.indexes else None,
            bridge=self.bridges.get(nic.link or "") if nic.mode in ("bridged", "openvswitch") else None,
            program=f"/ext/{nic.link}" if nic.mode == "ext" else None,
            table=MAIN_TABLE if nic.link is None else tables.number(nic.link, ()),
            rules=tuple(rule for rule in self.of(Rule) if isinstance(rule, Rule) and rule.iif == nic.tap),
            uplinks=tuple(
                u for u in self.uplinks if u.family in families and (self.seen if names is None else u.name in names)
            ),
        )

    def ifindex(self, dev: str) -> int | None:
        return self.indexes.get(dev)

    def device(self, index: int) -> str | None:
        return next((dev for dev, one in self.indexes.items() if one == index), None)

    def refresh(self) -> None:
        """A test that changes the node between two reads sees it at once."""

    def close(self) -> None:
        """There is no socket."""

    def setting(self, path: str) -> str | None:
        """Nobody has set anything."""
        return None

    def gateway(self, family: int, dev: str) -> str | None:
        """There is nobody on the uplinks."""
        return None

    def addresses(self, dev: str) -> list[str]:
        """The node has none."""
        return []

    def vlans(self, bridge: str) -> tuple[bool, int]:
        """No bridge filters."""
        return False, 0

    def remove_tap(self, tap: str) -> None:
        """The guest's QEMU has gone: the tap, and all that was on it."""
        del self.indexes[tap]
        for key in [key for key in self.values if getattr(self.known[key], "dev", None) == tap]:
            del self.values[key]

    def replace_tap(self, tap: str) -> None:
        """The next guest got a tap of the same name."""
        self.remove_tap(tap)
        self.indexes[tap] = 1000 + len(self.writes)

    def rename(self, old: str, new: str) -> None:
        """Somebody calls an uplink by another name; what is on it stays."""
        self.indexes[new] = self.indexes.pop(old)
        self.uplinks = tuple(replace(u, name=new if u.name == old else u.name) for u in self.uplinks)
        self.absent.add(old)
        for key in [key for key in self.values if getattr(self.known[key], "dev", None) == old]:
            op = replace(self.known[key], dev=new)  # type: ignore[call-arg]
            self.known[op.key], self.values[op.key] = op, self.values.pop(key)

    def remove_uplink(self, name: str) -> None:
        """Somebody unplugged it."""
        self.uplinks = tuple(replace(u, present=u.name != name and u.present) for u in self.uplinks)
        self.absent.add(name)
        for key in [key for key in self.values if getattr(self.known[key], "dev", None) == name]:
            del self.values[key]


class FailingStore(Store):
    """A `Store` that calls `before` and `after` with the number of each change of the disk, around it."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.changes = 0
        self.before: Callable[[int], None] = lambda _number: None
        self.after: Callable[[int], None] = lambda _number: None

    def publish(self, draft: Draft) -> None:
        self._around(lambda: Store.publish(self, draft))

    def delete(self, tap: str) -> None:
        self._around(lambda: Store.delete(self, tap))

    def _around(self, change: Callable[[], None]) -> None:
        number = self.changes
        self.changes += 1
        self.before(number)
        change()
        self.after(number)


def on_disk(run_dir: Path) -> dict[str, bytes]:
    """What the state directory holds; temporary files of a killed run do not count."""
    return {path.name: path.read_bytes() for path in (run_dir / "state").glob("*") if path.suffix != ".new"}


def identity(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every journal: what changes when it is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (run_dir / "state").glob("*")}
