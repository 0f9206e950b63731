"""What the kernel would do with the packets of a routed guest, and who would ask for it."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from kvmifup import phases
from kvmifup.core.errors import KernelError
from kvmifup.core.model import MAIN_TABLE, Config, Nic, Phase, Prefix, Uplink
from kvmifup.core.ops import LinkUp, Route, Rule, Sysctl
from kvmifup.diagnosis.causes import RP_FILTER_NAMES
from kvmifup.diagnosis.findings import Finding
from kvmifup.diagnosis.nics import Known
from kvmifup.inputs import tables
from kvmifup.node.overview import Overview
from kvmifup.runs.apply import Change

FAR = {4: "9.9.9.9", 6: "2620:fe::fe"}  # somewhere beyond every gateway; nothing is sent there
SAMPLE = 3  # addresses of a network to try


def uplinks(nic: Nic, kernel: Overview, config: Config) -> list[Uplink]:
    """Where the node has to answer for *nic*."""
    return [uplink for uplink in kernel.facts(nic, config).uplinks if uplink.present and uplink.arp]


def traffic(one: Known, nic: Nic, missing: Sequence[Change], kernel: Overview, config: Config) -> Iterator[Finding]:
    """Whether the packets from and for a routed guest would pass, as the kernel says; some only once it runs here."""
    found = uplinks(nic, kernel, config)
    yield from reverse_path(nic, missing, kernel, config)
    if unguarded := kernel.facts(nic, config).unguarded:
        yield Finding(
            "the guest can send from any IPv6 address",
            unguarded,
            'mend that, or say [routed] rp_filter = "off"; with "strict" such a node takes no routed guest',
            wrong=False,  # it was so before kvm-ifup could judge it
        )
    yield from surroundings([nic], found, kernel, config)
    if one.phase is not Phase.POST or any(isinstance(c.op, Route | LinkUp | Rule) for c in missing):
        return
    for prefix in filter(phases.is_host, nic.ip):
        address = phases.bare(prefix)
        ours = [uplink for uplink in found if uplink.family == prefix.version]
        for uplink in ours:
            neighbour = next(neighbours(uplink, kernel), None)
            if neighbour and not uplink.mend:
                with suppress(KernelError):  # no route there at all is said below
                    yield from passage(nic, address, neighbour, uplink, kernel)
        forwards = not any(is_forwarding(change, prefix.version) for change in missing)  # else said already
        if ours and forwards and refusing_default(nic, prefix.version, kernel) is None:
            try:
                kernel.way(address, FAR[prefix.version], nic.tap)
            except KernelError as error:
                why = os.strerror(error.errno) if error.errno else str(error)
                yield Finding(
                    f"what the guest sends from {address} to other networks is refused: {why}",
                    f"a policy rule or route for {nic.tap} says so, or there is no default route for it",
                    f"look at `ip{dash(prefix.version)} route get {FAR[prefix.version]} from {address} iif {nic.tap}`",
                )


def is_forwarding(change: Change, family: int) -> bool:
    """Whether *change* turns on forwarding on the tap: without it the kernel finds no way for anything."""
    return isinstance(change.op, Sysctl) and (change.op.name, change.op.family) == ("forwarding", family)


def dash(family: int) -> str:
    """The option of `ip` for *family*, with a blank before it; none for IPv4."""
    return " -6" if family == 6 else ""


def passage(nic: Nic, address: str, neighbour: str, uplink: Uplink, kernel: Overview) -> Iterator[Finding]:
    """Whether packets pass between a guest's *address* and *neighbour* on *uplink*. Raises KernelError."""
    table = nic.link or "main"
    rule = f"`ip{dash(uplink.family)} rule add iif {uplink.name} lookup {table}`"
    arrives = kernel.way(neighbour, address, uplink.name)
    if arrives not in (None, nic.tap):
        yield Finding(
            f"what comes in on {uplink.name} for {address} does not go out of {nic.tap}",
            f"another route or rule comes first, or nothing looks up {uplink.name}'s traffic in table {table}; "
            "so neither is ARP or NDP answered there",
            rule,
        )
    # The reverse look-up is made as for a packet from the uplink (`fib_validate_source`).
    if uplink.family == 4 and kernel.way(address, neighbour, nic.tap) is None:
        yield Finding(
            f"what the guest sends from {address} to {uplink.name} is dropped: reverse path filter on {nic.tap}",
            f"looked up, {address} is not behind {nic.tap}: another route or rule comes first",
            f"{rule}, or [routed] rp_filter",
        )


