"""What keeps the frames of a bridged guest from passing, though its tap is a port as it should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvmifup import phases
from kvmifup.core.model import Nic, Phase
from kvmifup.core.ops import LinkMaster, LinkUp, PortForwarding, PortOption
from kvmifup.diagnosis.findings import Finding
from kvmifup.diagnosis.nics import Known
from kvmifup.diagnosis.state import Look
from kvmifup.node.overview import Port
from kvmifup.runs.apply import Change


def on_bridge(one: Known, nic: Nic, missing: Sequence[Change], look: Look) -> Iterator[Finding]:
    """What there is to say about a bridged NIC beside its ops."""
    if nic.link is None or look.overview.ifindex(nic.link) is None:
        return
    yield from without_uplink(nic.link, look)
    yield from no_trunk(nic, look)
    if any(isinstance(change.op, LinkMaster | LinkUp | PortForwarding) for change in missing):
        return
    port = look.overview.ports(nic.link).get(nic.tap)
    if port and port.up and port.carrier and not port.forwarding:  # no hook waits for it, so it is no drift
        yield Finding(
            f"{nic.tap}, a port of {nic.link}, does not forward",
            "STP has not let it yet, which can take long on this bridge, or has found a loop: no frame passes",
            f"look at `bridge -d link show dev {nic.tap}`; `kvm-ifup check --node` says how to make it fast",
        )
        return
    drift = any(isinstance(change.op, PortOption) and change.op.option == "multicast_router" for change in missing)
    if not drift and unasked(nic.link, [nic.tap], look) and not look.bridges.reported(nic.link, nic.tap):
        yield Finding(
            f"{nic.link} snoops multicast and does not know what the guest on {nic.tap} listens to",
            "IPv6 neighbour solicitations reach it only after it has answered a querier, long after a migration",
            ALWAYS,
            wrong=False,
        )
    yield from same_mac(one, nic, look)


# --- the bridge ---------------------------------------------------------------------------------------------


def without_uplink(bridge: str, look: Look) -> Iterator[Finding]:
    """Whether *bridge* leads anywhere: it has a working port that is not a guest's tap, or the node is its router."""
    ports = ports_of(bridge, look)
    if any(port.up and port.carrier and port.forwarding for port in ports.values()):
        return
    if not ports:
        routed = look.overview.has_addresses(bridge)
        yield Finding(
            f"{bridge} has no port but guests' taps",
            f"its guests reach nobody but each other{' and this node' if routed else ''}: it leads to no network",
            wrong=False,  # it may be meant
        )
        return
    for name, port in ports.items():
        if not port.up:
            what, mend = "is down", f"`ip link set {name} up`"
        elif not port.carrier:
            what, mend = "has no carrier", "look at its cable, or at its other end"
        else:
            what, mend = "does not forward", f"STP decides that: look at `bridge -d link show dev {name}`"
        yield Finding(f"{name}, an uplink of {bridge}, {what}", "the guests of this bridge reach nobody there", mend)


def no_trunk(nic: Nic, look: Look) -> Iterator[Finding]:
    """Whether the VLANs of *nic* leave the node, or somebody has said that they do not."""
    config = look.session.config
    if phases.ends_here(nic, config, look.overview.facts(nic, config)):
        yield Finding(
            f"no uplink of {nic.link} is known for VLANs: no port is a physical device, a bond, or a VLAN of one",
            "what has a VLAN there does not leave this node",
            f"name it in [link.{nic.link}] uplinks, or say [] there",
            wrong=False,
        )


def ports_of(bridge: str, look: Look) -> dict[str, Port]:
    """The ports of *bridge* that are no guest's tap."""
    if bridge not in look.outward:
        guests = look.guests.keys() | {one.tap for one in look.everything}
        ports = look.overview.ports(bridge).items()
        look.outward[bridge] = {name: port for name, port in ports if not port.tap or name not in guests}
    return look.outward[bridge]


def unasked(bridge: str, taps: Sequence[str], look: Look) -> list[str]:
    """Those of *taps* to which *bridge* sends only multicast that somebody there has asked for."""
    if not look.bridges.querier(bridge):
        return []
    return [tap for tap in taps if look.bridges.always_router(tap) is False]


ALWAYS = "multicast_router = true for the NIC, its link or all bridges; then kvm-ifup-post"


# --- who else is it -------------------------------------------------------------------------------------------


def same_mac(one: Known, nic: Nic, look: Look) -> Iterator[Finding]:
    """Who else has the guest's MAC on its bridge: a bridge sends the frames for it to one port only."""
    kernel, bridge = look.overview, nic.link or ""
    lost = "a bridge sends what is for this MAC to one port only: to the one that sent last"
    ports = kernel.ports(bridge)
    own = [name for name in kernel.macs.get(nic.mac, ()) if name != nic.tap and (name == bridge or name in ports)]
    if own:
        yield Finding(
            f"{own[0]} of this node has the guest's MAC {nic.mac}",
            f"{bridge} keeps the guest's frames for the node",
            f"give the guest or {own[0]} another MAC",
        )
    twins = [other for other in look.by_mac.get(nic.mac, ()) if is_twin(one, nic, other, look)]
    for other in twins:
        yield Finding(
            f"{other.label} has the same MAC {nic.mac} on {bridge}", lost, "give one of the two guests another MAC"
        )
    if one.phase is not Phase.POST or kernel.vlans(bridge)[0]:  # in another VLAN it would be somebody else's affair
        return
    for learnt in look.bridges.learnt(bridge):
        if learnt.mac == nic.mac and not learnt.own and learnt.port not in (nic.tap, *(other.tap for other in twins)):
            yield Finding(
                f"the guest's MAC {nic.mac} was last seen on {learnt.port}, not on {nic.tap}",
                "the guest has gone to another node, or another machine has its MAC: what is for it goes there",
                f"`kvm-ifdown {nic.tap}` if the guest has left",
            )


def is_twin(one: Known, nic: Nic, other: Known, look: Look) -> bool:
    """Whether *other* is another NIC that is wired on the same bridge with the same MAC as *one*.

    While a guest moves within this node it has two taps, and one of them waits.
    """
    if other.tap == one.tap or other.nic is None or other.journal is None or other.phase is Phase.DOWN:
        return False
    if look.overview.ifindex(other.tap) != other.journal.ifindex:
        return False
    moves = other.nic.instance == nic.instance and Phase.PRE in (one.phase, other.phase)
    same = (other.nic.mode, other.nic.link, other.nic.mac, other.nic.vlan) == (nic.mode, nic.link, nic.mac, nic.vlan)
    return same and not moves
