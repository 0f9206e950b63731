"""Whether a firewall of the node drops what goes to and from a guest."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice

from kvmifup.core.model import Nic
from kvmifup.core.records import record
from kvmifup.diagnosis.bridged import ports_of
from kvmifup.diagnosis.findings import Finding
from kvmifup.diagnosis.state import Look
from kvmifup.node.firewall import Chain, Chains, Rule, Test

LAYERS = {4: ("ip", "inet"), 6: ("ip6", "inet")}
DEPTH = 16  # jumps in one another, as the kernel allows (NFT_JUMP_STACK_SIZE)
ENOUGH = 16  # addresses of a NIC to try
# Chains and tables by whose names it is known who manages them.
MANAGERS = (("DOCKER", "Docker"), ("ufw", "ufw"), ("firewalld", "firewalld"), ("LIBVIRT", "libvirt"))


@record
class Packet:
    """The first packet of a TCP connection, on its way through the node.

    What is not known is None. *port_in* and *port_out* are the ports of a bridge that forwards it; None otherwise.
    *label* says for people where it goes, *accepting* are the tests that nftables and iptables would need to let it
    and others like it through.
    """

    family: int
    iif: str
    oif: str
    source: str | None
    target: str | None
    label: str
    accepting: tuple[str, str]
    port_in: str | None = None
    port_out: str | None = None
    bridge: bool = False


@record
class End:
    """How a packet ends in a chain: *verdict* is accept, drop, or "" for neither; *why* is for people.

    *meant*: a rule that asks for something of this packet says so, so that it is no oversight.
    """

    verdict: str
    why: str = ""
    meant: bool = False


def dropped(packet: Packet, chains: Chains) -> Iterator[Finding]:
    """What each hooked chain that drops *packet* makes worth saying."""
    for chain in chains.values():
        if chain.hook in ("prerouting", "forward", "postrouting") and concerns(chain, packet):
            ends = walk(chain, packet, chains)
            drops = [end for end in ends if end.verdict == "drop"]
            certain = len(drops) == len(ends)
            if drops and (certain or any(not end.meant for end in drops)):
                end = min(drops, key=lambda end: (end.meant, end.why))
                yield finding(chain, packet, end, certain=certain, chains=chains)


def concerns(chain: Chain, packet: Packet) -> bool:
    """Whether *packet* comes through *chain* at all."""
    return chain.family == "bridge" if packet.bridge else chain.family in LAYERS[packet.family]


def walk(chain: Chain, packet: Packet, chains: Chains, depth: int = 0) -> set[End]:
    """All ends that *packet* may find in *chain*: more than one where something is not known."""
    ends: set[End] = set()
    for rule in chain.rules:
        passes = matches(rule, packet, chain.hook)
        if passes is False or rule.verdict == "":
            continue
        some = after(rule, chain, packet, chains, depth)
        ends |= {end for end in some if end.verdict != "go on"}
        goes_on = any(end.verdict == "go on" for end in some)
        if passes and not goes_on:
            return ends
    if chain.hook is None:
        return ends | {End("go on")}
    return ends | {End(chain.policy, f"its policy is {chain.policy}")}


def after(rule: Rule, chain: Chain, packet: Packet, chains: Chains, depth: int) -> set[End]:
    """The ends of a packet that *rule* of *chain* has matched."""
    if rule.verdict == "accept":
        return {End("accept")}
    if rule.verdict == "drop":
        return {End("drop", f"by {rule.text}", bool(rule.tests))}
    if rule.verdict == "return":
        return {End("return")} if chain.hook is None else {End(chain.policy, f"its policy is {chain.policy}")}
    if rule.verdict in ("jump", "goto"):
        inner = chains.get((chain.program, chain.family, chain.table, rule.target))
        if inner is None or depth == DEPTH:
            return {End("accept"), End("go on")}
        ends = walk(inner, packet, chains, depth + 1)
        back = {end for end in ends if end.verdict in ("go on", "return")}
        ends -= back
        if back and rule.verdict == "goto":
            ends.add(End("return") if chain.hook is None else End(chain.policy, f"its policy is {chain.policy}"))
        elif back:
            ends.add(End("go on"))
        return ends
    return {End("accept"), End("go on")}  # something that is not understood may let it pass


def matches(rule: Rule, packet: Packet, hook: str | None) -> bool | None:
    """Whether *packet* passes the tests of *rule*; None if nobody knows."""
    results = [passes(test, packet, hook) for test in rule.tests]
    if False in results:
        return False
    return None if None in results else True


def passes(test: Test, packet: Packet, hook: str | None) -> bool | None:
    """Whether *packet* passes *test*; None if nobody knows."""
    known: Mapping[str, str | None] = {
        "iif": packet.iif,
        "oif": packet.oif,
        "source": packet.source,
        "target": packet.target,
        "protocol": "tcp",
        "family": str(packet.family),
        "state": "new",
        "status": "",  # nobody has changed its addresses
        "port_in": packet.port_in or "",
        "port_out": packet.port_out or "",
    }
    if test.about == "oif" and hook == "prerouting":
        return False  # where it goes is decided later
    value = known.get(test.about)
    if (
        test.about in ("source", "target")
        and test.values
        and all((":" in one) != (packet.family == 6) for one in test.values)
    ):
        return False  # it is about the other family
    if value is None:
        return None
    results = [equal(test.about, value, one) for one in test.values]
    found: bool | None = True if True in results else (None if None in results else False)
    return found if found is None else found != test.negated


def equal(about: str, value: str, wanted: str) -> bool | None:
    """Whether *value* is *wanted*, which can be a prefix, a range, or the beginning of a name; None if unclear."""
    if about in ("source", "target"):
        with suppress(ValueError, TypeError):
            address = ipaddress.ip_address(value)
            if "-" in wanted:
                first, last = map(ipaddress.ip_address, wanted.split("-"))
                return int(first) <= int(address) <= int(last)
            return address in ipaddress.ip_network(wanted, strict=False)
        return None
    if about == "protocol":
        return wanted.lower() in (value, "6", "all", "0")
    if wanted.endswith("*"):
        return value.startswith(wanted[:-1]) and bool(value)
    return value == wanted


# --- what to say --------------------------------------------------------------------------------------------


def finding(chain: Chain, packet: Packet, end: End, *, certain: bool, chains: Chains) -> Finding:
    """What there is to say about a *chain* that drops *packet*: for *certain*, or as far as can be told."""
    who = manager(chain, chains)
    by = f" ({who} manages it: make it permanent there)" if who else ""
    if not certain:
        return Finding(
            f"{named(chain)} drops new connections {packet.label}, but for those that some rules accept",
            f"{end.why}; which those are is not judged here",
            wrong=False,
        )
    mend = "" if end.meant else f"`{accepting(chain, packet)}`{by}"
    return Finding(f"{named(chain)} drops new connections {packet.label}", end.why, mend)


def named(chain: Chain) -> str:
    """A chain for people."""
    if chain.program == "nft":
        return f"the nftables chain {chain.family} {chain.table} {chain.name}"
    return f"the {chain.program} chain {chain.name}{'' if chain.table == 'filter' else f' of table {chain.table}'}"


def manager(chain: Chain, chains: Chains) -> str:
    """Which program manages the table of *chain*, by the names in it; empty if that does not tell."""
    names = [chain.table, *(name for *place, name in chains if place == [chain.program, chain.family, chain.table])]
    return next((who for sign, who in MANAGERS if any(name.startswith(sign) for name in names)), "")


def accepting(chain: Chain, packet: Packet) -> str:
    """The command that lets what is like *packet* through *chain*."""
    nft, iptables = before_routing(packet) if chain.hook == "prerouting" else packet.accepting
    if chain.program == "nft":
        return f"nft 'insert rule {chain.family} {chain.table} {chain.name} {nft} accept'"
    table = "" if chain.table == "filter" else f" -t {chain.table}"
    return f"{chain.program}{table} -I {chain.name} {iptables} -j ACCEPT"


def before_routing(packet: Packet) -> tuple[str, str]:
    """The tests that *packet* passes where nobody knows yet where it goes."""
    ip = "ip" if packet.family == 4 else "ip6"
    if packet.target:
        address = f" {ip} daddr {packet.target}", f" -d {packet.target}"
    else:
        address = (f" {ip} saddr {packet.source}", f" -s {packet.source}") if packet.source else ("", "")
    return f'iifname "{packet.iif}"{address[0]}', f"-i {packet.iif}{address[1]}"


def taps(name: str) -> str:
    """The names of the taps that *name* is one of, but for what comes at the end: "tap" for tap0."""
    return name.rstrip("0123456789") or name


def of_routed(tap: str, uplink: str, address: str, family: int) -> Iterator[Packet]:
    """What goes between a routed guest with *address* on *tap* and anybody beyond *uplink*."""
    like = taps(tap)
    nft, iptables = (f"{like}*", f"{like}+") if like != tap else (tap, tap)
    inward = f'oifname "{nft}"', f"-o {iptables}"
    outward = f'iifname "{nft}"', f"-i {iptables}"
    yield Packet(family, uplink, tap, None, address, f"from {uplink} to {address} on {tap}", inward)
    yield Packet(family, tap, uplink, address, None, f"from {address} on {tap} to {uplink}", outward)


def of_bridged(tap: str, bridge: str, port: str, address: str | None, family: int) -> Iterator[Packet]:
    """What goes between a guest on *tap* and another *port* of its bridge, where br_netfilter has it filtered."""
    both = f'iifname "{bridge}" oifname "{bridge}"', f"-i {bridge} -o {bridge}"
    for port_in, port_out, source, target in ((port, tap, None, address), (tap, port, address, None)):
        label = f"of IPv{family} from {port_in} to {port_out} on {bridge}"
        yield Packet(family, bridge, bridge, source, target, label, both, port_in, port_out)


def of_frames(tap: str, port: str, address: str | None, family: int) -> Iterator[Packet]:
    """The same in nftables' own family for bridges."""
    for iif, oif, source, target in ((port, tap, None, address), (tap, port, address, None)):
        tests = f'iifname "{iif}" oifname "{oif}"', ""
        yield Packet(family, iif, oif, source, target, f"of IPv{family} from {iif} to {oif}", tests, bridge=True)


