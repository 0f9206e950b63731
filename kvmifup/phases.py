"""Which operation in which phase, in which order: the heart of the product, and pure.

`wiring` lists everything that a running guest's NIC needs, each op with the phase from which it is safe:

=======  ==========================================================================================
pre      may be true on two nodes at once, so it is done while the guest still runs elsewhere
post     must be true on one node only: host routes, proxy neighbours, announcements
=======  ==========================================================================================

A phase's plan is the part of that list that the phase allows. So pre goes through every check that post
will, and a node that could not take the guest refuses it before the migration starts.

Nothing here reads a file, a clock or the kernel.

Large because it is one table: what each mode needs, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from kvmifup.core import filters, ovsport, rates
from kvmifup.core.errors import NotReadyError
from kvmifup.core.model import (
    ASK,
    MAIN_TABLE,
    Bridge,
    Config,
    Message,
    Nic,
    NodeFacts,
    Phase,
    Prefix,
    Tap,
    TapConfig,
    Trunk,
    Uplink,
    overlap,
)
from kvmifup.core.ops import (
    EVERYWHERE,
    PORT_OPTIONS,
    RTPROT_STATIC,
    Address,
    AddrGenMode,
    Announce,
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
from kvmifup.core.vlans import canonical, ids, tagged

Step = tuple[Phase, Op]
PRE, POST = Phase.PRE, Phase.POST

RP_FILTER = {"off": "0", "strict": "1", "loose": "2"}  # "keep" leaves it alone
JUDGED = ("strict", "loose")
UNJUDGED = "the guest can send from any IPv6 address: {}"
SHORTEST_FORWARD_DELAY = 2  # seconds that a bridge with STP takes: BR_MIN_FORWARD_DELAY, net/bridge/br_private_stp.h
ADDR_GEN_MODE_EUI64, ADDR_GEN_MODE_NONE = 0, 1  # IN6_ADDR_GEN_MODE_*, linux/if_link.h
IPV6_MIN_MTU = 1280  # with a smaller MTU a device has no IPv6 (linux/ipv6.h)


def effective(asked: Phase, nic: Nic) -> Phase:
    """The phase to run when *asked* is called: for a NIC that is not incoming, pre becomes post."""
    return Phase.POST if asked is Phase.PRE and not nic.incoming else asked


def plan(phase: Phase, nic: Nic, config: Config, facts: NodeFacts, *, announce: bool = False) -> tuple[Op, ...]:
    """The ops that make *nic* right for *phase*, in order; *announce* forces the announcement.

    Raises NotReadyError if anything would keep this node from running the guest, also if only post would fail.
    """
    steps = tuple(wiring(nic, config, facts, announce=announce))
    return (*stale(nic, facts, steps), *(op for since, op in steps if since <= phase))


def stale(nic: Nic, facts: NodeFacts, steps: tuple[Step, ...]) -> Iterator[Op]:
    """The removal of what a dead NIC or a script has left for this tap, and what no phase wants."""
    found: list[Op] = [OvsPort(nic.tap, None)] if facts.port else []
    found += [Filter(nic.tap, None)] if facts.filtered else []
    found += [Sources(nic.tap, None)] if facts.judged else []
    found += [rule.turned(False) for rule in facts.rules]
    planned = {op.key for _, op in steps} if found else set()
    yield from (op for op in found if op.key not in planned)


def wiring(nic: Nic, config: Config, facts: NodeFacts, *, announce: bool) -> Iterator[Step]:
    """All that a running guest's NIC needs, each op with the first phase that may do it."""
    if facts.tap is None:
        raise NotReadyError(
            f"no such device: {nic.tap}", hint="it exists only while QEMU runs, or after `ip tuntap add`"
        )
    if not facts.tap.is_tap:
        raise NotReadyError(f"{nic.tap} is not a tap", hint="only a guest's tap is ever wired")
    if nic.mode == "bridged":
        yield from bridged(nic, config, facts)
    elif nic.mode == "routed":
        yield from routed(nic, config, facts, announce=announce)
    elif nic.mode == "openvswitch":
        yield from openvswitch(nic, config, facts)
    else:
        yield from external(nic, config, facts)