def reverse_path(nic: Nic, missing: Sequence[Change], kernel: Overview, config: Config) -> Iterator[Finding]:
    """The kernel takes the larger of a device's rp_filter and that of "all" (IN_DEV_RPFILTER)."""
    wanted = phases.RP_FILTER.get(config.routed.reverse_path)
    overall = kernel.setting("net/ipv4/conf/all/rp_filter")
    if wanted is None or overall is None or overall <= wanted:
        return
    if any(isinstance(change.op, Sysctl) and change.op.name == "rp_filter" for change in missing):
        return
    now, asked = RP_FILTER_NAMES.get(overall, overall), config.routed.reverse_path
    yield Finding(
        f"rp_filter on {nic.tap} is {now} in effect, not {asked}",
        f"net.ipv4.conf.all.rp_filter is {overall}, and the larger of the two counts",
        "`sysctl -w net.ipv4.conf.all.rp_filter=0`",
    )


# --- what holds for every guest of these uplinks ------------------------------------------------------------


def surroundings(nics: Sequence[Nic], found: Sequence[Uplink], kernel: Overview, config: Config) -> Iterator[Finding]:
    """What is wrong around *nics*, wired or not; *found* are their uplinks. Each thing is said once."""
    for uplink in dict.fromkeys(found):
        if uplink.family == 4 and uplink.present and uplink.up:
            yield from reverse_path_on(uplink, kernel)
    said: set[Finding] = set()
    for nic in nics:
        for finding in (*defaults(nic, kernel), *asked_for(nic, found, kernel), *overtaken(nic, kernel, config)):
            if finding not in said:
                said.add(finding)
                yield finding


def neighbours(uplink: Uplink, kernel: Overview) -> Iterator[str]:
    """Addresses that are, or could be, on *uplink*'s segment: first the gateway."""
    gateway = kernel.gateway(uplink.family, uplink.name)
    if gateway:
        yield gateway
    for network in kernel.connected(uplink.family, uplink.name):
        yield from sample(network, kernel.addresses(uplink.name))[:1]


def sample(network: Prefix, own: Sequence[str]) -> list[str]:
    """Some addresses of *network* that are not the node's *own*, from its end: there are seldom routes to them."""
    last = int(network.broadcast_address) - (network.version == 4 and network.prefixlen < 31)
    numbers = range(last, max(last - 2 * SAMPLE, int(network.network_address)), -1)
    found = [
        str(ipaddress.ip_address(number) if network.version == 4 else ipaddress.IPv6Address(number))
        for number in numbers
    ]
    return [address for address in found if address not in own][:SAMPLE]


def reverse_path_on(uplink: Uplink, kernel: Overview) -> Iterator[Finding]:
    """Whether the reverse path filter drops what neighbours, or machines beyond the gateway, send to *uplink*.

    It does not matter for whom: it is the source that the kernel looks up (`fib_validate_source`).
    """
    own = kernel.addresses(uplink.name)
    settings = [kernel.setting(f"net/ipv4/conf/{name}/rp_filter") or "0" for name in ("all", uplink.name)]
    to = next((address for address in own if ":" not in address), None)
    if max(settings) not in ("1", "2") or to is None:
        return
    gateway = kernel.gateway(4, uplink.name)
    sources = [(str(network), sample(network, own)) for network in kernel.connected(4, uplink.name)]
    if gateway:
        sources += [(gateway, [gateway]), (f"networks beyond {gateway}", [FAR[4]])]
    dropped = []
    for name, addresses in sources:
        with suppress(KernelError):  # then it is not this filter that drops it
            if addresses and all(kernel.way(address, to, uplink.name) is None for address in addresses):
                dropped.append(name)
    if dropped:
        yield Finding(
            f"what comes in on {uplink.name} from {', '.join(dropped)} is dropped: reverse path filter",
            f"rp_filter is {RP_FILTER_NAMES[max(settings)]} there, and the way back does not lead out of {uplink.name}",
            f"`sysctl -w net/ipv4/conf/{uplink.name}/rp_filter=2`, or a way back out of {uplink.name}",
        )