def filtered(nic: Nic, look: Look) -> Iterator[Finding]:
    """What the node's firewalls drop of the traffic of *nic*."""
    if nic.mode == "routed":
        packets = routed_packets(nic, look)
    elif nic.mode == "bridged" and nic.link and look.overview.ifindex(nic.link) is not None:
        packets = bridged_packets(nic, nic.link, look)
    else:
        return
    said: set[tuple[str, str]] = set()
    for packet in packets:
        for one in dropped(packet, look.firewall):
            if (one.why, one.mend) not in said:
                said.add((one.why, one.mend))
                yield one


def routed_packets(nic: Nic, look: Look) -> Iterator[Packet]:
    """What goes between a routed guest and its uplinks."""
    for uplink in look.overview.facts(nic, look.session.config).uplinks:
        ours = (prefix for prefix in nic.ip if uplink.present and prefix.version == uplink.family)
        for prefix in islice(ours, ENOUGH):
            yield from of_routed(nic.tap, uplink.name, str(prefix.network_address), prefix.version)


def bridged_packets(nic: Nic, bridge: str, look: Look) -> Iterator[Packet]:
    """What goes between a bridged guest and its bridge's uplink, or another port."""
    kinds = (ports_of(bridge, look), look.overview.ports(bridge))
    port = next((name for ports in kinds for name in ports if name != nic.tap), None)
    if port is None:
        return
    for family in (4, 6):
        known: list[str | None] = [str(prefix.network_address) for prefix in nic.ip if prefix.version == family]
        for address in known or [None]:
            yield from of_frames(nic.tap, port, address, family)
            if through_iptables(bridge, family, look):
                yield from of_bridged(nic.tap, bridge, port, address, family)


def through_iptables(bridge: str, family: int, look: Look) -> bool:
    """Whether br_netfilter has what *bridge* forwards filtered as if it were routed."""
    name = "iptables" if family == 4 else "ip6tables"
    everywhere = look.overview.setting(f"net/bridge/bridge-nf-call-{name}")
    return everywhere is not None and (everywhere != "0" or bool(look.bridges.filtered(bridge, family)))