def bridged(nic: Nic, config: Config, facts: NodeFacts) -> Iterator[Step]:
    """A forwarding port of a bridge: all of it may be true on two nodes at once."""
    assert nic.link is not None  # kvmifup.inputs.values has checked it
    bridge = ready_bridge(nic, nic.link, config, facts.bridge)
    name = bridge.name or nic.link
    if bridge.adopts:
        yield PRE, BridgeAddress(name, bridge.mac)
    # Before it becomes a port: a bridge takes over the lowest MTU among its ports.
    yield PRE, LinkMtu(nic.tap, bridge.mtu)
    if lets_through := filter_of(nic, config):
        yield PRE, Filter(nic.tap, lets_through)
    yield from ((PRE, op) for op in port_settings(nic, bridge, facts))
    yield PRE, LinkAddress(nic.tap, nic.tap_mac)
    vlans = canonical(nic.vlan) if nic.vlan else bridge.new_port if bridge.keeps and bridge.filters else ""
    yield PRE, LinkMaster(nic.tap, f"{name} {vlans}" if vlans else name)
    yield from ((PRE, op) for op in port_options(nic, config, bridge))
    if nic.vlan:
        text = tagged(ids(nic.vlan))
        yield from ((PRE, UplinkVlans(name, trunk.name, text, text)) for trunk in ready_trunks(nic, name, bridge))
    yield from limits(nic, config, bridge.mtu)
    yield PRE, LinkUp(nic.tap, True)
    if not slow(bridge, config):
        yield PRE, PortForwarding(nic.tap, config.bridged.forwarding_timeout)


def filter_of(nic: Nic, config: Config) -> str | None:
    """What the guest may send, as `Filter` has it; None: anything."""
    rungs = ladder(nic, config)
    kind = said("filter", *rungs) or "off"
    if kind == "off":
        return None
    return filters.facts(kind, (nic.mac, *(said("allow_mac", *rungs) or ())), nic.ip).text


def port_options(nic: Nic, config: Config, bridge: Bridge) -> Iterator[Op]:
    """The options of the port: the NIC says, or the configuration for its link, or for all bridges, or nobody."""
    # Without it a guest that has moved gets no neighbour solicitation until it reports its groups again, which it does
    # when a querier asks: minutes later.
    defaults = {"multicast_router": True} if bridge.snoops else {}
    for option, (off, on, _) in PORT_OPTIONS.items():
        value = said(option, *ladder(nic, config))
        if value is None:
            value = defaults.get(option)
        if value is not None:
            yield PortOption(nic.tap, option, on if value else off)


def ladder(nic: Nic, config: Config) -> tuple[Nic | TapConfig, ...]:
    """Who can say something of *nic*, the first one first: itself, with its tags; its link; its mode."""
    of_mode: TapConfig = getattr(config, nic.mode)
    return nic, config.of_link(nic.link), of_mode


def said(key: str, *rungs: Nic | TapConfig) -> Any:
    """What the first of *rungs* that says anything says of a key of the ladder; None if none does."""
    return next((value for one in rungs if (value := getattr(one, key, None)) is not None), None)


def limited(nic: Nic, config: Config) -> rates.Limits:
    """The limits of *nic*: each direction is said for itself."""
    return rates.first_said(*(said("rate", rung) for rung in ladder(nic, config)))


def limits(nic: Nic, config: Config, mtu: int) -> Iterator[Step]:
    """Limits of what goes to and from the guest, in force before the tap is up, which will have the *mtu*."""
    found = dict(limited(nic, config))
    for direction in rates.DIRECTIONS:
        if limit := rates.said_as_limit(direction, found, mtu):
            yield PRE, Rate(nic.tap, direction, limit)


def refuse_others(op: Op, now: Value) -> None:
    """Raise NotReadyError if *op* would take the place of what others have made there, and we never have."""
    if isinstance(op, Rate) and isinstance(now, str) and not rates.is_limit(now) and op.direction == rates.TO_GUEST:
        raise NotReadyError(
            f"{op.dev} has a queueing discipline of others: {now}",
            hint=f"`tc qdisc del dev {op.dev} root`, or leave out rate.to_guest",
        )


