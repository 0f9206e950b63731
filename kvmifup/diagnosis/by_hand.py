"""A change as the commands with which a person would make it by hand: ip, sysctl, bridge, nft or ovs-vsctl."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from kvmifup.core import bridgeport, rates
from kvmifup.core.ops import (
    PORT_OPTIONS,
    RTPROT_STATIC,
    Address,
    AddrGenMode,
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
from kvmifup.core.vlans import MAX_VLAN, PVID, UNTAGGED, flags_of, ids, ranges
from kvmifup.diagnosis import by_hand_sources
from kvmifup.node import filter_changes, limits, ovs
from kvmifup.node.filter_shape import GUARD, HERE
from kvmifup.runs.apply import Change

# The last filter takes its tables along, and so do the last sources.
LAST = f"nft list map {HERE} guests | grep -q goto || nft 'delete table {HERE};delete table {GUARD}'"
LAST_SOURCES = f"nft list table {by_hand_sources.HERE} | grep -q elements || nft 'delete table {by_hand_sources.HERE}'"
HANDLE, POLICE = f"{limits.OURS >> 16:x}", f"ingress pref {limits.PRIORITY}"


def lines(change: Change, made: set[str] | None = None) -> list[str]:
    """The commands that make *change*, quoted for a shell; none where no such command exists.

    Most are one line. One for nft that does several things has a line for each. What makes that which all NICs share is
    left out if *made* has it already, and else noted there.
    """
    match change.op:
        case LinkMaster() if change.op.want:
            return [shlex.join(words) for words in port(change.op, change.op.want, change.now)]
        case UplinkVlans():
            there, wanted = (dict.fromkeys(ids(str(value)), 0) for value in (change.now, change.op.want))
            return [shlex.join(words) for words in vlans(change.op.dev, there, wanted)]
        case Filter():
            found = nft(*filter_changes.by_hand(change.op, change.now), made)
            return found if change.op.want else [*found, LAST]
        case Sources() | UplinkGuard():
            found = nft(*by_hand_sources.commands(change.op, change.now), made)
            return found if change.op.want else [*found, LAST_SOURCES]
        case OvsPort():
            now = None if change.now is None else str(change.now)
            return [shlex.join(["ovs-vsctl", *ovs.transaction(change.op.dev, change.op.want, now)])]
        case Rate():
            return list(limit(change.op, change.now))
    words = argv(change.op)
    return [shlex.join(words)] if words else []


def nft(shared: Sequence[str], own: Sequence[str], made: set[str] | None) -> list[str]:
    """Two transactions: what NICs share, as `lines` says it, and what is a NIC's own."""
    found = [transaction(own)] if own else []
    if shared and (first := transaction(shared)) not in (made or ()):
        found.insert(0, first)
        if made is not None:
            made.add(first)
    return found


def transaction(words: Sequence[str]) -> str:
    """Several commands for nft as one for a shell. (A semicolon and a blank are between two of the shell's.)"""
    said = [one.replace("; ", ";") for one in words]
    return shlex.join(["nft", *said] if len(said) == 1 else ["nft", "\n  ".join(["", *said])])


def port(op: LinkMaster, want: str, now: Value) -> Iterator[list[str]]:
    """`ip` and `bridge` for a port of a bridge; it joins while it is down."""
    wanted, joins = flags_of(op.vlans), op.place(now) != op.place(want)
    if joins:
        yield ["ip", "link", "set", "dev", op.dev, "down"]
        yield ["ip", "link", "set", "dev", op.dev, "master", bridgeport.bridge_of(want)]
    if op.vlans:
        if joins:
            yield ["bridge", "vlan", "del", "dev", op.dev, "vid", f"1-{MAX_VLAN}"]
        yield from vlans(op.dev, {} if joins else flags_of(str(now)), wanted)
    there = {} if joins else bridgeport.options_of(str(now))
    for option, value in bridgeport.options_of(want).items():
        if there.get(option) != value:
            yield port_option(op.dev, option, value)
    if bridgeport.says_up(want):
        yield ["ip", "link", "set", "dev", op.dev, "up"]


def vlans(dev: str, there: Mapping[int, int], wanted: Mapping[int, int]) -> Iterator[list[str]]:
    """`bridge vlan` for the port *dev* that is in the VLANs *there*: first those that it lacks."""
    lacking = {vid: flags for vid, flags in wanted.items() if there.get(vid) != flags}
    for flags in sorted(set(lacking.values()), reverse=True):
        words = [word for word, flag in (("pvid", PVID), ("untagged", UNTAGGED)) if flags & flag]
        for first, last in ranges(vid for vid, how in lacking.items() if how == flags):
            yield ["bridge", "vlan", "add", "dev", dev, "vid", span(first, last), *words]
    for first, last in ranges(there.keys() - wanted.keys()):
        yield ["bridge", "vlan", "del", "dev", dev, "vid", span(first, last)]