def refusing_default(nic: Nic, family: int, kernel: Overview) -> tuple[int, str] | None:
    """The table of *nic* and the type of its default route of *family*, if that leads nowhere."""
    table = MAIN_TABLE if nic.link is None else tables.number(nic.link)
    kind = None if table is None else kernel.default_type(family, table)
    return (table, kind) if table is not None and kind else None


def defaults(nic: Nic, kernel: Overview) -> Iterator[Finding]:
    """A default route in the NIC's table that leads nowhere."""
    for family in sorted({prefix.version for prefix in nic.ip}):
        found = refusing_default(nic, family, kernel)
        if found is None:
            continue
        table, kind = found
        if kind == "throw":
            yield Finding(
                f"the IPv{family} default route in table {table} is throw",
                "what the guest sends to other networks is looked up in the tables of later rules, as without it",
                wrong=False,
            )
            continue
        yield Finding(
            f"the IPv{family} default route in table {table} is {kind}",
            "what the guest sends to other networks is dropped",
            f"`ip{dash(family)} route del {kind} default table {table}`",
        )


def overtaken(nic: Nic, kernel: Overview, config: Config) -> Iterator[Finding]:
    """Rules that come after ours, so that what the NIC's table knows is not looked up by them.

    Ganeti's own script makes its rule the last one before main's.
    """
    ours = config.routed.rule_priority
    for family in (4, 6) if nic.link else ():
        for number in kernel.later_rules(family, nic.tap, ours):
            yield Finding(
                f"IPv{family} policy rule {number} comes after those of guests with a table, which are at {ours}",
                "it does not count for where such a guest's table has a route to",
                f"if it has to: [routed] rule_priority above {number}, or a priority below {ours} for it",
                wrong=False,
            )


def asked_for(nic: Nic, found: Sequence[Uplink], kernel: Overview) -> Iterator[Finding]:
    """Prefixes of *nic* that are part of an uplink's own network: neighbours ask there for each address in them."""
    for prefix in nic.ip:
        for uplink in found:
            if phases.is_host(prefix) or uplink.family != prefix.version or not uplink.present:
                continue
            around = [network for network in kernel.connected(uplink.family, uplink.name) if within(prefix, network)]
            if around and not answered(prefix, uplink, kernel):
                proxy = f"`sysctl -w net/ipv4/conf/{uplink.name}/proxy_arp=1`, or " if uplink.family == 4 else ""
                yield Finding(
                    f"{prefix} is part of {around[0]}, the network of {uplink.name}",
                    f"neighbours there ask for its addresses with {'ARP' if uplink.family == 4 else 'NDP'}, "
                    "and nobody answers: only single addresses get proxy entries",
                    f"{proxy}list its addresses in ip one by one, or have the router route it to this node",
                )


def within(prefix: Prefix, network: Prefix) -> bool:
    """Whether *prefix* is part of *network*, and not all of it."""
    return network.prefixlen < prefix.prefixlen and prefix.network_address in network


def answered(prefix: Prefix, uplink: Uplink, kernel: Overview) -> bool:
    """Whether the node answers on *uplink* for all of *prefix* without us."""
    everything = [kernel.setting(f"net/ipv4/conf/{name}/proxy_arp") for name in ("all", uplink.name)]
    if uplink.family == 4 and "1" in everything:
        return True
    return prefix.num_addresses <= 1024 and all(kernel.is_proxied(str(one), uplink.name) for one in prefix)