OF_BRIDGED = 'link of a bridged NIC is a Linux bridge; for one of Open vSwitch write mode = "openvswitch"'


def ready_bridge(nic: Nic, name: str, config: Config, bridge: Bridge | None) -> Bridge:
    """The bridge, if it can take the guest: an incoming one only if a port forwards in time. Raises NotReadyError."""
    if bridge is None:
        hint = OF_BRIDGED if name.isdigit() else f"`{bridge_made(name)}`, or correct link"
        raise NotReadyError(f"no such bridge: {name}", hint=hint)
    if not bridge.is_bridge:
        raise NotReadyError(f"{name} is not a bridge", hint=OF_BRIDGED)
    if nic.vlan is not None and not bridge.filters:
        raise NotReadyError(
            f"bridge {name} cannot take VLAN {nic.vlan}: it does not filter VLANs", hint=f"`{filtering(name)}`"
        )
    if not bridge.up:
        raise NotReadyError(f"bridge {name} is down", hint=f"`ip link set {name} up`")
    # QEMU's announcements end 0.8 s after the guest arrives, so a port that takes longer than we can wait would lose
    # them. A guest that starts here, or runs here already, is only held up.
    if nic.incoming and slow(bridge, config):
        raise NotReadyError(
            f"bridge {name} runs STP and a port takes {2 * bridge.forward_delay:g} s to forward",
            hint=faster(name, config),
        )
    return bridge


def filtering(bridge: str) -> str:
    """The command that makes *bridge* keep VLANs apart."""
    return f"ip link set {bridge} type bridge vlan_filtering 1"


def ready_trunks(nic: Nic, name: str, bridge: Bridge) -> tuple[Trunk, ...]:
    """The ports of the bridge *name* on which the VLANs of *nic* leave the node. Raises NotReadyError."""
    for trunk in bridge.trunks:
        if trunk.is_tap:
            raise NotReadyError(
                f"uplink {trunk.name} is a tap", hint=f"correct [link.{nic.link}] uplinks: it is a guest's end"
            )
        if not trunk.is_port:
            raise NotReadyError(
                f"uplink {trunk.name} is no port of {name}",
                hint=f"`ip link set {trunk.name} master {name}`, or correct [link.{nic.link}] uplinks",
            )
        for vid, device in trunk.used:
            if vid in ids(nic.vlan or ""):
                raise NotReadyError(
                    f"VLAN {vid} on {trunk.name} belongs to {device}: nothing of it reaches {name}",
                    hint=f"`ip link del {device}`, or another VLAN",
                )
    return bridge.trunks


def slow(bridge: Bridge, config: Config) -> bool:
    """Whether a port of *bridge* takes longer to forward than anybody waits.

    Listening, then learning: each lasts one forward delay (br_stp_timer.c).
    """
    return bridge.stp and 2 * bridge.forward_delay > config.bridged.forwarding_timeout


def bridge_made(name: str) -> str:
    """The command that makes a bridge."""
    return f"ip link add {name} type bridge; ip link set {name} up"


def faster(bridge: str, config: Config) -> str:
    """The hint that makes ports of *bridge* forward in time. STP is turned off only where nothing else helps."""
    off = f"`ip link set {bridge} type bridge stp_state 0` if nothing else connects its ports"
    if config.bridged.forwarding_timeout < 2 * SHORTEST_FORWARD_DELAY:
        return off
    return f"`ip link set {bridge} type bridge forward_delay {100 * SHORTEST_FORWARD_DELAY}`, or {off}"


def unfiltered(nic: Nic, config: Config, kind: str) -> None:
    """Raise NotReadyError if *nic* is to be filtered, where that cannot be done: never open."""
    wanted = said("filter", *ladder(nic, config))
    if wanted not in (None, "off"):
        raise NotReadyError(f'filter = "{wanted}" cannot be done on {kind}', hint='filter = "off"')