def span(first: int, last: int) -> str:
    """A range as `bridge` takes it."""
    return str(first) if first == last else f"{first}-{last}"


def limit(op: Rate, now: Value) -> Iterator[str]:
    """`tc` for a limit; what others have made there is theirs to make again."""
    if op.want is None:
        what = "qdisc del dev {} root" if op.direction == rates.TO_GUEST else f"filter del dev {{}} {POLICE}"
        yield "tc " + what.format(op.dev)
    elif rates.is_limit(op.want):
        yield from (shaper if op.direction == rates.TO_GUEST else police)(op.dev, now, *rates.parts(op.want))


def shaper(dev: str, now: Value, rate: int, burst: int) -> Iterator[str]:
    """`tc` for a limit to the guest, where there is *now* another."""
    words = f"rate {rates.rate_text(rate)} burst {burst}b limit {rates.queue(rate, burst)}b"
    yield f"tc qdisc replace dev {dev} root handle {HANDLE}: {limits.SHAPER} {words}"
    if not rates.is_limit(str(now)) and limits.has_queue():
        yield f"tc qdisc replace dev {dev} parent {HANDLE}:1 {limits.QUEUE}"


def police(dev: str, now: Value, rate: int, burst: int) -> Iterator[str]:
    """`tc` for a limit from the guest, where there is *now* another."""
    yield f"tc filter del dev {dev} {POLICE}" if rates.is_limit(str(now)) else f"tc qdisc replace dev {dev} ingress"
    words = f"rate {rates.rate_text(rate)} burst {burst}b mtu {burst}b conform-exceed drop/continue"
    yield f"tc filter add dev {dev} {POLICE} {limits.FILTER} action police {words}"


def argv(op: Op) -> list[str]:
    """The command that makes *op* true; empty where no such command exists, as for an announcement."""
    match op:
        case LinkAddress() | BridgeAddress():
            return ["ip", "link", "set", "dev", op.dev, "address", op.want]
        case AddrGenMode():
            return ["ip", "link", "set", "dev", op.dev, "addrgenmode", op.say(op.want)]
        case Address():
            if op.want:
                return ["ip", "addr", "add", op.address, "nodad", "dev", op.dev]
            return ["ip", "addr", "flush", "to", op.address.partition("/")[0], "dev", op.dev]  # also if it is not there
        case LinkMtu():
            return ["ip", "link", "set", "dev", op.dev, "mtu", str(op.want)]
        case LinkMaster():
            return ["ip", "link", "set", "dev", op.dev, "nomaster"]
        case LinkUp():
            return ["ip", "link", "set", "dev", op.dev, op.say(op.want)]
        case PortOption():
            return port_option(op.dev, op.option, PORT_OPTIONS[op.option][2] if op.want is None else op.want)
        case PortForwarding():  # there is nothing to set: look until it forwards
            return ["bridge", "link", "show", "dev", op.dev]
        case Sysctl():
            return [] if op.want is None else ["sysctl", "-w", f"{op.path}={op.want}"]
        case Rule():
            return rule(op)
        case Neighbour():
            if op.want is None:
                return ["ip", "neigh", "del", op.address, "dev", op.dev]
            return ["ip", "neigh", "replace", op.address, "lladdr", op.want, "nud", "permanent", "dev", op.dev]
        case ProxyNeighbour():
            return ["ip", "neigh", "replace" if op.want else "del", "proxy", op.address, "dev", op.dev]
        case Route():
            return route(op)
        case Program():
            return program(op)
    return []


def port_option(dev: str, option: str, value: int) -> list[str]:
    """`bridge link`."""
    word = ["mcast_router", str(value)] if option == "multicast_router" else [option, "on" if value else "off"]
    return ["bridge", "link", "set", "dev", dev, *word]


def rule(op: Rule) -> list[str]:
    """`ip rule`. The protocol says who made it: for ours it is "static"."""
    verb = "add" if op.want else "del"
    target = ["priority", str(op.priority), "iif", op.iif, "lookup", str(op.table)]
    protocol = "static" if op.protocol == RTPROT_STATIC else str(op.protocol)
    return ["ip", f"-{op.family}", "rule", verb, *target, "protocol", protocol]


def route(op: Route) -> list[str]:
    """`ip route`."""
    if isinstance(op.want, str):  # what others have made; `ip` may have no words for it
        return []
    v6 = ":" in op.prefix
    # Before the route that a routing daemon may have, as the hook puts it.
    words = ["ip", "-6" if v6 else "-4", "route", "prepend" if op.want else "del", op.prefix, "dev", op.dev]
    words += ["table", str(op.table)]
    if op.want:
        words += ["proto", "static", *(["metric", "1"] if v6 else ["scope", "link"])]
    return words


def program(op: Program) -> list[str]:
    """An administrator's program; undoing its first phase undoes both."""
    if not op.want and op.phase == "post":
        return []
    environment = {**dict(op.environment), "KVM_IFUP_PHASE": op.phase if op.want else "down"}
    return ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), op.program]
