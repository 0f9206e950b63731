"""An op as the command with which a person would do it by hand: ip, sysctl, bridge or ovs-vsctl."""

from __future__ import annotations

import shlex

from kvmifup.core.ops import (
    RTPROT_STATIC,
    Address,
    AddrGenMode,
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
)
from kvmifup.node import ovs


def line(op: Op) -> str | None:
    """The command line that makes *op* true, quoted for a shell; None where no such command exists."""
    words = argv(op)
    return shlex.join(words) if words else None


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
            return ["ip", "link", "set", "dev", op.dev, *(("master", op.want) if op.want else ("nomaster",))]
        case LinkUp():
            return ["ip", "link", "set", "dev", op.dev, op.say(op.want)]
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
        case OvsPort():
            return ["ovs-vsctl", *ovs.transaction(op.dev, op.want)]
        case Program():
            return program(op)
    return []


def rule(op: Rule) -> list[str]:
    """`ip rule`. The protocol says who made it: for ours it is "static"."""
    verb = "add" if op.want else "del"
    target = ["priority", str(op.priority), "iif", op.iif, "lookup", str(op.table)]
    protocol = "static" if op.protocol == RTPROT_STATIC else str(op.protocol)
    return ["ip", f"-{op.family}", "rule", verb, *target, "protocol", protocol]


def route(op: Route) -> list[str]:
    """`ip route`."""
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