def openvswitch(nic: Nic, config: Config, facts: NodeFacts) -> Iterator[Step]:
    """A port of an Open vSwitch bridge, its VLANs set in the same transaction that adds it."""
    assert nic.link is not None  # kvmifup.inputs.values has checked it
    if facts.bridge is None or not facts.bridge.is_bridge:
        raise NotReadyError(
            f"no such Open vSwitch bridge: {nic.link}", hint=f"`ovs-vsctl add-br {nic.link}`, or correct link or mode"
        )
    if not facts.bridge.up:
        raise NotReadyError("ovs-vswitchd does not run", hint="`systemctl start openvswitch-switch`")
    if facts.bridge.part_of and nic.vlan:
        raise NotReadyError(f"{nic.link} is itself a VLAN: {facts.bridge.part_of}", hint="give no vlan, or that bridge")
    unfiltered(nic, config, "an Open vSwitch bridge")
    yield PRE, LinkMaster(nic.tap, None)  # or the guest would be on both networks
    # Before it becomes a port: the switch lowers its own MTU to the lowest among the ports.
    yield PRE, LinkMtu(nic.tap, facts.bridge.mtu)
    yield from ((PRE, op) for op in port_settings(nic, facts.bridge, facts))
    yield PRE, LinkAddress(nic.tap, nic.tap_mac)
    name = facts.bridge.name or nic.link
    bridge, _, vlan = (facts.bridge.part_of or f"{name} {canonical(nic.vlan) if nic.vlan else ''}").partition(" ")
    ids = {ovsport.MAC: nic.mac, ovsport.TRANSIENT: "true"}
    if nic.instance:
        ids[ovsport.INSTANCE] = nic.instance
    if interface := nic.iface_id or given_by_others(nic, facts.port):
        ids[ovsport.INTERFACE] = interface
    yield PRE, OvsPort(nic.tap, ovsport.Port(bridge, vlan, ids=tuple(ids.items())).text)
    yield from limits(nic, config, facts.bridge.mtu)  # the switch removes those of a port that it gets
    yield PRE, LinkUp(nic.tap, True)


def given_by_others(nic: Nic, port: str | None) -> str | None:
    """The name in an OVN network that others have given to the *port* of *nic*; a dead guest's is not its."""
    found = ovsport.parsed(port) if port else None
    return found.named(ovsport.INTERFACE) if found and found.named(ovsport.MAC) == nic.mac else None


def external(nic: Nic, config: Config, facts: NodeFacts) -> Iterator[Step]:
    """The administrator's own program, told the phase and the NIC."""
    assert facts.program is not None  # kvmifup.node.programs.find has refused a missing one
    given = {
        "INTERFACE": nic.tap,
        "MODE": nic.mode,
        "LINK": nic.link,
        "MAC": nic.mac,
        "IP": " ".join(map(as_told, nic.ip)),
        "VLAN": nic.vlan,
        "INSTANCE": nic.instance,
        "INTERFACE_INDEX": None if nic.index is None else str(nic.index),
        **said_to_program(nic, config),
    }
    environment = (*((name, value) for name, value in given.items() if value), *nic.given)
    for since, phase in ((PRE, "pre"), (POST, "post")):
        yield since, Program(facts.program, phase, environment, config.ext.timeout, True)


def said_to_program(nic: Nic, config: Config) -> dict[str, str]:
    """What the ladder says, for a program: only that can do something about it."""
    rungs = ladder(nic, config)
    flags = {key: str(value).lower() for key in PORT_OPTIONS if (value := said(key, *rungs)) is not None}
    rate = {f"rate_{key}": value for key, value in limited(nic, config)}
    macs = " ".join(said("allow_mac", *rungs) or ())
    found = {**flags, "filter": said("filter", *rungs), "allow_mac": macs, **rate}
    return {f"KVM_IFUP_{key.upper()}": value for key, value in found.items() if value}


