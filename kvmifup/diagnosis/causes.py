"""Why something differs from what a NIC's phase wants: what is known, and else the most likely cause."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from kvmifup.core.errors import KvmIfupError
from kvmifup.core.model import Nic
from kvmifup.core.ops import (
    Address,
    AddrGenMode,
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
    ProxyNeighbour,
    Rate,
    Route,
    Rule,
    Sources,
    Sysctl,
    UplinkGuard,
    UplinkVlans,
)
from kvmifup.diagnosis.nics import Known
from kvmifup.runs import planning
from kvmifup.runs.apply import Change
from kvmifup.runs.journal import Journal
from kvmifup.runs.session import Session
from kvmifup.tell import render

RP_FILTER_NAMES = {"0": "off", "1": "strict", "2": "loose"}
PORT_OPTION_LOST: dict[tuple[str, int | None], str] = {  # by the value that is wanted
    ("isolated", 1): "somebody has set it: the guest and the others that are isolated on its bridge reach each other",
    ("isolated", 0): "somebody has set it: the guest does not reach the others that are isolated on its bridge",
    ("hairpin", 1): "somebody has set it: what comes from this port is not sent back to it",
    ("learning", 1): "somebody has set it: the bridge sends what is for the guest to all its ports",
    ("learning", 0): "somebody has set it: the guest can have the bridge send it what is for others",
    ("multicast_router", 2): "somebody has set it: a guest that has just come gets no IPv6 neighbour solicitations",
}
NOT_COMPARED = ("source", "incoming", "to_ask")  # of a NIC: what does not change how it is wired


def described_otherwise(nic: Nic, before: Nic) -> list[str]:
    """What *nic* says otherwise than *before*, with both values."""
    return [
        f"{one.name} {said(getattr(before, one.name))} -> {said(getattr(nic, one.name))}"
        for one in fields(Nic)
        if one.name not in NOT_COMPARED and getattr(nic, one.name) != getattr(before, one.name)
    ]


def said(value: object) -> str:
    """A value of a NIC for people."""
    if isinstance(value, tuple):
        return ", ".join(map(word, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)


def word(one: object) -> str:
    """A part of such a value."""
    if isinstance(one, tuple):
        return " ".join(one)
    return one if isinstance(one, str) else render.short(one)  # type: ignore[arg-type]  # an address


def wanted_before(one: Known, session: Session) -> Collection[Op]:
    """The ops that the phase of *one* wanted as long as its NIC was described as its journal has it."""
    assert one.journal is not None
    try:
        plan = planning.plan(one.phase, one.journal.nic, one.journal, session)
    except KvmIfupError:
        return ()  # it could not be wired so now: nobody knows
    return {change.op for change in plan.changes}


def cause(change: Change, missing: Collection[type[Op]], journal: Journal, before: Collection[Op] | None) -> str:
    """The likely cause of one difference, or what it leads to.

    *missing* are the kinds of all that differ. *before* are the ops that were wanted before the NIC was described
    otherwise, None if it was not.
    """
    if before is not None and change.op not in before:
        return "because the NIC is described otherwise"
    entry = journal.prior(change.op.key)
    if entry is None and journal.earlier and not isinstance(change.op, LinkMaster | PortForwarding):
        return "an earlier version of kvm-ifup has wired it, and may not have done this"
    if entry and change.now == entry.op.wanted:  # it is as the last run has made it: what is wanted has changed
        if isinstance(change.op, LinkMtu):
            return "the bridge's has changed since, so that it is the smaller one of the two that counts"
        if isinstance(change.op, Sysctl):
            return "the configuration has changed since, or kvm-ifup itself"
    return why(change, missing, journal.nic.tap)


def why(change: Change, missing: Collection[type[Op]], tap: str) -> str:
    """What somebody has done to the node, if nothing that it is described by has changed."""
    down, unplugged = LinkUp in missing, LinkMaster in missing
    went = "it went when the tap went down"
    match change.op:
        case LinkMaster(want=None):
            bridge = change.op.place(change.now)
            return f"somebody has put it on the bridge {bridge}: what comes in on a bridge port is not routed"
        case UplinkVlans():
            return "something has taken it out of them: a restarted network does that. Nobody reaches the guest there"
        case LinkMaster():
            if change.op.place(change.now) == change.op.place(change.op.want):
                return "somebody has changed its VLANs: the guest is in networks that are not its, or not in its own"
            if change.now is None:
                return "something took it off its bridge: restarting the network does that"
            return "somebody has moved it to another bridge"
        case Filter():
            if change.now is None:
                return "something has deleted it, `nft flush ruleset` perhaps: the guest can send what it likes"
            return "somebody has changed what is ours in nftables"
        case LinkUp():
            return "somebody has set it down: every frame for and from the guest is lost"
        case LinkMtu():
            if isinstance(change.now, int) and change.now < change.op.want:
                return (
                    "it is smaller than the bridge's, so larger frames are lost: set by hand, or the bridge's has grown"
                )
            return "it is larger than the bridge's: set by hand, or the bridge's has shrunk"
        case PortOption():
            if change.now is None or unplugged:
                return "because the tap is on no bridge, or was on none for a moment"
            return PORT_OPTION_LOST.get((change.op.option, change.op.want), "somebody has set it")
        case Rate():
            if change.now is None:
                return "something has deleted it: the guest has no limit there"
            return "somebody has made it another, or put something else in its place"
        case PortForwarding():
            if down or unplugged:
                return "because the tap is down or on no bridge"
            if change.now in ("listening", "learning"):
                return "the bridge runs STP and has just changed: look again in a moment"
            return "STP has found a loop, or somebody has set the state: no frame passes"
        case Sysctl(name="rp_filter"):
            now = RP_FILTER_NAMES.get(str(change.now), change.now)
            dropped = ": what the guest sends from any other address than its own is dropped" if now == "strict" else ""
            return f"somebody has made it {now}; configured is {RP_FILTER_NAMES[change.op.want or '']}{dropped}"
        case Sysctl(name="accept_ra" | "accept_redirects" | "autoconf" | "accept_source_route"):
            return "somebody has set it: the guest can tell this node where to send its traffic"
        case Sysctl(name="disable_ipv6"):
            return "somebody has turned it on, perhaps on all devices: the node listens to its guest"
        case Sysctl(on_uplink=True):
            return "somebody has set it back; the node answers for its guests late, or not at all"
        case Sysctl():
            return "somebody has set it; `sysctl --system` and changing ip_forward set it on all devices"
        case Rule(want=False):
            return (
                f"it is not ours, and catches what comes in on {tap}; a script or a person made it, nobody knows when"
            )
        case Sources(want=None):
            return "the configuration has changed since"
        case Sources():
            emptied = "something has deleted it: `nft flush ruleset`, or a firewall that was loaded anew"
            return emptied if change.now is None else "somebody has changed the sets of table inet kvm-ifup"
        case UplinkGuard():
            return "something has deleted it, as `nft flush ruleset` does: the guest's address can be forged there"
        case Rule():
            return "something has deleted it: a restarted network, or `ip rule flush`"
        case Route(want=False) | Neighbour(want=None) | ProxyNeighbour(want=False):
            return "the NIC is not to have it any more"
        case Route():
            return went if down else "something has deleted it: a routing daemon, or the tap was down for a moment"
        case Neighbour():
            return went if down else "something has deleted it: `ip neigh flush`, or the tap was down for a moment"
        case ProxyNeighbour():
            return "something has deleted it, or the uplink was down for a moment: nobody answers for the guest there"
        case LinkAddress():
            return "somebody has changed it: the guest's neighbours know the tap by the other"
        case Address(want=True):
            return went if down else "something has deleted it: the guest has lost its IPv6 gateway"
        case Address():
            return "somebody has given it one: the node has an address of its own among the guests"
        case AddrGenMode(want=0):
            return "somebody has changed it: the guest's gateway gets another address when the tap comes up again"
        case AddrGenMode():
            return "somebody has changed it: the node gets an address of its own among the guests"
        case OvsPort():
            return "somebody has changed it, or the switch's database is another one"
    return ""
