"""The facts about the node that a plan for a NIC needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvmifup.core.errors import VanishedError
from kvmifup.core.model import MAIN_TABLE, Bridge, Config, Nic, NodeFacts, Prefix, Tap, Trunk, Uplink
from kvmifup.core.vlans import NONE
from kvmifup.inputs import tables
from kvmifup.node import ovs, ports, programs
from kvmifup.node.messages import (
    IFF_UP,
    LEADING_NOWHERE,
    RTN_UNICAST,
    RTPROT_DHCP,
    RTPROT_RA,
    RTPROT_STATIC,
    Link,
)
from kvmifup.node.procfs import address_is_set, assignment, ports_of, sysfs_of
from kvmifup.node.refusals import refusals
from kvmifup.node.reserved import why_not
from kvmifup.node.routes import RouteEntry
from kvmifup.node.view import View, default_devices, sources_of


def facts_for(nic: Nic, config: Config, view: View) -> NodeFacts:
    """What a plan for *nic* needs to know; everything is read anew. Raises KernelError, NotReadyError, ConfigError."""
    view.refresh()
    ipv6 = view.has_ipv6()
    filtered, judged = view.remains.of(nic.tap)
    return NodeFacts(
        tap=tap_called(nic, view, ipv6=ipv6),
        bridge=bridge_of(nic, config, view) if nic.mode in ("bridged", "openvswitch") else None,
        program=programs.find(programs.DIRECTORY, nic.link) if nic.mode == "ext" and nic.link else None,
        rules=tuple(rule for family in (4, 6)[: 1 + ipv6] for rule in view.rules(family, nic.tap)),
        port=view.switch().ports.get(nic.tap) if view.has_switch() else None,
        filtered=filtered,
        judged=judged,
        ipv6=ipv6,
        **(of_routed(nic, config, view, ipv6=ipv6) if nic.mode == "routed" else {}),
    )


def of_routed(nic: Nic, config: Config, view: View, *, ipv6: bool) -> dict[str, Any]:
    """Those that only a routed NIC needs, by the name of the fact."""
    table = MAIN_TABLE if nic.link is None else tables.number(nic.link)
    disabled = f"net/ipv6/conf/{nic.tap}/disable_ipv6"
    uplinks = [] if table is None else [with_gateways(one, table, view) for one in uplinks_of(nic, table, config, view)]
    return {
        "table": table,
        "uplinks": tuple(uplinks),
        "unguarded": sources_of(view).refused() if ipv6 and needs_nftables(config) else None,
        "taken": () if table is None else tuple(taken(nic, table, view)),
        "ipv6_mend": (assignment(disabled, "0"),) if view.sysctl(disabled) not in (None, "0") else (),
    }


def needs_nftables(config: Config) -> bool:
    """Whether a routed NIC needs the rules of `kvmifup.node.sources`."""
    return config.routed.guard_uplinks or config.routed.reverse_path in ("strict", "loose")


def tap_called(nic: Nic, view: View, *, ipv6: bool) -> Tap | None:
    """The tap of *nic*, None if there is no such device; *ipv6*: the kernel has IPv6."""
    try:
        link = view.link(nic.tap)
        addresses = view.addresses(nic.tap) if ipv6 else ()
    except VanishedError:
        return None
    idle = bool(link.flags & IFF_UP) and not link.carrier
    return Tap(link.index, link.is_tap, link.mtu, addresses, idle)


def bridge_of(nic: Nic, config: Config, view: View) -> Bridge | None:
    """The bridge, Linux's or Open vSwitch's, that the link of *nic* names; None if there is no such device."""
    try:
        link = view.link(nic.link or "")
    except VanishedError:
        return None
    real = None if link.name == nic.link else link.name
    if nic.mode == "openvswitch":
        parent, vlan = view.switch().bridges.get(link.name, ("", 0))
        return Bridge(
            is_bridge=bool(parent),
            up=ovs.is_alive(),
            mac=link.address or "",
            mtu=link.mtu,
            stp=False,
            forward_delay=0.0,
            adopts=False,
            part_of=f"{parent} .{vlan}" if vlan else None,
            name=real,
        )
    is_bridge = link.kind == "bridge"
    return Bridge(
        is_bridge=is_bridge,
        up=bool(link.flags & IFF_UP),
        mac=link.address or "",
        mtu=link.mtu,
        stp=link.stp,
        forward_delay=link.forward_delay,
        adopts=is_bridge and would_adopt(link, nic, view),
        name=real,
        filters=link.filters,
        new_port=f".{link.default_pvid}" if link.default_pvid else NONE,
        trunks=trunks_of(link, nic, config, view) if nic.vlan is not None and link.filters else (),
        snoops=link.snoops,
    )


def trunks_of(bridge: Link, nic: Nic, config: Config, view: View) -> tuple[Trunk, ...]:
    """The ports on which the VLANs of *nic* leave the node."""
    with refusals(f"reading the ports of {bridge.name}"):
        return ports.trunks(bridge, config.of_link(nic.link).uplinks, view.ports, view.link)


def would_adopt(bridge: Link, nic: Nic, view: View) -> bool:
    """Whether *bridge* would take over the MAC of the tap of *nic*.

    A bridge whose MAC nobody has set has the lowest among its ports (`br_stp_recalculate_bridge_id`). So it would if
    that is not lower than the one that the tap gets, or if it is the tap's already.
    """
    try:
        own = view.link(nic.tap).address
    except VanishedError:
        own = None
    above = bridge.address is None or bridge.address >= nic.tap_mac or bridge.address == own
    sysfs = sysfs_of(bridge.name, bridge, view.read_file)
    if sysfs is None:
        # /sys is another network namespace's. A bridge without a carrier has no live port that it could follow.
        return above or not bridge.carrier
    return not address_is_set(sysfs, view.read_file) and (above or not ports_of(sysfs) - {nic.tap})


def uplinks_of(nic: Nic, table: int, config: Config, view: View) -> Iterator[Uplink]:
    """The uplinks of *nic*: the configured ones, or the devices of the default routes in *table*, or else in main."""
    for family in sorted({prefix.version for prefix in nic.ip}):
        if config.routed.uplinks is not None:
            # One device may be named twice, by an alternative name.
            yield from dict.fromkeys(view.uplink(name, family) for name in config.routed.uplinks)
        else:
            yield from by_default(family, table, view) or by_default(family, MAIN_TABLE, view)


def by_default(family: int, table: int, view: View) -> list[Uplink]:
    """The devices of the default routes in *table*, without taps: what a guest can lead to itself is no uplink."""
    found = (view.uplink(name, family) for name in default_devices(view, family, table))
    return [uplink for uplink in found if not uplink.is_tap]


def with_gateways(uplink: Uplink, table: int, view: View) -> Uplink:
    """*uplink*, with the gateways of its family there: those of the default routes in *table*, or else in main."""
    index = view.ifindex(uplink.name)
    for one in dict.fromkeys((table, MAIN_TABLE)):
        found = [hop.gateway for hop in view.default_hops(uplink.family, one) if hop.index == index]
        gateways = tuple(dict.fromkeys(way for way in found if way and (":" in way) == (uplink.family == 6)))
        if gateways:
            return replace(uplink, gateways=gateways)
    return uplink


def of_a_daemon(route: RouteEntry) -> bool:
    """Whether a routing daemon has made *route*: in a routed fabric it leads to where the guest runs now.

    Their protocols are above "static"; what the node was told of its own network, by DHCP or a router, is not theirs.
    """
    told = (RTPROT_RA, RTPROT_DHCP)
    return route.type == RTN_UNICAST and route.protocol > RTPROT_STATIC and route.protocol not in told


def taken(nic: Nic, table: int, view: View) -> Iterator[tuple[str, str]]:
    """Each address or prefix of *nic* that means something else on this node, and what it is here."""
    for prefix in nic.ip:
        why = led_elsewhere(prefix, nic.tap, table, view) or why_not(prefix, view)
        if why:
            yield str(prefix), why


def led_elsewhere(prefix: Prefix, tap: str, table: int, view: View) -> str | None:
    """Where else than out of *tap* a route in *table* leads that is *prefix*'s own; None if nowhere."""
    for route in view.routes_to(prefix, table):
        if of_a_daemon(route):
            continue
        if route.type in LEADING_NOWHERE:
            return f"leads nowhere: table {table} has a route for it that says {LEADING_NOWHERE[route.type]}"
        dev = None if route.oif is None else view.device_name(route.oif)
        if dev != tap:
            return f"is already routed {'to a next hop' if dev is None else f'out of {dev}'} in table {table}"
    return None