def routed(nic: Nic, config: Config, facts: NodeFacts, *, announce: bool) -> Iterator[Step]:
    """Routes and proxy neighbours: true on the one node where the guest runs, and announced there."""
    if facts.table is None:
        raise NotReadyError(
            f"no such routing table: {nic.link}",
            hint="link of a routed NIC is a routing table's number, its name in /etc/iproute2/rt_tables, or left out",
        )
    assert facts.tap is not None  # wiring has checked it
    for address, why in facts.taken:
        raise NotReadyError(f"{address} {why}", hint="an address can be on one NIC of one node only")
    uplinks = ready_uplinks(nic, facts)
    hosts = [prefix for prefix in nic.ip if is_host(prefix)]

    yield PRE, LinkAddress(nic.tap, nic.tap_mac)
    yield PRE, LinkMaster(nic.tap, None)  # what comes in on a bridge port is never routed
    ipv6 = facts.ipv6 and facts.tap.mtu >= IPV6_MIN_MTU
    yield from ((PRE, op) for op in closed(nic, ipv6=ipv6))
    yield from ((PRE, op) for op in router_settings(nic, config, facts.tap, ipv6=ipv6))
    if nic.link is not None:
        for family in (4, 6) if facts.ipv6 else (4,):
            priority = config.routed.rule_priority
            yield PRE, Rule(family, nic.tap, facts.table, priority, RTPROT_STATIC, True)
    yield from ((PRE, op) for op in judged(nic, config, facts))
    yield from limits(nic, config, facts.tap.mtu)
    yield PRE, LinkUp(nic.tap, True)
    for host in hosts:
        yield PRE, Neighbour(nic.tap, bare(host), nic.mac)

    for prefix in nic.ip:
        yield POST, Route(str(prefix), nic.tap, facts.table, True)
    six = next((uplink for uplink in uplinks if uplink.family == 6), None)
    for uplink in uplinks:
        proxied = [bare(host) for host in hosts if host.version == uplink.family]
        if proxied:
            # What guests share is set before any arrives, so that one that does changes nothing for the others.
            # The random delay before a proxied answer belongs to the device where the question arrives.
            yield PRE, Sysctl(uplink.family, "neigh", uplink.name, "proxy_delay", True, "0")
            if uplink.family == 6:
                yield PRE, Sysctl(6, "conf", uplink.name, "proxy_ndp", True, "1")
                if uplink == six:
                    # Without it what is asked of the uplink's MAC alone stays unanswered (ip6_forward): every
                    # neighbour asks like that before it forgets an entry.
                    yield PRE, Sysctl(6, "conf", EVERYWHERE, "proxy_ndp", True, "1")
            for address in proxied:
                yield POST, ProxyNeighbour(uplink.name, address, True)
    if config.routed.guard_uplinks:
        # Only now: as long as the guest runs elsewhere, its packets come in there.
        for uplink in (one for one in facts.uplinks if one.present):
            for prefix in (one for one in nic.ip if one.version == uplink.family):
                yield POST, UplinkGuard(uplink.name, as_told(prefix), True)
    messages = announcement((uplink, bare(host)) for uplink in uplinks for host in hosts)
    if messages:
        yield POST, Announce(messages, announce)


def uplink_of(op: Op) -> tuple[str, int] | None:
    """The uplink that *op* is about, EVERYWHERE for all, and the address family, 4 or 6; None if it is about none."""
    match op:
        case ProxyNeighbour():
            return op.dev, family_of(op.address)
        case UplinkGuard():
            return op.dev, family_of(op.prefix)
        case Sysctl(on_uplink=True):
            return op.dev, op.family
    return None


def announcement(pairs: Iterable[tuple[Uplink, str]]) -> tuple[Message, ...]:
    """What `Announce` takes to announce each address on its uplink, if it is of the uplink's family."""
    fit = [(uplink, address) for uplink, address in pairs if family_of(address) == uplink.family]
    told = [(uplink.name, address, uplink.source or address) for uplink, address in fit]
    return (*told, *((uplink.name, address, ASK + way) for uplink, address in fit for way in uplink.gateways))


def families_unseen(nic: Nic, config: Config, facts: NodeFacts) -> set[int]:
    """The address families of *nic* whose uplink cannot be found now, because there is no default route of theirs.

    That is so while an uplink is down, and for a while after.
    """
    if nic.mode != "routed" or config.routed.uplinks is not None:
        return set()
    families: set[int] = {prefix.version for prefix in nic.ip}
    return families - {uplink.family for uplink in facts.uplinks}


def unseen(op: Op, nic: Nic, lacking: set[int]) -> bool:
    """Whether *op* is about an uplink of one of the families *lacking* (`families_unseen`).

    That does not make *op* wrong.
    """
    uplink = uplink_of(op) if lacking else None
    if uplink is None or uplink[1] not in lacking:
        return False
    if isinstance(op, ProxyNeighbour):
        wanted = ip_network(op.address) in nic.prefixes
    elif isinstance(op, UplinkGuard):
        wanted = ip_network(op.prefix) in nic.prefixes
    else:
        wanted = any(is_host(prefix) and prefix.version == uplink[1] for prefix in nic.ip)
    return wanted


def usable(uplink: Uplink) -> bool:
    """Whether anything can be done on *uplink* for a guest that was admitted: it is up, and has the family at all."""
    return uplink.up and not any("disable_ipv6" in setting for setting in uplink.mend)


def as_far_as_usable(bridge: Bridge) -> Bridge:
    """*bridge*, with the uplinks on which something can be done for a guest that was admitted."""
    return replace(
        bridge, trunks=tuple(replace(one, used=()) for one in bridge.trunks if one.is_port and not one.is_tap)
    )


def only_here(op: Op) -> bool:
    """Whether *op* must be undone as soon as the guest has left: it draws its traffic here, or would drop it here."""
    return isinstance(op, Route | ProxyNeighbour | UplinkGuard)


def conf(nic: Nic, family: int, name: str, value: str) -> Sysctl:
    """A setting of the tap; all of them go with it."""
    return Sysctl(family, "conf", nic.tap, name, False, value)


def closed(nic: Nic, *, ipv6: bool) -> Iterator[Op]:
    """What keeps a guest from configuring its node: whatever it says about routers and routes is ignored.

    The same in every mode, so that nothing opens for a moment when a running tap changes its mode. *ipv6*: the tap has
    IPv6, also if the guest has no such address: a guest can send what it likes.
    """
    yield conf(nic, 4, "accept_redirects", "0")
    yield conf(nic, 4, "accept_source_route", "0")
    if ipv6:
        yield conf(nic, 6, "accept_ra", "0")
        yield conf(nic, 6, "accept_redirects", "0")
        yield conf(nic, 6, "autoconf", "0")


def port_settings(nic: Nic, bridge: Bridge, facts: NodeFacts) -> Iterator[Op]:
    """What makes the tap nothing but a port of *bridge*: the node itself does not listen on it.

    A bridge hands frames to reserved multicast MACs (01:80:c2:00:00:0e) up to the node, whatever is in them
    (`br_handle_frame` in net/bridge/br_input.c): a router advertisement as well.
    """
    assert facts.tap is not None  # wiring has checked it
    ipv6 = facts.ipv6 and bridge.mtu >= IPV6_MIN_MTU
    yield from closed(nic, ipv6=ipv6)
    yield conf(nic, 4, "arp_ignore", "8")  # no address of the node is asked for here
    yield conf(nic, 4, "drop_unicast_in_l2_multicast", "1")
    if ipv6:
        for address in facts.tap.addresses:
            yield Address(nic.tap, address, False)
        yield ipv6_off(nic)
        # If somebody turns IPv6 on again, on all devices perhaps, there is still no address.
        yield AddrGenMode(nic.tap, ADDR_GEN_MODE_NONE)


def ipv6_off(nic: Nic) -> Sysctl:
    """IPv6 off on the tap."""
    return conf(nic, 6, "disable_ipv6", "1")


def router_settings(nic: Nic, config: Config, tap: Tap, *, ipv6: bool) -> Iterator[Op]:
    """What makes the node the guest's router on this tap. *ipv6* as in `closed`."""
    yield conf(nic, 4, "forwarding", "1")
    yield conf(nic, 4, "proxy_arp", "1")
    yield conf(nic, 4, "send_redirects", "0")
    if config.routed.reverse_path in RP_FILTER:
        yield conf(nic, 4, "rp_filter", RP_FILTER[config.routed.reverse_path])
    yield Sysctl(4, "neigh", nic.tap, "proxy_delay", False, "0")
    if ipv6:
        # Nobody is asked whether the tap's own link-local address is a duplicate. It ends like the guest's, so the
        # question is for the guest's group. It would wait in the tap, and a guest that arrives would have to look at it
        # before it gets its first packet.
        yield conf(nic, 6, "accept_dad", "0")
    # Only for a guest with IPv6: turning its forwarding on anywhere makes the kernel drop the default routes
    # that the node has learnt from router advertisements (rt6_purge_dflt_routers).
    if any(prefix.version == 6 for prefix in nic.ip):
        yield conf(nic, 6, "forwarding", "1")
        yield conf(nic, 6, "proxy_ndp", "1")
        yield Sysctl(6, "neigh", nic.tap, "proxy_delay", False, "0")
        # The guest's gateway, whatever address the node's default makes. It is there at once, because nobody is asked
        # whether it is a duplicate: neither now, nor when the tap comes up again and the kernel makes it anew.
        yield AddrGenMode(nic.tap, ADDR_GEN_MODE_EUI64)
        gateway = f"{nic.gateway}/64"
        if not tap.idle or gateway in tap.addresses:
            yield Address(nic.tap, gateway, True)


def judged(nic: Nic, config: Config, facts: NodeFacts) -> Iterator[Op]:
    """From which IPv6 addresses the guest may send, also if it has none: the kernel has a rp_filter only for IPv4.

    Raises NotReadyError if somebody has asked for what the node cannot do. Who has not asked is warned (`remarks`).
    """
    if facts.unguarded and (config.routed.rp_filter in JUDGED or config.routed.guard_uplinks):
        asked = "guard_uplinks" if config.routed.guard_uplinks else f'rp_filter = "{config.routed.rp_filter}"'
        raise NotReadyError(
            f"IPv6 sources cannot be judged: {facts.unguarded}", hint=f"mend that, or take {asked} out of [routed]"
        )
    assert facts.tap is not None  # wiring has checked it
    if config.routed.reverse_path in JUDGED and not facts.unguarded and facts.ipv6 and facts.tap.mtu >= IPV6_MIN_MTU:
        yield Sources(nic.tap, " ".join((config.routed.reverse_path, *map(as_told, own_sources(nic)))))


def own_sources(nic: Nic) -> list[Prefix]:
    """The IPv6 prefixes of *nic*, without those inside another one."""
    six = [prefix for prefix in nic.ip if prefix.version == 6]
    wide = [prefix for prefix in nic.networks if prefix.version == 6]
    outer = (
        one
        for one in six
        if not any(one != other and overlap(one, other) and other.prefixlen < one.prefixlen for other in wide)
    )
    return sorted(outer, key=lambda prefix: int(prefix.network_address))


def ready_uplinks(nic: Nic, facts: NodeFacts) -> list[Uplink]:
    """The uplinks of the NIC's address families on which there are neighbours. Raises NotReadyError."""
    families = {prefix.version for prefix in nic.ip}
    if 6 in families and not facts.ipv6:
        raise NotReadyError("this node's kernel has no IPv6", hint="boot it without ipv6.disable=1")
    if 6 in families and facts.tap and facts.tap.mtu < IPV6_MIN_MTU:
        raise NotReadyError(
            f"{nic.tap} has no IPv6, because its MTU is {facts.tap.mtu}", hint=f"`ip link set {nic.tap} mtu 1500`"
        )
    if 6 in families and facts.ipv6_mend:
        raise NotReadyError(f"IPv6 is off on {nic.tap}", hint=f"`sysctl -w {' '.join(facts.ipv6_mend)}`")
    for uplink in facts.uplinks:
        if not uplink.present:
            raise NotReadyError(f"no such uplink: {uplink.name}", hint="correct [routed] uplinks")
        if uplink.is_tap:
            raise NotReadyError(f"uplink {uplink.name} is a tap", hint="correct [routed] uplinks: it is a guest's end")
        if uplink.family not in families:
            continue
        if not uplink.up:
            raise NotReadyError(f"uplink {uplink.name} is down", hint=f"`ip link set {uplink.name} up`")
        if uplink.mend:
            raise NotReadyError(
                f"IPv{uplink.family} forwarding is off on uplink {uplink.name}",
                hint=f"`sysctl -w {' '.join(uplink.mend)}`",
            )
    return [uplink for uplink in facts.uplinks if uplink.arp and uplink.family in families]


def remarks(phase: Phase, nic: Nic, config: Config, facts: NodeFacts) -> tuple[str, ...]:
    """What is no error, but worth a line with -v, and a warning in the log."""
    if phase is not Phase.DOWN and nic.mode == "bridged" and facts.bridge:
        found = []
        if slow(facts.bridge, config):
            late = 2 * facts.bridge.forward_delay
            found.append(f"bridge {nic.link} runs STP: a new port forwards only after {late:g} s")
        if ends_here(nic, config, facts):
            found.append(f"no uplink of bridge {nic.link} found: VLANs {nic.vlan} do not leave this node")
        if nic.allow_mac and said("filter", *ladder(nic, config)) in (None, "off"):
            found.append("allow_mac does nothing without a filter")
        found += filter(None, [addressless(nic, config)])
        return tuple(found)
    if phase is Phase.DOWN or nic.mode != "routed":
        return ()
    open_ = (UNJUDGED.format(facts.unguarded),) if facts.unguarded and config.routed.reverse_path in JUDGED else ()
    if not nic.ip:
        return (*open_, addressless(nic, config))
    if config.routed.uplinks == ():  # that is meant
        return open_
    lacking = sorted({prefix.version for prefix in nic.ip} - {uplink.family for uplink in facts.uplinks})
    return (*open_, *(f"no IPv{family} uplink found: nothing there answers for the guest" for family in lacking))


def addressless(nic: Nic, config: Config) -> str:
    """What it leads to that *nic* has no address; empty if it has one, or needs none."""
    if nic.mode == "routed" and not nic.ip:
        return "it has no address: nothing is routed to the guest"
    if nic.mode == "bridged" and not nic.ip and said("filter", *ladder(nic, config)) == "address":
        return 'it has no address: with filter = "address" the guest can send nothing'
    return ""


def ends_here(nic: Nic, config: Config, facts: NodeFacts) -> bool:
    """Whether the VLANs of the bridged *nic* do not leave the node, and nobody has said that this is meant."""
    return bool(nic.vlan and facts.bridge and not facts.bridge.trunks and config.of_link(nic.link).uplinks is None)


def withdrawal(nic: Nic, facts: NodeFacts) -> tuple[Op, ...]:
    """The ops that take a NIC's traffic off this node when there is no journal: kvm-ifdown's fallback.

    Only what names the tap or the NIC's addresses; never anything that serves other guests as well.
    """
    taken = {address for address, _ in facts.taken}
    proxies = [
        ProxyNeighbour(uplink.name, bare(prefix), False)
        for uplink in facts.uplinks
        for prefix in nic.ip
        if is_host(prefix) and prefix.version == uplink.family and str(prefix) not in taken
    ]
    guards = [
        UplinkGuard(uplink.name, as_told(prefix), False)
        for uplink in facts.uplinks
        for prefix in nic.ip
        if prefix.version == uplink.family and str(prefix) not in taken
    ]
    table = MAIN_TABLE if facts.table is None else facts.table
    routes = [Route(str(prefix), nic.tap, table, False) for prefix in nic.ip]
    neighbours = [Neighbour(nic.tap, bare(prefix), None) for prefix in nic.ip if is_host(prefix)]
    rules = [rule.turned(False) for rule in facts.rules]
    port = [OvsPort(nic.tap, None)] if facts.port and nic.mode != "ext" else []
    filtered = [Filter(nic.tap, None)] if facts.filtered and nic.mode != "ext" else []
    judged = [Sources(nic.tap, None)] if facts.judged and nic.mode != "ext" else []
    routed = proxies + routes + neighbours + ([] if facts.unguarded else guards) if nic.mode == "routed" else []
    return (*port, *routed, *judged, *filtered, *rules)


def is_host(prefix: Prefix) -> bool:
    """A single address: it gets a proxy neighbour and is announced; a prefix must be routed to the node."""
    return prefix.prefixlen == prefix.max_prefixlen


def family_of(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def as_told(prefix: Prefix) -> str:
    """A prefix as people write it: a single address without its length."""
    return bare(prefix) if is_host(prefix) else str(prefix)


def bare(prefix: Prefix) -> str:
    """The address of a single-address prefix, as text."""
    return str(prefix.network_address)
